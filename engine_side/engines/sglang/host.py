"""The rank half in an SGLang scheduler: skeleton, loader, post-load step and single calls of modules, all SGLang's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from torch import nn

from bridge.errors import ConfigError, NotFound, ShapeMismatch
from engine_side.engines.common.rank_host import EngineRankHost
from engine_side.engines.sglang.derived import Derived
from engine_side.engines.sglang.logprobs import prompt_logprobs
from engine_side.engines.sglang.lora_slots import Loras
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.protocol import Prompts


class SglangRankHost(EngineRankHost[Loras]):
    """Over one scheduler (`sglang.srt.managers.scheduler.Scheduler`)."""

    lora_remedy = ("sglang.Engine", "max_loras_per_batch=3 or more")

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._runner = scheduler.tp_worker.model_runner
        self._derived = Derived()
        folder = Path(self._runner.model_config.model_path)
        self.checkpoint = folder if folder.is_dir() else None
        manager = self._runner.lora_manager
        self.loras = None if manager is None else Loras(self, manager, self.checkpoint)

    @property
    def rank(self) -> int:
        return int(torch.distributed.get_rank(self._scheduler.tp_group.cpu_group))

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self._runner.model
        return model

    def skeleton(self) -> nn.Module:
        """SGLang's own constructor on the meta device. Raises ConfigError when something of it landed elsewhere: torch
        recognises constructors by identity, so one that somebody wrapped ignores the device."""
        config, load = self._runner.model_config, self._runner.load_config
        with _shared_rotary(), set_default_torch_dtype(config.dtype), torch.device("meta"):
            made: nn.Module = _initialize_model(config, load, _get_quantization_config(config, load))
        astray = [name for name, parameter in made.named_parameters() if not parameter.is_meta]
        if astray:
            raise ConfigError(
                "SGLang's constructor did not stay on the meta device",
                where=", ".join(astray[:3]),
                expected="parameters without memory",
                got=f"{len(astray)} parameters with memory",
                remedy="look for code that replaces torch.empty and its like in the scheduler process",
            )
        self._derived.learn(made)
        return made

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Raises ShapeMismatch for a tensor of another shape than the checkpoint's: on CPU SGLang fills up with zeros
        what is too small."""
        skeleton.load_weights(self._of_known_shape(weights))  # type: ignore[operator]

    def _of_known_shape(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights:
            known = self._shapes.get(name)
            if known is not None and tuple(weight.shape) != known:
                raise ShapeMismatch(
                    "a tensor has another shape than in the engine's checkpoint",
                    where=name,
                    expected=str(list(known)),
                    got=str(list(weight.shape)),
                    remedy="trainer and engine must run the same configuration",
                    names=(name,),
                )
            yield name, weight

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        """By the checkpoint that this engine was started from; empty where that is not at hand."""
        folder = self.checkpoint
        return {} if folder is None else {info.name: info.shape for info in checkpoint_tensors(folder)}

    def post_load(self, module: nn.Module) -> bool:
        """One module's share of `DefaultModelLoader.postprocess_weights`, or of the whole model's own step."""
        method = getattr(module, "quant_method", None)
        step = getattr(method, "process_weights_after_loading", None)
        if step is not None:
            step(module)
        return self._derived.renew(module, self.model) or step is not None

    def _embed_ids(self, module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        if not isinstance(module, VocabParallelEmbedding):
            raise NotImplementedError(f"{type(module).__name__} takes no ids")
        out: torch.Tensor = module._embed_local_shard(ids)
        return out

    def _has_experts(self, module: nn.Module) -> bool:
        return isinstance(module, FusedMoE)

    def _apply_experts(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _experts(module, x)

    def _is_quantisable(self, module: nn.Module) -> bool:
        return isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)

    def prompt_logprobs(self, prompts: Prompts, adapter: str | None = None) -> list[list[float]]:
        lora_id = None if adapter is None else self.adapters().get(adapter)
        if adapter is not None and lora_id is None:
            raise NotFound("this engine holds no such adapter", where="adapter", got=repr(adapter))
        return prompt_logprobs(self._scheduler, prompts, lora_id)

    # ---- adapters ------------------------------------------------------------------------------------------------

    def adapters(self) -> dict[str, str]:
        """Name -> SGLang's id of every adapter that is loaded, whoever loaded it."""
        return {} if self.loras is None else self.loras.names


@contextmanager
def _shared_rotary() -> Iterator[None]:
    """SGLang caches rotary embeddings for the process: one that was made on the meta device must not stay there."""
    from sglang.srt.layers.rotary_embedding import factory

    cache: dict[Any, Any] = factory._ROPE_DICT
    before = set(cache)
    try:
        yield
    finally:
        for key in cache.keys() - before:
            del cache[key]


def _experts(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Row i goes to expert i % E of this rank alone."""
    count = int(module.num_local_experts)
    chosen = torch.arange(len(x), device=x.device).remainder(count).unsqueeze(1).to(torch.int32)
    weights = torch.ones(chosen.shape, dtype=torch.float32, device=x.device)
    logits = torch.zeros(len(x), count, dtype=torch.float32, device=x.device)
    topk = StandardTopKOutput(weights, chosen, logits)
    rows = x.clone()  # SGLang's kernels may write their output over their input
    made = module.quant_method.apply(layer=module, dispatch_output=StandardDispatchOutput(rows, None, topk))
    out: torch.Tensor = made.hidden_states
    return out
