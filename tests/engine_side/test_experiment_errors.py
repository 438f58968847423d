"""A fault in the middle of an experiment is reported as what it is, never as "no strategy" or as another strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bridge.errors import BridgeError, ConfigError, DeadlineExceeded, OutOfMemory, PeerLost
from bridge.model.levels import RANK_LEVELS
from bridge.protocol.deadline import Deadline
from engine_side.driver.quantised_trial import require_strategies
from engine_side.load.loader import Loader
from engine_side.plan.bake import bake
from engine_side.plan.experiment_errors import is_out_of_memory
from engine_side.plan.strategies import decide
from engine_side.verify.verify import Verifier
from tests.engine_side import toy_engine as toy


class FailingAllocator(TorchDispatchMode):
    """Raises torch.OutOfMemoryError at the k-th operation of this thread that makes a tensor with memory; 0: never."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.allocations = k, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        makes = any(returned.alias_info is None for returned in func._schema.returns)
        if makes and isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.allocations += 1
            if self.allocations == self.k:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return result


def failing_runs(run: Callable[[], object], samples: int) -> Iterator[int]:
    """Indices of about `samples` allocations of `run`, evenly spread; the last one is that of no allocation."""
    with FailingAllocator(0) as counter:
        run()
    assert counter.allocations
    return iter([*range(1, counter.allocations, max(1, counter.allocations // samples)), counter.allocations])


METHODS = [toy.Plain, toy.Transposed, toy.Packed, toy.HiddenCopy, toy.Latched]


@pytest.mark.parametrize("method", METHODS)
def test_no_memory_for_an_experiment_is_said_so(method: Any) -> None:
    host = toy.ToyHost(method=method, layers=1)
    baked = toy.checked(bake(host, host.infos))
    for k in failing_runs(lambda: decide(host, baked), 40):
        with pytest.raises(OutOfMemory, match=r"memory ran out while \w+.*where: .*20\.00 MiB.*remedy") as caught, \
                FailingAllocator(k):  # fmt: skip
            decide(host, baked)
        assert "no strategy" not in str(caught.value)


@pytest.mark.parametrize("method", [toy.Packed, toy.HiddenCopy, toy.Latched])
def test_no_memory_for_a_rebuild_or_a_probe_is_said_so(method: Any) -> None:
    with loaded(method) as (loader, verifier):
        for k in failing_runs(lambda: loader.apply(0), 8):
            with pytest.raises(OutOfMemory, match=r"layers\.0\.qkv"), FailingAllocator(k):
                loader.apply(0)
            loader.apply(0)
        for k in failing_runs(lambda: verifier.probe(0, every=True), 20):
            with pytest.raises(OutOfMemory, match="while "), FailingAllocator(k):
                verifier.probe(0, every=True)
        assert verifier.probe(0, every=True).ok


@contextmanager
def loaded(method: Any) -> Iterator[tuple[Loader, Verifier]]:
    host = toy.ToyHost(method=method, layers=1)
    loader = Loader(host, host.infos)
    try:
        loader.map(*toy.arena(host.infos, 1))
        verifier = Verifier(loader)
        assert all(level.ok for level in verifier.run(RANK_LEVELS, 0, outcome=loader.apply(0)))
        yield loader, verifier
    finally:
        loader.close()


class MissingKernel(toy.Plain):
    """A step that works once, when the engine starts, and finds no kernel for a twin."""

    def post(self, layer: Any) -> None:
        raise ModuleNotFoundError("No module named 'kernels'")


def test_a_step_that_fails_on_every_twin_names_module_and_step() -> None:
    host = toy.ToyHost(method=toy.Plain)
    host.options["method"] = MissingKernel
    with pytest.raises(ConfigError, match=r"while running post-load on a twin.*layers\.\d\.qkv.*kernels"):
        decide(host, toy.checked(bake(host, host.infos)))


def test_memory_that_ran_out_is_known_behind_another_exception() -> None:
    wrapped = ValueError("the kernel cannot be built")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(ValueError("shape"))


class QuantisedDriver:
    """As much of a driver as the trial looks at."""

    quantisation = "fp8"

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint


class FailingRanks:
    """Ranks whose experiments end with an error."""

    def __init__(self, error: BridgeError) -> None:
        self.error = error

    def ask(self, job: Any, kind: Any, deadline: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error", [OutOfMemory("memory ran out while building a twin"), PeerLost("rank 1 is gone"), DeadlineExceeded("late")]
)
def test_a_trial_that_shows_nothing_about_the_weights_does_not_blame_them(error: BridgeError, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    driver: Any = QuantisedDriver(tmp_path)
    ranks: Any = FailingRanks(error)
    with pytest.raises(type(error)) as caught:
        require_strategies("engine0", driver, ranks, Deadline.after(60))
    assert caught.value is error
    ranks.error = ConfigError("no strategy can update this module", where="a.b (Linear)")
    with pytest.raises(ConfigError, match=r"quantised as fp8.*a\.b \(Linear\)"):
        require_strategies("engine0", driver, ranks, Deadline.after(60))
