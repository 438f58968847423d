"""Show that a model's text logits do not depend on some of its tensors: those for which an engine has no place.

On a shielded copy, for three tokens, in two ways. Their gradient has to be None: nothing that is computed from them
reaches the logits, whatever their values. And the logits have to stay when they are replaced by values that spoil
whatever reads them: what only chooses (a router's correction) has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model import canary
from trainer_side.names.naming import TensorPlace
from trainer_side.reference import call_on_copy, forward_logits, quiet, vocabulary_size
from trainer_side.shielded.model_copy import ModelCopier

TOKENS = 3
_PLAIN = (torch.Tensor, nn.Parameter)


def find_dependent(model: nn.Module, places: Mapping[str, Sequence[TensorPlace]]) -> list[str]:
    """List the names on whose tensors, at these places of the model, its text logits depend, or may depend. Blocks for
    a few short forwards; the model stays as it was.

    Raises ConfigError where the model has no forward that can be called, as `reference_logprobs`.
    """
    rows = canary.prompts(vocabulary_size(model), TOKENS)[:1]

    def examine(double: nn.Module, copying: ModelCopier) -> list[str]:
        # what was not copied lies outside of what answers: nothing in the copy refers to it
        own = {name: [t for p in at if (t := _double(p, copying)) is not None] for name, at in places.items()}
        odd = [name for name, doubles in own.items() if not all(type(t) in _PLAIN for t in doubles)]
        plain = {name: doubles for name, doubles in own.items() if name not in odd}
        with quiet(double):
            felt = _with_gradient(double, rows, plain)
            rest = [tensor for name, doubles in plain.items() if name not in felt for tensor in doubles]
            return [*odd, *(felt if _stays_without(double, rows, rest) else plain)]

    found = set(call_on_copy(model, rows, examine))
    return [name for name in places if name in found]


def _double(place: TensorPlace, copying: ModelCopier) -> torch.Tensor | None:
    """The copy's tensor at a place; a shared one becomes a tensor object of its own, over the same storage."""
    module: nn.Module | None = copying.double_of(place.module)
    if module is None:
        return None
    tensor = module._parameters.get(place.name)
    if tensor is not None and place.shared:
        tensor = module._parameters[place.name] = nn.Parameter(tensor.detach(), requires_grad=False)
    return module._buffers.get(place.name) if tensor is None else tensor


def _with_gradient(
    model: nn.Module, rows: Sequence[Sequence[int]], tensors: Mapping[str, Sequence[torch.Tensor]]
) -> list[str]:
    """List the names of which some tensor has a gradient in the logits of a copy."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    floats = [(name, t) for name, doubles in tensors.items() for t in doubles if t.is_floating_point()]
    try:
        for _, tensor in floats:
            tensor.requires_grad_(True)
    except RuntimeError as error:  # made under inference_mode
        raise ConfigError(
            "tensors of the bound model cannot have a gradient, so that nothing can be shown of them",
            where=floats[0][0],
            expected="parameters that were made outside of torch.inference_mode",
            got=str(error),
            remedy="load the model outside of inference_mode and bind it",
        ) from error
    with torch.enable_grad():
        logits = forward_logits(model, rows)
    if not (floats and logits.requires_grad):
        return []
    gradients = torch.autograd.grad(logits.float().sum(), [tensor for _, tensor in floats], allow_unused=True)
    found = {name for (name, _), gradient in zip(floats, gradients, strict=True) if gradient is not None}
    return [name for name in tensors if name in found]


def _stays_without(model: nn.Module, rows: Sequence[Sequence[int]], tensors: Sequence[torch.Tensor]) -> bool:
    """True when the logits of a copy are the same after its tensors were spoiled; it cannot be used for more then."""
    if not tensors:
        return True
    with torch.no_grad():
        clean, again = forward_logits(model, rows), forward_logits(model, rows)
        for tensor in tensors:
            tensor.data = _spoiled(tensor)
        try:
            spoiled = forward_logits(model, rows)
        except ConfigError:  # it stumbled over them
            return False
        noise = (clean - again).abs().max()  # of kernels that add in any order
        return bool(torch.equal(spoiled, clean) or (spoiled - clean).abs().max() <= noise)


def _spoiled(tensor: torch.Tensor) -> torch.Tensor:
    """Other values in the same shape; of floats they take no memory."""
    if not tensor.is_floating_point():
        return torch.bitwise_not(tensor.detach())
    return torch.full((), float("nan"), device=tensor.device).to(tensor.dtype).expand(tensor.shape)
