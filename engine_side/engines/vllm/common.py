"""What the ways to a vLLM engine have in common: an `LLM` of this process, a hosted one and one behind a server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.errors import Busy, ConfigError, ProtocolError
from bridge.model.lora_format import LoraLimits
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common.published_state import PublishedState, number
from engine_side.engines.vllm.facts import VllmFacts


@dataclass
class VllmPublishedState(PublishedState):
    """Also what waits to be dropped."""

    retiring: set[str] = field(default_factory=set)


class VllmDriver:
    """The driver half as far as it is the same everywhere."""

    kind = "vllm"
    can_generate = True

    def __init__(self, facts: VllmFacts, where: str) -> None:
        self.facts = facts
        self.where = where
        self._blocks_used = False
        """Requests of the bridge's own have run in the paused engine, and left their KV in its cache."""

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
    def vocabulary(self) -> int | None:
        return self.facts.vocabulary or None

    @property
    def cache_grain(self) -> int:
        return self.facts.block

    @property
    def lora(self) -> LoraLimits | None:
        return self.facts.lora

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run the job in every worker. Raises ProtocolError for one that could not answer, PeerLost for dead ones."""
        deadline.check("a job for vLLM's workers")
        if self._blocks_used:  # only now: a cache that is left alone serves the next push's check
            self._free_blocks()
        wrong = [str(text) for text in self._run_job(job, deadline) if text]
        if wrong:
            raise ProtocolError("a vLLM worker could not run a job", where=self.where, got="; ".join(wrong))

    def _free_blocks(self) -> None:
        """A job may take any KV block of the paused engine. Raises ProtocolError when vLLM keeps them."""
        if not self._reset_prefix_cache():
            raise ProtocolError("vLLM did not free its KV blocks", where="reset_prefix_cache", got="False")
        self._blocks_used = False

    @abstractmethod
    def _reset_prefix_cache(self) -> bool:
        """Running requests give their blocks back as well, and compute them again. vLLM's answer."""

    @abstractmethod
    def _run_job(self, job: bytes, deadline: Deadline) -> Sequence[Any]:
        """`extension.bridge_run` in every worker; what each said."""


def asleep(where: str, remedy: str) -> ConfigError:
    return ConfigError("the engine is asleep or paused", where=where, got="asleep", remedy=remedy)


def keeping(where: str) -> Busy:
    """vLLM's scheduler runs for all or for none: what was kept would go on before a version serves."""
    return Busy("kept requests would run as well", where=where, remedy="resume the engine first")


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
