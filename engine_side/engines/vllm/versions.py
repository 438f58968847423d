"""Check of the version of vLLM."""

from __future__ import annotations

from functools import partial

from engine_side.engines.common.versions import require_version

check_version = partial(require_version, "vLLM", oldest=(0, 32), first_unknown=(0, 33))
"""Raises ConfigError for a version of vLLM that was not tried: hooks change from one minor version to the next."""
