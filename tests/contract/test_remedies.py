"""Messages about what only an engine's own loader knows: each remedy is followed, and ends in the trainer's weights or
in another error."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import BridgeError, MissingTensor, ShapeMismatch, UnexpectedTensor
from tests.contract.scenarios import attempt, closed
from tests.rigs import EngineRig, Rigs

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("rows", [400, 415, 448])
def test_a_resized_vocabulary(rig: EngineRig, rows: int) -> None:
    """The engine pads its rows to 448; what its checkpoint has is quoted."""
    before, right = rig.bits(), copy.deepcopy(rig.model)
    resized = copy.deepcopy(rig.model)
    resized.resize_token_embeddings(rows)
    try:
        with pytest.raises(ShapeMismatch, match="bind") as caught:
            rig.b.push(resized.named_parameters())
        assert (caught.value.expected, caught.value.got) == ("[411, 128]", f"[{rows}, 128]")
        rig.b.bind(resized)
        with pytest.raises(ShapeMismatch) as caught:
            rig.b.push(resized.named_parameters())
        assert "[411, 128]" in str(caught.value.expected)
        assert "448" not in str(caught.value).replace(f"[{rows}, 128]", "")
        assert f"[{rows}, 128]" in str(caught.value.got)
        assert rig.bits() == before
        resized.resize_token_embeddings(411)  # "push a model of the engine's configuration"
        rig.b.bind(resized)
        rig.model = resized
        assert rig.push().verified is True
        rig.right()
    finally:
        rig.model = right
        rig.b.bind(right)


def test_a_head_that_only_the_trainer_unties(rig: EngineRig) -> None:
    """Without its head the push would look complete, and serve another one."""
    before, right = rig.bits(), rig.model
    untied = copy.deepcopy(rig.model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 1.5)
    rig.b.bind(untied)
    rig.model = untied
    try:
        done = attempt(rig.push)
        if isinstance(done, BridgeError):
            assert isinstance(done, UnexpectedTensor)
            assert done.names == ("lm_head.weight",)
            assert rig.bits() == before
            untied.config.tie_word_embeddings = True
            untied.tie_weights()
            rig.b.bind(untied)
            done = rig.push()
        assert done.verified is True
        rig.right()
    finally:
        rig.model = right
        rig.b.bind(right)


def test_an_engine_that_knows_no_checkpoint_is_asked(rig: EngineRig) -> None:
    """Its loader tells which rows it takes when the folder that it was started from is gone."""
    kept = rig.folder.with_name(rig.folder.name + "-away")
    resized, right = copy.deepcopy(rig.model), rig.model
    resized.resize_token_embeddings(448)
    rig.b.bind(resized)
    shutil.move(rig.folder, kept)
    try:
        Path(rig.folder).mkdir()
        with pytest.raises(ShapeMismatch) as caught:
            rig.b.push(resized.named_parameters())
        assert "[411, 128]" in str(caught.value.expected)
    finally:
        shutil.rmtree(rig.folder)
        shutil.move(kept, rig.folder)
        rig.b.bind(right)


def test_halves_that_the_engine_keeps_together(rigs: Rigs) -> None:
    """Alone they are taken, or their partner is named: with what the error names, the push goes through."""
    rig: Any = rigs.get("deepseek")
    attention = [n for n, _ in rig.model.named_parameters() if ".layers.0.self_attn." in n and "norm" not in n]
    for name in attention:
        with closed(rig):
            pass  # the plan of a whole push would serve any subset
        follow_partners(rig, name)
    assert rig.push().verified is True
    rig.right()


def follow_partners(rig: EngineRig, name: str) -> None:
    """Push one tensor, and what errors name besides, until it goes through."""
    sent = [name]
    for _ in range(3):
        rig.step()
        live = dict(rig.model.named_parameters())
        pairs = [(n, live[n]) for n in sent]
        done = attempt(lambda pairs=pairs: rig.b.push(pairs, partial=True))
        if not isinstance(done, BridgeError):
            assert done.verified in (True, "partial")
            return
        assert isinstance(done, MissingTensor), done
        partners = [n for n in done.names if n not in sent]
        assert partners, done
        assert set(partners) <= live.keys(), done
        assert all(n in str(done.remedy) for n in partners), done
        sent += partners
    raise AssertionError(f"the errors led nowhere; last {sent}")
