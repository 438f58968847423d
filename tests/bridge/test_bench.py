"""The bench: its figures from known measurements, and its honesty, on small shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from bridge.bench import copy_bench, copy_worker
from bridge.bench.copy_bench import BenchOptions, CopyJob, Measured, Timed
from bridge.config import COPY_TUNABLE
from bridge.errors import ConfigError, DigestMismatch, PeerLost

SMALL: copy_worker.Shapes = [("m.0.q.weight", (8, 4)), ("m.0.q.bias", (8,)), ("m.0.norm.weight", (8,))]


def _job(**given: Any) -> CopyJob:
    return CopyJob(**{"shapes": "many-small", "count": 3, "engine": "module", "threads": 1, "rounds": 3, **given})


def _measured(job: CopyJob, *, off: float = 0.5, reference: float = 0.1) -> Measured:
    """Three rounds around these medians, in seconds, of 1 GB."""
    rounds = [Timed(off * factor, off, 0.2 * off, {"load": 0.1 * off}) for factor in (0.9, 1.0, 1.3)]
    copies = [Timed(reference * factor, reference) for factor in (0.99, 1.0, 1.01)]
    variants = {"off": rounds, "weights": [Timed(2 * one.seconds, one.cpu_s) for one in rounds]}
    return Measured(
        job, job.count, 10**9, copies, variants, rounds[:2], Timed(4.0, 4.0), 3 * 10**9, 2 * 10**9, 2 * 10**9
    )


def test_figures_of_known_measurements() -> None:
    options = BenchOptions(("qwen2-0.5b",), rounds=3, threads=(2,))
    seen: list[tuple[CopyJob, Mapping[str, str]]] = []

    def run(job: CopyJob, environ: Mapping[str, str]) -> Measured:
        seen.append((job, environ))
        return _measured(job)

    report = copy_bench.run_bench(options, run=run)
    (result,) = report["results"]
    off = result["variants"]["off"]
    assert (off["median_s"], off["min_s"], off["p90_s"]) == (0.5, 0.45, 0.65)
    assert off["gb_per_s"] == pytest.approx(2.0)
    assert off["ratio"] == pytest.approx(0.2)
    assert off["target"] == 0.40
    assert off["pause_s"] == pytest.approx(0.1)
    assert off["phases"] == {"load": pytest.approx(0.05)}
    assert result["variants"]["weights"]["ratio"] == pytest.approx(0.1)
    assert result["memory"]["extra_of_version"] == 2.0
    assert result["per_tensor"] == {}
    assert not result["noisy"]
    ((job, environ),) = seen
    assert job.threads == 2
    assert environ["WEIGHBRIDGE_THREADS"] == environ["OMP_NUM_THREADS"] == "2"
    assert COPY_TUNABLE in environ["GLIBC_TUNABLES"]
    msgspec.json.encode(report)


def test_the_cost_of_one_more_tensor_is_the_slope() -> None:
    options = BenchOptions(("many-small",), rounds=3, threads=(1,))
    report = copy_bench.run_bench(options, run=lambda job, environ: _measured(job, off=0.010 + job.count * 5e-6))
    (result,) = report["results"]
    assert result["tensors"] == 18_000
    assert result["per_tensor"]["off"]["us_per_tensor"] == pytest.approx(5.0)
    assert result["per_tensor"]["off"]["fixed_ms"] == pytest.approx(10.0)
    assert result["variants"]["off"]["target"] is None


def test_a_reference_that_varies_is_called_noisy() -> None:
    one = _measured(_job(shapes="qwen2-0.5b", count=290))
    noisy = msgspec.structs.replace(one, reference=[Timed(s, s) for s in (0.1, 0.1, 0.1, 0.1, 0.2)])
    (result,) = copy_bench.run_bench(BenchOptions(("qwen2-0.5b",), 1, (1,)), run=lambda job, environ: noisy)["results"]
    assert result["noisy"]
    shared = msgspec.structs.replace(one, others=0.9)
    (result,) = copy_bench.run_bench(BenchOptions(("qwen2-0.5b",), 1, (1,)), run=lambda job, environ: shared)["results"]
    assert result["noisy"]


def test_a_tunable_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    environ = copy_bench.environment(_job())
    assert environ["GLIBC_TUNABLES"] == f"glibc.malloc.check=1:{COPY_TUNABLE}"
    monkeypatch.setenv("GLIBC_TUNABLES", environ["GLIBC_TUNABLES"])
    assert copy_bench.environment(_job())["GLIBC_TUNABLES"] == environ["GLIBC_TUNABLES"]


def test_options_become_jobs() -> None:
    jobs = BenchOptions.of(shapes="both", rounds=2, threads="1,2,1", ray=True, seed=0).jobs()
    hosted = [job for job in jobs if job.engine == "hosted"]
    assert [(job.shapes, job.threads) for job in hosted] == [("qwen2-0.5b", 1), ("qwen2-0.5b", 2)]
    assert {job.count for job in jobs if job.shapes == "many-small"} == {2_000, 6_000, 18_000}
    assert len(jobs) == 2 + 2 + 6


@pytest.mark.parametrize("threads", ["", "0", "two", "1;2"])
def test_bad_thread_counts(threads: str) -> None:
    with pytest.raises(ConfigError, match="--threads"):
        BenchOptions.of(shapes="both", rounds=1, threads=threads, ray=False, seed=0)


# ---- the worker ------------------------------------------------------------------------------------------------------


def test_the_shapes_are_those_of_qwen2() -> None:
    shapes = copy_worker.shapes_of(_job(shapes="qwen2-0.5b", count=290))
    assert len(dict(shapes)) == 290
    assert sum(torch.Size(shape).numel() for _, shape in shapes) == 494_032_768
    small = copy_worker.shapes_of(_job(count=18_000))
    assert len(dict(small)) == 18_000


def test_the_module_holds_exactly_these_tensors() -> None:
    model = copy_worker.build(SMALL)
    assert [(name, tuple(param.shape)) for name, param in model.named_parameters()] == SMALL
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def test_every_value_changes_each_time_keeps_its_size_and_none_comes_back_soon() -> None:
    model = copy_worker.build(SMALL)
    copy_worker.fill(model, seed=0)
    trainer = copy_worker.Trainer(model)
    seen = [torch.cat([param.detach().view(torch.int16).flatten() for param in model.parameters()])]
    sizes = [param.detach().abs().float().clone() for param in model.parameters()]
    for _ in range(copy_worker.MANTISSA):
        trainer.change()
        now = torch.cat([param.detach().view(torch.int16).flatten() for param in model.parameters()])
        assert all(bool((now != before).all()) for before in seen)
        for param, size in zip(model.parameters(), sizes, strict=True):
            assert bool(((param.detach().abs().float() - size).abs() <= size / 4 + 1e-30).all())
        seen.append(now)


class CopyingBridge:
    """Copies what it is sent into a module; `skip` is a name that it forgets."""

    def __init__(self, engine: nn.Module, skip: str | None = None) -> None:
        self.engine, self.skip, self.pushed = engine, skip, list[str]()

    def push(self, named: Iterator[tuple[str, torch.Tensor]], *, verify: str) -> Any:
        there = dict(self.engine.named_parameters())
        for name, tensor in named:
            if name != self.skip:
                there[name].detach().copy_(tensor.detach())
        self.pushed.append(verify)
        return SimpleNamespace(version=len(self.pushed), pause_s=0.5, phases={"load": 0.25})


def _bench(skip: str | None = None) -> tuple[copy_worker.Bench, CopyingBridge, list[int]]:
    trainer, engine = copy_worker.build(SMALL), copy_worker.build(SMALL)
    copy_worker.fill(trainer, seed=0)
    copy_worker.fill(engine, seed=1)
    made = CopyingBridge(engine, skip)
    copies: list[int] = []
    sink = copy_worker.Sink(made, engine)  # type: ignore[arg-type]
    return copy_worker.Bench(_job(), copy_worker.Trainer(trainer), sink, lambda: copies.append(1)), made, copies


def test_each_round_measures_every_variant_and_the_reference_once() -> None:
    run, made, copies = _bench()
    first = run.run()
    assert first.phases == {"load": 0.25}
    assert {name: len(timed) for name, timed in run.variants.items()} == dict.fromkeys(copy_bench.VARIANTS, 3)
    assert len(run.reference) == 3
    assert len(copies) == 4, "one of them is warm-up"
    assert len(run.unchanged) == copy_worker.UNCHANGED
    rounds = made.pushed[-9 - copy_worker.UNCHANGED - 1 : -copy_worker.UNCHANGED - 1]
    assert sorted(rounds) == sorted(copy_bench.VARIANTS * 3)
    assert run.variants["off"][0].pause_s == 0.5


@pytest.mark.parametrize("skip", [name for name, _ in SMALL])
def test_a_push_that_leaves_a_tensor_behind_fails_the_bench(skip: str) -> None:
    run, _, _ = _bench(skip)
    with pytest.raises(DigestMismatch, match=skip):
        run.run()


def test_a_worker_that_dies_is_an_error_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_bench.sys, "executable", "/bin/false")
    with pytest.raises(PeerLost, match="exit code 1"):
        copy_bench.run_worker(_job(), {})


@pytest.mark.timeout(120)
def test_a_real_measurement_in_a_process_of_its_own() -> None:
    """A few tensors through a real attached bridge; the figures are not judged."""
    job = _job(count=30, rounds=1)
    measured = copy_bench.run_worker(job, copy_bench.environment(job))
    assert measured.tensors == 30
    assert measured.nbytes == 30 * 1024
    assert all(len(timed) == 1 and timed[0].seconds > 0 for timed in measured.variants.values())
    assert measured.first.phases
