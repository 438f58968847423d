"""Latent attention: two projections that come to one layer together."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)


def test_halves_of_a_fused_projection_in_two_calls(rigs: Any) -> None:
    """SGLang keeps the first half for a second that comes in the same call, and drops both when it does not."""
    rig = rigs.get("deepseek")
    rig.step()
    assert rig.push().verified is True
    rig.step()
    sent = {name: tensor.detach().clone() for name, tensor in rig.model.state_dict().items()}
    receipt = rig.push()
    assert receipt.verified is True
    truth, fused = rig.inside("bits"), "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight"
    rig.step()
    assert rig.push().verified is True
    stale = rig.inside("bits")
    assert stale[fused] != truth[fused]
    plain = {name: value for name, value in sent.items() if ".experts." not in name}
    first = [(name, value) for name, value in plain.items() if "kv_a_proj_with_mqa" not in name]
    second = [(name, value) for name, value in plain.items() if "kv_a_proj_with_mqa" in name]
    assert rig.own_update(first)[0] is True
    assert rig.own_update(second)[0] is True
    assert rig.inside("bits")[fused] == stale[fused], "SGLang reports success twice and has written neither half"

    rig.model.load_state_dict(sent)
    assert rig.push().verified is True
    assert rig.inside("bits") == truth
