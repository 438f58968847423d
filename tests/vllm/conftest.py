"""Real vLLM on CPU: one engine per family and way of running it, shared by all tests of its group.

The whole folder is left out where vLLM is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.rigs import Rigs, ignore_what_engines_leave_open, rigs_of
from tests.vllm.rig import VllmRig

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("vllm"):
        ignore_what_engines_leave_open(config)


@pytest.fixture(scope="session")
def rigs() -> Iterator[Rigs]:
    made = rigs_of(VllmRig)
    yield made
    made.close()
