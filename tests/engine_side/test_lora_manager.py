"""LoRAs in the embedded engine's slots: what they do to a real model, what is refused, what is read back."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from bridge.errors import (
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    MissingTensor,
    NotFound,
    ShapeMismatch,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.model.levels import RANK_LEVELS
from bridge.model.lora_format import LoraSpec, names_of
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.torch_dtypes import dtype_name
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.layers import LinearBase, RMSNorm
from engine_side.embedded.lora.layers import BaseLayerWithLoRA
from engine_side.embedded.lora.manager import LoraManager
from engine_side.embedded.lora.slots import LoraPart
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from engine_side.embedded.wrappers import unwrap
from engine_side.engines.embedded import EmbeddedRankHost
from engine_side.load.loader import Loader
from engine_side.verify.verify import Verifier
from tests.engine_side import embedded_models as tiny
from tests.engine_side.lora_ranks import on_ranks

RANK, MAX_RANK = 3, 8
SPEC = LoraSpec(RANK)
Tensors = dict[str, torch.Tensor]

DEEPSEEK: dict[str, Any] = {
    "vocab_size": 173, "hidden_size": 48, "intermediate_size": 52, "moe_intermediate_size": 22, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 18, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 14, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1, "max_position_embeddings": 256,
}  # fmt: skip


def save(folder: Path, family: str, tied: bool = False, seed: int = 3) -> None:
    """A checkpoint of float32 weights."""
    if family != "deepseek":
        tiny.make_model(family, tied, seed=seed).save_pretrained(folder)
        return
    config = transformers.DeepseekV3Config(**DEEPSEEK, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.normal_(0, 0.12 if "embed" in name or "lm_head" in name else param.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def state(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def runner(folder: Path, tp: Parallel | None = None, **options: Any) -> ModelRunner:
    tp = tp or Parallel()
    options = {"max_loras": 2, "max_lora_rank": MAX_RANK, **options}
    return ModelRunner(EngineConfig(str(folder), tensor_parallel_size=tp.size, **options), tp)


def lora_of(made: ModelRunner) -> LoraManager:
    assert made.lora is not None
    return made.lora


def linear_modules(weights: Tensors) -> list[str]:
    return [name.removesuffix(".weight") for name, t in weights.items() if t.dim() == 2]


def lora_tensors(weights: Tensors, modules: Sequence[str], seed: int = 0, rank: int = RANK) -> Tensors:
    """A non-zero LoRA on these modules of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    out: Tensors = {}
    for module in modules:
        height, width = weights[f"{module}.weight"].shape
        embedding = "embed_tokens" in module
        inputs, outputs = (height, width) if embedding else (width, height)
        a, b = names_of(module, embedding=embedding)
        out[a] = torch.randn(rank, inputs, generator=generator) * (0.3 if embedding else inputs**-0.5)
        out[b] = torch.randn(outputs, rank, generator=generator) * 0.15
    return out


