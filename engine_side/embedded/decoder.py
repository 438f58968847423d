"""The decoder and its families. A family is a class in `ARCHITECTURES`; adding one edits nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import nn

from bridge.errors import ConfigError, DtypeMismatch, ShapeMismatch, UnexpectedTensor
from engine_side.embedded.attention import Attention, RotaryEmbedding, Step
from engine_side.embedded.config import ModelConfig
from engine_side.embedded.layers import (
    LayerContext,
    ParallelLMHead,
    RMSNorm,
    VocabParallelEmbedding,
)
from engine_side.embedded.mla import MLAConfig, MLAttention
from engine_side.embedded.moe import (
    MLP,
    CorrectedTopK,
    FusedMoE,
    GroupedTopK,
    MoEConfig,
    SoftmaxTopK,
    SparseMoeBlock,
)
from engine_side.embedded.quant import quantise
from engine_side.embedded.weights import Layer, default_weight_loader, stored

Weights = Iterable[tuple[str, torch.Tensor]]


class DecoderLayer(Layer):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, attention: Layer, mlp: Layer, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(Layer):
    """Embedding, layers, final norm. `rope_dim`: how many numbers of a head are rotated."""

    def __init__(
        self, config: ModelConfig, embedding: nn.Module, layers: list[nn.Module], rope_dim: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary_emb = RotaryEmbedding(config.rope, rope_dim)

    def forward(self, step: Step) -> torch.Tensor:
        """Compute the last hidden states [n, hidden] of the step's tokens."""
        x: torch.Tensor = self.embed_tokens(step.tokens)
        step.cos, step.sin = self.rotary_emb(step.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)


