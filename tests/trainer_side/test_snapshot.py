"""What lies in the arena after a snapshot is `tensor.to(wire dtype)`, bit for bit, with the digests of those bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bridge.errors import ConfigError, NonFinite, ProtocolError
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.torch_dtypes import DTYPES, dtype_of
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena
from bridge.shm.seal import CHUNK, digest_slot, seal_slot
from trainer_side.names.tensor_layout import Collected, WeightSource
from trainer_side.snapshot import snapshotter
from trainer_side.snapshot.batches import SMALL
from trainer_side.snapshot.finite import is_finite
from trainer_side.snapshot.snapshotter import BLOCK, Snapshotter

Pairs = list[tuple[str, torch.Tensor]]
MakeArena = Callable[..., Arena]


@pytest.fixture
def arena_for(tmp_path: Path) -> Iterator[MakeArena]:
    made: list[Arena] = []

    def make(collected: Collected, wire: dict[str, str] | None = None) -> Arena:
        infos = [TensorInfo(i.name, (wire or {}).get(i.name, i.dtype), i.shape, i.aliases) for i in collected.tensors]
        made.append(Arena.create(lay_out(infos), name="test", directory=tmp_path))
        return made[-1]

    yield make
    for arena in made:
        arena.close()
        arena.unlink()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, row-major."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_written(arena: Arena, slot: int, wanted: dict[str, torch.Tensor], digests: bytes) -> None:
    for spec, tensor in zip(arena.manifest.tensors, arena.tensors(slot), strict=True):
        assert torch.equal(bits(tensor), bits(wanted[spec.name].to(dtype_of(spec.dtype)))), spec.name
    assert digests == digest_slot(arena, slot)


def every_kind() -> Pairs:
    """Big and small, in order and not, every dtype, no elements, no dimensions."""
    torch.manual_seed(0)
    big = SMALL // 2
    return [
        ("chunks", torch.randn(CHUNK // 4 * 2 + 12345)),
        ("cast", nn.Parameter(torch.randn(3, big))),
        ("transposed", torch.randn(300, 1000).t()),
        ("small", nn.Parameter(torch.randn(7, 5))),
        ("small_transposed", torch.randn(7, 5).t()),
        ("scalar", torch.tensor(2.5)),
        ("none", torch.empty(0, 4)),
        ("stepped", torch.randn(big * 4)[::2]),
        ("wide", torch.randn(1, 8).expand(big, 8)),
        *((name, (torch.randn(9) * 3).to(dtype)) for name, dtype in DTYPES.items()),
        ("last", torch.randn(3, dtype=torch.float64)),
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_kind_of_tensor(arena_for: MakeArena, threads: int) -> None:
    pairs = every_kind()
    source = WeightSource()
    wire = {"cast": "bf16", "small": "fp16", "transposed": "bf16", "last": "fp32", "small_transposed": "fp8_e4m3"}
    arena = arena_for(source.collect(pairs), wire)
    snapshotter = Snapshotter(arena, threads)
    for slot in (0, 1, 0):
        with torch.no_grad():
            for name, tensor in pairs:
                if name not in ("wide", "scalar") and tensor.dtype in (torch.float32, torch.float64):
                    tensor[..., :1].mul_(2)
        written = snapshotter.write(slot, source.collect(pairs))
        assert_written(arena, slot, dict(pairs), written.digests)
        assert 0 < written.nbytes <= arena.manifest.payload_nbytes
    snapshotter.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_that_lie_there_already_are_not_written_again(arena_for: MakeArena, threads: int) -> None:
    torch.manual_seed(0)
    sizes = {"big": (3 * CHUNK // 4 // 8, 8), "medium": (SMALL // 4 + 1,), "small": (5, 3), "tiny": ()}
    pairs = [(name, torch.randn(shape)) for name, shape in sizes.items()]
    source = WeightSource()
    arena = arena_for(source.collect(pairs), {})
    snapshotter = Snapshotter(arena, threads)
    whole = snapshotter.write(0, source.collect(pairs))
    assert whole.nbytes == arena.manifest.payload_nbytes
    again = snapshotter.write(0, source.collect(pairs))
    assert (again.nbytes, again.digests) == (0, whole.digests)
    pairs[0][1][-1, -1] += 1
    changed = snapshotter.write(0, source.collect(pairs))
    assert 0 < changed.nbytes <= 1 << 20, "one element of the last block"
    assert_written(arena, 0, dict(pairs), changed.digests)
    snapshotter.close()


class Experts(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(3, 2 * rows, 8))
        self.norm = nn.Parameter(torch.randn(4))


def unfused(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Split experts, one half transposed, and glue two pieces together again."""
    made = {"norm": state["norm"]}
    for k, expert in enumerate(state["both"].unbind()):
        gate, up = expert.chunk(2)
        made[f"{k}.gate"], made[f"{k}.up"] = gate, up.t().contiguous()
    made["glued"] = torch.cat([state["both"][2], state["both"][0]])
    return made


