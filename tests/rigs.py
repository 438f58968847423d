"""`EngineRig`, the interface through which the tests that all engines have to pass see one; how one engine at a time is
kept; faults and comparisons that rigs share."""

from __future__ import annotations

import gc
import os
import random
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
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


@dataclass(frozen=True)
class Hosting:
    """How the contract's tests through Ray start an engine.

    Attributes:
        scheme: of the engine's spec.
        arguments: each is a `--set` of `weighbridge up`.
        variables: of the environment of `up`, and so of Ray.
        wrong: arguments that are refused, and what the refusal says.
        model: changes to the model's configuration.
        longest: tokens of a rollout that a push or `down` ends.
        in_flight_tokens: tokens of one that still runs when a push comes 0.3 s later, and ends soon.
        leaves_files: its processes map files in shared memory.
    """

    scheme: str
    arguments: Mapping[str, Any]
    variables: Mapping[str, str]
    wrong: Sequence[tuple[Mapping[str, Any], str]]
    model: Mapping[str, Any]
    longest: int
    in_flight_tokens: int
    leaves_files: bool


class TrainerRig(ABC):
    """A trainer's model, its checkpoint, and a bridge from it into one engine."""

    b: bridge.Bridge
    name: str | None = None
    """Of the bridge."""

    def __init__(self, folder: Path, family: str, changes: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Make the trainer's model and its checkpoint; subclasses then start the engine and attach.

        Args:
            folder: where the checkpoint goes; deleted by `close`.
            family: a name in `tests.families`.
            changes: to the model's configuration.
        """
        self.family, self.folder = family, folder
        self.model = make_model(family, **changes)
        if hasattr(self.model.config, "hidden_activation"):  # as checkpoints have it; SGLang reads the older name
            self.model.config.hidden_act = self.model.config.hidden_activation
        self.model.save_pretrained(folder)
        self._first = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        self._seed = 0

    @property
    @abstractmethod
    def handle(self) -> Any:
        """The object that a user gives to `bridge.attach`."""

    @abstractmethod
    def stop(self) -> None:
        """End the engine."""

    @abstractmethod
    def said(self, lora: Any = None) -> Logprobs:
        """Compute prompt log-probabilities through the engine's own `generate`, of the base or of a LoRA."""

    def attach(self) -> None:
        self.b = bridge.attach(self.handle, name=self.name, model=self.model)

    def close(self) -> None:
        self.b.close()
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wanted(self) -> Logprobs:
        """Compute prompt log-probabilities of the trainer's weights with transformers."""
        wanted: Logprobs = reference_logprobs(self.model, PROMPTS)
        return wanted

    def off(self) -> float:
        """Compute the mean |difference| between the engine and transformers in nats."""
        return difference(self.said(), self.wanted())

    def step(self, seed: int | None = None) -> None:
        """Give the trainer other weights, as far from the checkpoint's each time: noise between engines grows with
        them. Without a seed they are new in this rig; seed 0 is never used then."""
        self._seed += 1
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self._first[name])
        perturb(self.model, self._seed if seed is None else seed)

    def push(self, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = self.b.push(self.model.named_parameters(), **options)
        return receipt


class EngineRig(TrainerRig):
    """One engine, the bridge into it and the trainer's model: all that `tests/contract` knows of an engine.

    The reason in a `no_...` field says why the engine lacks something; scenarios assert what it does instead.

    Attributes:
        families: the families, with ways of starting the engine, for which `tests/contract` checks pushes.
        lora_families: the same for LoRAs.
        lora_targets: by family, modules that take a LoRA, where they are not those of `tests/contract`.
        config_changes: by family, what the engine needs otherwise in the model's configuration.
        largest_noise: mean nats that the engine's bf16 arithmetic may differ from transformers' on the same weights;
            above it a comparison between them says nothing.
        last_write: number of the last write of a push into "qwen2-tied".
        in_flight_tokens: tokens of a request that still runs when the push that follows it pauses the engine.
        no_spans: why an answer names only the first of its versions.
        no_torn_error: why a rollout inside an engine that is torn ends with an answer.
        no_fresh: why `right` compares with transformers and starts no second engine.
        no_user_loras: why users load no LoRA of their own.
    """

    families: Sequence[Case]
    lora_families: Sequence[Case]
    recurrent_families: Sequence[Case] = ()
    more_recurrent_families: Sequence[Case] = ()
    wrong_by_itself: Mapping[str, str] = {}
    lora_targets: Mapping[str, Sequence[str]] = {}
    config_changes: Mapping[str, Mapping[str, Any]] = {}
    largest_noise: float
    last_write: int
    in_flight_tokens: int
    no_spans = ""
    no_torn_error = ""
    no_fresh = ""
    no_user_loras = ""

    def __init__(self, folder: Path, family: str, **changes: Any) -> None:
        super().__init__(folder, family, {**self.config_changes.get(family, {}), **changes})
        self._known: dict[int, Logprobs] = {}

    @abstractmethod
    def fresh(self) -> Logprobs:
        """Compute what `said` gives, in a second engine that is started from a checkpoint of the trainer's weights."""

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
        """Read the exact value of every live parameter."""

    @abstractmethod
    def scale(self, path: str, factor: float) -> None:
        """Write to a live parameter behind the bridge's back."""

    @abstractmethod
    def begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        """Start a user's requests at the engine, not at the bridge; returns when each has some of its tokens."""

    @abstractmethod
    def finish(self) -> list[Answer]:
        """Wait for the requests that `begin` started, in order."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """True while a request is inside the engine; also on a quarantined one."""

    @property
    @abstractmethod
    def gate_shut(self) -> bool:
        """True while a push makes callers wait."""

    @abstractmethod
    def hooks(self) -> Mapping[str, Any]:
        """Read all that a bridge may leave on the engine's objects."""

    @abstractmethod
    def broken_writes(self, k: int, *, always: bool = False) -> AbstractContextManager[None]:
        """Make the k-th write of a load fail, with `always` every load after it, too. Asserts that it struck."""

    @abstractmethod
    def stale_caches(self) -> AbstractContextManager[None]:
        """Make the engine report a reset of its prefix cache that it does not do."""

    @abstractmethod
    def wrong_absorption(self) -> AbstractContextManager[None]:
        """Break the step that absorbs projections of latent attention on the live model: for both layers, and again at
        a second try."""

    @abstractmethod
    def wake(self) -> None:
        """Let requests go on, as a user may by accident while the engine is quarantined."""

    def free(self) -> Mapping[str, Any]:
        """Read what an engine without requests has free: equal before and after every test."""
        return {"busy": self.busy}

    def user_lora(self, folder: Path) -> Any:
        """Load a LoRA as users do; returns the argument of `said` that asks for it."""
        raise NotImplementedError(self.no_user_loras)

    @abstractmethod
    def our_lora(self, receipt: bridge.Receipt) -> Any:
        """Make the argument of `said` that asks for the LoRA of this push."""

    @abstractmethod
    def loras(self) -> list[str]:
        """List the LoRAs that are loaded."""

    def right(self) -> None:
        """Assert that the engine serves the trainer's weights: bit for bit as a second engine does, which is asked once
        for the same weights; where none is started, as near to transformers as the engine is."""
        if self.no_fresh:
            assert self.off() < self.largest_noise
            return
        weights = hash(tuple(bits_of(self.model).values()))
        if weights not in self._known:
            self._known[weights] = self.fresh()
        assert self.said() == self._known[weights]


def ignore_what_engines_leave_open(config: pytest.Config) -> None:
    """Let no test fail over what a closed vLLM or SGLang has left open. For `pytest_configure` where one is installed.

    They leave sockets, files and contexts to the collector, which finds them in some later test: vLLM alone, without a
    bridge, never closes the zmq context of an engine core in another process. What is ours is watched by the tests of
    the other folders, and by `tests/contract` over the embedded engine, where nothing is ignored.
    """
    for warning in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{warning}")


class Rigs:
    """Makes rigs of one engine and keeps the last: tests are grouped by how their engine was started, and two engines
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
    """Find the rigs that all folders of one session share."""
    return Rigs(kind)


def one_version(rigs: Rigs, family: str = "qwen2-tied") -> Iterator[Any]:
    """Give a fixture a rig with a version of its own, and assert after the test that the engine is as it was before.

    "qwen2-tied" is dense, with tied embeddings, whose head vLLM packs twice.
    """
    made = rigs.get(family)
    made.step()
    assert made.push().verified is True
    free = made.free()
    yield made
    made.step(0)
    assert made.push().verified is True, "a good push works after every test"
    made.right()
    assert made.free() == free, "no request is left, and nothing that one had"


@contextmanager
def broken_writes_here(k: int, *, always: bool = False) -> Iterator[None]:
    """Do `EngineRig.broken_writes` where the engine's rank 0 is in this process."""
    from tests.push.faults import Breaker

    with pytest.MonkeyPatch.context() as patch:
        breaker = Breaker(patch, k, always=always)
        yield
    assert breaker.fired


@contextmanager
def doubled_after_post_load(host: type, model: torch.nn.Module, attribute: str, times: int) -> Iterator[None]:
    """Do `EngineRig.wrong_absorption` where rank 0 is in this process: double a derived tensor of live modules after
    post-load, `times` times."""
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
    """Read the bytes of every parameter of a model in this process."""
    return {n: t.detach().view(torch.uint8).numpy().tobytes() for n, t in model.named_parameters() if t.numel()}


def difference(a: Logprobs, b: Logprobs) -> float:
    """Compute the mean |difference| in nats."""
    values = [abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(values) / len(values)


def shared_files(pids: Iterable[int]) -> set[Path]:
    """Find the files in shared memory that these processes map. By inode: a semaphore is mapped under a name that it
    had for a moment only."""
    inodes: set[int] = set()
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            inodes.update(int(line.split(None, 5)[4]) for line in lines if "/dev/shm/" in line)
    return {path for path in Path("/dev/shm").iterdir() if path.lstat().st_ino in inodes and path.is_file()}


@contextmanager
def variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while an engine starts."""
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
    """Assert that prompts and samplings that may end an engine are refused in words, and that it answers the next."""
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
