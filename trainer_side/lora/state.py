"""What a model's LoRA wrappers are set to now. Cheap and comparable: taken before and after each push, since a scaling,
a merge or `disable_adapter()` changes the effective weights without changing a tensor's name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from trainer_side.lora.chain import acting_copy
from trainer_side.lora.tree import Kind, Wrapper

_KEYED = {
    Kind.LORA: ("lora_A", "lora_embedding_A"),
    Kind.SAVED: ("modules_to_save",),
    Kind.TOKENS: ("trainable_tokens_delta",),
    Kind.UNKNOWN: (),
}


class WrapperState(NamedTuple):
    """One wrapper: whether it is disabled, what is merged into its base, what is active, which adapters it owns."""

    path: str
    disabled: bool
    merged: tuple[str, ...]
    active: tuple[str, ...]
    owned: tuple[str, ...]


class LoraState(NamedTuple):
    """All wrappers of a model, in the order of its tree.

    Attributes:
        structure: counts up whenever modules were found changed: an adapter added or deleted, a layer replaced.
        wrappers: what is set on each.
        scaling: of each wrapper, each adapter's factor.
    """

    structure: int
    wrappers: tuple[WrapperState, ...] = ()
    scaling: tuple[tuple[tuple[str, float], ...], ...] = ()

    @property
    def unscaled(self) -> tuple[int, tuple[WrapperState, ...]]:
        """All of it but the scalings: what decides which tensors are computed, and from what."""
        return self.structure, self.wrappers

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters that some wrapper owns, in order."""
        return tuple(dict.fromkeys(name for wrapper in self.wrappers for name in wrapper.owned))


def read(wrapper: Wrapper) -> WrapperState:
    """What a wrapper is set to now. A few microseconds."""
    holder = wrapper.holder
    return WrapperState(
        wrapper.path,
        _flag(holder),
        _names(getattr(holder, "merged_adapters", ())),
        active_of(holder),
        owned_by(wrapper),
    )


def scaling_of(wrapper: Wrapper) -> tuple[tuple[str, float], ...]:
    """The factor of each adapter of a LoRA layer now."""
    if wrapper.kind is not Kind.LORA:
        return ()
    scaling = getattr(wrapper.module, "scaling", None)
    if isinstance(scaling, dict):
        return tuple([(name, float(s)) for name, s in scaling.items()])
    return () if scaling is None else (("", float(scaling)),)


def active_of(module: nn.Module) -> tuple[str, ...]:
    """The active adapters of a tuner's layer, in order; some layers of theirs the module may lack."""
    found = getattr(module, "active_adapters", None)
    return _names(getattr(module, "active_adapter", ()) if found is None or callable(found) else found)


def owned_by(wrapper: Wrapper) -> tuple[str, ...]:
    """The adapters that a wrapper has tensors for."""
    holder = wrapper.holder
    owned: dict[str, None] = {}
    for container in _KEYED[wrapper.kind]:
        held = holder._modules.get(container)
        if held is not None:
            owned.update(dict.fromkeys((*held._modules, *held._parameters)))
    return tuple(owned)


def copy_in_use(wrapper: Wrapper) -> str | None:
    """The adapter whose copy a `modules_to_save` wrapper computes with; None: the original module."""
    copies = wrapper.module._modules["modules_to_save"]
    acting = acting_copy(wrapper.module)
    return next((name for name, copy in copies._modules.items() if copy is acting), None) if copies else None


def _flag(module: nn.Module) -> bool:
    found = getattr(module, "disable_adapters", None)
    return bool(getattr(module, "_disable_adapters", False) if found is None or callable(found) else found)


def _names(found: object) -> tuple[str, ...]:
    if isinstance(found, str):
        return (found,)
    return tuple(map(str, found)) if isinstance(found, Iterable) else ()
