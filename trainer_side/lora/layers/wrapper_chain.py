"""Follow the wrappers around a layer, found by what they hold: no class of PEFT's is imported or named here.

A wrapper is a module with a `base_layer` and adapters keyed by name. Wrappers nest: PEFT wraps one layer once for each
targeted parameter, and a model may be wrapped twice. `read_chain` follows them from the outside to the layer inside and
tells of each what the next forward does with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import nan
from typing import Any, NamedTuple

import torch
from torch import nn

from bridge.errors import UnsupportedLora
from trainer_side.lora.layers.values import ActiveLora, LayerState, TokenRows
from trainer_side.names.naming import LORA_SEGMENTS, RESERVED

# The last two act in training alone; a layer's weight is what its eval-mode forward computes with.
_CHILDREN = LORA_SEGMENTS | {"base_layer", "lora_dropout", "lora_velora_embed", "lora_monteclora_sampler"}
"""Children that a LoRA layer may have. Any other that holds an entry for an adapter may change its effect."""
_PENDING = "_lora_kasa_truncation_deferred"
"""PEFT's note that the next forward will truncate the base weight."""
RANK_MAJOR, BY_EXPERT = "rank_major", "grouped_by_expert"
"""What a `lora_B_layout` marker on a wrapper of expert parameters may say: the expert counts fastest, as in PEFT, or
slowest, as in older Unsloth."""


class Setting(NamedTuple):
    """A wrapper's switches, as they were read.

    Attributes:
        merged: adapters that lie in the base's tensors now.
        active: whether the wrapper owns them or not.
        scaling: each adapter's factor; "" where one factor serves all.
    """

    disabled: bool
    merged: tuple[str, ...]
    active: tuple[str, ...]
    scaling: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Level:
    """One wrapper around the layer, read once: its adapters stay what they were when they were first read.

    Attributes:
        wrapper: the live module.
        setting: its switches; the other fields follow from them.
        attribute: of the base layer, the parameter that it acts on.
        state: of this wrapper alone.
        owned: names of all adapters it has.
        names: of `owned`, those that the forward adds (ACTIVE), or takes out again first (MERGED_DISABLED).
        tokens: it replaces rows instead of adding a product.
        of_parameter: it targets a parameter by name, and not the layer.
    """

    wrapper: Any
    setting: Setting
    attribute: str
    state: LayerState
    owned: tuple[str, ...]
    names: tuple[str, ...]
    tokens: bool
    of_parameter: bool

    @cached_property
    def loras(self) -> tuple[ActiveLora, ...]:
        """The adapters of `names`. Raises UnsupportedLora for a factor without a weight."""
        scaling = dict(self.setting.scaling)
        return () if self.tokens else tuple(_adapter(self.wrapper, name, scaling) for name in self.names)

    def rows(self) -> tuple[TokenRows, ...]:
        """List the rows that stand in the weight's place in the forward; when unmerging, the original ones."""
        if not self.tokens:
            return ()
        source = "trainable_tokens_delta" if self.state is LayerState.ACTIVE else "trainable_tokens_original"
        values, indices = getattr(self.wrapper, source), self.wrapper.token_indices
        # The last one merged is the first one that PEFT puts back.
        names = self.names if self.state is LayerState.ACTIVE else tuple(reversed(self.names))
        return tuple(TokenRows(n, tuple(int(i) for i in indices[n]), values[n]) for n in names)


@dataclass(frozen=True, eq=False)
class Chain:
    """A layer and its wrappers.

    Attributes:
        base: the layer inside. Of a `modules_to_save` wrapper the copy that acts, or the original.
        levels: the wrappers, innermost first: the order in which they change the layer's output.
        saved: state of the `modules_to_save` wrapper on the way, if there is one.
        copies: names of its copies.
    """

    base: Any
    levels: tuple[Level, ...]
    saved: LayerState | None = None
    copies: tuple[str, ...] = ()

    @property
    def attribute(self) -> str:
        """The parameter that the outermost wrapper acts on; of a layer without wrappers its weight."""
        return self.levels[-1].attribute if self.levels else "weight"

    def on(self, attribute: str) -> tuple[Level, ...]:
        """List the wrappers that act on one parameter."""
        return tuple(level for level in self.levels if level.attribute == attribute)


