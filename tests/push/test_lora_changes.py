"""What happens to a bound LoRA model between pushes, and during one: served right or refused by name, never wrong."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import bridge
from bridge.errors import BridgeError, IntegrityError, MissingTensor, UnsupportedLora
from tests.push.lora_rig import LoraRig, apart, everything, stir
from tests.push.rig import PROMPTS, refused
from trainer_side.lora import lora_form as adapters
from trainer_side.lora import modes
from trainer_side.reference import reference_logprobs
from trainer_side.snapshot.snapshotter import Snapshotter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
MODES = ("base", "adapter", "merged")
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, target_modules=TARGETS)


def layers(model: Any) -> Any:
    return model.get_base_model().model.layers


# ---- between two pushes ---------------------------------------------------------------------------------------------


def added(model: Any) -> None:
    """Another adapter that does not act: PEFT leaves the first one active."""
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=7, target_modules=["k_proj", "v_proj"]))
    _everything_moves(model)


def added_and_active(model: Any) -> None:
    added(model)
    model.base_model.set_adapter(["default", "other"])


def switched(model: Any) -> None:
    added(model)
    model.set_adapter("other")


def added_and_deleted(model: Any) -> None:
    added_and_active(model)
    model.delete_adapter("other")
    model.set_adapter("default")


def renamed(model: Any) -> None:
    """PEFT has no call for it: the same adapter under another name, the old one deleted."""
    model.add_adapter("policy", LoraConfig(r=3, lora_alpha=32, target_modules=TARGETS))
    with torch.no_grad():
        for module in model.modules():
            if "policy" in getattr(module, "lora_A", ()):
                module.lora_A["policy"].weight.copy_(module.lora_A["default"].weight)
                module.lora_B["policy"].weight.copy_(module.lora_B["default"].weight)
    model.set_adapter("policy")
    model.delete_adapter("default")


def rank_resized(model: Any) -> None:
    for layer in layers(model):
        _resize(layer.self_attn.q_proj, 5)


def replaced_by_a_plain_layer(model: Any) -> None:
    attention = layers(model)[0].self_attn
    old = attention.q_proj.base_layer
    attention.q_proj = nn.Linear(old.in_features, old.out_features)
    attention.q_proj.weight.data.copy_(old.weight.data)
    attention.q_proj.bias.data.copy_(old.bias.data)
    attention.q_proj.requires_grad_(False)


def replaced_by_another_wrapper(model: Any) -> None:
    attention = layers(model)[1].self_attn
    attention.v_proj = copy.deepcopy(attention.v_proj)
    with torch.no_grad():
        attention.v_proj.lora_B["default"].weight.mul_(-1)


def wrapped_once_more(model: Any) -> None:
    more = LoraConfig(r=2, lora_alpha=9, target_modules=["gate_proj"])
    model.add_adapter("gate", more)
    model.base_model.set_adapter(["default", "gate"])
    _everything_moves(model)


def rescaled(model: Any) -> None:
    _rescale(model, 0.2)


def _rescale(model: Any, scale: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)


def merged(model: Any) -> None:
    model.merge_adapter()


def merged_and_unmerged(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def deleted(model: Any) -> None:
    model.delete_adapter("default")


def unloaded(model: Any) -> None:
    model.unload()


def merged_and_unloaded(model: Any) -> None:
    model.merge_and_unload()


def switched_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _everything_moves(model: Any) -> None:
    """`stir` moves what trains, and PEFT lets only the active adapter train."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _resize(layer: Any, rank: int) -> None:
    """The same layer with adapters of another rank, at another scale."""
    base = layer.base_layer
    layer.lora_A["default"] = nn.Linear(base.in_features, rank, bias=False)
    layer.lora_B["default"] = nn.Linear(rank, base.out_features, bias=False)
    layer.r["default"], layer.scaling["default"] = rank, 32 / rank
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        nn.init.normal_(part.weight, std=0.05, generator=torch.Generator().manual_seed(4))


