"""Which layers of a model are wrapped: a decision over the whole tree, made before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from bridge.errors import ConfigError
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, wrapper_of
from engine_side.embedded.wrappers import unwrap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A module of the live tree: where it hangs, itself with the wrappers it has already, and without them."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    core: nn.Module
    wrapper: type[BaseLayerWithLoRA] | None


def to_wrap(model: CausalLM, targets: Sequence[str] | None) -> list[Found]:
    """The layers that get adapters, in the order of the tree.

    Args:
        targets: names of modules, in a checkpoint's words or the engine's, by their last dotted segments; None takes
            every layer that can be wrapped.

    Raises ConfigError for a target that matches nothing, or matches something that cannot be wrapped. With no targets,
    layers that cannot be wrapped are warned of, once per class.
    """
    if targets is None:
        modules = list(walk(model))
        _warn([found for found in modules if found.wrapper is None and _is_layer(found.core)])
        return [found for found in modules if found.wrapper is not None]
    chosen: list[Found] = []
    matched: set[str] = set()
    for found in walk(model):
        names = checkpoint_modules(model, found.path)
        hits = [target for target in targets if any(_ends_with(name, target) for name in names)]
        matched.update(hits)
        if not hits:
            continue
        if found.wrapper is None:
            raise ConfigError(
                "a module that adapters were asked for cannot carry them",
                where=f"{found.path} ({type(found.core).__name__})",
                expected="a linear layer, an embedding, a head or a layer's experts",
                got=f"matched by the target {hits[0]!r}",
                remedy="take it out of lora_targets",
                names=(found.path,),
            )
        chosen.append(found)
    missing = [target for target in targets if target not in matched]
    if missing:
        raise ConfigError(
            "a LoRA target matches no module of this model",
            where="lora_targets",
            expected=", ".join(sorted({found.path.rpartition(".")[2] for found in walk(model)})),
            got=", ".join(map(repr, missing)),
            names=tuple(missing),
        )
    return chosen


def walk(model: nn.Module, prefix: str = "") -> Iterator[Found]:
    """Every module below `model` with its first path, not looking into layers that can be wrapped or into wrappers."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        core = unwrap(child)
        wrapper = wrapper_of(core)
        yield Found(path, model, name, child, core, wrapper)
        if wrapper is None:
            yield from walk(core, f"{path}.")


def checkpoint_modules(model: CausalLM, path: str) -> set[str]:
    """What the engine's module at `path` is called in a checkpoint (each part of a fused one), besides its own path.
    Experts are asked for with the number 0."""
    parent = path.rpartition(".")[0]
    siblings = (".".join(filter(None, (parent, part))) for part in model.stacked)
    experts = (f"{path}.0.{part}" for part in model.experts)
    return {path}.union(name for name in (*siblings, *experts) if module_of(model, name) == path)


def module_of(model: CausalLM, name: str) -> str:
    """Path of the engine's module that holds the weight of a checkpoint's module."""
    return model.resolve(f"{name}.weight")[0].rpartition(".")[0]


def _ends_with(name: str, target: str) -> bool:
    """Whole dotted segments; experts carry a number, which targets leave out or not."""
    segments, wanted = name.split("."), target.split(".")
    return segments[-len(wanted) :] == wanted or [s for s in segments if not s.isdecimal()][-len(wanted) :] == wanted


def _is_layer(core: nn.Module) -> bool:
    """A layer with weights that a checkpoint has matrices for: something that adapters could have been meant for."""
    held = [param for param in core._parameters.values() if param is not None]
    return any(param.dim() > 1 for param in held) or (bool(held) and hasattr(core, "quant_method"))


def _warn(unwrappable: Sequence[Found]) -> None:
    classes: dict[type[nn.Module], list[str]] = {}
    for found in unwrappable:
        classes.setdefault(type(found.core), []).append(found.path)
    for cls, paths in classes.items():
        log.warning("no LoRA on %s: %d layers cannot carry adapters, such as %s", cls.__name__, len(paths), paths[0])
