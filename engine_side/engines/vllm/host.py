"""The rank host in a vLLM worker: skeleton, loader, post-load step and single calls of modules, all of them vLLM's."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding, get_masked_input_and_mask
from vllm.model_executor.model_loader.utils import device_loading_context, initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from engine_side.engines.common.rank_host import EngineRankHost, without_new_entries
from engine_side.engines.vllm.logprobs import prompt_logprobs
from engine_side.engines.vllm.lora_slots import VllmLoraSlots
from engine_side.live.inplace import meta_twin
from engine_side.protocol import PromptBatch

_POST_LOAD = "process_weights_after_loading"
_UNWRITTEN = frozenset({torch.empty, torch.empty_strided})


class VllmRankHost(EngineRankHost[VllmLoraSlots]):
    """The host of one worker (`vllm.v1.worker.worker_base.WorkerBase`)."""

    lora_remedy = ("vllm.LLM", "enable_lora=True and max_loras=2 or more")
    vocabulary_class = VocabParallelEmbedding
    method_class = QuantizeMethodBase

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._config: VllmConfig = worker.vllm_config
        self._constructor_reads_values = False
        self.loras = None if self._config.lora_config is None else VllmLoraSlots(worker)
        folder = Path(self._config.model_config.model)
        self.checkpoint = folder if folder.is_dir() else None

    @property
    def rank(self) -> int:
        """The worker's global rank."""
        return int(self._worker.rank)

    @property
    def model(self) -> nn.Module:
        """The live model, with the wrappers of LoRA layers."""
        model: nn.Module = self._worker.model_runner.get_model()
        return model

    def skeleton(self) -> nn.Module:
        """Make the model anew with vLLM's own constructor, on the meta device.

        The config is copied with registries of its own: layers register by name in the live config's, where the live
        ones stand already.
        """
        config = copy.copy(self._config)
        config.compilation_config = _with_own_containers(config.compilation_config)
        config.compilation_config.static_forward_context = {}
        made = self._made_on_meta(config)
        _load_at_once(made)
        return made

    def _made_on_meta(self, config: VllmConfig) -> nn.Module:
        if not self._constructor_reads_values:
            try:
                return _construct(config, torch.device("meta"))
            except (NotImplementedError, RuntimeError):
                # it reads values that it has computed, such as the slopes of ALiBi: compute those
                self._constructor_reads_values = True
                config.compilation_config.static_forward_context = {}
        made = _construct(config, _EmptyOnMeta())
        _move_to_meta(made, {id(module) for module in self.model.modules()})
        return made

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Run vLLM's own loader on a skeleton. Raises what that raises."""
        _call_if_present(skeleton, "load_weights", weights)

    def post_load(self, module: nn.Module) -> bool:
        """Run one module's share of vLLM's `process_weights_after_loading`, in its order: the quantisation method's,
        then the attention layer's own, then the model's
        (https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/model_loader/utils.py)."""
        with set_default_torch_dtype(self._config.model_config.dtype):  # kernels are built for it
            return self._post_load(module)

    def _post_load(self, module: nn.Module) -> bool:
        method = getattr(module, "quant_method", None)
        found = False
        # the KV cache's step deletes the scales that it reads: without them it has run
        is_done = isinstance(method, BaseKVCacheMethod) and not hasattr(module, "k_scale")
        if isinstance(method, QuantizeMethodBase) and not is_done:
            with device_loading_context(module, self._worker.device):
                method.process_weights_after_loading(module)
            _call_if_present(module, "update_param_tp_status")
            found = True
        if is_deferred_attention_layer(module):
            with device_loading_context(module, self._worker.device):
                _call_if_present(module, _POST_LOAD, self._config.model_config.dtype)
            found = True
        elif not found and type(module) is type(self.model):
            found = _call_if_present(module, _POST_LOAD)
        return found

    def prompt_logprobs(self, prompts: PromptBatch, lora: str | None = None) -> list[list[float]]:
        """Compute prompt log-probabilities in the paused engine, with a loaded LoRA or without; all ranks together."""
        request = None if lora is None else self._slots(lora).request(lora)
        return prompt_logprobs(self._worker, prompts, request)

    def _model_config(self) -> Any:
        return self._config.model_config

    # ---- calls of single modules ---------------------------------------------------------------------------------

    def _has_experts(self, module: nn.Module) -> bool:
        return isinstance(getattr(module, "quant_method", None), FusedMoEMethodBase)

    def _apply_experts(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Row i goes to expert i % E alone."""
        method, count = module.quant_method, module.global_num_experts
        chosen = torch.arange(len(x), device=x.device).remainder(count).unsqueeze(1).to(torch.int32)
        out: torch.Tensor
        if method.is_monolithic:
            logits = torch.full((len(x), count), -1e4, dtype=torch.float32, device=x.device)
            out = method.apply_monolithic(module, x, logits.scatter_(1, chosen.long(), 1e4))
        else:
            weights = torch.ones(chosen.shape, dtype=torch.float32, device=x.device)
            out = method.apply(module, x, weights, chosen, None, None)
        return out

    def _embed_ids(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        mask: torch.Tensor | None = None
        if module.tp_size > 1:
            at = module.shard_indices
            ids, mask = get_masked_input_and_mask(
                ids,
                at.org_vocab_start_index,
                at.org_vocab_end_index,
                at.num_org_vocab_padding,
                at.added_vocab_start_index,
                at.added_vocab_end_index,
            )
        out: torch.Tensor = module.quant_method.embedding(module, ids.long())
        return out if mask is None else out.masked_fill(mask.unsqueeze(-1), 0)


def _call_if_present(module: nn.Module, method: str, *args: Any) -> bool:
    """Call a method that vLLM looks up by name; False where the module has none."""
    found = getattr(module, method, None)
    if not callable(found):
        return False
    found(*args)
    return True


class _EmptyOnMeta(TorchFunctionMode):
    """Makes unwritten memory on the meta device; tensors with values are computed where the constructor asks for
    them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in _UNWRITTEN and given.get("device") is None:
            given["device"] = torch.device("meta")
        return func(*args, **given)


def _construct(config: VllmConfig, where: AbstractContextManager[Any]) -> nn.Module:
    dtype, rotary = config.model_config.dtype, rotary_embedding._ROPE_DICT
    with without_new_entries(rotary), set_current_vllm_config(config), set_default_torch_dtype(dtype), where:
        made: nn.Module = initialize_model(vllm_config=config)
    return made


def _load_at_once(model: nn.Module) -> None:
    """Take back what a quantiser that works as weights arrive does to its layers' loaders: these keep the weights back
    until a layer is complete, and then quantise it. Here that step is the layer's post-load, and is run as such."""
    try:
        from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
        from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
    except ImportError:  # a version that quantises only after it has loaded
        return
    for module in model.modules():
        info = get_layerwise_info(module)
        if not info.can_load():
            continue
        for tensor in get_layer_tensors(module).values():
            if hasattr(tensor, "weight_loader"):
                tensor.weight_loader = _get_original_loader(tensor)
        info.reset()


def _move_to_meta(model: nn.Module, live: Container[int]) -> None:
    """Replace parameters and buffers that were made with values by meta tensors, ties and views kept. Modules that
    belong to the `live` model too (shared rotary embeddings) are left alone."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if id(module) in live:
            continue
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and tensor.device.type != "meta":
                    registry[name] = meta_twin(tensor, made)  # type: ignore[assignment]


def _with_own_containers(config: Any) -> Any:
    """A copy of a config whose dicts, lists and sets are copies too."""
    out = copy.copy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, (dict, list, set)):
            object.__setattr__(out, name, copy.copy(value))
    return out
