"""Untying: a head that shared the embedding's Parameter gets one of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from engine_side.embedded.config import ModelConfig
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.layers import ParallelLMHead
from engine_side.embedded.weights import parameter
from engine_side.embedded.wrappers import WrappedLayer, unwrap


def untie(model: CausalLM, names: Sequence[str]) -> ModelConfig | None:
    """Make every one of these checkpoint names a tensor of its own in the live `model`, values and layout as they are.

    The configuration of the untied model, from which skeletons are built; None, and nothing is touched, when a name is
    neither an end of the tie nor a parameter that has its storage for itself.
    """
    head, embedding = unwrap(model.lm_head), unwrap(model.model.embed_tokens)
    if not isinstance(head, ParallelLMHead):
        return None
    held = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        param = held.get(model.resolve(name)[0])
        if param is None or (_shared(model, param) and param is not embedding.weight):
            return None
    if head.tied:
        _give_own_weight(model.lm_head, head)
        model.config = dataclasses.replace(model.config, tied=False)
    return model.config


def _shared(model: CausalLM, param: nn.Parameter) -> bool:
    """Do layers other than the wrappers around one layer hold this Parameter?"""
    owners = {id(unwrap(module)) for module in model.modules() if any(p is param for p in module._parameters.values())}
    return len(owners) > 1


@torch.no_grad()
def _give_own_weight(outermost: nn.Module, head: ParallelLMHead) -> None:
    """Clone the shared weight, which every layout leaves canonical, and bring it into the head's own layout."""
    shared = head.weight
    fresh = parameter(
        tuple(shared.shape), shared.dtype, head.weight_loader,
        input_dim=1, output_dim=0, tp_rank=head.tp.rank, tp_size=head.tp.size,
    )  # fmt: skip
    fresh.data = shared.detach().clone()
    head.weight = fresh
    head.tied = False
    head.quant_method.process_weights_after_loading(head)
    _mirror(outermost)


def _mirror(module: nn.Module) -> None:
    """Have every wrapper down to the layer show the layer's new Parameter."""
    while isinstance(inner := module._modules.get("base_layer"), nn.Module):
        if isinstance(module, WrappedLayer):
            module.mirror()
        module = inner
