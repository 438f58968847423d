"""LoRA that is refused: each remedy is followed, and ends in the trainer's policy, merged or as an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import (
    ConfigError,
    DuplicateTensor,
    MissingTensor,
    NotFound,
    PushAborted,
    StaleVersion,
    UnexpectedTensor,
    UnsupportedLora,
)
from tests.cases.raised import provoked
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, new_base, wrap
from trainer_side.lora import lora_parameters, merged_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
SELECT, MANAGER = "trainer_side/lora/select.py", "engine_side/embedded/lora/manager.py"
CHAIN = "trainer_side/lora/layers/wrapper_chain.py"
BASE_CHECK = "bridge/coordinator/base_weights_check.py"
CAPABILITY = "trainer_side/lora/capability.py: {}: {} cannot be pushed in {} mode: {}{}"
Q = "model.layers.0.self_attn.q_proj"
Make = Callable[..., LoraRig]


@pytest.fixture
def make(checkpoint: Callable[..., Path]) -> Iterator[Make]:
    """`make(engine={...}, **lora)`: a rig around PEFT; the engine starts from the base's checkpoint."""
    made: list[LoraRig] = []

    def build(*, engine: dict[str, Any] | None = None, **lora: Any) -> LoraRig:
        base = tiny_qwen2()
        folder = checkpoint(base)
        made.append(LoraRig(folder, wrap(base, **lora), **(engine or {})))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def right(rig: LoraRig, **options: Any) -> None:
    """Another step, pushed: the engine answers as the trainer's policy does."""
    rig.step()
    assert rig.push(**options).verified is True
    assert rig.serves(rig.truth())


def test_modes(make: Make) -> None:
    rig = make()
    with provoked(ConfigError, "trainer_side/lora/model.py: not a mode for a model with LoRA", "merged", "adapter"):
        rig.push(mode="full")
    right(rig, mode="merged")
    assert rig.push(mode="base").verified is True
    right(rig, mode="adapter")


def test_subsets(make: Make) -> None:
    rig = make()
    right(rig, mode="merged")
    pairs = [(n, p) for n, p in rig.model.named_parameters() if Q not in n]
    with provoked(MissingTensor, f"{SELECT}: tensors that {{}} mode sends did not come", "named_parameters"):
        rig.b.push(pairs, mode="merged")
    right(rig, mode="merged")
    assert rig.b.push(pairs, mode="merged", partial=True).verified is True
    assert rig.serves(rig.truth())
    norms = [(n, p) for n, p in rig.model.named_parameters() if "norm" in n]
    assert rig.push(mode="base").verified is True
    with provoked(MissingTensor, f"{SELECT}: nothing that was sent belongs to {{}}", 'mode="merged"'):
        rig.b.push(norms, mode="adapter", partial=True)
    right(rig, mode="adapter")
    key = (
        "bridge/coordinator/coordinator.py: a subset of the weights cannot take the place of an adapter that is served"
    )
    with provoked(ConfigError, key, "push all weights once"):
        rig.b.push(norms, mode="merged", partial=True)
    right(rig, mode="merged")


def test_names(make: Make) -> None:
    rig = make()
    name = next(n for n, _ in rig.model.named_parameters() if f"{Q}.base_layer.weight" in n)
    plain = [(f"{Q}.weight" if n == name else n, p) for n, p in rig.model.named_parameters()]
    key = f"{SELECT}: a layer's weight came under its base name while an adapter acts on it"
    with provoked(UnexpectedTensor, key, "named_parameters"):
        rig.b.push(plain, mode="merged")
    both = [*rig.model.named_parameters(), (name.replace("base_model.model.", ""), torch.zeros(48, 48))]
    with pytest.raises((DuplicateTensor, UnexpectedTensor), match="remedy: push"):
        rig.b.push(both, mode="merged")
    right(rig, mode="merged")


def test_a_feature_that_a_mode_cannot_carry(make: Make) -> None:
    rig = make(target_modules=["q_proj"], use_dora=True)
    with provoked(UnsupportedLora, CAPABILITY, 'mode="merged"'):
        rig.push(mode="adapter")
    right(rig, mode="merged")


def test_another_base(make: Make) -> None:
    """The engine serves merged weights, or the trainer's base has moved."""
    rig = make()
    key = f"{BASE_CHECK}: the engines do not serve the base weights that this adapter was trained on"
    new_base(rig)
    with provoked(UnsupportedLora, key, "mode='base'"):
        rig.push(mode="adapter")
    assert rig.push(mode="base").verified is True
    right(rig, mode="adapter")
    right(rig, mode="merged")
    with provoked(UnsupportedLora, key, "mode='base'"):
        rig.push(mode="adapter")
    assert rig.push(mode="base").verified is True
    right(rig, mode="adapter")