def read_chain(module: Any) -> Chain:
    """Follow the wrappers of a layer inwards. Reads attributes only: no module walk, no forward. Microseconds.

    Raises UnsupportedLora for a wrapper that changes its layer in a way other than LoRA's.
    """
    wrappers: list[Any] = []
    saved: LayerState | None = None
    copies: tuple[str, ...] = ()
    current = unwrapped(module)
    while True:
        if is_saved(current):
            saved, copies = _saved_state(current), tuple(current.modules_to_save.keys())
            current = acting_copy(current)
        elif is_token_wrapper(current):
            current = current._modules["token_adapter"]
        elif is_lora(current) or is_tokens(current):
            wrappers.append(current)
            base = getattr(current, "base_layer", None)
            if base is None:
                # The flat shape: the layer itself carries weight and adapters.
                break
            current = base
        elif is_tuner(current):
            raise UnsupportedLora(
                "a tuner that is not LoRA changes this layer in a way that cannot be read",
                where=type(current).__name__,
                expected="a LoRA layer (lora_A and lora_B, or lora_embedding_A and lora_embedding_B), or a plain layer",
                got=type(current).__name__,
                remedy="merge the adapter into the model (merge_and_unload) before binding it",
            )
        else:
            break
        current = unwrapped(current)
    levels = tuple(_level(wrapper, current) for wrapper in reversed(wrappers))
    return Chain(current, levels, saved, copies)


def unwrapped(module: Any) -> Any:
    """Return the module inside torch.compile, FSDP or activation checkpointing."""
    while True:
        children = getattr(module, "_modules", None) or {}
        inside = next((child for name, child in children.items() if name in RESERVED and child is not None), None)
        if inside is None:
            return module
        module = inside


def is_saved(module: Any) -> bool:
    """Tell whether a module is a wrapper that holds whole copies of another: `modules_to_save`."""
    children = getattr(module, "_modules", None) or {}
    return (
        isinstance(children.get("modules_to_save"), nn.ModuleDict)
        and "original_module" in children
        and hasattr(module, "disable_adapters")
    )


def is_token_wrapper(module: Any) -> bool:
    """Tell whether a module is the outer one of the two wrappers of trainable tokens."""
    inside = (getattr(module, "_modules", None) or {}).get("token_adapter")
    return inside is not None and is_tokens(inside)


def is_tokens(module: Any) -> bool:
    """Tell whether a wrapper replaces rows of its base layer's weight."""
    return _own(module, "base_layer") is not None and isinstance(_own(module, "trainable_tokens_delta"), _MAPPINGS)


def is_lora(module: Any) -> bool:
    """Tell whether a wrapper adds low-rank products to a layer: it has both factors by adapter, and their scaling."""
    pairs = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
    both = any(all(isinstance(_own(module, name), _MAPPINGS) for name in pair) for pair in pairs)
    return both and hasattr(module, "scaling")


def is_tuner(module: Any) -> bool:
    """Tell whether a module is a tuner's wrapper: it has a base layer and keeps a list of what it merged."""
    return _own(module, "base_layer") is not None and hasattr(module, "merged_adapters")


def acting_copy(module: Any) -> nn.Module:
    """Return the module that the forward of a `modules_to_save` wrapper calls: the active copy, or the original."""
    acts = _saved_state(module) is LayerState.ACTIVE
    chosen: nn.Module = module.modules_to_save[_names(module)[0]] if acts else module._modules["original_module"]
    return chosen


_MAPPINGS = (Mapping, nn.ModuleDict, nn.ParameterDict)


