"""Render the results of commands for people, as text and tables. Pure but for the console it prints to; rich on use.

Every `show_*` takes a rich Console and the same plain payload that `--json` prints.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from bridge.errors import BridgeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Payload = Mapping[str, Any]
STATUS_STYLE = {"healthy": "green", "degraded": "yellow", "unhealthy": "bold red"}
GOOD_STATES = ("SERVING",)
MARKS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def console(stream: TextIO) -> Console:
    """Make a console on `stream`; lines stay as long as they are where it has no width (a pipe, a file)."""
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 200)


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Show a spinner on stderr during a long call; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True, markup=False).status(text):
        yield


def error_block(error: BridgeError) -> str:
    """Lay an error out as a block of lines: what, then where, expected, got and remedy, as far as they are known."""
    lines = [f"error: {type(error).__name__}: {error.what}"]
    for label, value in error.facts().items():
        first, *more = str(value).splitlines() or [""]
        lines += [f"  {label:<9} {first}", *(f"  {'':<9} {line}" for line in more)]
    if len(error.names) > 1:
        more_names = f" and {len(error.names) - 8} more" if len(error.names) > 8 else ""
        lines.append(f"  {'names':<9} {', '.join(error.names[:8])}{more_names}")
    return "\n".join(lines) + "\n"


# ---- one function per result -----------------------------------------------------------------------------------------


def show_health(out: Console, report: Payload) -> None:
    """Print one line per check, never wrapped, then the status of the run."""
    from rich.text import Text

    for check in report["checks"]:
        mark = "FAIL" if not check["ok"] else "warn" if check["degraded"] else "ok"
        line = Text(f"{mark:<4}  ", style=MARKS[mark])
        line.append(check["name"], style="bold")
        line.append(f"  got: {check['got']}  expected: {check['expected']}", style="default")
        if check["remedy"]:
            line.append(f"  remedy: {check['remedy']}", style="cyan")
        out.print(line, soft_wrap=True)
    out.print(Text(f"{report['name']} is {report['status']}", style=STATUS_STYLE[report["status"]]))


def show_status(out: Console, status: Payload) -> None:
    """Print the served version of a daemon, then a table of its engines."""
    committed = status["committed"]
    busy = f", pushing version {status['busy']}" if status["busy"] is not None else ""
    out.print(
        f"{status['name']}: {'nothing pushed yet' if committed is None else _served(status)}{busy}"
        f" (highest issued {status['highest']}, pid {status['pid']} on {status['node']})",
        soft_wrap=True,
    )
    table = _table("engine", "kind", "ranks>", "state", "serves>", "adapter", "pid>", "node", "detail")
    for engine in status["engines"]:
        state = _styled(engine["state"], "green" if engine["state"] in GOOD_STATES else "bold red")
        serves = "nothing" if engine["serving"] is None else str(engine["serving"])
        _row(table, engine["id"], engine["kind"], engine["ranks"], state, serves, engine["adapter"] or "-",
             engine["pid"], engine["node"], engine["detail"])  # fmt: skip
    out.print(table)


def show_daemons(out: Console, listing: Payload) -> None:
    """Print a table of the daemons that run."""
    if not listing["daemons"]:
        out.print("no daemon runs")
        return
    table = _table("daemon", "version>", "mode", "engines>", "serving>", "note")
    for daemon in listing["daemons"]:
        if "error" in daemon:
            _row(table, daemon["name"], "?", "?", "?", "?", _styled(daemon["error"], "bold red"))
            continue
        serving = sum(engine["state"] in GOOD_STATES for engine in daemon["engines"])
        note = f"pushing version {daemon['busy']}" if daemon["busy"] is not None else ""
        version = "-" if daemon["committed"] is None else daemon["committed"]
        _row(table, daemon["name"], version, daemon["mode"] or "-", len(daemon["engines"]), serving, note)
    out.print(table)


def show_stopped(out: Console, payload: Payload) -> None:
    """Print that a daemon is stopped."""
    out.print(f"{payload['name']} is stopped", soft_wrap=True)


def show_receipt(out: Console, payload: Payload) -> None:
    """Print one push: its rate, its phases, each engine, and the notes."""
    receipt = payload["receipt"]
    seconds = sum(receipt["phases"].values())
    rate = receipt["nbytes"] / seconds / 1e9 if seconds else 0.0
    out.print(
        f"{payload['name']} serves version {receipt['version']} (mode {receipt['mode']}): {receipt['tensors']} tensors,"
        f" {_size(receipt['nbytes'])} in {_ms(seconds)} ({rate:.2f} GB/s), paused {_ms(receipt['pause_s'])},"
        f" verify={receipt['verify']}, verified={receipt['verified']}",
        soft_wrap=True,
    )
    table = _table(*(f"{name}>" for name in receipt["phases"]))
    _row(table, *(_ms(value) for value in receipt["phases"].values()))
    out.print(table)
    for engine in receipt["engines"]:
        lora = f", adapter {engine['adapter']}" if engine["adapter"] else ""
        what = f"{engine['state']}, version {engine['serving']}{lora}{_drift(engine)}"
        out.print(f"  {engine['id']}: {what}", soft_wrap=True)
    for note in receipt["notes"]:
        out.print(f"  note: {note}", soft_wrap=True)


def show_history(out: Console, payload: Payload) -> None:
    """Print a table of receipts, oldest first."""
    table = _table(
        "at", "version>", "mode", "adapter", "previous>", "tensors>", "size>", "sync>", "pause>", "verify", "verified",
        "drift>", "error",
    )  # fmt: skip
    for receipt in payload["receipts"]:
        drifts = [e["canary"]["mean_abs"] for e in receipt["engines"] if e["canary"] is not None]
        previous = "-" if receipt["previous"] is None else receipt["previous"]
        _row(
            table, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(receipt["at"])), receipt["version"],
            receipt["mode"], _loras(receipt), previous, receipt["tensors"], _size(receipt["nbytes"]),
            _ms(sum(receipt["phases"].values())), _ms(receipt["pause_s"]),
            receipt["verify"], _verified(receipt["verified"]), f"{max(drifts):.4f}" if drifts else "-",
            _styled(receipt["error"] or "", "bold red"),
        )  # fmt: skip
    out.print(table if payload["receipts"] else "nothing was pushed yet")


def show_explained(out: Console, payload: Payload) -> None:
    """Print a table of the destinations of one tensor."""
    rows: Sequence[Mapping[str, str]] = payload["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = _table(*columns)
    for row in rows:
        _row(table, *(row.get(column, "") for column in columns))
    out.print(payload["tensor"], soft_wrap=True)
    out.print(table)


def show_bench(out: Console, report: Payload) -> None:
    """Print a table of pushes and reference copies, then memory and cost per tensor of each measurement."""
    out.print(f"{_machine(report)}; {report['settings']['tunables']}", soft_wrap=True)
    table = _table(
        "shapes", "engine", "threads>", "variant", "median>", "p90>", "GB/s>", "of memcpy>", "target>", "pause>"
    )
    for result in report["results"]:
        lead = (result["shapes"], result["engine"], result["threads"])
        reference = result["reference"]
        _row(table, *lead, "memcpy, 1 thread", _ms(reference["median_s"]), _ms(reference["p90_s"]),
             f"{reference['gb_per_s']:.2f}", "1.00", "", "")  # fmt: skip
        for name, row in result["variants"].items():
            target = "" if row["target"] is None else f"{row['target']:.2f}"
            _row(table, "", "", "", name, _ms(row["median_s"]), _ms(row["p90_s"]), f"{row['gb_per_s']:.2f}",
                 f"{row['ratio']:.2f}", target, _ms(row["pause_s"]))  # fmt: skip
    out.print(table)
    for result in report["results"]:
        memory, reference = result["memory"], result["reference"]
        noisy = ""
        if result["noisy"]:
            noisy = f"; NOISY: the reference varied by {reference['spread']:.0%}"
            noisy += f", other processes took {result['others']:.1f} cores"
        out.print(
            f"{result['shapes']}, {result['engine']}, {result['threads']} thread(s):"
            f" first push {_ms(result['first']['seconds'])}, unchanged weights {_ms(result['unchanged']['median_s'])},"
            f" extra memory {_size(memory['extra_nbytes'])} = {memory['extra_of_version']:.2f} versions"
            f" ({_size(memory['first_extra_nbytes'])} while the first push planned){noisy}",
            soft_wrap=True,
        )
        for name, fit in result["per_tensor"].items():
            out.print(f"  {name}: {fit['us_per_tensor']:.2f} us per tensor + {fit['fixed_ms']:.1f} ms", soft_wrap=True)


def show_engine_bench(out: Console, report: Payload) -> None:
    """Print a table of pushes and the engine's own way to take weights."""
    out.print(f"{_machine(report)}; {report['tensors']} tensors, {_size(report['nbytes'])}", soft_wrap=True)
    table = _table("engine", "variant", "median>", "p90>", "speed>", "target>", "pause>", "phases")
    for name, row in report["variants"].items():
        target = "" if row["target"] is None else f"{row['target']:.1f}"
        phases = ", ".join(f"{phase} {_ms(seconds)}" for phase, seconds in row["phases"].items() if seconds >= 1e-3)
        _row(table, report["engine"], name, _ms(row["median_s"]), _ms(row["p90_s"]), f"{row['ratio']:.2f}", target,
             _ms(row["pause_s"]), phases)  # fmt: skip
    out.print(table)
    out.print(
        f"speed 1.00 is the engine's own {report['own']}, of the same tensors, in the same rounds;"
        f" first push {_ms(report['first']['seconds'])}; the engine started in {_ms(report['startup_s'])}",
        soft_wrap=True,
    )


