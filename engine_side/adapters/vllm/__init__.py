"""vLLM behind the adapter protocol. Nothing here is imported before vLLM itself is, and vLLM imports only `plugin`.

`plugin` registers the weight-transfer backend "bridge" (`transfer`) and the worker method `bridge_run` (`extension`) in
each of vLLM's processes. `driver` speaks for a `vllm.LLM` of this process (`gate` stands in front of its engine);
`host` is the half in each worker, with `logprobs` and `loras` for what needs vLLM's model runner.
"""
