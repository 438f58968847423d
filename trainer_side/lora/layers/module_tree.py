"""Walk a model with PEFT-style wrappers: its base tensors by their plain names, its adapters' tensors, its wrappers.

Found by structure alone: no name is searched for a pattern, so modules called `lora_gate` or `default` and adapters
called `lora_x` are told from PEFT's own.

Three names of one tensor, by the example of a compiled PEFT model:

    raw     _orig_mod.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight    as `named_parameters` gives it
    live    model.layers.0.mlp.up_proj.base_layer.weight     from the model inside, without the wrappers that only hold
    clean   model.layers.0.mlp.up_proj.weight                what the base model itself calls it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import nn

from trainer_side.lora.layers.effective import attention_output
from trainer_side.lora.layers.read import PACKED, lora_parameters, stored
from trainer_side.lora.layers.wrapper_chain import is_lora, is_saved, is_token_wrapper, is_tokens, is_tuner
from trainer_side.names.naming import RESERVED, ROOT_WRAPPER, own_tensors, wrapped_child

_PREFIXES: tuple[tuple[str, ...], ...] = ((), ("base_model", "model"), ("model",))
"""Beginnings of names that come from a PEFT model, or its tuner, around the model that was bound."""


class WrapperKind(Enum):
    """The kinds of wrappers."""

    LORA = "LoRA"
    SAVED = "modules_to_save"
    TOKENS = "trainable tokens"
    UNKNOWN = "a tuner that is not LoRA"


@dataclass(frozen=True, eq=False)
class Wrapper:
    """A module that stands around a base layer. Compared by identity.

    Attributes:
        path: of the layer that it wraps, in the base model.
        module: the live module.
        attribute: the one parameter that it acts on, for PEFT's `target_parameters`; None: the layer's weight.
        copies: how often its effect is added, of the output projection inside PEFT's attention; None: once.
    """

    path: str
    module: nn.Module
    kind: WrapperKind
    attribute: str | None = None
    copies: int | None = None

    @property
    def holder(self) -> nn.Module:
        """Return the module that has the adapters and their switches: of trainable tokens the one inside."""
        return self.module._modules.get("token_adapter") or self.module


@dataclass(frozen=True, eq=False)
class TreeTensor:
    """One tensor of the model, by where it lies: in `attribute` of the module `owner`."""

    raw: str
    live: str
    owner: nn.Module
    attribute: str
    buffer: bool

    @property
    def registered(self) -> bool:
        """True when `named_parameters` yields it: PEFT's attention keeps a merged weight as a plain attribute."""
        return self.attribute in self.owner._parameters

    def tensor(self) -> torch.Tensor | None:
        """Return the live tensor; None when it is gone."""
        found = self.owner._buffers.get(self.attribute) if self.buffer else self.owner._parameters.get(self.attribute)
        if found is None and not self.buffer:
            loose = vars(self.owner).get(self.attribute)
            found = loose if isinstance(loose, torch.Tensor) else None
        return found


@dataclass(frozen=True, eq=False)
class BaseTensor(TreeTensor):
    """A tensor of the base model, or of a copy that `modules_to_save` trains in its stead.

    Attributes:
        wrappers: those directly around its module, the outermost first.
        copies: for each `modules_to_save` wrapper on the way the adapter whose copy this is; None: the original's.
    """

    clean: str
    wrappers: tuple[Wrapper, ...] = ()
    copies: tuple[tuple[Wrapper, str | None], ...] = ()

    @property
    def original(self) -> bool:
        """True for the base model's own tensor, and not a copy's."""
        return all(lora is None for _, lora in self.copies)


@dataclass(frozen=True, eq=False)
class WrapperTensor(TreeTensor):
    """A tensor that a wrapper adds: an adapter's, or one that is no LoRA's.

    Attributes:
        wrapper: None for a tensor of the PEFT model itself (prompt tuning).
        container: the wrapper's attribute that leads to it.
        lora: the key below it, PEFT's name of an adapter; None where the container is no dictionary.
    """

    wrapper: Wrapper | None
    container: str
    lora: str | None


_Shape = tuple[nn.Module, dict[str, nn.Module | None], frozenset[str], tuple[str, ...]]
"""One module as the tree was read: the module, its children, its parameters' names, those that were None."""


def kind_of(module: nn.Module) -> WrapperKind | None:
    """Return the kind of wrapper that a module is, by what it holds; None for an ordinary module."""
    if is_saved(module):
        return WrapperKind.SAVED
    if is_token_wrapper(module) or is_tokens(module):
        return WrapperKind.TOKENS
    if is_lora(module):
        return WrapperKind.LORA
    return WrapperKind.UNKNOWN if is_tuner(module) else None


