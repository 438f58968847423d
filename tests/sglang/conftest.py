"""Real SGLang on CPU: one engine per family and way of running it, shared by all tests of its group.

The whole folder is left out where SGLang is not installed. `shims` stands in for what SGLang on CPU lacks without its
kernels (each file says what it replaces); it is on the path of these tests and of the processes they start, nowhere
else. The bench needs them as well where there is no GPU (`make bench-sglang`):

    PYTHONPATH=tests/sglang/shims:. python -m bridge bench --engine sglang:qwen2-0.5b
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

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


class Rigs:
    """Makes rigs, and keeps the last one: tests are grouped by engine, and two engines would not fit two cores."""

    def __init__(self) -> None:
        self._key: object = None
        self._rig: Any = None

    def get(self, family: str, **ways: Any) -> Any:
        key = (family, *sorted(ways.items()))
        if key != self._key:
            self.close()
            from tests.sglang.rig import SglangRig

            folder = Path(tempfile.mkdtemp(prefix="weighbridge-sglang-"))
            self._rig, self._key = SglangRig(folder, family, **ways), key
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