class CausalLM(Layer):
    """A decoder with a head. Families override the methods that read their own config fields."""

    stacked: Mapping[str, tuple[str, object]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }
    """Path segment in a checkpoint -> segment here and shard id. An instance may have a table of its own."""
    moved: ClassVar[Mapping[str, str]] = {}
    """Last two segments in a checkpoint -> last two segments here, for what is kept in another module."""
    experts: ClassVar[Mapping[str, tuple[str, str]]] = {
        "gate_proj": ("w13_weight", "w1"),
        "up_proj": ("w13_weight", "w3"),
        "down_proj": ("w2_weight", "w2"),
    }
    """Segment after the expert's number -> parameter of FusedMoE and shard id."""
    qk_norm: ClassVar[bool] = False
    """Attentions norm queries and keys."""

    def __init__(self, config: ModelConfig, context: LayerContext) -> None:
        super().__init__()
        self.config = config
        self.stacked = self.stacking()
        embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, context)
        layers: list[nn.Module] = []
        for index in range(config.num_hidden_layers):
            attention, mlp = self.make_attention(index, context), self.make_mlp(index, context)
            layers.append(DecoderLayer(attention, mlp, config, context.dtype))
        self.model = Decoder(config, embedding, layers, self.rope_dim(), context.dtype)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, context)
        if config.tie_word_embeddings:
            self.lm_head.tie_weights(embedding)
        quantise(self, config.raw.get("quantization_config"))

    def stacking(self) -> Mapping[str, tuple[str, object]]:
        """Return `stacked` for a model with this config."""
        return self.stacked

    def rope_dim(self) -> int:
        """Return how many numbers of each head are rotated."""
        return self.config.head_dim

    def make_attention(self, index: int, context: LayerContext) -> Layer:
        """Build the attention of one layer, with the biases and norms of this family."""
        bias = bool(self.config.raw.get("attention_bias", False))
        return Attention(self.config, index, context, qkv_bias=bias, output_bias=bias, qk_norm=self.qk_norm)

    def make_mlp(self, index: int, context: LayerContext) -> Layer:
        """Build the feed-forward of one layer, dense or sparse."""
        return MLP(self.config, False, context)

    def forward(self, step: Step) -> torch.Tensor:
        """Compute the last hidden states [n, hidden]; `logits` takes chosen rows of them. *(collective)*"""
        return self.model(step)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute [n, hidden] -> [n, vocabulary], padding cut off. *(collective)*"""
        return self.lm_head(hidden)

    def load_weights(self, weights: Weights) -> set[str]:
        """Write checkpoint tensors into this rank's parameters, each through the parameter's own loader.

        Returns the checkpoint names that were used. Raises UnexpectedTensor, ShapeMismatch or DtypeMismatch, naming the
        tensor.
        """
        params = {
            f"{path}.{name}" if path else name: tensor
            for path, module in self.named_modules(remove_duplicate=False)
            for name, tensor in stored(module)
        }
        loaded: set[str] = set()
        for name, tensor in weights:
            if self.ignores(name):
                continue
            target, arguments = self.resolve(name)
            param = params.get(target)
            if param is None:
                what, remedy = "no parameter for this tensor", "send canonical checkpoint names of this architecture"
                raise UnexpectedTensor(
                    what,
                    where=name,
                    expected="a checkpoint name of this architecture",
                    got=target,
                    remedy=remedy,
                    names=(name,),
                )
            loader = getattr(param, "weight_loader", default_weight_loader)
            try:
                loader(param, tensor, **arguments)
            except (ShapeMismatch, DtypeMismatch) as error:
                raise error.amended(where=f"{name} -> {target}", names=(name,)) from error
            loaded.add(name)
        return loaded

    def ignores(self, name: str) -> bool:
        """Tell if checkpoints of this model may hold a tensor of this name that the engine does not load."""
        return self.config.tie_word_embeddings and name == "lm_head.weight"

    def resolve(self, name: str) -> tuple[str, dict[str, object]]:
        """Map a checkpoint's tensor name to the parameter's path here and the loader's further arguments."""
        parts = name.split(".")
        if len(parts) >= 4 and parts[-4] == "experts" and parts[-3].isdecimal() and parts[-2] in self.experts:
            param, shard = self.experts[parts[-2]]
            here = f"{param.removesuffix('weight')}{parts[-1]}"
            return ".".join([*parts[:-3], here]), {"shard_id": shard, "expert_id": int(parts[-3])}
        moved = self.moved.get(".".join(parts[-2:]))
        if moved is not None:
            return ".".join([*parts[:-2], moved]), {}
        if len(parts) >= 2 and parts[-2] in self.stacked:
            fused, shard_id = self.stacked[parts[-2]]
            return ".".join([*parts[:-2], fused, parts[-1]]), {"shard_id": shard_id}
        return name, {}

    def checkpoint_names(self) -> Iterator[str]:
        """Yield every tensor name that a checkpoint of this model holds: the inverse of `resolve`."""
        back = {here: there for there, here in self.moved.items()}
        for path, module in self.named_modules():
            parent, _, last = path.rpartition(".")
            for name, _ in stored(module):
                if isinstance(module, FusedMoE):
                    for part, (param, _shard) in self.experts.items():
                        stem = param.removesuffix("weight")
                        if name.startswith(stem):
                            rest = f"{part}.{name.removeprefix(stem)}"
                            yield from (f"{path}.{expert}.{rest}" for expert in range(module.num_experts))
                elif f"{last}.{name}" in back:
                    yield f"{parent}.{back[f'{last}.{name}']}"
                elif not (module is self.lm_head and self.config.tie_word_embeddings):
                    yield from (f"{part}.{name}" for part in self.parts_of(path))

    def parts_of(self, path: str) -> list[str]:
        """Return the checkpoint's names of the module at `path`: its own path, or those of the parts of a fused one."""
        parent, _, last = path.rpartition(".")
        parts = [part for part, (fused, _) in self.stacked.items() if fused == last] or [last]
        return [f"{parent}.{part}" if parent else part for part in parts]


class LlamaForCausalLM(CausalLM):
    def make_mlp(self, index: int, context: LayerContext) -> Layer:
        return MLP(self.config, bool(self.config.raw.get("mlp_bias", False)), context)


class Qwen2ForCausalLM(CausalLM):
    def make_attention(self, index: int, context: LayerContext) -> Layer:
        return Attention(self.config, index, context, qkv_bias=True)


