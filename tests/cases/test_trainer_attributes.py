"""Whatever hangs on a model or its parameters: the canary's forward changes, frees, copies and refuses none of it."""

from __future__ import annotations

import random
import tempfile
import weakref
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bridge.errors import ConfigError
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import apart, everything
from tests.push.rig import Rig
from trainer_side.reference import reference_logprobs
from trainer_side.shielded.model_copy import ModelCopier

PROMPTS = [[1, 5, 30, 7, 2], [4, 4, 9]]


class Layer(nn.Module):
    """Does something to an attribute of its own before it answers as the layer inside."""

    def __init__(self, inner: nn.Module, state: Any, touch: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.state = state
        self.touch = touch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.touch(self.state)
        out: torch.Tensor = self.inner(x)
        return out


class Entries(dict[str, Any]):
    """A dictionary of a class of its own."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise AssertionError("nothing of the model is called")


Pair = namedtuple("Pair", "seen total")


@dataclass(slots=True)
class Slotted:
    calls: int = 0
    seen: list[int] = field(default_factory=list)


class Nested:
    def __init__(self, depth: int) -> None:
        self.inner = Nested(depth - 1) if depth else None
        self.calls = 0


def innermost(state: Nested) -> Nested:
    return state if state.inner is None else innermost(state.inner)


def count(state: Any) -> None:
    state.calls += 1


def touch_slots(state: Slotted) -> None:
    state.calls += 1
    state.seen.append(1)


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "array": (lambda: np.zeros(3), lambda s: s.__iadd__(1), lambda s: s.tolist()),
    "deque": (lambda: deque([0], maxlen=4), lambda s: s.append(1), list),
    "bytes": (lambda: bytearray(b"a"), lambda s: s.append(1), bytes),
    "class of dictionaries": (lambda: Entries(a=[]), lambda s: s["a"].append(1), lambda s: s["a"]),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda s: s.move_to_end("a"), list),
    "named tuple": (
        lambda: Pair([], torch.zeros(2)),
        lambda s: (s.seen.append(1), s.total.add_(1)),
        lambda s: (s.seen, s.total.tolist()),
    ),
    "slots": (Slotted, touch_slots, lambda s: (s.calls, s.seen)),
    "objects within objects": (lambda: Nested(3), lambda s: count(innermost(s)), lambda s: innermost(s).calls),
    "torch's generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda s: torch.rand(1, generator=s),
        lambda s: s.get_state().tolist(),
    ),
    "numpy's generator": (lambda: np.random.default_rng(3), lambda s: s.random(), lambda s: s.bit_generator.state),
    "Python's generator": (lambda: random.Random(3), lambda s: s.random(), lambda s: s.getstate()),
}


@pytest.mark.parametrize("behind_closure", [False, True], ids=["copied", "put back"])
@pytest.mark.parametrize("kind", STATES)
def test_state_of_any_kind_stays(kind: str, behind_closure: bool) -> None:
    make, touch, read = STATES[kind]
    model = tiny_qwen2()
    plain = reference_logprobs(model, PROMPTS)
    layer = model.lm_head = Layer(model.lm_head, make(), touch)
    if behind_closure:
        original = model.forward
        model.forward = lambda *args, **named: original(*args, **named)
    state, before = layer.state, repr(read(layer.state))
    assert apart(reference_logprobs(model, PROMPTS), plain) < 1e-5
    assert layer.state is state
    assert repr(read(state)) == before


def test_a_buffer_that_counts_behind_a_closure_is_no_change_of_the_trainer() -> None:
    """The live forward runs once there, and what it wrote is put back: values, and what autograd knows of them."""
    model = tiny_qwen2()
    model.lm_head.register_buffer("calls", torch.zeros(1))
    model.lm_head.register_forward_pre_hook(lambda module, _: module.calls.add_(1) and None)
    original = model.forward
    model.forward = lambda *args, **named: original(*args, **named)
    version = model.lm_head.calls._version
    assert apart(reference_logprobs(model, PROMPTS), reference_logprobs(tiny_qwen2(), PROMPTS)) < 1e-5
    assert (model.lm_head.calls.item(), model.lm_head.calls._version) == (0, version)


class Owner(nn.Linear):
    """Frees something when it ends."""

    freed = 0

    def __del__(self) -> None:
        Owner.freed += 1


def test_the_end_of_a_copy_frees_nothing_that_the_model_uses() -> None:
    model = tiny_qwen2()
    model.lm_head.__class__ = Owner
    model.scratch = tempfile.NamedTemporaryFile()  # noqa: SIM115
    reference_logprobs(model, PROMPTS)
    assert Owner.freed == 0
    assert Path(model.scratch.name).exists()
    assert not model.scratch.file.closed
    model.scratch.close()


class WritingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self) -> None:
        with torch.no_grad():
            self.weight.add_(1)


def write_first(state: Any) -> None:
    with torch.no_grad():
        state[0].add_(1)


def test_weights_that_no_module_registers_are_guarded_too() -> None:
    hidden, listed = WritingLayer(), nn.Parameter(torch.zeros(3))
    for state, touch, weight in (([hidden], lambda s: s[0](), hidden.weight), ([listed], write_first, listed)):
        model = tiny_qwen2()
        model.lm_head = Layer(model.lm_head, state, touch)
        with pytest.raises(ConfigError, match="would write to its weights"):
            reference_logprobs(model, PROMPTS)
        assert weight.tolist() == [0, 0, 0]


def test_tensors_inside_of_a_parameter_are_guarded_too() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = tiny_qwen2()
    layer = WritingLayer()
    layer.weight = nn.Parameter(TwoTensor(torch.zeros(3), torch.zeros(3)))
    model.lm_head = Layer(model.lm_head, [layer], lambda s: s[0]())
    with pytest.raises(ConfigError, match="would write to its weights"):
        reference_logprobs(model, PROMPTS)
    assert (layer.weight.a.tolist(), layer.weight.b.tolist()) == ([0, 0, 0], [0, 0, 0])


def test_what_is_looked_up_by_a_module_or_parameter_is_found_in_the_copy() -> None:
    model = tiny_qwen2()
    head = model.lm_head
    plain = reference_logprobs(model, PROMPTS)
    tables: list[Any] = [{head: []}, {head.weight: []}, weakref.WeakKeyDictionary({head: []})]
    proxy, method = weakref.proxy(head), weakref.WeakMethod(head.extra_repr)
    head.state = (*tables, {head}, frozenset({head}), proxy, method)

    def look_up(module: Any, _: Any) -> None:
        by_module, by_weight, by_weak_module, some, same, ahead, asked = module.state
        for found in (by_module[module], by_weight[module.weight], by_weak_module[module]):
            found.append(1)
        for each in (*some, *same, ahead, asked().__self__):
            assert each.weight is module.weight
            each.note = 1

    head.register_forward_pre_hook(look_up)
    assert reference_logprobs(model, PROMPTS) == plain
    assert [list(table.values()) for table in tables] == [[[]]] * 3
    assert not hasattr(head, "note")


def test_a_model_that_was_used_or_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        made = tiny_qwen2()
        used = tiny_qwen2(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        plain = reference_logprobs(used, PROMPTS)
        used(input_ids=torch.ones(1, 300, dtype=torch.long))  # grows its table of frequencies
    assert used.model.rotary_emb.inv_freq.is_inference()
    assert apart(reference_logprobs(used, PROMPTS), plain) < 1e-6
    assert reference_logprobs(made, PROMPTS) == reference_logprobs(tiny_qwen2(), PROMPTS)
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, model)
    try:
        with torch.inference_mode():
            model.register_buffer("scratch", torch.ones(2), persistent=False)
        assert rig.push().verified is True
    finally:
        rig.close()


def test_objects_with_traps_and_without_a_copy() -> None:
    class Trap:
        __slots__ = ("__dict__", "unset")

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

        def __setattr__(self, name: str, value: Any) -> None:
            raise RuntimeError(name)

    model = tiny_qwen2()
    plain = reference_logprobs(model, PROMPTS)
    model.trap = Trap()
    assert reference_logprobs(model, PROMPTS) == plain


def test_a_model_that_cannot_be_copied_is_pushed_without_a_canary(tmp_path: Path) -> None:
    class Closed:
        @property
        def __dict__(self) -> Any:
            raise RuntimeError("closed")

    for spoil in ("attribute", "script"):
        model = tiny_qwen2()
        model.save_pretrained(tmp_path)
        rig = Rig(tmp_path, model)
        try:
            if spoil == "attribute":
                model.closed = Closed()
            else:
                model.model.layers[0].mlp.act_fn = torch.jit.script(nn.SiLU())
            receipt = rig.push()
            assert receipt.verified == "partial"
            assert any("cannot be copied" in note for note in receipt.notes), receipt.notes
        finally:
            rig.close()


def test_gradients_and_optimizers_that_hang_on_the_model_take_no_memory() -> None:
    """Some trainers keep them there; each is as large as the model."""
    model = tiny_qwen2()
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    model.optimizer = torch.optim.AdamW(model.parameters())
    before = everything(model)
    copier = ModelCopier()
    double: Any = copier.copy(model)
    assert double.optimizer is model.optimizer
    assert double.lm_head.weight.main_grad is not model.lm_head.weight.main_grad
    assert double.lm_head.weight.main_grad.data_ptr() == model.lm_head.weight.main_grad.data_ptr()
    model.lm_head.register_forward_pre_hook(lambda module, _: module.weight.main_grad.add_(1) and None)
    with pytest.raises(ConfigError, match="would write to its weights"):
        reference_logprobs(model, PROMPTS)
    assert not model.lm_head.weight.main_grad.any()
    assert everything(model) == before


def test_functions_that_the_trainer_compiles_are_compiled_after_a_push_too() -> None:
    """Dynamo never again compiles code that it first met under a dispatch mode, such as the guard is."""
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    doubled = torch.compile(lambda x: x * 2, backend=backend)
    model = tiny_qwen2()
    model.lm_head.register_forward_pre_hook(lambda _, given: (doubled(given[0]) / 2,))
    model.model.layers[0] = torch.compile(model.model.layers[0], backend=backend)
    assert apart(reference_logprobs(model, PROMPTS), reference_logprobs(tiny_qwen2(), PROMPTS)) < 1e-5
    assert not compiled
    with torch.no_grad():
        model(input_ids=torch.tensor(PROMPTS[:1]))
    assert len(compiled) >= 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_that_is_an_operator_of_higher_order() -> None:
    model = tiny_qwen2()
    plain = reference_logprobs(model, PROMPTS)
    model.set_attn_implementation("flex_attention")
    assert apart(reference_logprobs(model, PROMPTS), plain) < 1e-4
