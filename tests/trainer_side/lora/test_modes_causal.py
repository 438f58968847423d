"""What each mode sends of whole language models, against what transformers and PEFT themselves say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import DuplicateTensor, MissingTensor, ShapeMismatch, UnexpectedTensor, UnsupportedLora
from bridge.model.lora_format import LoraLimits
from tests.trainer_side.lora.peft_rows import CAUSAL, ROWS, Row, build
from trainer_side.lora import LoraModel, ModeView, adapter_tensors, base_tensors, merged_tensors
from trainer_side.names.naming import bake_names
from trainer_side.names.tensor_layout import WeightSource

ROOM = [LoraLimits(64, 4)]
TOKENS = torch.arange(24).reshape(2, 12) * 5


def row(name: str) -> Row:
    return next(r for r in CAUSAL if r.name == name)


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return build(row(name), dtype)


def logits(model: Any) -> torch.Tensor:
    # The fused kernels know no float64.
    (model.get_base_model() if hasattr(model, "get_base_model") else model).config._experts_implementation = "eager"
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def loaded(tensors: dict[str, torch.Tensor], model: Any, folder: Path) -> Any:
    """A fresh transformers model from a checkpoint of these tensors."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).from_pretrained(folder, dtype=next(inner.parameters()).dtype).eval()


def fingerprint(model: Any) -> list[Any]:
    """Bytes, identities and flags of everything in a live model."""
    found: list[Any] = []
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                held = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
                found.append((path, name, id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad, held))
        flags = [getattr(module, n, None) for n in ("training", "merged_adapters", "_active_adapter", "scaling")]
        found.append((path, id(module), repr(flags), repr(getattr(module, "_disable_adapters", None))))
    return found


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


MERGEABLE = [r for r in CAUSAL if r.name != "tied, embedding only" and r.name != "tied, head only"]


@pytest.mark.parametrize("case", MERGEABLE, ids=str)
def test_merged_tensors_in_a_fresh_model_give_the_live_logits(case: Row, tmp_path: Path) -> None:
    model = build(case, torch.float64)
    with untouched(model):
        tensors = dict(merged_tensors(model))
    assert torch.allclose(logits(loaded(tensors, model, tmp_path)), logits(model), atol=1e-9, rtol=0)


