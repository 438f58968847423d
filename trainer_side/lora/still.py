"""May the live model be run once for the canary? Only where a forward moves no bytes (lora.md 0, 5).

What a forward of PEFT's own may touch is bookkeeping: around expert parameters it registers a parametrization and
removes it again, which puts the very same Parameter back (its bytes, flags, identity and order as before) but may raise
its `_version`, as every forward of that model does. `verify="weights"` runs no forward at all.
"""

from __future__ import annotations

from torch import nn

from bridge.errors import ConfigError, UnsupportedLora
from trainer_side.lora.reader import lora_parameters
from trainer_side.lora.values import State
from trainer_side.naming import BASE_HOP


def require_still_forward(model: nn.Module) -> None:
    """Raises ConfigError, naming the layer, when a forward of this model would rewrite its own weights."""
    for path, module in model.named_modules():
        reason = _moves(module) if BASE_HOP in module._modules else None
        if reason is not None:
            raise ConfigError(
                "a forward of this model would write to its weights, so it gives no canary",
                where=path,
                expected="a forward that moves nothing",
                got=reason,
                remedy="push with verify='weights': read-back and probes need no forward of the trainer",
            )


def _moves(module: nn.Module) -> str | None:
    try:
        found = lora_parameters(module)
    except (ConfigError, UnsupportedLora):
        return None  # no LoRA layer; what it is has been refused or found harmless when the mode was chosen
    if found.state is State.MERGED_DISABLED:
        return "adapters merged and disabled: PEFT unmerges them in the next forward"
    if found.kind == "attention":
        return "PEFT's attention wrapper merges and unmerges in every forward"
    return None
