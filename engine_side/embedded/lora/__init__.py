"""LoRA in the embedded engine: wrappers around its layers, slots for several LoRAs, one choice per token."""
