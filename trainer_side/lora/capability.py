"""The capability table: which features each mode can carry. Every refusal comes from a row; the README prints it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from bridge.errors import UnsupportedLora


class Feature(Enum):
    """A property of a layer, or of the model, that decides which modes can carry it."""

    PLAIN = "Linear, Conv1D, rsLoRA, patterns, `set_scale`"
    SEVERAL = "several active adapters, plain"
    EMBEDDING = "Embedding LoRA"
    LORA_BIAS = "`lora_bias`, base has a bias"
    LORA_BIAS_ALONE = "`lora_bias`, base has no bias"
    DORA = "DoRA"
    EXPANDED = "KaSA, BD-LoRA"
    CHANGED_BASE = "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA"
    PER_TOKEN = "aLoRA, Arrow"
    EXPERTS = "expert parameters (3-D)"
    AMBIGUOUS = "expert parameters, layout of lora_B not known"
    NO_ROWS = "a weight that the checkpoint stores in another shape"
    BASE_TRAINED = '`bias="all"/"lora_only"`, trained base tensors'
    SAVED = "`modules_to_save`"
    TOKENS = "trainable tokens"
    TIED = "LoRA on one tied end"
    MERGED = "adapters merged in place"
    MERGED_DISABLED = "adapters merged, then disabled"
    DISABLED = "adapters disabled"
    INACTIVE = "no adapter active"
    QUANTISED = "quantised base"
    CONVOLUTION = "ConvNd, groups = 1"
    NO_SINGLE_WEIGHT = "convolution with groups or padding mode"
    ATTENTION = "`nn.MultiheadAttention`"
    SHARDED = "sharded, empty or meta tensor"
    UNKNOWN = "unknown variant or tuner, uncovered trainable"
    UNREADABLE = "a layer whose effective weight cannot be read"
    RANK = "rank above the engines' maximum, or engine without LoRA"


MODES = ("base", "merged", "adapter")


@dataclass(frozen=True)
class Capability:
    """One cell of the table: a mode carries a feature, or does not; `text` tells how, or why not."""

    ok: bool
    text: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in ("yes" if self.ok else "refused", self.text) if part)


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    feature: Feature
    base: Capability
    merged: Capability
    adapter: Capability

    def of_mode(self, mode: str) -> Capability:
        """Return the cell of one of MODES."""
        return {"base": self.base, "merged": self.merged, "adapter": self.adapter}[mode]


def _yes(text: str = "") -> Capability:
    return Capability(True, text)


def _no(text: str) -> Capability:
    return Capability(False, text)


TABLE: tuple[Row, ...] = (
    Row(Feature.PLAIN, _yes(), _yes(), _yes("scaling folded into B")),
    Row(Feature.SEVERAL, _yes(), _yes(), _yes("concatenated along the rank")),
    Row(Feature.EMBEDDING, _yes(), _yes(), _yes("if the engine wraps its embedding")),
    Row(Feature.LORA_BIAS, _yes(), _yes("`b + s l`"), _no("the base bias is not sent in adapter mode")),
    Row(
        Feature.LORA_BIAS_ALONE,
        _yes(),
        _no("the layer has no bias to carry lora_bias"),
        _no("the layer has no bias to carry lora_bias"),
    ),
    Row(Feature.DORA, _yes(), _yes(), _no("the magnitude has no adapter form")),
    Row(Feature.EXPANDED, _yes("the base as KaSA left it"), _yes(), _yes("as plain LoRA, after expansion")),
    Row(
        Feature.CHANGED_BASE,
        _yes("the changed base"),
        _yes(),
        _yes("once the engine's base is bit for bit the trainer's: push it with mode=\"base\" first"),
    ),
    Row(Feature.PER_TOKEN, _yes(), _no("its delta depends on the token"), _no("engines do not support it")),
    Row(Feature.EXPERTS, _yes(), _yes(), _yes("a pair per expert")),
    Row(Feature.AMBIGUOUS, _yes(), _no("the lora_B layout is ambiguous"), _no("the lora_B layout is ambiguous")),
    Row(Feature.NO_ROWS, _yes(), _yes(), _no("the checkpoint tensor is no block of rows of the live weight")),
    Row(Feature.BASE_TRAINED, _yes("they are base tensors"), _yes(), _no("trainable outside LoRA")),
    Row(
        Feature.SAVED,
        _no("trainable outside LoRA"),
        _yes("the copy, under its plain name"),
        _no("trainable outside LoRA"),
    ),
    Row(Feature.TOKENS, _no("trainable outside LoRA"), _yes("rows replaced"), _no("trainable outside LoRA")),
    Row(
        Feature.TIED,
        _yes(),
        _yes("as two tensors, if the engine can untie its ends"),
        _yes("if the engine wraps that end"),
    ),
    Row(Feature.MERGED, _no("the base holds merged adapters"), _yes("as is"), _no("the delta would apply twice")),
    Row(
        Feature.MERGED_DISABLED,
        _no("the base holds merged adapters"),
        _yes("plain LoRA only: the delta is taken off again, inexact"),
        _no("no active adapter"),
    ),
    Row(Feature.DISABLED, _yes(), _yes("base values, noted"), _no("no active adapter")),
    Row(Feature.INACTIVE, _yes(), _yes("base values, noted"), _no("no active adapter")),
    Row(
        Feature.QUANTISED,
        _no("packed weights are no checkpoint tensors"),
        _yes("dequantised, if that can be done"),
        _yes(),
    ),
    Row(Feature.CONVOLUTION, _yes(), _yes(), _no("engines take adapters of linear layers and embeddings")),
    Row(Feature.NO_SINGLE_WEIGHT, _yes(), _no("there is no single weight"), _no("there is no single weight")),
    Row(
        Feature.ATTENTION,
        _yes(),
        _yes("as its forward: `W + 2 delta` on out_proj"),
        _no("in_proj LoRA is not supported"),
    ),
    Row(
        Feature.SHARDED,
        _yes("if the base's own tensors are there"),
        _no("its values are not here"),
        _no("its values are not here"),
    ),
    Row(
        Feature.UNKNOWN,
        _no("nothing here knows what it computes"),
        _no("nothing here knows what it computes"),
        _no("nothing here knows what it computes"),
    ),
    Row(Feature.UNREADABLE, _yes(), _no("no single weight does what its forward does"), _no("not as plain A and B")),
    Row(Feature.RANK, _yes(), _yes(), _no("the engines cannot hold it")),
)
_ROWS: Mapping[Feature, Row] = {row.feature: row for row in TABLE}


@dataclass(frozen=True)
class Finding:
    """A feature found at one place.

    Attributes:
        where: the module's path in the base model; "" for the model.
        names: the tensors concerned, as `named_parameters` gives them.
        reason: details of this place, for the row's reason.
        subject: the part of the layer concerned, where the row names several.
        way_out: a remedy besides another mode.
    """

    feature: Feature
    where: str = ""
    names: tuple[str, ...] = ()
    reason: str = ""
    subject: str = ""
    way_out: str = ""

    def reason_against(self, mode: str) -> str | None:
        """Explain why this mode cannot carry it; None when it can."""
        cell = _ROWS[self.feature].of_mode(mode)
        if cell.ok:
            return None
        return f"{cell.text} ({self.reason})" if self.reason else cell.text

    @property
    def name(self) -> str:
        """The subject of a sentence about it."""
        return self.subject or _SUBJECTS.get(self.feature) or self.feature.value.replace("`", "")


_SUBJECTS: Mapping[Feature, str] = {
    Feature.PER_TOKEN: "a variant that acts on some tokens",
    Feature.LORA_BIAS: "lora_bias",
    Feature.LORA_BIAS_ALONE: "lora_bias",
    Feature.BASE_TRAINED: "a base tensor that is trained",
    Feature.SHARDED: "an adapter whose tensors are sharded, empty or on the meta device",
    Feature.AMBIGUOUS: "an adapter of expert parameters",
    Feature.NO_ROWS: "an adapter of this weight",
    Feature.UNKNOWN: "something that is not known here",
    Feature.UNREADABLE: "this layer",
    Feature.NO_SINGLE_WEIGHT: "LoRA on a convolution",
    Feature.MERGED: "a layer with merged adapters",
    Feature.MERGED_DISABLED: "a layer with merged, disabled adapters",
    Feature.DISABLED: "a disabled adapter",
    Feature.INACTIVE: "an adapter that is not active",
    Feature.QUANTISED: "a quantised base",
    Feature.RANK: "this adapter",
}
"""Subjects of sentences about one thing, where the table's row names several."""


