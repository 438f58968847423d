"""Models that can give no canary where `verify="outputs"` asks for one: what the remedy says verifies the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import BridgeError, ConfigError, IntegrityError
from tests.cases.raised import provoked
from tests.conftest import tiny_qwen2
from tests.push.rig import Rig, same_bits

REFERENCE, GUARDS = "trainer_side/reference.py", "trainer_side/shielded/guards.py"


class WritingHead(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.data.mul_(1.5)
        return super().forward(x)


def writes(model: Any) -> None:
    model.lm_head.__class__ = WritingHead


def fails(model: Any) -> None:
    def forward(self: Any, *given: Any, **named: Any) -> Any:
        raise RuntimeError("not today")

    model.forward = MethodType(forward, model)


def has_no_embedding(model: Any) -> None:
    model.get_input_embeddings = lambda: None


def closes_over(model: Any) -> None:
    original = model.forward

    def louder(self: Any, *given: Any, **named: Any) -> Any:
        out = original(*given, **named)
        out.logits = out.logits * 1.5
        return out

    model.forward = MethodType(louder, model)


def marks(model: Any) -> None:
    live = model.lm_head.weight

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        live.seen = True
        return nn.functional.linear(x, layer.weight, layer.bias)

    model.lm_head.forward = MethodType(forward, model.lm_head)


@pytest.mark.parametrize(
    ("spoil", "kind", "key"),
    [
        (
            writes,
            ConfigError,
            f"{GUARDS}: a forward of this model would write to its weights, so it gives no canary",
        ),
        (fails, ConfigError, f"{REFERENCE}: the bound model gives no canary: it is not a causal language model"),
        (has_no_embedding, ConfigError, f"{REFERENCE}: the model has no input embedding, so the canary has no prompts"),
        (
            marks,
            IntegrityError,
            f"{GUARDS}: the bound model changed while the canary's reference was computed",
        ),
        (
            closes_over,
            ConfigError,
            f"{REFERENCE}: a forward that was put on the model calls the live model, so a copy of it gives no canary",
        ),
    ],
)
def test_models_without_a_canary(
    checkpoint: Callable[..., Path], spoil: Callable[[Any], None], kind: type[BridgeError], key: str
) -> None:
    model = tiny_qwen2()
    rig = Rig(checkpoint(model), model)
    try:
        rig.step()
        spoil(model)
        with provoked(kind, key, "verify='weights'" if kind is IntegrityError else "weights"):
            rig.push(verify="outputs")
        assert rig.push(verify="weights").verified is True
        live = dict(rig.engine.runner.model.named_parameters())
        for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
            sent = model.get_parameter(name).detach()
            assert same_bits(live[name].detach()[: len(sent)], sent)
    finally:
        rig.close()


def test_prompts_of_another_vocabulary() -> None:
    from bridge.model import canary
    from trainer_side.reference import reference_logprobs, vocabulary_size

    model = tiny_qwen2()
    key = f"{REFERENCE}: a canary prompt has a token that the model does not know"
    with provoked(ConfigError, key, "canary.prompts"):
        reference_logprobs(model, [[1, 131]])
    assert reference_logprobs(model, canary.prompts(vocabulary_size(model)))
