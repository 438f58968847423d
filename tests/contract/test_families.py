"""Every required family: pushed, verified without the canary's help, and equal to transformers afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bridge.errors import PushAborted
from tests.families import FAMILIES, RECURRENT, make_model
from tests.rigs import PROMPTS, Case, EngineRig, difference
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("family", [*FAMILIES, *RECURRENT])
def test_the_prompts_show_every_parameter(family: str) -> None:
    """A prompt of one token over and over would see neither queries nor keys nor positions."""
    model = make_model(family).float()
    before = reference_logprobs(model, PROMPTS)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.randn_like(kept) * (kept.std(correction=0) or 1.0))
        assert difference(reference_logprobs(model, PROMPTS), before) > 1e-5, name
        with torch.no_grad():
            parameter.copy_(kept)


def test_wrong_absorbed_projections_are_found_without_the_canary(rigs: Any) -> None:
    """No parameter shows them, and the proof must not be left to the canary."""
    rig: EngineRig = rigs.get("deepseek")
    rig.step()
    assert rig.push().verified is True
    rig.step()
    with rig.wrong_absorption(), pytest.raises(PushAborted, match="attn"):
        rig.push(verify="weights")
    rig.step()
    assert rig.push(verify="weights").verified is True
    rig.right()


def test_a_family(rigs: Any, case: Case) -> None:
    """The engine is as near to transformers as it can be, and equal to one that was started from a checkpoint of the
    weights that were pushed."""
    family, ways = case
    rig: EngineRig = rigs.get(family, **ways)
    serving = rig.b.status().engines[0].serving or 0
    said = [rig.said()]
    for version in (serving + 1, serving + 2):
        rig.step()
        assert rig.off() > 2 * rig.largest_noise, "the step must show"
        receipt = rig.push()
        assert receipt.verified is True
        assert rig.version == str(version)
        for rank in receipt.engines[0].ranks:
            assert not rank.canary_only
            assert "native" not in rank.strategies
        said.append(rig.said())
        assert rig.off() < rig.largest_noise
    rig.b.rollback()
    assert rig.said() == said[1] != said[0]
    assert rig.version == str(serving + 1)
    assert difference(said[2], said[1]) > 3 * difference(said[2], rig.wanted()), "the step must show"
    if not rig.no_fresh or rig.b.status().engines[0].ranks == 1:  # four of SGLang's schedulers are too many here
        assert said[2] == rig.fresh()


FEEDS_DERIVED = ("A_log", "dt_bias", "D", "conv1d.weight", "conv.weight")
"""Ends of checkpoint names whose values reach a recurrent layer computed, packed or as a view of another tensor."""


def move(model: Any, seed: int, *, kinds: int | None = None) -> list[tuple[str, torch.Tensor]]:
    """Move the tensors of a model that feed a derived one, of the first `kinds` that it has; returns them by name."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    found = [[name for name in named if name.endswith(f".{end}")] for end in FEEDS_DERIVED]
    moved = [(name, named[name]) for names in [names for names in found if names][:kinds] for name in names]
    assert moved
    with torch.no_grad():
        for _, parameter in moved:
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.5).to(parameter.dtype))
    return moved


def test_a_recurrent_family(rigs: Any, recurrent_case: Case) -> None:
    """As other families; and when only the tensors moved from which a layer derives something, sent with all others or
    alone."""
    family, ways = recurrent_case
    rig: EngineRig = rigs.get(family, **ways)
    right_by_itself = family not in rig.wrong_by_itself
    options = {} if right_by_itself else {"verify": "weights"}
    said = [rig.said()]
    for moved in ("all", "derived", "alone"):
        if moved == "all":
            rig.step()
            receipt = rig.push(**options)
        elif moved == "derived":
            move(rig.model, 1)
            receipt = rig.push(**options)
        else:
            receipt = rig.b.push(move(rig.model, 2, kinds=1), partial=True)
        assert receipt.verified is True, moved
        for rank in receipt.engines[0].ranks:
            assert not rank.canary_only
        said.append(rig.said())
        assert not right_by_itself or rig.off() < rig.largest_noise, moved
        assert difference(said[-1], said[-2]) > 1e-3, f"{moved}: the step must show"
    rig.b.rollback()
    assert rig.said() == said[-2]
    rig.push(**options)
    assert rig.said() == said[-1]
    assert said[-1] == rig.fresh()
