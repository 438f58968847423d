"""The recorder against replay on real values: what the moves say must be what the loader really did."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model.regions import Region
from bridge.tracing.recorder import NOT_SENT, Recorder

Tensors = dict[str, torch.Tensor]
Loader = Callable[[Tensors, Tensors], None]


def window(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The region of a tensor's own storage, counted from the tensor's first element."""
    return tensor.as_strided(region.shape, region.strides, tensor.storage_offset() + region.offset)


def record(loader: Loader, sources: Tensors, targets: Tensors) -> Recorder:
    """Run a loader on meta twins of real tensors (own strides kept) under a recorder."""
    metas = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in sources.items()}
    twins: Tensors = {}
    for name, t in targets.items():
        flat = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype, device="meta")
        twins[name] = flat.as_strided(t.shape, t.stride(), t.storage_offset())
    recorder = Recorder(metas, twins)
    with recorder:
        loader(dict(recorder.feed(metas.items())), twins)
    return recorder


def replayed(loader: Loader, sources: Tensors, targets: Tensors) -> Recorder:
    """Assert that replaying moves and fills gives bit for bit what the loader gives."""
    recorder = record(loader, sources, targets)
    assert recorder.tainted == {}
    wanted = {name: torch.full_like(t, 99) for name, t in targets.items()}
    given = {name: t.clone() for name, t in wanted.items()}
    loader(sources, wanted)
    for move in recorder.moves:
        window(given[move.target], move.dest).copy_(window(sources[move.tensor], move.source))
    for fill in recorder.fills:
        window(given[fill.target], fill.dest).fill_(fill.value)
    for name in targets:
        torch.testing.assert_close(given[name], wanted[name], rtol=0, atol=0)
    return recorder


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1, 1 + int(torch.Size(shape).numel()), dtype=torch.float32).reshape(shape).to(dtype)


def fused(s: Tensors, t: Tensors) -> None:
    for k, name in enumerate("qk"):
        t["qkv"].data.narrow(0, 4 * k, 4).copy_(s[name])
    t["qkv"].data[8:12] = s["v"][:, :3].repeat(1, 1).expand(4, 3)


def experts(s: Tensors, t: Tensors) -> None:
    both = torch.stack([s["a"], s["b"]]).to(torch.bfloat16).transpose(1, 2).contiguous()
    for k, part in enumerate(both.chunk(2)):
        t["w"].data[k].copy_(part.squeeze(0).t())


def interleaved(s: Tensors, t: Tensors) -> None:
    a, b = s["a"], s["b"]
    t["w"].copy_(torch.stack([a, b], dim=1).reshape(-1, a.shape[1]))


def rope_permuted(s: Tensors, t: Tensors) -> None:
    t["w"].copy_(s["a"].view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6))


def padded(s: Tensors, t: Tensors) -> None:
    t["w"].data[:5].copy_(s["a"])
    t["w"].data[5:].fill_(0)


def padded_by_cat(s: Tensors, t: Tensors) -> None:
    t["w"].copy_(torch.cat([s["a"], s["a"].new_zeros(2, 3)]))


def padded_by_pad(s: Tensors, t: Tensors) -> None:
    t["w"].copy_(torch.nn.functional.pad(s["a"], (1, 0, 0, -1), value=2.5))


def gathered_rows(s: Tensors, t: Tensors) -> None:
    t["w"].copy_(s["a"][torch.tensor([4, 0, 2, 4], device="cpu")])


def foreach(s: Tensors, t: Tensors) -> None:
    torch._foreach_copy_([t["x"], t["y"]], [s["a"].t(), s["b"]])


def buffered(s: Tensors, t: Tensors) -> None:
    buffer = torch.empty(4, 6, device=s["a"].device)
    buffer[:] = 7
    buffer[:, :3] = s["a"]
    buffer[1:3, 2:4] = s["b"]
    t["w"].copy_(buffer.flatten().view(6, 4))


def scalar(s: Tensors, t: Tensors) -> None:
    t["w"][1] = s["x"]
    t["w"][0].fill_(s["x"])


def through_target(s: Tensors, t: Tensors) -> None:
    t["x"].copy_(s["a"])
    t["y"].copy_(t["x"].data[1:])


