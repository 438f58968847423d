"""Tensors without a place in the engine: unused where that is shown to be right, refused everywhere else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.coordinator.unused_tensors import find_unused
from bridge.errors import MissingTensor, UnexpectedTensor
from bridge.model.manifest import TensorInfo
from bridge.protocol.coordinator_messages import PlanRequest
from bridge.protocol.rank_jobs import RankBake
from engine_side.plan.unplaced import find_unplaced
from tests.conftest import perturb, tiny_qwen2
from tests.push.rig import Rig, drift, refused
from tests.push.test_fleet_faults import FleetSession, bridge_over
from trainer_side.independence import find_dependent
from trainer_side.names.naming import TensorPlace

Open = Callable[..., Rig]


@pytest.fixture
def started(new_folder: Callable[[], Path]) -> Iterator[Open]:
    """Starts an engine from the checkpoint of a model, and attaches it to a trainer's."""
    made: list[Rig] = []

    def start(of_engine: Any, trainer: Any, **options: Any) -> Rig:
        folder = new_folder()
        of_engine.save_pretrained(folder)
        made.append(Rig(folder, trainer, name=f"unused{len(made)}", **options))
        return made[-1]

    yield start
    for rig in made:
        rig.close()


def with_head(**changes: Any) -> Any:
    """A policy with a value head on it, of which the logits know nothing."""
    model = tiny_qwen2(**changes)
    model.v_head = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 1))
    return model


HEAD = ("v_head.0.weight", "v_head.0.bias", "v_head.1.weight", "v_head.1.bias")


def test_what_the_logits_do_not_depend_on_is_unused(started: Open) -> None:
    rig = started(tiny_qwen2(), with_head())
    for _ in range(3):
        rig.step()
        receipt = rig.push()
        assert receipt.verified is True
        assert set(receipt.unused[receipt.engines[0].id]) == set(HEAD)
        assert drift(rig.engine, rig.model) < 1e-3
    assert rig.b.arena is not None
    assert not rig.b.arena.manifest.by_name.keys() & set(HEAD), "what nobody reads does not travel"
    assert rig.b.rollback().unused == receipt.unused
    assert rig.b.history()[-1]["unused"] == {receipt.engines[0].id: sorted(HEAD, key=HEAD.index)}


def test_it_is_shown_once_for_a_layout(started: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer_side import trainer

    calls = []
    find = trainer.find_dependent
    monkeypatch.setattr(trainer, "find_dependent", lambda *a: calls.append(1) or find(*a))
    rig = started(tiny_qwen2(), with_head())
    for _ in range(3):
        rig.step()
        rig.push()
    assert len(calls) == 1
    rig.b.bind(rig.model)
    rig.push()
    assert len(calls) == 2, "another model may be bound now"


def test_a_subset_of_a_plan_may_hold_what_is_unused(started: Open) -> None:
    rig = started(tiny_qwen2(), with_head())
    some = [(n, p) for n, p in rig.named() if n.startswith(("v_head", "model.layers.1."))]
    with pytest.raises(UnexpectedTensor, match=r"without partial=True"):
        rig.b.push(some, partial=True)
    rig.push()
    rig.step()
    some = [(n, p) for n, p in rig.named() if n.startswith(("v_head", "model.layers.1."))]
    assert rig.b.push(some, partial=True).verified is True
    rest = [(n, p) for n, p in rig.named() if not n.startswith("v_head")]
    assert rig.b.push(rest, partial=True).verified is True
    assert drift(rig.engine, rig.model) < 1e-3


def test_unbound_the_remedy_is_to_bind(started: Open) -> None:
    rig = started(tiny_qwen2(), with_head(), bound=False)
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "v_head", "bind"):
        rig.push()
    rig.b.bind(rig.model)
    rig.good_push()


def test_a_model_made_in_inference_mode_shows_nothing(started: Open) -> None:
    with torch.inference_mode():
        model = with_head()
    rig = started(tiny_qwen2(), model)
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "v_head", "outside of inference_mode"):
        rig.push()
    rig.model = with_head()
    rig.b.bind(rig.model)
    rig.good_push()


def deeper() -> Any:
    return tiny_qwen2(num_hidden_layers=3)


SIZES = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def normed() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def plain() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def biased() -> Any:
    model = tiny_qwen2()
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = nn.Parameter(torch.randn(48))
    return model


