"""What the rigs around engines share: `EngineRig`, one engine at a time, variables for its start, how far answers are
apart."""

from __future__ import annotations

import gc
import os
import random
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.handles import EngineHandle
from tests.families import make_model, perturb
from trainer_side.reference import reference_logprobs

Logprobs = list[list[float]]
Case = tuple[str, Mapping[str, Any]]
PROMPTS = [random.Random(n).choices(range(3, 400), k=n) for n in (5, 20, 150)]


@dataclass(frozen=True)
class Answer:
    """The end of a user's request: its tokens, why it ended, and the versions that it was sampled under."""

    tokens: tuple[int, ...]
    reason: str
    versions: list[int]


class EngineRig(ABC):
    """One engine, the bridge into it and the trainer's model: all that `tests/contract` knows of an engine.

    A reason in one of the `no_...` fields says what an engine cannot do; the scenario then asserts what it does.
    """

    families: Sequence[Case]
    """Families, and ways of starting the engine, that the contract holds for."""
    lora_families: Sequence[Case]
    lora_targets: Mapping[str, Sequence[str]] = {}
    """Modules that take a LoRA, where they are not `LORA_TARGETS`."""
    config_changes: Mapping[str, Mapping[str, Any]] = {}
    """By family: what the engine needs otherwise in the model's configuration."""
    largest_noise: float
    """Mean nats that the engine's bf16 arithmetic may differ from transformers' on the same weights: above it a
    comparison between them says nothing."""
    last_write: int
    """Number of the last write of a push into "qwen2-tied"."""
    in_flight_tokens: int
    """Tokens of a request that is still running when the push that follows it pauses the engine."""
    no_spans = ""
    """Why an answer names the first of its versions only."""
    no_torn_error = ""
    """Why a rollout that ends when the engine is torn does so with an answer."""
    no_fresh = ""
    """Why no second engine of this kind is started to compare with."""
    no_user_loras = ""
    """Why users load no LoRA of their own."""

    def __init__(self, folder: Path, family: str, **changes: Any) -> None:
        self.family, self.folder = family, folder
        self.model = make_model(family, **{**self.config_changes.get(family, {}), **changes})
        if hasattr(self.model.config, "hidden_activation"):  # as checkpoints have it; SGLang reads the older name
            self.model.config.hidden_act = self.model.config.hidden_activation
        self.model.save_pretrained(folder)
        self._first = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        self._known: Logprobs = []
        self._seed = 0

    # -- each engine in its own way ----------------------------------------------------------------------------------

    @property
    @abstractmethod
    def handle(self) -> Any:
        """What a user gives to `bridge.attach`."""

    @abstractmethod
    def stop(self) -> None:
        """End the engine."""

    @abstractmethod
    def said(self, lora: Any = None) -> Logprobs:
        """Prompt log-probabilities through the engine's own `generate`: of the base, or of a LoRA."""

    @abstractmethod
    def fresh(self) -> Logprobs:
        """What an engine says that was started from a checkpoint of the trainer's weights."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The label on what the engine generates."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest prompt, by the engine's own configuration."""

    @abstractmethod
    def bits(self) -> Mapping[str, Any]:
        """The exact value of every live parameter."""

    @abstractmethod
    def scale(self, path: str, factor: float) -> None:
        """Write to a live parameter behind the bridge's back."""

    @abstractmethod
    def begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """A user's requests, asked of the engine and not of the bridge; each has some of its tokens."""

    @abstractmethod
    def finish(self) -> list[Answer]:
        """How those that `begin` has begun have ended."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """A request is inside the engine."""

    @property
    @abstractmethod
    def gate_shut(self) -> bool:
        """Callers wait for a push."""

    @abstractmethod
    def hooks(self) -> Mapping[str, Any]:
        """All that a bridge may leave on the engine's objects."""

    @abstractmethod
    def broken_writes(self, k: int, *, always: bool = False) -> AbstractContextManager[None]:
        """Inside, the k-th write of a load fails, with `always` every load after it, too. It has to strike."""

    @abstractmethod
    def stale_caches(self) -> AbstractContextManager[None]:
        """Inside, the engine says that it has reset its prefix cache and has not."""

    @abstractmethod
    def wrong_absorption(self) -> AbstractContextManager[None]:
        """Inside, the step that absorbs projections of latent attention goes wrong on the live model, and once more at
        a second try, for two layers."""

    @abstractmethod
    def wake(self) -> None:
        """What a user may call by accident, and what lets requests go on that wait."""

    def free(self) -> Mapping[str, Any]:
        """What is free in an engine without requests."""
        return {"busy": self.busy}

    def user_lora(self, folder: Path) -> Any:
        """Load a LoRA as users do; the argument of `said` that asks for it."""
        raise NotImplementedError(self.no_user_loras)

    @abstractmethod
    def our_lora(self, receipt: bridge.Receipt) -> Any:
        """The argument of `said` that asks for the LoRA that a push has brought."""

    @abstractmethod
    def loras(self) -> list[str]:
        """The LoRAs that are loaded."""

    # -- all alike ---------------------------------------------------------------------------------------------------

    def attach(self, **options: Any) -> None:
        self.b = bridge.attach(self.handle, model=self.model, **options)

    def close(self) -> None:
        self.b.close()
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wanted(self) -> Logprobs:
        wanted: Logprobs = reference_logprobs(self.model, PROMPTS)
        return wanted

    def off(self) -> float:
        """Mean |difference| to transformers in nats."""
        return difference(self.said(), self.wanted())

    def step(self, seed: int | None = None) -> None:
        """Other weights, as far from the checkpoint's each time: noise between engines grows with them. `seed` 0 is
        never used otherwise."""
        self._seed += 1
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self._first[name])
        perturb(self.model, self._seed if seed is None else seed)

    def push(self, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = self.b.push(self.model.named_parameters(), **options)
        return receipt

    def right(self) -> None:
        """It serves the trainer's weights: exactly, where a second engine is there to compare with."""
        if self.no_fresh:
            assert self.off() < self.largest_noise
        else:
            assert self.said() == self.fresh()

    def right_at_home(self) -> None:
        """As `right`, for the weights of `step(0)`: a second engine is asked once."""
        if self.no_fresh:
            assert self.off() < self.largest_noise
        else:
            self._known = self._known or self.fresh()
            assert self.said() == self._known


def ignore_what_engines_leave_open(config: pytest.Config) -> None:
    """For `pytest_configure` where a real engine is installed: what it leaves open fails no test.

    Engines leave sockets, files and contexts of a closed engine to the collector, which finds them in some later test.
    They are not ours to close; what is ours is watched by the tests of the other folders, where nothing is ignored.
    """
    for warning in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{warning}")


class Rigs:
    """Makes rigs of one engine, and keeps the last one: tests are grouped by how theirs was started, and two engines
    would not fit two cores."""

    def __init__(self, kind: type[EngineRig]) -> None:
        self.kind = kind
        self._key: object = None
        self._rig: Any = None

    def get(self, family: str, **ways: Any) -> Any:
        key = (family, *sorted(ways.items()))
        if key != self._key:
            self.close()
            folder = Path(tempfile.mkdtemp(prefix="weighbridge-rig-"))
            self._rig, self._key = self.kind(folder, family, **ways), key
        return self._rig

    def close(self) -> None:
        if self._rig is not None:
            self._rig.close()
        self._rig = self._key = None
        gc.collect()


@cache
def rigs_of(kind: type[EngineRig]) -> Rigs:
    """The same in every folder of tests of one session."""
    return Rigs(kind)


def one_version(rigs: Rigs) -> Iterator[Any]:
    """For a fixture: a dense family with tied embeddings, whose head vLLM packs twice, with a version of its own; it is
    as it was after the test."""
    made = rigs.get("qwen2-tied")
    made.step()
    assert made.push().verified is True
    free = made.free()
    yield made
    made.step(0)
    assert made.push().verified is True, "a good push works after every test"
    made.right_at_home()
    assert made.free() == free, "no request is left, and nothing that one had"


@contextmanager
def broken_writes_here(k: int, *, always: bool = False) -> Iterator[None]:
    """`EngineRig.broken_writes` where the engine's rank 0 is in this process."""
    from tests.push.faults import Breaker

    with pytest.MonkeyPatch.context() as patch:
        breaker = Breaker(patch, k, always=always)
        yield
    assert breaker.fired


@contextmanager
def doubled_after_post_load(host: type, model: torch.nn.Module, attribute: str, times: int) -> Iterator[None]:
    """`EngineRig.wrong_absorption` where rank 0 is in this process: a derived tensor of live modules has double values
    after post-load, `times` times."""
    live = {id(module) for module in model.modules()}
    post_load, left = host.post_load, [times]  # type: ignore[attr-defined]

    def faulty(self: Any, module: Any) -> bool:
        done: bool = post_load(self, module)
        if id(module) in live and hasattr(module, attribute) and left[0]:
            left[0] -= 1
            getattr(module, attribute).mul_(2)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "post_load", faulty)
        yield
    assert not left[0]