CASES: dict[str, tuple[Loader, Tensors, Tensors]] = {
    "fused": (fused, {n: numbers(4, 3) for n in "qkv"}, {"qkv": torch.empty(12, 3)}),
    "experts": (experts, {n: numbers(3, 5) for n in "ab"}, {"w": torch.empty(2, 3, 5, dtype=torch.bfloat16)}),
    "interleaved": (interleaved, {n: numbers(4, 3) for n in "ab"}, {"w": torch.empty(8, 3)}),
    "rope": (rope_permuted, {"a": numbers(8, 6)}, {"w": torch.empty(8, 6)}),
    "padded": (padded, {"a": numbers(5, 3)}, {"w": torch.empty(8, 3)}),
    "padded_by_cat": (padded_by_cat, {"a": numbers(5, 3)}, {"w": torch.empty(7, 3)}),
    "padded_by_pad": (padded_by_pad, {"a": numbers(5, 3)}, {"w": torch.empty(4, 4)}),
    "rows": (gathered_rows, {"a": numbers(5, 3)}, {"w": torch.empty(4, 3)}),
    "foreach": (foreach, {"a": numbers(5, 3), "b": numbers(2)}, {"x": torch.empty(3, 5), "y": torch.empty(2)}),
    "buffered": (buffered, {"a": numbers(4, 3), "b": numbers(2, 2)}, {"w": torch.empty(6, 4)}),
    "scalar": (scalar, {"x": torch.tensor(3.5)}, {"w": torch.empty(2, 4)}),
    "through_target": (through_target, {"a": numbers(5, 3)}, {"x": torch.empty(5, 3), "y": torch.empty(4, 3)}),
    "transposed_target": (
        lambda s, t: (t["w"].copy_(s["a"]), None)[1],
        {"a": numbers(5, 3)},
        {"w": torch.empty(3, 5).t()},
    ),
    "broadcast": (lambda s, t: (t["w"].copy_(s["a"]), None)[1], {"a": numbers(3)}, {"w": torch.empty(4, 3)}),
    "empty": (lambda s, t: (t["w"].copy_(s["a"]), None)[1], {"a": numbers(0, 3)}, {"w": torch.empty(0, 3)}),
    "bits": (
        lambda s, t: (t["w"].view(torch.int16).copy_(s["a"].view(torch.int16)), None)[1],
        {"a": numbers(4, dtype=torch.bfloat16)},
        {"w": torch.empty(4, dtype=torch.bfloat16)},
    ),
    "exact_detour": (
        lambda s, t: (t["w"].copy_(s["a"].double().float()), None)[1],
        {"a": numbers(4, dtype=torch.bfloat16) / 3},
        {"w": torch.empty(4, dtype=torch.float16)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_moves_replay_to_what_the_loader_wrote(case: str) -> None:
    loader, sources, targets = CASES[case]
    replayed(loader, sources, targets)


def test_broadcast_source_has_stride_zero() -> None:
    recorder = replayed(*CASES["broadcast"])
    assert [move.source for move in recorder.moves] == [Region(0, (4, 3), (0, 1))]


def test_repeated_writes_are_all_kept() -> None:
    recorder = record(
        lambda s, t: [t["w"].copy_(s["a"]) for _ in range(2)] and None, {"a": numbers(3)}, {"w": numbers(3)}
    )
    assert len(recorder.moves) == 2


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda s, t: t["w"].copy_(-torch.exp(s["a"])), "neg"),
        (lambda s, t: t["w"].copy_(s["a"].clone().mul_(2)), "mul_"),
        (lambda s, t: t["w"].copy_(s["a"]).add_(1), "add_"),
        (lambda s, t: t["w"].copy_(torch.empty_like(s["a"]).sub_(s["a"])), "sub_"),
        (lambda s, t: t["w"].copy_(s["a"].half()), "rounds through"),
        (lambda s, t: t["w"].copy_(torch.empty_like(s["a"])), NOT_SENT),
        (lambda s, t: t["w"].copy_(s["a"].view(torch.int32)), "reinterprets"),
        (lambda s, t: t["w"].masked_fill_(s["a"] > 0, 0.0), "masked_fill_"),
        (lambda s, t: t["w"].normal_(), "normal_"),
    ],
)
def test_what_is_not_a_plain_copy_is_tainted_with_its_operation(loader: Loader, reason: str) -> None:
    recorder = record(loader, {"a": numbers(4, 3)}, {"w": torch.empty(4, 3), "other": torch.empty(2)})
    assert list(recorder.tainted) == ["w"]
    assert reason in recorder.tainted["w"]


