"""Real vLLM on CPU: one engine per family and way of running it, shared by all tests of its group.

The whole folder is left out where vLLM is not installed. Environment variables are set before vLLM is imported.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class Rigs:
    """Makes rigs, and keeps the last one: tests are grouped by engine, and two engines would not fit two cores."""

    def __init__(self) -> None:
        self._key: object = None
        self._rig: Any = None

    def get(self, family: str, **ways: Any) -> Any:
        key = (family, *sorted(ways.items()))
        if key != self._key:
            self.close()
            from tests.vllm.rig import VllmRig

            folder = Path(tempfile.mkdtemp(prefix="weighbridge-vllm-"))
            self._rig, self._key = VllmRig(folder, family, **ways), key
        return self._rig

    def close(self) -> None:
        if self._rig is not None:
            self._rig.close()
        self._rig = self._key = None
        gc.collect()


@pytest.fixture(scope="session")
def rigs() -> Iterator[Rigs]:
    made = Rigs()
    yield made
    made.close()
