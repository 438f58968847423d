"""Tensors that are not what they seem: what can be copied arrives as its values, the rest is refused by name before
anything is written, and the next good push goes through."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import bridge
from bridge.errors import ConfigError, DtypeMismatch, DuplicateTensor, IntegrityError
from tests.conftest import tiny_qwen2
from tests.push.rig import Rig

Attach = Callable[..., bridge.Bridge]


@pytest.fixture
def attach() -> Iterator[Attach]:
    made: list[bridge.Bridge] = []

    def open_bridge(module: nn.Module, **options: Any) -> bridge.Bridge:
        made.append(bridge.attach(module, **options))
        return made[-1]

    yield open_bridge
    for each in made:
        each.close()


class Held(nn.Module):
    """Something of every kind of dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        for name, dtype in (("count", torch.int64), ("u8", torch.uint8), ("flag", torch.bool)):
            self.register_buffer(name, torch.zeros(3, dtype=dtype))


def values(module: nn.Module) -> dict[str, list[Any]]:
    return {name: t.tolist() for name, t in module.state_dict().items()}


GOOD = {
    "w": torch.tensor([1.5, 2.5, 3.5]),
    "count": torch.tensor([1, 2, 3]),
    "u8": torch.tensor([3, 2, 1], dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
}


@pytest.mark.parametrize(
    ("name", "tensor", "where"),
    [
        ("w", torch.tensor([0, 1, 0]), "w -> w"),
        ("count", torch.tensor([0.0, 1.0, 0.0]), "count -> count"),
        ("u8", torch.tensor([0, 300, 0]), "u8[1]"),
        ("u8", torch.tensor([0, -1, 0]), "u8[1]"),
        ("flag", torch.tensor([0.0, 1.0, 0.0]), "flag -> flag"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"allow_nonfinite": True}])
def test_values_that_the_engine_cannot_hold(
    attach: Attach, name: str, tensor: torch.Tensor, where: str, options: dict[str, bool]
) -> None:
    live = Held()
    b = attach(live)
    assert b.push(GOOD.items()).verified is True
    before = values(live)
    with pytest.raises(DtypeMismatch, match=f"where: {re.escape(where)}"):
        b.push((GOOD | {name: tensor}).items(), **options)
    assert values(live) == before
    assert b.push((GOOD | {"w": torch.ones(3)}).items()).verified is True
    assert live.w.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("size", [4, 400])
def test_a_view_that_is_negated_when_read(attach: Attach, size: int) -> None:
    live = nn.Linear(size, size, bias=False)
    b = attach(live)
    w = torch.randn(size, size)
    # its memory is what the arena already holds, at each of the two slots
    for sent in (w, w.clone(), torch._neg_view(w), torch.complex(w, w).conj().imag, w, torch._neg_view(w)):
        b.push([("weight", sent)])
        assert torch.equal(live.weight.detach(), sent.resolve_neg())


def test_a_negated_view_is_no_tie() -> None:
    from trainer_side.names.tensor_layout import WeightSource

    w = torch.randn(3)
    assert len(WeightSource().collect([("a", w), ("b", torch._neg_view(w))]).tensors) == 2


class Marked(torch.Tensor):
    """Adds only itself; whoever lets its functions have a say fails."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in func.__name__ or "view" in func.__name__:
            raise TypeError(f"{func.__name__} of a marked tensor")
        return super().__torch_function__(func, types, args, kwargs or {})


class Owned(nn.Parameter):
    """A parameter with an attribute, as engines' and quantisers' own are."""

    loader = "some"


@pytest.mark.parametrize("wrap", [Owned, lambda t: t.as_subclass(Marked), nn.Buffer])
@pytest.mark.parametrize("size", [4, 400])
def test_subclasses_that_own_their_storage_travel(attach: Attach, wrap: Callable[[Any], Any], size: int) -> None:
    live = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    b = attach(live)
    for seed in range(3):
        w = torch.full((size, size), float(seed))
        assert b.push([("weight", wrap(w))]).verified is True
        assert torch.equal(live.weight.detach().float(), w)


def freed() -> torch.Tensor:
    t = torch.randn(4, 4)
    t.untyped_storage().resize_(0)
    return t


def fake() -> torch.Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(torch.randn(4, 4))


NOT_THERE: list[Callable[[], torch.Tensor]] = [
    lambda: TwoTensor(torch.ones(4, 4), torch.ones(4, 4)),
    lambda: nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4))),
    freed,
    fake,
    lambda: torch._efficientzerotensor((4, 4)),
    nn.UninitializedParameter,
    nn.UninitializedBuffer,
    lambda: torch.ones(4, 4, device="meta"),
    lambda: torch.ones(4, 4, dtype=torch.complex64).conj(),
]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("make", NOT_THERE)
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_a_tensor_without_values_of_its_own_is_refused_by_name(
    attach: Attach, make: Callable[[], torch.Tensor], bound: bool, warm: bool
) -> None:
    live, model = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b = attach(live, model=model if bound else None)
    if warm:
        b.push([("weight", torch.ones(4, 4))])
    before = live.weight.tolist()
    with pytest.raises(IntegrityError, match="where: weight;") as caught:
        b.push([("weight", make())])
    assert caught.value.names == ("weight",) or isinstance(caught.value, DtypeMismatch)
    assert live.weight.tolist() == before
    b.push([("weight", torch.full((4, 4), 2.0))])
    assert live.weight.tolist() == [[2.0] * 4] * 4


@pytest.mark.parametrize("bad", [3, "model", {"weight": torch.ones(4, 4)}, nn.Linear])
def test_only_a_module_is_bound(attach: Attach, bad: Any) -> None:
    live = nn.Linear(4, 4, bias=False)
    with pytest.raises(ConfigError, match="only a module can be bound"):
        attach(live, model=bad)
    b = attach(live)
    with pytest.raises(ConfigError, match="only a module can be bound"):
        b.bind(bad)
    b.push([("weight", torch.ones(4, 4))])
    assert live.weight.tolist() == [[1.0] * 4] * 4


def test_a_lazy_module_is_named_and_may_come_again(attach: Attach) -> None:
    lazy = nn.Sequential(nn.LazyLinear(4, bias=False))
    live = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(IntegrityError, match=r"lazy.*where: 0.weight;.*forward"):
        attach(live, model=lazy)
    b = attach(live)
    with pytest.raises(IntegrityError, match=r"lazy.*where: 0.weight;.*forward"):
        b.bind(lazy)
    lazy(torch.ones(1, 4))
    b.bind(lazy)
    assert b.push(lazy.named_parameters()).verified is True
    assert torch.equal(live[0].weight, lazy[0].weight)


@pytest.mark.parametrize("level", ["weights", "outputs"])
def test_a_model_that_was_untied_after_it_was_bound(tmp_path: Path, level: str) -> None:
    model = tiny_qwen2(tied=True)
    tiny_qwen2(tied=False).save_pretrained(tmp_path)
    rig = Rig(tmp_path, model)
    try:
        rig.push()
        before = rig.seen()
        torch.manual_seed(3)
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
        for pairs in (rig.named(), [(n, p) for n, p in rig.named() if n != "lm_head.weight"]):
            with pytest.raises(DuplicateTensor, match=r"lm_head\.weight"):
                rig.b.push(pairs, verify=level)
        assert rig.seen().same(before)
        rig.b.bind(model)
        assert rig.push(verify=level).verified is True
        assert rig.serves(model)
    finally:
        rig.close()
