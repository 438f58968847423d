"""Small real PEFT models, one builder per kind of layer that PEFT wraps.

Every trainable value is moved away from its initial one, and alpha (32) differs from r (3) everywhere: alpha == r has
hidden bugs before.

`ROWS` are layers of a toy model: each row says which of its modules have LoRA. `CAUSAL` are whole language models for
end-to-end tests. `build(row, dtype)` gives the model in eval mode, active, unmerged.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.conftest import tiny_qwen2, tiny_qwen3_moe

ALPHA, RANK = 32, 3
VOCABULARY, HIDDEN, WIDE = 11, 8, 12
DEFAULT = "default"


class ScaledEmbedding(nn.Embedding):
    """An embedding whose forward multiplies, as Gemma's does."""

    def __init__(self, vocabulary: int, hidden: int, scale: float) -> None:
        super().__init__(vocabulary, hidden)
        self.embed_scale = torch.tensor(scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Experts(nn.Module):
    """Fused expert parameters; `call(x, expert)` routes every row to one expert."""

    def __init__(self, experts: int, inputs: int, middle: int, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (experts, 2 * middle, inputs), (experts, inputs, middle)
        if is_transposed:
            up, down = (experts, inputs, 2 * middle), (experts, middle, inputs)
        self.gate_up_proj = nn.Parameter(torch.randn(up) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(down) * 0.3)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        up, down = self.gate_up_proj[expert], self.down_proj[expert]
        if not self.is_transposed:
            up, down = up.T, down.T
        gate, value = (x @ up).chunk(2, -1)
        result: torch.Tensor = (torch.tanh(gate) * value) @ down
        return result


class Toy(nn.Module):
    """One layer of every kind. Never called as a whole: tests call its layers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.scaled = ScaledEmbedding(VOCABULARY, HIDDEN, 3.5)
        self.linear = nn.Linear(HIDDEN, WIDE)
        self.slim = nn.Linear(HIDDEN, WIDE, bias=False)
        self.square = nn.Linear(HIDDEN, HIDDEN)
        self.transposed = Conv1D(WIDE, HIDDEN)
        self.conv1 = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), padding=(1, 0))
        self.point = nn.Conv2d(4, 6, 1)
        self.conv3 = nn.Conv3d(4, 6, 2)
        self.grouped = nn.Conv2d(6, 6, 3, groups=3)
        self.reflecting = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.experts = Experts(4, 8, 5, is_transposed=False)
        self.stacked = Experts(4, 8, 5, is_transposed=True)
        self.even = Experts(3, 6, 3, is_transposed=False)
        self.even_stacked = Experts(3, 6, 3, is_transposed=True)
        self.lonely = Experts(1, 8, 5, is_transposed=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.lora_gate = nn.Linear(HIDDEN, WIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(x)
        return result

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


Adapters = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """Attributes:
    name: of the row.
    layers: names of the modules of `Toy` whose effective tensors are asked for (of `CAUSAL`: ignored).
    adapters: adapter name -> keyword arguments of LoraConfig, in the order they are added; all are active at first.
    base: builds the base model.
    after: changes the PEFT model at run time, without a trace in the config.
    mergeable: PEFT's own merge works.
    unmerges: what PEFT's forward does when merged and disabled can be followed.
    initial: the dtype in which PEFT has to initialise the adapters; None: the one they are built for.
    """

    name: str
    layers: tuple[str, ...]
    adapters: Adapters
    base: Callable[[], nn.Module] = Toy
    after: Callable[[Any], None] | None = None
    mergeable: bool = True
    unmerges: bool = True
    initial: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name


def one(**config: Any) -> Adapters:
    return {DEFAULT: config}


def build(row: Row, dtype: torch.dtype = torch.float64, *, seed: int = 0, wide_adapters: bool = False) -> Any:
    """The row's PEFT model, every trainable value perturbed, all adapters active, in eval mode.

    `wide_adapters`: as PEFT does it by default, adapters of a 16-bit base are fp32.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model: Any = row.base().to(row.initial or dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (name, config) in enumerate(row.adapters.items()):
            settings = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **config})
            if number == 0:
                model = get_peft_model(model, settings, adapter_name=name, autocast_adapter_dtype=wide_adapters)
            else:
                model.add_adapter(name, settings, autocast_adapter_dtype=wide_adapters)
    if row.initial is not None:
        model = model.to(dtype)
    if len(row.adapters) > 1:
        model.base_model.set_adapter(list(row.adapters))
    move(model, seed + 1)
    if row.after is not None:
        row.after(model)
    return model.eval()


ADAPTER_PARTS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
                           "lora_diag", "trainable_tokens_delta", "modules_to_save"})  # fmt: skip


