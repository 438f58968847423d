"""Where a model with PEFT-style wrappers keeps what: its base tensors by their plain names, its adapters' tensors, its
wrappers. Found by structure alone: no name is searched for a pattern, so modules called `lora_gate` or `default` and
adapters called `lora_x` are what they are.

Three names of one tensor, by the example of a compiled PEFT model:

    raw     _orig_mod.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight    as `named_parameters` gives it
    live    model.layers.0.mlp.up_proj.base_layer.weight     from the model inside, without the wrappers that only hold
    clean   model.layers.0.mlp.up_proj.weight                what the base model itself calls it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

import torch
from torch import nn

from trainer_side.lora.layers.effective import attention_output
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.layers.wrapper_chain import is_lora, is_saved, is_token_wrapper, is_tokens, is_tuner
from trainer_side.names.naming import RESERVED, ROOT_WRAPPER, wrapped_child

CONTAINERS = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_diag"}
)
"""Attributes of a LoRA layer whose tensors, keyed by adapter, the reader knows."""
_PREFIXES: tuple[tuple[str, ...], ...] = ((), ("base_model", "model"), ("model",))
"""What names begin with when they come from a PEFT model, or its tuner, around the model that was bound."""


_T = TypeVar("_T")


class WrapperKind(Enum):
    """What a wrapper is."""

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
        """The module that has the adapters and their state: of trainable tokens the one inside."""
        return self.module._modules.get("token_adapter") or self.module


@dataclass(frozen=True, eq=False)
class BaseTensor:
    """Where one tensor of the base model lives, or of a copy that `modules_to_save` trains in its stead.

    Attributes:
        wrappers: those directly around its module, the outermost first.
        copies: for each `modules_to_save` wrapper on the way the adapter whose copy this is; None: the original's.
    """

    raw: str
    live: str
    clean: str
    owner: nn.Module
    attribute: str
    buffer: bool
    wrappers: tuple[Wrapper, ...] = ()
    copies: tuple[tuple[Wrapper, str | None], ...] = ()

    @property
    def original(self) -> bool:
        return all(adapter is None for _, adapter in self.copies)

    @property
    def registered(self) -> bool:
        """Whether `named_parameters` shows it: PEFT's attention keeps a merged weight as a plain attribute."""
        return self.attribute in self.owner._parameters

    def tensor(self) -> torch.Tensor | None:
        """What lies there now."""
        found = self.owner._buffers.get(self.attribute) if self.buffer else self.owner._parameters.get(self.attribute)
        if found is None and not self.buffer:
            loose = vars(self.owner).get(self.attribute)
            found = loose if isinstance(loose, torch.Tensor) else None
        return found


@dataclass(frozen=True, eq=False)
class WrapperTensor:
    """A tensor that a wrapper adds: of an adapter, or of something that is no LoRA.

    Attributes:
        wrapper: None for what hangs on the PEFT model itself (prompt tuning).
        container: the wrapper's attribute that leads to it.
        adapter: the key below it; None where the container is no dictionary.
    """

    raw: str
    live: str
    owner: nn.Module
    attribute: str
    buffer: bool
    wrapper: Wrapper | None
    container: str
    adapter: str | None

    def tensor(self) -> torch.Tensor | None:
        """What lies there now."""
        return (self.owner._buffers if self.buffer else self.owner._parameters).get(self.attribute)


TreeTensor = BaseTensor | WrapperTensor


_Shape = tuple[nn.Module, dict[str, nn.Module | None], frozenset[str], tuple[str, ...]]
"""What one module held when the tree was read: its children, its parameters' names, those that were None."""


@dataclass(frozen=True, eq=False)
class LoraTree:
    """One reading of a model. Compared by identity; `unchanged` says whether it still holds."""

    model: nn.Module
    inner: nn.Module
    places: tuple[BaseTensor, ...]
    extras: tuple[WrapperTensor, ...]
    wrappers: tuple[Wrapper, ...]
    shapes: tuple[_Shape, ...]
    peft_root: bool
    names: Mapping[str, TreeTensor] = field(default_factory=dict)
    clean: Mapping[str, BaseTensor] = field(default_factory=dict)

    def unchanged(self) -> bool:
        """Whether the same modules hold the same parameters as when this was read. Half a microsecond per module."""
        for module, children, names, absent in self.shapes:
            now = module._parameters
            if module._modules != children or now.keys() != names:
                return False
            if absent and not all(now[name] is None for name in absent):
                return False
        return True

    def find(self, name: str) -> TreeTensor | None:
        """The tensor that an iterable over the model, from outside or inside its wrappers, calls so."""
        return _look_up(self.names, name)

    def find_plain(self, name: str) -> BaseTensor | None:
        """The tensor that the base model, as if there were no wrappers, calls so."""
        return _look_up(self.clean, name)


