"""Give a rank SGLang's own skeleton, loader, post-load step and calls of single modules, in a scheduler process."""

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

from bridge.errors import ConfigError, ShapeMismatch
from engine_side.engines.common.published_state import not_held
from engine_side.engines.common.rank_host import EngineHost, call_alone
from engine_side.engines.sglang.derived import DerivedWeights
from engine_side.engines.sglang.logprobs import prompt_logprobs
from engine_side.engines.sglang.lora_slots import SglangLoraSlots
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.protocol import Prompts


class SglangRankHost(EngineHost[SglangLoraSlots]):
    """The `RankHost` of one `sglang.srt.managers.scheduler.Scheduler`."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._runner = scheduler.tp_worker.model_runner
        self._derived = DerivedWeights()
        manager = self._runner.lora_manager
        self.loras = None if manager is None else SglangLoraSlots(self, manager, self.checkpoint)

    @property
    def checkpoint(self) -> Path | None:
        folder = Path(self._runner.model_config.model_path)
        return folder if folder.is_dir() else None

    @property
    def lora_remedy(self) -> tuple[str, str]:
        return "sglang.Engine", "max_loras_per_batch=3 or more"

    @property
    def rank(self) -> int:
        return int(torch.distributed.get_rank(self._scheduler.tp_group.cpu_group))

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self._runner.model
        return model

    def skeleton(self) -> nn.Module:
        """Run SGLang's own constructor on the meta device. Raises ConfigError when a parameter got memory."""
        config, load = self._runner.model_config, self._runner.load_config
        with _shared_rotary(), set_default_torch_dtype(config.dtype), torch.device("meta"):
            made: nn.Module = _initialize_model(config, load, _get_quantization_config(config, load))
        # torch recognises its constructors by identity: one that somebody has wrapped ignores the device
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
        """Run SGLang's own loader on a skeleton. Raises what it raises, and ShapeMismatch for a tensor of another shape
        than the checkpoint's: on CPU SGLang fills a tensor that is too small up with zeros."""
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
                    remedy="trainer and engine must run the same model configuration",
                    names=(name,),
                )
            yield name, weight

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes in the checkpoint that this engine was started from; empty if that folder is not at hand."""
        folder = self.checkpoint
        return {} if folder is None else {info.name: info.shape for info in checkpoint_tensors(folder)}

    def post_load(self, module: nn.Module) -> bool:
        """Run one module's share of `DefaultModelLoader.postprocess_weights`, and of the model's own post-load step.
        Returns False for a module that has neither."""
        method = getattr(module, "quant_method", None)
        step = getattr(method, "process_weights_after_loading", None)
        if step is not None:
            step(module)
        return self._derived.renew(module, self.model) or step is not None

    @torch.no_grad()
    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call one module without collectives, for this rank's contribution alone. Experts take rows, each sent to one
        of them at weight 1; vocabulary layers take ids (rows of other ranks are zeros) or rows; linear layers rows.
        Raises NotImplementedError for another module with children."""
        method = getattr(module, "quant_method", None)
        if isinstance(module, FusedMoE):
            if not x.is_floating_point():
                raise NotImplementedError("experts take rows")
            return _experts(module, x)
        if not x.is_floating_point():
            if not isinstance(module, VocabParallelEmbedding):
                raise NotImplementedError(f"{type(module).__name__} takes no ids")
            ids: torch.Tensor = module._embed_local_shard(x)
            return ids
        if isinstance(method, QuantizeMethodBase):
            bias = getattr(module, "bias", None)
            out: torch.Tensor = method.apply(module, x, bias if isinstance(bias, torch.Tensor) else None)
            return out
        return call_alone(module, x)

    def prompt_logprobs(self, prompts: Prompts, adapter: str | None = None) -> list[list[float]]:
        """Score prompts past SGLang's queues. All ranks call it together. Raises NotFound for an unknown LoRA,
        ConfigError for a prompt that does not fit."""
        lora_id = None if adapter is None else self.loaded_loras().get(adapter)
        if adapter is not None and lora_id is None:
            raise not_held(adapter)
        return prompt_logprobs(self._scheduler, prompts, lora_id)

    def loaded_loras(self) -> dict[str, str]:
        """Return SGLang's id of every loaded LoRA by its name, whoever loaded it."""
        return {} if self.loras is None else self.loras.names


@contextmanager
def _shared_rotary() -> Iterator[None]:
    """Remove afterwards the rotary embeddings that SGLang cached inside: it shares them in the whole process, where
    none on the meta device may stay."""
    from sglang.srt.layers.rotary_embedding import factory

    cache: dict[Any, Any] = factory._ROPE_DICT
    before = set(cache)
    try:
        yield
    finally:
        for key in cache.keys() - before:
            del cache[key]


def _experts(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Send row i to expert i % E of this rank alone."""
    count = int(module.num_local_experts)
    chosen = torch.arange(len(x), device=x.device).remainder(count).unsqueeze(1).to(torch.int32)
    weights = torch.ones(chosen.shape, dtype=torch.float32, device=x.device)
    logits = torch.zeros(len(x), count, dtype=torch.float32, device=x.device)
    topk = StandardTopKOutput(weights, chosen, logits)
    rows = x.clone()  # SGLang's kernels may write their output over their input
    made = module.quant_method.apply(layer=module, dispatch_output=StandardDispatchOutput(rows, None, topk))
    out: torch.Tensor = made.hidden_states
    return out
