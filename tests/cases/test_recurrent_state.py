"""State of running requests is no weight: it is never compared, copied or moved, whatever is pushed around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bridge.errors import ConfigError, MissingTensor
from bridge.model.levels import RANK_LEVELS
from bridge.model.manifest import TensorInfo
from engine_side.load.loader import Loader
from engine_side.plan.strategies import Strategy
from engine_side.verify.verify import Verifier
from tests.engine_side import toy_engine as toy

SIZE, WIDTH = 6, 4


class Convolution(nn.Module):
    """Its post-load step packs the weight into other storage, as a CPU kernel wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIZE, WIDTH), requires_grad=False)
        self.weight.data = self.weight.data.unsqueeze(1)

    def post(self) -> None:
        self.weight.data = self.weight.data.flatten().square().view(2, -1)


class Mixer(nn.Module):
    """A recurrent layer as engines have it: a decay that its loader computes, a buffer that its loader sets beside a
    parameter, views of the weight of its convolution, and states for which its constructor leaves a place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Convolution()
        self.A = nn.Parameter(torch.empty(SIZE, dtype=torch.float32), requires_grad=False)
        self.D = nn.Parameter(torch.empty(SIZE), requires_grad=False)
        self.register_buffer("conv_weights", self.conv.weight.data.view(SIZE, WIDTH), persistent=False)
        self.register_buffer("one_more", torch.ones(SIZE), persistent=False)
        self.conv_rows = self.conv.weight.data.view(SIZE * WIDTH)
        self.states = (torch.tensor([]), torch.tensor([]))
        self.position = torch.tensor([])


class Closed(nn.Module):
    """Nothing can call it alone. Post-load hides its weight the first time that it runs; then never again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIZE, SIZE), requires_grad=False)
        self.register_buffer("window", torch.zeros(2), persistent=False)
        self.states: Any = (torch.tensor([]),)
        self.packed: torch.Tensor | None = None

    def post(self) -> None:
        if self.packed is None:
            self.packed = self.weight.detach() * 2
            self.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()
        self.closed = Closed()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.named_parameters())
        for name, tensor in weights:
            if name == "mixer.A_log":
                own["mixer.A"].data.copy_(-torch.exp(tensor.float()))
            else:
                own[name].data.copy_(tensor)
            if name == "mixer.D":  # as SGLang's GemmaRMSNorm keeps its weight plus one
                self.mixer.one_more.copy_(self.mixer.D.data).add_(1.0)


SHAPES = {
    "mixer.A_log": (SIZE,), "mixer.D": (SIZE,), "mixer.conv.weight": (SIZE, 1, WIDTH), "closed.weight": (SIZE, SIZE),
}  # fmt: skip
FOREIGN = RuntimeError("Tensor on device meta is not on the expected device cpu!")


class RecurrentHost(toy.ToyHost):
    """A host whose engine binds states after it has loaded."""

    def __init__(self) -> None:
        self.model: Any = Recurrent()
        self.fails = ""
        self.load_weights(self.model, toy.weights_of(self.infos, 0).items())
        for module in list(self.model.modules()):
            self.post_load(module)
        mixer, closed = self.model.mixer, self.model.closed
        mixer.states = (torch.randn(5, SIZE), torch.randn(5, SIZE, 3))
        mixer.position = torch.arange(7)
        closed.states = (torch.randn(4),)
        closed.window = torch.randn(9)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(name, "fp32", shape) for name, shape in SHAPES.items())

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return Recurrent()

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.fails == "loader":
            raise FOREIGN
        super().load_weights(skeleton, weights)

    def post_load(self, module: nn.Module) -> bool:
        if not isinstance(module, (Convolution, Closed)):
            return False
        if self.fails == "post-load" and module is self.model.mixer.conv:
            raise FOREIGN
        module.post()
        return True

    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def states(self) -> list[torch.Tensor]:
        mixer, closed = self.model.mixer, self.model.closed
        return [*mixer.states, mixer.position, *closed.states, closed.window]

    def weights(self) -> dict[str, torch.Tensor]:
        mixer, closed = self.model.mixer, self.model.closed
        return {
            "A": mixer.A, "D": mixer.D, "conv": mixer.conv.weight, "conv_weights": mixer.conv_weights,
            "conv_rows": mixer.conv_rows, "one_more": mixer.one_more, "packed": closed.packed,
        }  # fmt: skip


@contextmanager
def mapped(*names: str, seeds: tuple[int, ...] = (1, 2)) -> Iterator[tuple[RecurrentHost, Loader, Verifier]]:
    """A loader of the tensors of these names, or of all, on an arena with a version per seed."""
    host = RecurrentHost()
    infos = [info for info in host.infos if not names or info.name in names]
    loader = Loader(host, infos, partial=bool(names)).check()
    loader.map(*toy.arena(infos, *seeds))
    yield host, loader, Verifier(loader)
    loader.close()


