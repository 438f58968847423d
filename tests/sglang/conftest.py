"""Real SGLang on CPU: one engine per family and way of running it, shared by all tests of its group.

The whole folder is left out where SGLang is not installed. `shims` stands in for what SGLang on CPU lacks without its
kernels (each file says what it replaces); it is on the path of these tests and of the processes they start, nowhere
else. The bench needs them as well where there is no GPU (`make bench-sglang`):

    PYTHONPATH=tests/sglang/shims:. python -m bridge bench --engine sglang:qwen2-0.5b
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.rigs import LEFT_OPEN_BY_ENGINES, Rigs

SHIMS = str(Path(__file__).parent / "shims")
collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
if find_spec("sglang"):
    sys.path.insert(0, SHIMS)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SHIMS, os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """SGLang warns of what this machine lacks."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


def pytest_configure(config: pytest.Config) -> None:
    """Where SGLang is installed, warnings about what it leaves open fail no test."""
    if find_spec("sglang"):
        for line in LEFT_OPEN_BY_ENGINES:
            config.addinivalue_line("filterwarnings", line)


def _make(folder: Path, family: str, **ways: Any) -> Any:
    from tests.sglang.rig import SglangRig

    return SglangRig(folder, family, **ways)


@pytest.fixture(scope="session")
def rigs() -> Iterator[Rigs]:
    made = Rigs(_make)
    yield made
    made.close()
