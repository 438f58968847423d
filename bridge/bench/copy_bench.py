"""`weighbridge bench`: pushes against a flat one-thread copy of the same bytes, interleaved in one run.

This half chooses what is measured, starts one process per measurement and puts the figures together; the measuring
itself is `bench_worker`. A process of its own, because the C library reads its copy tunables at start, and so that
neither thread counts nor memory peaks of one measurement reach into the next.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

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
TUNABLE = "glibc.cpu.x86_non_temporal_threshold=0x100000"
NOISY = 0.15
"""Share by which the reference's p90 may exceed its median before a measurement is called noisy."""
BUSY = 0.15
"""Cores that other processes may take before a measurement is called noisy: two threads then share less than two."""
WORKER_TIMEOUT_S = 1800.0


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measurement: `count` tensors of `shapes` into `engine` ("module" | "hosted") with `threads` copy threads."""

    shapes: str
    count: int
    engine: str
    threads: int
    rounds: int
    seed: int = 0


class Timed(msgspec.Struct, frozen=True):
    """One timed call: seconds, CPU seconds of this process, and what the receipt said."""

    seconds: float
    cpu_s: float
    pause_s: float = 0.0
    phases: dict[str, float] = {}


class Measured(msgspec.Struct, frozen=True, tag=True):
    """What the worker answers. Sizes in bytes: `extra_nbytes` is the arena and the most private memory that warm pushes
    added to this process, `first_extra_nbytes` the same while the first push planned, `shm_nbytes` the arena alone.
    `steal` is the share of CPU time that the host took away, `others` how many cores other processes kept busy on
    average (only for an engine in the measuring process)."""

    job: Job
    tensors: int
    nbytes: int
    reference: list[Timed]
    variants: dict[str, list[Timed]]
    unchanged: list[Timed]
    first: Timed
    first_extra_nbytes: int
    extra_nbytes: int
    shm_nbytes: int
    load: float
    steal: float
    others: float = 0.0


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker's other answer."""

    error: ErrorInfo


class BenchOptions(msgspec.Struct, frozen=True):
    """What to measure. `ray` adds a hosted embedded engine in another process."""

    shapes: tuple[str, ...] = SHAPES
    rounds: int = 10
    threads: tuple[int, ...] = (1, 2)
    ray: bool = False
    seed: int = 0

    @classmethod
    def of(cls, *, shapes: str, rounds: int, threads: str, ray: bool, seed: int) -> BenchOptions:
        """From the command line's texts. Raises ConfigError."""
        try:
            counts = tuple(dict.fromkeys(int(text) for text in threads.split(",")))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            raise ConfigError("not a list of thread counts", where="--threads", expected="1,2", got=repr(threads))
        return cls(SHAPES if shapes == "both" else (shapes,), rounds, counts, ray, seed)

    def jobs(self) -> list[Job]:
        engines = ("module", "hosted") if self.ray else ("module",)
        return [
            Job(shapes, count, engine, threads, self.rounds, self.seed)
            for shapes in self.shapes
            for engine in engines
            for threads in self.threads
            for count in COUNTS[shapes]
            if engine == "module" or shapes == "qwen2-0.5b"  # an engine has a decoder's shapes, not any
        ]


T = TypeVar("T")
Runner = Callable[[Job, Mapping[str, str]], Measured]


def run_bench(
    options: BenchOptions, *, say: Callable[[str], None] = lambda text: None, run: Runner | None = None
) -> dict[str, Any]:
    """Measure everything that `options` ask for and return one plain report. Blocks for minutes, in about 8 GiB.

    Args:
        say: progress, one line at a time.
        run: measures one job in the given environment; None starts a process for each.

    Raises IntegrityError when a timed push did not bring the trainer's bytes to the engine, and what a push raises.
    """
    measure = run or run_worker
    say(
        f"every measuring process starts with GLIBC_TUNABLES={TUNABLE}, for the reference copy and for the pushes alike"
    )
    found: list[Measured] = []
    for job in (jobs := options.jobs()):
        say(f"[{len(found) + 1}/{len(jobs)}] {job.count} tensors, {job.shapes}, {job.engine}, {job.threads} thread(s)")
        found.append(measure(job, environment(job)))
    return {
        "machine": machine(),
        "settings": {**msgspec.to_builtins(options), "tunables": f"GLIBC_TUNABLES={TUNABLE}"},
        "results": [_result(group) for group in _groups(found)],
    }