def test_ties_are_reported_and_recorded_once() -> None:
    storage, source = torch.empty(4, 3, device="meta"), torch.empty(4, 3, device="meta")
    recorder = Recorder({"a": source}, {"embed": storage, "head": storage.detach()})
    with recorder:
        storage.copy_(source)
    assert recorder.ties == {"head": "embed"}
    assert [move.target for move in recorder.moves] == ["embed"]


def test_targets_that_are_windows_of_one_storage_get_their_own_moves() -> None:
    flat, source = torch.empty(6, 4, device="meta"), torch.empty(5, 4, device="meta")
    recorder = Recorder({"a": source}, {"top": flat[:2], "rest": flat[2:]})
    with recorder:
        flat[:5].copy_(source)
    assert {(m.target, m.source.offset, m.dest.offset, m.dest.numel) for m in recorder.moves} == {
        ("top", 0, 0, 8),
        ("rest", 8, 0, 12),
    }


def test_a_parameter_given_new_data_is_followed() -> None:
    source = torch.empty(4, 3, device="meta")
    target = nn.Parameter(torch.empty(3, 4, device="meta"))
    recorder = Recorder({"a": source}, {"w": target})
    with recorder:
        target.data = source.t().contiguous()
    assert recorder.rebound == ["w"]
    assert [(m.source, m.dest) for m in recorder.moves] == [(Region(0, (3, 4), (1, 3)), Region(0, (3, 4), (4, 1)))]
    assert recorder.tainted == {}


def test_a_parameter_given_another_shape_is_tainted() -> None:
    source = torch.empty(4, 3, device="meta")
    target = nn.Parameter(torch.empty(3, 4, device="meta"))
    recorder = Recorder({"a": source}, {"w": target})
    with recorder:
        target.data = source
    assert "replaced by a tensor of shape (4, 3)" in recorder.tainted["w"]


def test_provenance_of_results() -> None:
    a, b = torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")
    with Recorder({"a": a, "b": b}) as recorder:
        both = torch.cat([a, torch.zeros(1, 3, device="meta"), b]).t()
        changed = a + 1
    found = recorder.provenance(both)
    assert sorted(found.pieces) == [
        ("a", Region(0, (3, 2), (5, 1)), Region(0, (3, 2), (1, 3))),
        ("b", Region(3, (3, 2), (5, 1)), Region(0, (3, 2), (1, 3))),
    ]
    assert found.fills == [(Region(2, (3, 1), (5, 1)), 0.0)]
    assert found.taint is None
    assert "add" in str(recorder.provenance(changed).taint)
    assert recorder.provenance(torch.empty(2, device="meta")).taint == NOT_SENT


def test_feed_names_the_tensor_at_which_a_loader_fails() -> None:
    sources = {name: torch.empty(2, device="meta") for name in ("one", "two", "three")}
    recorder = Recorder(sources, {"w": torch.empty(3, device="meta")})
    target = torch.empty(3, device="meta")

    def load() -> None:
        for name, tensor in recorder.feed(sources.items()):
            (torch.empty(2, device="meta") if name == "one" else target).copy_(tensor)

    with recorder, pytest.raises(RuntimeError):
        load()
    assert recorder.current == "two"


def test_a_stand_in_must_own_a_contiguous_meta_storage() -> None:
    for bad in (torch.empty(2, 3), torch.empty(2, 3, device="meta").t(), torch.empty(4, device="meta")[1:]):
        with pytest.raises(ConfigError, match="stand-in"):
            Recorder({"a": bad})


def test_many_tensors_are_quick() -> None:
    count = 3000
    sources = {f"{k}": torch.empty(8, 8, device="meta") for k in range(count)}
    targets = {f"{k}": torch.empty(16, 8, device="meta") for k in range(count // 2)}
    recorder = Recorder(sources, targets)
    start = time.process_time()
    with recorder:
        for k, (_, tensor) in enumerate(recorder.feed(sources.items())):
            targets[f"{k // 2}"].narrow(0, 8 * (k % 2), 8).copy_(tensor)
    assert len(recorder.moves) == count
    assert time.process_time() - start < 3.0
