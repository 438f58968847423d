"""Names by structure alone, and what is noticed when a model changes between two pushes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import tiny_qwen2
from trainer_side.lora import LoraModel, adapter_tensors, merged_tensors
from trainer_side.lora.layers.module_tree import BaseTensor, LoraTree, WrapperTensor


class Odd(nn.Module):
    """Modules named like the segments that PEFT uses."""

    def __init__(self) -> None:
        super().__init__()
        self.default = nn.Linear(4, 4)
        self.lora_gate = nn.Linear(4, 4)
        self.lora_A = nn.Linear(4, 4, bias=False)
        self.base_model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.modules_to_save = nn.Linear(4, 4)
        self.holder = nn.ModuleDict({"base_layer": nn.Linear(4, 4), "weight": nn.LayerNorm(4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.lora_gate(self.default(x))
        return result


def wrapped(model: nn.Module, adapter: str = "default", **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    peft_model: Any = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 32, **config}), adapter_name=adapter)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return peft_model


@pytest.mark.parametrize("adapter", ["default", "lora_x", "base_layer", "weight"])
def test_modules_and_adapters_named_like_peft_segments(adapter: str) -> None:
    plain = Odd()
    wanted = {name for name, _ in plain.named_parameters()} | {name for name, _ in plain.named_buffers()}
    model = wrapped(plain, adapter, target_modules=["default", "lora_gate", "0"])
    tree = LoraTree(model)
    assert {place.clean for place in tree.places} == wanted
    assert {extra.lora for extra in tree.extras} == {adapter}
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert all(tree.find(name) is not None for name in names)
    assert len({tree.find(name) for name in names}) == len(names) == len(tree.places) + len(tree.extras)
    assert {name for name, _ in adapter_tensors(model)} == {
        f"{path}.{half}.weight" for path in ("default", "lora_gate", "base_model.0") for half in ("lora_A", "lora_B")
    }
    assert dict(merged_tensors(model)).keys() == wanted


def test_present() -> None:
    assert not LoraModel.present(Odd())
    assert not LoraModel.present(tiny_qwen2())
    model = wrapped(tiny_qwen2(), target_modules=["q_proj"])
    assert LoraModel.present(model)
    assert LoraModel.present(model.base_model.model)
    assert LoraModel.present(nn.DataParallel(model))
    assert not LoraModel.present(model.merge_and_unload())


def test_raw_live_and_clean_names_of_a_wrapped_model() -> None:
    model = nn.DataParallel(wrapped(tiny_qwen2(), "policy", target_modules=["q_proj"], modules_to_save=["lm_head"]))
    tree = LoraTree(model)
    raw = "module.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    place = tree.find(raw)
    assert isinstance(place, BaseTensor)
    assert place.live == "model.layers.0.self_attn.q_proj.base_layer.weight"
    assert place.clean == "model.layers.0.self_attn.q_proj.weight"
    extra = tree.find("model.layers.0.self_attn.q_proj.lora_B.policy.weight")
    assert isinstance(extra, WrapperTensor)
    assert (extra.container, extra.lora) == ("lora_B", "policy")
    copy = tree.find("base_model.model.lm_head.modules_to_save.policy.weight")
    assert isinstance(copy, BaseTensor)
    assert copy.clean == "lm_head.weight"
    assert not copy.original
    assert [name for name, p in model.named_parameters() if tree.find(name) is None] == []
    assert tree.find("model.layers.0.self_attn.q_proj.lora_B.default.weight") is None
    assert tree.find("q_proj.base_layer.weight") is None


def test_wrappers_on_every_level() -> None:
    wanted = set(dict(tiny_qwen2().named_parameters()))
    model = wrapped(tiny_qwen2(), target_modules=["q_proj"])
    inner = model.base_model.model
    first, second = (layer.self_attn for layer in inner.model.layers)
    first.q_proj.base_layer = torch.compile(first.q_proj.base_layer)
    second.q_proj = torch.compile(second.q_proj)
    inner.model.layers[1] = torch.compile(inner.model.layers[1])
    model.base_model.model = torch.compile(inner)
    tree = LoraTree(model)
    assert all(tree.find(name) is not None for name, _ in model.named_parameters())
    assert dict(merged_tensors(model)).keys() == wanted
    assert len(dict(adapter_tensors(model))) == 4
    lora = LoraModel(model)
    plain = [(name.replace("_orig_mod.", ""), p) for name, p in model.named_parameters()]
    assert len(lora.view("merged", plain).computed) == 2


def test_state_is_equal_until_something_is_set() -> None:
    model = wrapped(tiny_qwen2(), target_modules=["q_proj", "v_proj"])
    lora = LoraModel(model)
    before = lora.state()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert lora.state() == before
    assert hash(lora.state()) == hash(before)
    with model.disable_adapter():
        assert lora.state() != before
        assert lora.state().structure == before.structure
    assert lora.state() == before
    model.base_model.model.model.layers[1].self_attn.v_proj.set_scale("default", 3)
    scaled = lora.state()
    assert scaled != before
    assert scaled.unscaled == before.unscaled
    model.merge_adapter()
    assert lora.state() != scaled
    assert all(w.setting.merged == ("default",) for w in lora.state().wrappers)


def test_a_changed_structure_is_noticed_and_baked_again() -> None:
    from peft import LoraConfig

    model = wrapped(tiny_qwen2(), target_modules=["q_proj"])
    lora = LoraModel(model)
    states = [lora.state()]
    first = lora.view("merged", list(model.named_parameters()))
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["k_proj"]))
    states.append(lora.state())
    model.base_model.set_adapter(["default", "second"])
    second = lora.view("merged", list(model.named_parameters()))
    assert len(second.computed) == 2 * len(first.computed)
    model.delete_adapter("second")
    states.append(lora.state())
    third = lora.view("merged", list(model.named_parameters()))
    assert [c.name for c in third.computed] == [c.name for c in first.computed]
    model.base_model.model.resize_token_embeddings(140)
    states.append(lora.state())
    resized = lora.view("merged", list(model.named_parameters()))
    assert resized.known is not None
    assert resized.known.live["model.embed_tokens.weight"].shape == (140, 48)
    model.merge_and_unload()
    states.append(lora.state())
    assert [s.structure for s in states] == [0, 1, 2, 3, 4]
    owned = [{name for wrapper in state.wrappers for name in wrapper.owned} for state in states]
    assert owned[1] == {"default", "second"}
    assert owned[2] == {"default"}


def test_state_of_saved_modules_and_tokens() -> None:
    model = wrapped(tiny_qwen2(), target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[3, 4])
    lora = LoraModel(model)
    paths = {w.path: w for w in lora.state().wrappers}
    assert {"model.norm", "model.embed_tokens"} <= paths.keys()
    assert paths["model.norm"].owned == paths["model.embed_tokens"].owned == ("default",)
    before = lora.state()
    with model.disable_adapter():
        off = {w.path: w for w in lora.state().wrappers}
        assert off["model.norm"].setting.disabled
        assert off["model.embed_tokens"].setting.disabled
        assert not lora.view("merged", list(model.named_parameters())).computed
    assert lora.state() == before
