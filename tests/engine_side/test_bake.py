"""Tracing a loader, and saying what does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError, DuplicateTensor, MissingTensor, ShapeMismatch, UnexpectedTensor
from bridge.model.manifest import TensorInfo
from engine_side.plan.bake import bake
from engine_side.plan.binding import bind
from tests.engine_side import toy_engine as toy


def without(infos: Iterable[TensorInfo], *names: str) -> list[TensorInfo]:
    return [i for i in infos if i.name not in names]


def reshaped(infos: Iterable[TensorInfo], name: str, shape: tuple[int, ...]) -> list[TensorInfo]:
    return [TensorInfo(i.name, i.dtype, shape) if i.name == name else i for i in infos]


def test_a_sound_plan() -> None:
    host = toy.ToyHost()
    baked = toy.checked(bake(host, host.infos))
    assert baked.coverage.complete
    assert not baked.unread
    assert not baked.read
    assert not baked.plan.computed
    assert set(baked.dtypes.values()) == {"fp32"}
    assert [t.path for t in baked.plan.targets if t.buffer] == ["layers.0.scale", "layers.1.scale"]
    assert bake(host, host.infos).plan.digest == baked.plan.digest
    assert bake(toy.ToyHost(layers=1), toy.announced(layers=1)).plan.digest != baked.plan.digest


def test_ties_are_one_target_with_two_places() -> None:
    host = toy.ToyHost(tied=True)
    places = [p for p in bake(host, host.infos).targets.places if p.target == "embed.weight"]
    assert [p.path for p in places] == ["embed.weight", "head.weight"]


def test_an_untied_engine_gets_the_primary_under_its_alias() -> None:
    host = toy.ToyHost(tied=False)
    infos = [
        TensorInfo(i.name, i.dtype, i.shape, ("head.weight",)) if i.name == "embed.weight" else i
        for i in toy.announced(tied=True)
    ]
    baked = toy.checked(bake(host, infos))
    assert {m.target for m in baked.plan.moves if m.tensor == "embed.weight"} == {"embed.weight", "head.weight"}
    assert toy.checked(bake(toy.ToyHost(tied=True), infos)).coverage.complete


def test_missing_tensor_names_the_likely_name_and_the_target() -> None:
    host = toy.ToyHost()
    for name, target in (("layers.0.k.bias", "layers.0.qkv.bias"), ("layers.1.norm.weight", "layers.1.norm.weight")):
        with pytest.raises(MissingTensor) as caught:
            toy.checked(bake(host, without(host.infos, name)))
        assert name in caught.value.names
        assert name in str(caught.value)
        assert target in str(caught.value)


def test_missing_buffer_says_to_bind() -> None:
    host = toy.ToyHost()
    with pytest.raises(MissingTensor, match="bind"):
        toy.checked(bake(host, without(host.infos, "layers.0.scale", "layers.1.scale")))


def test_unknown_names_are_all_found() -> None:
    host = toy.ToyHost()
    extra = [TensorInfo("layers.9.norm.weight", "fp32", (16,)), TensorInfo("what.is.this", "fp32", (2, 3))]
    problems = bake(host, [extra[0], *host.infos, extra[1]]).problems
    assert [type(p) for p in problems] == [UnexpectedTensor, UnexpectedTensor]
    assert "and 1 more" in str(problems[0])
    assert set(problems[0].names) == {"layers.9.norm.weight", "what.is.this"}


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("layers.0.k.weight", (16, 8), "[8, 16]"),
        ("embed.weight", (16, 24), "[24, 16]"),
        ("layers.1.q.weight", (17, 16), "layers.1.qkv.weight"),
        ("layers.1.norm.weight", (15,), "layers.1.norm.weight"),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...], words: str) -> None:
    host = toy.ToyHost()
    with pytest.raises(ShapeMismatch) as caught:
        toy.checked(bake(host, reshaped(host.infos, name, shape)))
    assert caught.value.names == (name,)
    assert words in str(caught.value)
    assert str(list(shape)) in str(caught.value)


def test_a_broadcast_is_a_wrong_shape() -> None:
    host = toy.ToyHost()
    with pytest.raises(ShapeMismatch, match="broadcast"):
        toy.checked(bake(host, reshaped(host.infos, "layers.0.scale", (1,))))


class Careless(toy.ToyHost):
    """Skips what it does not know, and cuts what is too long, without a word."""

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        known = {i.name: i.shape for i in toy.announced()}
        cut = ((n, w[: known[n][0]]) for n, w in weights if n in known)
        super().load_weights(skeleton, cut)


def test_silently_skipped_and_silently_cut_tensors_are_reported() -> None:
    host = Careless()
    infos = [*reshaped(host.infos, "embed.weight", (30, 16)), TensorInfo("ghost", "fp32", (2,))]
    baked = bake(host, infos)
    assert baked.unread == ("ghost",)
    assert not baked.problems
    assert list(baked.read) == ["embed.weight"]
    assert sum(r.numel for r in baked.read["embed.weight"]) == 24 * 16


class Doubling(toy.ToyHost):
    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            super().load_weights(skeleton, [(name, tensor)] * (2 if name == "embed.weight" else 1))


def test_an_element_written_twice() -> None:
    host = Doubling()
    with pytest.raises(DuplicateTensor, match=r"embed\.weight"):
        toy.checked(bake(host, host.infos))


class Clearing(toy.ToyHost):
    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "embed.weight":
                skeleton.embed.weight.data.zero_()
            super().load_weights(skeleton, [(name, tensor)])


def test_clearing_before_copying_is_not_a_double_write() -> None:
    baked = toy.checked(bake(Clearing(), toy.announced()))
    assert not baked.plan.fills


class Broken(toy.ToyHost):
    broken = False

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.broken:
            raise ValueError("no parallel state")
        super().load_weights(skeleton, weights)


def test_a_loader_that_fails_for_its_own_reasons() -> None:
    host = Broken()
    host.broken = True
    with pytest.raises(ConfigError, match="no parallel state"):
        bake(host, host.infos)


class Strict(toy.ToyHost):
    """Complains at the end, as vLLM does of a tied head that came without its embedding."""

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        came = []
        for name, tensor in weights:
            came.append(name)
            if name != "head.weight":
                super().load_weights(skeleton, [(name, tensor)])
        if "embed.weight" not in came:
            raise ValueError("'head.weight' was skipped because it is tied to 'embed.weight'")


def test_what_a_loader_misses_at_the_end_is_blamed_on_no_tensor() -> None:
    host = Strict()
    both = {"embed.weight": ("head.weight", ("embed.weight",))}
    infos = [
        TensorInfo(name, i.dtype, i.shape, other, other)
        for i in host.infos
        for name, other in [both.get(i.name, (i.name, ()))]
    ]
    baked = toy.checked(bake(host, infos))
    assert {m.tensor for m in baked.plan.moves if m.target == "embed.weight"} == {"head.weight"}
    with pytest.raises(MissingTensor, match=r"embed\.weight"):
        toy.checked(bake(host, without(host.infos, "embed.weight")))


def test_arithmetic_marks_the_parameter_computed_and_keeps_its_tensor() -> None:
    host = toy.ToyHost(decay=True)
    baked = toy.checked(bake(host, host.infos))
    assert list(baked.plan.computed) == ["decay.A"]
    assert baked.computed == {"decay.A": ("decay.A",)}
    assert "decay.A" not in baked.unread


def test_partial_covers_only_what_is_sent() -> None:
    host = toy.ToyHost()
    baked = toy.checked(bake(host, without(host.infos, "embed.weight"), partial=True))
    assert "embed.weight" not in {t.path for t in baked.plan.targets}


def test_live_tensors_in_a_skeleton_are_left_alone() -> None:
    class Sharing(toy.ToyHost):
        def skeleton(self) -> nn.Module:
            made = super().skeleton()
            made.embed.weight = self.model.embed.weight  # type: ignore[union-attr]
            return made

    host = Sharing(tied=False)
    before = host.model.embed.weight.clone()
    baked = bake(host, without(host.infos, "embed.weight"))
    assert "embed.weight" not in {t.path for t in baked.plan.targets}
    assert torch.equal(host.model.embed.weight, before)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_binding_walks_through_wrappers(depth: int) -> None:
    host = toy.ToyHost(wrapped=depth)
    found = bind(host.skeleton(), host.model, ["layers.0.qkv", "layers.1.norm"])
    assert isinstance(found["layers.0.qkv"], toy.Fused)
    assert isinstance(found["layers.1.norm"], toy.Norm)


def test_binding_names_what_is_missing() -> None:
    host = toy.ToyHost()
    del host.model.layers[1].qkv
    with pytest.raises(ConfigError, match=r"layers\.1\.qkv"):
        bind(host.skeleton(), host.model, ["layers.1.qkv"])


def test_a_child_that_is_called_base_layer_is_no_wrapper() -> None:
    def tree() -> nn.Module:
        root: Any = nn.Module()
        root.base_layer = nn.Module()
        root.base_layer.inner = nn.Linear(2, 2)
        return root

    live = tree()
    assert bind(tree(), live, ["base_layer.inner"])["base_layer.inner"] is live.base_layer.inner
    assert bind(tree(), live, [""])[""] is live
