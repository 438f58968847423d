"""The rank half in a vLLM worker: skeleton, loader, post-load step and single calls of modules, all of them vLLM's."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding, get_masked_input_and_mask
from vllm.model_executor.model_loader.utils import device_loading_context, initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from engine_side.engines.common.rank_host import EngineRankHost, call_alone
from engine_side.engines.vllm.logprobs import prompt_logprobs
from engine_side.engines.vllm.lora_slots import VllmLoraSlots
from engine_side.live.inplace import twin_parameter
from engine_side.protocol import Prompts

_POST_LOAD = "process_weights_after_loading"


def _call(module: nn.Module, method: str, *args: Any) -> bool:
    """Call what vLLM looks for on a module by name; False where it is not there."""
    found = getattr(module, method, None)
    if not callable(found):
        return False
    found(*args)
    return True


class VllmRankHost(EngineRankHost[VllmLoraSlots]):
    """Over one worker (`vllm.v1.worker.worker_base.WorkerBase`)."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._config: VllmConfig = worker.vllm_config
        self._computes = False
        self.loras = None if self._config.lora_config is None else VllmLoraSlots(worker)

    @property
    def checkpoint(self) -> Path | None:
        folder = Path(self._config.model_config.model)
        return folder if folder.is_dir() else None

    @property
    def lora_remedy(self) -> tuple[str, str]:
        return "vllm.LLM", "max_loras=2 or more"

    @property
    def rank(self) -> int:
        return int(self._worker.rank)

    @property
    def model(self) -> nn.Module:
        model: nn.Module = self._worker.model_runner.get_model()
        return model

    def skeleton(self) -> nn.Module:
        """vLLM's own constructor on the meta device, with registries of its own: layers announce themselves by name in
        the config's, where the live ones stand already."""
        config = copy.copy(self._config)
        config.compilation_config = _own_containers(config.compilation_config)
        config.compilation_config.static_forward_context = {}
        if not self._computes:
            try:
                return _construct(config, torch.device("meta"))
            except (NotImplementedError, RuntimeError):
                self._computes = True  # it looks at values that it has computed (slopes of a bias): it gets them
                config.compilation_config.static_forward_context = {}
        made = _construct(config, _EmptyOnMeta())
        _drop_values(made, {id(module) for module in self.model.modules()})
        return made

    def load_weights(self, skeleton: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        _call(skeleton, "load_weights", weights)

    def post_load(self, module: nn.Module) -> bool:
        """One module's share of vLLM's `process_weights_after_loading`, in its order: the quantisation method's, then
        the attention layer's own, then the model's."""
        method = getattr(module, "quant_method", None)
        found = False
        if isinstance(method, QuantizeMethodBase) and not _is_done(method, module):
            with device_loading_context(module, self._worker.device):
                method.process_weights_after_loading(module)
            _call(module, "update_param_tp_status")
            found = True
        if is_deferred_attention_layer(module):
            with device_loading_context(module, self._worker.device):
                _call(module, _POST_LOAD, self._config.model_config.dtype)
            found = True
        elif not found and type(module) is type(self.model):
            found = _call(module, _POST_LOAD)
        return found

    @torch.no_grad()
    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What this rank alone contributes: experts take rows, each sent to one of them at weight 1; vocabulary layers
        ids (rows of other ranks are zeros) or rows; linear layers rows; a module without a method only if it has no
        children."""
        method = getattr(module, "quant_method", None)
        ids = not x.is_floating_point()
        if isinstance(method, FusedMoEMethodBase):
            if ids:
                raise NotImplementedError("experts take rows")
            return _experts(method, module, x)
        if ids:
            if not isinstance(module, VocabParallelEmbedding):
                raise NotImplementedError(f"{type(module).__name__} takes no ids")
            return _embed(module, x)
        if isinstance(method, QuantizeMethodBase):
            bias = getattr(module, "bias", None)
            out: torch.Tensor = method.apply(module, x, bias if isinstance(bias, torch.Tensor) else None)
            return out
        return call_alone(module, x)

    def prompt_logprobs(self, prompts: Prompts, adapter: str | None = None) -> list[list[float]]:
        lora = None if adapter is None else self._slots(adapter).request(adapter)
        return prompt_logprobs(self._worker, prompts, lora)


def _is_done(method: QuantizeMethodBase, module: nn.Module) -> bool:
    """Scales of a KV cache are taken away by the step that reads them: without them there is nothing to read."""
    return isinstance(method, BaseKVCacheMethod) and not hasattr(module, "k_scale")


class _EmptyOnMeta(TorchFunctionMode):
    """Memory that nobody has written is meta; what has values is computed where the constructor asks for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in _UNWRITTEN and given.get("device") is None:
            given["device"] = torch.device("meta")
        return func(*args, **given)


_UNWRITTEN = frozenset({torch.empty, torch.empty_strided})


def _construct(config: VllmConfig, where: AbstractContextManager[Any]) -> nn.Module:
    dtype = config.model_config.dtype
    with _shared_rotary(), set_current_vllm_config(config), set_default_torch_dtype(dtype), where:
        made: nn.Module = initialize_model(vllm_config=config)
    return made


def _drop_values(model: nn.Module, live: Container[int]) -> None:
    """Parameters and buffers that were made with values become meta tensors, ties kept; modules that hang in the `live`
    model too (shared rotary embeddings) are left alone."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if id(module) in live:
            continue
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None and tensor.device.type != "meta":
                    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
                    registry[name] = made.setdefault(id(tensor), twin_parameter(tensor, like))  # type: ignore[assignment]


def _own_containers(config: Any) -> Any:
    """A copy whose dicts, lists and sets are its own."""
    out = copy.copy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, (dict, list, set)):
            object.__setattr__(out, name, copy.copy(value))
    return out


@contextmanager
def _shared_rotary() -> Iterator[None]:
    """vLLM caches rotary embeddings for the process: one that was made on the meta device must not stay there."""
    from vllm.model_executor.layers import rotary_embedding

    cache: dict[Any, Any] = rotary_embedding._ROPE_DICT
    before = set(cache)
    try:
        yield
    finally:
        for key in cache.keys() - before:
            del cache[key]


def _experts(method: FusedMoEMethodBase, module: Any, x: torch.Tensor) -> torch.Tensor:
    """Row i goes to expert i % E alone."""
    count = module.global_num_experts
    chosen = torch.arange(len(x), device=x.device).remainder(count).unsqueeze(1).to(torch.int32)
    if method.is_monolithic:
        logits = torch.full((len(x), count), -1e4, dtype=torch.float32, device=x.device)
        out: torch.Tensor = method.apply_monolithic(module, x, logits.scatter_(1, chosen.long(), 1e4))
        return out
    weights = torch.ones(chosen.shape, dtype=torch.float32, device=x.device)
    y: torch.Tensor = method.apply(module, x, weights, chosen, None, None)
    return y


def _embed(module: VocabParallelEmbedding, x: torch.Tensor) -> torch.Tensor:
    mask: torch.Tensor | None = None
    if module.tp_size > 1:
        at = module.shard_indices
        x, mask = get_masked_input_and_mask(
            x,
            at.org_vocab_start_index,
            at.org_vocab_end_index,
            at.num_org_vocab_padding,
            at.added_vocab_start_index,
            at.added_vocab_end_index,
        )
    out: torch.Tensor = module.quant_method.embedding(module, x.long())
    return out if mask is None else out.masked_fill(mask.unsqueeze(-1), 0)