RIGHT = {"base", "merged", "adapter"}
CHANGES: tuple[tuple[Callable[[Any], None], set[str]], ...] = (
    (added, RIGHT),
    (added_and_active, RIGHT),
    (switched, RIGHT),
    (added_and_deleted, RIGHT),
    (renamed, RIGHT),
    (rank_resized, RIGHT),
    (replaced_by_a_plain_layer, RIGHT),
    (replaced_by_another_wrapper, RIGHT),
    (wrapped_once_more, RIGHT),
    (rescaled, RIGHT),
    (merged_and_unmerged, {"base", "merged"}),
    (merged, {"merged"}),
    (deleted, {"base", "merged"}),
    (unloaded, {"base", "merged"}),
    (merged_and_unloaded, {"base", "merged"}),
    (switched_off, {"base", "merged"}),
)
"""What somebody does to the bound model, and the modes that can carry what is left."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("change", "right"), CHANGES, ids=lambda c: getattr(c, "__name__", ""))
def test_a_model_that_changed_between_pushes(
    make: Make, change: Callable[[Any], None], right: set[str], mode: str
) -> None:
    rig = make()
    first = rig.push(mode=mode)
    old = rig.truth() if mode != "base" else rig.base_truth()
    assert rig.serves(old)
    _changed(rig.model, change)
    twin = copy.deepcopy(rig.model)
    if mode in right:
        receipt = rig.push(mode=mode)
        assert receipt.version == first.version + 1
        assert rig.serves(_truth(twin, mode))
        return
    before = rig.answers(), rig.engine.adapters
    # PEFT's unmerge leaves other bits than the base that the engine serves
    words = "push mode='base' once" if change is merged_and_unmerged else f"cannot be pushed in {mode} mode"
    with refused(UnsupportedLora, 5, words) as caught:
        rig.push(mode=mode)
    assert caught.value.names
    assert caught.value.remedy
    assert (rig.answers(), rig.engine.adapters) == before
    assert rig.b.status().engines[0].serving == first.version


def _changed(model: Any, change: Callable[[Any], None]) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        change(model)
    model.eval()


def _truth(twin: Any, mode: str) -> list[list[float]]:
    """What the model computes now; on a copy, since PEFT's forward may write to it."""
    if mode == "base":
        twin.base_model.disable_adapter_layers()
    if not twin.peft_config:
        twin = twin.base_model.model  # PEFT's own forward looks for the adapter that was deleted
    return reference_logprobs(twin, PROMPTS)


@pytest.mark.parametrize("change", [added_and_active, rank_resized, renamed, deleted], ids=lambda c: c.__name__)
def test_changes_really_change(make: Make, change: Callable[[Any], None]) -> None:
    """The test above would pass without a second push if these did nothing."""
    rig = make()
    before, names = rig.truth(), [n for n, _ in rig.model.named_parameters()]
    _changed(rig.model, change)
    moved = apart(_truth(copy.deepcopy(rig.model), "merged"), before)
    assert moved > 0.01 or (change is renamed and [n for n, _ in rig.model.named_parameters()] != names)


def test_a_rank_that_grew_above_the_engines_is_refused_by_name(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    before = rig.answers()
    _resize(layers(rig.model)[0].self_attn.q_proj, 9)
    with refused(UnsupportedLora, 5, "rank 9", "8", 'mode="merged"'):
        rig.push(mode="adapter")
    assert rig.answers() == before
    assert rig.push().mode == "merged"
    assert rig.serves(rig.truth())


def test_the_former_names_of_a_changed_model_are_refused(make: Make) -> None:
    """An iterable that was collected before the change is of another model."""
    rig = make()
    stale = list(rig.model.named_parameters())
    rig.push(mode="merged")
    before = rig.answers()
    _changed(rig.model, renamed)
    with pytest.raises(bridge.UnexpectedTensor, match=r"lora_A\.default"):
        rig.b.push(stale, mode="merged")
    assert rig.answers() == before
    rig.push(mode="merged")
    assert rig.serves(rig.truth())


# ---- during a push --------------------------------------------------------------------------------------------------


def _in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def _while_writing(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], *, after: bool) -> None:
    """Somebody else's thread gets its turn inside the snapshot, once."""
    write, left = Snapshotter.write, [work]

    def interrupted(self: Snapshotter, *args: Any, **options: Any) -> Any:
        if left and not after:
            _in_a_thread(left.pop())
        written = write(self, *args, **options)
        if left and after:
            _in_a_thread(left.pop())
        return written

    monkeypatch.setattr(Snapshotter, "write", interrupted)


DURING: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
    "disabled": (switched_off, lambda model: model.base_model.enable_adapter_layers()),
    "merged": (merged, lambda model: model.unmerge_adapter()),
    "rescaled": (rescaled, lambda model: _rescale(model, 1.0)),
    "switched": (lambda model: model.base_model.set_adapter([]), lambda model: model.set_adapter("default")),
    "added": (added, lambda model: model.delete_adapter("other")),
}


