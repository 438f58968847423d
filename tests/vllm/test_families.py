"""Every required family: pushed, verified without the canary's help, and equal to transformers afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.families import FAMILIES

pytestmark = pytest.mark.timeout(300)
CASES = [
    *[(family, "inproc", False) for family in FAMILIES],
    ("qwen2-tied", "mp", False),
    ("qwen2-tied", "tp2", False),
    ("qwen3-moe", "tp2", False),
]
NOISE = {"deepseek": 0.09, "qwen3-moe": 0.03, "gemma2": 0.02}
"""Mean nats between vLLM and transformers on the same weights; dense families stay below 0.01."""


@pytest.mark.parametrize(("family", "how", "lora"), CASES, ids=lambda value: str(value))
def test_a_family(rigs: Any, family: str, how: str, lora: bool) -> None:
    rig = rigs.get(family, how=how, lora=lora)
    limit = NOISE.get(family, 0.012)
    for version in (1, 2):
        rig.step()
        assert rig.off() > 3 * limit, "the step must show"
        receipt = rig.push()
        assert receipt.verified is True
        assert rig.off() < limit
        assert rig.llm.llm_engine.get_weight_version() == str(version)
        for rank in receipt.engines[0].ranks:
            assert not rank.canary_only
            assert "native" not in rank.strategies
    rig.b.rollback()
    assert rig.off() > 3 * limit
    assert rig.llm.llm_engine.get_weight_version() == "1"
