"""Verification levels: their names, their order, and the sets that one word of `verify=` stands for."""

from __future__ import annotations

from collections.abc import Mapping

LEVELS = ("transfer", "coverage", "attributes", "read-back", "probe", "change", "canary", "cache")
"""All levels, in the order in which they run."""
WEIGHT_LEVELS = ("transfer", "coverage", "attributes", "read-back", "probe", "change")
"""Levels that look at weights, not at outputs."""
LORA_LEVELS = frozenset({"transfer", "coverage", "read-back"})
"""Levels that prove a LoRA adapter: its slots are read back whole, and there is nothing packed to probe."""
LEVELS_OF: Mapping[str, tuple[str, ...]] = {
    "off": (),
    "transfer": ("transfer",),
    "weights": WEIGHT_LEVELS,
    "outputs": (*WEIGHT_LEVELS, "canary", "cache"),
}
"""Word of `Bridge.push(verify=...)` -> the levels that it asks for."""
