"""Read the live layers for the features that the capability table names; once per state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bridge.errors import ConfigError, UnsupportedLora
from trainer_side.lora.layers.dequant import FP8, quant_state
from trainer_side.lora.layers.features import Feature, Finding
from trainer_side.lora.layers.module_tree import BaseTensor, LoraTree, Wrapper, WrapperKind, WrapperTensor
from trainer_side.lora.layers.read import PACKED, parameters_of
from trainer_side.lora.layers.refusals import of_variant, reason_of
from trainer_side.lora.layers.values import LayerState, LoraParameters
from trainer_side.lora.state import LoraState
from trainer_side.names.naming import LORA_SEGMENTS, identity_of


@dataclass(frozen=True, eq=False)
class Layer:
    """A wrapper and the adapters that act in it now.

    Attributes:
        parameters: None for `modules_to_save`, and for a layer that cannot be read.
        acts: its effective weight is not the base's.
        loras: names of those that act; their tensors have to be sent.
        extras: all tensors that it adds.
    """

    wrapper: Wrapper
    parameters: LoraParameters | None
    acts: bool
    loras: tuple[str, ...]
    extras: tuple[WrapperTensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """List the names of its acting adapters' tensors; of all its adapters' where none acts."""
        return tuple(extra.raw for extra in self.needs or self.extras)

    @property
    def needs(self) -> tuple[WrapperTensor, ...]:
        """List the tensors of its acting adapters."""
        return tuple(extra for extra in self.extras if extra.lora in self.loras)

    @property
    def biases(self) -> tuple[str, ...]:
        """List the names of all its adapters' `lora_bias` tensors."""
        return tuple(e.raw for e in self.extras if e.container == "lora_B" and e.attribute == "bias")


@dataclass(frozen=True, eq=False)
class Survey:
    """All layers with wrappers, read once, the features found in them, and the notes for a push in merged mode."""

    by_wrapper: Mapping[Wrapper, Layer]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def survey(tree: LoraTree, state: LoraState) -> Survey:
    """Read every wrapper, tens of microseconds each; runs no forward and changes nothing.

    Raises IntegrityError when a layer is set to something else than in `state`.
    """
    extras: dict[int, list[WrapperTensor]] = {}
    for extra in tree.extras:
        if extra.wrapper is not None:
            extras.setdefault(id(extra.wrapper), []).append(extra)
    findings: list[Finding] = []
    layers: list[Layer] = []
    for wrapper in tree.wrappers:
        layer, found = _read_layer(wrapper, tuple(extras.get(id(wrapper), ())), tree, state)
        layers.append(layer)
        findings += found
    findings += _of_model(tree, layers)
    return Survey({layer.wrapper: layer for layer in layers}, tuple(findings), _notes(layers))


def _read_layer(
    wrapper: Wrapper, extras: tuple[WrapperTensor, ...], tree: LoraTree, state: LoraState
) -> tuple[Layer, list[Finding]]:
    if wrapper.kind is WrapperKind.SAVED:
        copy = state.copy_in_use(wrapper)
        layer = Layer(wrapper, None, copy is not None, () if copy is None else (copy,), extras)
        return layer, list(_saved(layer, tree))
    kind = type(wrapper.module).__name__
    try:
        chain = state.read_chain(wrapper.module)
        parameters = parameters_of(chain, kind)
    except (UnsupportedLora, ConfigError) as error:
        layer = Layer(wrapper, None, False, (), extras)
        unknown = wrapper.kind is WrapperKind.UNKNOWN
        subject = f"a tuner's {kind} that is not LoRA" if unknown else "something that is not known here"
        return layer, [Finding(Feature.UNKNOWN, wrapper.path, layer.names, error.got or error.what, subject)]
    undone = parameters.state is LayerState.MERGED_DISABLED
    acting = parameters.rows if wrapper.kind is WrapperKind.TOKENS else parameters.loras
    loras = parameters.merged if undone else tuple(dict.fromkeys(one.name for one in acting))
    layer = Layer(wrapper, parameters, undone or bool(loras), loras, extras)
    found = list(_found(layer, parameters, tree))
    if layer.acts and not any(finding.reason_against("merged") for finding in found):
        reason = reason_of(chain, wrapper.copies)
        found += [] if reason is None else [replace(reason, where=wrapper.path, names=layer.names)]
    return layer, found


