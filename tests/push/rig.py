"""One engine of this process, the bridge into it and the trainer's model, with the question "did anything move?"."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import perturb
from trainer_side.reference import reference_logprobs

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2]]
GREEDY = bridge.Sampling(max_tokens=6, temperature=0.0)


@dataclass(frozen=True)
class Seen:
    """Everything an engine shows: bits of its tensors, exact log-probabilities, greedy tokens."""

    bits: dict[str, torch.Tensor]
    logprobs: list[list[float]]
    tokens: list[tuple[int, ...]]
    sampled: list[tuple[float, ...]]

    def same(self, other: Seen) -> bool:
        bits = self.bits.keys() == other.bits.keys()
        bits = bits and all(same_bits(t, other.bits[name]) for name, t in self.bits.items())
        return bits and (self.logprobs, self.tokens, self.sampled) == (other.logprobs, other.tokens, other.sampled)


def drift(engine: Engine, model: Any) -> float:
    """Mean |difference| in nats between what the engine says and what the trainer's model says."""
    got, want = engine.prompt_logprobs(PROMPTS), reference_logprobs(model, PROMPTS)
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes()


class Rig:
    """`model` is the trainer's; `b` is bound to it unless `bound=False`."""

    def __init__(self, folder: Path, model: Any, *, bound: bool = True, name: str | None = None, **config: Any) -> None:
        self.model = model
        self.engine = Engine(EngineConfig(str(folder), **config))
        self.b = bridge.attach(self.engine, model=model if bound else None, name=name)
        self._seed = 0

    def close(self) -> None:
        self.b.close()
        self.engine.close()

    def named(self) -> list[tuple[str, Any]]:
        """The model's tensors as a list, for tests that spoil it."""
        return [(n, p.detach()) for n, p in self.model.named_parameters()]

    def replaced(self, name: str, tensor: torch.Tensor) -> list[tuple[str, Any]]:
        """The model's tensors with another one under `name`."""
        pairs = self.named()
        if name not in dict(pairs):
            raise KeyError(name)
        return [(n, tensor if n == name else p) for n, p in pairs]

    def step(self) -> None:
        """An optimiser's step."""
        self._seed += 1
        perturb(self.model, seed=self._seed)

    def push(self, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = self.b.push(self.model.named_parameters(), **options)
        return receipt

    def good_push(self, **options: Any) -> bridge.Receipt:
        """Another step, pushed: verified, and what the engine now says is what the trainer says."""
        self.step()
        receipt = self.push(**options)
        assert receipt.verified in (True, "partial"), receipt
        assert self.serves(self.model)
        return receipt

    def serves(self, model: Any, limit: float = 1e-4) -> bool:
        got, want = self.engine.prompt_logprobs(PROMPTS), reference_logprobs(model, PROMPTS)
        return max(abs(a - b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)) < limit

    def seen(self) -> Seen:
        live = self.engine.runner.model
        bits = {n: t.detach().clone() for n, t in (*live.named_parameters(), *live.named_buffers())}
        completions = self.b.engines[0].generate(PROMPTS, GREEDY)
        return Seen(
            bits,
            self.engine.prompt_logprobs(PROMPTS),
            [c.token_ids for c in completions],
            [c.logprobs for c in completions],
        )

    @contextmanager
    def unmoved(self, *, then_push: bool = True) -> Iterator[None]:
        """Inside, something is refused or fails: engine, version and generation stay what they were, the trainer's
        model too, and a good push works afterwards."""
        before, version = self.seen(), self.b.status().engines[0].serving
        kept = copy.deepcopy(self.model.state_dict())
        yield
        info = self.b.status()
        assert (info.engines[0].state, info.engines[0].serving) == ("SERVING", version), info.engines[0]
        assert info.busy is None
        assert self.seen().same(before), "the engine is not what it was before"
        assert not self.engine.paused
        assert all(same_bits(t, self.model.state_dict()[n]) for n, t in kept.items())
        if then_push:
            self.good_push()


def said(error: bridge.BridgeError, *words: str) -> None:
    """The message holds every word, and what / where / got / remedy are all there."""
    text = str(error)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


@contextmanager
def refused(kind: type[bridge.BridgeError], code: int, *words: str) -> Iterator[Any]:
    """Exactly this class is raised, with its exit code and these words in the message."""
    with pytest.raises(kind) as caught:
        yield caught
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
    assert caught.value.exit_code == code
    said(caught.value, *words)
