"""Parts of the driver that are the same for an `LLM` of this process, a hosted AsyncLLM and a server."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from bridge.errors import Busy, ProtocolError
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.engines.common.published_state import lora_not_loaded, parse_version
from engine_side.engines.vllm.facts import VllmFacts
from engine_side.engines.vllm.plugin import METHOD


class VllmDriver:
    """Base of vLLM's drivers.

    Attributes:
        where: the engine in messages.
        max_prompt: one token less than the model's length, for a prompt is continued by one.
    """

    kind = "vllm"
    can_generate = True
    why_caches_go = "the pause frees vLLM's KV blocks, in which the canary's prompts run"

    def __init__(self, facts: VllmFacts, where: str) -> None:
        self.where = where
        self.ranks = facts.ranks
        self.checkpoint = facts.checkpoint
        self.quantisation = facts.quantisation
        self.losses = facts.losses
        self.max_prompt = facts.max_len - 1
        self.vocabulary = facts.vocabulary or None
        self.cache_grain = facts.block
        self.lora = facts.lora
        self._blocks_used = False
        """Requests of the bridge have run in the paused engine, and their KV is still in its cache."""

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run a rank job in every worker. Blocks.

        Raises:
            ProtocolError: a worker could not answer through the mailbox.
            PeerLost: workers are gone.
            DeadlineExceeded: before or during the call.
        """
        deadline.check("a job for vLLM's workers")
        if self._blocks_used:  # only now: a cache that is left alone serves the next push's check
            self._free_blocks()
        wrong = [str(text) for text in self._run_job(job, deadline) if text]
        if wrong:
            raise ProtocolError(
                "a vLLM worker could not run a job",
                where=self.where,
                expected="an answer in the mailbox",
                got="; ".join(wrong),
                remedy="run the same version of weighbridge beside vLLM and here; vLLM's log has the details",
            )

    def reset_caches(self) -> bool:
        """Drop prefix, encoder and multimodal caches; kept requests are computed again under the new weights."""
        answer = self._call("reset_prefix_cache", reset_running_requests=True)
        self._call("reset_mm_cache")
        self._call("reset_encoder_cache")
        return bool(answer)

    def _free_blocks(self) -> None:
        """Free the KV blocks of the paused engine, for the canary; kept requests give theirs back and compute them
        again. Raises ProtocolError when vLLM keeps them."""
        if not self._call("reset_prefix_cache", reset_running_requests=True):
            raise ProtocolError(
                "vLLM did not free its KV blocks",
                where="reset_prefix_cache",
                expected="True",
                got="False",
                remedy="look for requests that vLLM still runs, and push again",
            )
        self._blocks_used = False

    def _run_job(self, job: bytes, deadline: Deadline) -> Sequence[Any]:
        """Call `plugin.bridge_run` in every worker. Returns what each answered."""
        answers: Sequence[Any] = self._call("collective_rpc", deadline, method=METHOD, args=(job,))
        return answers

    @abstractmethod
    def _call(self, name: str, deadline: Deadline | None = None, /, **arguments: Any) -> Any:
        """Call a method of vLLM's engine by name. Raises PeerLost, DeadlineExceeded."""


def kept_requests_error(where: str) -> Busy:
    """The error for requests past the gate: vLLM schedules all or none, so kept requests would go on before a version
    serves."""
    return Busy(
        "kept requests would run as well",
        where=where,
        expected="an engine without requests",
        got="requests that a push with inflight='keep' has left inside",
        remedy="resume the engine first",
    )


def list_loras(loaded: Mapping[str, int], held: Iterable[int]) -> tuple[str, ...]:
    """Names of the LoRAs that the bridge loaded, then `#id` for the rest of those that vLLM holds: of adapters from
    folders it keeps no names in its core."""
    return (*loaded, *(f"#{lora_id}" for lora_id in sorted(set(held) - set(loaded.values()))))


def request_lora(name: str, loaded: Container[str]) -> Any:
    """The LoRARequest for a loaded LoRA. Raises NotFound."""
    from engine_side.engines.vllm.lora_slots import lora_request

    if name not in loaded:
        raise lora_not_loaded(name)
    return lora_request(name)


def sampling_parameters(sampling: Sampling) -> Any:
    """Translate our Sampling into vLLM's SamplingParams."""
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


def read_completion(output: Any) -> Completion:
    """Translate a final RequestOutput of vLLM. The version is the one that the first token was computed with."""
    (first,) = output.outputs
    ids = tuple(int(token) for token in first.token_ids)
    rows = first.logprobs or ()
    spans = first.weight_versions or ()
    return Completion(
        ids,
        tuple(float(row[token].logprob) for token, row in zip(ids, rows, strict=False)),
        first.finish_reason or "abort",
        parse_version(spans[0].version) if spans else 0,
    )
