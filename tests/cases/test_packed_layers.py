"""A base whose layers keep their weights in a form of their own: the values travel under the checkpoint's names, and
what belongs to that form stays in the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import UnsupportedLora
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, apart, everything, stir, wrap

SOME = ["q_proj", "v_proj", "down_proj"]
"""Under adapters; the other layers are packed and have none."""


class HalfBytes(nn.Module):
    """Stands in for a library's layer, of the form that HQQ's have: two codes in a byte, no weight, a bias that is
    no Parameter, and tensors that are needed to read it."""

    weight = torch.empty(0)
    wrong = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values = linear.weight.detach()
        scale = values.abs().amax(dim=1, keepdim=True) / 7
        codes = (values / scale).round().add(8).to(torch.uint8)
        self.W_q = nn.Parameter(codes[: len(codes) // 2] * 16 + codes[len(codes) // 2 :], requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else linear.bias.clone()

    def dequantize(self) -> torch.Tensor:
        codes = torch.cat((self.W_q // 16, self.W_q % 16))
        return (codes.to(self.scale.dtype) - 8) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.dequantize()
        return nn.functional.linear(x, -weight if self.wrong else weight, self.bias)


class Observed(nn.Linear):
    """Stands in for a library's layer, of the form that quanto's have: a weight that reads itself, and buffers of the
    library's own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype)
        self.load_state_dict(linear.state_dict())
        self.weight = _coded(linear.weight)
        self.register_buffer("input_scale", torch.ones(()))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.weight
        return nn.functional.linear(x, weight.dequantize(), self.bias)


class Codes(nn.Parameter):
    """A weight of codes that can read itself."""

    scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        codes = self.detach().as_subclass(torch.Tensor)
        return codes.to(self.scale.dtype) * self.scale


def _coded(weight: torch.Tensor) -> Any:
    scale = weight.detach().abs().amax(dim=1, keepdim=True) / 127
    made = torch.Tensor._make_subclass(Codes, (weight.detach() / scale).round().to(torch.int8), False)
    made.scale = scale  # type: ignore[attr-defined]
    return made


@pytest.fixture(params=[HalfBytes, Observed])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LoraRig]:
    made = _rig(request.param, tmp_path)
    yield made
    made.close()


def _rig(kind: Callable[[nn.Linear], nn.Module], folder: Path, **changes: Any) -> LoraRig:
    base = tiny_qwen2(**changes)
    base.save_pretrained(folder)
    for name, linear in list(base.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            path, _, child = name.rpartition(".")
            setattr(base.get_submodule(path), child, kind(linear))
    return LoraRig(folder, wrap_packed(base))


def wrap_packed(base: Any) -> Any:
    """Put PEFT's wrappers around packed layers: it makes them for plain ones, and their layers are exchanged then."""
    packed = {name: module for name, module in base.named_modules() if name.rpartition(".")[2] in SOME}
    for name, module in packed.items():
        path, _, child = name.rpartition(".")
        setattr(base.get_submodule(path), child, nn.Linear(module.in_features, module.out_features))
    model = wrap(base, target_modules=SOME)
    for name, module in packed.items():
        model.base_model.model.get_submodule(name).base_layer = module
    return model


@pytest.mark.parametrize("verify", ["weights", None])
def test_merged_weights_of_a_packed_base(rig: LoraRig, verify: str | None) -> None:
    for seed in range(2):
        stir(rig.model, seed=seed)
        before = everything(rig.model)
        assert rig.push(mode="merged", verify=verify).verified is True
        assert everything(rig.model) == before
        assert rig.serves(rig.truth())


def test_an_adapter_over_a_packed_base(rig: LoraRig) -> None:
    stir(rig.model, seed=1, scale=0.3)
    base, before = rig.answers("base"), rig.answers()
    assert rig.push(mode="adapter", verify="weights").verified == "partial"  # over a base that cannot be compared
    assert apart(rig.answers(), before) > 3 * apart(rig.answers(), rig.truth())
    assert rig.answers("base") == base


def test_no_adapter_over_merged_weights(rig: LoraRig) -> None:
    """A packed base cannot be compared bit for bit, but who pushed merged weights knows that they are no base."""
    stir(rig.model, seed=1, scale=0.3)
    rig.push(mode="merged")
    answers = rig.answers()
    with pytest.raises(UnsupportedLora, match=r"would act a second time.*while the adapters are disabled"):
        rig.push(mode="adapter", verify="weights")
    assert rig.answers() == answers
    assert rig.push().mode == "merged"
    with rig.model.disable_adapter():  # the remedy
        rig.push(mode="merged")
    assert rig.push(mode="adapter", verify="weights").verified == "partial"
    assert rig.serves(rig.truth())


def test_a_packed_layer_that_reads_its_weight_otherwise_is_refused(tmp_path: Path) -> None:
    rig = _rig(HalfBytes, tmp_path)
    try:
        for module in rig.model.modules():
            if isinstance(module, HalfBytes) and module.in_features != module.out_features:
                module.wrong = True
        with pytest.raises(UnsupportedLora, match=r"not what the layer computes.*HalfBytes") as caught:
            rig.push(mode="merged", verify="weights")
        assert caught.value.names[0].endswith("_proj.weight")
    finally:
        rig.close()


def test_a_layer_that_was_found_to_differ_is_compared_until_it_agrees(tmp_path: Path) -> None:
    """Its structure is proven: only the rotating sample finds it, and the next push would look at another layer."""
    rig = _rig(HalfBytes, tmp_path, num_hidden_layers=3)
    try:
        assert rig.push(mode="merged", verify="weights").verified is True
        layers = [module for module in rig.model.modules() if isinstance(module, HalfBytes)]
        layers[5].wrong = True

        def two_rounds() -> None:
            for _ in range(2 * len(layers)):
                rig.push(mode="merged", verify="off")

        with pytest.raises(UnsupportedLora, match="not what the layer computes"):
            two_rounds()
        for _ in range(3):
            with pytest.raises(UnsupportedLora, match="not what the layer computes"):
                rig.push(mode="merged", verify="off")
        layers[5].wrong = False
        assert rig.push(mode="merged").verified is True
    finally:
        rig.close()
