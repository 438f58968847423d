"""Two ranks: what fails in one of them is put back in both."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.errors import PushAborted

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_midway_leads_all_back(rigs: Any, rank: int) -> None:
    rig = rigs.get("qwen2-tied", tp=2)
    rig.step()
    assert rig.push().verified is True
    before, said, version = rig.bits(), rig.said(), rig.version
    rig.step()
    with rig.broken_writes(5, rank=rank), pytest.raises(PushAborted):
        rig.push()
    assert rig.bits() == before
    assert (rig.said(), rig.version) == (said, version)
    assert rig.push().verified is True
    assert rig.off() < rig.largest_noise