class Qwen3ForCausalLM(CausalLM):
    qk_norm = True


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    def make_mlp(self, index: int, context: LayerContext) -> Layer:
        raw = self.config.raw
        experts = int(raw.get("num_experts") or raw.get("num_local_experts") or 0)
        sparse = experts > 0 and (index + 1) % int(raw.get("decoder_sparse_step") or 1) == 0
        if not sparse or index in (raw.get("mlp_only_layers") or ()):
            return super().make_mlp(index, context)
        routing = MoEConfig(
            experts=experts,
            top_k=int(raw["num_experts_per_tok"]),
            intermediate_size=int(raw["moe_intermediate_size"]),
            renormalize=bool(raw.get("norm_topk_prob", False)),
        )
        return SparseMoeBlock(self.config, routing, context, SoftmaxTopK)


class DeepseekV2ForCausalLM(CausalLM):
    """Latent attention; after the first dense layers, routed experts beside shared ones."""

    routing: ClassVar[type[GroupedTopK]] = GroupedTopK

    def stacking(self) -> Mapping[str, tuple[str, object]]:
        parts = {name: self.stacked[name] for name in ("gate_proj", "up_proj")}
        if MLAConfig.of(self.config).q_lora_rank is None:
            return parts
        return parts | {"q_a_proj": ("fused_qkv_a_proj", 0), "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1)}

    def rope_dim(self) -> int:
        return MLAConfig.of(self.config).qk_rope_head_dim

    def make_attention(self, index: int, context: LayerContext) -> Layer:
        return MLAttention(self.config, index, context)

    def grouped_and_renormalized(self) -> tuple[bool, bool]:
        """Read how this family chooses experts and weighs them, as transformers does."""
        method = self.config.raw.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            expected = "greedy | group_limited_greedy"
            raise ConfigError(
                "unknown routing",
                where="config.json: topk_method",
                expected=expected,
                got=repr(method),
                remedy="serve this model with vLLM or SGLang",
            )
        return method == "group_limited_greedy", False

    def make_mlp(self, index: int, context: LayerContext) -> Layer:
        raw = self.config.raw
        if index < int(raw.get("first_k_dense_replace") or 0) or not raw.get("n_routed_experts"):
            return super().make_mlp(index, context)
        if raw.get("moe_layer_freq", 1) != 1:
            got = str(raw["moe_layer_freq"])
            raise ConfigError(
                "unsupported spacing of sparse layers",
                where="config.json: moe_layer_freq",
                expected="1",
                got=got,
                remedy="serve this model with vLLM or SGLang",
            )
        grouped, renormalize = self.grouped_and_renormalized()
        moe = MoEConfig(
            experts=int(raw["n_routed_experts"]),
            top_k=int(raw["num_experts_per_tok"]),
            intermediate_size=int(raw["moe_intermediate_size"]),
            renormalize=renormalize,
            groups=int(raw.get("n_group") or 1) if grouped else 1,
            top_groups=int(raw.get("topk_group") or 1) if grouped else 1,
            scale=float(raw.get("routed_scaling_factor", 1.0)),
        )
        return SparseMoeBlock(self.config, moe, context, self.routing, int(raw.get("n_shared_experts") or 0))


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V2 with sigmoid scores and a learned correction of the choice of experts."""

    routing: ClassVar[type[GroupedTopK]] = CorrectedTopK
    moved: ClassVar[Mapping[str, str]] = {"gate.e_score_correction_bias": "routing.e_score_correction_bias"}

    def grouped_and_renormalized(self) -> tuple[bool, bool]:
        return True, bool(self.config.raw.get("norm_topk_prob", True))

    def ignores(self, name: str) -> bool:
        """Checkpoints end with layers that predict further tokens; no decoder of this engine runs them."""
        parts = name.split(".")
        further = int(self.config.raw.get("num_nextn_predict_layers") or 0)
        first = self.config.num_hidden_layers
        if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal():
            return first <= int(parts[2]) < first + further
        return super().ignores(name)


ARCHITECTURES: Mapping[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "DeepseekV2ForCausalLM": DeepseekV2ForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
}
"""`architectures[0]` of a checkpoint -> model class."""


def model_class(architecture: str) -> type[CausalLM]:
    """Return the class of an architecture. Raises ConfigError, listing what is supported."""
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            "the embedded engine does not know this architecture",
            where="config.json: architectures",
            expected=" | ".join(ARCHITECTURES),
            got=repr(architecture),
            remedy="serve this model with vLLM or SGLang",
        )
    return ARCHITECTURES[architecture]
