"""The trainer's side: a framework's model -> named canonical tensors in the arena."""
