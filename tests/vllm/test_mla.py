"""Absorbed projections: no parameter shows them, and the proof must not be left to the canary."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.errors import PushAborted
from engine_side.engines.vllm.host import VllmRankHost

pytestmark = pytest.mark.timeout(300)


def test_wrong_absorbed_projections_are_found_without_the_canary(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    rig = rigs.get("deepseek", how="inproc", lora=False)
    rig.step()
    assert rig.push().verified is True
    live = {id(module) for module in rig.rank().host.model.modules()}
    post_load, left = VllmRankHost.post_load, [4]  # two layers, and a second try

    def faulty(self: Any, module: Any) -> bool:
        done = post_load(self, module)
        if id(module) in live and is_deferred_attention_layer(module) and left[0]:
            left[0] -= 1
            module.W_UV.data = module.W_UV.data * 2
        return done

    rig.step()
    with monkeypatch.context() as patch:
        patch.setattr(VllmRankHost, "post_load", faulty)
        with pytest.raises(PushAborted, match="attn"):
            rig.push(verify="weights")
    rig.step()
    receipt = rig.push(verify="weights")
    assert receipt.verified is True
    assert rig.said() == rig.fresh()
