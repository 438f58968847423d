"""Trace how far one push walks through the code (`make trace`): functions, files, and changes of file.

The simplest case is pushed three times: four tensors into an attached module, without Ray and LoRA,
`verify="weights"`. The third push is the steady one, where everything is planned already; limits apply to it. A reader
who follows that push from top to bottom meets as many functions, and turns to another file as often, as it says here.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = tuple(f"{ROOT}/{package}/" for package in ("bridge", "trainer_side", "engine_side"))
LABELS = ("first push", "second push", "steady push")


@dataclass(frozen=True)
class Call:
    """One call of a function of the product; `file` is relative to the repository."""

    file: str
    function: str


@dataclass
class Walk:
    """The calls of one push, in the order in which they began, over all threads."""

    calls: list[Call] = field(default_factory=list)

    @property
    def functions(self) -> int:
        return len(set(self.calls))

    @property
    def named(self) -> int:
        """Functions without lambdas, comprehensions and generator expressions, and without functions inside others."""
        return len({call for call in self.calls if "<" not in call.function})

    @property
    def files(self) -> int:
        return len({call.file for call in self.calls})

    @property
    def changes(self) -> int:
        """Count the calls that lie in another file than the call before."""
        return sum(before.file != after.file for before, after in pairwise(self.calls))

    def __str__(self) -> str:
        return (
            f"{len(self.calls)} calls, {self.functions} functions ({self.named} named) in {self.files} files, "
            f"{self.changes} changes of file"
        )


class Recorder:
    """Records calls of the product while `record` is entered, in this thread and in those started after `install`."""

    def __init__(self) -> None:
        self._walk: Walk | None = None

    def install(self) -> None:
        """Watch threads that start from now on. Call it before the bridge is made: its threads live as long."""
        threading.setprofile(self._profile)

    @contextmanager
    def record(self) -> Iterator[Walk]:
        self._walk = walk = Walk()
        sys.setprofile(self._profile)
        try:
            yield walk
        finally:
            sys.setprofile(None)
            self._walk = None

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and self._walk is not None and frame.f_code.co_filename.startswith(PRODUCT):
            file = frame.f_code.co_filename[len(str(ROOT)) + 1 :]
            self._walk.calls.append(Call(file, frame.f_code.co_qualname))


def trace_pushes() -> dict[str, Walk]:
    """Push three times, every value changed before each, and return the walk of each push by its label. Raises
    RuntimeError when a push was not verified: its walk would be that of something else."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed
    import torch
    from torch import nn

    import bridge

    torch.set_num_threads(1)
    recorder = Recorder()
    recorder.install()
    trainer, engine = (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2))
    walks = {}
    b = bridge.attach(engine)
    try:
        for label in LABELS:
            with torch.no_grad():
                for parameter in trainer.parameters():
                    parameter.add_(0.01)
            with recorder.record() as walks[label]:
                receipt = b.push(trainer.named_parameters(), verify="weights")
            if receipt.verified is not True:
                raise RuntimeError(f"{label}: verified is {receipt.verified!r}, expected True")
    finally:
        threading.setprofile(None)
        b.close()
    return walks


def main(argv: Sequence[str] | None = None) -> int:
    """Print the three walks and return the exit code: 1 when the steady push exceeds a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the steady push's calls there, one a line")
    parser.add_argument("--max-functions", type=int, metavar="N", help="most named functions of the steady push")
    parser.add_argument("--max-files", type=int, metavar="N", help="most files of the steady push")
    parser.add_argument("--max-changes", type=int, metavar="N", help="most changes of file in the steady push")
    options = parser.parse_args(argv)
    walks = trace_pushes()
    for label, walk in walks.items():
        print(f"{label}: {walk}")
    steady = walks[LABELS[-1]]
    for file, calls in Counter(call.file for call in steady.calls).most_common(12):
        print(f"{calls:7,} calls in {file}")
    if options.out is not None:
        options.out.write_text("".join(f"{call.file}:{call.function}\n" for call in steady.calls), encoding="utf-8")
    limits = (
        ("named functions", steady.named, options.max_functions),
        ("files", steady.files, options.max_files),
        ("changes of file", steady.changes, options.max_changes),
    )
    exceeded = [
        f"{got} {what}, at most {most} are meant" for what, got, most in limits if most is not None and got > most
    ]
    for line in exceeded:
        print(f"steady push: {line}", file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