def merged(folder: Path, into: Path, tensors: Tensors, tied: bool = False) -> Path:
    """The checkpoint with W + B A written into it; a tied one untied."""
    shutil.copytree(folder, into)
    weights = state(into)
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        config = json.loads((into / "config.json").read_text())
        (into / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    for module in linear_modules(weights):
        for embedding in (False, True):
            a, b = (tensors.get(name) for name in names_of(module, embedding=embedding))
            if a is not None and b is not None:
                effect = b.double() @ a.double()
                weight = weights[f"{module}.weight"]
                weights[f"{module}.weight"] = (weight.double() + (effect.t() if embedding else effect)).float()
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into


def infos(tensors: Tensors) -> list[TensorInfo]:
    return [TensorInfo(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items()]


def worst(got: list[list[float]], wanted: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True))


FAMILIES = [("llama-biased", False), ("qwen2", True), ("moe-mixed", False), ("deepseek", False)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_a_lora_on_every_module_is_the_merged_model(tmp_path: Path, family: str, tied: bool, layout: str) -> None:
    folder = tmp_path / "base"
    save(folder, family, tied)
    weights = state(folder)
    modules = [*linear_modules(weights), *(["lm_head"] if tied else [])]
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    both = [lora_tensors(weights, modules, seed) for seed in (1, 2)]
    sizes = (1, 2) if layout in ("canonical", "packed") and family != "llama-biased" else (1,)
    for size in sizes:

        def work(tp: Parallel) -> list[list[list[float]]]:
            live = runner(folder, tp, layout=layout)
            before = live.prompt_logprobs(tiny.prompts())
            for name, tensors in zip("ab", both):
                lora_of(live).load(name, tensors, SPEC)
            found = [live.prompt_logprobs(tiny.prompts(), name) for name in "ab"]
            assert live.prompt_logprobs(tiny.prompts()) == before, "the base model's bits stay"
            lora_of(live).remove("a")
            assert live.prompt_logprobs(tiny.prompts(), "b") == found[1]
            return [before, *found]

        plain = runner(folder, max_loras=0).prompt_logprobs(tiny.prompts())
        before, *found = on_ranks(size, work)[0]
        assert worst(before, plain) < 1e-4
        for k, (tensors, got) in enumerate(zip(both, found)):
            reference = merged(folder, tmp_path / f"merged-{size}-{k}", tensors, tied)
            wanted = runner(reference, max_loras=0).prompt_logprobs(tiny.prompts())
            assert worst(got, wanted) < 1e-4
            assert worst(got, plain) > 0.1


@pytest.mark.parametrize("module", ["self_attn.kv_b_proj", "self_attn.kv_a_proj_with_mqa", "mlp.experts.2.up_proj"])
def test_a_lora_on_one_module_acts(tmp_path: Path, module: str) -> None:
    """A latent attention never calls `kv_b_proj`: its LoRA has to act all the same."""
    folder = tmp_path / "base"
    save(folder, "deepseek")
    tensors = lora_tensors(state(folder), [f"model.layers.1.{module}"])
    live = runner(folder, lora_targets=(module.rpartition(".")[2],))
    lora_of(live).load("one", tensors, SPEC)
    got = live.prompt_logprobs(tiny.prompts(), "one")
    wanted = runner(merged(folder, tmp_path / "merged", tensors), max_loras=0).prompt_logprobs(tiny.prompts())
    assert worst(got, wanted) < 1e-4
    assert worst(got, live.prompt_logprobs(tiny.prompts())) > 1e-3


# ---- base weights below the wrappers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "layout"),
    [*((n, layout) for n in (1, 2, 3) for layout in ("canonical", "packed")), (3, "transposed"), (3, "shuffled")],
)
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("moe-mixed", False), ("deepseek", False)])
def test_base_weights_load_below_the_wrappers(
    tmp_path: Path, family: str, tied: bool, levels: int, layout: str
) -> None:
    """`levels` of `base_layer` in all; the LoRAs survive and still act."""
    base, other = tmp_path / "base", tmp_path / "other"
    save(base, family, tied)
    save(other, family, tied, seed=99)
    weights = state(base)
    tensors = lora_tensors(weights, linear_modules(weights))
    plain = {"wrap_linears": levels > 1, "wrap_levels": max(1, levels - 1)}
    live = runner(base, layout=layout, **plain)
    lora_of(live).load("kept", tensors, SPEC)
    host = EmbeddedRankHost(live)
    loader = Loader(host, infos(weights), threads=1)
    try:
        manifest = lay_out(infos(weights))
        slots = [weights, state(other)]
        loader.map(manifest, [[slot[s.name] for s in manifest.tensors] for slot in slots])
        verifier = Verifier(loader)
        assert all(r.ok for r in verifier.run(RANK_LEVELS, 0))
        outcome = loader.apply(1)
        found = verifier.run(RANK_LEVELS, 1, outcome=outcome, previous=0)
        assert all(r.ok for r in found), [r for r in found if not r.ok]
        assert not outcome.rebound
        assert not outcome.created
    finally:
        loader.close()
    same = runner(other, layout=layout, max_loras=0)
    assert host.prompt_logprobs(tiny.prompts()) == same.prompt_logprobs(tiny.prompts()), "bit for bit"
    reference = merged(other, tmp_path / "merged", tensors, tied)
    wanted = runner(reference, max_loras=0).prompt_logprobs(tiny.prompts())
    assert worst(live.prompt_logprobs(tiny.prompts(), "kept"), wanted) < 1e-4


def test_a_weight_sync_does_not_see_the_slots(tmp_path: Path) -> None:
    tiny.save(tmp_path, "moe-mixed")
    with_lora, without = runner(tmp_path).model, runner(tmp_path, max_loras=0).model
    assert dict(with_lora.named_parameters()).keys() == dict(without.named_parameters()).keys()
    assert dict(with_lora.named_buffers()).keys() == dict(without.named_buffers()).keys()


# ---- slots -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    tiny.save(folder, "qwen2")
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    tiny.save(folder, "moe")
    return folder


