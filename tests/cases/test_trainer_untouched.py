"""The canary's forward leaves the trainer as it was, whatever the libraries in it do, and enters no collective."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import bridge
from bridge.errors import ConfigError, IntegrityError
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, apart, everything, stir, wrap
from tests.push.rig import Rig, same_bits
from trainer_side.reference import reference_logprobs

PROMPTS = [[1, 5, 30, 7, 2], [4, 4, 9]]


class _State:
    """What a quantiser hangs on a parameter."""

    def __init__(self) -> None:
        self.packed = False
        self.shape: torch.Size | None = None
        self.nested: _State | None = None


class RepackingLinear(nn.Linear):
    """Stands in for a layer of a quantisation library that re-packs its weight for this CPU in its first forward in
    eval mode, as real ones do on CPUs with avx512_bf16: in place of the data, with notes on states of its own."""

    repacked = 0

    @classmethod
    def take_over(cls, linear: nn.Linear) -> None:
        linear.__class__ = cls
        state: Any = _State()
        state.nested = _State()
        linear.weight.quant_state = state  # type: ignore[attr-defined]
        linear.notes = {"packed": False}  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = self.weight.quant_state  # type: ignore[attr-defined]
        if not self.training and not state.packed:
            state.shape = self.weight.shape
            self.weight.data = self.weight.data.t().contiguous().reshape(-1, 2)
            state.packed = state.nested.packed = True
            self.weight.packing = "for this CPU"  # type: ignore[attr-defined]
            notes: Any = self.notes
            notes["packed"] = True
            RepackingLinear.repacked += 1
        if not state.packed:
            return super().forward(x)
        outputs, inputs = state.shape
        return nn.functional.linear(x, self.weight.reshape(inputs, outputs).t(), self.bias)


def repacking(model: Any) -> Any:
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not model.lm_head:
            RepackingLinear.take_over(module)
    return model


def train_once(model: Any) -> None:
    model.train()
    loss = model(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(p), p._version) for name, p in model.named_parameters()}


@pytest.mark.parametrize("verify", [None, "outputs", "weights", "off"])
def test_a_library_that_repacks_in_its_forward(tmp_path: Path, verify: str | None) -> None:
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, repacking(model))
    try:
        for _ in range(2):
            train_once(rig.model)
            before, objects, done = everything(rig.model), versions(rig.model), RepackingLinear.repacked
            state = rig.model.model.layers[0].mlp.up_proj.weight.quant_state
            receipt = rig.push(verify=verify)
            assert receipt.verified is (verify != "off")
            assert (RepackingLinear.repacked > done) is (verify in (None, "outputs"))  # it happened, on the copy
            assert everything(rig.model) == before
            assert versions(rig.model) == objects
            layer = rig.model.model.layers[0].mlp.up_proj
            assert layer.weight.quant_state is state
            assert (state.packed, state.nested.packed, layer.notes) == (False, False, {"packed": False})
            assert not hasattr(layer.weight, "packing")
    finally:
        rig.close()


class WritingHead(nn.Linear):
    """Writes its weight in its forward, whose storage no copy of modules can protect."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.data.mul_(1.5)
        return super().forward(x)


def test_a_forward_that_writes_its_weights_is_stopped_before_it_does(tmp_path: Path) -> None:
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, model)
    try:
        model.lm_head.__class__ = WritingHead
        before = everything(model)
        receipt = rig.push()
        assert receipt.verified == "partial"
        assert any("would write to its weights" in note and "lm_head.weight" in note for note in receipt.notes)
        with pytest.raises(ConfigError, match="would write to its weights"):
            rig.push(verify="outputs")
        assert rig.push(verify="weights").verified is True
        assert everything(model) == before
    finally:
        rig.close()


def close_over(model: Any, change: float = 0.0) -> None:
    """Put a forward on the instance as TRL's GRPO trainer does: re-bound, over a closure that is not."""
    original = model.forward

    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = out.logits.float() * (1 + change)
        return out

    model.forward = MethodType(fused, model)


def test_a_closure_over_the_live_forward_is_no_false_alarm(tmp_path: Path) -> None:
    base = tiny_qwen2()
    base.save_pretrained(tmp_path)
    close_over(base)
    rig = LoraRig(tmp_path, wrap(base))
    try:
        for seed in range(4):
            stir(rig.model, seed=seed)
            before = everything(rig.model)
            receipt = rig.push(mode="adapter")
            assert receipt.verified is True, receipt.notes
            assert receipt.engines[0].canary is not None
            assert everything(rig.model) == before
            assert rig.serves(rig.truth())
    finally:
        rig.close()


