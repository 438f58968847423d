"""What the rigs around real engines share: one engine at a time, variables for its start, how far answers are apart."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Logprobs = list[list[float]]


class Rigs:
    """Makes rigs, and keeps the last one: tests are grouped by engine, and two engines would not fit two cores.

    `make(folder, family, **ways)` answers one; engines are imported by then, not before.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._key: object = None
        self._rig: Any = None

    def get(self, family: str, **ways: Any) -> Any:
        key = (family, *sorted(ways.items()))
        if key != self._key:
            self.close()
            folder = Path(tempfile.mkdtemp(prefix="weighbridge-rig-"))
            self._rig, self._key = self._make(folder, family, **ways), key
        return self._rig

    def close(self) -> None:
        if self._rig is not None:
            self._rig.close()
        self._rig = self._key = None
        gc.collect()


def difference(a: Logprobs, b: Logprobs) -> float:
    """Mean |difference| in nats."""
    values = [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(values) / len(values)


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as an engine starts."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
