"""How a demo run is shown and kept: the live table, plain lines, JSON lines, the picture, the closing text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from bridge.errors import ConfigError
from bridge.model.receipt import Receipt
from trainer_side.demo.values import DemoOptions, DemoResult, StepRow

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("step", "reward", "version", "sync ms", "GB/s", "drift", "verified")
TABLE_ROWS = 16
VERIFIED: dict[bool | str | None, str] = {True: "yes", False: "NO", "partial": "partial", None: "-"}
STEPS_FILE, RECEIPTS_FILE, PICTURE_FILE, RESULT_FILE = "steps.jsonl", "receipts.jsonl", "demo.png", "result.json"


class ProgressView(Protocol):
    """Progress of a run for a person; entered for as long as the run lasts."""

    def __enter__(self) -> ProgressView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, text: str) -> None: ...

    def row(self, row: StepRow) -> None: ...


def open_view(options: DemoOptions) -> ProgressView:
    """A live table on a terminal, plain lines elsewhere, nothing when quiet. All on stderr: stdout is the result's."""
    from rich.console import Console

    console = Console(stderr=True, quiet=options.quiet)
    return LiveTable(console) if console.is_terminal and not options.quiet else PlainLines(console)


class PlainLines:
    """One line per step."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def row(self, row: StepRow) -> None:
        self.say("  ".join(f"{name} {value}" for name, value in zip(COLUMNS, cells(row), strict=True)))


class LiveTable:
    """A table of the most recent steps, redrawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._rows: list[StepRow] = []
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False)

    def row(self, row: StepRow) -> None:
        self._rows.append(row)
        self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        from rich.table import Table

        table = Table()
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for row in self._rows[-TABLE_ROWS:]:
            style = "bold red" if row.verified is False else None
            table.add_row(*cells(row), style=style)
        return table


def cells(row: StepRow) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`; what was not measured is a dash."""
    return (
        str(row.step),
        f"{row.reward:.3f}",
        str(row.version),
        _number(row.sync_ms, "{:.1f}"),
        _number(row.gb_per_s, "{:.3f}"),
        _number(row.drift, "{:.1e}"),
        VERIFIED[row.verified],
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


class Record:
    """The files of one run, each line written as soon as it is known: what a crash leaves is what had happened."""

    def __init__(self, out_dir: Path) -> None:
        out_dir.mkdir(parents=True, exist_ok=True)
        for stale in (PICTURE_FILE, RESULT_FILE):
            (out_dir / stale).unlink(missing_ok=True)
        self.out_dir = out_dir
        self._steps: IO[str] = (out_dir / STEPS_FILE).open("w", encoding="utf-8")
        self._receipts: IO[str] = (out_dir / RECEIPTS_FILE).open("w", encoding="utf-8")

    def step(self, row: StepRow, receipt: Receipt | None) -> None:
        _line(self._steps, row.to_dict())
        if receipt is not None:
            _line(self._receipts, receipt.to_dict())

    def result(self, result: DemoResult) -> None:
        plain = result.to_dict()
        del plain["rows"]  # steps.jsonl has them
        (self.out_dir / RESULT_FILE).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        self._steps.close()
        self._receipts.close()


def _line(file: IO[str], value: dict[str, Any]) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


def require_matplotlib() -> None:
    """ConfigError with what to type when the picture could not be drawn; asked before the run, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the demo draws a picture", got=str(error), remedy="pip install 'weighbridge[demo]'"
        ) from error


def draw(rows: Sequence[StepRow], result: DemoResult, path: Path) -> None:
    """Reward, canary drift and sync time by step, as a PNG."""
    from matplotlib.figure import Figure

    # the object interface: pyplot would choose a backend and keep state for the whole process
    figure = Figure(figsize=(8, 8), layout="constrained")
    reward, drift, sync = figure.subplots(3, 1, sharex=True)
    steps = [row.step for row in rows]
    reward.plot(steps, [row.reward for row in rows], color="tab:blue")
    reward.axhline(result.random, color="grey", linestyle="--", label=f"uniform tokens {result.random:.3f}")
    reward.set(
        ylabel="mean reward",
        ylim=(0, 1.02),
        title=f"{'with pushes' if result.push else 'without pushes'}: {result.task}",
    )
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
    """The result for a person, as it goes to stdout."""
    pushed = [row.sync_ms for row in result.rows if row.sync_ms is not None]
    verified = sum(row.verified is True for row in result.rows)
    lines = [
        f"task      {result.task}",
        f"reward    {result.start:.3f} -> {result.end:.3f}   engine's rollouts, first and last {result.window} steps",
        f"          {result.random:.3f} uniform tokens, {result.untrained:.3f} untrained policy, "
        f"{result.trainer:.3f} the trainer's own copy at the end",
        f"pushes    {len(pushed)}, {verified} verified, median {_median(pushed):.1f} ms"
        if pushed
        else "pushes    none",
        f"health    {'healthy' if result.healthy else 'UNHEALTHY'}",
    ]
    lines += [
        f"          {check.name}: expected {check.expected}, got {check.got}; {check.remedy}"
        for check in result.health
        if not check.ok
    ]
    return "\n".join([*lines, f"written   {result.out_dir} in {result.wall_s:.0f} s"])


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