class Choosing(nn.Module):
    """Its correction decides, as a router's does, and has no gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.correction = inner, nn.Embedding(1, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) * (1 + self.correction.weight[0].argmax())


def chooses() -> Any:
    model = tiny_qwen2()
    mlp = model.model.layers[0].mlp
    mlp.act_fn = Choosing(mlp.act_fn)
    return model


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize(
    ("engine", "trainer", "name"),
    [
        (tiny_qwen2, deeper, "model.layers.2."),
        (plain, normed, "q_norm"),
        (tiny_qwen2, biased, "down_proj.bias"),
        (tiny_qwen2, chooses, "act_fn.correction"),
    ],
)
def test_what_counts_is_refused(
    started: Open, engine: Callable[[], Any], trainer: Callable[[], Any], name: str, bound: bool
) -> None:
    rig = started(engine(), trainer(), bound=bound)
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, name, "expected", "got", "remedy") as caught:
        rig.push()
    assert "leave" not in str(caught.value), "left out, the engine would be wrong and verified"


def looped() -> Any:
    """Three layers, of which the third has the weights of the second."""
    model = deeper()
    second, third = model.model.layers[1], model.model.layers[2]
    for path, module in second.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            third.get_submodule(path).register_parameter(name, weight)
    return model


@pytest.mark.parametrize("bound", [True, False])
def test_a_layer_that_is_used_twice_needs_two_places(started: Open, bound: bool) -> None:
    model = looped()
    named = dict(model.named_parameters(remove_duplicate=False))
    rig = started(tiny_qwen2(), model, bound=bound)
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "model.layers.2.", "remedy"):
        rig.b.push(named)
    rig = started(deeper(), model, bound=bound)
    assert rig.b.push(named).verified is True
    assert not rig.b.history()[-1]["unused"]
    assert drift(rig.engine, model) < 1e-3


def test_a_layer_that_is_used_twice_is_not_dropped_where_its_name_is_not_sent(started: Open) -> None:
    """`named_parameters()` lists it once."""
    model = deeper()
    model.model.layers[2] = model.model.layers[1]
    for trainer in (looped(), model):
        rig = started(tiny_qwen2(), trainer)
        with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "model.layers.2."):
            rig.push()
    rig = started(deeper(), looped())
    rig.good_push()


@pytest.mark.parametrize("bound", [True, False])
def test_a_tied_head_needs_no_place_in_an_engine_that_ties_it(started: Open, bound: bool) -> None:
    rig = started(tiny_qwen2(tied=True), tiny_qwen2(tied=True), bound=bound)
    rig.step()
    assert rig.b.push(rig.model.state_dict()).verified is True
    assert drift(rig.engine, rig.model) < 1e-3


@pytest.fixture
def never_unties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded engine unties when asked to; vLLM and SGLang cannot."""
    monkeypatch.setattr("engine_side.embedded.runner.ModelRunner.untie", lambda self, names: False)


@pytest.mark.parametrize("bound", [True, False])
def test_an_untied_head_has_to_equal_what_the_engine_ties_it_to(started: Open, never_unties: None, bound: bool) -> None:
    model = tiny_qwen2(tied=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    rig = started(tiny_qwen2(tied=True), model, bound=bound)
    receipt = rig.push()
    assert receipt.verified is True
    assert receipt.unused == {receipt.engines[0].id: ("lm_head.weight",)}
    rig.step()
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "lm_head.weight", "tie them in the trainer"):
        rig.push()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert rig.push().verified is True
    assert drift(rig.engine, model) < 1e-3


def test_a_subset_changes_no_tensor_that_the_trainer_holds_apart(started: Open, never_unties: None) -> None:
    model = tiny_qwen2(tied=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    rig = started(tiny_qwen2(tied=True), model)

    def push(*names: str) -> bridge.Receipt:
        receipt: bridge.Receipt = rig.b.push([(n, p) for n, p in rig.named() if n in names], partial=True)
        return receipt

    rig.step()
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "lm_head.weight", "without partial=True"):
        push("model.embed_tokens.weight")
    push("model.norm.weight")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert rig.push().verified is True
    rig.step()
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "lm_head.weight", "tie them in the trainer"):
        push("model.embed_tokens.weight")


def test_a_subset_of_another_model_is_planned_anew(started: Open, never_unties: None) -> None:
    rig = started(tiny_qwen2(tied=True), tiny_qwen2(tied=True))
    embedding = [("model.embed_tokens.weight", rig.model.model.embed_tokens.weight)]
    assert rig.b.push(embedding, partial=True).verified is True
    rig.b.bind(tiny_qwen2(tied=False))
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "lm_head.weight", "without partial=True"):
        rig.b.push(embedding, partial=True)