def environment(job: Job, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a measuring process: copy tunable and thread counts."""
    environ = dict(os.environ if base is None else base)
    given = environ.get("GLIBC_TUNABLES", "")
    if TUNABLE not in given:
        environ["GLIBC_TUNABLES"] = f"{given}:{TUNABLE}" if given else TUNABLE
    environ["WEIGHBRIDGE_THREADS"] = environ["OMP_NUM_THREADS"] = str(job.threads)
    return environ


def run_worker(job: Job, environ: Mapping[str, str]) -> Measured:
    """Measure one job in a process of its own. Raises what went wrong there."""
    return ask_process("bridge.bench.copy_worker", job, Measured, environ)


def ask_process(module: str, job: msgspec.Struct, answer: type[T], environ: Mapping[str, str]) -> T:
    """Run `python -m module` on one job (see `bench_worker.answer_one`). Raises what went wrong there,
    DeadlineExceeded, PeerLost."""
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-") as folder:
        state = {"XDG_STATE_HOME": folder}  # the bench's journal and its own Ray are nobody else's
        command = [sys.executable, "-m", module]
        try:
            done = subprocess.run(
                command, input=msgspec.json.encode(job), stdout=subprocess.PIPE, env={**environ, **state},
                timeout=WORKER_TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DeadlineExceeded("a measurement did not end", where=repr(job)) from error
    try:
        said = msgspec.json.decode(done.stdout, type=answer | Failed)
    except msgspec.DecodeError as error:
        raise PeerLost("a measuring process died", where=repr(job), got=f"exit code {done.returncode}") from error
    if isinstance(said, Failed):
        raise said.error.rebuild()
    return cast(T, said)


# ---- figures ---------------------------------------------------------------------------------------------------------


def _groups(found: Sequence[Measured]) -> list[list[Measured]]:
    """Measurements that differ in the number of tensors alone, fewest first."""
    groups: dict[tuple[str, str, int], list[Measured]] = {}
    for one in found:
        groups.setdefault((one.job.shapes, one.job.engine, one.job.threads), []).append(one)
    return [sorted(group, key=lambda one: one.tensors) for group in groups.values()]


def _result(group: Sequence[Measured]) -> dict[str, Any]:
    """The report of one group: its largest measurement, and the cost per tensor over all of them."""
    one = group[-1]
    reference = stats(one.reference, one.nbytes)
    reference["spread"] = reference["p90_s"] / reference["median_s"] - 1
    variants = {name: _variant(one, name, reference["median_s"]) for name in one.variants}
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
        "load": one.load,
        "steal": one.steal,
        "others": one.others,
    }


def _variant(one: Measured, name: str, reference_s: float) -> dict[str, Any]:
    timed = one.variants[name]
    row = stats(timed, one.nbytes)
    phases = {phase for push in timed for phase in push.phases}
    row["ratio"] = reference_s / row["median_s"]
    row["target"] = TARGETS.get((name, one.job.threads)) if one.job.shapes == "qwen2-0.5b" else None
    row["pause_s"] = statistics.median(push.pause_s for push in timed)
    row["phases"] = {p: statistics.median(push.phases.get(p, 0.0) for push in timed) for p in sorted(phases)}
    return row


def stats(timed: Sequence[Timed], nbytes: int) -> dict[str, Any]:
    """Median and spread of timed calls that moved `nbytes` each."""
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
    """Least-squares line through the medians by number of tensors: what one more tensor costs, and what none costs."""
    counts = [float(one.tensors) for one in group]
    medians = [statistics.median(push.seconds for push in one.variants[variant]) for one in group]
    fit = statistics.linear_regression(counts, medians)
    return {"us_per_tensor": fit.slope * 1e6, "fixed_ms": fit.intercept * 1e3}


def machine() -> dict[str, Any]:
    """What a report says about where it was measured."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
