"""The rows of the capability table, and findings: which of them were found where. Every refusal comes from a row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from bridge.errors import UnsupportedLora

MODES = ("base", "merged", "adapter")

_NO_BIAS = "refused: the layer has no bias to carry lora_bias"
_BIAS_STAYS = "refused: the base bias is not sent in adapter mode"
_AMBIGUOUS = "refused: the lora_B layout is ambiguous"
_OUTSIDE = "refused: trainable outside LoRA"
_NOT_HERE = "refused: its values are not here"
_UNKNOWN = "refused: nothing here knows what it computes"
_HOLDS_MERGED = "refused: the base holds merged adapters"
_NO_ADAPTER = "refused: no active adapter"
_NO_WEIGHT = "refused: there is no single weight"
_NO_BLOCK = "refused: the checkpoint tensor is no block of rows of the live weight"
_PACKED = "refused: packed weights are no checkpoint tensors"
_NO_IN_PROJ = "refused: in_proj LoRA is not supported"
_NO_EFFECTIVE = "refused: no single weight does what its forward does"
_NO_ROOM = "refused: the engines cannot hold it"
_ONCE_EQUAL = "yes: once the engine's base is bit for bit the trainer's: push it with mode=\"base\" first"
_UNTIED = "yes: as two tensors, if the engine can untie its ends"
_TAKEN_OFF = "yes: plain LoRA only: the delta is taken off again, inexact"


class Feature(Enum):
    """A property of a layer, or of the model, that decides which modes can carry it: one row of the table.

    Attributes:
        title: the row's first cell.
        cells: one for each of MODES, "yes" or "refused", and how or why.
    """

    PLAIN = "Linear, Conv1D, rsLoRA, patterns, `set_scale`", "yes", "yes", "yes: scaling folded into B"
    SEVERAL = "several active adapters, plain", "yes", "yes", "yes: concatenated along the rank"
    EMBEDDING = "Embedding LoRA", "yes", "yes", "yes: if the engine wraps its embedding"
    LORA_BIAS = "`lora_bias`, base has a bias", "yes", "yes: `b + s l`", _BIAS_STAYS
    LORA_BIAS_ALONE = "`lora_bias`, base has no bias", "yes", _NO_BIAS, _NO_BIAS
    DORA = "DoRA", "yes", "yes", "refused: the magnitude has no adapter form"
    EXPANDED = "KaSA, BD-LoRA", "yes: the base as KaSA left it", "yes", "yes: as plain LoRA, after expansion"
    CHANGED_BASE = "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA", "yes: the changed base", "yes", _ONCE_EQUAL
    PER_TOKEN = "aLoRA, Arrow", "yes", "refused: its delta depends on the token", "refused: engines do not support it"
    EXPERTS = "expert parameters (3-D)", "yes", "yes", "yes: a pair per expert"
    AMBIGUOUS = "expert parameters, layout of lora_B not known", "yes", _AMBIGUOUS, _AMBIGUOUS
    NO_ROWS = "a weight that the checkpoint stores in another shape", "yes", "yes", _NO_BLOCK
    BASE_TRAINED = '`bias="all"/"lora_only"`, trained base tensors', "yes: they are base tensors", "yes", _OUTSIDE
    SAVED = "`modules_to_save`", _OUTSIDE, "yes: the copy, under its plain name", _OUTSIDE
    TOKENS = "trainable tokens", _OUTSIDE, "yes: rows replaced", _OUTSIDE
    TIED = "LoRA on one tied end", "yes", _UNTIED, "yes: if the engine wraps that end"
    MERGED = "adapters merged in place", _HOLDS_MERGED, "yes: as is", "refused: the delta would apply twice"
    MERGED_DISABLED = "adapters merged, then disabled", _HOLDS_MERGED, _TAKEN_OFF, _NO_ADAPTER
    DISABLED = "adapters disabled", "yes", "yes: base values, noted", _NO_ADAPTER
    INACTIVE = "no adapter active", "yes", "yes: base values, noted", _NO_ADAPTER
    QUANTISED = "quantised base", _PACKED, "yes: dequantised, if that can be done", "yes"
    CONVOLUTION = "ConvNd, groups = 1", "yes", "yes", "refused: engines take adapters of linear layers and embeddings"
    NO_SINGLE_WEIGHT = "convolution with groups or padding mode", "yes", _NO_WEIGHT, _NO_WEIGHT
    ATTENTION = "`nn.MultiheadAttention`", "yes", "yes: as its forward: `W + 2 delta` on out_proj", _NO_IN_PROJ
    SHARDED = "sharded, empty or meta tensor", "yes: if the base's own tensors are there", _NOT_HERE, _NOT_HERE
    UNKNOWN = "unknown variant or tuner, uncovered trainable", _UNKNOWN, _UNKNOWN, _UNKNOWN
    UNREADABLE = "a layer whose effective weight cannot be read", "yes", _NO_EFFECTIVE, "refused: not as plain A and B"
    NO_VALUES = "a packed or fp8 base whose values cannot be read", "yes", _NO_EFFECTIVE, "yes"
    RANK = "rank above the engines' maximum, or engine without LoRA", "yes", "yes", _NO_ROOM

    def __init__(self, title: str, *cells: str) -> None:
        self.title = title
        self.cells = dict(zip(MODES, cells, strict=True))

    def reason_against(self, mode: str) -> str | None:
        """Return why one of MODES cannot carry it; None when it can."""
        verdict, _, why = self.cells[mode].partition(": ")
        return why if verdict == "refused" else None


@dataclass(frozen=True)
class Finding:
    """A feature found at one place.

    Attributes:
        where: the module's path in the base model; "" for the model.
        names: the tensors concerned, as `named_parameters` gives them.
        reason: details of this place, for the row's reason.
        subject: the part of the layer concerned, where the row's title does not make the subject of a sentence.
        way_out: a remedy besides another mode.
        modes: those of MODES that the remedy may name; the others need the same values.
    """

    feature: Feature
    where: str = ""
    names: tuple[str, ...] = ()
    reason: str = ""
    subject: str = ""
    way_out: str = ""
    modes: tuple[str, ...] = MODES

    def reason_against(self, mode: str) -> str | None:
        """Explain why this mode cannot carry it; None when it can."""
        why = self.feature.reason_against(mode)
        return why if why is None or not self.reason else f"{why} ({self.reason})"

    @property
    def name(self) -> str:
        """The subject of a sentence about it."""
        return self.subject or self.feature.title.replace("`", "")

    def error(self, where: str) -> UnsupportedLora:
        """Build the error of a single layer whose effective tensors were asked for; `where` names the layer."""
        able = " or ".join(f"mode={mode!r}" for mode in self.modes if self.feature.reason_against(mode) is None)
        ways = (self.way_out.capitalize(), able and f"use {able}")
        return UnsupportedLora(
            f"{self.name} cannot be pushed in merged mode: {self.reason_against('merged')}",
            where=where,
            expected="a layer whose forward computes with one weight that can be read",
            got=self.reason,
            remedy=", or ".join(filter(None, ways))
            or "merge the adapter into the model (merge_and_unload) and bind that",
            names=(where,),
        )