def _own(module: Any, name: str) -> Any:
    """Read an attribute of the module itself: a wrapper's `getattr` answers for the layer that it wraps."""
    for place in ("_modules", "_parameters"):
        found = (getattr(module, place, None) or {}).get(name)
        if found is not None:
            return found
    try:
        return vars(module).get(name)
    except TypeError:
        return getattr(module, name, None)


def _saved_state(module: Any) -> LayerState:
    if module.disable_adapters:
        return LayerState.DISABLED
    active = _names(module)
    owned = module.modules_to_save.keys()
    return LayerState.ACTIVE if active and all(name in owned for name in active) else LayerState.PLAIN


def _names(module: Any) -> tuple[str, ...]:
    """List the active adapters' names. PEFT may return its own live list: it is copied."""
    active = getattr(module, "active_adapters", None)
    if active is None or callable(active):
        active = getattr(module, "active_adapter", None)
    if active is None:
        active = ("default",)
    return (active,) if isinstance(active, str) else tuple(active)


def setting_of(wrapper: Any, *, scaled: bool) -> Setting:
    """Read a wrapper's switches, each of them once; `scaled` for a LoRA layer. A few microseconds."""
    disabled = getattr(wrapper, "disable_adapters", None)
    if disabled is None or callable(disabled):
        disabled = getattr(wrapper, "_disable_adapters", False)
    active = _names(wrapper)
    merged = getattr(wrapper, "merged_adapters", None)
    if merged is None:
        # Unsloth's shapes only tell whether something is merged.
        merged = (active or ("merged",)) if getattr(wrapper, "merged", False) is True else ()
    scaling = wrapper.scaling if scaled else {}
    if not isinstance(scaling, Mapping):
        scaling = {"": scaling}
    # One object for all that is not a number: it has to be equal to itself.
    factors = tuple([(n, value if (value := float(s)) == value else nan) for n, s in scaling.items()])
    return Setting(bool(disabled), tuple(merged), active, factors)


def _level(wrapper: Any, base: Any) -> Level:
    tokens = is_tokens(wrapper)
    containers = ("token_indices",) if tokens else ("lora_A", "lora_embedding_A")
    keyed = [found for name in containers if (found := getattr(wrapper, name, None)) is not None]
    owned = tuple(dict.fromkeys(chain.from_iterable(found.keys() for found in keyed)))
    setting = setting_of(wrapper, scaled=not tokens)
    if setting.disabled or (tokens and not setting.active):
        state = LayerState.MERGED_DISABLED if setting.merged else LayerState.DISABLED
    else:
        state = LayerState.MERGED if setting.merged else LayerState.ACTIVE
    acting = {LayerState.ACTIVE: setting.active, LayerState.MERGED_DISABLED: setting.merged}.get(state, ())
    names = tuple(name for name in acting if name in owned)
    attribute = _own(wrapper, "parameter_name")
    of_parameter = attribute is not None
    if not isinstance(attribute, str):
        attribute = "in_proj_weight" if is_attention(base) else "weight"
    return Level(wrapper, setting, attribute, state, owned, names, tokens, of_parameter)


def is_attention(base: Any) -> bool:
    """Tell whether a layer is an attention layer whose three input projections lie in one parameter."""
    return isinstance(getattr(base, "in_proj_weight", None), torch.Tensor) and hasattr(base, "out_proj")


