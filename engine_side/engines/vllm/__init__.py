"""vLLM behind the adapter protocol. Nothing here is imported before vLLM itself is, and vLLM imports only `plugin`.

`plugin` registers the weight-transfer backend "bridge" (`transfer`) and the worker methods (`extension`) in each of
vLLM's processes. In each worker `host` is the rank half; `logprobs` and `loras` hold what needs vLLM's model runner.

Three doors, with what they share in `facts` and `common`:
- `driver` speaks for a `vllm.LLM` of this process; `gate` stands in front of its engine;
- `hosted` starts an AsyncLLM of our own, on an event loop of its own;
- `server` recognises a `vllm serve` at an address.
The last two are one adapter (`remote`) over two `lines`: the event loop, or the server's endpoints. In front of an
AsyncLLM, in its process, stands `front`, which `plugin` puts there; `front_messages` is what they say to each other.
"""
