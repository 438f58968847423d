"""What a model's LoRA wrappers are set to now. Cheap and comparable: taken before and after each push, since a scaling,
a merge or `disable_adapter()` changes the effective weights without changing a tensor's name.

May the live model be run once for the canary? Only where a forward moves no bytes (lora.md 0, 5).

What a forward of PEFT's own may touch is bookkeeping: around expert parameters it registers a parametrization and
removes it again, which puts the very same Parameter back (its bytes, flags, identity and order as before) but may raise
its `_version`, as every forward of that model does. `verify="weights"` runs no forward at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan
from typing import NamedTuple

from torch import nn

from bridge.errors import ConfigError, IntegrityError, UnsupportedLora
from trainer_side.lora.layers.module_tree import Wrapper, WrapperKind
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.values import ActiveLora, LayerState
from trainer_side.lora.layers.wrapper_chain import Chain, Setting, acting_copy, setting_of
from trainer_side.names.naming import BASE_HOP

_KEYED = {
    WrapperKind.LORA: ("lora_A", "lora_embedding_A"),
    WrapperKind.SAVED: ("modules_to_save",),
    WrapperKind.TOKENS: ("trainable_tokens_delta",),
    WrapperKind.UNKNOWN: (),
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
    disabled, merged, active = setting_of(wrapper.holder)
    return WrapperState(wrapper.path, disabled, merged, active, owned_by(wrapper))


def scaling_of(wrapper: Wrapper) -> tuple[tuple[str, float], ...]:
    """The factor of each adapter of a LoRA layer now."""
    if wrapper.kind is not WrapperKind.LORA:
        return ()
    scaling = getattr(wrapper.module, "scaling", None)
    if isinstance(scaling, dict):
        return tuple([(name, float(s)) for name, s in scaling.items()])
    return () if scaling is None else (("", float(scaling)),)


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


class Watch:
    """What the wrappers were set to when a push began. Everything that is computed for it is computed from readings
    that were compared with that: another thread may switch adapters off and on again within one push, and at its two
    ends nothing would be seen of it. Used by several threads; holds no tensor."""

    def __init__(self, wrappers: Sequence[Wrapper], began: LoraState) -> None:
        self._set = {
            id(wrapper.holder): (Setting(state.disabled, state.merged, state.active), dict(scaling))
            for wrapper, state, scaling in zip(wrappers, began.wrappers, began.scaling, strict=True)
        }

    def require(self, chain: Chain) -> None:
        """Raises IntegrityError when a layer was read in another state, or with another factor, than at the start."""
        for level in chain.levels:
            setting, scaling = self._set.get(id(level.wrapper), (None, {}))
            if level.setting != setting or not all(map(partial(_scaled_so, scaling), level.adapters())):
                raise changed_meanwhile()

    def require_now(self, wrapper: Wrapper) -> None:
        """The same of one wrapper as it is now."""
        if self._set.get(id(wrapper.holder), (None, {}))[0] != setting_of(wrapper.holder):
            raise changed_meanwhile()


def _scaled_so(scaling: Mapping[str, float], adapter: ActiveLora) -> bool:
    expected = scaling.get(adapter.name, scaling.get(""))
    # a factor that is not a number is the check for such values' business
    return expected is not None and (expected == adapter.scaling or (isnan(expected) and isnan(adapter.scaling)))


def changed_meanwhile() -> IntegrityError:
    """For a push during which the layers' state, or the base under them, did not stay what it was at its start."""
    return IntegrityError(
        "the model's LoRA layers changed while they were pushed",
        expected="the same adapters, merged, active and scaled as when the push began",
        got="another state",
        remedy="push between steps: not while another thread merges, disables or switches adapters",
    )


def require_still_forward(model: nn.Module) -> None:
    """Raises ConfigError, naming the layer, when a forward of this model would rewrite its own weights."""
    for path, module in model.named_modules():
        reason = _moves(module) if BASE_HOP in module._modules else None
        if reason is not None:
            raise ConfigError(
                "a forward of this model would write to its weights, so it gives no canary",
                where=path,
                expected="a forward that moves nothing",
                got=reason,
                remedy="push with verify='weights': read-back and probes need no forward of the trainer",
            )


def _moves(module: nn.Module) -> str | None:
    try:
        found = lora_parameters(module)
    except (ConfigError, UnsupportedLora):
        return None  # no LoRA layer; what it is has been refused or found harmless when the mode was chosen
    if found.state is LayerState.MERGED_DISABLED:
        return "adapters merged and disabled: PEFT unmerges them in the next forward"
    if found.kind == "attention":
        return "PEFT's attention wrapper merges and unmerges in every forward"
    return None
