"""Read a LoRA layer: its tensors, adapters and state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bridge.errors import ConfigError
from trainer_side.lora.layers.dequant import quant_state
from trainer_side.lora.layers.values import LayerState, LoraParameters
from trainer_side.lora.layers.wrapper_chain import Chain, read_chain

PACKED = ("qweight", "W_q", "codes")
"""Where layers keep a packed weight that have no `weight`."""
_SEVERITY = (LayerState.MERGED_DISABLED, LayerState.ACTIVE, LayerState.MERGED, LayerState.DISABLED)
"""Of a layer whose wrappers are in different states the first: what acts counts before what does not."""


def lora_parameters(module: nn.Module) -> LoraParameters:
    """Read the tensors, adapters and state of a layer: the same fields in every state, always with the bias.

    Takes any wrapper of a layer (LoRA of one to several levels, expert parameters, `modules_to_save`, trainable
    tokens, also inside torch.compile or checkpointing), Unsloth's fake layers, and plain layers. The tensors are the
    live ones. Reads attributes only, changes nothing, calls no forward, does not block.

    Raises ConfigError for a module without a weight, UnsupportedLora for a tuner that is no LoRA.
    """
    return parameters_of(read_chain(module), type(module).__name__)


def parameters_of(chain: Chain, where: str) -> LoraParameters:
    """Build the `LoraParameters` of a layer whose wrappers were read; `where` names it in messages."""
    attribute = chain.attribute
    levels = chain.on(attribute)
    weight = require_stored(chain, attribute, where)
    acting = tuple(a for level in levels if level.state is LayerState.ACTIVE for a in level.loras)
    first = acting[0] if acting else None
    kind = kind_of(chain, attribute, weight)
    states = {level.state for level in levels}
    return LoraParameters(
        weight=weight,
        quant_state=quant_state(chain.base, weight),
        A=first.a if first else None,
        B=first.b if first else None,
        scaling=first.scaling if first else None,
        bias=stored_bias(chain.base, attribute),
        loras=acting,
        state=next((state for state in _SEVERITY if state in states), chain.saved or LayerState.PLAIN),
        kind=kind,
        transposed=kind == "linear" and is_transposed(chain, weight),
        merged=tuple(dict.fromkeys(name for level in levels for name in level.setting.merged)),
        owned=tuple(dict.fromkeys((*(name for level in levels for name in level.owned), *chain.copies))),
        rows=tuple(row for level in levels if level.state is LayerState.ACTIVE for row in level.rows()),
    )


def stored(base: Any, attribute: str) -> torch.Tensor | None:
    """Return a parameter of a base layer as it is stored, packed or not; None where there is none.

    A layer whose `weight` is empty keeps its values elsewhere, if it keeps any.
    """
    names = (attribute, *PACKED) if attribute == "weight" else (attribute,)
    found = [tensor for name in names if isinstance(tensor := getattr(base, name, None), torch.Tensor)]
    return next((tensor for tensor in found if tensor.numel()), found[0] if found else None)


def require_stored(chain: Chain, attribute: str, where: str) -> torch.Tensor:
    """Return a parameter of a layer's base. Raises ConfigError when it has none; `where` names the layer."""
    weight = stored(chain.base, attribute)
    if weight is None:
        raise ConfigError(
            f"this module has no {attribute}",
            where=where,
            expected=f"a layer with a parameter `{attribute}`, or a LoRA wrapper around one",
            got=type(chain.base).__name__,
            remedy="ask for the layers inside it",
        )
    return weight


def stored_bias(base: Any, attribute: str = "weight") -> torch.Tensor | None:
    """Return the bias that belongs to a parameter of a base layer."""
    found = getattr(base, "in_proj_bias" if attribute == "in_proj_weight" else "bias", None)
    return found if isinstance(found, torch.Tensor) else None


def kind_of(chain: Chain, attribute: str, weight: torch.Tensor) -> str:
    """Return the kind of a layer (see `LoraParameters.kind`) by the shape of its adapters, else by the layer itself."""
    if any(level.of_parameter and level.attribute == attribute for level in chain.levels):
        return "parameter"
    if attribute == "in_proj_weight":
        return "attention"
    if isinstance(getattr(chain.base, "num_embeddings", None), int):
        return "embedding"
    if attribute != "weight":
        return "other"
    for level in chain.levels:
        if len(getattr(level.wrapper, "lora_embedding_A", None) or ()):
            return "embedding"
    if hasattr(chain.base, "kernel_size"):
        return "conv"
    return "linear" if weight.dim() == 2 else "other"


def is_transposed(chain: Chain, weight: torch.Tensor) -> bool:
    """Tell whether a linear layer's weight is stored (in, out)."""
    for level in chain.levels:
        if not level.tokens and not level.of_parameter:
            return bool(getattr(level.wrapper, "fan_in_fan_out", False))
    # transformers' Conv1D has the number of outputs in `nf`, and keeps them last.
    return getattr(chain.base, "nf", None) == weight.shape[-1] and not hasattr(chain.base, "out_features")
