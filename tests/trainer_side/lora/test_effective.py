"""Effective weights against the live forward, for every row of `peft_rows` in every state of its adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bridge.errors import UnsupportedLora
from tests.trainer_side.lora.oracle import (
    TOLERANCE,
    base_output,
    innermost,
    live_embedding,
    live_linear,
    live_output,
    untouched,
)
from tests.trainer_side.lora.peft_rows import DEFAULT, HIDDEN, ROWS, VOCABULARY, Row, base_of, build, layer_of
from trainer_side.lora.layers.effective import (
    attention_output,
    effective_bias,
    effective_weight,
)
from trainer_side.lora.layers.factors import product
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.refusals import reason_of
from trainer_side.lora.layers.values import LayerState
from trainer_side.lora.layers.wrapper_chain import acting_copy, is_saved, read_chain

WIDE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def near(actual: Any, expected: Any) -> None:
    assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def check(layer: nn.Module, name: str) -> None:
    """The effective tensors of a layer of `Toy` give what its live forward gives."""
    with untouched(layer):
        checker = _CHECKS.get(name, linear)
        checker(layer)


def linear(layer: Any) -> None:
    base = innermost(acting_copy(layer) if is_saved(layer) else layer)
    weight, bias = live_linear(layer, HIDDEN)
    effective = effective_weight(layer, WIDE)
    near(effective.T if hasattr(base, "nf") else effective, weight)
    own = effective_bias(layer, WIDE)
    near(torch.zeros_like(bias) if own is None else own, bias)
    assert (own is None) == (getattr(base, "bias", None) is None)
    assert effective.shape == base.weight.shape


def embedding(layer: Any) -> None:
    scale = float(getattr(innermost(layer), "embed_scale", 1.0))
    near(effective_weight(layer, WIDE), live_embedding(layer, VOCABULARY, scale))
    assert effective_bias(layer, WIDE) is None


def convolution(*size: int) -> Callable[[Any], None]:
    def run(layer: Any) -> None:
        x = torch.randn(2, *size, dtype=WIDE)
        tensors = {"weight": effective_weight(layer, WIDE), "bias": effective_bias(layer, WIDE)}
        near(base_output(innermost(layer), tensors, x), live_output(layer, x))

    return run


def attention(layer: Any) -> None:
    output = attention_output(layer)
    assert output is not None
    tensors = {
        "in_proj_weight": effective_weight(layer, WIDE),
        "in_proj_bias": effective_bias(layer, WIDE),
        "out_proj.weight": effective_weight(output, WIDE, copies=2),
        "out_proj.bias": effective_bias(output, WIDE, copies=2),
    }
    x = torch.randn(2, 5, HIDDEN, dtype=WIDE)
    plain = nn.MultiheadAttention(HIDDEN, 2, batch_first=True).to(WIDE)
    near(base_output(plain, tensors, x, x, x)[0], live_output(layer, x, x, x)[0])


def experts(layer: Any) -> None:
    base = innermost(layer)
    tensors = {name: effective_weight(layer, WIDE, attribute=name) for name in ("gate_up_proj", "down_proj")}
    inputs = base.gate_up_proj.shape[1 if base.is_transposed else 2]
    x = torch.randn(4, inputs, dtype=WIDE)
    for expert in range(base.gate_up_proj.shape[0]):
        near(base_output(base, tensors, x, expert), live_output(layer, x, expert))


_CHECKS: dict[str, Callable[[Any], None]] = {
    "embed": embedding, "scaled": embedding, "attention": attention, "conv1": convolution(4, 9),
    "conv2": convolution(4, 7, 5), "point": convolution(4, 3, 3), "conv3": convolution(4, 4, 3, 5),
    "experts": experts, "stacked": experts, "even": experts, "even_stacked": experts, "lonely": experts,
}  # fmt: skip


def every_row(*, when: Callable[[Row], bool] = lambda row: True) -> Any:
    return pytest.mark.parametrize("row", [row for row in ROWS if when(row)], ids=str)


def merge(model: Any, *names: str) -> None:
    with torch.no_grad():
        model.base_model.merge_adapter(adapter_names=list(names) or None)


@every_row()
def test_active(row: Row) -> None:
    model = build(row)
    for name in row.layers:
        assert reason_of(read_chain(layer_of(model, name))) is None
        check(layer_of(model, name), name)


@every_row()
def test_active_differs_from_the_base(row: Row) -> None:
    """The oracle's own check: a row whose adapter did nothing would prove nothing."""
    model = build(row)
    if row.name.startswith("bias"):
        return
    name = row.layers[0]
    layer = layer_of(model, name)
    changed = effective_weight(layer, WIDE)
    model.base_model.disable_adapter_layers()
    assert not torch.allclose(changed, effective_weight(layer, WIDE), atol=1e-3)


