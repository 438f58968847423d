"""What the rigs around real engines share: one engine at a time, variables for its start, how far answers are apart."""

from __future__ import annotations

import gc
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.handles import EngineHandle

Logprobs = list[list[float]]

# Engines leave sockets, files and contexts of a closed engine to the collector, which finds them in some later test.
# They are not ours to close; what is ours is watched by the tests of the other folders, where nothing is ignored.
LEFT_OPEN_BY_ENGINES = ("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


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


def refuses_what_does_not_fit(engine: EngineHandle, vocabulary: int, longest: int) -> None:
    """Prompts and samplings that an engine may die of are refused in words, and it answers the next one."""
    short = bridge.Sampling(max_tokens=1, temperature=0.0)
    bad: list[tuple[Any, bridge.Sampling, str]] = [
        ([[5], []], short, "prompt 1"),
        ([[5], [vocabulary]], short, f"prompt 1; expected: 0 to {vocabulary - 1}; got: {vocabulary}"),
        ([[5], [5, 10**6]], short, "prompt 1"),
        ([[5], [-5]], short, "prompt 1"),
        ([[5] * (longest + 1)], short, f"prompt 0; expected: 1 to {longest} tokens; got: {longest + 1}"),
        ([[5] * 100_000], short, "prompt 0"),
        ([5, 6], short, "prompt 0"),
        ([[5]], bridge.Sampling(max_tokens=-1), "sampling.max_tokens"),
        ([[5]], bridge.Sampling(temperature=-1.0), "sampling.temperature"),
        ([[5]], bridge.Sampling(top_p=0.0), "sampling.top_p"),
    ]
    for prompts, sampling, where in bad:
        with pytest.raises(bridge.ConfigError, match=re.escape(f"where: {where}")) as caught:
            engine.generate(prompts, sampling)
        assert caught.value.remedy
    assert len(engine.generate([[vocabulary - 1], [5] * longest], short)) == 2
    assert [len(c.token_ids) for c in engine.generate([[5]], bridge.Sampling(max_tokens=0))] == [0]
