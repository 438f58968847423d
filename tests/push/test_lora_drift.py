"""A thousand merged bf16 pushes leave no trace: not in the trainer, which is never merged and unmerged, and not in the
engine, which gets every version computed from the pristine base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import everything, wrap
from tests.push.rig import PROMPTS, same_bits

PUSHES = 1000
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40, "vocab_size": 64}


class Trainer:
    """A policy whose adapters move at every step: values always, and now and then the scaling or which of them act."""

    def __init__(self, base: Any) -> None:
        self.model = wrap(base, target_modules=["q_proj", "v_proj", "down_proj"], lora_bias=False)
        other = LoraConfig(r=2, lora_alpha=7, target_modules=["k_proj", "v_proj"], lora_bias=True)
        self.model.add_adapter("other", other)
        # PEFT keeps the adapters of a bf16 base in float32
        self.factors = [p for n, p in self.model.named_parameters() if "lora_A" in n or "lora_B" in n]
        assert {p.dtype for p in self.factors} == {torch.float32}
        self.layers = [m for m in self.model.modules() if hasattr(m, "set_scale")]
        self.generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def step(self, number: int) -> None:
        for parameter in self.factors:
            noise = torch.randn(parameter.shape, generator=self.generator)
            parameter.copy_(parameter * 0.9 + noise * 0.03)
        if number % 7 == 0:
            for layer in self.layers:
                layer.set_scale("default", 1.0 + (number % 5) / 3)
        if number % 50 == 0:
            acting = (["default"], ["default", "other"], ["other"], ["other", "default"])[number // 50 % 4]
            self.model.base_model.set_adapter(acting)


def bits(engine: Engine) -> dict[str, torch.Tensor]:
    """numpy has no bfloat16."""
    return {name: tensor.detach().clone().view(torch.int16) for name, tensor in engine.runner.model.named_parameters()}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_thousand_merged_bf16_pushes(checkpoint: Callable[[Any], Path]) -> None:
    base = tiny_qwen2(dtype=torch.bfloat16, **SMALL)
    folder = str(checkpoint(base))
    trainer, lonely = Trainer(copy.deepcopy(base)), Trainer(copy.deepcopy(base))
    first = everything(trainer.model)
    with Engine(EngineConfig(folder, wrap_linears=True)) as engine, bridge.attach(engine, model=trainer.model) as b:
        for number in range(1, PUSHES + 1):
            trainer.step(number)
            lonely.step(number)
            before = everything(trainer.model) if number % 100 == 1 else None
            verify = "outputs" if number % 200 == 0 else "weights" if number % 20 == 0 else "off"
            receipt = b.push(trainer.model.named_parameters(), mode="merged", verify=verify)
            assert receipt.wire_nbytes > 0, "every step moves something"
            assert before is None or everything(trainer.model) == before
        assert receipt.version == PUSHES
        thousandth = bits(engine)
        trainer.step(PUSHES + 1)
        lonely.step(PUSHES + 1)
        b.push(trainer.model.named_parameters(), mode="merged")
        after, answers = bits(engine), engine.prompt_logprobs(PROMPTS)
    with Engine(EngineConfig(folder, wrap_linears=True)) as fresh, bridge.attach(fresh, model=trainer.model) as b:
        started = bits(fresh)
        b.push(trainer.model.named_parameters(), mode="merged")
        want, wanted = bits(fresh), fresh.prompt_logprobs(PROMPTS)
    changed = {name for name, tensor in want.items() if not same_bits(tensor, started[name])}
    assert changed, "a merge that changes nothing tests nothing"
    assert not all(same_bits(thousandth[name], want[name]) for name in changed)
    assert [name for name, tensor in want.items() if not same_bits(tensor, after[name])] == []
    assert answers == wanted
    _left_no_trace(trainer, lonely, first)


def _left_no_trace(trainer: Trainer, lonely: Trainer, first: dict[str, Any]) -> None:
    """The trainer is what it would be had nothing been pushed; its frozen tensors are what they were at first."""
    last, alone = everything(trainer.model), everything(lonely.model)
    for name, found in last.items():
        if name.endswith("()"):
            assert found == alone[name], name
            continue
        assert found[0] == alone[name][0], name
        if "lora_" not in name:
            assert found == first[name], name
        else:
            assert found[2] == first[name][2], f"{name} lies elsewhere"