@every_row()
def test_disabled(row: Row) -> None:
    model = build(row)
    model.base_model.disable_adapter_layers()
    for name in row.layers:
        check(layer_of(model, name), name)


@every_row(when=lambda row: row.mergeable)
def test_merged(row: Row) -> None:
    model = build(row)
    merge(model)
    for name in row.layers:
        check(layer_of(model, name), name)


@every_row(when=lambda row: row.mergeable)
def test_merged_and_disabled(row: Row) -> None:
    """PEFT's next forward unmerges by itself: a copy does, the live layer is only read."""
    model = build(row)
    merge(model)
    model.base_model.disable_adapter_layers()
    for name in row.layers:
        layer = layer_of(model, name)
        if row.unmerges:
            check(layer, name)
            continue
        assert lora_parameters(layer).state is LayerState.MERGED_DISABLED
        with untouched(layer), pytest.raises(UnsupportedLora, match="merged and disabled"):
            effective_weight(layer, WIDE)


@every_row(when=lambda row: len(row.adapters) > 1)
def test_one_of_several_active(row: Row) -> None:
    """Also adapters that a layer does not have: they are skipped."""
    model = build(row)
    for adapter in row.adapters:
        model.base_model.set_adapter(adapter)
        for name in row.layers:
            check(layer_of(model, name), name)


@every_row(when=lambda row: len(row.adapters) > 1 and row.mergeable)
def test_merged_while_another_is_active(row: Row) -> None:
    """Active adapters that are not merged are ignored."""
    model = build(row)
    merge(model, next(iter(row.adapters)))
    for name in row.layers:
        check(layer_of(model, name), name)


@every_row(when=lambda row: len(row.adapters) > 1)
def test_in_the_other_order(row: Row) -> None:
    """The order counts where DoRA is among them."""
    model = build(row)
    model.base_model.set_adapter(list(reversed(row.adapters)))
    for name in row.layers:
        check(layer_of(model, name), name)


def test_no_adapter_active() -> None:
    model = build(next(row for row in ROWS if row.name == "linear"))
    layer = layer_of(model, "linear")
    layer.set_adapter([])
    check(layer, "linear")
    assert torch.equal(effective_weight(layer, WIDE), innermost(layer).weight)


def test_merge_is_not_the_oracle() -> None:
    """Where PEFT's own merge differs from its forward, the forward is followed: trained attention adds the output
    projection's adapter twice (PEFT #3774)."""
    model = build(next(row for row in ROWS if row.name == "attention"))
    output = attention_output(layer_of(model, "attention"))
    assert output is not None
    delta = output.get_delta_weight(DEFAULT)
    near(effective_weight(output, WIDE, copies=2), innermost(output).weight + 2 * delta)
    with pytest.raises(UnsupportedLora, match="only the attention layer knows"):
        effective_weight(output, WIDE)


def test_plain_then_dora_scales_the_bias_before_it() -> None:
    """PEFT's merge adds `lora_bias` unscaled by the DoRA adapter that comes after it; its forward scales it."""
    row = next(row for row in ROWS if row.name == "plain, dora")
    model = build(row)
    layer = layer_of(model, "linear")
    own = effective_bias(layer, WIDE)
    merge(model)
    assert own is not None
    assert not torch.allclose(own, innermost(layer).bias, atol=1e-3)


@pytest.mark.parametrize("adapters", [False, True], ids=["bf16 adapters", "fp32 adapters"])
@pytest.mark.parametrize("row", [r for r in ROWS if r.name in ("linear", "embedding", "conv1d of transformers",
    "experts, both", "2-d parameter", "kasa")], ids=str)  # fmt: skip
def test_bf16_is_one_rounding_of_the_wide_sum(row: Row, adapters: bool) -> None:
    model = build(row, torch.bfloat16, wide_adapters=adapters)
    for name in row.layers:
        layer = layer_of(model, name)
        with untouched(layer):
            wide, narrow = effective_weight(layer, torch.float32), effective_weight(layer, torch.bfloat16)
        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(narrow, wide.to(torch.bfloat16))
        assert effective_weight(layer, torch.float64).dtype == torch.float32
        # Its values are those of the exact sum, not of one that was made in bf16.
        exact = build_exact(layer)
        if exact is not None:
            assert_close(wide.double(), exact, rtol=0, atol=1e-6)
            assert torch.equal(narrow, exact.float().to(torch.bfloat16))