@pytest.mark.parametrize("end", ["tied, embedding only", "tied, head only"])
def test_one_tied_end_with_lora_gives_two_tensors(end: str, tmp_path: Path) -> None:
    model = model_of(end)
    tensors = dict(merged_tensors(model))
    base = dict(base_tensors(model))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= tensors.keys()
    assert not torch.equal(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert "lm_head.weight" not in base
    model.get_base_model().config.tie_word_embeddings = False
    assert torch.allclose(logits(loaded(tensors, model, tmp_path)), logits(model), atol=1e-9, rtol=0)


def test_both_tied_ends_with_the_same_lora_are_one_tensor() -> None:
    lora = LoraModel(model_of("tied, both ends alike"))
    view = lora.view("merged", list(lora.model.named_parameters()))
    assert view.known is not None
    (tied,) = [t for t in view.known.tensors if "lm_head.weight" in (t.name, *t.aliases)]
    assert {tied.name, *tied.aliases} == {"model.embed_tokens.weight", "lm_head.weight"}
    for module in lora.model.modules():  # different scalings make two of them again
        if hasattr(module, "lora_embedding_A") and len(module.lora_embedding_A):
            module.set_scale("default", 0.5)
    apart = lora.view("merged", list(lora.model.named_parameters()))
    assert apart.known is not None
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {t.name for t in apart.known.tensors}


@pytest.mark.parametrize("case", ["all linear", "renamed", "experts", "embedding and head", "bias all"])
def test_base_names_and_values_are_those_of_the_base_model_state_dict(case: str) -> None:
    from peft import get_base_model_state_dict

    model = model_of(case, torch.float32)
    oracle = get_base_model_state_dict(model)
    known = bake_names(row(case).base())
    wanted = {t.name for t in known.tensors}
    with untouched(model):
        lora = LoraModel(model)
        view = lora.view("base", list(model.named_parameters()))
        tensors = dict(base_tensors(model))
    assert {name for name, _ in view.named} == set(oracle)
    assert all(torch.equal(tensor, oracle[name]) for name, tensor in view.named)
    assert tensors.keys() == wanted
    assert view.known is not None
    assert view.known.infos == known.infos
    assert not view.computed
    assert view.adapter is None


def test_a_base_checkpoint_gives_the_logits_with_the_adapters_disabled(tmp_path: Path) -> None:
    model = model_of("experts")
    with model.disable_adapter():
        wanted = logits(model)
    assert torch.allclose(logits(loaded(dict(base_tensors(model)), model, tmp_path)), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("state", ["disabled", "merged", "merged and disabled", "other active", "none active"])
@pytest.mark.parametrize("case", ["two adapters", "experts"])
def test_merged_tensors_follow_the_state(case: str, state: str, tmp_path: Path) -> None:
    model = model_of(case)
    names = list(model.peft_config)
    if state == "other active":
        model.base_model.set_adapter(names[-1])
    elif state == "none active":
        model.base_model.set_adapter([])
    elif state.startswith("merged"):
        model.merge_adapter()
    lora = LoraModel(model)
    with model.disable_adapter() if state.endswith("disabled") else warnings.catch_warnings():
        choice = lora.choose("auto", ROOM)
        tensors = dict(merged_tensors(model))
        wanted = logits(model)  # last: it may unmerge
    assert torch.allclose(logits(loaded(tensors, model, tmp_path)), wanted, atol=1e-8, rtol=0)
    assert choice.mode == ("adapter" if state == "other active" else "merged")
    assert bool(choice.notes) == (choice.mode == "merged")


def test_names_without_a_peft_model_around(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model: Any = row("all linear").base().double()
    model = inject_adapter_in_model(LoraConfig(r=3, lora_alpha=32, target_modules=["q_proj"]), model, "lora_x")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_x" in name.split("."):
                parameter.normal_()
    assert LoraModel.present(model)
    tensors = dict(merged_tensors(model))
    assert tensors.keys() == dict(row("all linear").base().named_parameters()).keys()
    assert torch.allclose(logits(loaded(tensors, model, tmp_path)), logits(model), atol=1e-9, rtol=0)


@pytest.mark.parametrize("sender", ["parameters", "state_dict", "tuner", "inner", "compiled", "data parallel"])
def test_any_iterable_over_the_model_means_the_same(sender: str) -> None:
    model = model_of("embedding and head", torch.float32)
    lora = LoraModel(model)
    wanted = lora.view("merged", list(model.named_parameters()))
    pairs = {
        "parameters": lambda: model.named_parameters(remove_duplicate=False),
        "state_dict": lambda: model.state_dict().items(),
        "tuner": lambda: model.base_model.named_parameters(),
        "inner": lambda: model.base_model.model.named_parameters(),
        "compiled": lambda: ((f"_orig_mod.{n}", p) for n, p in model.named_parameters()),
        "data parallel": lambda: ((f"module.{n}", p) for n, p in model.named_parameters()),
    }[sender]()
    view = lora.view("merged", list(pairs))
    assert view.known is wanted.known
    assert same_values(view, wanted)


@pytest.mark.parametrize("outside", [torch.nn.DataParallel, torch.compile])
def test_wrappers_around_the_bound_model(outside: Any) -> None:
    model = model_of("all linear", torch.float32)
    wanted = dict(merged_tensors(model))
    around = outside(model)
    found = dict(merged_tensors(around))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    lora = LoraModel(around)
    assert LoraModel.present(around)
    assert lora.view("merged", list(model.named_parameters())).named


def test_an_inner_model_takes_the_names_of_the_peft_model() -> None:
    model = model_of("all linear", torch.float32)
    lora = LoraModel(model.base_model.model)
    assert len(lora.view("merged", list(model.named_parameters())).computed) == 14


def same_values(a: ModeView, b: ModeView) -> bool:
    return same(values(a), values(b))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def values(view: ModeView) -> dict[str, torch.Tensor]:
    found = dict(view.named)
    with torch.no_grad():
        found.update({c.name: c.compute(c.stand_in.dtype) for c in view.computed})
    if view.known is None:
        return found
    return {name: tensor for name, tensor in found.items() if name in view.known.live}


def test_given_values_count_not_the_live_ones() -> None:
    model = model_of("embedding and head", torch.float32)
    lora = LoraModel(model)
    clones = [(name, parameter.detach() * 2) for name, parameter in model.named_parameters()]
    wanted = values(lora.view("merged", list(model.named_parameters())))
    for mode in ("base", "merged", "adapter"):
        before = values(lora.view(mode, list(model.named_parameters())))
        found = values(lora.view(mode, clones))
        assert not any(torch.equal(found[name], before[name]) for name in before), mode
    doubled = values(lora.view("merged", clones))
    assert torch.equal(doubled["model.norm.weight"], 2 * wanted["model.norm.weight"])
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    product = q.scaling["default"] * (q.lora_B["default"].weight @ q.lora_A["default"].weight)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(doubled[name], 2 * q.base_layer.weight + 4 * product, atol=1e-6)


@pytest.mark.parametrize("case", [*ROWS, *CAUSAL], ids=str)
def test_every_tensor_that_is_read_is_read_as_given(case: Row) -> None:
    bound, other = build(case), build(case)
    with torch.no_grad():
        for parameter in {p.data_ptr(): p for p in other.parameters()}.values():
            parameter.mul_(1.25)
    pairs = list(other.named_parameters())
    for mode in ("merged", "adapter"):
        try:
            LoraModel(bound).choose(mode, None)
        except UnsupportedLora:
            continue
        given = {c.name: c.compute(torch.float64) for c in LoraModel(bound).view(mode, pairs).computed}
        live = {c.name: c.compute(torch.float64) for c in LoraModel(other).view(mode, pairs).computed}
        assert given
        assert same(given, live)


def test_a_tied_name_that_the_iterable_leaves_out_is_the_given_tensor() -> None:
    model = model_of("tied, head only", torch.float32)
    lora = LoraModel(model)
    pairs = [(name, parameter.detach() + 1) for name, parameter in model.named_parameters()]
    assert not any(name.endswith("lm_head.base_layer.weight") for name, _ in pairs)
    shifted, live = values(lora.view("merged", pairs)), values(lora.view("merged", list(model.named_parameters())))
    assert torch.equal(shifted["model.embed_tokens.weight"], live["model.embed_tokens.weight"] + 1)
    head = model.base_model.model.lm_head
    a, b = (head.lora_A["default"].weight + 1), (head.lora_B["default"].weight + 1)
    wanted = head.base_layer.weight + 1 + head.scaling["default"] * b @ a
    assert torch.allclose(shifted["lm_head.weight"], wanted, atol=1e-5)


def test_the_next_alike_push_reuses_names_and_stand_ins() -> None:
    model = model_of("all linear", torch.float32)
    lora = LoraModel(model)
    for number, mode in enumerate(("base", "merged", "adapter")):
        first = lora.view(mode, list(model.named_parameters()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        second = lora.view(mode, list(model.named_parameters()))
        before = values(second)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.25 + number)
        third = lora.view(mode, list(model.named_parameters()))
        fourth = lora.view(mode, [(n, p.detach().clone()) for n, p in model.named_parameters()])
        for view in (second, third, fourth):
            assert view.known is first.known
            assert [id(c.stand_in) for c in view.computed] == [id(c.stand_in) for c in first.computed]
        assert same_values(third, fourth)
        assert not first.computed or not same(before, values(third))


def test_another_dtype_bakes_again() -> None:
    model = model_of("all linear", torch.float32)
    lora = LoraModel(model)
    pairs = list(model.named_parameters())
    assert {c.stand_in.dtype for c in lora.view("merged", pairs).computed} == {torch.float32}
    model.to(torch.bfloat16)
    assert {c.stand_in.dtype for c in lora.view("merged", pairs).computed} == {torch.bfloat16}
    assert {c.stand_in.dtype for c in lora.view("adapter", pairs).computed} == {torch.bfloat16}


@pytest.mark.parametrize("mode", ["base", "merged", "adapter"])
def test_bad_iterables(mode: str) -> None:
    model = model_of("all linear", torch.float32)
    lora = LoraModel(model)
    pairs = list(model.named_parameters())
    with pytest.raises(UnexpectedTensor, match=r"model\.layers\.9\.mlp"):
        lora.view(mode, [*pairs, ("model.layers.9.mlp.weight", torch.zeros(2))])
    with pytest.raises(DuplicateTensor):
        lora.view(mode, [*pairs, pairs[3]])
    lost = "base_model.model.model.layers.1.mlp.up_proj."
    of_mode = ".lora_A.default.weight" if mode == "adapter" else ".base_layer.weight"
    lost = lost.removesuffix(".") + of_mode
    with pytest.raises(MissingTensor) as missing:
        lora.view(mode, [pair for pair in pairs if pair[0] != lost])
    assert missing.value.names == (lost,)
    crooked = [(n, p.detach()[:1].clone() if n == lost else p) for n, p in pairs]
    with pytest.raises(ShapeMismatch):
        lora.view(mode, crooked)


def test_partial_sends_what_came_and_what_is_made_of_it() -> None:
    model = model_of("all linear", torch.float32)
    lora = LoraModel(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    view = lora.view("merged", trained, partial=True)
    assert not view.named
    assert len(view.computed) == 14
    one = lora.view("merged", [p for p in trained if "layers.1.mlp.up_proj" in p[0]], partial=True)
    assert [c.name for c in one.computed] == ["model.layers.1.mlp.up_proj.weight"]
    norm = lora.view("base", [("model.norm.weight", model.base_model.model.model.norm.weight)], partial=True)
    assert [name for name, _ in norm.named] == ["model.norm.weight"]


def test_an_adapter_needs_no_base_tensors() -> None:
    model = model_of("all linear", torch.float32)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    view = LoraModel(model).view("adapter", trained)
    assert len(view.computed) == 28
    assert not view.named
    assert view.known is None


def test_a_base_name_of_a_changed_weight_is_ambiguous() -> None:
    model = model_of("all linear", torch.float32)
    lora = LoraModel(model)
    pairs = [(n.replace("base_layer.", ""), p) for n, p in model.named_parameters()]
    with pytest.raises(UnexpectedTensor, match="base name"):
        lora.view("merged", pairs)
    assert len(lora.view("base", pairs).named) == 27


@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_a_weight_source_takes_the_view(case: Row) -> None:
    model = build(case, torch.float32)
    lora = LoraModel(model)
    view = lora.view("merged", list(model.named_parameters()))
    collected = WeightSource(model, view.known).collect(view.named, computed=view.computed)
    assert view.known is not None
    assert {t.name for t in collected.tensors} == {t.name for t in view.known.tensors}
    assert {i.name for i in collected.tensors} | {a for i in collected.tensors for a in i.aliases} == {
        name for t in view.known.tensors for name in (t.name, *t.aliases)
    }


def test_adapter_state_dict_names_are_covered() -> None:
    from peft import get_peft_model_state_dict

    model = model_of("all linear", torch.float32)
    saved = {name.removeprefix("base_model.model.") for name in get_peft_model_state_dict(model)}
    assert saved == {name for name, _ in adapter_tensors(model)}
