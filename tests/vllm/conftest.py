"""Real vLLM on CPU: one engine per family and way of running it, shared by all tests of its group.

The whole folder is left out where vLLM is not installed. Environment variables are set before vLLM is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.rigs import LEFT_OPEN_BY_ENGINES, Rigs

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Where vLLM is installed, warnings about what it leaves open fail no test."""
    if find_spec("vllm"):
        for line in LEFT_OPEN_BY_ENGINES:
            config.addinivalue_line("filterwarnings", line)


def _make(folder: Path, family: str, **ways: Any) -> Any:
    from tests.vllm.rig import VllmRig

    return VllmRig(folder, family, **ways)


@pytest.fixture(scope="session")
def rigs() -> Iterator[Rigs]:
    made = Rigs(_make)
    yield made
    made.close()