@pytest.mark.parametrize("what", DURING)
@pytest.mark.parametrize("mode", MODES)
def test_state_that_changes_inside_the_snapshot_aborts_the_version(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str, what: str
) -> None:
    rig = make()
    rig.push(mode=mode)
    change, back = DURING[what]
    for after in (False, True):
        serving, before, names = rig.b.status().engines[0].serving, rig.answers(), rig.engine.adapters
        stir(rig.model, seed=77 + after)
        with monkeypatch.context() as patch:
            _while_writing(patch, lambda: _changed(rig.model, change), after=after)
            with refused(IntegrityError, 5, "changed while they were pushed", "between steps"):
                rig.b.push(rig.model.named_parameters(), mode=mode)
        info = rig.b.status()
        assert (info.engines[0].state, info.engines[0].serving, info.busy) == ("SERVING", serving, None)
        assert (rig.answers(), rig.engine.adapters) == (before, names)
        assert not rig.engine.paused
        _changed(rig.model, back)
        if (what, mode) == ("merged", "adapter"):
            rig.push(mode="base")  # the trainer's thread left other bits in its base
        rig.push(mode=mode)
        assert rig.serves(_truth(copy.deepcopy(rig.model), mode))


def test_disabled_while_one_layer_is_computed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the tensors: half of them with the adapters, half without."""
    rig = make()
    rig.push(mode="merged")
    before = rig.answers()
    stir(rig.model, seed=77)
    calls: list[int] = []
    effective: Any = vars(modes)["effective_weight"]

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            _in_a_thread(rig.model.base_model.disable_adapter_layers)
        return effective(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(modes, "effective_weight", interrupted)
        with refused(IntegrityError, 5, "changed while they were pushed"):
            rig.b.push(rig.model.named_parameters(), mode="merged")
    assert len(calls) >= 4
    assert rig.answers() == before
    rig.model.base_model.enable_adapter_layers()
    rig.push(mode="merged")
    assert rig.serves(rig.truth())


class Injected(Exception):
    pass


@pytest.mark.parametrize("mode", ["merged", "adapter", "base"])
def test_an_exception_inside_the_snapshot_leaves_the_trainer_as_it_was(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    rig = make()
    rig.push(mode=mode)
    before, names = rig.answers(), rig.engine.adapters
    rig.step()
    untouched = everything(rig.model)
    module, name = {
        "merged": (modes, "effective_weight"),
        "adapter": (adapters, "low_rank"),
        "base": (Snapshotter, "write"),
    }[mode]
    real, calls = getattr(module, name), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (1 if mode == "base" else 4):
            raise Injected("in the middle")
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises((Injected, BridgeError), match="in the middle"):
            rig.b.push(rig.model.named_parameters(), mode=mode)
    assert calls
    assert everything(rig.model) == untouched
    assert (rig.answers(), rig.engine.adapters) == (before, names)
    assert rig.b.status().engines[0].serving == 1
    assert rig.push(mode=mode).verified is True
    assert rig.serves(_truth(copy.deepcopy(rig.model), mode))


# ---- disabled around the push ---------------------------------------------------------------------------------------


def test_pushes_inside_disable_adapter(make: Make) -> None:
    rig = make()
    base = rig.base_truth()
    assert rig.push().mode == "adapter"
    adapter = rig.truth()
    with rig.model.disable_adapter():
        with refused(UnsupportedLora, 5, "no active adapter", 'mode="merged"'):
            rig.push(mode="adapter")
        assert rig.serves(adapter)
        receipt = rig.push()
        assert (receipt.mode, "no active adapter" in receipt.reason) == ("merged", True)
        assert any("disabled" in note for note in receipt.notes), receipt.notes
        assert rig.serves(base)
        assert rig.push(mode="base").verified is True
        assert rig.serves(base)
    assert rig.push(mode="adapter").verified is True
    assert rig.serves(adapter)
    with rig.model.disable_adapter():
        rig.push(mode="base")
        assert rig.serves(base, "base")
        assert rig.serves(adapter), "the base under a living adapter"
    assert rig.push(mode="merged").verified is True
    assert rig.serves(adapter)


# ---- subsets --------------------------------------------------------------------------------------------------------


def _of(model: Any, *words: str) -> list[tuple[str, torch.Tensor]]:
    named = [(n, p) for n, p in model.named_parameters() if all(word in n.split(".") for word in words)]
    assert named
    return named


def test_partial_merged(make: Make) -> None:
    """One layer's projection with its adapter: nothing else of the engine moves."""
    rig = make()
    with refused(MissingTensor, 5, "partial=True"):
        rig.b.push(_of(rig.model, "0", "q_proj"), mode="merged")
    live = {n: p.detach().clone() for n, p in rig.engine.runner.model.named_parameters()}
    receipt = rig.b.push(_of(rig.model, "0", "q_proj"), mode="merged", partial=True)
    assert receipt.verified is True
    now = dict(rig.engine.runner.model.named_parameters())
    moved = {n.replace(".base_layer", "") for n, before in live.items() if not torch.equal(before, now[n])}
    assert moved == {"model.layers.0.self_attn.qkv_proj.weight"}
    name = "model.layers.0.self_attn.qkv_proj.weight"
    layer = layers(rig.model)[0].self_attn.q_proj
    want = layer.base_layer.weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    assert (now[name][:48] - want).abs().max() < 1e-6
    assert torch.equal(now[name][48:], live[name][48:])


