"""What is computed for a layer is compared with that layer: a misread quantised base is refused, never verified."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import UnsupportedLora
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, everything, stir, wrap
from trainer_side.lora.layer_proof import LEAST_S, SHARE

MIDDLE = 128


class Codes(nn.Parameter):
    """Stands in for a quantisation library's weight: 8-bit codes that can read themselves, as long as they lie as they
    lay when they were made."""

    scale: float
    packed: bool

    def dequantize(self) -> torch.Tensor:
        return values_of(self.detach().as_subclass(torch.Tensor), self.scale)


def values_of(codes: torch.Tensor, scale: float) -> torch.Tensor:
    return (codes.float() - MIDDLE) * scale


class QuantisedLinear(nn.Linear):
    """Stands in for the library's layer, which re-packs its codes in its first forward in eval mode, and then knows."""

    repacks = True
    callable_alone = True

    @classmethod
    def take_over(cls, linear: nn.Linear) -> None:
        scale = float(linear.weight.detach().abs().max()) / 120
        codes = (linear.weight.detach() / scale).round().add(MIDDLE).to(torch.uint8)
        weight = torch.Tensor._make_subclass(Codes, codes, False)
        weight.scale, weight.packed = scale, False  # type: ignore[attr-defined]
        linear.__class__ = cls
        linear.weight = weight  # type: ignore[assignment]

    def require_callable(self, x: torch.Tensor) -> None:
        if not self.callable_alone and x.dim() < 3:
            raise ValueError("batches of sequences only")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        self.require_callable(x)
        if not self.training and self.repacks and not weight.packed:
            weight.data = weight.data.flip(0)
            weight.packed = True
        codes = weight.data.as_subclass(torch.Tensor)
        return nn.functional.linear(x, values_of(codes.flip(0) if weight.packed else codes, weight.scale), self.bias)


class Whole(QuantisedLinear):
    callable_alone = False