def _found(layer: Layer, parameters: LoraParameters, tree: LoraTree) -> Iterator[Finding]:
    wrapper, merged = layer.wrapper, ", ".join(parameters.merged)
    if parameters.state is LayerState.MERGED:
        yield Finding(Feature.MERGED, wrapper.path, layer.names, merged, "a layer with merged adapters")
    elif parameters.state is LayerState.MERGED_DISABLED:
        subject = "a layer with merged, disabled adapters"
        yield Finding(Feature.MERGED_DISABLED, wrapper.path, layer.names, merged, subject)
        own = identity_of("", parameters.weight)
        alike = {p.clean for p in tree.places if (t := p.tensor()) is not None and identity_of("", t) == own}
        if wrapper.kind is WrapperKind.LORA and len(alike) > 1:
            reason = "its weight is tied: what other layers compute with changes when PEFT's next forward unmerges it"
            yield Finding(Feature.UNREADABLE, wrapper.path, layer.names, reason, "this layer")
    if packed(parameters):
        yield Finding(Feature.QUANTISED, wrapper.path, (wrapper.path,), subject="a quantised base")
    if wrapper.kind is WrapperKind.TOKENS:
        trained = tuple(extra.raw for extra in layer.extras if _trains(extra))
        if layer.loras or trained:
            yield Finding(Feature.TOKENS, wrapper.path, trained or layer.names)
        return
    # Tensors that cannot be read here, unless a known variant stands for them.
    known = {lora.name for lora in parameters.loras if lora.variant}
    strange = tuple(
        extra.raw
        for extra in layer.extras
        if extra.container not in LORA_SEGMENTS and not extra.buffer and extra.lora not in known
        and (_trains(extra) or layer.acts)
    )  # fmt: skip
    if strange:
        subject = f"tensors of {type(wrapper.module).__name__} that plain LoRA does not have"
        yield Finding(Feature.UNKNOWN, wrapper.path, strange, subject=subject)
    if layer.acts:
        yield from _acting(layer, parameters)


def _saved(layer: Layer, tree: LoraTree) -> Iterator[Finding]:
    wrapper = layer.wrapper
    copies = [p for p in tree.places if any(w is wrapper and lora is not None for w, lora in p.copies)]
    acting = [p for p in copies if any(w is wrapper and lora in layer.loras for w, lora in p.copies)]
    trained = [p for p in copies if _trains(p)]
    if acting or trained:
        yield Finding(Feature.SAVED, wrapper.path, tuple(p.raw for p in acting or trained))
    idle = tuple(p.raw for p in trained if p not in acting)
    if idle and acting:
        yield Finding(Feature.UNKNOWN, wrapper.path, idle, subject="a copy that is trained but not active")


def _acting(layer: Layer, parameters: LoraParameters) -> Iterator[Finding]:
    path, names = layer.wrapper.path, layer.names
    tensors = [(need.raw, need.tensor()) for need in layer.needs]
    empty = tuple(raw for raw, tensor in tensors if tensor is None or tensor.is_meta or tensor.numel() == 0)
    if empty:
        subject = "an adapter whose tensors are sharded, empty or on the meta device"
        yield Finding(Feature.SHARDED, path, empty, subject=subject, way_out="gather it first")
    if parameters.kind == "conv":
        yield Finding(Feature.CONVOLUTION, path, names)
    elif parameters.kind == "attention":
        yield Finding(Feature.ATTENTION, path, names)
    experts = parameters.kind == "parameter" and parameters.weight.dim() == 3
    for lora in parameters.loras:
        yield from (replace(found, where=path, names=names) for found in of_variant(lora, experts=experts))
    if any(lora.bias is not None for lora in parameters.loras):
        feature = Feature.LORA_BIAS if parameters.bias is not None else Feature.LORA_BIAS_ALONE
        yield Finding(feature, path, layer.biases, subject="lora_bias")
    if any(lora.magnitude is not None for lora in parameters.loras):
        of = tuple(e.raw for e in layer.extras if e.container == "lora_magnitude_vector")
        yield Finding(Feature.DORA, path, of)