def everything(folder: Path, **changes: Any) -> Tensors:
    weights = state(folder)
    return lora_tensors(weights, linear_modules(weights), **changes)


def slot_is_empty(manager: LoraManager, slot: int) -> bool:
    parts = [part for layer in manager.layers.values() for part in layer.parts.values()]
    return not any(bool(part.a[slot].any()) or bool(part.b[slot].any()) for part in parts)


def test_a_full_engine_takes_no_more(qwen2: Path) -> None:
    manager = lora_of(runner(qwen2))
    tensors = everything(qwen2)
    manager.load("v1", tensors, SPEC)
    manager.load("v2", tensors, SPEC)
    assert (manager.names, manager.slot("v1"), manager.slot("v2")) == (("v1", "v2"), 0, 1)
    with pytest.raises(ConfigError, match="no free slot") as caught:
        manager.load("v3", tensors, SPEC)
    assert "v1, v2" in str(caught.value)
    manager.remove("v1")
    assert slot_is_empty(manager, 0)
    assert not slot_is_empty(manager, 1)
    manager.load("v3", tensors, SPEC)
    assert (manager.names, manager.slot("v3")) == (("v2", "v3"), 0)
    manager.remove("unknown")


def test_a_name_is_never_used_again(qwen2: Path) -> None:
    manager = lora_of(runner(qwen2))
    tensors = everything(qwen2)
    manager.load("v1", tensors, SPEC)
    with pytest.raises(ConfigError, match="used before"):
        manager.load("v1", tensors, SPEC)
    manager.remove("v1")
    with pytest.raises(ConfigError, match="loaded once"):
        manager.load("v1", tensors, SPEC)
    assert manager.names == ()
    for ask in (manager.slot, manager.views):
        with pytest.raises(NotFound):
            ask("v1")


