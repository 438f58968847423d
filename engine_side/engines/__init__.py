"""Engines behind one protocol: embedded, any torch module, vLLM, SGLang; `registry` finds the right one."""