def peft_child(module: nn.Module) -> str | None:
    """Return the name of the model inside a PEFT model or its tuner; None for other modules."""
    # Adapters may be injected into any model, which then carries a `peft_config` too, and models have children of these
    # names: what only PEFT's own classes do decides. Its mixed model has no `get_base_model`, but a tuner inside.
    children = module._modules
    inside = children.get("base_model")
    if inside is not None and (callable(getattr(type(module), "get_base_model", None)) or _is_tuner_model(inside)):
        return "base_model" if isinstance(getattr(module, "peft_config", None), Mapping) else None
    return "model" if _is_tuner_model(module) else None


def _is_tuner_model(module: nn.Module) -> bool:
    return tuple(module._modules) == ("model",) and callable(getattr(type(module), "inject_adapter", None))


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside any chain of wrappers and PEFT models around it."""
    while True:
        name = peft_child(model) or wrapped_child(model, root=True)
        child = None if name is None else model._modules.get(name)
        if child is None:
            return model
        model = child


@dataclass(frozen=True)
class _Position:
    """A position of the walk.

    Attributes:
        raw, live, clean: prefixes of the names here.
        around: the wrappers directly around the next module; `copies`: those of `modules_to_save` on the way.
        root: only wrappers were passed.
    """

    raw: str = ""
    live: str = ""
    clean: str = ""
    around: tuple[Wrapper, ...] = ()
    copies: tuple[tuple[Wrapper, str | None], ...] = ()
    root: bool = False

    def child(self, name: str) -> _Position:
        """Step into an ordinary child."""
        return _Position(f"{self.raw}{name}.", f"{self.live}{name}.", f"{self.clean}{name}.", copies=self.copies)

    def hop(self, name: str, *, live: bool) -> _Position:
        """Step into the module that a wrapper wraps: its clean name is the wrapper's own."""
        return replace(self, raw=f"{self.raw}{name}.", live=f"{self.live}{name}." if live else self.live)