def test_a_load_that_fails_halfway_leaves_nothing(qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = lora_of(runner(qwen2))
    (last,) = manager.layers["model.layers.2.mlp.down_proj"].parts.values()  # far behind the first
    write = LoraPart.write

    def broken(self: LoraPart, *arguments: Any) -> None:
        if self is last:
            raise RuntimeError("out of memory")
        write(self, *arguments)

    monkeypatch.setattr(LoraPart, "write", broken)
    with pytest.raises(RuntimeError, match="memory"):
        manager.load("v1", everything(qwen2), SPEC)
    assert manager.names == ()
    assert slot_is_empty(manager, 0)
    monkeypatch.undo()
    manager.load("v2", everything(qwen2), SPEC)
    assert manager.slot("v2") == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", ["qwen2", "moe", "llama"])
def test_what_is_read_back_is_what_was_sent(tmp_path: Path, family: str, size: int, dtype: str) -> None:
    tiny.save(tmp_path, family)
    tensors = everything(tmp_path)
    read = {name: torch.full_like(t, torch.nan) for name, t in tensors.items()}
    for rank in range(size):
        manager = lora_of(runner(tmp_path, Parallel(rank, size), dtype=dtype))
        assert set(manager.plan(infos(tensors), SPEC).values()) == {dtype}
        manager.load("v1", tensors, SPEC)
        for view in manager.views("v1"):
            sent = tensors[view.name][view.index].to(view.live.dtype)
            assert torch.equal(view.live, sent), view.name
            assert all(p.numel() and not p.any() for p in view.padding)
            read[view.name][view.index] = view.live.float()
            view.live.add_(1.0)
        assert len({view.name for view in manager.views("v1")}) == len(tensors)
        part = manager.layers["model.embed_tokens"].parts[None, None]
        assert bool(part.a[0].any()), "the views are live"
        manager.remove("v1")
    wanted = {n: t.to(torch.bfloat16).float() if dtype == "bf16" else t for n, t in tensors.items()}
    assert all(torch.equal(read[name], wanted[name]) for name in tensors), "all ranks together hold every element"


def test_padding_that_is_not_zero_shows(qwen2: Path) -> None:
    manager = lora_of(runner(qwen2))
    manager.load("v1", everything(qwen2), SPEC)
    for layer in manager.layers.values():
        for part in layer.parts.values():
            part.a[0, RANK:] = 7
            part.b[0, :, RANK:] = 7
    manager.layers["lm_head"].parts[None, None].b[0, 173:] = 7
    manager.layers["model.embed_tokens"].parts[None, None].a[0, :, 173:] = 7
    for view in manager.views("v1"):
        assert view.padding
        assert all(bool(p.any()) for p in view.padding), view.name
        assert not (view.live == 7).any()
        ends = [view.live, *view.padding]
        base = view.live if view.live._base is None else view.live._base
        assert sum(t.numel() for t in ends) == base[0].numel(), "nothing of the slot is left out"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_modules_that_the_engine_has_no_place_for_are_all_named(qwen2: Path) -> None:
    manager = lora_of(runner(qwen2, lora_targets=("q_proj", "down_proj")))
    a = TensorInfo
    sent = [
        a(name, "fp32", shape)
        for module, shapes in {
            "model.layers.0.self_attn.q_proj": ((RANK, 48), (48, RANK)),
            "model.layers.0.self_attn.o_proj": ((RANK, 48), (48, RANK)),
            "base_model.model.layers.0.mlp.down_proj": ((RANK, 90), (48, RANK)),
            "model.layers.9.mlp.down_proj": ((RANK, 90), (48, RANK)),
            "model.layers.0.self_attn.qkv_proj": ((RANK, 48), (64, RANK)),
        }.items()
        for name, shape in zip(names_of(module), shapes)
    ]
    with pytest.raises(UnexpectedTensor) as caught:
        manager.plan(sent, SPEC)
    assert caught.value.names == (
        "model.layers.0.self_attn.o_proj",
        "base_model.model.layers.0.mlp.down_proj",
        "model.layers.9.mlp.down_proj",
        "model.layers.0.self_attn.qkv_proj",
    )
    text = str(caught.value)
    assert "not wrapped for LoRA: model.layers.0.self_attn.o_proj;" in text
    assert "lora_targets" in text
    with pytest.raises(UnexpectedTensor):
        manager.load("v1", {i.name: torch.zeros(i.shape) for i in sent}, SPEC)
    assert manager.names == ()


def test_an_embedding_takes_embedding_pairs_only(qwen2: Path) -> None:
    manager = lora_of(runner(qwen2))
    for module, embedding, shapes in (
        ("model.embed_tokens", False, ((RANK, 48), (173, RANK))),
        ("lm_head", True, ((RANK, 173), (48, RANK))),
    ):
        names = names_of(module, embedding=embedding)
        with pytest.raises(UnexpectedTensor, match="embedding") as caught:
            manager.plan([TensorInfo(n, "fp32", s) for n, s in zip(names, shapes)], SPEC)
        assert caught.value.names == (module,)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((48, RANK), (RANK, 8), "exchanged|not transposed"),
        ((8, RANK), (RANK, 48), "exchanged"),
        ((RANK, 48), (48, RANK), "another shape"),
        ((RANK + 1, 48), (8, RANK + 1), "another shape"),
        ((RANK, 48), (8,), "another shape"),
    ],
)
def test_wrong_shapes_name_the_tensor(qwen2: Path, a: tuple[int, ...], b: tuple[int, ...], words: str) -> None:
    manager = lora_of(runner(qwen2))
    first, second = names_of("model.layers.0.self_attn.k_proj")
    with pytest.raises(ShapeMismatch, match=words) as caught:
        manager.plan([TensorInfo(first, "fp32", a), TensorInfo(second, "bf16", b)], SPEC)
    assert caught.value.names == (first, second)
    assert f"A [{RANK}, 48], B [8, {RANK}]" in str(caught.value)
    assert str(list(a)) in str(caught.value)


def test_other_bad_loras(qwen2: Path) -> None:
    manager = lora_of(runner(qwen2))
    a, b = names_of("model.layers.0.self_attn.k_proj")
    good = [TensorInfo(a, "fp32", (RANK, 48)), TensorInfo(b, "fp32", (8, RANK))]
    assert manager.plan(good, SPEC) == {a: "fp32", b: "fp32"}
    for rank in (MAX_RANK + 1, 0, -1):
        with pytest.raises(UnsupportedLora, match="max_lora_rank"):
            manager.plan(good, LoraSpec(rank))
    with pytest.raises(UnexpectedTensor, match="only one"):
        manager.plan(good[:1], SPEC)
    with pytest.raises(UnexpectedTensor, match="not a tensor of an adapter"):
        manager.plan([*good, TensorInfo("model.norm.weight", "fp32", (48,))], SPEC)
    with pytest.raises(MissingTensor, match="binds no module"):
        manager.plan([], SPEC)
    with pytest.raises(DuplicateTensor):
        manager.plan([*good, good[0]], SPEC)
    with pytest.raises(DtypeMismatch):
        manager.plan([good[0], TensorInfo(b, "int32", (8, RANK))], SPEC)
    assert slot_is_empty(manager, 0)


