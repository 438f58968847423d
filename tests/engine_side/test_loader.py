"""Apply: what lands where, how often post-load runs, what moves, and what a subset leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import MissingTensor, OutOfMemory, ProtocolError
from bridge.model.manifest import TensorInfo, lay_out
from engine_side.load.loader import Loader
from engine_side.load.version_zero import read_back
from engine_side.plan.strategies import Strategy
from tests.engine_side import toy_engine as toy

METHODS = [toy.Plain, toy.Transposed, toy.Shuffled, toy.Packed, toy.HiddenCopy, toy.Latched]


@contextmanager
def loaded(threads: int = 2, **options: Any) -> Iterator[tuple[toy.ToyHost, Loader]]:
    """A Toy holding seed 0, with an arena of seeds 1 and 2."""
    host = toy.ToyHost(**options)
    loader = Loader(host, host.infos, threads=threads)
    loader.map(*toy.arena(host.infos, 1, 2))
    try:
        yield host, loader
    finally:
        loader.close()


def outputs(host: toy.ToyHost) -> dict[str, torch.Tensor]:
    """What every callable module answers."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
    out: dict[str, torch.Tensor] = {}
    for path, module in host.model.named_modules():
        name = path.replace(".base_layer", "")
        if isinstance(module, (toy.Fused, toy.Norm, toy.Head)):
            out[name] = host.apply(module, x)
        elif isinstance(module, toy.Table):
            out[name] = host.apply(module, torch.arange(24))
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapped", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_answers_as_one_that_was_loaded_so(method: Any, wrapped: int, tied: bool) -> None:
    with loaded(method=method, wrapped=wrapped, tied=tied) as (host, loader):
        objects = {n: (id(p), p.data_ptr()) for n, p in host.model.named_parameters(remove_duplicate=False)}
        for slot, seed in ((0, 1), (1, 2), (0, 1)):
            outcome = loader.apply(slot)
            assert same(outputs(host), outputs(toy.ToyHost(method=method, tied=tied, seed=seed)))
            assert not outcome.rebound
            assert not outcome.created
        assert objects == {n: (id(p), p.data_ptr()) for n, p in host.model.named_parameters(remove_duplicate=False)}
        assert bool((host.model.layers[0].derived == 7).all())


def test_post_load_runs_once_per_touched_module_and_not_for_direct_ones() -> None:
    with loaded(method=toy.Packed) as (host, loader):
        host.post_loads.clear()
        loader.apply(0)
        assert host.post_loads == ["Packed"] * 2
        host.post_loads.clear()
        loader.apply(1, [loader.mapped.index["layers.1.k.bias"]])
        assert host.post_loads == ["Packed"]
        loader.apply(1, [loader.mapped.index["layers.1.norm.weight"]])
        assert host.post_loads == ["Packed"]
    with loaded(method=toy.Shuffled) as (host, loader):
        host.post_loads.clear()
        loader.apply(0)
        assert host.post_loads == []


def test_a_subset_leaves_the_rest_bit_identical() -> None:
    with loaded() as (host, loader):
        loader.apply(0)
        before = {n: t.clone() for n, t in host.model.state_dict().items()}
        loader.apply(1, [loader.mapped.index["layers.0.k.weight"]])
        after = host.model.state_dict()
        changed = {n for n in before if not torch.equal(before[n], after[n])}
        assert changed == {"layers.0.qkv.weight"}
        assert torch.equal(before["layers.0.qkv.weight"][:16], after["layers.0.qkv.weight"][:16])


class Growing(toy.Packed):
    """Post-load leaves another shape each time: storage has to move."""

    times = 0

    def post(self, layer: Any) -> None:
        super().post(layer)
        Growing.times += 1
        layer.trace = nn.Parameter(torch.zeros(Growing.times), requires_grad=False)


def test_what_is_rebound_is_listed() -> None:
    with loaded(method=Growing) as (host, loader):
        param = host.model.layers[0].qkv.trace
        outcome = loader.apply(0)
        assert "layers.0.qkv.trace" in outcome.rebound
        assert host.model.layers[0].qkv.trace is param
        assert param.numel() == Growing.times - 1


@pytest.mark.parametrize("replace", [False, True])
def test_a_moved_parameter_is_found_again(replace: bool) -> None:
    with loaded() as (host, loader):
        old = host.model.layers[0].norm.weight
        if replace:
            host.model.layers[0].norm.weight = nn.Parameter(torch.zeros(16), requires_grad=False)
        else:
            old.data = torch.zeros(16)
        loader.apply(0)
        assert same(outputs(host), outputs(toy.ToyHost(seed=1)))


class Failing(toy.Packed):
    fail = False

    def post(self, layer: Any) -> None:
        if Failing.fail:
            raise RuntimeError("out of memory")
        super().post(layer)


def test_after_a_failed_post_load_another_version_can_be_applied() -> None:
    with loaded(method=Failing) as (host, loader):
        param = host.model.layers[0].qkv.weight
        Failing.fail = True
        with pytest.raises(OutOfMemory, match=r"layers\.0\.qkv.*RuntimeError: out of memory"):
            loader.apply(0)
        Failing.fail = False
        loader.apply(1)
        assert host.model.layers[0].qkv.weight is param
        assert same(outputs(host), outputs(toy.ToyHost(method=toy.Packed, seed=2)))