def _look_up(names: Mapping[str, _T], name: str) -> _T | None:
    found = names.get(name)
    if found is not None:
        return found
    segments = [s for s in name.split(".") if s not in RESERVED]
    while True:
        for prefix in _PREFIXES:
            if tuple(segments[: len(prefix)]) == prefix:
                found = names.get(".".join(segments[len(prefix) :]))
                if found is not None:
                    return found
        if len(segments) < 2 or segments[0] != ROOT_WRAPPER:
            return None
        segments = segments[1:]


def read_tree(model: nn.Module) -> LoraTree:
    """Walk a model. Reads no values and changes nothing; milliseconds."""
    walker = _Walker()
    walker.visit(model, "", "", "", root=True)
    inner = inner_model(model)
    names: dict[str, TreeTensor] = {}
    items: list[TreeTensor] = [*walker.places, *walker.extras]
    for item in items:
        names.setdefault(item.live, item)
    # A raw name is exact, so it wins over what another tensor is called from further inside.
    names.update({item.raw: item for item in items})
    clean: dict[str, BaseTensor] = {}
    for place in walker.places:
        if place.original:
            clean.setdefault(place.clean, place)
    return LoraTree(
        model,
        inner,
        tuple(walker.places),
        tuple(walker.extras),
        tuple(walker.wrappers),
        tuple(walker.shapes),
        walker.peft_root,
        names,
        clean,
    )


def kind_of(module: nn.Module) -> WrapperKind | None:
    """What kind of wrapper a module is, by what it holds; None for an ordinary module."""
    if is_saved(module):
        return WrapperKind.SAVED
    if is_token_wrapper(module) or is_tokens(module):
        return WrapperKind.TOKENS
    if is_lora(module):
        return WrapperKind.LORA
    return WrapperKind.UNKNOWN if is_tuner(module) else None


def peft_child(module: nn.Module) -> str | None:
    """The name of the model inside a PEFT model or its tuner; None for other modules."""
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
    """The model inside any chain of wrappers and PEFT models around it."""
    while True:
        name = peft_child(model) or wrapped_child(model, root=True)
        child = None if name is None else model._modules.get(name)
        if child is None:
            return model
        model = child


