"""Tensor parallelism over processes: the same answers, and named errors when a process dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from bridge.errors import BridgeError, ConfigError, DeadlineExceeded, PeerLost
from bridge.protocol.codec import ErrorInfo, Sampling, pack
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import LogprobsJob, RankJob
from bridge.shm.mailbox import Mailbox
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.engine_side import embedded_models as tiny

GREEDY = Sampling(max_tokens=24, temperature=0)
LONG = Sampling(max_tokens=200, temperature=0)
PROMPT = tiny.prompts()[-1]


def two_ranks(folder: Path) -> Engine:
    tiny.save(folder, "qwen2")
    return Engine(EngineConfig(str(folder), tensor_parallel_size=2, threads=1, timeout_s=20))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with two_ranks(tmp_path) as engine:
        yield engine


@pytest.fixture(scope="module")
def lasting_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """For tests that assert in the end that the engine goes on."""
    with two_ranks(tmp_path_factory.mktemp("lasting")) as engine:
        yield engine


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone_within(pid: int, seconds: float) -> bool:
    deadline = Deadline.after(seconds)
    while alive(pid) and not deadline.expired:
        time.sleep(0.02)
    return not alive(pid)


def test_three_ranks_share_one_kv_head_and_generate_as_one(tmp_path: Path) -> None:
    model = tiny.save(tmp_path, "qwen2", tied=True)
    config = EngineConfig(str(tmp_path), tensor_parallel_size=3, threads=1, wrap_linears=True)
    with Engine(config) as engine:
        assert not distributed.is_initialized(), "the default group is the user's"
        got = engine.generate(tiny.prompts(), GREEDY)
        for prompt, completion in zip(tiny.prompts(), got):
            assert list(completion.token_ids) == tiny.reference_greedy(model, prompt, 24)
        again = engine.generate(tiny.prompts(), GREEDY)
        assert engine.cached_blocks_read > 0
        assert [c.token_ids for c in again] == [c.token_ids for c in got]
        engine.pause("keep")
        assert engine.prompt_logprobs([PROMPT])
        pids = engine.child_pids
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def _generate_for_ever(engine: Engine) -> None:
    while True:
        engine.generate([PROMPT], LONG)


def test_a_child_killed_in_the_middle_is_named(engine: Engine) -> None:
    (pid,) = engine.child_pids
    killer = threading.Timer(0.15, os.kill, (pid, signal.SIGKILL))
    killer.start()
    started = time.monotonic()
    with pytest.raises(PeerLost):
        _generate_for_ever(engine)
    assert time.monotonic() - started < 10
    for call in (lambda: engine.generate([PROMPT], GREEDY), lambda: engine.prompt_logprobs([PROMPT])):
        with pytest.raises(PeerLost, match="restart"):
            call()
    with pytest.raises(PeerLost):
        engine.run_job(b"", Deadline.after(5))


def test_a_child_killed_while_idle_is_noticed_at_the_next_call(engine: Engine) -> None:
    (pid,) = engine.child_pids
    os.kill(pid, signal.SIGKILL)
    assert gone_within(pid, 5)
    with pytest.raises(PeerLost, match=r"rank"):
        engine.prompt_logprobs([PROMPT])


def test_a_hung_child_is_an_error_after_the_timeout_and_is_ended(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2")
    engine = Engine(EngineConfig(str(tmp_path), tensor_parallel_size=2, threads=1, timeout_s=3))
    (pid,) = engine.child_pids
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(PeerLost, match="collective"):
        engine.generate([PROMPT], GREEDY)
    assert 1 < time.monotonic() - started < 10
    engine.close()
    assert not alive(pid)


class _AcceptsAnything:
    def __init__(self, host: object) -> None:
        pass

    def run(self, job: bytes) -> None:
        pass


@pytest.fixture
def tolerant_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process every job succeeds; the child has the real thing, which refuses nonsense."""
    module = types.ModuleType("engine_side.worker.rank")
    module.Rank = _AcceptsAnything  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "engine_side.worker.rank", module)


