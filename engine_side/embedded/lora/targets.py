"""Choice of the layers that are wrapped for LoRA: made over the whole tree, before anything is changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from bridge.errors import ConfigError
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.lora.layers import wrapper_of
from engine_side.embedded.moe import FusedMoE
from engine_side.embedded.wrappers import unwrap

log = logging.getLogger(__name__)


def to_wrap(model: CausalLM, targets: Sequence[str] | None) -> dict[str, nn.Module]:
    """Choose the layers that get LoRA slots: path -> module, with the wrappers that it has already, in the order of
    the tree.

    Args:
        targets: names of modules, in a checkpoint's words or the engine's, by their last dotted segments; None takes
            every layer that can be wrapped.

    Raises ConfigError for a target that matches nothing, or matches something that cannot be wrapped. With no targets,
    layers that cannot be wrapped are warned of, once per class.
    """
    candidates = dict(_walk(model))
    if targets is None:
        _warn({path: core for path, module in candidates.items() if wrapper_of(core := unwrap(module)) is None})
        return {path: module for path, module in candidates.items() if wrapper_of(module) is not None}
    chosen: dict[str, nn.Module] = {}
    missing = set(targets)
    for path, module in candidates.items():
        core = unwrap(module)
        experts = model.experts if isinstance(core, FusedMoE) else ()
        names = [path, *model.parts_of(path), *(f"{path}.0.{part}" for part in experts)]
        hits = [target for target in targets if any(_ends_with(name, target) for name in names)]
        missing.difference_update(hits)
        if hits and wrapper_of(core) is None:
            raise ConfigError(
                "a module of lora_targets cannot carry LoRA",
                where=f"{path} ({type(core).__name__})",
                expected="a linear layer, an embedding, a head or a layer's experts",
                got=f"matched by the target {hits[0]!r}",
                remedy="take it out of lora_targets",
                names=(path,),
            )
        if hits:
            chosen[path] = module
    if missing:
        wrong = tuple(target for target in targets if target in missing)
        raise ConfigError(
            "a LoRA target matches no module of this model",
            where="lora_targets",
            expected=", ".join(sorted({path.rpartition(".")[2] for path in candidates})),
            got=", ".join(map(repr, wrong)),
            remedy="name modules by whole dotted segments, as in the checkpoint",
            names=wrong,
        )
    return chosen


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module below `model` with its first path, not looking into layers that can be wrapped or into wrappers."""
    for name, child in model.named_children():
        yield f"{prefix}{name}", child
        if wrapper_of(child) is None:
            yield from _walk(unwrap(child), f"{prefix}{name}.")


def _ends_with(name: str, target: str) -> bool:
    """Whole dotted segments; experts carry a number, which targets leave out or not."""
    segments, wanted = name.split("."), target.split(".")
    return segments[-len(wanted) :] == wanted or [s for s in segments if not s.isdecimal()][-len(wanted) :] == wanted


def _warn(unwrappable: Mapping[str, nn.Module]) -> None:
    classes: dict[type[nn.Module], list[str]] = {}
    for path, core in unwrappable.items():
        # Checkpoints have matrices for this module: somebody could have meant it to carry LoRA.
        held = [param for param in core._parameters.values() if param is not None]
        if any(param.dim() > 1 for param in held) or (held and hasattr(core, "quant_method")):
            classes.setdefault(type(core), []).append(path)
    for cls, paths in classes.items():
        log.warning("no LoRA on %s: %d layers cannot carry it, such as %s", cls.__name__, len(paths), paths[0])