class LoraTree:
    """One reading of a model; `unchanged` tells whether it still holds. Reads no values, changes nothing; milliseconds.

    Attributes:
        inner: the model inside all wrappers around it.
        places: tensors of the base model, and of copies that `modules_to_save` trains.
        extras: tensors that wrappers add.
        peft_root: the model is a PEFT model, or holds one.
        names: raw and live names -> tensor.
        clean: the base model's own names -> tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inner = inner_model(model)
        self.places: list[BaseTensor] = []
        self.extras: list[WrapperTensor] = []
        self.wrappers: list[Wrapper] = []
        self.peft_root = False
        self._shapes: list[_Shape] = []
        self._twice: set[int] = set()
        self._visit(model, _Position(root=True))
        # A raw name is exact, so it wins over what another tensor is called from further inside.
        items: list[TreeTensor] = [*self.places, *self.extras]
        self.names = {item.live: item for item in reversed(items)} | {item.raw: item for item in items}
        self.clean = {place.clean: place for place in reversed(self.places) if place.original}

    def unchanged(self) -> bool:
        """Tell whether the same modules hold the same parameters as when this was read. Half a microsecond each."""
        for module, children, names, absent in self._shapes:
            now = module._parameters
            if module._modules != children or now.keys() != names:
                return False
            if absent and not all(now[name] is None for name in absent):
                return False
        return True

    def find(self, name: str, *, plain: bool = False) -> TreeTensor | None:
        """Find the tensor of a name that an iterable over the model, from outside or inside its wrappers, gives.

        `plain`: of a name that the base model without any wrapper would give.
        """
        names: Mapping[str, TreeTensor] = self.clean if plain else self.names
        found = names.get(name)
        segments = [s for s in name.split(".") if s not in RESERVED] if found is None else []
        while found is None:
            for prefix in _PREFIXES:
                if found is None and tuple(segments[: len(prefix)]) == prefix:
                    found = names.get(".".join(segments[len(prefix) :]))
            if len(segments) < 2 or segments[0] != ROOT_WRAPPER:
                break
            segments = segments[1:]
        return found

    def _visit(self, module: nn.Module, at: _Position) -> None:
        self._remember(module)
        inside, kind = peft_child(module), kind_of(module)
        if inside is not None:
            self.peft_root = True
            self._add_extras(module, at, None, skip=(inside,))
            self._visit(module.get_submodule(inside), at.hop(inside, live=False))
        elif kind is not None:
            self._visit_wrapper(module, kind, at)
        else:
            self._add_places(module, at)
            hop = wrapped_child(module, root=at.root)
            for name, child in module._modules.items():
                if child is not None:
                    self._visit(child, at.hop(name, live=False) if name == hop else at.child(name))

    def _remember(self, module: nn.Module) -> None:
        held = module._parameters
        absent = tuple(name for name, parameter in held.items() if parameter is None)
        self._shapes.append((module, dict(module._modules), frozenset(held), absent))

    def _add_places(self, module: nn.Module, at: _Position) -> None:
        own = [(name, buffer) for name, _, buffer in own_tensors(module)]
        packed = [name for name, _ in own if name in PACKED and getattr(module, name) is stored(module, "weight")]
        if at.around or packed:
            # Tensors that stand in for a Parameter: of PEFT's attention, while merged; the bias of HQQ's layers.
            loose = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
            lora = [wrapper.module for wrapper in at.around if wrapper.kind is WrapperKind.LORA] if loose else []
            read = [lora_parameters(layer) for layer in (*lora, *([module] if packed else []))]
            held = [tensor for layer in read for tensor in (layer.weight, layer.bias) if tensor is not None]
            own += [(name, False) for name, value in loose.items() if any(value is tensor for tensor in held)]
            own.sort(key=lambda found: found[1])
        for name, buffer in own:
            # a checkpoint knows a packed weight by the name that it has unpacked
            plain = "weight" if name in packed else name
            raw, live, clean = at.raw + name, at.live + name, at.clean + plain
            self.places.append(BaseTensor(raw, live, module, name, buffer, clean, at.around, at.copies))

    def _visit_wrapper(self, module: nn.Module, kind: WrapperKind, at: _Position) -> None:
        attribute = vars(module).get("parameter_name")
        attribute = attribute if isinstance(attribute, str) else None
        times = 2 if id(module) in self._twice else None
        wrapper = Wrapper(at.clean.removesuffix("."), module, kind, attribute, times)
        self.wrappers.append(wrapper)
        if kind is WrapperKind.SAVED:
            self._visit_saved(module, wrapper, at)
            return
        at = replace(at, around=(*at.around, wrapper), root=False)
        tokens = module._modules.get("token_adapter")
        if tokens is not None:
            self._add_extras(module, at, wrapper, skip=("token_adapter",))
            self._remember(tokens)
            module, at = tokens, at.hop("token_adapter", live=True)
        base = module._modules.get("base_layer")
        if base is None:
            # A flat layer holds its weight and its adapters side by side.
            self._add_places(module, at)
            self._add_extras(module, at, wrapper, skip=tuple(name for name, _, _ in own_tensors(module)))
            return
        self._add_extras(module, at, wrapper, skip=("base_layer",))
        output = attention_output(module) if kind is WrapperKind.LORA else None
        if output is not None:
            self._twice.add(id(output))
        self._visit(base, at.hop("base_layer", live=True))

    def _visit_saved(self, module: nn.Module, wrapper: Wrapper, at: _Position) -> None:
        self._add_extras(module, at, wrapper, skip=("original_module", "modules_to_save"))
        original, saved = module._modules["original_module"], module._modules["modules_to_save"]
        at = replace(at, root=False)
        if original is not None:
            inside = at.hop("original_module", live=True)
            self._visit(original, replace(inside, copies=(*at.copies, (wrapper, None))))
        if saved is not None:
            self._remember(saved)
            for lora, copy in saved._modules.items():
                if copy is not None:
                    inside = at.hop("modules_to_save", live=True).hop(lora, live=True)
                    self._visit(copy, replace(inside, copies=(*at.copies, (wrapper, lora))))

    def _add_extras(
        self,
        module: nn.Module,
        at: _Position,
        wrapper: Wrapper | None,
        *,
        skip: tuple[str, ...] = (),
        below: tuple[str, ...] = (),
        keyed: bool = False,
    ) -> None:
        """Add everything of a wrapper that is not the model inside; `below`: the way from the wrapper to `module`."""
        if below:
            self._remember(module)
        for name, _, buffer in own_tensors(module):
            way = (*below, name)
            if way[0] not in skip:
                raw, live, lora = at.raw + name, at.live + name, way[1] if keyed else None
                self.extras.append(WrapperTensor(raw, live, module, name, buffer, wrapper, way[0], lora))
        for name, child in module._modules.items():
            if child is not None and name not in skip:
                into = at.hop(name, live=name not in RESERVED)
                keys = keyed if below else isinstance(child, (nn.ModuleDict, nn.ParameterDict))
                self._add_extras(child, into, wrapper, below=(*below, name), keyed=keys)
