"""copy_or_rebind_param and the attribute snapshot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine_side.live.bindings import AttributeSnapshot, diff
from engine_side.live.inplace import Outcome, copy_or_rebind_param


class Sharded(nn.Parameter):
    pass


def layer(rows: int = 4, columns: int = 6) -> nn.Module:
    module = nn.Module()
    data = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    param = torch.Tensor._make_subclass(Sharded, data.clone(), False)
    param.weight_loader = module.register_buffer
    param.output_dim, param.input_dim = 0, 1
    module.weight = param
    module.register_buffer("scale", torch.ones(3))
    return module


def test_same_shape_is_copied_into_the_live_storage() -> None:
    module = layer()
    param, address, loader = module.weight, module.weight.data_ptr(), module.weight.weight_loader
    value = torch.randn(4, 6)
    assert copy_or_rebind_param(module, "weight", value) is Outcome.COPIED
    assert module.weight is param
    assert param.data_ptr() == address
    assert torch.equal(param, value)
    assert type(param) is Sharded
    assert param.weight_loader is loader
    assert param.output_dim == 0


def test_another_shape_swaps_the_storage_under_the_same_object() -> None:
    module = layer()
    param, loader = module.weight, module.weight.weight_loader
    other = nn.Module()
    other.alias = param
    value = torch.randn(5, 7)
    assert copy_or_rebind_param(module, "weight", value) is Outcome.REBOUND
    assert module.weight is param
    assert other.alias is param
    assert torch.equal(other.alias, value)
    assert type(param) is Sharded
    assert param.weight_loader is loader
    assert not param.requires_grad
    assert (param.input_dim, param.output_dim) == (1, 0)


@pytest.mark.parametrize("private", [False, True])
def test_sharding_attributes_follow_a_transpose(private: bool) -> None:
    module = layer()
    param = module.weight
    if private:
        del param.input_dim, param.output_dim
        param._input_dim, param._output_dim = 1, 0
    want = param.detach().t().clone()
    assert copy_or_rebind_param(module, "weight", param.t()) is Outcome.REBOUND
    assert torch.equal(param, want)
    found = (param._input_dim, param._output_dim) if private else (param.input_dim, param.output_dim)
    assert found == (0, 1)


def test_square_transpose_of_itself() -> None:
    module = layer(5, 5)
    param, address = module.weight, module.weight.data_ptr()
    want = param.detach().t().clone()
    assert copy_or_rebind_param(module, "weight", param.t()) is Outcome.COPIED
    assert torch.equal(param, want)
    assert param.data_ptr() == address
    assert (param.input_dim, param.output_dim) == (0, 1)


def test_square_value_from_elsewhere_is_no_transpose() -> None:
    module = layer(5, 5)
    copy_or_rebind_param(module, "weight", torch.randn(5, 5))
    assert (module.weight.input_dim, module.weight.output_dim) == (1, 0)


def test_experts_transpose_their_last_two_dimensions() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(3, 4, 5), requires_grad=False)
    module.w.input_dim, module.w.output_dim = 2, 1
    copy_or_rebind_param(module, "w", torch.randn(3, 5, 4))
    assert (module.w.input_dim, module.w.output_dim) == (1, 2)


def test_value_that_is_the_live_tensor_is_left_alone() -> None:
    module = layer()
    want = module.weight.detach().clone()
    assert copy_or_rebind_param(module, "weight", module.weight) is Outcome.COPIED
    assert torch.equal(module.weight, want)


def test_overlapping_view_of_itself() -> None:
    module = layer()
    want = module.weight.detach().flip(0).clone()
    assert copy_or_rebind_param(module, "weight", module.weight.detach().flip(0)) is Outcome.COPIED
    assert torch.equal(module.weight, want)


@pytest.mark.parametrize("registered", [False, True])
def test_missing_name_becomes_a_parameter_with_recorded_attributes(registered: bool) -> None:
    module = layer()
    like = module.weight
    del module.weight
    if registered:
        module.register_parameter("weight", None)
    assert copy_or_rebind_param(module, "weight", torch.randn(4, 6), like=like) is Outcome.CREATED
    assert type(module.weight) is Sharded
    assert module.weight.weight_loader is like.weight_loader
    assert "weight" in dict(module.named_parameters())


def test_a_buffer_stays_a_buffer() -> None:
    module = layer()
    buffer = module.scale
    assert copy_or_rebind_param(module, "scale", torch.zeros(7)) is Outcome.REBOUND
    assert module.scale is buffer
    assert "scale" in dict(module.named_buffers())
    assert not isinstance(module.scale, nn.Parameter)


def test_another_dtype_rebinds() -> None:
    module = layer()
    param = module.weight
    assert copy_or_rebind_param(module, "weight", param.detach().bfloat16()) is Outcome.REBOUND
    assert module.weight is param
    assert param.dtype is torch.bfloat16
    assert param.output_dim == 0


def test_a_meta_parameter_gets_storage_under_the_same_object() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.empty(3, 3, device="meta"), requires_grad=False)
    module.w.mark = "kept"
    param = module.w
    assert copy_or_rebind_param(module, "w", torch.ones(3, 3)) is Outcome.REBOUND
    assert module.w is param
    assert param.device.type == "cpu"
    assert param.mark == "kept"
    assert bool((param == 1).all())


def changes(module: nn.Module, act: object, allowed: tuple[str, ...] = ()) -> set[tuple[str, str]]:
    before = AttributeSnapshot(module)
    act(module)  # type: ignore[operator]
    assert before.unchanged() == (not diff(before, before.retake()))
    return {(d.path, d.what) for d in diff(before, before.retake(), allowed)}


def replace(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


def test_snapshot_sees_what_a_sync_must_not_change() -> None:
    assert changes(layer(), lambda m: m.weight.data.add_(1)) == set()
    assert ("weight", "object_id") in changes(layer(), replace)
    assert ("weight", "attribute weight_loader") in changes(layer(), replace)
    assert ("weight", "attribute output_dim") in changes(layer(), lambda m: setattr(m.weight, "output_dim", 5))
    assert ("weight", "address") in changes(layer(), lambda m: setattr(m.weight, "data", torch.zeros(4, 6)))
    assert changes(layer(), lambda m: setattr(m.weight, "data", torch.zeros(4, 6)), ("weight",)) == set()
    assert ("weight", "presence") in changes(layer(), lambda m: delattr(m, "weight"))


@pytest.mark.parametrize(
    ("what", "view"),
    [
        ("stride", lambda weight: weight.t()),
        ("shape", lambda weight: weight[:2]),
        ("dtype", lambda weight: weight.view(torch.bfloat16)),
    ],
)
def test_snapshot_sees_another_view_of_the_same_memory(what: str, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert ("weight", what) in changes(layer(), lambda m: setattr(m.weight, "data", view(m.weight.data)))


def test_snapshot_sees_a_stale_alias() -> None:
    root = nn.Module()
    root.base = layer()
    root.register_parameter("weight", root.base.weight)
    found = changes(root, lambda m: replace(m.base))
    assert ("weight", "aliases") in found
    assert ("base.weight", "object_id") in found


def test_a_swap_moves_the_storage_of_the_same_form_and_keeps_the_object() -> None:
    layer = nn.Linear(3, 3)
    param, value = layer.weight, torch.rand(3, 3)
    param.weight_loader = print
    assert copy_or_rebind_param(layer, "weight", value, swap=True) is Outcome.REBOUND
    assert layer.weight is param
    assert param.data_ptr() == value.data_ptr()
    assert param.weight_loader is print
    assert copy_or_rebind_param(layer, "weight", param.detach(), swap=True) is Outcome.COPIED, "it is there already"
