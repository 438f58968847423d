"""Adapters that fill a fused layer in part, and those that SGLang's slots cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest

from bridge.errors import UnexpectedTensor, UnsupportedLora
from tests.contract.scenarios import jiggle
from tests.rigs import PROMPTS, difference
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)
LIMIT = 0.03


@contextmanager
def adapted(rig: Any, *modules: str, rank: int = 4) -> Iterator[Any]:
    model = peft.get_peft_model(rig.model, peft.LoraConfig(r=rank, lora_alpha=8, target_modules=list(modules)))
    jiggle(model, 1)
    rig.b.bind(model)
    try:
        yield model
    finally:
        model.unload()


@pytest.mark.parametrize("modules", [("gate_proj",), ("k_proj", "up_proj"), ("q_proj", "v_proj", "down_proj")], ids=str)
def test_a_part_of_a_fused_layer(rigs: Any, modules: tuple[str, ...]) -> None:
    """SGLang drops or mistakes an adapter for one of several fused projections: ours brings the others as zeros."""
    rig = rigs.get("qwen2", lora=True)
    with adapted(rig, *modules) as model:
        receipt = rig.b.push(model.named_parameters(), mode="adapter")
        assert receipt.verified is True
        said = rig.said(receipt.engines[0].adapter)
        assert difference(said, rig.said()) > 3 * LIMIT
        assert difference(said, reference_logprobs(model, PROMPTS)) < LIMIT


def test_own_update_with_the_names_that_a_trainer_has_changes_no_wrapped_layer(rigs: Any) -> None:
    """SGLang reports success and loads none of them."""
    rig = rigs.get("qwen2", lora=True)
    with adapted(rig, "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj") as model:
        before = rig.bits()
        named = [(n.removeprefix("base_model.model."), p.detach() * 1.06) for n, p in model.named_parameters()]
        sent = [(n, p) for n, p in named if n.endswith(".base_layer.weight")]
        assert sent
        assert rig.own_update(sent)[0] is True
        assert rig.bits() == before


def test_a_module_that_was_not_wrapped(rigs: Any) -> None:
    rig = rigs.get("qwen2", lora=True)
    held = rig.inside("adapters")
    with adapted(rig, "q_proj", "lm_head") as model, pytest.raises(UnexpectedTensor, match="lm_head"):
        rig.b.push(model.named_parameters(), mode="adapter")
    assert rig.inside("adapters") == held


def test_a_rank_above_the_slots(rigs: Any) -> None:
    rig = rigs.get("qwen2", lora=True)
    with adapted(rig, "q_proj", rank=16) as model, pytest.raises(UnsupportedLora, match="16"):
        rig.b.push(model.named_parameters(), mode="adapter")


def test_an_adapter_that_its_user_has_unloaded(rigs: Any) -> None:
    """SGLang's registry has lost it: the next push loads anew and forgets the name."""
    rig = rigs.get("qwen2", lora=True)
    with adapted(rig, "q_proj") as model:
        first = rig.b.push(model.named_parameters(), mode="adapter").engines[0].adapter
        assert rig.engine.unload_lora_adapter(first).success
        jiggle(model, 4)
        receipt = rig.b.push(model.named_parameters(), mode="adapter")
        assert receipt.verified is True
        assert not [note for note in receipt.notes if "did not resume" in note]
        assert difference(rig.said(receipt.engines[0].adapter), reference_logprobs(model, PROMPTS)) < LIMIT
    assert first not in rig.inside("adapters")


def test_a_slot_that_a_larger_adapter_had(rigs: Any, tmp_path: Path) -> None:
    rig = rigs.get("qwen2", lora=True)
    names = ["big0", "big1", "big2", "big3"]
    with adapted(rig, "q_proj", "v_proj", "down_proj", rank=8) as model:
        model.save_pretrained(tmp_path)
    for name in names:
        assert rig.engine.load_lora_adapter(name, str(tmp_path)).success
        rig.said(name)
    try:
        with adapted(rig, "q_proj", rank=4) as model:
            receipt = rig.b.push(model.named_parameters(), mode="adapter")
            assert receipt.verified is True
            assert difference(rig.said(receipt.engines[0].adapter), reference_logprobs(model, PROMPTS)) < LIMIT
    finally:
        for name in names:
            assert rig.engine.unload_lora_adapter(name).success
