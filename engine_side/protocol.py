"""Engine protocol: the two halves that every engine fills, a driver and a rank host.

The *driver* (`EngineDriver`) lives in the process that holds the engine's handle. A *rank host* (`RankHost`) lives in
each process that holds live parameters. Between them travel only opaque job frames, in whatever way the engine can run
one Python function in all of its workers. Answers never come back that way: each rank posts one page in the mailbox, so
a worker neither raises across an engine's RPC nor needs a return value.

How vLLM and SGLang fill it, where their behaviour is the reason for a rule below:

- dispatch. vLLM: `collective_rpc` of a worker method that the plugin adds. SGLang: an AROUND hook on the scheduler's
  `check_weights`, which shares the socket with pause and flush and reaches every rank.
- pause. vLLM: `sleep(level=0)` or `pause_generation`. SGLang: `pause_generation`, mode "retract" ("in_place" never lets
  the cache be flushed); it has no reply, so the scheduler is asked whether it paused.
- prompt_logprobs while paused. vLLM: `execute_model` on a hand-made `SchedulerOutput` over blocks from the end of the
  pool, after a reset of the caches, so that those are free. SGLang: hand-made `Req`s through
  `ScheduleBatch.prepare_for_extend` and `model_runner.forward`, then `release_kv_cache`.
- reset_caches. vLLM: `reset_prefix_cache(reset_running_requests=True)`. SGLang: `flush_cache().success`.
- past_gate. SGLang: scheduling is opened for the bridge's own request alone. vLLM: it is opened for all, and so not
  while there are kept requests.
- LoRA. vLLM: `LoRAModel.from_lora_tensors` into the worker's LoRA manager under an id that was never used, since its
  prefix cache is keyed by it. SGLang: `model_runner.load_lora_adapter_from_tensors` with `lora_alpha` = rank, since it
  scales by their quotient.
- skeleton. vLLM: `initialize_model` under a copied config with an empty forward context. SGLang:
  `type(model)(config, quant_config)`. Both under the meta device.

A rank that fails inside a collective leaves the others hanging: `prompt_logprobs` checks room and lengths first, and
every wait has a deadline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from bridge.model.declared_losses import DeclaredLosses
from bridge.model.lora_format import LoraLimits, LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline

PromptBatch = Sequence[Sequence[int]]
"""Token ids, one sequence per prompt."""


@dataclass(frozen=True)
class LoraView:
    """A part of one LoRA tensor in an engine's slot.

    `live` is a view of the slot that holds exactly the elements `index` of the tensor `name` (of its shape in the
    manifest): after the engine's cast the two are bit for bit equal. `padding` are the views of the slot around it that
    have to be zero. Several ranks, or several views of one rank, together hold a tensor's elements at least once.
    """

    name: str
    live: torch.Tensor
    index: tuple[slice, ...]
    padding: tuple[torch.Tensor, ...] = ()


class EngineDriver(Protocol):
    """Drives one engine from beside its handle. Called by EngineService only, from one thread at a time except
    `generate` and the properties."""

    @property
    def kind(self) -> str:
        """Short word for messages and receipts: "embedded", "module", "vllm", "sglang"."""
        ...

    @property
    def ranks(self) -> int:
        """Number of ranks with live parameters; ranks are numbered 0 .. ranks-1."""
        ...

    @property
    def can_generate(self) -> bool:
        """False for a plain module, which has no generation, no canary and no caches."""
        ...

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the checkpoint that this engine serves until its first push, if it knows: a source of version 0 for
        modules whose live storage is packed away."""
        ...

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Execute `engine_side.worker.rank.Rank.run(job)` once in every rank. Blocks until each has posted its answer;
        raises DeadlineExceeded or PeerLost. Works while the engine is paused."""
        ...

    def pause(self, inflight: str, deadline: Deadline) -> None:
        """Stop scheduling; running requests are drained, aborted or kept ("drain" | "abort" | "keep"). Idempotent.
        A kept request has its tokens so far and goes on under the weights that serve next. vLLM and SGLang compute its
        KV anew, over all of these tokens: their canary needs the blocks."""
        ...

    def resume(self) -> None:
        """Let requests run again. Idempotent."""
        ...

    @property
    def max_prompt(self) -> int | None:
        """Longest prompt in tokens that can be scored and continued by one; None when there is no such limit."""
        ...

    @property
    def cache_grain(self) -> int:
        """Tokens after which a prompt's prefix can be in the prefix cache (one KV block); 0 without such a cache."""
        ...

    def claim(self, owner: str) -> None:
        """Mark the engine as driven by this bridge. Raises Busy, naming the other bridge, while another one drives it:
        two of them would weigh one engine against two arenas. `close` gives the claim up."""
        ...

    @property
    def refusal(self) -> str | None:
        """The reason for which the engine refuses to generate now; None when it does not. It outlives `close`: an
        engine with unverified weights stays shut until a version was verified in it."""
        ...

    def publish(self, version: int, adapter: str | None = None) -> None:
        """Make `version` the one that completions report from now on, and the loaded adapter of this name what
        `generate(adapter="current")` uses (None: the base model)."""
        ...

    @property
    def published(self) -> tuple[int, str | None]:
        """The arguments of the last `publish`, by whatever bridge: the version that completions report, and the LoRA
        that "current" means; (0, None) for an engine without a push."""
        ...

    @property
    def lora(self) -> LoraLimits | None:
        """LoRA limits of the engine; None when it was started without LoRA."""
        ...

    def loaded_loras(self) -> tuple[str, ...]:
        """List the LoRA adapters that are loaded now, whoever loaded them."""
        ...

    def end_users(self, names: Iterable[str]) -> None:
        """End, as aborted, every running or waiting request that uses one of these adapters, or has asked for one by
        name. One that waits for "current" takes what is published when it begins. Works while paused. Privileged
        requests are left alone, unknown names ignored."""
        ...

    def retire(self, names: Iterable[str]) -> None:
        """Drop these adapters in every rank as soon as no running or waiting request uses them; at once where none
        does. New requests cannot ask for them any more. Unknown names are ignored. Does not block for requests."""
        ...

    def refuse(self, reason: str | None) -> None:
        """Make every way into the engine's generation raise EngineQuarantined with `reason`; None lifts it.
        Pausing alone is not refusing: a paused engine hangs its callers."""
        ...

    def reset_caches(self) -> bool:
        """Drop KV and prefix caches; the engine's own answer, checked by the caller."""
        ...

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        adapter: str = "current",
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        """Sample one completion per prompt, as users do, prefix cache reads allowed. Blocks while paused, unless
        `past_gate`: the cache check runs before the engine is opened to traffic. `adapter` is "current" (what was
        published last), "base", or the name of a loaded adapter; a request keeps what it began with. Raises
        DeadlineExceeded, and ends what has not finished, when the deadline passes (None waits); past the gate Busy,
        where the engine's kept requests would run as well."""
        ...

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Raise ConfigError, naming a parameter, when live weights of this process lie in one of these storages (data
        addresses): the trainer must not be pushed into itself. A no-op for engines in other processes."""
        ...

    def close(self) -> None:
        """Give up the claim and stop what this adapter started; leave an engine that belongs to the user as it is:
        running, or refusing."""
        ...


class RankHost(Protocol):
    """Offers one process with live parameters to `engine_side.worker.rank.Rank`."""

    @property
    def rank(self) -> int: ...

    @property
    def model(self) -> nn.Module:
        """The live root module, wrappers included."""
        ...

    def skeleton(self) -> nn.Module:
        """Build the same model class, config and parallel state on the meta device: no LoRA wrappers, no post-load
        work, so every parameter has its canonical shape and its loader attributes. Must not touch the live model."""
        ...

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Run the engine's own loader on a skeleton. Raises whatever that loader raises."""
        ...

    def post_load(self, module: nn.Module) -> bool:
        """Run the engine's own post-load step of this one module; False when it has none."""
        ...

    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call one unwrapped module on a batch of rows [n, features] or ids [n], without collectives: what this rank
        alone contributes. Raises NotImplementedError for a module that cannot be called alone."""
        ...

    def prompt_logprobs(self, prompts: PromptBatch, lora: str | None = None) -> list[list[float]]:
        """Compute the log-probability of token i+1 given tokens 0..i, per prompt, past the scheduler (the engine is
        paused) on fresh KV, with the loaded LoRA of this name (None: the base model alone). All ranks call it together;
        the answer of rank 0 counts."""
        ...

    def untie(self, names: Sequence[str]) -> bool:
        """Give storage of their own, in the live model and in later skeletons, to checkpoint names that the engine ties
        to others and under which the trainer holds different values. Values stay as they are. False when it cannot."""
        ...

    # ---- adapters (LoRA); an engine without LoRA raises UnsupportedLora from `plan_lora` ----

    def plan_lora(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Mapping[str, str]:
        """Tell the dtype that each LoRA tensor (names and shapes of `lora_format`) will have in this rank's slots.
        Writes nothing. Raises UnexpectedTensor (all modules that the engine lacks or did not wrap), ShapeMismatch
        (swapped or wrong shapes), UnsupportedLora (no LoRA here, rank above the maximum)."""
        ...

    def load_lora(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write an adapter into a free slot under a name that was never used before. The tensors are views of the
        arena, whole, and must not be kept. Raises ConfigError when no slot is free; the other slots are untouched."""
        ...

    def lora_views(self, name: str) -> Sequence[LoraView]:
        """Locate the tensors of a loaded LoRA in this rank, for the read-back. Raises NotFound."""
        ...

    def remove_lora(self, name: str) -> None:
        """Drop an adapter that no request uses: a load that did not pass. Unknown names are ignored."""
        ...


