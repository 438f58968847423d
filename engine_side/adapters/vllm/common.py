"""What the ways to a vLLM engine have in common: an `LLM` of this process, a hosted one and one behind a server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.deadline import Deadline
from bridge.errors import ConfigError, NotFound, ProtocolError
from bridge.lora import LoraLimits
from bridge.wire import Completion, Sampling
from engine_side.adapters.vllm.facts import Facts

CURRENT, BASE = "current", "base"
MODES = ("drain", "abort", "keep")


@dataclass
class Books:
    """What was published, whether a bridge has paused it, and what waits to be dropped: kept on the engine, for the
    bridge after this one."""

    paused: bool = False
    version: int = 0
    adapter: str | None = None
    retiring: set[str] = field(default_factory=set)

    def meant(self, adapter: str) -> str | None:
        """The adapter that a request asks for by this word; None is the base model."""
        return self.adapter if adapter == CURRENT else None if adapter == BASE else adapter


class VllmAdapter:
    """The driver half as far as it is the same everywhere."""

    kind = "vllm"
    can_generate = True

    def __init__(self, facts: Facts, where: str) -> None:
        self.facts = facts
        self.where = where

    @property
    def ranks(self) -> int:
        return self.facts.ranks

    @property
    def checkpoint(self) -> Path | None:
        return self.facts.checkpoint

    @property
    def quantisation(self) -> str | None:
        return self.facts.quantisation

    @property
    def max_prompt(self) -> int:
        return self.facts.max_len - 1

    @property
    def cache_grain(self) -> int:
        return self.facts.block

    @property
    def lora(self) -> LoraLimits | None:
        return self.facts.lora

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run the job in every worker. Raises ProtocolError for one that could not answer, PeerLost for dead ones."""
        deadline.check("a job for vLLM's workers")
        wrong = [str(text) for text in self._run_job(job, deadline) if text]
        if wrong:
            raise ProtocolError("a vLLM worker could not run a job", where=self.where, got="; ".join(wrong))

    @abstractmethod
    def _run_job(self, job: bytes, deadline: Deadline) -> Sequence[Any]:
        """`extension.bridge_run` in every worker; what each said."""


def check_mode(inflight: str) -> None:
    """Raises ConfigError for a word that says nothing about requests in flight."""
    if inflight not in MODES:
        raise ConfigError("no such mode", where="inflight", expected=" | ".join(MODES), got=repr(inflight))


def asleep(where: str, remedy: str) -> ConfigError:
    return ConfigError("the engine is asleep or paused", where=where, got="asleep", remedy=remedy)


def not_held(name: str) -> NotFound:
    return NotFound("this engine holds no such adapter", where="adapter", got=repr(name))


def parameters(sampling: Sampling) -> Any:
    """vLLM's SamplingParams."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_token_ids=list(sampling.stop_token_ids),
        seed=sampling.seed,
        logprobs=0,
        detokenize=False,
    )


def completion(output: Any) -> Completion:
    """Of a final `RequestOutput`."""
    (first,) = output.outputs
    ids = tuple(int(token) for token in first.token_ids)
    rows = first.logprobs or ()
    spans = first.weight_versions or ()
    return Completion(
        ids,
        tuple(float(row[token].logprob) for token, row in zip(ids, rows, strict=False)),
        first.finish_reason or "abort",
        number(spans[0].version) if spans else 0,
    )


def number(version: str) -> int:
    """vLLM's label as a version; 0 for what it calls its own checkpoint, and for labels of others."""
    return int(version) if version.isdecimal() else 0
