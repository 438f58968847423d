"""A rig around a PEFT model: engine with adapter slots, bridge, and the question whom the engine answers like."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.push.rig import PROMPTS
from trainer_side.reference import reference_logprobs

LORA = {"r": 3, "lora_alpha": 32, "target_modules": "all-linear"}
"""alpha != r: a scaling that is lost or applied twice shows."""


def wrap(base: Any, *, seed: int = 0, adapter: str = "default", scale: float = 0.05, **config: Any) -> Any:
    """`base` under PEFT, every adapter tensor random: a fresh B is zero and would hide everything."""
    model = get_peft_model(base, LoraConfig(**{**LORA, **config}), adapter_name=adapter).eval()
    stir(model, seed=seed, scale=scale)
    return model


def stir(model: Any, *, seed: int, scale: float = 0.05) -> None:
    """An optimiser's step: everything trainable moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_((parameter.float() * 0.5 + noise * scale).to(parameter.dtype))


def everything(model: Any) -> dict[str, Any]:
    """Bytes, flags and LoRA state of a model, for a comparison before and after."""
    found: dict[str, Any] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.item()
        found[name] = (data, tensor.requires_grad, tensor.data_ptr(), tensor.dtype)
    for name, module in model.named_modules():
        state = [module.training]
        for attribute in ("merged_adapters", "_active_adapter", "_disable_adapters", "scaling", "lora_alpha", "r"):
            if attribute in module.__dict__:
                state.append(copy.deepcopy(module.__dict__[attribute]))
        found[f"{name}()"] = state
    return found


def forward_logprobs(twin: Any, prompts: list[list[int]]) -> list[list[float]]:
    """What a model's own forward gives, which may write to its weights: of a twin that nobody needs any more."""
    twin.eval()
    rows = []
    for prompt in prompts:
        with torch.no_grad():
            values = torch.log_softmax(twin(input_ids=torch.tensor([prompt])).logits[0, :-1].float(), -1)
        rows.append(values.gather(-1, torch.tensor(prompt[1:]).unsqueeze(-1)).squeeze(-1).tolist())
    return rows


def apart(a: list[list[float]], b: list[list[float]]) -> float:
    return max(abs(x - y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


class LoraRig:
    """`model` is the PEFT model; the engine starts from `folder`, which holds its base."""

    def __init__(self, folder: Path, model: Any, *, bound: bool = True, **config: Any) -> None:
        self.model = model
        self.engine = Engine(EngineConfig(str(folder), **{"max_loras": 4, "max_lora_rank": 8, **config}))
        self.b = bridge.attach(self.engine, model=model if bound else None)
        self._seed = 100

    def close(self) -> None:
        self.b.close()
        self.engine.close()

    def step(self) -> None:
        self._seed += 1
        stir(self.model, seed=self._seed)

    def push(self, **options: Any) -> bridge.Receipt:
        """Push the model; nothing of it may have moved."""
        before = everything(self.model)
        try:
            receipt: bridge.Receipt = self.b.push(self.model.named_parameters(), **options)
        finally:
            assert everything(self.model) == before, "the trainer's model was written to"
        return receipt

    def truth(self, model: Any = None) -> list[list[float]]:
        return reference_logprobs(self.model, PROMPTS) if model is None else forward_logprobs(model, PROMPTS)

    def base_truth(self) -> list[list[float]]:
        """The model without its adapters, on a copy."""
        twin = copy.deepcopy(self.model)
        with twin.disable_adapter():
            return reference_logprobs(twin, PROMPTS)

    def answers(self, adapter: str = "current") -> list[list[float]]:
        return self.engine.prompt_logprobs(PROMPTS, adapter)

    def serves(self, truth: list[list[float]], adapter: str = "current", limit: float = 1e-4) -> bool:
        return apart(self.answers(adapter), truth) < limit


def model_of(rig: Any) -> Any:
    """The engine's model, LoRA wrappers included, of a rig."""
    return rig.engine.runner.model


def at(rig: Any, path: str) -> Any:
    """The module at this path of the engine's model."""
    return model_of(rig).get_submodule(path)


def new_base(rig: LoraRig, seed: int = 5) -> dict[str, torch.Tensor]:
    """Every base tensor of the trainer becomes another, biases included; by checkpoint name."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in rig.model.get_base_model().named_parameters():
        if "lora_A" not in name and "lora_B" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_((noise * 0.05).to(parameter.dtype))
            found[name.replace(".base_layer", "")] = parameter.detach().clone()
    return found
