"""Find the policy inside a module that adds to it: a value head, a critic, a reward model beside it.

An engine serves the policy alone, under the names of the policy's own checkpoint. Names are therefore those of the
module inside; what lies beside it keeps its names, and need not be pushed. The canary's forward is that of the whole
where it gives logits: what is around a policy may change them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from bridge.errors import UnexpectedTensor

if TYPE_CHECKING:
    from trainer_side.names.naming import CanonicalMap


def policy_in(model: nn.Module) -> nn.Module | None:
    """Return the one generative transformers model inside a module of another class; None where there is none, or more
    than one, and for a transformers model itself."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or isinstance(model, library.PreTrainedModel):
        return None
    found: dict[int, nn.Module] = {}
    todo = [child for child in model._modules.values() if child is not None]
    while todo:
        module = todo.pop()
        if not isinstance(module, library.PreTrainedModel):
            todo += [child for child in module._modules.values() if child is not None]
        elif type(module).can_generate():
            found[id(module)] = module
    return next(iter(found.values())) if len(found) == 1 else None


def explain_around(model: nn.Module, inner: nn.Module, error: UnexpectedTensor) -> UnexpectedTensor:
    """Return the error with the policy to bind, where engines have no place for tensors of a model with LoRA that is
    around a policy: its names are those of the whole.

    Args:
        inner: the bound model without the wrappers that only hold it.
    """
    policy = policy_in(inner)
    path = next((path for path, module in model.named_modules() if module is policy), None)
    if policy is None or path is None:
        return error
    return error.amended(remedy=f"bind the policy inside, and push its tensors: b.bind(model.{path})")


def with_policy_below(known: CanonicalMap, prefix: str, beside: CanonicalMap | None) -> CanonicalMap | None:
    """Combine the names of a policy with those of what lies beside it. None when both have a checkpoint tensor of one
    name.

    Args:
        known: of the policy, baked as if it were the whole model.
        prefix: of its live names in the model around it, with the dot.
    """
    moved = replace(
        known,
        tensors=tuple(
            replace(t, pieces=tuple(replace(piece, live=prefix + piece.live) for piece in t.pieces))
            for t in known.tensors
        ),
        live={prefix + name: tensor for name, tensor in known.live.items()},
        ties={prefix + alias: prefix + name for alias, name in known.ties.items()},
        raw={raw: prefix + clean for raw, clean in known.raw.items()},
        ignored=frozenset(prefix + name for name in known.ignored),
        prefixes=(prefix, *(prefix + inner for inner in known.prefixes), *known.prefixes),
    )
    if beside is None:
        return moved
    if not beside.by_name.keys().isdisjoint(moved.by_name):
        return None
    return replace(
        moved,
        tensors=(*moved.tensors, *beside.tensors),
        live={**moved.live, **beside.live},
        ties={**moved.ties, **beside.ties},
        raw={**moved.raw, **beside.raw},
        ignored=moved.ignored | beside.ignored,
        beside=frozenset(beside.by_name),
    )
