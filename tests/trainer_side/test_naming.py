"""Canonical names, shapes and bytes against what save_pretrained writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError, IntegrityError
from bridge.model.regions import Region
from trainer_side.names.naming import CanonicalMap, bake_names, canonical_unbound

transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    **ROUTED,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 24}),
    "mixtral": ("mixtral", LOCAL),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "gemma2": ("gemma2", {"head_dim": 8}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "falcon": ("falcon", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": ("glm4_moe", {**ROUTED, "head_dim": 8}),
    "granitemoe": ("granitemoe", LOCAL),
    "gpt_oss": ("gpt_oss", {**LOCAL, "head_dim": 8}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}),
    "phimoe": ("phimoe", LOCAL),
    "mamba": ("mamba", {"state_size": 4}),
}
FUSED = {
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "glm4_moe",
    "ernie4_5_moe",
    "phimoe",
}


def causal_lm(kind: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(kind, **{**SMALL, **config})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(known)
    return random_values(model)


def random_values(model: nn.Module) -> nn.Module:
    """Distinct values everywhere, so that no two regions look alike."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_()
    return model


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(safetensors_torch.load_file(file))
    return found


def window(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor.as_strided(region.shape, region.strides, region.offset)


def assembled(baked: CanonicalMap, model: nn.Module) -> dict[str, torch.Tensor]:
    """The checkpoint that the map says the model has."""
    live = {baked.resolve(name): t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    made = {}
    for tensor in baked.tensors:
        made[tensor.name] = torch.full(tensor.shape, 99, dtype=tensor.dtype)
        for piece in tensor.pieces:
            window(made[tensor.name], piece.dest).copy_(window(live[piece.live].contiguous(), piece.source))
    return made


def assert_same(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert made[name].shape == tensor.shape, name
        assert made[name].dtype == tensor.dtype, name
        assert torch.equal(made[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_what_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[family]
    model = causal_lm(kind, **config)
    baked = bake_names(model)
    assert_same(assembled(baked, model), saved(model, tmp_path))
    assert baked.ignored == frozenset()
    converted = {t.name for t in baked.tensors} - set(model.state_dict())
    assert (family in FUSED) <= bool(converted)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama_tied"])
def test_a_loaded_model_is_named_as_its_checkpoint(family: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[family]
    wanted = saved(causal_lm(kind, **config), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(assembled(bake_names(model), model), wanted)


def test_a_vision_language_model(tmp_path: Path) -> None:
    config = transformers.Qwen2VLConfig(
        text_config={**SMALL, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    )
    model = random_values(transformers.Qwen2VLForConditionalGeneration(config))
    baked = bake_names(model)
    assert_same(assembled(baked, model), saved(model, tmp_path))


def test_a_half_precision_model_keeps_its_mixed_dtypes(tmp_path: Path) -> None:
    model = causal_lm("deepseek_v3", **LATENT).to(torch.bfloat16)
    model.get_submodule("model.layers.1.mlp.gate").float()
    assert_same(assembled(bake_names(model), model), saved(model, tmp_path))


def test_ties_go_by_storage_and_keep_the_saved_name() -> None:
    baked = bake_names(causal_lm("gpt2", n_embd=32, n_layer=2, n_head=4))
    assert baked.ties == {"lm_head.weight": "transformer.wte.weight"}
    assert baked.by_name["transformer.wte.weight"].aliases == ("lm_head.weight",)
    untied = causal_lm("gpt2", n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    assert bake_names(untied).ties == {}


def test_persistent_buffers_travel_and_derived_ones_do_not() -> None:
    baked = bake_names(causal_lm("deepseek_v3", **LATENT))
    buffers = {name for name, live in baked.live.items() if live.buffer}
    assert buffers == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert not any("inv_freq" in name for name in baked.by_name)


class Wrapped(nn.Module):
    """What data-parallel engines look like: one child called `module`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


class Layer(nn.Module):
    """A submodule whose own child is called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def checkpointed(layer: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped: nn.Module = checkpoint_wrapper(layer)
    return wrapped


def wrap_root(model: nn.Module) -> nn.Module:
    return Wrapped(model)


def wrap_compiled(model: nn.Module) -> nn.Module:
    return Wrapped(torch.compile(model))  # type: ignore[arg-type]


def wrap_layers(model: nn.Module) -> nn.Module:
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for k, layer in enumerate(layers):
        layers[k] = torch.compile(checkpointed(layer))  # type: ignore[call-overload]
    return model


@pytest.mark.parametrize("wrap", [wrap_root, wrap_compiled, wrap_layers])
def test_wrappers_leave_no_trace(wrap: Any, tmp_path: Path) -> None:
    wanted = saved(causal_lm("qwen3_moe", **EXPERTS), tmp_path)
    model = wrap(causal_lm("qwen3_moe", **EXPERTS))
    baked = bake_names(model)
    assert_same(assembled(baked, model), wanted)
    resolved = [baked.resolve(name) for name, _ in model.named_parameters()]
    assert resolved == list(baked.live)


def test_names_from_a_wrapper_around_the_bound_model_are_known() -> None:
    model = causal_lm("llama")
    baked = bake_names(model)
    for name, _ in wrap_compiled(model).named_parameters():
        assert baked.resolve(name) in baked.live
    assert baked.resolve("model.no_such.weight") is None


def test_a_submodule_that_is_called_module_keeps_its_name() -> None:
    model = nn.Sequential(Layer(), Layer())
    assert list(bake_names(model).by_name) == [
        "0.module.weight",
        "0.module.bias",
        "1.module.weight",
        "1.module.bias",
    ]
    assert list(bake_names(Wrapped(model)).by_name) == list(bake_names(model).by_name)


def test_any_module_has_the_identity_map_with_ties_as_aliases() -> None:
    model = nn.Module()
    model.register_parameter("a", nn.Parameter(torch.randn(3, 2)))
    model.register_parameter("b", model.a)
    model.register_parameter("row", nn.Parameter(model.a.data[0]))
    model.register_buffer("steps", torch.tensor(3))
    model.register_buffer("derived", torch.ones(2), persistent=False)
    baked = bake_names(model)
    assert [(t.name, t.aliases) for t in baked.tensors] == [("a", ("b",)), ("row", ()), ("steps", ())]
    assert baked.infos[2].dtype == "int64"


def test_a_conversion_that_computes_is_refused(converts: Callable[[Any], None]) -> None:
    converts(lambda m, state: {k: v * 2 for k, v in state.items()})
    with pytest.raises(IntegrityError, match=r"computes this tensor.*weight.*aten\.mul"):
        bake_names(nn.Linear(2, 2, bias=False))


def test_a_model_without_tensors_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        bake_names(nn.Module())


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module", "module"),
    ],
)
def test_unbound_names(given: str, canonical: str) -> None:
    assert canonical_unbound(given) == canonical