def test_an_expert_that_does_not_exist(moe: Path) -> None:
    manager = lora_of(runner(moe))
    for expert, fits in ((5, True), (6, False)):
        names = names_of(f"model.layers.0.mlp.experts.{expert}.gate_proj")
        sent = [TensorInfo(n, "fp32", s) for n, s in zip(names, ((RANK, 48), (26, RANK)))]
        if fits:
            assert manager.plan(sent, SPEC)
        else:
            with pytest.raises(UnexpectedTensor, match="not in this model"):
                manager.plan(sent, SPEC)


# ---- which layers are wrapped ----------------------------------------------------------------------------------------


def wrapped_names(made: ModelRunner) -> set[str]:
    return {path.rpartition(".")[2] for path in lora_of(made).layers}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q_proj",), {"qkv_proj"}),
        (("self_attn.v_proj", "lm_head"), {"qkv_proj", "lm_head"}),
        (("gate_proj", "embed_tokens"), {"experts", "embed_tokens"}),
        (("experts",), {"experts"}),
        (("experts.down_proj",), {"experts"}),
        (("gate",), {"gate"}),
        (None, {"embed_tokens", "qkv_proj", "o_proj", "gate", "experts", "lm_head"}),
    ],
)
def test_targets_choose_layers_by_dotted_segments(moe: Path, targets: tuple[str, ...] | None, names: set[str]) -> None:
    made = runner(moe, lora_targets=targets)
    assert wrapped_names(made) == names
    assert all(isinstance(made.model.get_submodule(p), BaseLayerWithLoRA) for p in lora_of(made).layers)


def test_one_layer_of_many(qwen2: Path) -> None:
    made = runner(qwen2, lora_targets=("layers.1.self_attn.q_proj",))
    assert list(lora_of(made).layers) == ["model.layers.1.self_attn.qkv_proj"]


@pytest.mark.parametrize("target", ["input_layernorm", "self_attn", "layers.0.mlp"])
def test_a_module_that_was_asked_for_and_cannot_be_wrapped(qwen2: Path, target: str) -> None:
    made = runner(qwen2, max_loras=0)
    with pytest.raises(ConfigError, match="cannot carry") as caught:
        LoraManager(made.model, max_loras=1, max_rank=4, targets=["q_proj", target])
    assert target in str(caught.value.names[0])
    assert not any(isinstance(m, BaseLayerWithLoRA) for m in made.model.modules()), "nothing was wrapped"


def test_a_target_that_matches_nothing(qwen2: Path) -> None:
    with pytest.raises(ConfigError, match="matches no module") as caught:
        runner(qwen2, lora_targets=("q_proj", "proj", "wq"))
    assert caught.value.names == ("proj", "wq"), "names are matched whole"


def test_a_layer_that_hangs_in_two_places_is_wrapped_once(qwen2: Path) -> None:
    made = runner(qwen2, max_loras=0)
    layers = made.model.model.layers
    layers[2].mlp.down_proj = layers[1].mlp.down_proj  # type: ignore[assignment, union-attr]
    manager = LoraManager(made.model, max_loras=1, max_rank=4, targets=["down_proj"])
    assert layers[2].mlp.down_proj is layers[1].mlp.down_proj  # type: ignore[union-attr]
    assert len({id(layer) for layer in manager.layers.values()}) == 2


