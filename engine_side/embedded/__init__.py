"""The default engine: a small, honest likeness of vLLM. Torch only; families by `config.json`."""
