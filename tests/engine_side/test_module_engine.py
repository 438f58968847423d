"""Any nn.Module as an engine: its driver, its rank host, its gate."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import Busy, ConfigError, EngineQuarantined, ShapeMismatch, UnexpectedTensor
from bridge.model.levels import RANK_LEVELS
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.regions import Move, Routes, dense
from bridge.model.torch_dtypes import dtype_name
from bridge.protocol.codec import Sampling
from engine_side.engines.module import ModuleDriver, ModuleRankHost, attach
from engine_side.load.loader import Loader
from engine_side.verify.verify import Verifier


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8))
        self.gain = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.lock: Any = object()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(ids)) * self.gain)


def announced(module: nn.Module) -> list[TensorInfo]:
    tensors = dict(module.named_parameters())
    tensors |= {n: b for n, b in module.named_buffers() if n in module.state_dict()}
    return [TensorInfo(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]


def push(live: nn.Module, source: nn.Module, canonical: Any = None) -> tuple[Loader, Verifier]:
    infos = announced(source)
    manifest = lay_out(infos)
    loader = Loader(ModuleRankHost(live, canonical), infos)
    state = source.state_dict()
    loader.map(manifest, [[state[s.name].detach().clone() for s in manifest.tensors]])
    loader.apply(0)
    return loader, Verifier(loader)


def test_a_push_makes_the_copy_answer_as_the_original() -> None:
    torch.manual_seed(0)
    source, live = Net().eval(), Net().eval()
    objects = {n: (id(p), p.data_ptr()) for n, p in live.named_parameters()}
    loader, verifier = push(live, source)
    ids = torch.arange(11)
    assert torch.equal(live(ids), source(ids))
    assert objects == {n: (id(p), p.data_ptr()) for n, p in live.named_parameters()}
    assert all(r.ok for r in verifier.run(RANK_LEVELS, 0))
    assert set(loader.rank_bake().strategies) == {"in place"}
    assert verifier.canary_only() == ()
    live.body[0].bias.data[2] += 1
    assert [r.level for r in verifier.run(RANK_LEVELS, 0) if not r.ok] == ["read-back"]
    loader.close()


def test_the_skeleton_has_no_memory_and_runs_no_code() -> None:
    live = Net()
    calls: list[str] = []
    live.body.register_forward_hook(lambda *a: calls.append("hook"))
    before = {n: t.clone() for n, t in live.state_dict().items()}
    skeleton = ModuleRankHost(live).skeleton()
    tensors = [*skeleton.parameters(), *skeleton.buffers()]
    assert all(t.device.type == "meta" for t in tensors)
    assert type(skeleton) is Net
    assert skeleton.head.weight is skeleton.embed.weight
    assert not skeleton.body._forward_hooks
    assert live.body._forward_hooks
    assert skeleton.lock is live.lock
    assert "cache" not in skeleton.state_dict()
    assert not calls
    assert all(torch.equal(t, before[n]) for n, t in live.state_dict().items())


def test_strict_names_and_shapes() -> None:
    live = Net()
    infos = announced(live)
    with pytest.raises(UnexpectedTensor, match=r"ghost\.weight") as caught:
        Loader(ModuleRankHost(live), [*infos, TensorInfo("ghost.weight", "fp32", (2,))]).check()
    assert caught.value.names == ("ghost.weight",)
    assert "bind" in str(caught.value)
    wrong = [TensorInfo(i.name, i.dtype, (8, 11)) if i.name == "embed.weight" else i for i in infos]
    with pytest.raises(ShapeMismatch, match=r"\[11, 8\]") as wrong_shape:
        Loader(ModuleRankHost(live), wrong).check()
    assert wrong_shape.value.names == ("embed.weight",)


def fused(module: nn.Module) -> Routes:
    """The live `body` of two matrices is one stacked parameter; the checkpoint has both by name."""
    halves = [Move(name, dense((4, 4)), "both", dense((4, 4), 16 * k)) for k, name in enumerate(("a", "b"))]
    return Routes(tuple(halves), {"a": (4, 4), "b": (4, 4)})


def test_canonical_names_that_are_not_the_live_ones() -> None:
    live = nn.Module()
    live.both = nn.Parameter(torch.zeros(2, 4, 4))
    infos = [TensorInfo("a", "fp32", (4, 4)), TensorInfo("b", "fp32", (4, 4))]
    loader = Loader(ModuleRankHost(live, fused), infos).check()
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    loader.map(lay_out(infos), [[a, b]])
    loader.apply(0)
    assert torch.equal(live.both, torch.stack([a, b]))
    assert all(r.ok for r in Verifier(loader).run(RANK_LEVELS, 0))
    with pytest.raises(UnexpectedTensor, match="both"):
        Loader(ModuleRankHost(live, fused), [*infos, TensorInfo("both", "fp32", (2, 4, 4))]).check()
    loader.close()


def test_refusal_is_lifted() -> None:
    live = Net().eval()
    driver = ModuleDriver(live)
    driver.refuse("read-back failed")
    driver.refuse("read-back failed")
    with pytest.raises(EngineQuarantined, match="read-back failed"):
        live(torch.arange(3))
    driver.refuse(None)
    live(torch.arange(3))
    assert driver.refusal is None


def test_a_refusal_is_the_modules_own_and_outlives_its_driver() -> None:
    live = Net().eval()
    first = ModuleDriver(live)
    first.refuse("torn")
    first.close()
    with pytest.raises(EngineQuarantined, match="torn"):
        live(torch.arange(3))
    second = ModuleDriver(live)
    assert second.refusal == "torn"
    second.refuse("torn again")
    assert first.refusal == "torn again"
    copied = copy.deepcopy(live)  # holds the same torn weights
    assert ModuleDriver(copied).refusal == "torn again"
    second.refuse(None)
    assert first.refusal is None
    live(torch.arange(3))
    with pytest.raises(EngineQuarantined, match="torn again"):
        copied(torch.arange(3))
    assert not live._forward_pre_hooks


def test_a_gated_module_can_be_probed_and_nothing_else() -> None:
    source, live = nn.Linear(4, 4), nn.Linear(4, 4)
    driver = ModuleDriver(live)
    driver.claim("run1")
    driver.refuse("torn")
    loader, verifier = push(live, source)
    assert all(r.ok for r in verifier.run(RANK_LEVELS, 0))
    assert verifier.canary_only() == ()
    with pytest.raises(EngineQuarantined):
        live(torch.zeros(1, 4))
    loader.close()


def test_one_bridge_at_a_time_drives_a_module() -> None:
    live = Net()
    names = set(live.state_dict())
    first, second = ModuleDriver(live), ModuleDriver(live)
    first.claim("run1")
    first.claim("run1")
    with pytest.raises(Busy, match="run1") as caught:
        second.claim("run2")
    assert "run2" in (caught.value.where or "")
    assert "close" in (caught.value.remedy or "")
    second.close()  # not its own claim
    with pytest.raises(Busy):
        second.claim("run2")
    assert set(live.state_dict()) == names
    ModuleDriver(copy.deepcopy(live)).claim("run3")
    first.close()
    second.claim("run2")
    second.close()
    ModuleDriver(live).claim("forgotten")
    gc.collect()
    first.claim("run1")


def test_a_claimed_module_can_be_pickled() -> None:
    live = nn.Linear(2, 2)
    driver = ModuleDriver(live)
    driver.claim("run1")
    restored = pickle.loads(pickle.dumps(live))  # noqa: S301
    assert torch.equal(restored.weight, live.weight)
    ModuleDriver(restored).claim("run2")
    with pytest.raises(Busy):
        ModuleDriver(live).claim("run2")


def test_what_a_module_cannot_do() -> None:
    driver = attach(Net())
    assert driver is not None
    assert not driver.can_generate
    assert driver.ranks == 1
    assert driver.checkpoint is None
    assert driver.max_prompt is None
    assert driver.cache_grain == 0
    assert attach("nonsense") is None
    with pytest.raises(ConfigError, match="generate"):
        driver.generate([[1]], Sampling())


def test_shared_storage_is_refused_by_name() -> None:
    live = Net()
    driver = ModuleDriver(live)
    driver.refuse_shared(frozenset(t.untyped_storage().data_ptr() for t in copy.deepcopy(live).state_dict().values()))
    with pytest.raises(ConfigError, match="share storage") as caught:
        driver.refuse_shared(frozenset({live.gain.untyped_storage().data_ptr()}))
    assert caught.value.names == ("gain",)


def test_shared_storage_is_seen_when_either_side_moves() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    driver = ModuleDriver(module)
    apart = torch.empty(8)
    storages = frozenset({apart.untyped_storage().data_ptr()})
    driver.refuse_shared(storages)
    driver.refuse_shared(storages)
    with pytest.raises(ConfigError, match=r"1\.weight"):  # the trainer's tensors moved onto the engine's
        driver.refuse_shared(frozenset({module[1].weight.untyped_storage().data_ptr()}))
    driver.refuse_shared(storages)
    module[0].bias.data = apart[:4]  # the engine's tensor moved onto the trainer's
    with pytest.raises(ConfigError, match=r"0\.bias"):
        driver.refuse_shared(storages)
    module[0].bias = nn.Parameter(torch.zeros(4))
    driver.refuse_shared(storages)
    module[0].weight = nn.Parameter(apart[4:])  # another object under the name
    with pytest.raises(ConfigError, match=r"0\.weight"):
        driver.refuse_shared(storages)


def test_a_look_seeds_no_device_and_leaves_the_random_state() -> None:
    host = ModuleRankHost(nn.Sequential(nn.Linear(4, 4)))
    pending = len(torch.cuda._queued_calls)
    state = torch.get_rng_state()
    host.apply(host.model[0], torch.zeros(2, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(torch.cuda._queued_calls) == pending
