"""Read what a model's LoRA wrappers are set to, as one value: taken before and after each push and compared.

A scaling, a merge or `disable_adapter()` changes the effective weights without changing a tensor's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from bridge.errors import ConfigError, IntegrityError, UnsupportedLora
from trainer_side.lora.layers.module_tree import Wrapper, WrapperKind
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.values import LayerState
from trainer_side.lora.layers.wrapper_chain import Chain, Setting, acting_copy, read_chain, setting_of
from trainer_side.names.naming import BASE_HOP

_KEYED = {
    WrapperKind.LORA: ("lora_A", "lora_embedding_A"),
    WrapperKind.SAVED: ("modules_to_save",),
    WrapperKind.TOKENS: ("trainable_tokens_delta",),
    WrapperKind.UNKNOWN: (),
}


class WrapperState(NamedTuple):
    """One wrapper now: where it stands, what it is set to, and the adapters that it has tensors for."""

    path: str
    setting: Setting
    owned: tuple[str, ...]
    holder: int
    """`id` of the module that is set; the model keeps it alive."""


@dataclass(frozen=True)
class LoraState:
    """All wrappers of a model, in the order of its tree. Compare with `==`; holds no tensor.

    Attributes:
        structure: counts up whenever modules were found changed: an adapter added or deleted, a layer replaced.
    """

    structure: int
    wrappers: tuple[WrapperState, ...] = ()

    @classmethod
    def read(cls, structure: int, wrappers: Sequence[Wrapper]) -> LoraState:
        """Read every wrapper; microseconds each."""
        states = []
        for wrapper in wrappers:
            holder, owned = wrapper.holder, dict[str, None]()
            for container in _KEYED[wrapper.kind]:
                held = holder._modules.get(container)
                if held is not None:
                    owned.update(dict.fromkeys((*held._modules, *held._parameters)))
            states.append(
                WrapperState(
                    wrapper.path, setting_of(holder, scaled=wrapper.kind is WrapperKind.LORA), tuple(owned), id(holder)
                )
            )
        return cls(structure, tuple(states))

    @cached_property
    def unscaled(self) -> tuple[object, ...]:
        """All of it but the scalings: what decides which tensors are computed, and from what."""
        return (self.structure, *[(w.setting[:3], w.owned) for w in self.wrappers])

    @cached_property
    def _settings(self) -> Mapping[int, Setting]:
        return {wrapper.holder: wrapper.setting for wrapper in self.wrappers}

    def read_chain(self, module: nn.Module) -> Chain:
        """Read a layer. Raises IntegrityError when it is set to something else than in this state.

        Everything that is computed for a push passes here: another thread may switch adapters off and on again within
        one push, and at its two ends nothing would be seen of it.
        """
        chain = read_chain(module)
        if any(self._settings.get(id(level.wrapper)) != level.setting for level in chain.levels):
            raise changed_meanwhile()
        return chain

    def copy_in_use(self, wrapper: Wrapper) -> str | None:
        """Name the adapter whose copy a `modules_to_save` wrapper computes with; None: the original module.

        Raises IntegrityError as `read_chain`.
        """
        copies = wrapper.module._modules["modules_to_save"]
        acting = acting_copy(wrapper.module)
        if self._settings.get(id(wrapper.holder)) != setting_of(wrapper.holder, scaled=False):
            raise changed_meanwhile()
        return next((name for name, copy in copies._modules.items() if copy is acting), None) if copies else None


def changed_meanwhile() -> IntegrityError:
    """Build the error for a push during which the LoRA layers, or the base under them, did not stay what they were."""
    return IntegrityError(
        "the model's LoRA layers changed while they were pushed",
        where="the bound model",
        expected="the same adapters, merged, active and scaled as when the push began",
        got="another state",
        remedy="push between steps: not while another thread merges, disables or switches adapters",
    )


def require_still_forward(model: nn.Module) -> None:
    """Raise ConfigError, naming the layer, when a forward of this model would rewrite its own weights.

    Called before the canary's reference forward. PEFT's bookkeeping does not count: around expert parameters it
    registers a parametrization and removes it again, which puts the very same Parameter back.
    """
    for path, module in model.named_modules():
        if BASE_HOP not in module._modules:
            continue
        try:
            found = lora_parameters(module)
        except (ConfigError, UnsupportedLora):
            continue  # no LoRA layer; it was refused or found harmless when the mode was chosen
        if found.state is LayerState.MERGED_DISABLED:
            reason = "adapters merged and disabled: PEFT unmerges them in the next forward"
        elif found.kind == "attention":
            reason = "PEFT's attention wrapper merges and unmerges in every forward"
        else:
            continue
        raise ConfigError(
            "a forward of this model would write to its weights, so it gives no canary",
            where=path,
            expected="a forward that moves nothing",
            got=reason,
            remedy="push with verify='weights': read-back and probes need no forward of the trainer",
        )