def _adapter(wrapper: Any, name: str, scaling: Mapping[str, float]) -> ActiveLora:
    embedding, extra, bias = getattr(wrapper, "lora_embedding_A", None), dict[str, Any](), None
    if embedding is not None and name in embedding:
        a, b = embedding[name], wrapper.lora_embedding_B[name]
    else:
        left, right = unwrapped(wrapper.lora_A[name]), unwrapped(wrapper.lora_B[name])
        a, b, bias = _weight(left), _weight(right), getattr(right, "bias", None)
        for key, factor in (("blocks_a", left), ("blocks_b", right)):
            if isinstance(getattr(factor, "nblocks", None), int):
                extra[key] = int(factor.nblocks)
        if _own(wrapper, "parameter_name") is not None:
            marker = getattr(wrapper, "lora_B_layout", None)
            extra["experts"] = int(getattr(wrapper, "num_experts", 1))
            extra["swapped"] = bool(getattr(wrapper, "_did_swap_in_out_features", False))
            extra["layout"] = RANK_MAJOR if marker is None else str(marker)
    magnitude = _entry(wrapper, "lora_magnitude_vector", name)
    for key, value in (("diagonal", _entry(wrapper, "lora_diag", name)), ("unknown", _unknown(wrapper, name) or None)):
        if value is not None:
            extra[key] = value
    variant = (getattr(wrapper, "lora_variant", None) or {}).get(name)
    return ActiveLora(
        name=name,
        a=a,
        b=b,
        scaling=scaling[name] if name in scaling else scaling[""],
        bias=bias,
        magnitude=None if magnitude is None else _weight(magnitude),
        variant="" if variant is None else type(variant).__name__,
        extra=extra,
    )


def _entry(wrapper: Any, attribute: str, name: str) -> Any:
    found = getattr(wrapper, attribute, None)
    return found[name] if found is not None and name in found else None


def _weight(holder: Any) -> torch.Tensor:
    if isinstance(holder, torch.Tensor):
        return holder
    weight = getattr(unwrapped(holder), "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight
    raise UnsupportedLora(
        "an adapter's factor has no weight to read",
        where=type(holder).__name__,
        expected="a tensor, or a module with a weight",
        got=type(weight).__name__,
        remedy="delete this adapter and add it again, or push mode='base'",
    )


def _unknown(wrapper: Any, name: str) -> tuple[str, ...]:
    """Name everything that may change an adapter's effect and cannot be read here."""
    found: list[str] = []
    holders = {**(getattr(wrapper, "_modules", None) or {}), **(getattr(wrapper, "_parameters", None) or {})}
    for attribute, held in holders.items():
        if held is None or attribute in _CHILDREN:
            continue
        if not isinstance(held, _MAPPINGS) and not hasattr(held, "keys"):
            # The flat shape holds the base's own parameters beside the adapters.
            if _own(wrapper, "base_layer") is not None:
                found.append(attribute)
        elif name in held.keys():  # noqa: SIM118 - PEFT's dictionaries of buffers are modules
            found.append(attribute)
    for attribute in ("lora_A", "lora_B"):
        factor = _entry(wrapper, attribute, name)
        inside = getattr(unwrapped(factor), "_modules", None) if factor is not None else None
        found.extend(f"{attribute}.{child}" for child in inside or {})
    if name in (getattr(wrapper, _PENDING, None) or ()):
        found.append("a truncation of the base weight that the next forward makes")
    # Mixtures of adapters replace a layer's forward by their own method, and weigh the adapters per token.
    owner = getattr(vars(wrapper).get("forward"), "__self__", None) if hasattr(wrapper, "__dict__") else None
    if owner is not None and owner is not wrapper and getattr(owner, "target", None) is wrapper:
        found.append("a forward that another object replaced")
    if (getattr(wrapper, "use_dora", None) or {}).get(name) and _entry(wrapper, "lora_magnitude_vector", name) is None:
        found.append("DoRA without a magnitude")
    if _own(wrapper, "parameter_name") is not None and getattr(wrapper, "lora_B_layout", None) is None:
        # A replaced forward of expert wrappers reads lora_B in an order that only the replacing library knows.
        cls = next((cls for cls in type(wrapper).__mro__ if "forward" in vars(cls)), type(wrapper))
        origin = getattr(vars(cls).get("forward"), "__module__", cls.__module__)
        if origin != cls.__module__:
            found.append(f"a forward from {origin} without a lora_B_layout marker")
    return tuple(found)
