"""Choice of the layers that are wrapped for LoRA: made over the whole tree, before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from bridge.errors import ConfigError
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, wrapper_of
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.wrappers import unwrap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraCandidate:
    """A module of the live tree: its path, itself with the wrappers that it has already, and without them; the class
    that would wrap it."""

    path: str
    module: nn.Module
    core: nn.Module
    wrapper: type[BaseLayerWithLoRA] | None


def to_wrap(model: CausalLM, targets: Sequence[str] | None) -> list[LoraCandidate]:
    """Choose the layers that get LoRA slots, in the order of the tree.

    Args:
        targets: names of modules, in a checkpoint's words or the engine's, by their last dotted segments; None takes
            every layer that can be wrapped.

    Raises ConfigError for a target that matches nothing, or matches something that cannot be wrapped. With no targets,
    layers that cannot be wrapped are warned of, once per class.
    """
    candidates = list(_walk(model))
    if targets is None:
        _warn([found for found in candidates if found.wrapper is None and _is_layer(found.core)])
        return [found for found in candidates if found.wrapper is not None]
    chosen: list[LoraCandidate] = []
    missing = set(targets)
    for found in candidates:
        names = _checkpoint_modules(model, found)
        hits = [target for target in targets if any(_ends_with(name, target) for name in names)]
        missing.difference_update(hits)
        if hits and found.wrapper is None:
            raise ConfigError(
                "a module of lora_targets cannot carry LoRA",
                where=f"{found.path} ({type(found.core).__name__})",
                expected="a linear layer, an embedding, a head or a layer's experts",
                got=f"matched by the target {hits[0]!r}",
                remedy="take it out of lora_targets",
                names=(found.path,),
            )
        if hits:
            chosen.append(found)
    if missing:
        wrong = tuple(target for target in targets if target in missing)
        raise ConfigError(
            "a LoRA target matches no module of this model",
            where="lora_targets",
            expected=", ".join(sorted({found.path.rpartition(".")[2] for found in candidates})),
            got=", ".join(map(repr, wrong)),
            remedy="name modules by whole dotted segments, as in the checkpoint",
            names=wrong,
        )
    return chosen


def _walk(model: nn.Module, prefix: str = "") -> Iterator[LoraCandidate]:
    """Every module below `model` with its first path, not looking into layers that can be wrapped or into wrappers."""
    for name, child in model.named_children():
        core = unwrap(child)
        wrapper = wrapper_of(core)
        yield LoraCandidate(f"{prefix}{name}", child, core, wrapper)
        if wrapper is None:
            yield from _walk(core, f"{prefix}{name}.")


def _checkpoint_modules(model: CausalLM, found: LoraCandidate) -> list[str]:
    """Names of a module in a checkpoint (each part of a fused one, expert 0 for experts), and its own path."""
    experts = model.experts if isinstance(found.core, FusedMoE) else ()
    return [found.path, *model.parts_of(found.path), *(f"{found.path}.0.{part}" for part in experts)]


def _ends_with(name: str, target: str) -> bool:
    """Whole dotted segments; experts carry a number, which targets leave out or not."""
    segments, wanted = name.split("."), target.split(".")
    return segments[-len(wanted) :] == wanted or [s for s in segments if not s.isdecimal()][-len(wanted) :] == wanted


def _is_layer(core: nn.Module) -> bool:
    """Tell if checkpoints have matrices for this module: somebody could have meant it to carry LoRA."""
    held = [param for param in core._parameters.values() if param is not None]
    return any(param.dim() > 1 for param in held) or (bool(held) and hasattr(core, "quant_method"))


def _warn(unwrappable: Sequence[LoraCandidate]) -> None:
    classes: dict[type[nn.Module], list[str]] = {}
    for found in unwrappable:
        classes.setdefault(type(found.core), []).append(found.path)
    for cls, paths in classes.items():
        log.warning("no LoRA on %s: %d layers cannot carry it, such as %s", cls.__name__, len(paths), paths[0])
