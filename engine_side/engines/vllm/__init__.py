"""The vLLM engine. Nothing here is imported before vLLM itself is, and vLLM imports only `plugin`.

`plugin` registers the weight-transfer backend "bridge" (`transfer`) and worker methods in each of vLLM's processes. In
each worker `host` is the rank host; `logprobs` and `lora_slots` hold what needs vLLM's model runner.

Three ways to an engine, with what they share in `facts` and `common`:
- `driver` drives a `vllm.LLM` of this process; `gate` hangs on its engine; `liveness` ends calls of a dead core;
- `hosted` starts an AsyncLLM of our own, on an event loop of its own;
- `server` recognises a `vllm serve` at an address.
The last two are one driver (`remote`) over two channels: the event loop, or the server's endpoints. An AsyncLLM has a
`frontend` in its own process, which `plugin` puts there.
"""