# ---- small parts -----------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    """Make a plain table; a column whose name ends in ">" is aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    return table


def _row(table: Table, *cells: Any) -> None:
    """Add a row of literal text: names from outside hold no markup."""
    from rich.text import Text

    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))


def _styled(text: str, style: str) -> Any:
    from rich.text import Text

    return Text(text, style=style)


def _verified(value: object) -> Any:
    if value is True:
        return _styled("yes", "green")
    return _styled("partial", "yellow") if value == "partial" else _styled("no", "bold red")


def _served(status: Payload) -> str:
    """Name the served version, and both parts of it where an adapter lies over the weights of another push."""
    version = f"version {status['committed']}"
    if status["adapter"] is not None:
        return f"{version}: the adapter of version {status['adapter']} over the weights of version {status['weights']}"
    return version if status["mode"] is None else f"{version} (mode {status['mode']})"


def _loras(receipt: Payload) -> str:
    """Name the adapter that a push brought, once for each engine that has another."""
    return ", ".join(dict.fromkeys(e["adapter"] for e in receipt["engines"] if e.get("adapter"))) or "-"


def _drift(engine: Payload) -> str:
    canary = engine["canary"]
    if canary is None:
        return ""
    limit = f"limit {canary['limit']:.4f}" if canary.get("conclusive", True) else "shows nothing beside its noise"
    return f", canary mean {canary['mean_abs']:.4f} ({limit}) nats"


def _machine(report: Payload) -> str:
    found = report["machine"]
    return f"{found['cpu']}, {found['cores']} cores; python {found['python']}, torch {found['torch']}"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.1f} ms"


def _size(nbytes: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} B"
