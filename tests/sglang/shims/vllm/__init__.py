"""Stands where SGLang on CPU looks for vLLM's kernels: only `_custom_ops.rotary_embedding` is asked for."""
