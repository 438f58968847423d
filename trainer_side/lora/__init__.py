"""LoRA in a push: the reader of a layer, the tensors of each mode, and the table of features that each can carry."""

from trainer_side.lora.export import adapter_tensors, base_tensors, merged_tensors
from trainer_side.lora.layers.read import lora_parameters
from trainer_side.lora.model import LoraModel, ModeView

__all__ = [
    "LoraModel",
    "ModeView",
    "adapter_tensors",
    "base_tensors",
    "lora_parameters",
    "merged_tensors",
]