def test_a_closure_that_computes_something_else_gives_no_canary(tmp_path: Path) -> None:
    base = tiny_qwen2()
    base.save_pretrained(tmp_path)
    close_over(base, change=0.5)
    rig = LoraRig(tmp_path, wrap(base))
    try:
        receipt = rig.push(mode="adapter")
        assert receipt.verified == "partial"
        assert any("calls the live model" in note for note in receipt.notes), receipt.notes
    finally:
        rig.close()


def test_a_forward_that_repacks_behind_a_closure_is_put_back() -> None:
    """The live forward is called once there, to be compared: what it replaced comes back."""
    model = repacking(tiny_qwen2())
    close_over(model)
    before, objects = everything(model), versions(model)
    layer = model.model.layers[0].mlp.up_proj
    state, repacked = layer.weight.quant_state, RepackingLinear.repacked
    plain = reference_logprobs(tiny_qwen2(), PROMPTS)
    for _ in range(2):
        assert apart(reference_logprobs(model, PROMPTS), plain) < 1e-5
        assert everything(model) == before
        assert versions(model) == objects
        assert layer.weight.quant_state is state
        assert (state.packed, state.nested.packed, layer.notes) == (False, False, {"packed": False})
    assert RepackingLinear.repacked > repacked


class Counting(nn.Module):
    """State of a layer that no tensor is: counters, lists, plain tensors, modules under another name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls: list[int] = []
        self.cache = torch.zeros(3)
        self.shortcut = [inner]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        self.cache += 1
        out: torch.Tensor = self.shortcut[0](x)
        return out


def test_state_that_is_no_registered_tensor_stays_too() -> None:
    model = tiny_qwen2()
    plain = reference_logprobs(model, PROMPTS)
    layer = Counting(model.lm_head)
    model.lm_head = layer
    assert reference_logprobs(model, PROMPTS) == plain
    assert (layer.calls, layer.cache.tolist()) == ([], [0.0, 0.0, 0.0])
    assert layer.shortcut[0] is layer.inner


def test_state_dict_is_never_asked() -> None:
    """One library rewrites its weights in it."""

    class Touchy(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("state_dict() of a live model")

    model = tiny_qwen2()
    model.lm_head.__class__ = Touchy
    assert reference_logprobs(model, PROMPTS) == reference_logprobs(copy.deepcopy(model), PROMPTS)


def test_a_change_that_no_guard_can_refuse_is_an_error(tmp_path: Path) -> None:
    """A forward that knows the live model by another way, and sets an attribute there."""
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, model)

    def marks(layer: Any, x: torch.Tensor) -> torch.Tensor:
        live_weight.seen = True  # type: ignore[attr-defined]
        return nn.functional.linear(x, layer.weight, layer.bias)

    try:
        assert rig.push().verified is True
        live_weight = model.lm_head.weight
        model.lm_head.forward = MethodType(marks, model.lm_head)
        with pytest.raises(IntegrityError, match=r"where: lm_head\.weight"):
            rig.push()
        del model.lm_head.forward
        assert rig.push().verified is True
    finally:
        rig.close()


def test_outputs_that_were_asked_for_of_an_engine_without_any_are_partial() -> None:
    model = tiny_qwen2()
    with bridge.attach(copy.deepcopy(model), model=model) as b:
        asked = b.push(model.named_parameters(), verify="outputs")
        assert (asked.verified, asked.verify) == ("partial", "outputs")
        assert any("no canary" in note for note in asked.notes)
        default = b.push(model.named_parameters())
        assert (default.verified, default.verify) == (True, "weights")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone, in which a collective would be carried out at once."""
    store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("one", store), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Gathering(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        dist.all_reduce(out)
        return out


def test_no_collective_is_entered(tmp_path: Path, alone: None) -> None:
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, model)
    try:
        model.lm_head.__class__ = Gathering
        started = time.monotonic()
        receipt = rig.push()
        assert time.monotonic() - started < 5
        assert receipt.verified == "partial"
        assert any("c10d" in note for note in receipt.notes), receipt.notes
        model(input_ids=torch.tensor([PROMPTS[0]]))  # by itself the model communicates as before
    finally:
        rig.close()


def test_every_kind_of_parameter_class_is_copied_as_its_class() -> None:
    class Own(nn.Parameter):
        pass

    model = tiny_qwen2()
    weight = Own(model.lm_head.weight.data)
    weight.note = [1, 2]
    model.lm_head.weight = weight
    seen: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda module, _: seen.append(module.weight))
    reference_logprobs(model, PROMPTS)
    assert type(seen[0]) is Own
    assert seen[0] is not weight
    assert seen[0].data_ptr() == weight.data_ptr()
    assert (seen[0].note, seen[0].note is weight.note) == ([1, 2], False)
    assert same_bits(seen[0].detach(), weight.detach())
