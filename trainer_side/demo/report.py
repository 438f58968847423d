"""Show and keep a demo run: the live table, plain lines, JSON lines, the picture, the closing text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bridge.model.receipt import Receipt
from trainer_side.demo.values import DemoOptions, DemoResult, StepRow

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("step", "reward", "version", "sync ms", "GB/s", "drift", "verified")
TABLE_ROWS = 16
VERIFIED: dict[bool | str | None, str] = {True: "yes", False: "NO", "partial": "partial", None: "-"}
STEPS_FILE, RECEIPTS_FILE, PICTURE_FILE, RESULT_FILE = "steps.jsonl", "receipts.jsonl", "demo.png", "result.json"


class ProgressView(contextlib.AbstractContextManager["ProgressView"]):
    """Shows one line per step; entered for as long as the run lasts."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __exit__(self, *error: object) -> None:
        return None

    def say(self, text: str) -> None:
        """Show one line of text."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def row(self, row: StepRow) -> None:
        """Show one step."""
        self.say("  ".join(f"{name} {value}" for name, value in zip(COLUMNS, cells(row), strict=True)))


class LiveTable(ProgressView):
    """Redraws a table of the most recent steps in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        super().__init__(console)
        self._rows: list[StepRow] = []
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def row(self, row: StepRow) -> None:
        """Add one step and redraw."""
        from rich.table import Table

        self._rows.append(row)
        table = Table()
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for shown in self._rows[-TABLE_ROWS:]:
            table.add_row(*cells(shown), style="bold red" if shown.verified is False else None)
        self._live.update(table, refresh=True)


def open_view(options: DemoOptions) -> ProgressView:
    """Choose how progress is shown: a live table on a terminal, plain lines elsewhere, nothing when quiet.

    All on stderr: stdout is the result's.
    """
    from rich.console import Console

    console = Console(stderr=True, quiet=options.quiet)
    return LiveTable(console) if console.is_terminal and not options.quiet else ProgressView(console)


def cells(row: StepRow) -> tuple[str, ...]:
    """Format a row in the order of `COLUMNS`; a value that was not measured is a dash."""
    measured = ((row.sync_ms, ".1f"), (row.gb_per_s, ".3f"), (row.drift, ".1e"))
    numbers = ["-" if value is None else format(value, form) for value, form in measured]
    return (str(row.step), f"{row.reward:.3f}", str(row.version), *numbers, VERIFIED[row.verified])


class Record:
    """Writes the files of one run, each line as soon as it is known, so that a crash leaves all steps before it."""

    def __init__(self, out_dir: Path) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        for stale in (PICTURE_FILE, RESULT_FILE):
            (out_dir / stale).unlink(missing_ok=True)
        self.out_dir = out_dir
        self._steps: IO[str] = (out_dir / STEPS_FILE).open("w", encoding="utf-8")
        self._receipts: IO[str] = (out_dir / RECEIPTS_FILE).open("w", encoding="utf-8")

    def step(self, row: StepRow, receipt: Receipt | None) -> None:
        """Append one step, and its receipt when it pushed."""
        lines = [(self._steps, asdict(row))]
        if receipt is not None:
            lines.append((self._receipts, receipt.to_dict()))
        for file, value in lines:
            file.write(json.dumps(value) + "\n")
            file.flush()

    def result(self, result: DemoResult) -> None:
        """Write the closing figures."""
        plain = result.to_dict()
        del plain["rows"]  # steps.jsonl has them
        (self.out_dir / RESULT_FILE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the files."""
        self._steps.close()
        self._receipts.close()


def draw(rows: Sequence[StepRow], result: DemoResult, path: Path) -> None:
    """Draw reward, canary drift and sync time by step, as a PNG."""
    from matplotlib.figure import Figure

    # the object interface: pyplot would choose a backend and keep state for the whole process
    figure = Figure(figsize=(8, 8), layout="constrained")
    reward, drift, sync = figure.subplots(3, 1, sharex=True)
    steps = [row.step for row in rows]
    reward.plot(steps, [row.reward for row in rows], color="tab:blue")
    reward.axhline(result.random, color="grey", linestyle="--", label=f"uniform tokens {result.random:.3f}")
    title = f"{'with pushes' if result.push else 'without pushes'}: {result.task}"
    reward.set(ylabel="mean reward", ylim=(0, 1.02), title=title)
    reward.legend(loc="upper left")
    _series(drift, rows, [row.drift for row in rows], "canary drift (nats)", log=True)
    _series(sync, rows, [row.sync_ms for row in rows], "sync (ms)", log=False)
    sync.set_xlabel("step")
    figure.savefig(path, dpi=110)


def _series(axes: Any, rows: Sequence[StepRow], values: Sequence[float | None], label: str, *, log: bool) -> None:
    axes.set_ylabel(label)
    points = [(row.step, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if not points:
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", va="center")
        return
    axes.plot(*zip(*points, strict=True), color="tab:orange" if log else "tab:green")
    if log and any(value > 0 for _, value in points):
        axes.set_yscale("log")


def closing_text(result: DemoResult) -> str:
    """Format the result for a person, as it goes to stdout."""
    times = sorted(row.sync_ms for row in result.rows if row.sync_ms is not None)
    verified = sum(row.verified is True for row in result.rows)
    pushes = f"{len(times)}, {verified} verified, median {times[len(times) // 2]:.1f} ms" if times else "none"
    lines = [
        f"task      {result.task}",
        f"reward    {result.start:.3f} -> {result.end:.3f}   engine's rollouts, first and last {result.window} steps",
        f"          {result.random:.3f} uniform tokens, {result.untrained:.3f} untrained policy, "
        f"{result.trainer:.3f} the trainer's own copy at the end",
        f"pushes    {pushes}",
        f"health    {'healthy' if result.healthy else 'UNHEALTHY'}",
    ]
    lines += [
        f"          {check.name}: expected {check.expected}, got {check.got}; {check.remedy}"
        for check in result.health
        if not check.ok
    ]
    return "\n".join([*lines, f"written   {result.out_dir} in {result.wall_s:.0f} s"])
