"""The range of SGLang versions that the driver was tried with."""

from __future__ import annotations

from functools import partial

from engine_side.engines.common.versions import require_version

check_version = partial(require_version, "SGLang", oldest=(0, 5, 23), first_unknown=(0, 5, 24))
"""Raises ConfigError for a version of SGLang that was not tried: the scheduler's inner calls change between patches."""
