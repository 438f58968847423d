"""Tensors that are refused, by the trainer or by the engine: each remedy ends in the trainer's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.errors import (
    ConfigError,
    DtypeMismatch,
    DuplicateTensor,
    IntegrityError,
    MissingTensor,
    NonFinite,
    ShapeMismatch,
    UnexpectedTensor,
    UnsupportedLora,
)
from tests.cases.raised import provoked
from tests.conftest import perturb, tiny_qwen2, tiny_qwen3_moe
from tests.push.rig import Rig

CHECKS, LAYOUT = "trainer_side/names/tensor_checks.py", "trainer_side/names/tensor_layout.py"
LOADER, MODULE = "engine_side/plan/loader_errors.py", "engine_side/engines/module.py"
UNUSED = "bridge/coordinator/unused_tensors.py"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(tiny_qwen2())


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[tuple[Rig, Rig]]:
    """A bound rig and an unbound one."""
    made = Rig(folder, tiny_qwen2()), Rig(folder, tiny_qwen2(), bound=False)
    yield made
    for one in made:
        one.close()


@pytest.fixture
def bound(shared: tuple[Rig, Rig]) -> Rig:
    return shared[0]


@pytest.fixture
def unbound(shared: tuple[Rig, Rig]) -> Rig:
    return shared[1]


class Partitioned(nn.Parameter):
    """A fake of what ZeRO-3 leaves in place of a parameter between steps: empty, with the whole shape noted."""

    ds_shape: torch.Size

    @classmethod
    def of(cls, whole: torch.Tensor) -> Partitioned:
        made = cls(torch.empty(0, dtype=whole.dtype), requires_grad=False)
        made.ds_shape = whole.shape
        return made


# ---- names, both sides ----------------------------------------------------------------------------------------------


def test_names(bound: Rig, unbound: Rig) -> None:
    whole = bound.named()
    with provoked(MissingTensor, "trainer_side/trainer.py: tensors of the bound model were not sent", "partial=True"):
        bound.b.push([(n, p) for n, p in whole if n != GATE])
    bound.good_push()
    receipt = bound.b.push([(n, p) for n, p in bound.named() if n != GATE], partial=True)
    assert receipt.verified is True
    assert bound.serves(bound.model), "a subset was meant: what did not come was the same"
    with provoked(UnexpectedTensor, f"{CHECKS}: the bound model has no tensor of this name", "b.bind(model)"):
        bound.b.push([(f"policy.{n}", p) for n, p in whole])
    with provoked(DuplicateTensor, f"{CHECKS}: the same tensor was sent twice"):
        bound.b.push([*whole, (GATE, whole[0][1])])
    bound.good_push()  # "push one iterable over one model"

    with provoked(MissingTensor, f"{LOADER}: the engine needs a tensor that was not sent", "partial=True"):
        unbound.b.push([(n, p) for n, p in unbound.named() if n != GATE])
    unbound.good_push()
    assert unbound.b.push([(n, p) for n, p in unbound.named() if n != GATE], partial=True).verified is True
    assert unbound.serves(unbound.model)


def test_a_tensor_that_the_engine_has_no_place_for(folder: Path) -> None:
    """Leaving it out would serve another model: the trainer computes with it."""
    other = tiny_qwen2(num_hidden_layers=3)
    rig = Rig(folder, other, bound=False)
    try:
        with pytest.raises(UnexpectedTensor) as caught:
            rig.push()
        assert "model.layers.2." in caught.value.names[0]
        assert "leave" not in str(caught.value.remedy)
        rig.b.bind(other)
        with pytest.raises(UnexpectedTensor, match="save_pretrained"):
            rig.push()
        rig.model = tiny_qwen2(seed=3)  # "a model of the engine's configuration"
        rig.b.bind(rig.model)
        rig.good_push()
    finally:
        rig.close()


def test_heads_beside_two_policies(folder: Path) -> None:
    """Which of them the engine runs cannot be known."""
    pair = nn.ModuleDict({"pretrained_model": tiny_qwen2(seed=4), "other": tiny_qwen2(seed=5)})
    rig = Rig(folder, pair["pretrained_model"], bound=False)
    try:
        rig.b.bind(pair)
        with pytest.raises(UnexpectedTensor, match="pretrained_model"):
            rig.b.push(pair.named_parameters())
        rig.b.bind(rig.model)
        rig.good_push()
    finally:
        rig.close()


def test_a_model_that_was_untied_after_it_was_bound(checkpoint: Callable[..., Path]) -> None:
    model = tiny_qwen2(tied=True)
    rig = Rig(checkpoint(model), model)
    try:
        rig.good_push()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)
        with provoked(DuplicateTensor, "trainer_side/names/ties.py: {}", "b.bind(model)", "tie_weights"):
            rig.push()
        rig.b.bind(model)  # "if the model was untied, bind it again"
        rig.good_push()
        model.tie_weights()
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
        rig.b.bind(model)
        rig.good_push()
    finally:
        rig.close()


def test_lora_names_without_a_model(unbound: Rig) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with provoked(UnsupportedLora, f"{LAYOUT}: LoRA parameters cannot be pushed without their model", "b.bind"):
        unbound.b.push([*unbound.named(), (name, torch.zeros(2, 48))])
    unbound.good_push()


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_a_transpose(unbound: Rig) -> None:
    unbound.good_push()
    unbound.step()
    turned = unbound.replaced(GATE, dict(unbound.named())[GATE].t())
    with pytest.raises(ShapeMismatch, match=r"remedy: push its transpose: tensor\.mT") as caught:
        unbound.b.push(turned)
    assert "[80, 48]" in str(caught.value.expected)
    assert unbound.b.push([(n, p.mT if n == GATE else p) for n, p in turned]).verified is True
    assert unbound.serves(unbound.model)


def test_another_shape_than_the_bound_models(bound: Rig) -> None:
    key = f"{CHECKS}: a tensor does not have the bound model's shape"
    resized = copy.deepcopy(bound.model)
    resized.resize_token_embeddings(135)
    with provoked(ShapeMismatch, key, "b.bind(model)", "resized") as caught:
        bound.b.push(resized.named_parameters())
    assert (caught.value.expected, caught.value.got) == ("[131, 48]", "[135, 48]")
    right = bound.model
    bound.b.bind(resized)
    with pytest.raises(ShapeMismatch, match="save_pretrained") as caught:
        bound.b.push(resized.named_parameters())
    assert "[131, 48]" in str(caught.value.expected), "not the rows that the engine pads them to"
    resized.resize_token_embeddings(131)
    bound.b.bind(resized)
    bound.model = resized
    bound.good_push()
    bound.model = right
    bound.b.bind(right)


@pytest.mark.parametrize("which", ["bound", "unbound"])
def test_a_placeholder_of_a_sharded_trainer(which: str, request: pytest.FixtureRequest) -> None:
    """Empty, and nothing else is known of it."""
    rig: Rig = request.getfixturevalue(which)
    with pytest.raises(ShapeMismatch, match=r"remedy: gather it.*GatheredParameters") as caught:
        rig.b.push(rig.replaced(GATE, torch.empty(0)))
    assert "80, 48" in str(caught.value.expected)
    rig.good_push()


def test_all_of_them_are_placeholders(unbound: Rig, checkpoint: Callable[..., Path]) -> None:
    """Few, and more than are reported one by one."""
    with pytest.raises(ShapeMismatch, match=r"remedy: gather it.*GatheredParameters"):
        unbound.b.push([(n, torch.empty(0)) for n, _ in unbound.named()])
    unbound.good_push()
    model = tiny_qwen2(num_hidden_layers=4)
    rig = Rig(checkpoint(model), model, bound=False)
    try:
        with pytest.raises(ShapeMismatch, match=r"32 more .*remedy: gather it.*GatheredParameters"):
            rig.b.push([(n, torch.empty(0)) for n, _ in rig.named()])
        rig.good_push()
    finally:
        rig.close()


@pytest.mark.parametrize("which", ["bound", "unbound"])
def test_a_partitioned_parameter(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    whole = dict(rig.named())[GATE]
    key = f"{CHECKS}: a tensor is partitioned over the ranks, and its values are not here"
    with provoked(IntegrityError, key, "GatheredParameters") as caught:
        rig.b.push(rig.replaced(GATE, Partitioned.of(whole)))
    assert (caught.value.expected, caught.value.got) == ("shape [80, 48]", "shape [0]")
    rig.good_push()


def test_a_model_that_is_bound_while_it_is_partitioned(checkpoint: Callable[..., Path]) -> None:
    """It is bound by its whole shapes and its ties, so that what is gathered later is right."""
    model = tiny_qwen2(tied=True)
    rig = Rig(checkpoint(model), model, bound=False)
    try:
        gathered = dict(model.named_parameters())
        placeholders = {id(p): Partitioned.of(p) for p in gathered.values()}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = placeholders[id(parameter)]
        rig.b.bind(model)
        with pytest.raises(IntegrityError, match="gather"):
            rig.b.push(model.named_parameters(), verify="weights")
        perturb(nn.ParameterList(gathered.values()))
        assert rig.b.push(gathered.items(), verify="weights").verified is True
        for module in model.modules():  # what leaving the gathering block brings back
            for name, parameter in module._parameters.items():
                whole = next((p for p in gathered.values() if placeholders[id(p)] is parameter), None)
                if whole is not None:
                    module._parameters[name] = whole
        assert rig.serves(model)
    finally:
        rig.close()


# ---- values ---------------------------------------------------------------------------------------------------------


def spoilt(name: str, tensor: torch.Tensor) -> Any:
    return {
        "meta": lambda: torch.empty_like(tensor, device="meta"),
        "sparse": lambda: tensor.to_sparse(),
        "complex": lambda: tensor.to(torch.complex64),
        "freed": lambda: _freed(tensor),
        "lazy": lambda: nn.LazyLinear(3).weight,
        "nan": lambda: torch.full_like(tensor, float("nan")),
        "codes": lambda: tensor.to(torch.int8),
        "fp8": lambda: tensor.to(torch.float8_e4m3fn),
    }[name]()


def _freed(tensor: torch.Tensor) -> torch.Tensor:
    gone = tensor.clone()
    gone.untyped_storage().resize_(0)
    return gone


@pytest.mark.parametrize("which", ["bound", "unbound"])
@pytest.mark.parametrize(
    ("way", "kind", "key", "word"),
    [
        ("meta", IntegrityError, f"{CHECKS}: a tensor on the meta device has no values to send", "materialise"),
        ("sparse", DtypeMismatch, f"{CHECKS}: only dense tensors travel", "to_dense"),
        ("complex", DtypeMismatch, "bridge/model/torch_dtypes.py: this dtype cannot travel", "convert"),
        ("freed", IntegrityError, f"{CHECKS}: a tensor has no storage of its own to copy from", "bring the weights"),
        ("lazy", IntegrityError, f"{CHECKS}: a lazy module's tensor has neither shape nor values yet", "one forward"),
        ("nan", NonFinite, "trainer_side/snapshot/finite.py: {} holds values that are not finite{}", "allow_nonfinite"),
        ("codes", DtypeMismatch, f"{LOADER}: {{}}", "values"),
        ("fp8", DtypeMismatch, f"{LOADER}: {{}}", "values"),
    ],
)  # fmt: skip
def test_values(which: str, way: str, kind: Any, key: str, word: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    rig.step()
    with provoked(kind, key, word):
        rig.b.push(rig.replaced(GATE, spoilt(way, dict(rig.named())[GATE])))
    rig.good_push()  # the same tensor: with its values, dense, as a float


def test_values_that_only_another_dtype_holds(checkpoint: Callable[..., Path]) -> None:
    """A counter that does not fit the engine's narrower one."""

    class Counts(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.register_buffer("count", torch.zeros(2, dtype=dtype))

    live, model = Counts(torch.int32), Counts(torch.int64)
    model.count += 2**40
    with bridge.attach(live, model=model) as b:
        with provoked(
            DtypeMismatch,
            "trainer_side/snapshot/value_checks.py: {} holds a value that its wire dtype does not",
            "engine's dtype",
        ):
            b.push(model.named_parameters())
        model.count -= 2**40
        assert b.push(model.named_parameters()).verified is True
        assert torch.equal(live.weight, model.weight)


def test_things_that_are_no_pairs(bound: Rig) -> None:
    for given in (3, ["a"], [("a", 1, 2)], [(1, torch.zeros(1))], bound.model, [(GATE, 5)]):
        with provoked(ConfigError, f"{CHECKS}: push takes an iterable of (name, tensor) pairs", "named_parameters"):
            bound.b.push(given)
    with provoked(MissingTensor, f"{CHECKS}: nothing was sent: the iterable is empty", "again"):
        bound.b.push(iter(()))
    bound.good_push()


# ---- what is bound --------------------------------------------------------------------------------------------------


def test_what_can_be_bound(bound: Rig) -> None:
    with provoked(ConfigError, f"{CHECKS}: only a module can be bound", "bind the model"):
        bound.b.bind(bound.model.state_dict())
    with provoked(ConfigError, "trainer_side/names/naming.py: the model has no parameters", "bind the model"):
        bound.b.bind(nn.Identity())
    lazy = nn.LazyLinear(3)
    with provoked(IntegrityError, f"{CHECKS}: a lazy module's tensor has neither shape nor values yet", "forward"):
        bound.b.bind(lazy)
    lazy(torch.zeros(1, 4))
    bound.b.bind(lazy)
    bound.b.bind(bound.model)
    bound.good_push()


def test_experts_that_come_in_part(checkpoint: Callable[..., Path]) -> None:
    """transformers 5 fuses a checkpoint's experts; or it does not, and all of them have names of their own."""
    model = tiny_qwen3_moe()
    rig = Rig(checkpoint(model), model)
    try:
        live = dict(model.named_parameters())
        fused = next((n for n in live if n.endswith("experts.gate_up_proj")), None)
        if fused is None:
            pytest.skip("this transformers does not fuse experts")
        both = [*live.items(), (f"{fused.removesuffix('gate_up_proj')}0.gate_proj.weight", torch.zeros(24, 48))]
        key = f"{LAYOUT}: a tensor was sent under its checkpoint name and as the live tensors that it is made of"
        with provoked(DuplicateTensor, key, "not both"):
            rig.b.push(both)
        rig.good_push()
    finally:
        rig.close()


def test_a_buffer_that_is_gone() -> None:
    class Corrected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.register_buffer("correction", torch.randn(3))

    live, model = Corrected(), Corrected()
    with bridge.attach(live, model=model) as b:
        model.correction = None
        with provoked(MissingTensor, f"{LAYOUT}: a persistent buffer of the bound model is gone", "bind"):
            b.push(model.named_parameters())
        b.bind(model)  # as the remedy says; the engine has the buffer, and misses it
        with provoked(MissingTensor, f"{LOADER}: the engine needs a tensor that was not sent"):
            b.push(model.named_parameters())
        model.correction = torch.randn(3)
        b.bind(model)
        assert b.push(model.named_parameters()).verified is True
        assert torch.equal(live.correction, model.correction)


# ---- plain modules --------------------------------------------------------------------------------------------------


def test_modules() -> None:
    model, live = nn.Linear(4, 3), nn.Linear(4, 3)
    with bridge.attach(live) as b:
        with provoked(UnexpectedTensor, f"{MODULE}: the attached module has no such tensor", "b.bind(model)"):
            b.push([(f"policy.{name}", tensor) for name, tensor in model.named_parameters()])
        with provoked(UnexpectedTensor, f"{UNUSED}: {{}}", "configuration"):
            b.push([*model.named_parameters(), ("extra", torch.zeros(1))])
        b.bind(nn.Sequential(model))
        with pytest.raises((UnexpectedTensor, MissingTensor)):
            b.push(nn.Sequential(model).named_parameters())
        b.bind(model)
        with provoked(ShapeMismatch, f"{CHECKS}: a tensor does not have the bound model's shape"):
            b.push(nn.Linear(5, 3).named_parameters())
        assert b.push(model.named_parameters()).verified is True
    assert torch.equal(live.weight, model.weight)
    key = f"{MODULE}: a tensor's shape does not fit the attached module"
    with bridge.attach(nn.Linear(5, 3)) as b, provoked(ShapeMismatch, key, "configuration"):
        b.push(model.named_parameters())
    with bridge.attach(live) as b:
        perturb(model)
        assert b.push(model.named_parameters()).verified is True
        with provoked(ConfigError, f"{MODULE}: a plain module does not generate", "inference engine"):
            b.engines[0].generate([[1]])
    assert torch.equal(live.weight, model.weight)


def test_shared_storage() -> None:
    model = nn.Linear(4, 3)
    with bridge.attach(model) as b:
        key = "engine_side/engines/common/refusals.py: the trainer and the {} share storage"
        with provoked(ConfigError, key, "copy"):
            b.push(model.named_parameters())
    live = copy.deepcopy(model)
    with bridge.attach(live) as b:
        perturb(model)
        assert b.push(model.named_parameters()).verified is True
    assert torch.equal(live.weight, model.weight)


def test_an_engine_whose_two_names_are_one_tensor() -> None:
    class Two(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
            if tied:
                self.b.weight = self.a.weight

    live, model = Two(True), Two(False)
    with bridge.attach(live, model=model) as b:
        key = f"{LOADER}: elements of an engine parameter would be written twice"
        with provoked(DuplicateTensor, key, "tie"):
            b.push(model.named_parameters())
        model.b.weight = model.a.weight
        b.bind(model)
        perturb(model)
        assert b.push(model.named_parameters()).verified is True
    assert torch.equal(live.a.weight, model.a.weight)
