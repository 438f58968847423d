"""Give a rank SGLang's own skeleton, loader, post-load step and calls of single modules, in a scheduler process."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.rotary_embedding import factory as rotary
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from torch import nn

from bridge.errors import GATHER, SAME_MODEL, ShapeMismatch
from engine_side.engines.common.published_state import lora_not_loaded
from engine_side.engines.common.rank_host import EngineRankHost, without_new_entries
from engine_side.engines.sglang.logprobs import prompt_logprobs
from engine_side.engines.sglang.lora_slots import SglangLoraSlots
from engine_side.live.inplace import meta_twin
from engine_side.plan.loader_errors import LOADER_ERRORS
from engine_side.plan.post_load import ModuleState
from engine_side.plan.unfilled import checkpoint_tensors
from engine_side.protocol import PromptBatch

_STEP = "post_load_weights"
_WHOLE = ("",)


class SglangRankHost(EngineRankHost[SglangLoraSlots]):
    """The `RankHost` of one `sglang.srt.managers.scheduler.Scheduler`."""

    lora_remedy = ("sglang.Engine", "enable_lora=True and max_loras_per_batch=3 or more")
    vocabulary_class = VocabParallelEmbedding
    method_class = QuantizeMethodBase

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._runner = scheduler.tp_worker.model_runner
        self._derived = DerivedWeights()
        folder = Path(self._runner.model_config.model_path)
        self.checkpoint = folder if folder.is_dir() else None
        manager = self._runner.lora_manager
        self.loras = None if manager is None else SglangLoraSlots(self, manager, self.checkpoint)

    def _model_config(self) -> Any:
        return self._runner.model_config

    @property
    def rank(self) -> int:
        return int(torch.distributed.get_rank(self._scheduler.tp_group.cpu_group))

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self._runner.model
        return model

    def skeleton(self) -> nn.Module:
        """Run SGLang's own constructor on the meta device. Parameters that it makes on another one move there."""
        config, load = self._runner.model_config, self._runner.load_config
        with without_new_entries(rotary._ROPE_DICT), set_default_torch_dtype(config.dtype), torch.device("meta"):
            made: nn.Module = _initialize_model(config, load, _get_quantization_config(config, load))
        # some layers name their device, and torch.empty ignores the context where somebody has wrapped it
        twins: dict[int, torch.Tensor] = {}
        for module in made.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = meta_twin(parameter, twins)  # type: ignore[assignment]
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
                    remedy=SAME_MODEL if weight.numel() else GATHER,
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
        step = getattr(getattr(module, "quant_method", None), "process_weights_after_loading", None)
        with set_default_torch_dtype(self._runner.model_config.dtype):  # kernels are built for it
            if step is not None:
                step(module)
            return self._derived.renew(module, self.model) or step is not None

    def _embed_ids(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = module._embed_local_shard(ids)
        return out

    def _has_experts(self, module: nn.Module) -> bool:
        return isinstance(module, FusedMoE)

    def _apply_experts(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        count = int(module.num_local_experts)  # row i goes to expert i % count of this rank alone
        chosen = torch.arange(len(x), device=x.device).remainder(count).unsqueeze(1).to(torch.int32)
        weights = torch.ones(chosen.shape, dtype=torch.float32, device=x.device)
        logits = torch.zeros(len(x), count, dtype=torch.float32, device=x.device)
        topk = StandardTopKOutput(weights, chosen, logits)
        rows = x.clone()  # SGLang's kernels may write their output over their input
        made = module.quant_method.apply(layer=module, dispatch_output=StandardDispatchOutput(rows, None, topk))
        out: torch.Tensor = made.hidden_states
        return out

    def prompt_logprobs(self, prompts: PromptBatch, lora: str | None = None) -> list[list[float]]:
        """Score prompts past SGLang's queues. All ranks call it together. Raises NotFound for an unknown LoRA,
        ConfigError for a prompt that does not fit."""
        loaded = self.loaded_loras()
        if lora is not None and lora not in loaded:
            raise lora_not_loaded(lora)
        return prompt_logprobs(self._scheduler, prompts, None if lora is None else loaded[lora])

    def loaded_loras(self) -> dict[str, str]:
        """Return SGLang's id of every loaded LoRA by its name, whoever loaded it."""
        return {} if self.loras is None else self.loras.names


class DerivedWeights:
    """Renews the tensors that a model derives from its weights and keeps in modules without weights of their own, such
    as the absorbed projections of latent attention.

    The step that derives them, `post_load_weights`, belongs to the whole model. The modules that it writes to, in one
    host's live model and its skeletons, are found by running it on a skeleton.
    """

    def __init__(self) -> None:
        self._holders: tuple[str, ...] | None = None
        self._known: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], str]] = WeakKeyDictionary()
        self._roots: WeakSet[nn.Module] = WeakSet()

    def learn(self, skeleton: nn.Module) -> None:
        """Find, or remember, the modules of a fresh skeleton that the step writes to."""
        if not callable(getattr(skeleton, _STEP, None)):
            return
        if self._holders is None:
            self._holders = _holders(skeleton)
        self._know(skeleton, self._holders)

    def renew(self, module: nn.Module, live: nn.Module) -> bool:
        """Run the step for one module of `live` or of a skeleton, after its weights were written; it writes into the
        existing storages. Returns False for a module that the step does not write to."""
        if self._holders is not None and live not in self._roots:
            self._know(live, self._holders)
        root, path = self._known.get(module, (None, ""))
        owner = None if root is None else root()
        if owner is None:
            return False
        step: Any = getattr(owner, _STEP)
        if path and "weight_names" in inspect.signature(step).parameters:
            step(weight_names=[f"{path}.{name}" for name, _ in module.named_parameters()])
        else:
            step()
        return True

    def _know(self, root: nn.Module, paths: tuple[str, ...]) -> None:
        self._roots.add(root)
        for path in paths:
            self._known[root.get_submodule(path)] = (ref(root), path)


def _holders(root: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that the step writes to; the whole model if it fails on a skeleton."""
    modules = list(root.named_modules())
    before = {path: (ModuleState.of(module).entries, dict(vars(module))) for path, module in modules}
    try:
        getattr(root, _STEP)()
    except LOADER_ERRORS:
        return _WHOLE
    found = []
    for path, module in modules:
        after, (entries, attributes) = ModuleState.of(module).entries, before[path]
        if after.keys() != entries.keys() or any(after[key] is not entries[key] for key in after):
            found.append(path)
            vars(module).clear()  # a skeleton stays as before the step
            vars(module).update(attributes)
    return tuple(found)
