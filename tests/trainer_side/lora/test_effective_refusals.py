"""What has no effective weight is refused with module, reason and way out; quantised bases are read where possible."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bridge.errors import UnsupportedLora
from tests.trainer_side.lora.oracle import innermost, live_linear, untouched
from tests.trainer_side.lora.peft_rows import (
    ALPHA,
    DEFAULT,
    HIDDEN,
    ROWS,
    Row,
    build,
    layer_of,
    one,
)
from tests.trainer_side.lora.test_reader import stacked
from trainer_side.lora.layers.effective import effective_bias, effective_weight
from trainer_side.lora.layers.refusals import reason_of
from trainer_side.lora.layers.wrapper_chain import read_chain

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PATH = "model.layers.0.mlp.up_proj"


def refused(layer: Any, *words: str, path: str = PATH) -> UnsupportedLora:
    with untouched(layer):
        reason = reason_of(read_chain(layer))
        assert reason is not None
        error = reason.error(path)
        with pytest.raises(UnsupportedLora):
            effective_weight(layer, torch.float64)
    text = str(error)
    for word in (path, "cannot be pushed in merged mode", *words):
        assert word in text, f"{word!r} is not in {text!r}"
    assert error.names == (path,)
    assert error.remedy
    assert error.got
    return error


def made(name: str, **config: Any) -> Any:
    return layer_of(build(Row("", (), one(target_modules=[name], **config))), name)


def test_alora() -> None:
    refused(made("linear", alora_invocation_tokens=[1, 2]), "depends on the token")


def test_unknown_variant() -> None:
    class SomethingNew:
        pass

    layer = made("linear")
    layer.lora_variant[DEFAULT] = SomethingNew()
    refused(layer, "SomethingNew", "not known")


def test_unknown_parameters_beside_the_factors() -> None:
    """AdaLoRA looks like LoRA but for a third factor."""
    from peft import AdaLoraConfig, get_peft_model

    model: Any = get_peft_model(Toy(), AdaLoraConfig(target_modules=["linear"], total_step=10, init_r=3, lora_alpha=8))
    refused(layer_of(model, "linear"), "lora_E", "not understood")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


def test_mixtures_that_weigh_adapters_per_token() -> None:
    class Router:
        def __init__(self, target: nn.Module) -> None:
            self.target = target

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    layer = made("linear")
    layer.forward = Router(layer).forward
    refused(layer, "another object replaced")


def test_grouped_convolution() -> None:
    refused(made("grouped"), "grouped convolution", "no single weight")


def test_padding_that_is_not_zeros() -> None:
    refused(made("reflecting"), "reflect")


def test_dilated_convolution() -> None:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Conv2d

    layer = Conv2d(nn.Conv2d(4, 6, 3, dilation=2), DEFAULT, LoraConfig(r=3, lora_alpha=ALPHA), r=3, lora_alpha=ALPHA)
    refused(layer, "dilation")


def test_lora_bias_without_a_base_bias() -> None:
    refused(made("slim", lora_bias=True), "lora_bias", "no bias to carry it")


@pytest.mark.parametrize("reason", ["disabled", "merged", "inactive"])
def test_what_does_not_act_is_no_reason(reason: str) -> None:
    """An adapter that could not be pushed may lie in the layer, as long as the forward does not use it."""
    layer = made("linear")
    if reason == "merged":
        with torch.no_grad():
            layer.merge()
    if reason == "disabled":
        layer.enable_adapters(False)
    if reason == "inactive":
        layer.set_adapter([])
    layer.lora_variant[DEFAULT] = object()
    assert reason_of(read_chain(layer)) is None
    assert torch.equal(effective_weight(layer, torch.float64), innermost(layer).weight)


def test_swapped_factors() -> None:
    layer = made("linear")
    layer.lora_A[DEFAULT], layer.lora_B[DEFAULT] = layer.lora_B[DEFAULT], layer.lora_A[DEFAULT]
    refused(layer, "do not fit", "A [12, 3], B [3, 8]", "[12, 8]")


def test_a_lone_expert_whose_own_forward_fails() -> None:
    from tests.trainer_side.lora.peft_rows import Experts

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts(1, 8, 5, is_transposed=True)

    row = Row("", (), {DEFAULT: {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}}, One)
    refused(layer_of(build(row), "experts"), "do not fit")


def test_meta_and_empty_tensors() -> None:
    layer = made("linear")
    innermost(layer).weight = nn.Parameter(torch.empty(12, 8, device="meta"))
    refused(layer, "meta device", "Gather")
    layer = made("linear")
    layer.lora_A[DEFAULT].weight = nn.Parameter(torch.empty(0))
    refused(layer, "empty here")


def test_a_parameter_that_is_already_parametrized() -> None:
    """PEFT's proxies pile up on it: the delta grows with every forward."""
    layer = layer_of(build(next(r for r in ROWS if r.name == "2-d parameter")), "square")
    nn.utils.parametrize.register_parametrization(innermost(layer), "weight", nn.Identity())
    refused(layer, "parametrized")