def build_exact(layer: Any) -> torch.Tensor | None:
    """W + s B A of a plain linear layer, in float64."""
    if type(layer).__name__ != "Linear" or layer.lora_variant:
        return None
    product = layer.lora_B[DEFAULT].weight.double() @ layer.lora_A[DEFAULT].weight.double()
    delta = layer.scaling[DEFAULT] * (product.T if layer.fan_in_fan_out else product)
    return innermost(layer).weight.double() + delta  # type: ignore[no-any-return]


@every_row(when=lambda row: not row.name.startswith("attention"))
def test_given_values_count(row: Row) -> None:
    """Every tensor that is read goes through `given`: the live ones could be overwritten meanwhile."""
    model = build(row)
    sent: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return sent.setdefault(id(tensor), tensor.detach().clone())

    for name in row.layers:
        layer = layer_of(model, name)
        # Where nothing acts the result is the live tensor: keep its values.
        expected = [tensor.clone() for tensor in all_of(layer, None)]
        assert same(all_of(layer, keep), expected)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(7.0)
        assert not any(map(torch.equal, all_of(layer, None), expected))
        assert same(all_of(layer, keep), expected)


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def all_of(layer: Any, given: Any) -> list[torch.Tensor]:
    names = ("gate_up_proj", "down_proj") if hasattr(innermost(layer), "down_proj") else (None,)
    weights = [effective_weight(layer, WIDE, given, attribute=name) for name in names]
    bias = effective_bias(layer, WIDE, given)
    return weights if bias is None else [*weights, bias]


def test_blocks_of_rows_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer_side.lora.layers import effective

    for row in ROWS:
        model = build(row)
        for name in row.layers:
            if name == "attention":
                continue
            layer = layer_of(model, name)
            whole = effective_weight(layer, WIDE)
            with monkeypatch.context() as small:
                small.setattr(effective, "BLOCK", 20)
                near(effective_weight(layer, WIDE), whole)


@pytest.mark.parametrize("setting", ["autocast", "precision", "inference"])
def test_the_trainers_own_precision_settings_do_not_count(setting: str) -> None:
    model = build(next(row for row in ROWS if row.name == "dora"), torch.float32)
    layer = layer_of(model, "linear")
    expected = effective_weight(layer, torch.float32)
    if setting == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(effective_weight(layer, torch.float32), expected)
    elif setting == "inference":
        with torch.inference_mode():
            assert torch.equal(effective_weight(layer, torch.float32), expected)
    else:
        before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        try:
            assert_close(effective_weight(layer, torch.float32), expected, rtol=0, atol=1e-6)
            left, right = torch.randn(64, 16), torch.randn(16, 64)
            exact = (left.double() @ right.double()) * 2.5
            assert torch.equal(product(left, right, 2.5), exact.float())
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before


def test_result_needs_no_gradient_and_is_a_tensor_of_its_own() -> None:
    model = build(next(row for row in ROWS if row.name == "linear"))
    layer = layer_of(model, "linear")
    result = effective_weight(layer, WIDE)
    assert not result.requires_grad
    assert result.untyped_storage().data_ptr() != innermost(layer).weight.untyped_storage().data_ptr()


def test_tokens_around_a_linear_head_drop_its_bias_as_their_forward_does() -> None:
    from peft.tuners.trainable_tokens.config import TrainableTokensConfig
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    torch.manual_seed(0)
    layer = TrainableTokensLayer(nn.Linear(HIDDEN, VOCABULARY).double(), DEFAULT)
    layer.update_layer(DEFAULT, config=TrainableTokensConfig(token_indices=[1, 4]))
    with torch.no_grad():
        layer.trainable_tokens_delta[DEFAULT].add_(1.0)
    weight, bias = live_linear(layer, HIDDEN)
    near(effective_weight(layer, WIDE), weight)
    near(effective_bias(layer, WIDE), bias)
    assert torch.count_nonzero(bias) == 0


def test_rows_have_bases_of_the_same_shape() -> None:
    for row in ROWS[:6]:
        for name in row.layers:
            model = build(row)
            assert innermost(layer_of(model, name)).weight.shape == base_of(row, name).weight.shape