def test_a_subset_unties_what_the_trainer_holds_apart(started: Open) -> None:
    model = tiny_qwen2(tied=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    rig = started(model_with_ties(model), model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    receipt = rig.b.push([(n, p) for n, p in rig.named() if n == "model.embed_tokens.weight"], partial=True)
    assert receipt.verified is True
    assert drift(rig.engine, model) < 1e-3


def model_with_ties(model: Any) -> Any:
    """The same weights, with a head that is the embedding."""
    made = tiny_qwen2(tied=True)
    made.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("lm_head")}, strict=False)
    return made


@pytest.mark.parametrize("bound", [True, False])
def test_a_wrong_namespace_is_refused(started: Open, bound: bool) -> None:
    rig = started(tiny_qwen2(), tiny_qwen2(), bound=bound)
    with rig.unmoved(), pytest.raises(UnexpectedTensor, match=r"model\.model\.layers"):
        rig.b.push([(n.replace("model.layers", "model.model.layers"), p) for n, p in rig.named()])


class Towered(nn.Module):
    """A trainer with a tower, and the same without it: as an engine it has something else in its place."""

    def __init__(self, tower: nn.Module | None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.tower = tower

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor | None = None) -> Any:
        from types import SimpleNamespace

        hidden = self.embed(input_ids)
        if pixels is not None:
            assert self.tower is not None
            hidden = hidden + self.tower(pixels)
        return SimpleNamespace(logits=self.head(hidden))


def tower() -> nn.Module:
    made = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(60)])
    return made


class Missing(nn.Module):
    """Holds nothing, and cannot be called."""


@pytest.mark.parametrize(
    ("standing", "bound", "allowed"),
    [
        (Missing, False, True),
        (Missing, True, True),
        (nn.Identity, False, False),
        (nn.Identity, True, True),
        (lambda: None, False, False),
        (lambda: None, True, True),
    ],
)
def test_a_tower_that_the_engine_was_started_without(standing: Callable[[], Any], bound: bool, allowed: bool) -> None:
    model, live = Towered(tower()), Towered(standing())
    with bridge.attach(live, model=model if bound else None) as b:
        if not allowed:
            with pytest.raises(UnexpectedTensor, match="bind"):
                b.push(model.state_dict())
            return
        receipt = b.push(model.state_dict())
        assert receipt.verified is True
        assert len(receipt.unused[receipt.engines[0].id]) == 60 * 7
        assert torch.equal(live.head.weight, model.head.weight)
        assert b.arena is not None
        assert set(b.arena.manifest.by_name) == {"embed.weight", "head.weight"}


class Layered(nn.Module):
    """Goes through as many more layers as it has."""

    def __init__(self, more: nn.Module) -> None:
        super().__init__()
        self.first, self.more = nn.Linear(4, 4), more


@pytest.mark.parametrize(
    ("none", "one"),
    [
        (nn.ModuleList, lambda: nn.ModuleList([nn.Linear(4, 4)])),
        (nn.ModuleDict, lambda: nn.ModuleDict({"a": nn.Linear(4, 4)})),
        (nn.ParameterList, lambda: nn.ParameterList([torch.ones(4)])),
    ],
)
def test_an_empty_list_of_layers_is_no_placeholder(none: Callable[[], Any], one: Callable[[], Any]) -> None:
    with bridge.attach(Layered(none())) as b, pytest.raises(UnexpectedTensor, match=r"more\..*bind"):
        b.push(Layered(one()).named_parameters())


def test_a_module_that_the_engine_uses_is_no_placeholder_under_another_prefix() -> None:
    live, model = Layered(Missing()), Layered(nn.Linear(4, 4))
    live.more.inside = nn.Module()
    live.more.inside.add_module("first", Missing())
    model.first.scaling = nn.Linear(4, 4)
    with bridge.attach(live) as b, pytest.raises(UnexpectedTensor, match=r"first\.scaling.*bind"):
        b.push([(n, p) for n, p in model.named_parameters() if not n.startswith("more")])