def test_expert_parameters_in_fp8() -> None:
    layer = layer_of(build(next(r for r in ROWS if r.name == "experts, both"), torch.float32), "experts")
    base = innermost(layer)
    for name in ("gate_up_proj", "down_proj"):
        setattr(base, name, nn.Parameter(getattr(base, name).detach().to(torch.float8_e4m3fn), requires_grad=False))
    refused(layer, "fp8", "clamps", "mode='adapter'")


@pytest.mark.parametrize("marker", ["grouped_by_expert", "rank_major", "something else"])
def test_the_order_of_experts_in_lora_b(marker: str) -> None:
    """The same shapes mean another matrix; only a marker tells."""
    layer = layer_of(build(next(r for r in ROWS if r.name == "experts, gate_up")), "experts")
    default = effective_weight(layer, torch.float64)
    layer.lora_B_layout = marker
    if marker == "something else":
        refused(layer, "something else", "rank_major")
        return
    found = effective_weight(layer, torch.float64)
    if marker == "rank_major":
        assert torch.equal(found, default)
        return
    rank, experts = layer.r[DEFAULT], layer.num_experts
    a = layer.lora_A[DEFAULT].weight.reshape(experts, rank, -1)
    b = layer.lora_B[DEFAULT].weight.reshape(-1, experts, rank)
    expected = innermost(layer).gate_up_proj + layer.scaling[DEFAULT] * torch.einsum("oer,eri->eoi", b, a)
    assert_close(found, expected)


def test_a_replaced_forward_of_expert_wrappers_needs_the_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(build(next(r for r in ROWS if r.name == "experts, gate_up")), "experts")
    monkeypatch.setattr(type(layer), "forward", lambda self, *inputs: None)
    refused(layer, "lora_B_layout")
    layer.lora_B_layout = "grouped_by_expert"
    assert reason_of(read_chain(layer)) is None