def started_with(sent: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of an engine that was started with these tensors."""
    host = RecurrentHost()
    host.model = Recurrent()
    host.load_weights(host.model, sent.items())
    for module in list(host.model.modules()):
        host.post_load(module)
    return host.weights()


def sent_in(loader: Loader, slot: int) -> dict[str, torch.Tensor]:
    return dict(zip([spec.name for spec in loader.mapped.manifest.tensors], loader.mapped.slots[slot], strict=True))


def test_every_weight_arrives_and_no_state_moves() -> None:
    with mapped() as (host, loader, verifier):
        before = [(state, state.clone()) for state in host.states()]
        for slot in (0, 1, 0):
            outcome = loader.apply(slot)
            levels = verifier.run(RANK_LEVELS, slot, outcome=outcome, previous=1 - slot)
            assert all(level.ok for level in levels), levels
            assert not outcome.rebound
            wanted = started_with(sent_in(loader, slot))
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in host.weights().items())
        after = host.states()
        assert all(now is was and torch.equal(now, copy) for now, (was, copy) in zip(after, before, strict=True))


def test_nothing_is_left_to_the_canary_or_to_a_last_resort() -> None:
    with mapped() as (_, loader, verifier):
        assert not verifier.canary_only()
        strategies = {path: choice.strategy for path, choice in loader.decided.choices.items()}
        assert strategies == {
            "mixer": Strategy.IN_PLACE, "mixer.conv": Strategy.REDO, "closed": Strategy.TWIN,
        }  # fmt: skip
        (row,) = loader.explain("mixer.A_log")
        assert row["parameter"] == "mixer.A"
        assert "aten.neg" in row["reason"]


@pytest.mark.parametrize("name", SHAPES)
def test_a_version_in_which_one_tensor_moved(name: str) -> None:
    with mapped(seeds=(1, 1)) as (host, loader, verifier):
        loader.apply(0)
        index = loader.mapped.index[name]
        loader.mapped.slots[1][index].mul_(1.5)
        outcome = loader.apply(1, [index])
        levels = verifier.run(RANK_LEVELS, 1, outcome=outcome, previous=0, changed=[index])
        assert all(level.ok for level in levels), levels
        wanted = started_with(sent_in(loader, 1))
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in host.weights().items())


@pytest.mark.parametrize("name", SHAPES)
def test_a_tensor_alone_leaves_the_others(name: str) -> None:
    with mapped(name) as (host, loader, verifier):
        outcome = loader.apply(0)
        assert all(level.ok for level in verifier.run(RANK_LEVELS, 0, outcome=outcome))
        wanted = started_with({**toy.weights_of(host.infos, 0), **sent_in(loader, 0)})
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in host.weights().items())


class Halves(nn.Module):
    """Its loader computes the two halves of one parameter of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(2 * SIZE), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            half = self.decay.data[:SIZE] if name == "one_log" else self.decay.data[SIZE:]
            half.copy_(-torch.exp(tensor))


class HalvesHost(RecurrentHost):
    def __init__(self) -> None:
        self.model, self.fails = Halves(), ""
        self.model.load_weights(toy.weights_of(self.infos, 0).items())

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(name, "fp32", (SIZE,)) for name in ("one_log", "other_log"))

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return Halves()


@pytest.mark.parametrize("place", [0, 1])
def test_a_half_of_a_computed_tensor_leaves_the_other(place: int) -> None:
    host = HalvesHost()
    info = host.infos[place]
    loader = Loader(host, [info], partial=True).check()
    loader.map(*toy.arena([info], 1, 2))
    before = host.model.decay.detach().clone().view(2, SIZE)
    for slot in (0, 1):
        outcome = loader.apply(slot)
        assert all(level.ok for level in Verifier(loader).run(RANK_LEVELS, slot, outcome=outcome))
        halves = host.model.decay.detach().view(2, SIZE)
        assert torch.equal(halves[place], -torch.exp(sent_in(loader, slot)[info.name]))
        assert torch.equal(halves[1 - place], before[1 - place])
    loader.close()


def test_a_neighbour_of_a_computed_tensor_may_not_be_left_out() -> None:
    host = RecurrentHost()
    with pytest.raises(MissingTensor, match=r"mixer\.D"):
        Loader(host, [info for info in host.infos if info.name != "mixer.D"]).check()


@pytest.mark.parametrize("name", ["A", "conv_weights", "conv_rows", "one_more"])
def test_what_derives_from_a_weight_is_read_back_bit_for_bit(name: str) -> None:
    with mapped() as (host, loader, verifier):
        loader.apply(0)
        host.weights()[name].view(torch.int32).view(-1)[1] ^= 1
        wrong = {level.level for level in verifier.run(RANK_LEVELS, 0) if not level.ok}
        assert wrong == {"read-back"}


def test_a_foreign_error_of_a_rebuild_names_module_step_and_remedy() -> None:
    with mapped() as (host, loader, verifier):
        loader.apply(0)
        host.fails = "post-load"
        with pytest.raises(
            ConfigError, match=r"while rebuilding a module; where: mixer\.conv \(Convolution\)"
        ) as caught:
            loader.apply(1)
        assert "device meta" in caught.value.got
        assert caught.value.remedy
        host.fails = ""
        outcome = loader.apply(0)
        assert all(level.ok for level in verifier.run(RANK_LEVELS, 0, outcome=outcome))


def test_a_foreign_error_of_the_loader_comes_before_anything_is_written() -> None:
    with mapped() as (host, loader, verifier):
        outcome = loader.apply(0)
        host.fails = "loader"
        with pytest.raises(
            ConfigError, match=r"while computing values with the engine's loader; where: mixer\.A"
        ) as caught:
            loader.apply(1)
        assert "device meta" in caught.value.got
        assert caught.value.remedy
        assert not loader.began_to_write
        assert all(level.ok for level in verifier.run(RANK_LEVELS, 0, outcome=outcome))