def test_what_one_engine_uses_travels_for_it(new_folder: Callable[[], Path]) -> None:
    model, text, image = Towered(tower()), Towered(Missing()), Towered(tower())
    session = FleetSession([text, image], new_folder())
    with bridge_over(session) as b:
        b.bind(model)
        receipt = b.push(model.named_parameters())
        assert receipt.verified is True
        assert list(receipt.unused) == [receipt.engines[0].id]
        assert all(torch.equal(t, image.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_tower_that_the_text_needs_is_refused() -> None:
    class Needs(Towered):
        def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor | None = None) -> Any:
            return super().forward(input_ids, torch.zeros(3, 16))

    model = Needs(tower())
    with bridge.attach(Towered(None), model=model) as b, pytest.raises(UnexpectedTensor, match=r"tower\.0\.0"):
        b.push(model.named_parameters())


class WithValueHead(nn.Module):
    """As TRL's `AutoModelForCausalLMWithValueHead`: the policy inside, and no `logits` in what it answers."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.pretrained_model = policy
        self.v_head = nn.ModuleDict({"summary": nn.Linear(48, 1)})

    def forward(self, input_ids: torch.Tensor) -> Any:
        out = self.pretrained_model(input_ids=input_ids, output_hidden_states=True)
        return out.logits, None, self.v_head["summary"](out.hidden_states[-1])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_policy_inside_a_wrapper_with_a_value_head(started: Open, tied: bool, inner: bool) -> None:
    policy = tiny_qwen2(tied=tied)
    model = WithValueHead(policy)
    rig = started(tiny_qwen2(tied=tied), model)
    for _ in range(2):
        rig.step()
        receipt = rig.b.push((policy if inner else model).named_parameters())
        assert receipt.verified is True
        assert receipt.engines[0].canary is not None
        assert drift(rig.engine, policy) < 1e-3
    assert bool(receipt.unused) is not inner


@pytest.mark.parametrize("outside", [True, False])
def test_a_policy_with_lora_inside_a_wrapper_is_what_to_bind(started: Open, outside: bool) -> None:
    peft = pytest.importorskip("peft")
    wrap = partial(peft.get_peft_model, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model: Any = wrap(WithValueHead(tiny_qwen2())) if outside else WithValueHead(wrap(tiny_qwen2()))
    rig = started(tiny_qwen2(), model)
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, "pretrained_model", "bind the policy") as caught:
        rig.push(mode="merged")
    path = re.search(r"b\.bind\(model\.([\w.]+)\)", caught.value.remedy)
    assert path is not None
    policy = model.get_submodule(path[1])
    perturb(policy, seed=1)
    rig.b.bind(policy)
    assert rig.b.push(policy.named_parameters(), mode="merged").verified is True
    assert drift(rig.engine, policy) < 1e-3


class Around(nn.Module):
    """Adds to what the policy inside answers."""

    def __init__(self, policy: Any, how: str) -> None:
        super().__init__()
        self.policy, self.how = policy, how
        self.prompt = nn.Parameter(torch.randn(4, 48, generator=torch.Generator().manual_seed(0)))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 131))

    def forward(self, input_ids: torch.Tensor) -> Any:
        if self.how == "prompt":
            embedded = self.policy.get_input_embeddings()(input_ids)
            embedded = torch.cat([self.prompt.expand(len(input_ids), -1, -1), embedded], dim=1)
            out = self.policy(inputs_embeds=embedded)
            out.logits = out.logits[:, len(self.prompt) :]
            return out
        logits = self.policy(input_ids=input_ids).logits
        return (logits + self.bias, None) if self.how == "bias" else {"scores": logits * 3}


@pytest.mark.parametrize("how", ["prompt", "bias"])
def test_what_is_around_a_policy_and_changes_its_logits_is_not_unused(started: Open, how: str) -> None:
    rig = started(tiny_qwen2(), Around(tiny_qwen2(), how))
    with rig.unmoved(then_push=False), refused(UnexpectedTensor, 5, f"{how} ->"):
        rig.push()


@pytest.mark.parametrize("how", ["prompt", "bias", "scale"])
def test_what_is_around_a_policy_counts_in_the_canary(started: Open, how: str) -> None:
    rig = started(tiny_qwen2(), Around(tiny_qwen2(), how))
    perturb(rig.model.policy, seed=1)
    with pytest.raises(bridge.PushAborted) as caught:
        rig.b.push(rig.model.policy.named_parameters(), canary_limit=1e-4)
    assert isinstance(caught.value.__cause__, bridge.CanaryMismatch)
    rig.b.bind(rig.model.policy)
    assert rig.b.push(rig.model.policy.named_parameters(), canary_limit=1e-4).verified is True


def test_a_policy_must_come_whole(started: Open) -> None:
    model = WithValueHead(tiny_qwen2())
    rig = started(tiny_qwen2(), model)
    with pytest.raises(MissingTensor, match=r"model\.norm"):
        rig.b.push([(n, p) for n, p in rig.named() if "model.norm" not in n])
    rig.b.bind(nn.ModuleDict({"one": tiny_qwen2(), "other": tiny_qwen2()}))
    with pytest.raises(UnexpectedTensor, match="pretrained_model"):
        rig.b.push(rig.named())


def foresees(shared: bool) -> Any:
    """A layer for speculation behind the last one, that the forward does not run, with the embedding of the model or
    one of its own."""
    model = tiny_qwen2()
    more = deeper().model.layers[2]
    more.eh_proj = nn.Linear(96, 48, bias=False)
    more.embed_tokens = nn.Embedding(131, 48)
    if shared:
        more.embed_tokens.weight = model.model.embed_tokens.weight
    model.model.layers.append(more)
    return model


@pytest.mark.parametrize("shared", [True, False])
def test_a_layer_for_speculation_is_unused(started: Open, shared: bool) -> None:
    rig = started(tiny_qwen2(), foresees(shared))
    rig.step()
    receipt = rig.push()
    assert receipt.verified is True
    (unused,) = receipt.unused.values()
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.embed_tokens.weight"} <= set(unused)
    assert all(name.startswith("model.layers.2.") for name in unused)
    assert drift(rig.engine, rig.model) < 1e-3


def test_a_name_that_may_mean_two_tensors_is_tied_to_none() -> None:
    made: Any = nn.ModuleDict({path: nn.ModuleDict({"out": nn.Linear(2, 2, bias=False)}) for path in ("a", "b")})
    targets = dict(made.named_parameters())
    filled = {"a.out.weight": "a.in.weight", "b.out.weight": "b.in.weight"}
    names = ["out.weight", "model.a.out.weight"]
    found = find_unplaced(names, made, targets, filled, frozenset(filled.values()))
    assert found.partners == {"model.a.out.weight": "a.in.weight"}


@pytest.mark.parametrize(
    ("dtype", "shape", "allowed"), [("fp32", (2, 2), True), ("bf16", (3, 2), False), ("int8", (2, 2), False)]
)
def test_what_cannot_equal_the_tensor_that_an_engine_ties_it_to_is_refused(
    dtype: str, shape: tuple[int, ...], allowed: bool
) -> None:
    request = PlanRequest((TensorInfo("a.weight", "bf16", (2, 2)), TensorInfo("b.weight", dtype, shape)), False, False)
    bake = RankBake(b"", {}, unread=("b.weight",), partners={"b.weight": "a.weight"})
    if allowed:
        assert find_unused(request, {"engine": [bake]}).partners == {"b.weight": "a.weight"}
        return
    with pytest.raises(UnexpectedTensor, match=r"b\.weight"):
        find_unused(request, {"engine": [bake]})


def test_what_is_looked_at_has_to_be_plain() -> None:
    """What hangs on a tensor of another class may reach the logits in ways of its own."""

    class Marked(nn.Parameter):
        pass

    model = with_head()
    places = {name: (TensorPlace(model.v_head[1], name.rpartition(".")[2]),) for name in HEAD[2:]}
    assert find_dependent(model, places) == []
    model.v_head[1].weight = Marked(torch.ones(1, 48))
    assert find_dependent(model, places) == [HEAD[2]]


def test_a_second_name_of_a_place_in_another_namespace_is_no_tie() -> None:
    made: Any = nn.ModuleDict({"a": nn.ModuleDict({"out": nn.Linear(2, 2, bias=False)})})
    filled = {"a.out.weight": "a.out.weight"}
    targets = dict(made.named_parameters())
    found = find_unplaced(["model.a.out.weight"], made, targets, filled, frozenset(filled))
    assert not found.partners


def test_buffers_that_no_checkpoint_holds_are_dropped(started: Open) -> None:
    rig = started(tiny_qwen2(), tiny_qwen2())
    assert dict(rig.model.named_buffers()), "the rotary embedding has some"
    for _ in range(2):
        rig.step()
        receipt = rig.b.push([*rig.model.named_buffers(), *rig.model.named_parameters()])
        assert (receipt.verified, receipt.unused) == (True, {})
        assert drift(rig.engine, rig.model) < 1e-3