class Adder(nn.Module):
    """A layer with a matrix that no wrapper is for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x @ self.weight


def test_what_nobody_asked_for_is_warned_of_once_per_class(qwen2: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = runner(qwen2, max_loras=0)
    for layer in made.model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, Adder(48))  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        LoraManager(made.model, max_loras=1, max_rank=4, targets=None)
    assert len(caplog.records) == 1
    assert "Adder" in caplog.text
    assert "3 layers" in caplog.text
    assert not any(isinstance(unwrap(m), RMSNorm) and m is not unwrap(m) for m in made.model.modules())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2", "moe", "deepseek"])
def test_no_family_has_layers_to_warn_of(
    tmp_path: Path, family: str, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, family)
    with caplog.at_level(logging.WARNING):
        made = runner(tmp_path, layout=layout)
    assert not caplog.records
    cores = {id(layer.core) for layer in lora_of(made).layers.values()}
    assert {id(m) for m in made.model.modules() if isinstance(m, LinearBase | FusedMoE)} <= cores


# ---- warm-up ---------------------------------------------------------------------------------------------------------


def test_the_warm_up_rank_is_what_sharded_experts_need(moe: Path, qwen2: Path) -> None:
    with pytest.raises(ConfigError, match="larger rank") as caught:
        runner(moe, Parallel(0, 2), max_lora_rank=1)
    assert "max_lora_rank=2" in str(caught.value.remedy)
    runner(moe, Parallel(0, 2), max_lora_rank=2)
    runner(moe, Parallel(0, 2), max_lora_rank=1, lora_targets=("q_proj",))  # experts are not wrapped
    runner(qwen2, Parallel(0, 2), max_lora_rank=1)


@pytest.mark.parametrize("size", [1, 2])
def test_the_warm_up_runs_a_lora_through_every_layer(moe: Path, size: int) -> None:
    made = runner(moe, Parallel(0, size), max_loras=0)
    manager = LoraManager(made.model, max_loras=2, max_rank=4, targets=None)
    loaded: list[int] = []

    def run() -> None:
        layer = manager.layers["model.layers.0.mlp.experts"]
        (group,) = manager.context.groups(1)
        loaded.extend(part.ranks[group.slot] for part in layer.parts.values())
        made.prompt_logprobs([[0]])

    manager.warm_up(run)
    assert set(loaded) == {size}
    assert len(loaded) == 3 * 6
    assert all(layer.reached for layer in manager.layers.values())
    assert manager.names == ()
    assert all(slot_is_empty(manager, slot) for slot in (0, 1))
    assert not any(part.ranks for layer in manager.layers.values() for part in layer.parts.values())
    assert manager.context.groups(1) == ()


def test_layers_that_the_model_never_calls_take_no_lora(qwen2: Path) -> None:
    """An engine that reads a layer's weight without calling the layer would accept its LoRA and ignore it."""
    made = runner(qwen2, max_loras=0)
    manager = LoraManager(made.model, max_loras=1, max_rank=4, targets=None)
    tensors = lora_tensors(state(qwen2), ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"])
    made.model.model.layers[1].mlp = nn.Identity()
    manager.warm_up(lambda: made.prompt_logprobs([[0]]))
    with pytest.raises(UnexpectedTensor, match="never called") as caught:
        manager.load("v1", tensors, SPEC)
    assert caught.value.names == ("model.layers.1.mlp.down_proj",)
    manager.load("v1", {n: t for n, t in tensors.items() if "layers.0" in n}, SPEC)


def test_a_warm_up_that_fails_leaves_nothing(qwen2: Path) -> None:
    made = runner(qwen2, max_loras=0)
    manager = LoraManager(made.model, max_loras=1, max_rank=4, targets=None)

    def run() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        manager.warm_up(run)
    assert manager.context.groups(3) == ()
    manager.load("v1", everything(qwen2), SPEC)


# ---- quantised bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2", "moe"])
def test_loras_over_block_scaled_fp8(tmp_path: Path, family: str, layout: str) -> None:
    base, quantised, block = tmp_path / "base", tmp_path / "fp8", 2
    tiny.save(base, family)
    shutil.copytree(base, quantised)
    weights = state(base)
    stored, plain = dict(weights), dict(weights)
    for name in [n for n, t in weights.items() if t.dim() == 2 and "layers" in n and "mlp.gate." not in n]:
        rows, columns = weights[name].shape
        tiles = weights[name].view(rows // block, block, columns // block, block)
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = codes.view(rows, columns), scale
        plain[name] = (codes.float() * scale[:, None, :, None]).view(rows, columns)
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block],
                                     "modules_to_not_convert": ["lm_head", "gate"]}  # fmt: skip
    (quantised / "config.json").write_text(json.dumps(config))
    tensors = lora_tensors(weights, linear_modules(weights))
    live = runner(quantised, layout=layout)
    lora_of(live).load("v1", tensors, SPEC)
    wanted = runner(merged(base, tmp_path / "merged", tensors), max_loras=0).prompt_logprobs(tiny.prompts())
    assert worst(live.prompt_logprobs(tiny.prompts(), "v1"), wanted) < 1e-4
    if layout != "packed":
        wrapper = live.model.get_submodule("model.layers.0.self_attn.qkv_proj")
        assert wrapper.weight_scale_inv is unwrap(wrapper).weight_scale_inv
        assert wrapper.weight.dtype is torch.float8_e4m3fn
