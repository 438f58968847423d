"""SGLang behind the adapter protocol. Nothing here imports SGLang before SGLang itself is there.

In every scheduler `plugin` hooks `check_weights`, through which jobs come to each rank (`scheduler`, over `host`,
`logprobs` and `loras`). In the process where requests come in stands `front`: on the tokenizer manager, with a `gate`
that every request passes; the same hook there leads to it.

Three doors, one adapter (`remote`, over what `common` has) and two lines:
- `driver` speaks for a `sglang.Engine` of this process, over its event loop, which `line` keeps running and to which
  `relay` takes what users await in others;
- `hosted` starts such an Engine and ends it;
- `server` recognises a running server at an address, and speaks through its endpoints.
`load` is what users name when they start an engine or a server of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LOADER = "engine_side.engines.sglang.load"
"""What users write: `sglang.Engine(..., custom_weight_loader=["engine_side.engines.sglang.load"])`."""


def load(model: Any, named_tensors: Iterable[tuple[str, Any]]) -> None:
    """Naming this loader opens an engine to the bridge. SGLang's own update calls with it are refused before they get
    here (`scheduler.refuse_update`): an update that the bridge does not verify is none of its. Raises RuntimeError."""
    raise RuntimeError(f"{LOADER} is driven by bridge.attach(engine).push(...), not by update calls")