def test_a_truncation_that_is_still_to_come() -> None:
    layer = layer_of(build(next(r for r in ROWS if r.name == "kasa")), "linear")
    layer._lora_kasa_truncation_deferred.add("a")
    refused(layer, "truncation")


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_chains_of_base_layers(levels: int) -> None:
    layer = stacked(levels)
    weight, bias = live_linear(layer, HIDDEN)
    assert_close(effective_weight(layer, torch.float64), weight, rtol=1e-9, atol=1e-9)
    assert_close(effective_bias(layer, torch.float64), bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("levels", [2, 3])
def test_chains_of_dora(levels: int) -> None:
    """Every norm is of the layer inside and one adapter, also through several wrappers."""
    layer = stacked(levels, use_dora=True)
    for module in layer.modules():
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            nn.init.uniform_(magnitude.weight, 0.5, 2.0)
    weight, _ = live_linear(layer, HIDDEN)
    assert_close(effective_weight(layer, torch.float64), weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_around_a_wrapper_of_its_parameter(dora: bool) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear, ParamWrapper

    torch.manual_seed(0)
    plain = LoraConfig(r=3, lora_alpha=ALPHA, init_lora_weights=False)
    inner = ParamWrapper(nn.Linear(HIDDEN, 12).double(), "a", "weight", config=plain, r=3, lora_alpha=ALPHA)
    settings = LoraConfig(r=2, lora_alpha=ALPHA, init_lora_weights=False, use_dora=dora)
    layer = Linear(inner, "b", config=settings, r=2, lora_alpha=ALPHA).double()
    if dora:
        refused(layer, "depends on their order")
        return
    weight, bias = live_linear(layer, HIDDEN)
    assert_close(effective_weight(layer, torch.float64), weight, rtol=1e-9, atol=1e-9)
    assert_close(effective_bias(layer, torch.float64), bias, rtol=1e-9, atol=1e-9)


# Quantised bases.


def quantised(base: nn.Module) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    settings = LoraConfig(r=3, lora_alpha=ALPHA, init_lora_weights=False)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Linear(base, DEFAULT, config=settings, r=3, lora_alpha=ALPHA)


def sum_of(layer: Any, base: torch.Tensor) -> torch.Tensor:
    delta = layer.lora_B[DEFAULT].weight.float() @ layer.lora_A[DEFAULT].weight.float()
    return base + delta * layer.scaling[DEFAULT]


@pytest.mark.parametrize("scales", ["tensor", "rows", "blocks", "ragged blocks"])
def test_scaled_fp8(scales: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 12)
    if scales == "ragged blocks":
        base = nn.Linear(7, 11)
    scale = {"tensor": torch.tensor(0.5), "rows": torch.rand(12), "blocks": torch.rand(3, 2)}.get(
        scales, torch.rand(3, 2)
    )
    values = base.weight.detach().to(torch.float8_e4m3fn)
    spread = scale
    if scales == "rows":
        spread = scale[:, None]
    if "blocks" in scales:
        spread = scale.repeat_interleave(4, 0).repeat_interleave(4, 1)[: values.shape[0], : values.shape[1]]
        base.block_size = (4, 4)  # type: ignore[assignment]
    layer = quantised(base)
    base.weight = nn.Parameter(values, requires_grad=False)
    base.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    expected = sum_of(layer, values.float() * spread)
    assert reason_of(read_chain(layer)) is None
    assert torch.equal(effective_weight(layer, torch.bfloat16), expected.to(torch.bfloat16))


def test_row_wise_int8() -> None:
    """bitsandbytes' 8 bit form needs no bitsandbytes to be read."""
    torch.manual_seed(0)
    base = nn.Linear(8, 12)
    weight = base.weight.detach()
    layer = quantised(base)
    scale = weight.abs().amax(1)
    base.weight = nn.Parameter((weight / scale[:, None] * 127).round().to(torch.int8), requires_grad=False)
    base.state = type("LayerState", (), {"SCB": scale})()  # type: ignore[assignment]
    effective = effective_weight(layer, torch.float32)
    assert_close(effective, sum_of(layer, base.weight.float() * scale[:, None] / 127), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer.merged_adapters.append(DEFAULT)
    layer.enable_adapters(False)
    refused(layer, "merged and disabled")


def test_a_layer_that_can_dequantise_itself_is_not_written_to() -> None:
    """HQQ keeps notes in a dictionary of its own meanwhile."""

    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 12)
            self.W_q = nn.Parameter(torch.randint(0, 15, (12, 8), dtype=torch.uint8), requires_grad=False)
            self.meta = {"scale": 0.1}

        def dequantize(self) -> torch.Tensor:
            self.meta["note"] = 1.0
            return self.W_q.float() * self.meta["scale"]

    base = Packed()
    layer = quantised(base)
    del base.weight
    base.__dict__["meta"] = {"scale": 0.1}
    assert torch.equal(effective_weight(layer, torch.float32), sum_of(layer, base.W_q.float() * 0.1))
    assert base.meta == {"scale": 0.1}


@pytest.mark.parametrize("form", ["qweight", "packed uint8", "4 bit without its library"])
def test_packed_weights_without_a_dequantiser(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_side.lora.layers.dequant.find_spec", lambda name: None)  # its library is not installed
    base = nn.Linear(8, 12)
    layer = quantised(base)
    packed = torch.zeros(48, 1, dtype=torch.uint8)
    if form == "4 bit without its library":
        packed.quant_state = type("LayerState", (), {"absmax": torch.ones(1), "quant_type": "nf4"})()  # type: ignore[attr-defined]
    if form == "qweight":
        del base.weight
        base.qweight = packed  # type: ignore[assignment]
    else:
        del base.weight
        base.weight = packed
    refused(layer, "no dequantiser", "16 bit")
    layer.enable_adapters(False)
    assert reason_of(read_chain(layer)) is None
    with pytest.raises(UnsupportedLora, match="packed weight"):
        effective_weight(layer, torch.float32)


def test_a_weight_that_reads_itself() -> None:
    """torchao's tensors carry their own `dequantize`."""

    class Self(torch.Tensor):
        def dequantize(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor) * 2.0

    base = nn.Linear(8, 12)
    layer = quantised(base)
    plain = base.weight.detach().clone()
    base.weight = nn.Parameter(plain.clone().as_subclass(Self), requires_grad=False)
    assert torch.equal(effective_weight(layer, torch.float32), sum_of(layer, plain * 2))