class _Walker:
    """Collects while it goes down the tree."""

    def __init__(self) -> None:
        self.places: list[BaseTensor] = []
        self.extras: list[WrapperTensor] = []
        self.wrappers: list[Wrapper] = []
        self.shapes: list[_Shape] = []
        self.peft_root = False
        self._twice: set[int] = set()

    def visit(
        self,
        module: nn.Module,
        raw: str,
        live: str,
        clean: str,
        *,
        around: tuple[Wrapper, ...] = (),
        copies: tuple[tuple[Wrapper, str | None], ...] = (),
        root: bool = False,
    ) -> None:
        self._remember(module)
        inside = peft_child(module)
        if inside is not None:
            self.peft_root = True
            self._rest(module, raw, live, None, inside)
            model = module.get_submodule(inside)
            self.visit(model, f"{raw}{inside}.", live, clean, around=around, copies=copies, root=root)
            return
        kind = kind_of(module)
        if kind is not None:
            self._wrapper(module, kind, (raw, live, clean), around, copies)
            return
        self._own(module, (raw, live, clean), around, copies)
        hop = wrapped_child(module, root=root)
        for name, child in module._modules.items():
            if child is None:
                continue
            if name == hop:
                self.visit(child, f"{raw}{name}.", live, clean, around=around, copies=copies, root=root)
            else:
                self.visit(child, f"{raw}{name}.", f"{live}{name}.", f"{clean}{name}.", copies=copies)

    def _remember(self, module: nn.Module) -> None:
        held = module._parameters
        absent = tuple(name for name, parameter in held.items() if parameter is None)
        self.shapes.append((module, dict(module._modules), frozenset(held), absent))

    def _own(
        self,
        module: nn.Module,
        at: tuple[str, str, str],
        around: tuple[Wrapper, ...],
        copies: tuple[tuple[Wrapper, str | None], ...],
    ) -> None:
        raw, live, clean = at
        parameters = [name for name, parameter in module._parameters.items() if parameter is not None]
        loose = list(_loose(module, around)) if around else []
        buffers = [
            name
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        for names, buffer in ((parameters + loose, False), (buffers, True)):
            for name in names:
                self.places.append(
                    BaseTensor(raw + name, live + name, clean + name, module, name, buffer, around, copies)
                )

    def _wrapper(
        self,
        module: nn.Module,
        kind: WrapperKind,
        at: tuple[str, str, str],
        around: tuple[Wrapper, ...],
        copies: tuple[tuple[Wrapper, str | None], ...],
    ) -> None:
        raw, live, clean = at
        attribute = vars(module).get("parameter_name")
        attribute = attribute if isinstance(attribute, str) else None
        copies_of = 2 if id(module) in self._twice else None
        wrapper = Wrapper(clean.removesuffix("."), module, kind, attribute, copies_of)
        self.wrappers.append(wrapper)
        children = module._modules
        if kind is WrapperKind.SAVED:
            self._saved(module, wrapper, at, around, copies)
            return
        tokens = children.get("token_adapter")
        if tokens is not None:
            self._rest(module, raw, live, wrapper, "token_adapter")
            self._remember(tokens)
            module, raw, live = tokens, f"{raw}token_adapter.", f"{live}token_adapter."
        if module._modules.get("base_layer") is None:
            self._flat(module, at, (*around, wrapper), copies)
            return
        self._rest(module, raw, live, wrapper, "base_layer")
        output = attention_output(module) if kind is WrapperKind.LORA else None
        if output is not None:
            self._twice.add(id(output))
        base = module.get_submodule("base_layer")
        inner = (f"{raw}base_layer.", f"{live}base_layer.", clean)
        self.visit(base, *inner, around=(*around, wrapper), copies=copies)

    def _flat(
        self,
        module: nn.Module,
        at: tuple[str, str, str],
        around: tuple[Wrapper, ...],
        copies: tuple[tuple[Wrapper, str | None], ...],
    ) -> None:
        """A layer that holds its weight and its adapters side by side."""
        raw, live, _ = at
        self._own(module, at, around, copies)
        for name, child in module._modules.items():
            if child is not None:
                keyed = isinstance(child, (nn.ModuleDict, nn.ParameterDict))
                self._below(child, f"{raw}{name}.", f"{live}{name}.", around[-1], name, None, keyed)

    def _saved(
        self,
        module: nn.Module,
        wrapper: Wrapper,
        at: tuple[str, str, str],
        around: tuple[Wrapper, ...],
        copies: tuple[tuple[Wrapper, str | None], ...],
    ) -> None:
        raw, live, clean = at
        self._rest(module, raw, live, wrapper, "original_module", "modules_to_save")
        original, saved = module._modules["original_module"], module._modules["modules_to_save"]
        if original is not None:
            step = "original_module."
            self.visit(original, raw + step, live + step, clean, around=around, copies=(*copies, (wrapper, None)))
        if saved is None:
            return
        self._remember(saved)
        for adapter, copy in saved._modules.items():
            if copy is not None:
                step = f"modules_to_save.{adapter}."
                self.visit(copy, raw + step, live + step, clean, around=around, copies=(*copies, (wrapper, adapter)))

    def _rest(self, module: nn.Module, raw: str, live: str, wrapper: Wrapper | None, *but: str) -> None:
        """Everything of a wrapper that is not the model inside."""
        for name, buffer in _tensors(module):
            self.extras.append(WrapperTensor(raw + name, live + name, module, name, buffer, wrapper, name, None))
        for name, child in module._modules.items():
            if child is None or name in but:
                continue
            keyed = isinstance(child, (nn.ModuleDict, nn.ParameterDict))
            self._below(child, f"{raw}{name}.", f"{live}{name}.", wrapper, name, None, keyed)

    def _below(
        self, module: nn.Module, raw: str, live: str, wrapper: Wrapper | None, container: str, adapter: str | None,
        keyed: bool,
    ) -> None:  # fmt: skip
        self._remember(module)
        for name, buffer in _tensors(module):
            key = name if keyed else adapter
            self.extras.append(WrapperTensor(raw + name, live + name, module, name, buffer, wrapper, container, key))
        for name, child in module._modules.items():
            if child is not None:
                below = live if name in RESERVED else f"{live}{name}."
                key = name if keyed else adapter
                self._below(child, f"{raw}{name}.", below, wrapper, container, key, False)


def _tensors(module: nn.Module) -> Iterator[tuple[str, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, False
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, True


def _loose(module: nn.Module, around: tuple[Wrapper, ...]) -> Iterator[str]:
    """Weights that stand in for a Parameter that was taken out: PEFT's attention, while merged."""
    loose = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    if loose:
        weights = [lora_parameters(wrapper.module).weight for wrapper in around if wrapper.kind is WrapperKind.LORA]
        yield from (name for name, value in loose.items() if any(value is weight for weight in weights))