def refused_by(mode: str, findings: Sequence[Finding]) -> list[Finding]:
    """List the findings that a mode cannot carry."""
    return [finding for finding in findings if finding.reason_against(mode) is not None]


def refusal_error(
    findings: Sequence[Finding], mode: str, other: Callable[[str], Sequence[Finding]], also: str = ""
) -> UnsupportedLora:
    """Build the error for what `mode` cannot carry, with all names and the mode that can.

    Args:
        findings: at least one of them refused by `mode`.
        other: returns what was found for another mode.
        also: another failure to report.
    """
    bad = refused_by(mode, findings)
    first = bad[0]
    places = list(dict.fromkeys(f.where or "the model" for f in bad))
    reasons = dict.fromkeys(f"{f.name}: {f.reason_against(mode)}" for f in bad)
    ways = list(dict.fromkeys(finding.way_out for finding in bad if finding.way_out))
    able = [m for m in ("merged", "base", "adapter") if m != mode and not refused_by(m, other(m))]
    if able:
        ways.append("use " + " or ".join(f'mode="{m}"' for m in able))
    elif not ways:
        ways.append("no mode can carry this: remove the module from the adapter, or unload it")
    where = first.where or (first.names[0] if first.names else "the model")
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return UnsupportedLora(
        f"{where}: {first.name} cannot be pushed in {mode} mode: {first.reason_against(mode)}{more}",
        where=", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else ""),
        expected=f"what the {mode} column of the capability table allows",
        got="; ".join(filter(None, (*reasons, also))),
        remedy=", or ".join(ways),
        names=tuple(dict.fromkeys(name for finding in bad for name in (finding.names or (finding.where,)))),
    )


def capability_table() -> str:
    """Format the table as Markdown, for the README."""
    lines = ["| feature | " + " | ".join(MODES) + " |", "|---|---|---|---|"]
    lines += [f"| {row.feature.value} | " + " | ".join(str(row.of_mode(m)) for m in MODES) + " |" for row in TABLE]
    return "\n".join(lines) + "\n"
