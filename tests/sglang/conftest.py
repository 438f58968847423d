"""Real SGLang on CPU: one engine per family and way of running it, shared by all tests of its group.

The whole folder is left out where SGLang is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.rigs import Rigs, ignore_what_engines_leave_open, rigs_of

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
if find_spec("sglang"):
    import tests.sglang.rig  # noqa: F401  # puts the shims on the path, before SGLang is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """SGLang warns of what this machine lacks."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("sglang"):
        ignore_what_engines_leave_open(config)


@pytest.fixture(scope="session")
def rigs() -> Iterator[Rigs]:
    from tests.sglang.rig import SglangRig

    made = rigs_of(SglangRig)
    yield made
    made.close()