@pytest.mark.usefixtures("tolerant_rank_0")
def test_what_a_child_raises_in_a_job_comes_back(lasting_engine: Engine) -> None:
    before = lasting_engine.prompt_logprobs([PROMPT])
    for _ in range(2):
        with pytest.raises(BridgeError):
            lasting_engine.run_job(b"not a job", Deadline.after(20))
    assert lasting_engine.prompt_logprobs([PROMPT]) == before


@pytest.mark.usefixtures("tolerant_rank_0")
def test_ranks_are_in_step_again_after_a_job_that_came_late(lasting_engine: Engine) -> None:
    before = lasting_engine.prompt_logprobs([PROMPT])
    (pid,) = lasting_engine.child_pids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded, match=str(pid)):
        lasting_engine.run_job(b"not a job", Deadline.after(0.3))
    threading.Timer(0.3, os.kill, (pid, signal.SIGCONT)).start()
    assert lasting_engine.prompt_logprobs([PROMPT]) == before
    with pytest.raises(BridgeError):
        lasting_engine.run_job(b"not a job", Deadline.after(20))


@pytest.fixture
def scores() -> Iterator[bytes]:
    """A job with collectives, as the bridge sends it."""
    mailbox = Mailbox.create("collectives", 2)
    yield pack(RankJob(str(mailbox.path), 0, 1, LogprobsJob((PROMPT,))))
    mailbox.close()
    mailbox.unlink()


def assert_lost(engine: Engine) -> None:
    for call in (lambda: engine.generate([PROMPT], GREEDY), lambda: engine.prompt_logprobs([PROMPT])):
        with pytest.raises(PeerLost, match="restart"):
            call()
    with pytest.raises(PeerLost, match="restart"):
        engine.run_job(b"", Deadline.after(5))


def test_a_collective_that_a_child_never_joined_loses_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.generate([PROMPT], GREEDY)
    for _ in range(2):  # refused by every rank alike
        with pytest.raises(BridgeError):
            engine.run_job(b"not a job", Deadline.after(20))
    assert engine.prompt_logprobs([PROMPT])
    runner, attempt = engine.runner, engine.runner.attempt

    def joins(job: bytes) -> Any:
        try:
            runner.prompt_logprobs([PROMPT])
        except BridgeError as error:
            return ErrorInfo.of(error)
        return attempt(job)

    monkeypatch.setattr(runner, "attempt", joins)
    with pytest.raises(PeerLost, match=r"out of step.*rank 0: (\d+) begun, (?!\1)\d+ ended, rank 1: \d+ begun"):
        engine.run_job(b"not a job", Deadline.after(0.5))
    assert_lost(engine)


@pytest.mark.usefixtures("tolerant_rank_0")
def test_a_collective_that_rank_0_never_joined_loses_the_engine(engine: Engine, scores: bytes) -> None:
    assert engine.prompt_logprobs([PROMPT])
    with pytest.raises((PeerLost, DeadlineExceeded)):
        engine.run_job(scores, Deadline.after(0.5))
    started = time.monotonic()
    with pytest.raises(PeerLost):
        engine.prompt_logprobs([PROMPT])
    assert time.monotonic() - started < 5, "the child was told when its job ends"
    assert_lost(engine)


def test_a_forked_child_that_closes_the_engine_ends_nothing(lasting_engine: Engine) -> None:
    pid = os.fork()
    if not pid:
        try:
            lasting_engine.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert len(lasting_engine.generate([PROMPT], GREEDY)[0].token_ids) == 24
    assert all(alive(child) for child in lasting_engine.child_pids)


def test_a_start_that_fails_leaves_no_process(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama-biased")  # intermediate size 91
    before = set(_children())
    with pytest.raises(ConfigError, match="91"):
        Engine(EngineConfig(str(tmp_path), tensor_parallel_size=2, threads=1))
    assert set(_children()) <= before


def _children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


_ORPHAN = """
import os, sys
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
engine = Engine(EngineConfig(sys.argv[1], tensor_parallel_size=2, threads=1))
print(engine.child_pids[0], flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_children_end_with_the_engines_process(tmp_path: Path, how: str) -> None:
    tiny.save(tmp_path, "qwen2")
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", _ORPHAN, str(tmp_path), how], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (-9 if how == "kill" else 0), done.stderr
    assert gone_within(int(done.stdout.split()[0]), 10)
