"""Refuse what a mode cannot carry, with all names and the modes that can; print the capability table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge.errors import UnsupportedLora
from trainer_side.lora.layers.features import MODES, Feature, Finding


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
        ways.append(
            "no mode can carry this: merge the adapter into the model (merge_and_unload) and bind that, or remove the "
            "module from the adapter"
        )
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
    """Format the table as Markdown, for the documentation."""
    lines = [f"| feature | {' | '.join(MODES)} |", "|---|---|---|---|"]
    lines += [f"| {feature.title} | {' | '.join(feature.cells.values())} |" for feature in Feature]
    return "\n".join(lines) + "\n"
