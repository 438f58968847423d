"""The verification levels of a push, and the words of `verify=` that stand for several of them."""

from __future__ import annotations

from collections.abc import Mapping

WEIGHT_LEVELS = ("transfer", "coverage", "attributes", "read-back", "probe", "change")
"""Levels that compare an engine's weights, bit by bit where they can be compared so, with the trainer's."""
RANK_LEVELS = WEIGHT_LEVELS[1:]
"""Levels that one rank decides alone, in the order in which they run."""
LEVELS = (*WEIGHT_LEVELS, "canary", "cache")
"""All levels, in the order in which they run."""
LORA_LEVELS = frozenset({"transfer", "coverage", "read-back"})
"""Levels that show that a LoRA is the trainer's: its slots are read back whole, and hold nothing packed to probe."""
LEVELS_OF: Mapping[str, tuple[str, ...]] = {
    "off": (),
    "transfer": ("transfer",),
    "weights": WEIGHT_LEVELS,
    "outputs": LEVELS,
}
"""Word of `verify=` -> its levels."""
