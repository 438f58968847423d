"""LoRA in the embedded engine: wrappers around its layers, slots for several LoRAs, one choice per token."""

from engine_side.embedded.lora.context import NO_LORA, LoraContext
from engine_side.embedded.lora.layers import BaseLayerWithLoRA, wrap, wrapper_of
from engine_side.embedded.lora.manager import LoraManager, warm_up_rank

__all__ = [
    "NO_LORA",
    "BaseLayerWithLoRA",
    "LoraContext",
    "LoraManager",
    "warm_up_rank",
    "wrap",
    "wrapper_of",
]
