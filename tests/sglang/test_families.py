"""Every required family: pushed, verified without the canary's help, and equal to transformers afterwards.

Those of the others are beside the tests that share their engine: qwen2 (`test_defects`), qwen2-tied (`test_pushes`),
deepseek (`test_mla`).
"""

from __future__ import annotations

from typing import Any

import pytest

from bridge.errors import PushAborted
from tests.sglang.rig import check_family

pytestmark = pytest.mark.timeout(300)
CASES = [*[(family, 1) for family in ("llama", "qwen3", "phi3", "gemma2", "qwen3-moe")]]
CASES += [("qwen3-moe", 2), ("qwen2-tied", 2)]
WAYS = {"llama": {"disable_overlap_schedule": False}}
"""SGLang's default, which the other engines go without as its facts about CPU recommend."""


@pytest.mark.parametrize(("family", "tp"), CASES, ids=str)
def test_a_family(rigs: Any, family: str, tp: int) -> None:
    check_family(rigs.get(family, tp=tp, **WAYS.get(family, {})))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_midway_leads_all_back(rigs: Any, rank: int) -> None:
    rig = rigs.get("qwen2-tied", tp=2)
    rig.step()
    assert rig.push().verified is True
    before, said, version = rig.inside("bits"), rig.said(), rig.version
    rig.step()
    rig.inside("break_write", k=5, rank=rank)
    with pytest.raises(PushAborted):
        rig.push()
    rig.inside("mend")
    assert rig.inside("bits") == before
    assert (rig.said(), rig.version) == (said, version)
    assert rig.push().verified is True
    assert rig.off() < 0.025
