"""Families that nothing was written for, and engines of other makings than a plain bf16 checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import ConfigError
from tests.families import OTHERS, make_model, perturb
from tests.rigs import PROMPTS, difference
from tests.vllm.quantised import INT8, int8, quantised, save
from tests.vllm.rig import said_by
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_that_nothing_was_written_for(rigs: Any, family: str) -> None:
    """Bloom's constructor looks at values that it has computed; OLMo 2 runs in vLLM with transformers' classes, whose
    `__call__` vLLM exchanges; gpt-oss has experts with biases and sinks in its attention."""
    rig = rigs.get(family)
    rig.step()
    receipt = rig.push()
    assert receipt.verified is True
    assert not receipt.engines[0].ranks[0].canary_only
    assert rig.said() == rig.fresh()


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Engines in this process; the last one ends with the test."""
    started: list[Any] = []

    def make(folder: Path, **arguments: Any) -> Any:
        from tests.vllm.rig import start as start_one

        started.append(start_one(folder, "inproc", **arguments))
        return started[-1]

    yield make
    for llm in started:
        llm.llm_engine.engine_core.shutdown()


def test_a_checkpoint_with_a_copy_of_its_tied_head(rigs: Any, start: Callable[..., Any], tmp_path: Path) -> None:
    """vLLM builds two layers for it, and has them share one storage again once it has seen that they are equal."""
    from safetensors.torch import load_file, save_file

    rigs.close()
    model = make_model("qwen2-tied")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    saved["lm_head.weight"] = saved["model.embed_tokens.weight"].clone()
    save_file(saved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    llm = start(tmp_path)
    b = bridge.attach(llm, model=model)
    try:
        for seed in (1, 2):
            perturb(model, seed)
            assert b.push(model.named_parameters()).verified is True
            model.save_pretrained(tmp_path / f"pushed{seed}")
            assert said_by(llm) == said_by(start(tmp_path / f"pushed{seed}"))
    finally:
        b.close()


GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    stem, (rows, columns) = name.removesuffix("weight"), weight.shape
    return {
        f"{stem}qweight": torch.full((columns // 8, rows), 0x12345678, dtype=torch.int32),
        f"{stem}qzeros": torch.full((columns // 32, rows // 8), 0x77777777, dtype=torch.int32),
        f"{stem}scales": torch.full((columns // 32, rows), 0.01, dtype=torch.bfloat16),
        f"{stem}g_idx": torch.arange(columns, dtype=torch.int32) // 32,
    }


def test_a_quantised_engine_that_experiments_say_can_be_updated(
    rigs: Any, start: Callable[..., Any], tmp_path: Path
) -> None:
    rigs.close()
    model = make_model("llama")
    save(tmp_path / "first", model, INT8, quantised(model, int8))
    llm = start(tmp_path / "first")
    b = bridge.attach(llm)
    try:
        perturb(model, 1)
        tensors = quantised(model, int8)
        before = said_by(llm)
        assert b.push(list(tensors.items())).verified is True
        save(tmp_path / "second", model, INT8, tensors)
        assert said_by(llm) == said_by(start(tmp_path / "second")) != before
        assert difference(said_by(llm), reference_logprobs(model, PROMPTS)) < difference(said_by(llm), before)
    finally:
        b.close()


def test_a_quantised_engine_without_a_strategy_is_refused_at_attach(
    rigs: Any, start: Callable[..., Any], tmp_path: Path
) -> None:
    rigs.close()
    model = make_model("llama")
    save(tmp_path, model, GPTQ, quantised(model, gptq))
    llm = start(tmp_path)
    before = said_by(llm)
    with pytest.raises(ConfigError, match=r"gptq.*QKVParallelLinear"):
        bridge.attach(llm)
    assert said_by(llm) == before, "it stays as it was, and its owner's"
    with pytest.raises(ConfigError, match="no strategy"):
        bridge.attach(llm)
