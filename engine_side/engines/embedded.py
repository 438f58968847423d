"""Connects the embedded engine: `EmbeddedDriver` beside its handle, `EmbeddedRankHost` in the process of each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model.declared_losses import DeclaredLosses
from bridge.model.lora_format import LoraSpec
from bridge.model.torch_dtypes import dtype_name
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import BASE, CURRENT, Engine
from engine_side.embedded.layers import LinearBase, RMSNorm, VocabParallelEmbedding
from engine_side.embedded.lora.manager import LoraManager
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.runner import ModelRunner
from engine_side.embedded.wrappers import unwrap
from engine_side.engines.common import claim
from engine_side.engines.common.hosting import check_names
from engine_side.engines.common.rank_host import LoraRankHost
from engine_side.engines.common.refusals import require_apart
from engine_side.protocol import PromptBatch, QuantisedCheckpoint


class EmbeddedDriver:
    """Drives an Engine of this process. `close` also closes an `owned` engine, and leaves another one running."""

    kind = "embedded"
    can_generate = True

    def __init__(self, engine: Engine, *, owned: bool = False) -> None:
        self.engine = engine
        self._owned = owned
        config, runner = engine.config, engine.runner
        self.checkpoint = Path(config.path) if config.load == "checkpoint" else None
        self.ranks = config.tensor_parallel_size
        self.max_prompt = runner.limits.max_seq_len - 1
        self.vocabulary = runner.model_config.vocab_size
        self.cache_grain = runner.limits.block_size
        self.lora = None if runner.lora is None else runner.lora.limits
        quantised = runner.model_config.raw.get("quantization_config")
        self.losses = DeclaredLosses(config.kv_dtype, config.kv_dtype, quantised and str(quantised["quant_method"]))

    def claim(self, owner: str) -> None:
        claim.take(self.engine, self, owner)

    def dispatch(self, job: bytes, deadline: Deadline) -> None:
        """Run `job` in rank 0 (this thread) and, at the same time, in the children."""
        self.engine.run_job(job, deadline)

    def pause(self, inflight: str, deadline: Deadline) -> None:
        self.engine.pause(inflight, deadline)

    def resume(self) -> None:
        self.engine.resume()

    def publish(self, version: int, adapter: str | None = None) -> None:
        self.engine.publish(version, adapter)

    @property
    def published(self) -> tuple[int, str | None]:
        return self.engine.weight_version, self.engine.adapter

    def end_users(self, names: Iterable[str]) -> None:
        self.engine.end_users(names)

    def loaded_loras(self) -> tuple[str, ...]:
        return self.engine.adapters

    def retire(self, names: Iterable[str]) -> None:
        self.engine.retire(names)

    @property
    def refusal(self) -> str | None:
        return self.engine.refusal

    def refuse(self, reason: str | None) -> None:
        self.engine.refuse(reason)

    def reset_caches(self) -> bool:
        """Forget KV and prefixes. Kept requests are preempted and computed again under the new weights."""
        return self.engine.reset_prefix_cache(reset_running_requests=True)

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        adapter: str = CURRENT,
        *,
        past_gate: bool = False,
        deadline: Deadline | None = None,
    ) -> list[Completion]:
        return self.engine.generate(prompts, sampling, adapter, past_gate=past_gate, deadline=deadline)

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Raise ConfigError when a live weight lies in one of these storages. Only rank 0's lie in this process."""
        require_apart(self.engine.runner.model.named_parameters(), storages)

    def close(self) -> None:
        claim.give_up(self.engine, self)
        if self._owned:
            self.engine.close()


class EmbeddedRankHost(LoraRankHost[LoraManager]):
    """Gives the bridge's rank the live model of the process that it runs in."""

    lora_remedy = ("EngineConfig", "max_loras=2 (one serves while the next is loaded)")

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.loras = runner.lora
        self.checkpoint: Path | None = Path(runner.config.path)

    @property
    def rank(self) -> int:
        return self._runner.tp.rank

    @property
    def model(self) -> nn.Module:
        return self._runner.model

    def skeleton(self) -> nn.Module:
        return self._runner.skeleton()

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._runner.load_weights(skeleton, weights)

    def post_load(self, module: nn.Module) -> bool:
        return self._runner.post_load(module)

    @torch.no_grad()
    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call one module alone, without collectives. Linear layers and heads take [n, features of this rank],
        embeddings ids [n] (rows of other ranks are zeros), norms [n, features]; experts take [n, hidden] and send row i
        to expert i % E at weight 1. Raises NotImplementedError for any other module."""
        module = unwrap(module)
        if isinstance(module, FusedMoE):
            ids = torch.arange(len(x)).remainder(module.num_experts).unsqueeze(1)
            rows = x.to(module.params_dtype)
            return module.local(rows, torch.ones_like(ids, dtype=rows.dtype), ids)
        if isinstance(module, VocabParallelEmbedding | LinearBase):
            return module.local(x.to(module.params_dtype) if x.is_floating_point() else x)
        if isinstance(module, RMSNorm):
            out: torch.Tensor = module(x.to(module.weight.dtype))
            return out
        raise NotImplementedError(f"{type(module).__name__} cannot be called alone")

    def prompt_logprobs(self, prompts: PromptBatch, lora: str | None = None) -> list[list[float]]:
        return self._runner.prompt_logprobs(prompts, lora)

    def quantised_checkpoint(self) -> QuantisedCheckpoint | None:
        """The engine's folder, where its config declares quantised weights."""
        config = self._runner.model_config.raw.get("quantization_config")
        if not isinstance(config, Mapping):
            return None
        return QuantisedCheckpoint(Path(self._runner.config.path), config, dtype_name(self._runner.limits.dtype))

    def untie(self, names: Sequence[str]) -> bool:
        return self._runner.untie(names)

    def load_lora(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        if name in ("", BASE, CURRENT):
            raise ConfigError(
                "a LoRA cannot have this name",
                where="adapter",
                expected=f"a name other than {BASE!r} and {CURRENT!r}, which have a meaning of their own in requests",
                got=repr(name),
                remedy="load it under another name",
            )
        super().load_lora(name, tensors, spec)


def rank_run(runner: ModelRunner) -> Callable[[bytes], None]:
    """Return `Rank.run` over this process's runner, which executes the driver's jobs. The runner imports this factory
    by name (`engine_side.embedded.runner.RANK_EXTENSION`) at the first job."""
    from engine_side.worker.rank import Rank

    return Rank(EmbeddedRankHost(runner)).run


def attach(engine: object) -> EmbeddedDriver | None:
    """Return the driver of an Engine of this process; None for any other object."""
    return EmbeddedDriver(engine) if isinstance(engine, Engine) else None


def host(path: str, arguments: Mapping[str, Any]) -> EmbeddedDriver:
    """Start an engine from a checkpoint folder in this process. Raises ConfigError, naming the argument, for one that
    `EngineConfig` does not have, or not with this value."""
    check_names("embedded", "EngineConfig", arguments, EngineConfig.__struct_fields__, "path")
    return EmbeddedDriver(Engine(EngineConfig(path, **arguments)), owned=True)
