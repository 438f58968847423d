"""What the ways to an SGLang engine have in common: an `Engine` of this process, hosted or not, and one behind a
server."""

from __future__ import annotations

import base64
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from bridge.errors import ConfigError, ProtocolError
from bridge.model.lora_format import LoraLimits
from bridge.protocol.deadline import Deadline
from engine_side.engines.common.published_state import PublishedState
from engine_side.engines.sglang import LOADER
from engine_side.engines.sglang.scheduler import ADAPTERS, FACTS, JOB, Answer, Facts

_UNREACHED = {
    **dict.fromkeys(
        (
            "enable_hierarchical_cache",  # its host pool is emptied, but stores can be attached to it at any time
            "hicache_storage_backend",
            "enable_unified_cache_external_linker",
            "enable_lmcache",
            "enable_flexkv",
            "enable_hisparse",
            "radix_cache_backend",
        ),
        "it keeps KV where flush_cache does not reach: that of the old weights would outlive a push",
    ),
    "enable_mm_global_cache": "it keeps encoder outputs, and those of the old weights would outlive a push",
    **dict.fromkeys(
        ("enable_eplb", "elastic_ep_backend", "enable_paged_experts"),
        "experts would move away from where a push's plan has found them",
    ),
    **dict.fromkeys(
        ("enable_elastic_expert_backup", "kt_weight_path"),
        "experts would also be read from where a push does not write",
    ),
}
"""Arguments that are refused when set, and why."""


@dataclass
class Books(PublishedState):
    """Also the adapters that were made known to SGLang's front end."""

    known: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Arguments:
    """What the bridge reads among the arguments that an engine was started with."""

    ranks: int
    device: str
    checkpoint: Path | None
    quantisation: str | None
    lora: LoraLimits | None

    @classmethod
    def read(cls, get: Callable[[str], Any], where: str, start: str) -> Arguments:
        """`get` answers an argument by SGLang's name, `start` is how such an engine is started. Raises ConfigError for
        one that cannot be driven, with the argument to change."""
        _check(get, where, start)
        path, quantisation = Path(get("model_path")), get("quantization")
        # one slot less than SGLang has: it keeps one that is never pinned
        slots = max(0, int(get("max_loras_per_batch")) - 1)
        rank = get("max_lora_rank") if get("enable_lora") else None
        return cls(
            ranks=int(get("tp_size")),
            device=str(get("device")),
            checkpoint=path if path.is_dir() and str(get("load_format")) != "dummy" else None,
            quantisation=None if quantisation is None else str(quantisation),
            lora=None if rank is None else LoraLimits(int(rank), slots),
        )


class SglangDriver:
    """The driver half as far as it is the same everywhere."""

    kind = "sglang"
    can_generate = True

    def __init__(self, arguments: Arguments, where: str) -> None:
        self.arguments, self.where = arguments, where
        self._limits: Facts | None = None

    @property
    def ranks(self) -> int:
        return self.arguments.ranks

    @property
    def checkpoint(self) -> Path | None:
        """The folder that was loaded; None for an engine that was started with dummy weights."""
        return self.arguments.checkpoint

    @property
    def quantisation(self) -> str | None:
        return self.arguments.quantisation

    @property
    def lora(self) -> LoraLimits | None:
        return self.arguments.lora

    @property
    def max_prompt(self) -> int:
        return self._known_facts().max_prompt

    @property
    def vocabulary(self) -> int:
        return self._known_facts().vocabulary

    @property
    def cache_grain(self) -> int:
        return self._known_facts().page

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Weights lie in other processes."""

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run the job in every rank. Raises ProtocolError where one could not answer, PeerLost, DeadlineExceeded."""
        self.ask(JOB, base64.b64encode(job).decode(), deadline=deadline)

    def adapters(self) -> tuple[str, ...]:
        return tuple(self.held())

    def held(self) -> dict[str, str]:
        """Name -> SGLang's id of the adapters that the ranks hold."""
        return {} if self.lora is None else self.ask(ADAPTERS).adapters

    def facts(self, deadline: Deadline | None = None) -> Facts:
        """Asked anew."""
        facts = self.ask(FACTS, deadline=deadline).facts
        if facts is None:
            raise ProtocolError("an SGLang scheduler did not answer what it was asked", where=self.where)
        self._limits = facts
        return facts

    def _known_facts(self) -> Facts:
        """Of which only whether it is paused changes."""
        return self._limits or self.facts()

    def ask(self, verb: str, text: str = "", *, deadline: Deadline | None = None) -> Answer:
        """A request of the bridge to every rank; rank 0's answer. Raises ConfigError for schedulers without the plugin,
        ProtocolError for an answer that says that something went wrong."""
        wait = deadline or self._until()
        wait.check("a job for SGLang's schedulers")
        return read_answer(self.where, *self._send(verb, text, wait))

    @abstractmethod
    def _until(self) -> Deadline:
        """How long a call may take that was given no deadline."""

    @abstractmethod
    def _send(self, verb: str, text: str, deadline: Deadline) -> tuple[bool, str]:
        """SGLang's `check_weights` with the bridge's action and these two words: (success, message)."""


def read_answer(where: str, ok: bool, message: str) -> Answer:
    """What the schedulers answered. Raises as `SglangDriver.ask`."""
    if not ok:
        raise ConfigError(
            "SGLang's schedulers do not know the bridge",
            where=where,
            expected="the plugin 'weighbridge' of the entry point group sglang.srt.plugins",
            got=message[:200],
            remedy="install weighbridge where SGLang runs, and let SGLANG_PLUGINS, if set, name 'weighbridge'",
        )
    try:
        answer = msgspec.json.decode(message, type=Answer)
    except msgspec.DecodeError as error:
        raise ProtocolError("an answer that cannot be read", where=where, got=str(error)) from error
    if answer.error:
        raise ProtocolError("an SGLang scheduler could not answer", where=where, got=answer.error)
    return answer


def _check(get: Callable[[str], Any], where: str, start: str) -> None:
    named = get("custom_weight_loader") or []
    if LOADER not in named:
        raise ConfigError(
            "this engine was started without the bridge's loader",
            where=where,
            expected=f'custom_weight_loader=["{LOADER}"]',
            got=repr(named),
            remedy=start,
        )
    for name in ("pp_size", "dp_size", "nnodes", "tokenizer_worker_num"):
        if get(name) != 1:
            raise ConfigError("not driven yet", where=name, expected="1", got=str(get(name)))
    if get("speculative_algorithm") is not None:
        raise ConfigError(
            "a draft model would keep its old weights", where="speculative_algorithm", expected="None", got="one"
        )
    if get("disaggregation_mode") != "null":
        raise ConfigError(
            "not driven yet", where="disaggregation_mode", expected="null", got=get("disaggregation_mode")
        )
    for name, why in _UNREACHED.items():
        if get(name):
            raise ConfigError(
                why,
                where=name,
                expected="an engine without it",
                got=repr(get(name)),
                remedy=f"start the engine without {name}",
            )
