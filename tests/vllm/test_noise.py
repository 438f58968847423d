"""The noise of a real vLLM: a coarse KV cache and int8 weights are served, a fault that was there before is refused.

Engines are started from a checkpoint of the trainer's weights, and then the trainer pushes those very weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.model.declared_losses import DeclaredLosses
from tests.families import make_model, perturb
from tests.vllm.test_others import INT8, int8, quantised, save

pytestmark = pytest.mark.timeout(300)


class Int8Linear(nn.Module):
    """A trainer's linear layer over 8-bit codes with a scale per row, under the names of checkpoints."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        codes, scale = int8("", layer.weight.detach()).values()
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight.float() * self.weight_scale).to(x.dtype))


def in_int8(model: Any) -> Any:
    """Replace the projections of a copy of the model."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if path.endswith("_proj"):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(layer))
    return model


@pytest.fixture
def attached(rigs: Any) -> Iterator[Callable[..., Any]]:
    """`attached(folder, model, **arguments)` starts an engine and binds the model: (llm, bridge)."""
    from tests.vllm.rig import start

    rigs.close()
    made: list[tuple[Any, bridge.Bridge]] = []

    def attach(folder: Path, model: Any, **arguments: Any) -> tuple[Any, bridge.Bridge]:
        llm = start(folder, "inproc", **arguments)
        made.append((llm, bridge.attach(llm, model=model)))
        return made[-1]

    yield attach
    for llm, b in made:
        b.close()
        llm.llm_engine.engine_core.shutdown()


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_coarse_kv_cache_is_served(attached: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    _, b = attached(tmp_path, model, kv_cache_dtype="fp8_e5m2")
    drift = b.push(model.named_parameters()).engines[0].canary
    assert drift.mean_abs > 0.05, "more than the floor"
    assert b.status().engines[0].losses == DeclaredLosses("fp8_e5m2", "fp8_e5m2")
    for times in (1, 10):
        perturb(model, times)
        with torch.no_grad():
            model.lm_head.weight.mul_(times)
        assert b.push(model.named_parameters()).verified is True
    assert b.health().healthy


def test_int8_weights_and_activations_are_served(attached: Callable[..., Any], tmp_path: Path) -> None:
    """Also with ten times the logits: by a head that was pushed later."""
    model = make_model("llama")
    save(tmp_path, model, INT8, quantised(model, int8))
    trainer = in_int8(model)
    _, b = attached(tmp_path, trainer)
    drift = b.push(trainer.named_parameters()).engines[0].canary
    assert drift.noise == pytest.approx(drift.mean_abs / drift.spread)
    assert b.status().engines[0].losses == DeclaredLosses(weights="compressed-tensors")
    with torch.no_grad():
        trainer.lm_head.weight.mul_(10)
    receipt = b.push(trainer.named_parameters())
    drift = receipt.engines[0].canary
    assert receipt.verified is True
    assert 0.05 < drift.mean_abs < drift.limit, "more than the floor was before the head grew"


def test_a_fault_beside_int8_weights_is_no_noise(attached: Callable[..., Any], tmp_path: Path) -> None:
    """The trainer knows what 8-bit codes change in it, and that this is more."""
    model = make_model("llama")
    save(tmp_path, model, INT8, quantised(model, int8))
    change_config(tmp_path, {"rms_norm_eps": 1e-2})
    trainer = in_int8(model)
    _, b = attached(tmp_path, trainer)
    with pytest.raises(bridge.CanaryMismatch, match="by more than weights quantised as compressed-tensors can explain"):
        b.push(trainer.named_parameters())
    assert b.status().engines[0].noise is None


@contextmanager
def scaled_attention(llm: Any, by: float) -> Iterator[None]:
    """Leave a stale scale in every attention: it is no tensor of any checkpoint."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    layers = [module.impl for module in model.modules() if hasattr(getattr(module, "impl", None), "scale")]
    assert layers
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale *= by
    yield
    for layer, scale in zip(layers, before, strict=True):
        layer.scale = scale


@pytest.mark.parametrize(
    "changes",
    [{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {"rms_norm_eps": 1e-2}, {}],
    ids=["rotary base", "norm epsilon", "stale scale"],
)
def test_a_fault_from_before_the_first_push_is_refused(
    attached: Callable[..., Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    change_config(tmp_path, changes)
    llm, b = attached(tmp_path, model)
    with scaled_attention(llm, 1.0 if changes else 2.0):
        with pytest.raises(bridge.CanaryMismatch, match="before anything was pushed") as caught:
            b.push(model.named_parameters())
        assert type(caught.value) is bridge.CanaryMismatch
        info = b.status().engines[0]
        assert (info.state, info.serving, info.noise) == ("SERVING", 0, None)
