"""What is easy to get wrong in a push of a LoRA model: another thread at work, nothing sent, names that mislead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import bridge
from bridge.errors import ConfigError, IntegrityError, MissingTensor, UnsupportedLora
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, stir, wrap
from tests.push.rig import refused
from trainer_side.snapshot.snapshotter import Snapshotter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
MODES = ("merged", "base", "adapter")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def make(checkpoint: Callable[[Any], Path]) -> Iterator[Make]:
    made: list[LoraRig] = []

    def build(**lora: Any) -> LoraRig:
        base = tiny_qwen2()
        folder = checkpoint(base)
        made.append(LoraRig(folder, wrap(base, **{"target_modules": TARGETS, **lora})))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


# ---- another thread switches the layers off and on again while they are copied --------------------------------------


def _scale(model: Any, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


Change = Callable[[Any], None]
THERE_AND_BACK: dict[str, tuple[Change, Change]] = {
    "disable_adapter": (
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
    ),
    "set_scale": (lambda m: _scale(m, 2.0), lambda m: _scale(m, 0.5)),
    "set_adapter": (lambda m: m.base_model.set_adapter("other"), lambda m: m.base_model.set_adapter("default")),
    "merge": (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
}


@pytest.mark.parametrize("again", [False, True], ids=["first push", "as the last one"])
@pytest.mark.parametrize(
    ("mode", "what"),
    [(mode, what) for mode in ("merged", "adapter") for what in THERE_AND_BACK] + [("base", "merge")],
)
def test_a_change_that_is_taken_back_before_the_end_is_seen(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str, what: str, again: bool
) -> None:
    """At both ends of the snapshot the model is set alike; in between every layer was read in another state."""
    rig = make()
    rig.model.add_adapter("other", LoraConfig(r=2, lora_alpha=9, target_modules=TARGETS))
    stir(rig.model, seed=5)
    if again:
        rig.push(mode=mode)
    before = rig.answers()
    there, back = THERE_AND_BACK[what]
    write = Snapshotter.write

    def meanwhile(self: Snapshotter, *given: Any, **options: Any) -> Any:
        there(rig.model)
        try:
            return write(self, *given, **options)
        finally:
            back(rig.model)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshotter, "write", meanwhile)
        with refused(IntegrityError, 5, "LoRA layers changed while they were pushed"):
            rig.b.push(rig.model.named_parameters(), mode=mode, verify="weights")
    assert rig.answers() == before
    if what == "merge":
        rig.push(mode="base")  # unmerging left other bits in the base
    rig.push(mode=mode)
    assert rig.serves(rig.base_truth() if mode == "base" else rig.truth())


# ---- nothing, or nothing of it, was sent -----------------------------------------------------------------------------


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_was_sent(make: Make, mode: str, partial: bool) -> None:
    rig = make()
    full = dict(rig.model.named_parameters())
    for _ in range(2):  # the second time all of it is remembered
        rig.b.push(full, mode=mode, partial=partial, verify="weights")
    rig.step()
    spent = rig.model.named_parameters()
    assert list(spent)
    served = rig.b.status().engines[0].serving
    for nothing in ([], {}, spent):
        with refused(MissingTensor, 5, "nothing was sent", "only once"):
            rig.b.push(nothing, mode=mode, partial=partial)
    assert rig.b.status().engines[0].serving == served


@pytest.mark.parametrize(("mode", "kept"), [("adapter", False), ("auto", False), ("base", True)])
def test_a_part_that_has_nothing_to_do_with_the_mode(make: Make, mode: str, kept: bool) -> None:
    rig = make()
    part = [(n, p) for n, p in rig.model.named_parameters() if ("lora_A" in n.split(".")) is kept]
    if not kept:
        part = part[:1]
    with refused(MissingTensor, 5, "nothing that was sent belongs to", part[0][0], 'mode="merged"') as caught:
        rig.b.push(part, mode=mode, partial=True)
    assert caught.value.names == tuple(name for name, _ in part)
    rig.b.push(part, mode="base" if mode != "base" else "merged", partial=True, verify="weights")


@pytest.mark.parametrize("name", [None, 5, ("a",), b"x"], ids=repr)
def test_a_name_that_is_no_text(make: Make, name: Any) -> None:
    rig = make()
    for mode in MODES:
        with refused(ConfigError, 2, "(name, tensor) pairs", type(name).__name__, "item 0"):
            rig.b.push([(name, torch.zeros(2))], mode=mode)


# ---- models that look like others ------------------------------------------------------------------------------------


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[3, 1, 4, 1, 5]])).logits
    return found


@pytest.mark.parametrize("mode", ["merged", "base"])
def test_pefts_mixed_model_with_lora_alone(mode: str) -> None:
    engine = tiny_qwen2(seed=9)
    model: Any = get_peft_model(
        tiny_qwen2(), LoraConfig(r=2, lora_alpha=7, target_modules=["q_proj"]), mixed=True, adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=9, target_modules=["v_proj", "q_proj"]))
    model.set_adapter(["a", "b"])
    stir(model.eval(), seed=3)
    with bridge.attach(engine, model=model) as b:
        assert b.push(model.named_parameters(), mode=mode).verified is True
    if mode == "base":
        model.base_model.disable_adapter_layers()
    torch.testing.assert_close(_logits(engine), _logits(model))


class Blocks(nn.Module):
    """Layers whose names are those of PEFT's own modules and attributes."""

    NAMES = ("token_adapter", "base_layer", "lora_A", "original_module", "modules_to_save", "lora_B", "q")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = torch.tanh(child(x))
        return x


