"""Parts that rank hosts share: LoRA slots for every engine that has them, and what vLLM's and SGLang's have in common:
calls of single modules, and no untying."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import nn

from bridge.errors import UnsupportedLora
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import TensorInfo
from bridge.model.torch_dtypes import dtype_name
from engine_side.engines.common.published_state import lora_not_loaded
from engine_side.plan.unfilled import unloaded
from engine_side.protocol import LoraView, QuantisedCheckpoint, RankHost


class LoraSlots(Protocol):
    """The LoRA manager of one rank. The methods are those of `RankHost`, by which they are called."""

    def plan(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Mapping[str, str]: ...

    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None: ...

    def views(self, name: str) -> Sequence[LoraView]: ...

    def remove(self, name: str) -> None: ...


L = TypeVar("L", bound=LoraSlots)


class LoraRankHost(RankHost, Generic[L]):
    """Base of the rank hosts of engines that may have LoRA slots.

    Attributes:
        lora_remedy: the call that starts such an engine, and the arguments of it that LoRA needs.
        loras: None for an engine that was started without LoRA.
    """

    lora_remedy: ClassVar[tuple[str, str]]
    loras: L | None = None

    def plan_lora(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Mapping[str, str]:
        """Find a place for every tensor of a LoRA; writes nothing. Raises UnsupportedLora without slots."""
        return self._slots().plan(tensors, spec)

    def load_lora(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        """Write a LoRA into a free slot, under a name that was never used."""
        self._slots().load(name, tensors, spec)

    def lora_views(self, name: str) -> Sequence[LoraView]:
        """Views of the slot of a loaded LoRA, for the read-back. Raises NotFound."""
        return self._slots(name).views(name)

    def remove_lora(self, name: str) -> None:
        """Drop a LoRA that no request uses. Unknown names are ignored."""
        if self.loras is not None:
            self.loras.remove(name)

    def _slots(self, name: str | None = None) -> L:
        """The slots of this rank. Where there are none: raises NotFound for a name, UnsupportedLora without one."""
        if self.loras is not None:
            return self.loras
        if name is not None:
            raise lora_not_loaded(name)
        where, how = self.lora_remedy
        raise UnsupportedLora(
            "the engine was started without LoRA",
            where=where,
            expected=how,
            got="no LoRA slots",
            remedy=f"start it with {how}, or push mode='merged'",
        )


class EngineRankHost(LoraRankHost[L]):
    """Base of the rank hosts of engines with vLLM's layers.

    Attributes:
        vocabulary_class: the engine's vocabulary layer.
        method_class: the engine's quantisation methods, the plain one included.
        checkpoint: the folder that the engine was started from; None for one that was started otherwise.
    """

    vocabulary_class: ClassVar[type[Any]]
    method_class: ClassVar[type[Any]]
    checkpoint: Path | None
    _unloaded: frozenset[str] | None = None

    def unloaded(self) -> frozenset[str]:
        """Parameters that no checkpoint fills, such as the scales of an unquantised KV cache. Found once, from the
        checkpoint that this engine was started from."""
        if self._unloaded is None:
            self._unloaded = unloaded(self, self.checkpoint)
        return self._unloaded

    def quantised_checkpoint(self) -> QuantisedCheckpoint | None:
        """The folder that the engine was started from, where the engine takes what lies there for quantised.

        The method is the one that the folder's config declares, or the engine's own word for it. Whether the weights
        are stored as codes, or quantised as they are loaded, is seen from the tensors.
        """
        config = self._model_config()
        declared = getattr(config.hf_config, "quantization_config", None)
        if self.checkpoint is None or not (declared or config.quantization):
            return None
        plain = declared if isinstance(declared, Mapping) else {"quant_method": config.quantization}
        return QuantisedCheckpoint(self.checkpoint, plain, dtype_name(config.dtype))

    @abstractmethod
    def _model_config(self) -> Any:
        """The engine's `ModelConfig`."""

    def untie(self, names: Sequence[str]) -> bool:
        """False always: the engine's configuration ties layers, and its kernels hold copies of the shared weight."""
        return False

    # ---- calls of single modules ---------------------------------------------------------------------------------

    @torch.no_grad()
    def apply(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Call one unwrapped module without collectives, for the probe of a push.

        Args:
            module: experts take rows, each sent to one expert at weight 1. A vocabulary layer takes ids (the rows of
                other ranks' ids are zeros) or rows, linear layers rows. A module without a quantisation method takes
                rows if it has no children.
            x: rows [n, features] or ids [n].

        Returns:
            The contribution of this rank alone.

        Raises:
            NotImplementedError: this module cannot be called alone.
        """
        if not x.is_floating_point():
            if not isinstance(module, self.vocabulary_class):
                raise NotImplementedError(f"{type(module).__name__} takes no ids")
            return self._embed_ids(module, x)
        if self._has_experts(module):
            return self._apply_experts(module, x)
        method: Any = getattr(module, "quant_method", None)
        if isinstance(method, self.method_class):
            bias = getattr(module, "bias", None)
            y: Any = method.apply(module, x, bias if isinstance(bias, torch.Tensor) else None)
        elif module._modules:
            raise NotImplementedError(f"{type(module).__name__} has children")
        else:
            y = module(x)
        if not isinstance(y, torch.Tensor):
            raise NotImplementedError(f"{type(module).__name__} does not return one tensor")
        return y

    @abstractmethod
    def _embed_ids(self, module: Any, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids in a vocabulary layer."""

    @abstractmethod
    def _has_experts(self, module: nn.Module) -> bool:
        """True for a module that holds the weights of fused experts."""

    @abstractmethod
    def _apply_experts(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Send each row to one expert."""


@contextmanager
def without_new_entries(cache: dict[Any, Any]) -> Iterator[None]:
    """Remove afterwards what is added to `cache` inside. vLLM and SGLang keep rotary embeddings in such a cache for the
    whole process: one that was made on the meta device must not stay there."""
    before = set(cache)
    try:
        yield
    finally:
        for key in cache.keys() - before:
            del cache[key]
