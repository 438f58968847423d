"""One LoRA layer at a time: find it, read it, compute its effective weight."""
