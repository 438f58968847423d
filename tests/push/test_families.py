"""Every family of the embedded engine, pushed from its transformers model: a covering set of dtypes, ranks, layouts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import perturb
from tests.engine_side.embedded_models import make_model, mean_difference, prompts, reference_greedy, reference_logprobs

LIMIT = {"fp32": 1e-4, "bf16": 0.02}
"""Mean |difference| in nats to transformers in the same dtype."""
CASES = [
    # family, tied, engine dtype, ranks, layout
    ("llama", False, "fp32", 2, "transposed"),
    ("llama", True, "bf16", 2, "canonical"),
    ("llama-biased", False, "fp32", 1, "shuffled"),
    ("qwen2", False, "bf16", 2, "canonical"),
    ("qwen2", True, "fp32", 1, "canonical"),
    ("qwen2", True, "fp32", 2, "packed"),  # one KV head for two ranks
    ("qwen3", False, "bf16", 1, "shuffled"),
    ("qwen3-biased", True, "fp32", 2, "transposed"),  # a row-parallel bias must be added once
    ("moe", False, "fp32", 1, "packed"),
    ("moe", False, "bf16", 2, "canonical"),
    ("moe-mixed", True, "fp32", 2, "shuffled"),
]
"""Vocabulary 173 (padding on the last rank), one or two KV heads: fewer than ranks, or one for each."""


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{'tied' if c[1] else 'untied'}-{c[2]}-tp{c[3]}-{c[4]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Engine, bridge.Bridge, float]]:
    family, tied, dtype, ranks, layout = request.param
    model = make_model(family, tied)
    model.save_pretrained(tmp_path)
    engine = Engine(EngineConfig(str(tmp_path), dtype=dtype, tensor_parallel_size=ranks, layout=layout, threads=1))
    try:
        with bridge.attach(engine, model=model) as b:
            yield model, engine, b, LIMIT[dtype]
    finally:
        engine.close()


def drift(engine: Engine, model: Any, limit: float) -> tuple[float, float]:
    """Mean |difference| of the engine to the model with its weights in the engine's dtype, and what may be: `limit`, or
    what transformers itself loses in that dtype (bf16 tips an expert's choice now and then)."""
    got = engine.prompt_logprobs(prompts())
    if limit == LIMIT["fp32"]:
        return mean_difference(got, reference_logprobs(model, prompts())), limit
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    computed_narrow = reference_logprobs(narrow, prompts())
    exact = reference_logprobs(narrow.float(), prompts())
    return mean_difference(got, exact), max(limit, 1.5 * mean_difference(computed_narrow, exact))


def test_two_pushes_end_in_the_trainers_policy(pair: tuple[Any, Engine, bridge.Bridge, float]) -> None:
    """It agrees with transformers as it starts, and after each push."""
    model, engine, b, limit = pair
    ranks = engine.config.tensor_parallel_size
    started, allowed = drift(engine, model, limit)
    assert started < allowed
    for step in (1, 2):
        perturb(model, seed=step, scale=0.05)
        stale, allowed = drift(engine, model, limit)
        assert stale > 3 * allowed, "the step must be visible, else this test shows nothing"
        receipt = b.push(model.named_parameters())
        assert receipt.verified is True, receipt.engines
        assert [rank.rank for rank in receipt.engines[0].ranks] == list(range(ranks))
        served, allowed = drift(engine, model, limit)
        assert served < allowed
    report = b.health()
    assert report.healthy, [check for check in report.checks if not check.ok]
    if limit == LIMIT["fp32"]:
        prompt = list(prompts()[2])
        (completion,) = b.engines[0].generate([prompt], bridge.Sampling(max_tokens=8, temperature=0.0))
        assert list(completion.token_ids) == reference_greedy(model, prompt, 8)
        assert completion.weight_version == 2
    _explained(model, b, ranks)


def _explained(model: Any, b: bridge.Bridge, ranks: int) -> None:
    """Every rank says into which part of which fused parameter a tensor goes."""
    rows = b.explain("model.layers.0.self_attn.v_proj.weight")
    assert sorted({row["rank"] for row in rows}) == [str(rank) for rank in range(ranks)]
    assert {row["parameter"] for row in rows} == {"model.layers.0.self_attn.qkv_proj.weight"}
    heads = model.config.num_key_value_heads
    if ranks == 2 and heads == 2:
        assert len({row["source"] for row in rows}) == 2, "two KV heads on two ranks: a part of its own for each"
    if ranks == 2 and heads == 1:
        assert len({row["source"] for row in rows}) == 1, "one KV head on two ranks: the same part twice"
    experts = [name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    if experts:
        layer = experts[0].removesuffix("experts.gate_up_proj")
        parts = {part: b.explain(f"{layer}experts.1.{part}_proj.weight") for part in ("gate", "up")}
        assert all({row["rank"] for row in rows} == {str(r) for r in range(ranks)} for rows in parts.values())
        assert {row["parameter"] for row in parts["gate"]} == {row["parameter"] for row in parts["up"]}
        assert {row["dest"] for row in parts["gate"]}.isdisjoint(row["dest"] for row in parts["up"])
    with pytest.raises(bridge.NotFound, match=r"no\.such"):
        b.explain("no.such.tensor")