def bits_of(model: torch.nn.Module) -> dict[str, bytes]:
    """Bytes of every parameter of a model in this process."""
    return {n: t.detach().view(torch.uint8).numpy().tobytes() for n, t in model.named_parameters() if t.numel()}


def difference(a: Logprobs, b: Logprobs) -> float:
    """Mean |difference| in nats."""
    values = [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(values) / len(values)


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for as long as an engine starts."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def refuses_what_does_not_fit(engine: EngineHandle, vocabulary: int, longest: int) -> None:
    """Prompts and samplings that an engine may die of are refused in words, and it answers the next one."""
    short = bridge.Sampling(max_tokens=1, temperature=0.0)
    bad: list[tuple[Any, bridge.Sampling, str]] = [
        ([[5], []], short, "prompt 1"),
        ([[5], [vocabulary]], short, f"prompt 1; expected: 0 to {vocabulary - 1}; got: {vocabulary}"),
        ([[5], [5, 10**6]], short, "prompt 1"),
        ([[5], [-5]], short, "prompt 1"),
        ([[5] * (longest + 1)], short, f"prompt 0; expected: 1 to {longest} tokens; got: {longest + 1}"),
        ([[5] * 100_000], short, "prompt 0"),
        ([5, 6], short, "prompt 0"),
        ([[5]], bridge.Sampling(max_tokens=-1), "sampling.max_tokens"),
        ([[5]], bridge.Sampling(temperature=-1.0), "sampling.temperature"),
        ([[5]], bridge.Sampling(top_p=0.0), "sampling.top_p"),
    ]
    for prompts, sampling, where in bad:
        with pytest.raises(bridge.ConfigError, match=re.escape(f"where: {where}")) as caught:
            engine.generate(prompts, sampling)
        assert caught.value.remedy
    assert len(engine.generate([[vocabulary - 1], [5] * longest], short)) == 2
    assert [len(c.token_ids) for c in engine.generate([[5]], bridge.Sampling(max_tokens=0))] == [0]
