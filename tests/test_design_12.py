"""The bugs that this project answers, line by line: one test per clause, through real pushes where it was
a push that went wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layers
from torch import nn

import bridge
from bridge.errors import ConfigError
from engine_side.embedded import layouts, loading
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.layers import LinearBase, MergedColumnParallelLinear
from engine_side.embedded.lora import BaseLayerWithLoRA
from engine_side.embedded.lora.layers import MergedColumnParallelLinearWithLoRA
from engine_side.embedded.mla import FusedQkvAProj
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from engine_side.embedded.wrappers import unwrap
from engine_side.engines.embedded import EmbeddedRankHost
from engine_side.live.inplace import AttributeSnapshot, Outcome, copy_or_rebind_param, diff
from tests.conftest import tiny_qwen2, tiny_qwen3_moe
from tests.engine_side.embedded_models import make_model
from tests.push.lora_rig import LoraRig, apart, stir, wrap
from tests.push.rig import Rig, refused, same_bits
from tests.trainer_side.lora.oracle import TOLERANCE, live_linear
from trainer_side.lora import lora_parameters
from trainer_side.lora.layers.values import LayerState

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
ATTENTION = "model.layers.1.self_attn"
LATENT_TARGETS = ["q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.fixture
def make(checkpoint: Callable[[Any], Path]) -> Iterator[Make]:
    """`make(base, engine={...}, **lora)`: a rig around PEFT on `base`, whose checkpoint the engine starts from."""
    made: list[LoraRig] = []

    def build(base: Any = None, *, engine: dict[str, Any] | None = None, **lora: Any) -> LoraRig:
        base = tiny_qwen2() if base is None else base
        folder = checkpoint(base)
        made.append(LoraRig(folder, wrap(base, **lora), **(engine or {})))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def model_of(rig: Any) -> Any:
    return rig.engine.runner.causal_lm


def at(rig: Any, path: str) -> Any:
    return model_of(rig).get_submodule(path)


def new_base(rig: LoraRig, seed: int = 5) -> dict[str, torch.Tensor]:
    """Every base tensor of the trainer becomes another, biases included; by checkpoint name."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in rig.model.get_base_model().named_parameters():
        if "lora_A" not in name and "lora_B" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_((noise * 0.05).to(parameter.dtype))
            found[name.replace(".base_layer", "")] = parameter.detach().clone()
    return found


# ---- SGLang #22169 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [{}, {"layout": "packed"}, {"wrap_linears": True, "wrap_levels": 2}], ids=str)
def test_sglang_22169_base_sync_into_wrapped_layers_with_bias(make: Make, engine: dict[str, Any]) -> None:
    rig = make(engine=engine)
    rig.push(mode="adapter")
    base = new_base(rig)
    assert rig.push(mode="base").verified is True
    wrapper = at(rig, f"{ATTENTION}.qkv_proj")
    assert isinstance(wrapper, BaseLayerWithLoRA)
    fused = torch.cat([base[f"{ATTENTION}.{part}_proj.bias"] for part in "qkv"])
    for bias in (unwrap(wrapper).bias, wrapper.bias):
        assert isinstance(bias, nn.Parameter)
        assert same_bits(bias, fused)
    assert rig.serves(rig.truth()), "weight, bias and the adapter above them"
    assert rig.serves(rig.base_truth(), "base")


def test_sglang_22169_a_bias_that_moves_alone_moves_the_engine(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    before = rig.answers()
    live = rig.model.get_base_model().model.layers[0].self_attn
    for part in (live.q_proj, live.k_proj, live.v_proj):
        part.base_layer.bias.data.add_(0.5)
    rig.push(mode="base")
    assert apart(rig.answers(), before) > 0.01
    assert rig.serves(rig.truth())


def test_sglang_22169_bias_is_exposed_also_where_it_is_none(make: Make) -> None:
    rig = make()
    rig.push(mode="base")
    wrapper = at(rig, f"{ATTENTION}.o_proj")
    assert isinstance(wrapper, BaseLayerWithLoRA)
    assert "bias" in wrapper._parameters
    assert wrapper.bias is None
    assert unwrap(wrapper).bias is None
    assert at(rig, "lm_head").bias is None, "a head registers no bias at all"


def test_sglang_22169_named_parameters_shows_the_bias(make: Make) -> None:
    rig = make()
    rig.push(mode="base")
    shown = dict(model_of(rig).named_parameters())
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.qkv_proj"
        assert shown[f"{path}.bias"] is unwrap(at(rig, path)).bias
    assert sum(name.endswith(".bias") for name in shown) == 2


# ---- SGLang #22547 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sglang_22547_wrapper_exposes_num_embeddings(make: Make, tied: bool) -> None:
    rig = make(tiny_qwen2(tied=tied), target_modules=["embed_tokens", "q_proj"])
    for mode in ("base", "adapter"):
        rig.push(mode=mode)
        for path in ("model.embed_tokens", "lm_head"):
            wrapper = at(rig, path)
            assert isinstance(wrapper, BaseLayerWithLoRA)
            assert wrapper.num_embeddings == 131
            assert wrapper.num_embeddings_padded == 192
    assert rig.serves(rig.truth())


# ---- SGLang #21825 --------------------------------------------------------------------------------------------------

PATHS = [
    *((tiny_qwen2, layout, wrapped) for layout in LAYOUTS for wrapped in (False, True)),
    *((tiny_qwen3_moe, layout, True) for layout in LAYOUTS),
    *((lambda: make_model("deepseek-v3"), layout, True) for layout in ("transposed", "shuffled")),
]


@pytest.mark.parametrize(("base", "layout", "wrapped"), PATHS)
def test_sglang_21825_post_load_shuffles_in_place_on_every_path(
    checkpoint: Callable[[Any], Path], base: Any, layout: str, wrapped: bool
) -> None:
    """Addresses, strides, loaders, sharding attributes: all of a parameter but its values is what it was."""
    model = base()
    rig = Rig(checkpoint(model), model, wrap_linears=wrapped, max_loras=int(wrapped), layout=layout)
    try:
        before = AttributeSnapshot(model_of(rig))
        loaders = {n: p.weight_loader for n, p in model_of(rig).named_parameters() if hasattr(p, "weight_loader")}
        assert any("qkv" in n or "experts" in n or "fused" in n for n in loaders)
        for _ in range(2):
            receipt = rig.good_push()
            assert not [name for rank in receipt.engines[0].ranks for name in rank.rebound]
            assert diff(before, AttributeSnapshot(model_of(rig))) == []
        live = dict(model_of(rig).named_parameters())
        assert all(live[name].weight_loader == loader for name, loader in loaders.items())
    finally:
        rig.close()


def test_sglang_21825_sharding_attributes_follow_an_in_place_transpose(checkpoint: Callable[[Any], Path]) -> None:
    layer: Any = nn.Linear(4, 4, bias=False)
    weight = layer.weight
    weight.input_dim, weight.output_dim, weight.weight_loader = 1, 0, print
    value, address = weight.detach().clone(), weight.data_ptr()
    assert copy_or_rebind_param(layer, "weight", weight.data.t()) is Outcome.COPIED
    assert torch.equal(layer.weight, value.t())
    assert layer.weight is weight
    assert weight.data_ptr() == address
    assert (weight.input_dim, weight.output_dim, weight.weight_loader) == (0, 1, print)
    # and pushes leave what an engine's own transpose made of them
    model = tiny_qwen2(num_attention_heads=4, num_key_value_heads=4, hidden_size=48)
    rig = Rig(checkpoint(model), model, layout="transposed", wrap_linears=True)
    try:
        for _ in range(2):
            rig.good_push()
            square = at(rig, f"{ATTENTION}.o_proj").weight
            assert square.shape == (48, 48)
            assert (square.input_dim, square.output_dim) == (0, 1)
            assert same_bits(square.t().contiguous(), model.model.layers[1].self_attn.o_proj.weight.detach())
    finally:
        rig.close()


def test_sglang_21825_shapes_that_differ_rebind_under_the_same_object() -> None:
    layer: Any = nn.Linear(4, 6, bias=False)
    weight = layer.weight
    weight.input_dim, weight.output_dim, weight.weight_loader = 1, 0, print
    value = torch.randn(8, 4)
    assert copy_or_rebind_param(layer, "weight", value) is Outcome.REBOUND
    assert layer.weight is weight
    assert torch.equal(weight, value)
    assert (weight.input_dim, weight.output_dim, weight.weight_loader) == (1, 0, print)
    assert copy_or_rebind_param(layer, "weight", value.t()) is Outcome.REBOUND
    assert (weight.input_dim, weight.output_dim, weight.weight_loader) == (0, 1, print)


class Growing(layouts.PackedLinearMethod):
    """A post-load step whose workspace is larger whenever it runs: a kernel that chose another tile."""

    calls = 0

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        Growing.calls += 1
        layer.workspace = nn.Parameter(torch.zeros(Growing.calls), requires_grad=False)


def test_sglang_21825_a_push_that_has_to_rebind_says_so(
    checkpoint: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    grows = replace(layouts.layout_of("packed"), linear=Growing)
    monkeypatch.setattr("engine_side.embedded.runner.layout_of", lambda name: grows)
    monkeypatch.setattr(Growing, "calls", 0)
    model = tiny_qwen2()
    rig = Rig(checkpoint(model), model, wrap_linears=True)
    try:
        live = {n: p for n, p in model_of(rig).named_parameters() if n.endswith(".workspace")}
        assert len(live) == 8
        before = {name: (p.numel(), p.data_ptr()) for name, p in live.items()}
        receipt = rig.good_push()
        rebound = {name.replace(".base_layer", "") for rank in receipt.engines[0].ranks for name in rank.rebound}
        assert rebound == set(live)
        after = dict(model_of(rig).named_parameters())
        assert all(after[name] is p for name, p in live.items()), "the same objects"
        assert all((p.numel(), p.data_ptr()) != before[name] for name, p in live.items()), "other storage"
    finally:
        rig.close()


# ---- vLLM #35077 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [{}, {"layout": "packed"}, {"tensor_parallel_size": 2}], ids=str)
def test_vllm_35077_subclasses_of_merged_layers_are_wrapped_and_loaded(make: Make, engine: dict[str, Any]) -> None:
    """Both parts of DeepSeek's `fused_qkv_a_proj`: base weights through the wrapper, then adapters on it."""
    base = make_model("deepseek-v3", attention_bias=True)
    rig = make(base, target_modules=LATENT_TARGETS, engine=engine)
    wrapper = at(rig, f"{ATTENTION}.fused_qkv_a_proj")
    assert type(wrapper) is MergedColumnParallelLinearWithLoRA
    assert type(unwrap(wrapper)) is FusedQkvAProj
    sent = new_base(rig)
    assert rig.push(mode="base").verified is True
    if "layout" not in engine:
        for kind in ("weight", "bias"):
            parts = [sent[f"{ATTENTION}.{name}.{kind}"] for name in ("q_a_proj", "kv_a_proj_with_mqa")]
            assert same_bits(getattr(unwrap(wrapper), kind), torch.cat(parts))
    assert rig.serves(rig.base_truth())
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(rig.truth())
    assert apart(rig.answers(), rig.answers("base")) > 0.01


def test_vllm_35077_a_subclass_keeps_its_own_forward_when_unsharded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(make_model("deepseek-v3"), target_modules=LATENT_TARGETS)
    rig.push(mode="adapter")
    truth, calls, own = rig.truth(), [], FusedQkvAProj.forward

    def counted(self: FusedQkvAProj, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return own(self, x)

    monkeypatch.setattr(FusedQkvAProj, "forward", counted)
    for adapter in ("base", "current"):
        calls.clear()
        rig.answers(adapter)
        assert len(set(map(id, calls))) == 3, f"each layer's own forward, {adapter}"
    assert rig.serves(truth)
    assert FusedQkvAProj.forward is not MergedColumnParallelLinear.forward


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllm_35077_quant_method_through_wrapper_chains(make: Make, layout: str, levels: int) -> None:
    rig = make(engine={"layout": layout, "wrap_linears": True, "wrap_levels": levels})
    wrapper = at(rig, f"{ATTENTION}.qkv_proj")
    chain = [wrapper]
    while "base_layer" in chain[-1]._modules:
        chain.append(chain[-1].base_layer)
    assert len(chain) == levels + 2
    core = chain[-1]
    assert isinstance(core, LinearBase)
    assert all(link.quant_method is core.quant_method for link in chain)
    # and the sync finds it there: a packed or shuffled layer is only right after its own post-load step
    new_base(rig)
    assert rig.push(mode="base").verified is True
    assert rig.serves(rig.base_truth())
    host = EmbeddedRankHost(rig.engine.runner)
    x = torch.randn(3, 48)
    assert all(torch.equal(host.apply(link, x), host.apply(core, x)) for link in chain)
    run: list[Any] = []
    core.quant_method = SimpleNamespace(process_weights_after_loading=run.append)
    assert all(host.post_load(link) for link in chain)
    assert [layer is core for layer in run] == [True] * len(chain), "on the layer itself, from every link"


def test_vllm_35077_the_warm_up_rank_is_what_sharded_experts_need(
    checkpoint: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint(tiny_qwen3_moe()))
    ranks: list[int] = []
    write = BaseLayerWithLoRA.write

    def noted(self: BaseLayerWithLoRA, slot: int, key: Any, a: torch.Tensor, b: torch.Tensor) -> None:
        ranks.append(a.shape[0])
        write(self, slot, key, a, b)

    monkeypatch.setattr(BaseLayerWithLoRA, "write", noted)
    for size, most in ((1, 1), (2, 2), (2, 7), (4, 4)):
        ranks.clear()
        config = EngineConfig(folder, tensor_parallel_size=size, max_loras=1, max_lora_rank=most)
        ModelRunner(config, Parallel(0, size))
        assert set(ranks) == {size}
    for size, most in ((2, 1), (4, 3)):
        config = EngineConfig(folder, tensor_parallel_size=size, max_loras=1, max_lora_rank=most)
        with refused(ConfigError, 2, "max_lora_rank", f"at least {size}", f"got: {most}", f"max_lora_rank={size}"):
            ModelRunner(config, Parallel(0, size))
    # a need of experts only: without adapters on them any rank will do
    config = EngineConfig(folder, tensor_parallel_size=2, max_loras=1, max_lora_rank=1, lora_targets=("q_proj",))
    ModelRunner(config, Parallel(0, 2))


@pytest.mark.parametrize("target", ["input_layernorm", "self_attn", "mlp"])
def test_vllm_35077_an_unwrappable_module_that_was_asked_for_is_an_error(
    checkpoint: Callable[[Any], Path], target: str
) -> None:
    folder = str(checkpoint(tiny_qwen2()))
    config = EngineConfig(folder, max_loras=1, lora_targets=("q_proj", target))
    with refused(ConfigError, 2, "cannot carry", f"model.layers.0.{target}", repr(target), "lora_targets"):
        ModelRunner(config, Parallel())


class Unwrappable(nn.Module):
    """A layer with a matrix for which there is no wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(48, 48), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x @ self.weight


def test_vllm_35077_an_unwrappable_module_that_nobody_asked_for_is_a_warning(
    checkpoint: Callable[[Any], Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_checkpoint

    def with_a_stranger(model: Any, folder: Path) -> None:
        load(model, folder)
        for layer in model.model.layers:
            layer.mlp = nn.Sequential(layer.mlp, Unwrappable())

    monkeypatch.setattr("engine_side.embedded.runner.load_checkpoint", with_a_stranger)
    folder = str(checkpoint(tiny_qwen2()))
    with caplog.at_level(logging.WARNING):
        made = ModelRunner(EngineConfig(folder, max_loras=1), Parallel())
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in ("Unwrappable", "2 layers", "model.layers.0.mlp.1"))
    assert isinstance(made.causal_lm.get_submodule(f"{ATTENTION}.qkv_proj"), BaseLayerWithLoRA), "the others are"
    caplog.clear()
    with pytest.raises(ConfigError, match="Unwrappable"):
        ModelRunner(EngineConfig(folder, max_loras=1, lora_targets=("mlp.1",)), Parallel())


# ---- Unsloth, get_lora_parameters_bias ------------------------------------------------------------------------------


def factor(*shape: int, bias: torch.Tensor | None = None) -> Any:
    return SimpleNamespace(weight=torch.randn(*shape), bias=bias)


def fake(*, bias: bool = True, quant: Any = "nf4", **state: Any) -> Any:
    """What PEFT's layers look like to `get_lora_parameters_bias`: attributes, no module."""
    weight = torch.randn(6, 4)
    if quant is not None:
        weight.quant_state = quant  # type: ignore[attr-defined]
    base = SimpleNamespace(weight=weight, bias=torch.randn(6) if bias else None)
    return SimpleNamespace(**{
        "base_layer": base, "lora_A": {"x": factor(3, 4)}, "lora_B": {"x": factor(6, 3)}, "scaling": {"x": 32 / 3},
        "active_adapters": ["x"], "disable_adapters": False, "merged": False, **state,
    })  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("quant", ["nf4", None])
@pytest.mark.parametrize(
    ("state", "acts", "means"),
    [
        ({}, True, LayerState.ACTIVE),
        ({"disable_adapters": True}, False, LayerState.DISABLED),
        ({"merged": True}, False, LayerState.MERGED),
        ({"merged": True, "disable_adapters": True}, False, LayerState.MERGED_DISABLED),
        ({"active_adapters": ["absent here"]}, False, LayerState.ACTIVE),
        ({"active_adapters": ["absent here", "x"]}, True, LayerState.ACTIVE),
        ({"active_adapters": []}, False, LayerState.ACTIVE),
    ],
    ids=["active", "disabled", "merged", "merged disabled", "absent", "absent first", "none"],
)
def test_unsloth_get_lora_parameters_bias_every_branch(
    state: dict[str, Any], acts: bool, means: LayerState, quant: Any, bias: bool
) -> None:
    """Base bias and quant state in every branch, and always six things."""
    layer = fake(bias=bias, quant=quant, **state)
    found = lora_parameters(layer)
    six = tuple(found)
    assert len(six) == 6
    weight, quantised, a, b, scaling, base_bias = six
    assert weight is layer.base_layer.weight
    assert quantised == quant
    assert base_bias is layer.base_layer.bias
    want = (layer.lora_A["x"].weight, layer.lora_B["x"].weight, 32 / 3) if acts else (None, None, None)
    assert (a is want[0], b is want[1], scaling == want[2]) == (True, True, True)
    assert found.state is means


def test_unsloth_get_lora_parameters_bias_of_a_plain_layer() -> None:
    layer = nn.Linear(4, 6)
    assert [x is y for x, y in zip(lora_parameters(layer), (layer.weight, None, None, None, None, layer.bias))] == [
        True
    ] * 6
    assert lora_parameters(nn.Linear(4, 6, bias=False)).bias is None


def test_unsloth_get_lora_parameters_bias_does_not_lose_what_unsloth_loses() -> None:
    """The rest of the table: `modules_to_save` (AttributeError there), magnitudes, further adapters, lora_bias."""
    original, copied = nn.Linear(4, 6), nn.Linear(4, 6)
    saved = nn.Module()
    saved.original_module, saved.modules_to_save = original, nn.ModuleDict({"x": copied})
    saved.active_adapters, saved.disable_adapters = ["x"], False  # type: ignore[assignment]
    weight, quant, *factors, bias = lora_parameters(saved)
    assert (weight is copied.weight, quant, factors, bias is copied.bias) == (True, None, [None] * 3, True)
    layer = peft_layers.Linear(nn.Linear(4, 6), "x", LoraConfig(r=3, lora_alpha=32, use_dora=True), r=3, lora_alpha=32)
    assert lora_parameters(layer).loras[0].magnitude is layer.lora_magnitude_vector["x"].weight
    two = fake()
    two.lora_A["y"], two.lora_B["y"], two.scaling["y"] = factor(2, 4), factor(6, 2, bias=torch.ones(6)), 0.5
    two.active_adapters.append("y")
    found = lora_parameters(two)
    assert [(one.name, one.scaling) for one in found.loras] == [("x", 32 / 3), ("y", 0.5)]
    assert found.loras[1].bias is two.lora_B["y"].bias


@pytest.mark.parametrize("state", ["active", "disabled", "merged", "merged and disabled"])
def test_unsloth_get_lora_parameters_bias_reaches_the_engine(make: Make, state: str) -> None:
    """Qwen2's biases, which the broken function lost in three of four branches."""
    rig = make(scale=0.2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.normal_(generator=generator)
    twin = copy.deepcopy(rig.model)
    for model in (rig.model, twin):
        if "merged" in state:
            model.merge_adapter()
        if "disabled" in state:
            model.base_model.disable_adapter_layers()
    verify = "weights" if state == "merged and disabled" else None
    assert rig.push(mode="merged", verify=verify).verified is True
    assert rig.serves(rig.truth(twin))
    live = rig.model.get_base_model().model.layers[1].self_attn
    fused = torch.cat([getattr(live, f"{part}_proj").base_layer.bias for part in "qkv"])
    got: Any = unwrap(at(rig, f"{ATTENTION}.qkv_proj")).bias
    assert same_bits(got, fused.detach())


# ---- PEFT #2489 -----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("alpha", [32, 1.5])
@pytest.mark.parametrize("path", ["never merged", "merged", "merged and unmerged", "merged, then disabled"])
def test_peft_2489_merged_bias_is_b_plus_s_times_l(path: str, alpha: float) -> None:
    from peft import get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=["one"], lora_bias=True)
    model: Any = get_peft_model(Two().double(), config, autocast_adapter_dtype=False).eval()
    stir(model, seed=2, scale=0.3)
    layer = model.base_model.model.one
    b, added = layer.base_layer.bias.detach().clone(), layer.lora_B["default"].bias.detach().clone()
    want, bias = live_linear(layer, 8)
    scale = alpha / 3
    assert torch.allclose(bias, b + scale * added, rtol=0, atol=TOLERANCE)
    if path != "never merged":
        model.merge_adapter()
    if path == "merged and unmerged":
        model.unmerge_adapter()
    if path == "merged, then disabled":
        model.base_model.disable_adapter_layers()
        want, bias = live_linear(layer, 8)  # of a copy, whose forward unmerges
        assert torch.allclose(bias, b, rtol=0, atol=TOLERANCE)
    engine = Two().double()
    with bridge.attach(engine, model=model) as bridged:
        bridged.push(model.named_parameters(), mode="merged", verify="weights")
    assert (engine.one.bias - bias).abs().max() < TOLERANCE
    assert (engine.one.weight - want).abs().max() < TOLERANCE
    assert (engine.one.bias - (b + added)).abs().max() > 0.01, "alpha == r would hide the difference"
    assert torch.equal(engine.two.bias, model.base_model.model.two.bias)


def test_peft_2489_in_a_served_model(make: Make) -> None:
    rig = make(target_modules=["q_proj", "k_proj", "v_proj"], lora_bias=True, scale=0.1)
    rig.push(mode="merged")
    assert rig.serves(rig.truth())
    live = rig.model.get_base_model().model.layers[1].self_attn
    want = torch.cat([
        p.base_layer.bias + p.scaling["default"] * p.lora_B["default"].bias
        for p in (live.q_proj, live.k_proj, live.v_proj)
    ])  # fmt: skip
    got: Any = unwrap(at(rig, f"{ATTENTION}.qkv_proj")).bias
    assert (got - want).abs().max() < 1e-5
