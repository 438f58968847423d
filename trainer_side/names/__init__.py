"""Names: turn live names into canonical names, resolve ties, check tensors."""
