"""What the rank halves of vLLM and SGLang have in common: adapters in slots, no untying, modules called alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from bridge.errors import NotFound, UnsupportedLora
from bridge.model.lora_format import LoraSpec
from bridge.model.manifest import TensorInfo
from engine_side.plan.unfilled import unloaded
from engine_side.protocol import LoraView, RankHost


class LoraSlots(Protocol):
    """An engine's LoRA manager, as its adapter package drives it."""

    def plan(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Mapping[str, str]: ...

    def load(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None: ...

    def views(self, name: str) -> Sequence[LoraView]: ...

    def remove(self, name: str) -> None: ...


L = TypeVar("L", bound=LoraSlots)


class EngineRankHost(RankHost, Generic[L]):
    """A base for rank hosts. `loras` is None for an engine that was started without LoRA."""

    loras: L | None = None
    _unloaded: frozenset[str] | None = None

    @property
    @abstractmethod
    def checkpoint(self) -> Path | None:
        """The folder that the engine was started from, if there is one."""

    @property
    @abstractmethod
    def lora_remedy(self) -> tuple[str, str]:
        """(what was started without LoRA, how to start it with)."""

    def unloaded(self) -> frozenset[str]:
        """Scales of an unquantised KV cache and the like, by the checkpoint that this engine was started from."""
        if self._unloaded is None:
            self._unloaded = unloaded(self, self.checkpoint)
        return self._unloaded

    def untie(self, names: Sequence[str]) -> bool:
        """Never: which layers share a weight is the engine's configuration, of which its kernels have copies."""
        return False

    def plan_lora(self, tensors: Sequence[TensorInfo], spec: LoraSpec) -> Mapping[str, str]:
        return self._slots().plan(tensors, spec)

    def load_lora(self, name: str, tensors: Mapping[str, torch.Tensor], spec: LoraSpec) -> None:
        self._slots().load(name, tensors, spec)

    def lora_views(self, name: str) -> Sequence[LoraView]:
        return self._slots(name).views(name)

    def remove_lora(self, name: str) -> None:
        if self.loras is not None:
            self.loras.remove(name)

    def _slots(self, name: str | None = None) -> L:
        """Raises NotFound for a name, UnsupportedLora without one, where there are none."""
        if self.loras is not None:
            return self.loras
        if name is not None:
            raise NotFound("this engine holds no such adapter", where="adapter", got=repr(name))
        where, how = self.lora_remedy
        raise UnsupportedLora(
            "the engine was started without LoRA",
            where=where,
            expected="enable_lora=True",
            got="enable_lora=False",
            remedy=f"start it with enable_lora=True and {how}, or push mode='merged'",
        )


def call_alone(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a module without children. Raises NotImplementedError for others, and for what is no tensor."""
    if module._modules:
        raise NotImplementedError(f"{type(module).__name__} has children")
    y: Any = module(x)
    if not isinstance(y, torch.Tensor):
        raise NotImplementedError(f"{type(module).__name__} does not return one tensor")
    return y
