"""Strategies found by experiment, the permutation finder, and the reasons given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bridge.errors import ConfigError
from bridge.model.manifest import TensorInfo
from engine_side.engines.module import ModuleRankHost
from engine_side.live import storage_layout
from engine_side.load.loader import Loader
from engine_side.plan.bake import bake
from engine_side.plan.strategies import Strategy, decide
from engine_side.plan.twins import TwinSource
from tests.engine_side import toy_engine as toy


def chosen(method: Any, **options: Any) -> Any:
    host = toy.ToyHost(method=method, **options)
    return decide(host, toy.checked(bake(host, host.infos)))


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        (toy.Plain, Strategy.IN_PLACE),
        (toy.Transposed, Strategy.PERMUTED),
        (toy.Shuffled, Strategy.PERMUTED),
        (toy.Packed, Strategy.REDO),
        (toy.HiddenCopy, Strategy.REDO),
        (toy.Noted, Strategy.REPLACE),
        (toy.Latched, Strategy.TWIN),
    ],
)
@pytest.mark.parametrize("wrapped", [0, 2])
def test_strategy_by_experiment(method: Any, strategy: Strategy, wrapped: int) -> None:
    found = chosen(method, wrapped=wrapped)
    assert found.choices["layers.0.qkv"].strategy is strategy
    assert found.choices["layers.1.norm"].strategy is Strategy.IN_PLACE
    assert found.choices["embed"].strategy is found.choices["head"].strategy is Strategy.IN_PLACE
    assert len(found.choices) == 8


def test_reference_forms() -> None:
    found = chosen(toy.Plain).choices
    probe = found["layers.0.qkv"].probes[0]
    assert (probe.form, probe.weight, probe.bias) == ("linear", "weight", "bias")
    assert found["embed"].probes[0].form == "rows"
    assert found["embed"].probes[0].kind == "ids"
    assert found["head"].probes[0].form == "linear"
    assert found["layers.0.norm"].probes[0].form == "twin"
    assert not found["layers.0"].probes


def test_a_module_that_nothing_can_update_is_an_error_with_its_class() -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.qkv \(Fused\)"):
        chosen(toy.Elsewhere)


class Mute(toy.Plain):
    """Answers every input alike, whatever its weights are."""

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return super().apply(layer, x) * 0


def test_a_module_whose_answers_say_nothing_about_its_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing that can be seen depends on its weights"):
        chosen(Mute)


def test_what_the_loader_computes_is_said_in_the_reason() -> None:
    found = chosen(toy.Plain, decay=True)
    assert found.choices["decay"].strategy is Strategy.IN_PLACE
    assert "aten.neg" in found.choices["decay"].reason


def test_experiments_leave_the_live_model_alone() -> None:
    host = toy.ToyHost(method=toy.Packed)
    before = {n: t.clone() for n, t in host.model.state_dict().items()}
    kernel = host.model.layers[0].qkv.kernel
    decide(host, bake(host, host.infos))
    assert host.model.layers[0].qkv.kernel is kernel
    assert all(torch.equal(t, before[n]) for n, t in host.model.state_dict().items())


def test_a_live_module_that_is_not_what_post_load_makes() -> None:
    host = toy.ToyHost(method=toy.Transposed)
    host.model.layers[1].qkv.weight.data = host.model.layers[1].qkv.weight.data.t()
    with pytest.raises(ConfigError, match=r"layers\.1\.qkv\.weight"):
        decide(host, bake(host, host.infos))


class Derived(toy.ToyHost):
    """A module without weights whose post-load derives something from a sibling."""

    def skeleton(self) -> nn.Module:
        made = super().skeleton()
        made.layers[0].absorbed = nn.Identity()
        return made

    def post_load(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Identity) or super().post_load(module)


def test_modules_without_weights_that_derive_something() -> None:
    host = Derived()
    host.model.layers[0].absorbed = nn.Identity()
    assert decide(host, bake(host, host.infos)).derived == ("layers.0.absorbed",)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_affine_permutation_is_found(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(sizes))))
    base = data.draw(st.sampled_from([3, 16, 256]))
    numel = int(torch.tensor(sizes).prod())
    cpu = torch.device("cpu")

    def rearrange(x: torch.Tensor) -> torch.Tensor:
        return x.view(sizes).permute(order).reshape(-1)

    digits = [
        storage_layout.code(numel, base, k, torch.float32, cpu)
        for k in range(storage_layout.digits_needed(numel, base))
    ]
    found = storage_layout.affine([rearrange(d) for d in digits], base)
    assert found is not None
    held, origin = found
    canonical = torch.randn(numel)
    live = rearrange(canonical)
    assert torch.equal(canonical.as_strided(held.shape, held.strides), live.as_strided(origin.shape, origin.strides))


@pytest.mark.parametrize("swap", [(1, 2), (3, 17), (37, 41)])
def test_what_is_not_affine_is_refused(swap: tuple[int, int]) -> None:
    """The last pair lies where no stride is read off: only the proof on every element sees it."""
    n, base, cpu = 64, 5, torch.device("cpu")
    order = torch.arange(n)
    order[list(swap)] = order[list(reversed(swap))]
    digits = [
        storage_layout.code(n, base, k, torch.float32, cpu)[order] for k in range(storage_layout.digits_needed(n, base))
    ]
    assert storage_layout.affine(digits, base) is None
    rolled = [
        storage_layout.code(n, base, k, torch.float32, cpu).roll(1)
        for k in range(storage_layout.digits_needed(n, base))
    ]
    assert storage_layout.affine(rolled, base) is None
    assert storage_layout.affine([torch.full((24,), torch.nan)], base) is None  # a step that divided zero by zero


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.int8, torch.bool])
def test_codes_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    base = storage_layout.exact_base(dtype)
    n = 700
    digits = [
        storage_layout.code(n, base, k, dtype, torch.device("cpu"))
        for k in range(storage_layout.digits_needed(n, base))
    ]
    index = sum(d.to(torch.int64) * base**k for k, d in enumerate(digits))
    assert torch.equal(index, torch.arange(n))


class Cached(toy.Plain):
    """No step of its own, but the first call keeps a copy of the weight."""

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        kept = layer.__dict__.setdefault("kept", layer.weight.detach().clone())
        return nn.functional.linear(x, kept, layer.bias)


class Stepless(toy.ToyHost):
    """Says of every module that it has no post-load step."""

    def post_load(self, module: nn.Module) -> bool:
        return False


def test_modules_without_a_step_are_settled_on_one_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    take = TwinSource.take

    def noted(self: TwinSource, options: Any, live: Any) -> Any:
        taken.append(options[0].paths[0])
        return take(self, options, live)

    monkeypatch.setattr(TwinSource, "take", noted)
    host = Stepless()
    choice = decide(host, toy.checked(bake(host, host.infos))).choices["layers.0.qkv"]
    assert (choice.strategy, choice.probes[0].form) == (Strategy.IN_PLACE, "linear")
    assert taken.count("layers.0.qkv") == 1
    assert taken.count("layers.0.norm") > 1, "what only a twin can judge still gets one"


def test_a_copy_kept_by_the_first_call_is_known_to_the_strategy() -> None:
    host = Stepless(method=Cached)
    choice = decide(host, toy.checked(bake(host, host.infos))).choices["layers.0.qkv"]
    assert (choice.strategy, choice.kept) == (Strategy.IN_PLACE, {"kept"})


def test_planning_is_linear_in_alike_modules() -> None:
    host = toy.ToyHost(layers=3)
    found = decide(host, toy.checked(bake(host, host.infos)))
    assert found.alike["layers.0.qkv"] is found.alike["layers.2.qkv"]


class SettingMode(toy.Latched):
    """Post-load puts the layer into the mode that it finds right, as some engines' do."""

    def post(self, layer: Any) -> None:
        layer.eval()
        super().post(layer)