@torch.no_grad()
def move(model: nn.Module, seed: int) -> None:
    """Every parameter of an adapter, and every one that trains, moves. Shared storage moves once."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        mine = parameter.requires_grad or not ADAPTER_PARTS.isdisjoint(name.split("."))
        if mine and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            parameter.add_(noise.to(parameter.dtype))


def layer_of(model: Any, name: str) -> Any:
    """The outermost module of a layer of `Toy`, found without a walk."""
    return getattr(model.base_model.model, name)


def base_of(row: Row, name: str) -> nn.Module:
    return getattr(row.base(), name)  # type: ignore[no-any-return]


def _rescaled(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale(DEFAULT, 0.37)


def _scaled_layers(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(1.7)


def _kasa() -> Any:
    from peft import KasaConfig

    return KasaConfig()


def _bdlora(**patterns: Any) -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    return BdLoraConfig(nblocks=2, **patterns)


LINEAR = ["linear"]
BOTH = [
    "experts.gate_up_proj", "experts.down_proj", "stacked.gate_up_proj", "stacked.down_proj", "even.gate_up_proj",
    "even.down_proj", "even_stacked.gate_up_proj", "even_stacked.down_proj",
]  # fmt: skip
FUSED = ("experts", "stacked", "even", "even_stacked")
DORA, PLAIN = {"target_modules": LINEAR, "use_dora": True}, {"target_modules": LINEAR}
CONVOLUTIONS = ("conv1", "conv2", "point", "conv3")

ROWS: tuple[Row, ...] = (
    Row("linear", ("linear", "slim"), one(target_modules=["linear", "slim"])),
    Row("odd module name", ("lora_gate",), {"lora_x": {"target_modules": ["lora_gate"]}}),
    Row("conv1d of transformers", ("transposed",), one(target_modules=["transposed"], fan_in_fan_out=True)),
    Row("embedding", ("embed",), one(target_modules=["embed"])),
    Row("embedding, fan_in_fan_out", ("embed", "transposed"), one(target_modules=["embed", "transposed"],
        fan_in_fan_out=True)),
    Row("scaled embedding", ("scaled",), one(target_modules=["scaled"])),
    Row("convolutions", CONVOLUTIONS, one(target_modules=list(CONVOLUTIONS))),
    Row("lora_bias", ("linear",), one(target_modules=LINEAR, lora_bias=True)),
    Row("lora_bias, transposed", ("transposed",), one(target_modules=["transposed"], lora_bias=True,
        fan_in_fan_out=True)),
    Row("lora_bias, convolutions", CONVOLUTIONS, one(target_modules=list(CONVOLUTIONS), lora_bias=True)),
    Row("rslora", ("linear",), one(target_modules=LINEAR, use_rslora=True)),
    Row("patterns", ("linear", "square"), one(target_modules=["linear", "square"], rank_pattern={"square": 2},
        alpha_pattern={"linear": 7})),
    Row("set_scale", ("linear", "embed"), one(target_modules=["linear", "embed"]), after=_rescaled),
    Row("scale_layer", ("linear",), one(target_modules=LINEAR, use_rslora=True), after=_scaled_layers),
    Row("two adapters", ("linear",), {"a": PLAIN, "b": {**PLAIN, "r": 2, "lora_bias": True}}),
    Row("adapters of different layers", ("linear", "square", "embed"), {"a": {"target_modules": ["linear", "embed"]},
        "b": {"target_modules": ["square", "embed"], "r": 2}}),
    Row("dora", ("linear", "slim"), one(target_modules=["linear", "slim"], use_dora=True), unmerges=False),
    Row("dora, transposed", ("transposed",), one(target_modules=["transposed"], use_dora=True, fan_in_fan_out=True),
        unmerges=False),
    Row("dora, embedding", ("embed", "scaled"), one(target_modules=["embed", "scaled"], use_dora=True),
        unmerges=False),
    Row("dora, convolutions", CONVOLUTIONS, one(target_modules=list(CONVOLUTIONS), use_dora=True), unmerges=False),
    Row("two dora", ("linear",), {"a": DORA, "b": {**DORA, "r": 2}}, unmerges=False),
    Row("plain, dora", ("linear",), {"a": {**PLAIN, "lora_bias": True}, "b": DORA}, unmerges=False),
    Row("dora, plain", ("linear",), {"a": DORA, "b": {**PLAIN, "lora_bias": True}}, unmerges=False),
    Row("dora between", ("square",), {"a": {"target_modules": ["square"]}, "b": {"target_modules": ["square"],
        "use_dora": True}, "c": {"target_modules": ["square"], "lora_bias": True}}, unmerges=False),
    Row("kasa", ("linear",), {"a": {**PLAIN, "kasa_config": _kasa()}}),
    Row("bd-lora, A", ("linear",), one(target_modules=LINEAR, r=4, use_bdlora=_bdlora(target_modules_bd_a=LINEAR))),
    Row("bd-lora, B", ("linear",), one(target_modules=LINEAR, r=4, use_bdlora=_bdlora(target_modules_bd_b=LINEAR))),
    Row("mica", ("linear", "embed"), one(target_modules=["linear", "embed"], init_lora_weights="mica"),
        initial=torch.float32),
    Row("pissa", ("linear",), one(target_modules=LINEAR, init_lora_weights="pissa"), initial=torch.float32),
    Row("attention", ("attention",), one(target_modules=["attention"])),
    Row("2-d parameter", ("square",), one(target_modules=[], target_parameters=["square.weight"])),
    Row("2-d parameter, oblong", ("slim",), one(target_modules=[], target_parameters=["slim.weight"])),
    Row("experts, both", FUSED, one(target_modules=[], target_parameters=BOTH)),
    Row("experts, both, rslora", FUSED, one(target_modules=[], target_parameters=BOTH[::-1], use_rslora=True)),
    Row("experts, gate_up", FUSED, one(target_modules=[], target_parameters=[n for n in BOTH if "gate" in n])),
    Row("experts, down", FUSED, one(target_modules=[], target_parameters=[n for n in BOTH if "down" in n])),
    Row("experts, two adapters", FUSED, {name: {"target_modules": [], "target_parameters": BOTH, "r": rank}
        for name, rank in (("a", 3), ("b", 2))}),
    Row("one expert", ("lonely",), one(target_modules=[], target_parameters=["lonely.gate_up_proj",
        "lonely.down_proj"])),
    Row("modules_to_save", ("head", "linear"), one(target_modules=LINEAR, modules_to_save=["head"])),
    Row("tokens", ("embed", "linear"), one(target_modules=LINEAR, trainable_token_indices={"embed": [2, 7, 3]})),
    Row("bias all", ("linear", "square"), one(target_modules=LINEAR, bias="all")),
    Row("bias lora_only", ("linear", "square"), one(target_modules=LINEAR, bias="lora_only")),
)  # fmt: skip


def _causal(name: str, adapters: Adapters, *, moe: bool = False, tied: bool = False, **row: Any) -> Row:
    def base() -> nn.Module:
        model: nn.Module = tiny_qwen3_moe() if moe else tiny_qwen2(tied=tied)
        return model

    return Row(name, (), adapters, base, **row)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CAUSAL: tuple[Row, ...] = (
    _causal("all linear", one(target_modules=ALL)),
    _causal("renamed", {"policy": {"target_modules": ALL}}),
    _causal("rslora and patterns", one(target_modules=ALL, use_rslora=True, rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 5})),
    _causal("two adapters", {"a": {"target_modules": ALL}, "b": {"target_modules": ["q_proj"], "r": 2}}),
    _causal("lora_bias", one(target_modules=["q_proj", "k_proj", "v_proj"], lora_bias=True)),
    _causal("dora", one(target_modules=ALL, use_dora=True), unmerges=False),
    _causal("embedding and head", one(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    _causal("tied, head only", one(target_modules=["lm_head"]), tied=True, mergeable=False),
    _causal("tied, embedding only", one(target_modules=["embed_tokens"]), tied=True, mergeable=False),
    _causal("tied, both ends alike", one(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        tied=True, mergeable=False),
    _causal("modules_to_save", one(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    _causal("tokens", one(target_modules=["q_proj"], trainable_token_indices=[1, 5, 130])),
    _causal("tokens, tied", one(target_modules=["q_proj"], trainable_token_indices=[1, 5, 130]), tied=True),
    _causal("bias all", one(target_modules=ALL, bias="all")),
    _causal("experts", one(target_modules=ATTENTION, target_parameters=_PARAMETERS), moe=True),
    _causal("experts, down only", one(target_modules=ATTENTION, target_parameters=_PARAMETERS[1:]), moe=True),
)  # fmt: skip