@runtime_checkable
class NamesUnloaded(Protocol):
    """Added by a rank host whose engine registers tensors that no checkpoint fills (constants, cache scales)."""

    def unloaded(self) -> frozenset[str]:
        """Paths of skeleton parameters and buffers that no push has to bring."""
        ...


@dataclass(frozen=True)
class QuantisedCheckpoint:
    """A checkpoint whose weights were quantised before the engine loaded them.

    Attributes:
        folder: where it lies.
        config: its `quantization_config`, as config.json has it.
        dtype: wire dtype in which the engine computes, and to which its loader would cast values.
    """

    folder: Path
    config: Mapping[str, Any]
    dtype: str


@runtime_checkable
class ServesCodes(Protocol):
    """Added by a rank host whose engine may have been started from quantised weights."""

    def quantised_checkpoint(self) -> QuantisedCheckpoint | None:
        """The checkpoint that the engine serves until its first push; None where it is not quantised, not at hand, or
        quantised by the engine itself as it loads."""
        ...


@runtime_checkable
class KnowsCheckpoint(Protocol):
    """Added by a rank host whose engine was started from a checkpoint: its names and shapes make errors exact."""

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the checkpoint; None for an engine that was started otherwise."""
        ...


@runtime_checkable
class EmptiesCaches(Protocol):
    """Added by a driver that cannot keep KV and prefix caches over a push, whatever `kv` asks for."""

    @property
    def why_caches_go(self) -> str:
        """Say what empties the caches, for the receipt."""
        ...


@runtime_checkable
class LivesInALoop(Protocol):
    """Added by a driver whose engine runs in an event loop of this process."""

    def refuse_caller(self) -> None:
        """Raise ConfigError when this thread runs that loop: blocking it would wait for itself."""
        ...


@runtime_checkable
class KnowsVocabulary(Protocol):
    """Added by a driver whose engine breaks, or guesses, at a token id that its model does not have."""

    @property
    def vocabulary(self) -> int | None:
        """Token ids of a prompt lie below this; None when the engine does not say."""
        ...


@runtime_checkable
class DeclaresLosses(Protocol):
    """Added by a driver whose engine may be configured to store or compute something more coarsely than its weights'
    dtype: then it may answer otherwise than the trainer on the same weights, and nothing is wrong."""

    @property
    def losses(self) -> DeclaredLosses:
        """List what the engine's configuration says to be coarser; never measured."""
        ...


@runtime_checkable
class MayBeQuantised(Protocol):
    """Added by a driver whose engine may hold weights in a form that no strategy can write."""

    @property
    def quantisation(self) -> str | None:
        """The engine's word for how its weights are stored; None where they are stored as they are computed with."""
        ...