def test_rollback_over_two_changes(make: Make) -> None:
    rig = make()
    assert rig.push(mode="base").verified is True
    right(rig, mode="adapter")
    right(rig, mode="merged")
    key = "bridge/coordinator/rollback.py: the previous version cannot be brought back in one step"
    with provoked(StaleVersion, key, "push"):
        rig.b.rollback()
    assert rig.push(mode="base").verified is True
    right(rig, mode="adapter")


@pytest.mark.parametrize(
    ("engine", "lora", "kind", "key", "word", "better"),
    [
        ({"max_loras": 0}, {}, UnsupportedLora, CAPABILITY, 'mode="merged"', {"max_loras": 2}),
        ({"max_lora_rank": 2}, {}, UnsupportedLora, CAPABILITY, 'mode="merged"', {"max_lora_rank": 3}),
        (
            {"lora_targets": ("q_proj",)},
            {"target_modules": ["q_proj", "down_proj"]},
            UnexpectedTensor,
            f"{MANAGER}: the engine has no place for parts of this LoRA",
            "lora_targets",
            {"lora_targets": ("q_proj", "down_proj")},
        ),
        (
            {"max_loras": 1},
            {},
            PushAborted,
            f"{MANAGER}: no free slot for another LoRA",
            "larger max_loras",
            {"max_loras": 2},
        ),
    ],
)
def test_engines_without_room(
    make: Make,
    engine: dict[str, Any],
    lora: dict[str, Any],
    kind: type[bridge.BridgeError],
    key: str,
    word: str,
    better: dict[str, Any],
) -> None:
    """Merged weights need no slot; or the engine is started with what the remedy says."""
    rig = make(engine=engine, **lora)
    with provoked(kind, key, word):
        rig.push(mode="adapter")
        rig.step()
        rig.push(mode="adapter")
    right(rig, mode="merged")
    other = make(engine=better, **lora)
    right(other, mode="adapter")
    right(other, mode="adapter")


def test_a_model_that_was_wrapped_after_it_was_bound(checkpoint: Callable[..., Path]) -> None:
    base = tiny_qwen2()
    rig = LoraRig(checkpoint(base), base)
    try:
        rig.model = wrap(base)
        key = "trainer_side/trainer.py: the bound model was wrapped with LoRA after it was bound"
        with provoked(ConfigError, key, "b.bind(peft_model)"):
            rig.b.push(rig.model.named_parameters())
        rig.b.bind(rig.model)
        right(rig, mode="merged")
    finally:
        rig.close()


def test_a_module_takes_no_adapter() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    live = copy.deepcopy(base)
    model = wrap(base, target_modules=["0"])
    x = torch.randn(5, 4)
    with bridge.attach(live, model=model) as b:
        with provoked(UnsupportedLora, CAPABILITY, 'mode="merged"'):
            b.push(model.named_parameters(), mode="adapter")
        assert b.push(model.named_parameters(), mode="merged").verified is True
    assert torch.allclose(live(x), model(x), atol=1e-5)


def test_names_of_adapters(make: Make) -> None:
    rig = make()
    assert rig.push(mode="base").verified is True
    right(rig, mode="adapter")
    with provoked(NotFound, "engine_side/embedded/runner.py: the engine holds no such LoRA", "ask for one of these"):
        rig.b.engines[0].generate([[5]], bridge.Sampling(max_tokens=1), adapter="nobody's")
    assert rig.b.engines[0].generate([[5]], bridge.Sampling(max_tokens=1), adapter="current")


# ---- layers by themselves -------------------------------------------------------------------------------------------


def test_layers_that_are_read_by_themselves() -> None:
    import peft

    with provoked(ConfigError, "trainer_side/lora/layers/read.py: this module has no {}", "layers inside"):
        lora_parameters(nn.Sequential(nn.Linear(4, 3)))
    assert lora_parameters(nn.Linear(4, 3)).weight is not None
    tuned: Any = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 3)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    key = f"{CHAIN}: a tuner that is not LoRA changes this layer in a way that cannot be read"
    with provoked(UnsupportedLora, key, "merge_and_unload"):
        lora_parameters(tuned.base_model.model[0])
    assert lora_parameters(tuned.merge_and_unload()[0]).A is None


def test_a_packed_base_that_nobody_can_read() -> None:
    """A base in 16 bit can be read."""
    model: Any = wrap(nn.Sequential(nn.Linear(4, 3)), target_modules=["0"])
    layer = model.base_model.model[0].base_layer
    weight = layer.weight
    layer.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with provoked(UnsupportedLora, CAPABILITY, "16 bit"):
        dict(merged_tensors(model))
    layer.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
    assert dict(merged_tensors(model)).keys() == {"0.weight", "0.bias"}