def test_partial_merged_with_what_trains_alone(make: Make) -> None:
    """The frozen half of a value is the bound model's; nothing has to be sent for that."""
    rig = make()
    rig.push(mode="merged")
    rig.step()
    trained = [(n, p) for n, p in rig.model.named_parameters() if p.requires_grad]
    receipt = rig.b.push(trained, mode="merged", partial=True)
    assert receipt.verified is True
    assert receipt.wire_nbytes == 2 * 4 * (48 * 48 + 24 * 48 + 48 * 48 + 48 * 80), "the weights that have an adapter"
    assert rig.serves(rig.truth())


def test_partial_base(make: Make) -> None:
    rig = make()
    rig.push(mode="adapter")
    adapter = rig.engine.adapter
    layers(rig.model)[1].mlp.down_proj.base_layer.weight.data.mul_(1.5)
    receipt = rig.b.push(_of(rig.model, "1", "down_proj", "base_layer"), mode="base", partial=True)
    assert receipt.verified is True
    assert rig.engine.adapter == adapter
    assert rig.serves(rig.truth())
    assert rig.serves(rig.base_truth(), "base")


def test_partial_adapter_is_whole(make: Make) -> None:
    """There is no half of an adapter: engines replace it as a whole, so the rest comes from the bound model."""
    rig = make()
    rig.push(mode="adapter")
    rig.step()
    with refused(MissingTensor, 5, "v_proj"):
        rig.b.push(_of(rig.model, "q_proj"), mode="adapter")
    receipt = rig.b.push(_of(rig.model, "q_proj"), mode="adapter", partial=True)
    assert receipt.tensors == 2 * len(TARGETS) * 2
    assert rig.serves(rig.truth())


# ---- other iterables over the same model ----------------------------------------------------------------------------


def _compiled(model: Any) -> Any:
    return torch.compile(model)


SENDERS: dict[str, Callable[[Any], Any]] = {
    "clones": lambda model: [(n, p.detach().clone()) for n, p in model.named_parameters()],
    "state_dict": lambda model: model.state_dict().items(),
    "state_dict mapping": lambda model: list(model.state_dict(keep_vars=True).items()),
    "generator": lambda model: ((n, p) for n, p in model.named_parameters()),
    "compiled": lambda model: _compiled(model).named_parameters(),
    "base model": lambda model: model.base_model.model.named_parameters(),
    "backwards": lambda model: reversed(list(model.named_parameters())),
}


@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("mode", MODES)
def test_any_iterable_over_the_model(make: Make, mode: str, sender: str) -> None:
    rig = make()
    for _ in range(2):
        rig.step()
        before = everything(rig.model)
        receipt = rig.b.push(SENDERS[sender](rig.model), mode=mode)
        assert everything(rig.model) == before
        assert receipt.verified is True
        assert rig.serves(_truth(copy.deepcopy(rig.model), mode))


def test_a_compiled_model_that_is_bound(make: Make) -> None:
    rig = make()
    compiled = _compiled(rig.model)
    rig.b.bind(compiled)
    for mode in ("adapter", "merged", "base"):
        rig.step()
        rig.b.push(compiled.named_parameters(), mode=mode, verify="weights")
        assert rig.serves(_truth(copy.deepcopy(rig.model), mode))


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_values_that_were_given_count_not_the_live_ones(make: Make, mode: str) -> None:
    """Clones of an earlier step: those are what was pushed."""
    rig = make()
    rig.step()
    clones, truth = SENDERS["clones"](rig.model), rig.truth()
    rig.step()
    assert apart(rig.truth(), truth) > 0.01
    rig.b.push(clones, mode=mode, verify="weights")
    assert rig.serves(truth)


# ---- without waiting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_goes_on_as_soon_as_push_returns(make: Make, mode: str) -> None:
    rig = make()
    for _ in range(3):
        rig.step()
        truth = _truth(copy.deepcopy(rig.model), mode)
        kept = copy.deepcopy(rig.model.state_dict())
        pending = rig.b.push(rig.model.named_parameters(), mode=mode, wait=False)
        with torch.no_grad():
            for parameter in rig.model.parameters():
                parameter.fill_(7.0)
        receipt = pending.result(60)
        assert receipt.verified is True
        assert rig.serves(truth)
        rig.model.load_state_dict(kept)


def test_the_adapter_may_be_deleted_as_soon_as_push_returns(make: Make) -> None:
    rig = make()
    truth = rig.truth()
    pending = rig.b.push(rig.model.named_parameters(), mode="adapter", wait=False)
    _changed(rig.model, deleted)
    assert pending.result(60).verified is True
    assert rig.serves(truth)
