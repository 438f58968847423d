"""`weighbridge bench`: compare pushes with a flat one-thread copy of the same bytes, interleaved in one run.

This half chooses the measurements, starts one process for each and puts the figures together; `copy_worker` measures.
A process each, because the C library reads its copy tunables when it starts, and so that thread counts and memory peaks
of one measurement do not reach into the next.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import psutil

from bridge.config import COPY_TUNABLE
from bridge.errors import ConfigError, DeadlineExceeded, PeerLost
from bridge.protocol.codec import ErrorInfo

SHAPES = ("qwen2-0.5b", "many-small")
COUNTS: Mapping[str, tuple[int, ...]] = {"qwen2-0.5b": (290,), "many-small": (2_000, 6_000, 18_000)}
"""How many tensors of each set of shapes are measured; several counts give the cost of one more tensor."""
VARIANTS = ("off", "transfer", "weights")
TARGETS: Mapping[tuple[str, int], float] = {
    ("off", 2): 0.40,
    ("off", 1): 0.20,
    ("weights", 2): 0.27,
    ("weights", 1): 0.15,
}
"""Least share of the reference copy's rate by (variant, threads), on the qwen2-0.5b shapes."""
NOISY = 0.15
"""Share by which the reference's p90 may exceed its median before a measurement is called noisy."""
BUSY = 0.15
"""Cores that other processes may take before a measurement is called noisy: two threads then have less than two."""
WORKER_TIMEOUT_S = 1800.0


class CopyJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measurement to make: `count` tensors of `shapes` into `engine` ("module" | "hosted"), `threads` copying."""

    shapes: str
    count: int
    engine: str
    threads: int
    rounds: int
    seed: int = 0


class Timed(msgspec.Struct, frozen=True):
    """One timed call: its seconds, CPU seconds of the measuring process, and pause and phases from the receipt."""

    seconds: float
    cpu_s: float
    pause_s: float = 0.0
    phases: dict[str, float] = {}


class Measured(msgspec.Struct, frozen=True, tag=True):
    """The measurements of one job. Sizes in bytes: `extra_nbytes` is the arena and the most private memory that warm
    pushes added to the process, `first_extra_nbytes` the same while the first push planned, `shm_nbytes` the arena
    alone. `others` is the average number of cores that other processes, and other guests of the host, kept busy (only
    for an engine in the measuring process)."""

    job: CopyJob
    tensors: int
    nbytes: int
    reference: list[Timed]
    variants: dict[str, list[Timed]]
    unchanged: list[Timed]
    first: Timed
    first_extra_nbytes: int
    extra_nbytes: int
    shm_nbytes: int
    others: float = 0.0


class MeasurementFailed(msgspec.Struct, frozen=True, tag=True):
    """Returned by the measuring process in the place of its measurements."""

    error: ErrorInfo


class BenchOptions(msgspec.Struct, frozen=True):
    """The choice of measurements. `ray` adds a hosted embedded engine in another process."""

    shapes: tuple[str, ...] = SHAPES
    rounds: int = 10
    threads: tuple[int, ...] = (1, 2)
    ray: bool = False
    seed: int = 0

    @classmethod
    def of(cls, *, shapes: str, rounds: int, threads: str, ray: bool, seed: int) -> BenchOptions:
        """Parse the options of the command line. Raises ConfigError for a bad list of thread counts."""
        try:
            counts = tuple(dict.fromkeys(int(text) for text in threads.split(",")))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            raise ConfigError(
                "not a list of thread counts", where="--threads", expected="whole numbers above 0, such as 1,2",
                got=repr(threads), remedy="leave it out for 1,2",
            )  # fmt: skip
        return cls(SHAPES if shapes == "both" else (shapes,), rounds, counts, ray, seed)

    def jobs(self) -> list[CopyJob]:
        """List the measurements in the order in which they are made."""
        engines = ("module", "hosted") if self.ray else ("module",)
        return [
            CopyJob(shapes, count, engine, threads, self.rounds, self.seed)
            for shapes in self.shapes
            for engine in engines
            for threads in self.threads
            for count in COUNTS[shapes]
            if engine == "module" or shapes == "qwen2-0.5b"  # an engine has a decoder's shapes, not any
        ]


T = TypeVar("T")
Runner = Callable[[CopyJob, Mapping[str, str]], Measured]


def run_bench(
    options: BenchOptions, *, progress: Callable[[str], None] = lambda text: None, run: Runner | None = None
) -> dict[str, Any]:
    """Make all measurements of `options` and return one plain report. Blocks for minutes, in about 8 GiB.

    Args:
        progress: called with one line of text before each measurement.
        run: measures one job in the given environment; None starts a process for each.

    Raises IntegrityError when a timed push did not bring the trainer's bytes to the engine, and the errors of a push.
    """
    measure = run or run_worker
    progress(f"reference copies and pushes alike run with GLIBC_TUNABLES={COPY_TUNABLE}")
    found: list[Measured] = []
    for job in (jobs := options.jobs()):
        progress(
            f"[{len(found) + 1}/{len(jobs)}] {job.count} tensors, {job.shapes}, {job.engine}, {job.threads} thread(s)"
        )
        found.append(measure(job, environment(job)))
    return {
        "machine": machine(),
        "settings": {**msgspec.to_builtins(options), "tunables": f"GLIBC_TUNABLES={COPY_TUNABLE}"},
        "results": [_result(group) for group in _groups(found)],
    }


def environment(job: CopyJob) -> dict[str, str]:
    """Make the environment of a measuring process: copy tunable and thread counts."""
    environ = dict(os.environ)
    given = environ.get("GLIBC_TUNABLES", "")
    if COPY_TUNABLE not in given:
        environ["GLIBC_TUNABLES"] = f"{given}:{COPY_TUNABLE}" if given else COPY_TUNABLE
    environ["WEIGHBRIDGE_THREADS"] = environ["OMP_NUM_THREADS"] = str(job.threads)
    return environ


def run_worker(job: CopyJob, environ: Mapping[str, str]) -> Measured:
    """Measure one job in a process of its own; raises as `measure_in_process`."""
    return measure_in_process("bridge.bench.copy_worker", job, Measured, environ)


def measure_in_process(module: str, job: msgspec.Struct, answer: type[T], environ: Mapping[str, str]) -> T:
    """Run `python -m module` on one job (see `copy_worker.serve_one_job`) and return its measurements. Blocks for
    minutes.

    Raises the process's own error, DeadlineExceeded after half an hour, PeerLost when it ends without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as folder:
        state = {"XDG_STATE_HOME": folder}  # a journal and a Ray of its own
        command = [sys.executable, "-m", module]
        try:
            done = subprocess.run(
                command, input=msgspec.json.encode(job), stdout=subprocess.PIPE, env={**environ, **state},
                timeout=WORKER_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded(
                "a measurement did not end",
                where=repr(job),
                expected=f"{WORKER_TIMEOUT_S:.0f} s",
                got="no answer yet",
                remedy="measure with fewer --rounds, or on a machine with nothing else to do",
            ) from error
    try:
        measured = msgspec.json.decode(done.stdout, type=answer | MeasurementFailed)
    except msgspec.DecodeError as error:
        raise PeerLost(
            "a measuring process ended without an answer",
            where=repr(job),
            expected="an answer",
            got=f"exit code {done.returncode}",
            remedy="see its traceback above; exit code -9 is most often a lack of memory",
        ) from error
    if isinstance(measured, MeasurementFailed):
        raise measured.error.rebuild()
    return cast(T, measured)


# ---- figures ---------------------------------------------------------------------------------------------------------


def _groups(found: Sequence[Measured]) -> list[list[Measured]]:
    """Group measurements that differ in the number of tensors alone, fewest first."""
    groups: dict[tuple[str, str, int], list[Measured]] = {}
    for one in found:
        groups.setdefault((one.job.shapes, one.job.engine, one.job.threads), []).append(one)
    return [sorted(group, key=lambda one: one.tensors) for group in groups.values()]


def _result(group: Sequence[Measured]) -> dict[str, Any]:
    """Report one group: its largest measurement, and the cost per tensor over all of them."""
    one = group[-1]
    reference = stats(one.reference, one.nbytes)
    reference["spread"] = reference["p90_s"] / reference["median_s"] - 1
    targets = TARGETS if one.job.shapes == "qwen2-0.5b" else {}
    variants = {
        name: variant_stats(timed, one.nbytes, reference["median_s"], targets.get((name, one.job.threads)))
        for name, timed in one.variants.items()
    }
    return {
        "shapes": one.job.shapes,
        "engine": one.job.engine,
        "threads": one.job.threads,
        "tensors": one.tensors,
        "nbytes": one.nbytes,
        "reference": reference,
        "variants": variants,
        "first": {"seconds": one.first.seconds, "phases": one.first.phases},
        "unchanged": stats(one.unchanged, one.nbytes),
        "per_tensor": {name: fit_line(group, name) for name in one.variants} if len(group) > 1 else {},
        "memory": {
            "version_nbytes": one.nbytes,
            "first_extra_nbytes": one.first_extra_nbytes,
            "extra_nbytes": one.extra_nbytes,
            "extra_of_version": one.extra_nbytes / one.nbytes,
            "shm_nbytes": one.shm_nbytes,
        },
        "noisy": reference["spread"] > NOISY or one.others > BUSY,
        "others": one.others,
    }


def variant_stats(timed: Sequence[Timed], nbytes: int, reference_s: float, target: float | None) -> dict[str, Any]:
    """Report the timed pushes of one variant: `ratio` is how many times as fast as the reference they are."""
    row = stats(timed, nbytes)
    phases = sorted({phase for push in timed for phase in push.phases})
    return {
        **row,
        "ratio": reference_s / row["median_s"],
        "target": target,
        "pause_s": statistics.median(push.pause_s for push in timed),
        "phases": {phase: statistics.median(push.phases.get(phase, 0.0) for push in timed) for phase in phases},
    }


def stats(timed: Sequence[Timed], nbytes: int) -> dict[str, Any]:
    """Compute median and spread of timed calls that moved `nbytes` each."""
    seconds = sorted(one.seconds for one in timed)
    median = statistics.median(seconds)
    return {
        "rounds": len(seconds),
        "min_s": seconds[0],
        "median_s": median,
        "p90_s": seconds[min(len(seconds) - 1, round(0.9 * (len(seconds) - 1)))],
        "cpu_s": statistics.median(one.cpu_s for one in timed),
        "gb_per_s": nbytes / median / 1e9,
    }


def fit_line(group: Sequence[Measured], variant: str) -> dict[str, float]:
    """Fit a least-squares line through the medians by number of tensors: the cost of one more tensor, and of a push of
    none."""
    counts = [float(one.tensors) for one in group]
    medians = [statistics.median(push.seconds for push in one.variants[variant]) for one in group]
    fit = statistics.linear_regression(counts, medians)
    return {"us_per_tensor": fit.slope * 1e6, "fixed_ms": fit.intercept * 1e3}


def machine() -> dict[str, Any]:
    """Describe the machine that measures."""
    cpuinfo = Path("/proc/cpuinfo")  # psutil and platform do not know the model
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }
