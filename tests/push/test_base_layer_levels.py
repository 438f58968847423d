"""Base weights through one, two and three levels of `base_layer`, from senders that write `.base_layer.` and senders
that do not: the engines hold the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layers
from torch import nn

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.embedded.wrappers import unwrap
from engine_side.plan.post_load import reachable
from tests.conftest import perturb
from tests.engine_side import embedded_models as tiny
from tests.push.lora_rig import wrap
from tests.trainer_side.lora.oracle import untouched
from trainer_side.checkpoint import named_tensors

Named = list[tuple[str, torch.Tensor]]
Bits = dict[str, bytes]
FAMILIES = ("qwen2", "moe", "deepseek-v3")
STEPS = 4

ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 level": (1, {"wrap_linears": True}),
    "2 levels": (2, {"wrap_linears": True, "wrap_levels": 2}),
    "3 levels": (3, {"wrap_linears": True, "wrap_levels": 3}),
    "lora": (1, {"max_loras": 1}),
    "lora over 1": (2, {"max_loras": 1, "wrap_linears": True}),
    "lora over 2": (3, {"max_loras": 1, "wrap_linears": True, "wrap_levels": 2}),
}
"""How deep `qkv_proj` and its like lie, and the engine's options."""


@dataclass(frozen=True)
class Held:
    """Every tensor that a module of the engine can reach (closures included), by path without wrappers; what the engine
    computes."""

    bits: Bits
    logprobs: list[list[float]]


def held(engine: Engine) -> Held:
    bits: Bits = {}
    for path, module in engine.runner.model.named_modules():
        if unwrap(module) is not module:
            continue
        clean = path.replace(".base_layer", "")
        for name, tensor in reachable(module)[0].items():
            plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            bits[f"{clean}.{name}"] = plain.numpy().tobytes() + f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return Held(bits, engine.prompt_logprobs(tiny.prompts()))


# ---- senders --------------------------------------------------------------------------------------------------------


def hopped(name: str, hops: int) -> str:
    """`x.weight` -> `x.base_layer.weight`: what a wrapper of the sender makes of a name."""
    module, _, attribute = name.rpartition(".")
    return ".".join([module, *["base_layer"] * hops, attribute])


SENDERS: tuple[Callable[[int, str], int], ...] = (
    lambda k, name: 0,
    lambda k, name: int("proj" in name),
    lambda k, name: 3,
    lambda k, name: (0, 1, 0, 2)[k % 4],
)
"""How many levels a sender writes into its k-th name: none, one on linear layers, three everywhere, some names only."""


def written(named: Named, sender: Callable[[int, str], int]) -> Named:
    return [(hopped(name, sender(k, name)), tensor) for k, (name, tensor) in enumerate(named)]


# ---- what they have to make of an engine ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, a model after each of `STEPS` steps, and those models as checkpoint tensors."""

    folder: Path
    models: list[Any]
    tensors: list[Named]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def case(family: str) -> Case:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny.save(folder, family)
            models, tensors = [], []
            for step in range(STEPS):
                moved = copy.deepcopy(model)
                perturb(moved, seed=step + 1)
                with torch.no_grad():
                    for buffer in (b for n, b in moved.named_buffers() if n in moved.state_dict()):
                        buffer.add_(0.1 * (step + 1))
                moved.save_pretrained(folder / str(step))
                models.append(moved)
                tensors.append(list(named_tensors(folder / str(step))))
            made[family] = Case(folder, models, tensors)
        return made[family]

    return case


@pytest.fixture(scope="module")
def wanted(cases: Callable[[str], Case]) -> Callable[[str, str], list[Held]]:
    """An engine without wrappers, loaded by plain names, after each step."""
    made: dict[tuple[str, str], list[Held]] = {}

    def want(family: str, layout: str) -> list[Held]:
        if (family, layout) not in made:
            case, found = cases(family), []
            with Engine(EngineConfig(str(case.folder), layout=layout)) as engine, bridge.attach(engine) as b:
                for tensors, model in zip(case.tensors, case.models, strict=True):
                    b.push(tensors)
                    found.append(held(engine))
                    reference = tiny.reference_logprobs(model, tiny.prompts())
                    assert tiny.mean_difference(found[-1].logprobs, reference) < 1e-4
            assert len({repr(one.logprobs) for one in found}) == STEPS, "steps that do not show test nothing"
            made[family, layout] = found
        return made[family, layout]

    return want


