"""A copying thread that hangs or fails ends the snapshot within its timeout, with an error of ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import BridgeError, Busy, ConfigError, DeadlineExceeded
from bridge.model.manifest import TensorInfo, lay_out
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena
from trainer_side.names.tensor_layout import WeightSource
from trainer_side.snapshot import snapshotter
from trainer_side.snapshot.snapshotter import Snapshotter

PAIRS = [("big", torch.randn(1 << 18)), ("other", torch.randn(1 << 18)), ("small", torch.randn(3))]


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    infos = [TensorInfo(name, "fp32", tuple(tensor.shape)) for name, tensor in PAIRS]
    made = Arena.create(lay_out(infos), name="test", directory=tmp_path)
    yield made
    made.close()
    made.unlink()


@contextmanager
def fault_in_one_copying_thread(patch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any) -> Iterator[None]:
    """The fault `copying thread`: the first call of `owner.name` on such a thread does `fault` instead."""
    real, left = getattr(owner, name), [fault]

    def call(*given: Any, **options: Any) -> Any:
        if left and threading.current_thread().name.startswith("weighbridge-snapshot"):
            left.pop()()
        return real(*given, **options)

    with patch.context() as inside:
        inside.setattr(owner, name, call)
        yield


def fail() -> None:
    raise RuntimeError("no more memory for a thread")


def in_time(writer: Snapshotter, timeout_s: float) -> BridgeError:
    """The error of a write; it has to come soon after the timeout."""
    started = time.monotonic()
    with pytest.raises(BridgeError) as caught:
        writer.write(0, WeightSource().collect(PAIRS), deadline=Deadline.after(timeout_s))
    assert time.monotonic() - started < timeout_s + 10
    assert caught.value.remedy
    return caught.value


def copying_threads() -> int:
    return sum(thread.name.startswith("weighbridge-snapshot") for thread in threading.enumerate())


def wait_for_threads(count: int) -> None:
    ends = time.monotonic() + 20
    while copying_threads() > count:
        assert time.monotonic() < ends, "a copying thread was not released"
        time.sleep(0.02)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("hangs", [False, True])
def test_a_copying_thread_that_does_not_start(arena: Arena, monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    kept, before, go = torch.get_num_threads(), copying_threads(), threading.Event()
    writer = Snapshotter(arena, 3)
    with fault_in_one_copying_thread(monkeypatch, torch, "set_num_threads", go.wait if hangs else fail):
        error = in_time(writer, 1.0 if hangs else 30.0)
    assert type(error) is (DeadlineExceeded if hangs else ConfigError)
    assert "did not start" in str(error)
    assert torch.get_num_threads() == kept
    wait_for_threads(before + hangs)
    go.set()
    wait_for_threads(before)
    writer.write(0, WeightSource().collect(PAIRS))
    writer.close()


@pytest.mark.timeout(60)
def test_a_copying_thread_that_hangs_while_it_copies(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    before, go = copying_threads(), threading.Event()
    writer = Snapshotter(arena, 2)
    with fault_in_one_copying_thread(monkeypatch, snapshotter, "memmove", go.wait):
        error = in_time(writer, 1.0)
        assert type(error) is DeadlineExceeded
        assert "did not end" in str(error)
        wait_for_threads(before + 1)
        with pytest.raises(Busy, match="still runs"):  # it may still write
            writer.write(0, WeightSource().collect(PAIRS))
    go.set()
    wait_for_threads(before)
    writer.write(0, WeightSource().collect(PAIRS))
    assert all(torch.equal(got, want) for got, (_, want) in zip(arena.tensors(0), PAIRS, strict=True))
    writer.close()


@pytest.mark.timeout(90)
def test_a_push_ends_within_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, engine, go = nn.Linear(600, 600), nn.Linear(600, 600), threading.Event()
    before = copying_threads()
    with bridge.attach(engine) as b:
        b.push(trainer.named_parameters(), verify="weights")
        with torch.no_grad():
            trainer.weight.add_(1.0)
        started = time.monotonic()
        with (
            fault_in_one_copying_thread(monkeypatch, snapshotter, "memmove", go.wait),
            pytest.raises(DeadlineExceeded, match="did not end"),
        ):
            b.push(trainer.named_parameters(), verify="weights", timeout_s=1.5)
        assert time.monotonic() - started < 12
        go.set()
        wait_for_threads(before)
        receipt = b.push(trainer.named_parameters(), verify="weights")
        assert receipt.verified is True
        assert torch.equal(engine.weight, trainer.weight)