def test_a_graft_leaves_the_mode_of_a_live_module_alone() -> None:
    host = toy.ToyHost(method=SettingMode)
    host.model.train()  # whoever owns the model has put it into training mode since
    loader = Loader(host, host.infos)
    try:
        loader.map(*toy.arena(host.infos, 1))
        assert loader.decided.choices["layers.0.qkv"].strategy is Strategy.TWIN
        loader.apply(0)
        assert all(module.training for module in host.model.modules())
    finally:
        loader.close()


class Rebinding(ModuleRankHost):
    """Its loader gives a parameter the memory of the checkpoint's tensor, as some engines' do."""

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            skeleton.get_parameter(name).data = weight.to("meta")


def test_a_loader_that_rebinds_does_not_decide_what_is_canonical() -> None:
    host = Rebinding(nn.Sequential(nn.Linear(6, 4, dtype=torch.bfloat16)))
    infos = [TensorInfo("0.weight", "fp32", (4, 6)), TensorInfo("0.bias", "fp32", (4,))]
    loader = Loader(host, infos)
    try:
        loader.map(*toy.arena(infos, 1))
        assert loader.apply(0).rebound == ()
        assert loader.decided.choices["0"].strategy is Strategy.IN_PLACE
        assert host.model[0].weight.dtype is torch.bfloat16
    finally:
        loader.close()


class Parent(nn.Module):
    """Has a weight, and a child whose weight its post-load step transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.child = nn.Linear(6, 4, bias=False)


class Meddling(ModuleRankHost):
    """Post-load of one module changes another."""

    def post_load(self, module: nn.Module) -> bool:
        if isinstance(module, Parent):
            module.child.weight = nn.Parameter(module.child.weight.detach().t().contiguous())
        return isinstance(module, Parent)

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(Parent())


def test_an_experiment_meets_no_module_that_another_one_has_changed() -> None:
    host = Meddling(nn.Sequential(Parent()))
    host.post_load(host.model[0])
    infos = [TensorInfo("0.weight", "fp32", (4,)), TensorInfo("0.child.weight", "fp32", (4, 6))]
    with pytest.raises(ConfigError, match="is not what the engine's post-load makes of it") as caught:
        decide(host, toy.checked(bake(host, infos)))
    assert "0.child" in str(caught.value)
