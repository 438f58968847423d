"""Untying: a head that shared the embedding's Parameter gets one of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from engine_side.embedded.config import ModelConfig
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.layers import ParallelLMHead
from engine_side.embedded.wrappers import WrappedLayer, unwrap


@torch.no_grad()
def untie(model: CausalLM, names: Sequence[str]) -> ModelConfig | None:
    """Give these checkpoint names tensors of their own in the live `model`, values and layout as they are.

    Returns the configuration of the untied model, from which skeletons are built; None, and nothing is changed, when a
    name is neither an end of the tie nor a parameter that has its storage for itself.
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
        head.untie_weights()
        for module in model.lm_head.modules():  # the wrappers down to the layer
            if isinstance(module, WrappedLayer):
                module.mirror()
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return model.config


def _shared(model: CausalLM, param: nn.Parameter) -> bool:
    """Tell if layers other than the wrappers around one layer hold this Parameter."""
    owners = {id(unwrap(module)) for module in model.modules() if any(p is param for p in module._parameters.values())}
    return len(owners) > 1