@pytest.mark.parametrize("rows", [4, SMALL // 16])
@pytest.mark.parametrize("strided", [False, True])
def test_converted_tensors(arena_for: MakeArena, converts: Callable[[Any], None], rows: int, strided: bool) -> None:
    converts(unfused)
    model = Experts(rows)
    if strided:
        model.both = nn.Parameter(torch.randn(8, 2 * rows, 3).permute(2, 1, 0))
    source = WeightSource(model)
    arena = arena_for(source.collect(model.named_parameters()), {"0.up": "bf16", "glued": "fp16"})
    snapshotter = Snapshotter(arena, 2)
    for slot in (0, 1):
        written = snapshotter.write(slot, source.collect(model.named_parameters()))
        wanted = unfused(model, dict(model.named_parameters()))
        assert_written(arena, slot, wanted, written.digests)
    snapshotter.close()


def halves(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs of consecutive elements only, with gaps where something was left out, beside a whole tensor."""
    both = state["both"]
    made = {f"{k}.{j}": half for k in (2, 0) for j, half in enumerate(both[k].chunk(2))}
    return {"tail": both[1, -1], "norm": state["norm"], **made}


@pytest.mark.parametrize("strided", [False, True])
def test_runs_of_a_fused_tensor(arena_for: MakeArena, converts: Callable[[Any], None], strided: bool) -> None:
    converts(halves)
    model = Experts(4)
    source = WeightSource(model)
    arena = arena_for(source.collect(model.named_parameters()), {"2.1": "bf16"})
    snapshotter = Snapshotter(arena)
    if strided:
        # the same shape, so the layout stays, but the runs are no longer runs
        model.both = nn.Parameter(torch.randn(8, 8, 3).permute(2, 1, 0))
    for slot in (0, 1):
        written = snapshotter.write(slot, source.collect(model.named_parameters()))
        assert_written(arena, slot, halves(model, dict(model.named_parameters())), written.digests)
    snapshotter.close()


NAN, INF = float("nan"), float("inf")


FORMATS = ["fp32", "bf16", "fp16", "fp64", "fp8_e5m2"]


@pytest.mark.parametrize(
    ("dtype", "value"),
    # fp8_e4m3 has no infinity
    [(d, v) for d in FORMATS for v in (NAN, -NAN, INF, -INF)] + [("fp8_e4m3", NAN), ("fp8_e4m3", -NAN)],
)
@pytest.mark.parametrize("size", [5, SMALL + BLOCK + 3])
def test_nonfinite_values_are_found_and_named(arena_for: MakeArena, value: float, dtype: str, size: int) -> None:
    kind = dtype_of(dtype)
    bad = torch.ones(2, size).to(kind)
    bad[1, 3], bad[1, size - 1] = torch.tensor(value).to(kind), torch.tensor(value).to(kind)
    pairs = [("before", torch.ones(4).to(kind)), ("bad", bad), ("after", torch.ones(4).to(kind))]
    collected = WeightSource().collect(pairs)
    arena = arena_for(collected)
    snapshotter = Snapshotter(arena)
    with pytest.raises(NonFinite, match=r"bad holds .*where: bad\[1, 3\];.*got: 2 of .*allow_nonfinite=True") as caught:
        snapshotter.write(0, collected)
    assert caught.value.names == ("bad",)
    assert arena.seal_of(0) is None
    written = snapshotter.write(0, collected, allow_nonfinite=True)
    assert_written(arena, 0, dict(pairs), written.digests)
    snapshotter.close()


def test_the_largest_finite_values_pass(arena_for: MakeArena) -> None:
    pairs = []
    for name, dtype in DTYPES.items():
        if dtype.is_floating_point:
            top = torch.finfo(dtype).max
            pairs.append((name, torch.tensor([top, -top, 0.0], dtype=torch.float64).to(dtype)))
    collected = WeightSource().collect(pairs)
    snapshotter = Snapshotter(arena_for(collected))
    snapshotter.write(0, collected)
    snapshotter.close()


def test_integers_have_no_bad_patterns(arena_for: MakeArena) -> None:
    pairs = [(name, torch.full((3,), -1).to(dtype)) for name, dtype in DTYPES.items() if not dtype.is_floating_point]
    collected = WeightSource().collect(pairs)
    snapshotter = Snapshotter(arena_for(collected))
    assert_written(snapshotter.arena, 0, dict(pairs), snapshotter.write(0, collected).digests)
    snapshotter.close()


@pytest.mark.parametrize("size", [3, SMALL])
def test_an_overflow_of_the_cast_is_found(arena_for: MakeArena, size: int) -> None:
    value = torch.ones(size)
    value[2] = 1e38
    collected = WeightSource().collect([("w", value)])
    snapshotter = Snapshotter(arena_for(collected, {"w": "fp16"}))
    with pytest.raises(NonFinite, match=r"where: w\[2\]; expected: finite values after the cast to fp16"):
        snapshotter.write(0, collected)
    snapshotter.close()


def test_all_bad_tensors_are_listed(arena_for: MakeArena) -> None:
    pairs = [(f"{k}", torch.full((3,), NAN if k % 2 else 1.0)) for k in range(6)]
    collected = WeightSource().collect(pairs)
    snapshotter = Snapshotter(arena_for(collected))
    with pytest.raises(NonFinite, match="and 2 more") as caught:
        snapshotter.write(0, collected)
    assert caught.value.names == ("1", "3", "5")
    snapshotter.close()


def test_what_was_not_sent_is_carried_over(arena_for: MakeArena) -> None:
    pairs = every_kind()
    source = WeightSource()
    full = source.collect(pairs)
    arena = arena_for(full)
    snapshotter = Snapshotter(arena)
    seal_slot(arena, 0, 1, snapshotter.write(0, full).digests)
    changed = [(name, tensor.clone() + 1) for name, tensor in pairs if name in ("chunks", "small")]
    written = snapshotter.write(1, source.collect(changed, partial=True), base=0)
    assert_written(arena, 1, dict(pairs) | dict(changed), written.digests)
    with pytest.raises(ProtocolError, match="no version to take them from"):
        snapshotter.write(1, source.collect(changed, partial=True))
    snapshotter.close()


def test_another_layout_is_refused(arena_for: MakeArena) -> None:
    source = WeightSource()
    arena = arena_for(source.collect([("a", torch.ones(3))]))
    snapshotter = Snapshotter(arena)
    for other, words in (("b", "absent"), ("a", r"\[3\]")):
        with pytest.raises(ProtocolError, match=f"where: {other}; expected: {words}"):
            snapshotter.write(0, source.collect([(other, torch.ones(4))]))
    snapshotter.close()
    with pytest.raises(ConfigError, match="thread"):
        Snapshotter(arena, 0)


def test_tensors_may_change_and_torch_threads_stay(tmp_path: Path) -> None:
    kept = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        infos = [TensorInfo("w", "fp32", (3,))]
        with Arena.create(lay_out(infos), name="test", directory=tmp_path) as arena:
            value = torch.ones(3)
            snapshotter = Snapshotter(arena, 2)
            snapshotter.write(0, WeightSource().collect([("w", value)]))
            value.zero_()
            assert torch.equal(arena.tensors(0)[0], torch.ones(3))
            snapshotter.close()
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(kept)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=4, max_size=64), st.sampled_from(["bf16", "fp16", "fp32", "fp8_e5m2", "fp8_e4m3"]))
def test_the_bit_check_is_torch_isfinite(raw: bytes, dtype: str) -> None:
    tensor = torch.frombuffer(bytearray(raw[: len(raw) // 4 * 4]), dtype=dtype_of(dtype))
    values = tensor.to(torch.float64)
    assert is_finite(tensor.view(torch.uint8).numpy(), dtype) == bool(torch.isfinite(values).all())


def test_small_tensors_are_cheap(arena_for: MakeArena) -> None:
    pairs = [(f"layers.{k}.weight", torch.ones(4, 4)) for k in range(6000)]
    source = WeightSource()
    snapshotter = Snapshotter(arena_for(source.collect(pairs)))
    best = float("inf")
    for k in range(4):
        collected = source.collect(pairs)
        start = time.process_time()
        snapshotter.write(k % 2, collected)
        best = min(best, time.process_time() - start)
    snapshotter.close()
    # about 1 us per tensor when quiet; a view per tensor and push would cost five times that
    assert best / len(pairs) < 5e-6


def test_workers_run_torch_on_one_thread_each() -> None:
    kept = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pool = snapshotter._single_threaded_pool(2, Deadline.after(60))
        found = [pool.submit(torch.get_num_threads).result() for _ in range(8)]
        pool.shutdown()
        assert set(found) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(kept)


def test_a_known_digest_is_that_of_the_bytes_that_lie_there(arena_for: MakeArena) -> None:
    torch.manual_seed(0)
    pairs = [("big", torch.randn(3 * CHUNK // 4 // 8, 8)), ("other", torch.randn(CHUNK // 4))]
    source = WeightSource()
    arena = arena_for(source.collect(pairs), {})
    snapshotter = Snapshotter(arena, 2)
    first = snapshotter.write(0, source.collect(pairs))
    arena.flat(0)[CHUNK + 5] ^= 1  # somebody else's write
    mended = snapshotter.write(0, source.collect(pairs))
    assert (mended.digests, mended.nbytes > 0) == (first.digests, True)
    assert_written(arena, 0, dict(pairs), mended.digests)
    kept = pairs[0][1][-1, -1].clone()
    pairs[0][1][-1, -1] = float("nan")
    with pytest.raises(NonFinite, match="big"):
        snapshotter.write(0, source.collect(pairs))
    with pytest.raises(NonFinite, match="big"):  # the slot holds it now, and still it does not pass
        snapshotter.write(0, source.collect(pairs))
    snapshotter.write(0, source.collect(pairs), allow_nonfinite=True)
    with pytest.raises(NonFinite, match="big"):
        snapshotter.write(0, source.collect(pairs))
    pairs[0][1][-1, -1] = kept
    again = snapshotter.write(0, source.collect(pairs))
    assert again.digests == first.digests
    assert_written(arena, 0, dict(pairs), again.digests)