@pytest.mark.parametrize("dtype", ["bf16", "fp64"])
def test_another_wire_dtype_is_cast(dtype: str) -> None:
    host = toy.ToyHost(method=toy.Shuffled)
    infos = [TensorInfo(i.name, dtype, i.shape) for i in host.infos]
    manifest = lay_out(infos)
    wide = {"bf16": torch.bfloat16, "fp64": torch.float64}[dtype]
    slot = [w.to(wide) for w in toy.weights_of(infos, 1).values()]
    loader = Loader(host, infos)
    loader.map(manifest, [slot])
    loader.apply(0)
    assert torch.equal(host.model.embed.weight, slot[0].float())
    assert set(loader.rank_bake().dtypes.values()) == {"fp32"}
    back = [torch.zeros_like(t) for t in slot]
    lost, _ = read_back(loader, back)
    assert lost == () if dtype == "fp64" else len(lost) == len(slot)
    loader.close()


@pytest.mark.parametrize("method", METHODS)
def test_read_back_returns_what_was_applied_or_says_that_it_cannot(method: Any) -> None:
    with loaded(method=method) as (_, loader):
        loader.apply(1)
        into = [torch.zeros_like(t) for t in loader.mapped.slots[0]]
        lost, _ = read_back(loader, into)
        names = [s.name for s in loader.mapped.manifest.tensors]
        for name, got, want in zip(names, into, loader.mapped.slots[1], strict=True):
            assert name in lost or torch.equal(got, want)
        packed = method in (toy.Packed, toy.Latched)
        assert set(lost) == ({f"layers.{k}.{p}.weight" for k in (0, 1) for p in "qkv"} if packed else set())


def test_computed_parameters_are_filled_by_the_engines_own_loader() -> None:
    with loaded(decay=True) as (host, loader):
        loader.apply(0)
        sent = loader.mapped.slots[0][loader.mapped.index["decay.A"]]
        assert torch.equal(host.model.decay.A, -torch.exp(sent))
        assert "decay.A" in read_back(loader, [torch.zeros_like(t) for t in loader.mapped.slots[0]])[0]


def test_partial_of_an_open_module_and_of_a_packed_one() -> None:
    some = ("layers.0.q.weight", "layers.0.norm.weight")
    host = toy.ToyHost()
    infos = [i for i in host.infos if i.name in some]
    loader = Loader(host, infos, partial=True).check()
    before = {n: t.clone() for n, t in host.model.state_dict().items()}
    manifest, slots = toy.arena(infos, 3)
    loader.map(manifest, slots)
    loader.apply(0)
    changed = {n for n, t in host.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"layers.0.qkv.weight", "layers.0.norm.weight"}
    assert torch.equal(host.model.layers[0].qkv.weight[16:], before["layers.0.qkv.weight"][16:])
    with pytest.raises(MissingTensor, match="packed"):
        Loader(toy.ToyHost(method=toy.Packed), infos, partial=True).check()
    loader.close()


def test_a_packed_module_may_be_partial_where_the_rest_can_be_read_off() -> None:
    host = toy.ToyHost(method=toy.Packed)
    infos = [i for i in host.infos if i.name.startswith("layers.0.") and i.name.endswith("weight")]
    loader = Loader(host, infos, partial=True).check()
    loader.map(*toy.arena(infos, 3))
    loader.apply(0)
    sent = dict(zip([i.name for i in infos], loader.mapped.slots[0], strict=True))
    x = torch.randn(3, 16)
    w = torch.cat([sent[f"layers.0.{p}.weight"] for p in "qkv"])
    want = nn.functional.linear(x, w, host.model.layers[0].qkv.bias)
    assert torch.allclose(host.apply(host.model.layers[0].qkv, x), want, atol=1e-5)
    loader.close()


def test_explain_and_bake_answer() -> None:
    with loaded(method=toy.Shuffled) as (_, loader):
        (row,) = loader.explain("layers.1.k.weight")
        assert row["parameter"] == "layers.1.qkv.weight"
        assert row["strategy"] == "permuted"
        assert row["reason"]
        assert {r["parameter"] for r in loader.explain("embed.weight")} == {"embed.weight", "head.weight"}
        assert loader.explain("ghost") == ()
        answer = loader.rank_bake()
        assert answer.strategies == {"in place": 6, "permuted": 2}
        assert answer.digest == loader.baked.plan.digest


def test_a_manifest_of_another_plan_is_refused() -> None:
    with loaded() as (host, loader):
        manifest, slots = toy.arena([i for i in host.infos if i.name != "embed.weight"], 1)
        with pytest.raises(ProtocolError, match=r"embed\.weight"):
            loader.map(manifest, slots)


def test_steady_state_walks_no_module_and_matches_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(method=toy.Shuffled) as (host, loader):
        loader.apply(0)

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("walked")

        for name in ("named_modules", "named_parameters", "modules", "get_submodule"):
            monkeypatch.setattr(nn.Module, name, refuse)
        monkeypatch.setattr(host, "skeleton", refuse, raising=False)
        loader.apply(1)
        monkeypatch.undo()
        assert same(outputs(host), outputs(toy.ToyHost(seed=2)))


def test_several_threads_share_one_large_tensor() -> None:
    from bridge.model.regions import dense
    from engine_side.load.copies import batches, make_pair

    live, sent = torch.zeros(3_000_000), torch.randn(3_000_000)
    small, other = torch.zeros(7), torch.randn(7)
    made = [make_pair(live, dense((3_000_000,)), sent, dense((3_000_000,)), 0, "a")]
    made.append(make_pair(small, dense((7,)), other, dense((7,)), 1, "b"))
    work = batches([p for p in made if p is not None], 3)
    assert len(work) == 3
    assert sum(b.nbytes for b in work) == 4 * 3_000_007
    for batch in work:
        batch.copy()
    assert torch.equal(live, sent)
    assert torch.equal(small, other)


def test_strategies_count_every_module() -> None:
    with loaded(decay=True, method=toy.Latched) as (_, loader):
        kinds = {c.strategy for c in loader.decided.choices.values()}
        assert kinds == {Strategy.IN_PLACE, Strategy.TWIN}