def _of_model(tree: LoraTree, layers: Sequence[Layer]) -> Iterator[Finding]:
    """List the features that no single layer has."""
    base = {id(place.tensor()) for place in tree.places}
    names = tuple(e.raw for e in tree.extras if e.wrapper is None and not e.buffer and id(e.tensor()) not in base)
    if names:
        found = "a trained prompt, or another parameter of the PEFT model itself"
        yield Finding(Feature.UNKNOWN, "", names, subject=found)
    names = tuple(place.raw for place in tree.places if not place.copies and _trains(place))
    if names:
        yield Finding(Feature.BASE_TRAINED, "", names, subject="a base tensor that is trained")
    lora = [one.parameters for one in layers if one.wrapper.kind is WrapperKind.LORA and one.parameters is not None]
    if any(one.loras for one in lora):
        return
    if any(one.state is LayerState.DISABLED for one in lora):
        yield Finding(Feature.DISABLED, subject="a disabled adapter")
    elif not any(one.merged for one in lora):
        yield Finding(Feature.INACTIVE, subject="an adapter that is not active")


def _notes(layers: Sequence[Layer]) -> tuple[str, ...]:
    paths: dict[str, list[str]] = {}
    awake = any(layer.acts for layer in layers if layer.wrapper.kind is WrapperKind.LORA)
    for layer in layers:
        p = layer.parameters
        if p is None or layer.wrapper.kind is not WrapperKind.LORA:
            continue
        if p.state is LayerState.MERGED_DISABLED:
            text = "adapters were merged, then disabled: the delta is taken off again, which is inexact"
        elif p.state is LayerState.MERGED:
            text = f"the base holds the merged adapters [{', '.join(p.merged)}]: sent as it is"
        elif p.state is LayerState.DISABLED:
            text = "adapters are disabled: base values are sent"
        elif not awake and p.owned:
            text = "no active adapter: base values are sent"
        else:
            continue
        paths.setdefault(text, []).append(layer.wrapper.path)
    return tuple(
        f"{text} ({len(found)} layer{'s' if len(found) > 1 else ''}, {found[0]}{' ...' if len(found) > 1 else ''})"
        for text, found in paths.items()
    )


def _trains(item: BaseTensor | WrapperTensor) -> bool:
    tensor = item.tensor()
    return tensor is not None and tensor.requires_grad and tensor.is_leaf


def packed(parameters: LoraParameters) -> bool:
    """Tell whether a weight is stored in a form that no checkpoint tensor has. Scaled fp8 is one, beside its scales."""
    return parameters.quant_state is not None and parameters.weight.dtype not in FP8


def quantised(place: BaseTensor) -> nn.Module | None:
    """Return the module without adapters whose packed weight this is; None for a tensor stored as its values."""
    tensor = place.tensor()
    if place.wrappers or place.buffer or place.attribute not in ("weight", *PACKED) or tensor is None:
        return None
    state = quant_state(place.owner, tensor)
    return None if state is None or tensor.dtype in FP8 else place.owner


def plain_dtype(parameters: LoraParameters) -> torch.dtype:
    """Choose the dtype in which a packed weight is announced once it is dequantised."""
    for dtype in (getattr(parameters.quant_state, "dtype", None), parameters.weight.dtype):
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.bfloat16 if parameters.bias is None else parameters.bias.dtype