@pytest.fixture
def engine(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Iterator[Engine]:
    family, layout, kind = request.param
    levels, options = ENGINES[kind]
    with Engine(EngineConfig(str(cases(family).folder), layout=layout, **options)) as made:
        depth, layer = 0, made.runner.model.get_submodule("model.layers.1.self_attn.o_proj")
        while "base_layer" in dict(layer.named_children()):
            depth, layer = depth + 1, layer.get_submodule("base_layer")
        assert depth == levels
        yield made


ALL = [("qwen2", layout, kind) for layout in ("canonical", "packed") for kind in ENGINES]
ALL += [(family, layout, kind) for family in FAMILIES[1:] for layout, kind in zip(
    ("canonical", "packed", "canonical", "packed", "canonical", "packed"), ENGINES, strict=True)]  # fmt: skip


@pytest.mark.parametrize("engine", ALL, indirect=True, ids="-".join)
def test_unbound_senders_of_every_kind(
    engine: Engine,
    cases: Callable[[str], Case],
    wanted: Callable[[str, str], list[Held]],
    request: pytest.FixtureRequest,
) -> None:
    family, layout, _ = request.node.callspec.params["engine"]
    case, want = cases(family), wanted(family, layout)
    with bridge.attach(engine) as b:
        for step, sender in enumerate(SENDERS):
            named = written(case.tensors[step], sender)
            assert (step == 0) == (named == case.tensors[step] or not any("base_layer" in n for n, _ in named))
            assert b.push(named).verified is True
            assert_same(held(engine), want[step])


def assert_same(got: Held, want: Held) -> None:
    assert got.bits.keys() == want.bits.keys()
    differing = [name for name, bits in got.bits.items() if bits != want.bits[name]]
    assert not differing
    assert got.logprobs == want.logprobs


BOUND = [(family, *how) for family in FAMILIES for how in (("canonical", "2 levels"), ("packed", "lora over 2"))]


@pytest.mark.parametrize("engine", BOUND, indirect=True, ids="-".join)
def test_bound_senders_of_every_kind(
    engine: Engine,
    cases: Callable[[str], Case],
    wanted: Callable[[str, str], list[Held]],
    request: pytest.FixtureRequest,
) -> None:
    """The live model's own names, and these with levels written into them."""
    family, layout, _ = request.node.callspec.params["engine"]
    case, want = cases(family), wanted(family, layout)
    model = copy.deepcopy(case.models[0])
    with bridge.attach(engine, model=model) as b:
        for step, sender in enumerate(SENDERS):
            model.load_state_dict(case.models[step].state_dict())
            assert b.push(written(list(model.named_parameters()), sender)).verified is True
            assert_same(held(engine), want[step])


# ---- models that are wrapped themselves -----------------------------------------------------------------------------

TARGETS = {
    "qwen2": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
    "moe": ["k_proj", "o_proj", "lm_head"],
    "deepseek-v3": ["q_a_proj", "kv_b_proj", "lm_head"],
}
"""Some of each family's layers: their names have a level, the others' have not."""


@pytest.mark.parametrize(
    ("layout", "kind"), [("canonical", "plain"), ("canonical", "lora over 2"), ("packed", "1 level")]
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
def test_the_base_of_a_peft_model(
    cases: Callable[[str], Case],
    wanted: Callable[[str, str], list[Held]],
    family: str,
    layout: str,
    kind: str,
    bound: bool,
) -> None:
    """Bound: `push(peft.named_parameters(), mode="base")`. Unbound: a sender that filters its adapters out and leaves
    the rest of PEFT's names as they are."""
    case, want = cases(family), wanted(family, layout)
    options = ENGINES[kind][1] if kind in ENGINES else {}
    model = wrap(copy.deepcopy(case.models[1]), target_modules=TARGETS[family])
    with Engine(EngineConfig(str(case.folder), layout=layout, **options)) as engine:
        if bound:
            with untouched(model), bridge.attach(engine, model=model) as b:
                receipt = b.push(model.named_parameters(), mode="base")
        else:
            with bridge.attach(engine) as b:
                receipt = b.push(checkpoint_form(model, case.tensors[1]))
        assert receipt.verified is True
        assert_same(held(engine), want[1])


def checkpoint_form(model: Any, tensors: Named) -> Named:
    """The checkpoint's tensors under the names that a PEFT model has for them."""
    paths = {path for path, _ in model.get_base_model().named_modules()}
    wrapped = {path for path in paths if f"{path}.base_layer" in paths}
    named = []
    for name, tensor in tensors:
        module = name.rpartition(".")[0]
        named.append((f"base_model.model.{hopped(name, int(module in wrapped))}", tensor))
    assert any("base_layer" in name for name, _ in named)
    return named


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("kind", ["plain", "3 levels", "lora"])
def test_a_bound_model_that_was_wrapped_several_times(
    cases: Callable[[str], Case], wanted: Callable[[str, str], list[Held]], kind: str, levels: int
) -> None:
    """Adapters over adapters: `q_proj.base_layer.base_layer.weight`; another layer only once."""
    case, want = cases("qwen2"), wanted("qwen2", "packed")
    model = copy.deepcopy(case.models[2])
    for layer in model.model.layers:
        layer.self_attn.q_proj = stacked(layer.self_attn.q_proj, levels)
        layer.mlp.down_proj = stacked(layer.mlp.down_proj, 1)
    options = ENGINES[kind][1] if kind in ENGINES else {}
    config = EngineConfig(str(case.folder), layout="packed", **options)
    deep = f"model.layers.0.self_attn.q_proj.{'base_layer.' * levels}weight"
    assert deep in dict(model.named_parameters())
    with Engine(config) as engine, bridge.attach(engine, model=model) as b, untouched(model):
        assert b.push(model.named_parameters(), mode="base").verified is True
        assert_same(held(engine), want[2])


def stacked(layer: nn.Module, levels: int) -> nn.Module:
    for k in range(levels):
        config = LoraConfig(r=2, lora_alpha=32, init_lora_weights=False)
        layer = peft_layers.Linear(layer, f"level{k}", config=config, r=2, lora_alpha=32)
    return layer.eval()


def test_two_names_for_one_tensor_are_refused(cases: Callable[[str], Case]) -> None:
    case = cases("qwen2")
    name = "model.layers.0.self_attn.q_proj.weight"
    twice = [*case.tensors[1], (hopped(name, 2), dict(case.tensors[1])[name])]
    with Engine(EngineConfig(str(case.folder), wrap_linears=True)) as engine, bridge.attach(engine) as b:
        before = held(engine)
        with pytest.raises(bridge.DuplicateTensor, match=r"q_proj\.base_layer\.base_layer\.weight"):
            b.push(twice)
        assert_same(held(engine), before)