def quantise(model: Any, kind: type[QuantisedLinear] = QuantisedLinear) -> Any:
    for module in list(model.modules()):
        if (
            type(module) is nn.Linear
            and hasattr(module, "weight")
            and module.weight.shape[0] > 8
            and not module.weight.requires_grad
        ):
            kind.take_over(module)
    return model


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    rigs: list[LoraRig] = []

    def make(kind: type[QuantisedLinear] = QuantisedLinear, **changes: Any) -> LoraRig:
        base = tiny_qwen2(**changes)
        base.save_pretrained(tmp_path)
        rigs.append(LoraRig(tmp_path, quantise(wrap(base), kind)))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def repack(rig: LoraRig) -> None:
    """An evaluation of the trainer's own: the library re-packs the live weights."""
    rig.model.eval()
    with torch.no_grad():
        rig.model(input_ids=torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize("verify", ["weights", None])
def test_a_quantised_base_that_is_read_rightly_is_merged(made: Any, verify: str | None) -> None:
    rig = made()
    for seed in range(2):
        stir(rig.model, seed=seed)
        before = everything(rig.model)
        assert rig.push(mode="merged", verify=verify).verified is True
        assert everything(rig.model) == before
        assert not any(w.packed for w in rig.model.parameters() if isinstance(w, Codes))
        assert rig.serves(rig.truth(), limit=5e-3)


@pytest.mark.parametrize("verify", ["off", "transfer", "weights", None])
def test_codes_that_were_repacked_behind_the_dequantiser_are_refused(made: Any, verify: str | None) -> None:
    rig = made()
    assert rig.push(mode="merged", verify="weights").verified is True
    answers = rig.answers()
    repack(rig)
    with pytest.raises(UnsupportedLora, match=r"not what the layer computes.*QuantisedLinear.*Codes") as caught:
        rig.push(mode="merged", verify=verify)
    assert caught.value.names[0].endswith("proj.weight")
    assert rig.answers() == answers


def test_a_packed_layer_that_only_its_model_can_call_is_compared_in_the_forward_for_the_canary(made: Any) -> None:
    rig = made(Whole)
    receipt = rig.push(mode="merged", verify="weights")
    assert receipt.verified == "partial"
    assert any("cannot be called on a copy (ValueError: batches of sequences only)" in note for note in receipt.notes)
    assert rig.push(mode="merged").verified is True
    assert rig.push(mode="merged", verify="weights").verified is True  # their structures are proven now
    assert rig.serves(rig.truth(), limit=5e-3)
    pack_unseen(rig)
    with pytest.raises(UnsupportedLora, match=r"not what the layer computes.*in the canary's forward"):
        rig.push(mode="merged")
    assert rig.push(mode="merged", verify="weights").verified == "partial"


def test_one_layer_of_many_that_is_misread_is_found_within_a_round(made: Any) -> None:
    """Structures are proven once, not layers: of many, each push looks at another one."""
    rig = made(num_hidden_layers=3)
    assert rig.push(mode="merged", verify="weights").verified is True
    layers = pack_unseen(rig)
    rig.b.bind(rig.model)  # nothing is known any more of where weights lay

    def a_round() -> None:
        for _ in layers:
            rig.push(mode="merged", verify="off")

    with pytest.raises(UnsupportedLora, match=r"where: .*layers\.2\."):
        a_round()


class Laborious(QuantisedLinear):
    """The fault `slow layer`: works for a while before it computes what it should."""

    repacks = False
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        ends = time.thread_time() + 0.02
        while time.thread_time() < ends:
            pass
        return super().forward(x)


def test_comparing_one_more_layer_waits_until_the_snapshots_took_long_enough(made: Any) -> None:
    rig = made(Laborious, num_hidden_layers=3)
    rig.push(mode="merged", verify="off")
    Laborious.calls = 0
    started, pushes = time.perf_counter(), 12
    for _ in range(pushes):
        rig.push(mode="merged", verify="off")
    took = time.perf_counter() - started
    assert 1 <= Laborious.calls <= 1 + max(SHARE * took, LEAST_S * pushes) / 0.02 < pushes


@pytest.mark.parametrize("between", [[], ["adapter"], ["adapter", "base"]])
def test_a_layer_that_was_packed_anew_unseen_is_compared_itself(made: Any, between: list[str]) -> None:
    """Nothing on it says so but where it lies, whatever was pushed in between."""
    rig = made()
    assert rig.push(mode="merged", verify="weights").verified is True
    pack_unseen(rig)
    for mode in between:
        with contextlib.suppress(UnsupportedLora):  # a packed base has no base mode
            rig.push(mode=mode, verify="off")
    with pytest.raises(UnsupportedLora, match="not what the layer computes"):
        rig.push(mode="merged", verify="off")


def pack_unseen(rig: LoraRig) -> list[QuantisedLinear]:
    """Pack the last layer but one anew, without a mark; its own forward knows. Returns all quantised layers."""
    layers = [m for m in rig.model.modules() if isinstance(m, QuantisedLinear)]
    layers[-2].weight.data = layers[-2].weight.data.flip(0)
    layers[-2].forward = MethodType(reads_from_the_end, layers[-2])
    return layers


def reads_from_the_end(layer: Any, x: torch.Tensor) -> torch.Tensor:
    layer.require_callable(x)
    codes = layer.weight.data.as_subclass(torch.Tensor).flip(0)
    return nn.functional.linear(x, values_of(codes, layer.weight.scale), layer.bias)


class Counted(nn.Linear):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return super().forward(x)


class CountedUnderLora(Counted):
    calls = 0


def test_plain_layers_are_not_called(tmp_path: Path) -> None:
    base = tiny_qwen2()
    base.save_pretrained(tmp_path)
    rig = LoraRig(tmp_path, wrap(base, target_modules=["q_proj"]))
    try:
        for layer in base.model.layers:
            layer.mlp.up_proj.__class__ = Counted
            layer.self_attn.q_proj.base_layer.__class__ = CountedUnderLora
        assert rig.push(mode="merged", verify="weights").verified is True
        assert (Counted.calls, CountedUnderLora.calls) == (0, 1)  # once for the structure
    finally:
        rig.close()