@pytest.mark.parametrize("targets", [None, ["q"], ["token_adapter", "q"]], ids=str)
def test_ordinary_modules_named_like_wrappers(targets: list[str] | None) -> None:
    engine = Blocks()
    model: Any = Blocks() if targets is None else wrap(Blocks(), target_modules=targets)
    with bridge.attach(engine, model=model) as b:
        b.push(model.named_parameters())
    x = torch.randn(3, 6)
    torch.testing.assert_close(engine(x), model(x))


# ---- what a refusal says ---------------------------------------------------------------------------------------------


def _first(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj


def test_factors_that_are_not_here_leave_the_base(make: Make) -> None:
    rig = make()
    _first(rig.model).lora_A.to("meta")
    for mode in ("merged", "adapter", "auto"):
        with refused(UnsupportedLora, 5, "q_proj", "its values are not here", "gather it first", 'mode="base"'):
            rig.b.push(rig.model.named_parameters(), mode=mode)
    assert rig.b.push(rig.model.named_parameters(), mode="base").verified is True


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_swapped_factors_are_refused_with_their_shapes(make: Make, mode: str) -> None:
    rig = make()
    layer = _first(rig.model)
    layer.lora_A["default"], layer.lora_B["default"] = layer.lora_B["default"], layer.lora_A["default"]
    a, b = (list(one["default"].weight.shape) for one in (layer.lora_A, layer.lora_B))
    with refused(UnsupportedLora, 5, f"adapter default cannot be pushed in {mode} mode", f"A {a}, B {b}") as caught:
        rig.b.push(rig.model.named_parameters(), mode=mode)
    other = "adapter" if mode == "merged" else "merged"
    assert f"in {other} mode" not in str(caught.value)


def test_a_refusal_speaks_of_what_is_there(make: Make) -> None:
    rig = make(target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    with refused(UnsupportedLora, 5, "aLoRA cannot be pushed in merged mode: its delta depends on the token") as caught:
        rig.b.push(rig.model.named_parameters(), mode="merged")
    assert "Arrow" not in str(caught.value)


def test_lora_over_a_parametrized_weight(make: Make) -> None:
    base = tiny_qwen2()
    nn.utils.parametrizations.weight_norm(base.model.layers[0].self_attn.q_proj)
    model = wrap(base, target_modules=["q_proj"])
    with bridge.attach(tiny_qwen2(), model=model) as b:
        way_out = "remove the parametrization first"
        with refused(UnsupportedLora, 5, "LoRA on a parametrized weight", way_out) as caught:
            b.push(model.named_parameters(), mode="merged")
    assert "quantised" not in str(caught.value)


def test_a_graph_made_before_the_push_still_works(make: Make) -> None:
    """The canary's forward goes through PEFT's parametrizations, which may raise version counters: no bytes move."""
    rig = make(target_modules=["v_proj"], target_parameters=["o_proj.weight"])
    loss = rig.model(torch.tensor([[3, 1, 4, 1, 5]])).logits.pow(2).sum()
    assert rig.push(mode="merged").verified is True
    loss.backward()
