"""The processes of the other tensor-parallel ranks, seen from rank 0: start, tell, wait, end."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import torch

from bridge.errors import BridgeError, DeadlineExceeded, PeerLost
from bridge.protocol.codec import Count, ErrorInfo, Message
from bridge.protocol.deadline import Deadline
from engine_side.embedded.channel import Channel
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import Batch, ModelRunner

log = logging.getLogger(__name__)
T = TypeVar("T")
_GRACE_S = 3.0
_LOST_GRACE_S = 0.3
_START_S = 60.0
"""A process needs this long to import torch on a busy machine, however short the waits are meant to be later."""


class Setup(Message, tag=True, frozen=True):
    """First frame to a child: who it is. It answers `Done` when its weights are loaded, then joins the group."""

    config: EngineConfig
    rank: int
    threads: int
    store: str


class Job(Message, tag=True, frozen=True):
    """Run one opaque job of the bridge, whose collectives end `within_s`; answered by `Done` with the same number."""

    number: Count
    job: bytes
    within_s: Annotated[float, msgspec.Meta(ge=0)]


class Prompts(Message, tag=True, frozen=True):
    """Take part in one `prompt_logprobs`; not answered."""

    prompts: tuple[tuple[Count, ...], ...]
    adapter: str | None = None


class DropLora(Message, tag=True, frozen=True):
    """Drop an adapter that no request uses any more; not answered."""

    name: str


class Stop(Message, tag=True, frozen=True):
    """End the process."""


class Done(Message, tag=True, frozen=True):
    """A child's answer, and how many collectives it has begun and ended so far. An `error` to number 0 outside the
    start means that the child is ending."""

    number: Count
    error: ErrorInfo | None = None
    collectives: tuple[Count, Count] = (0, 0)


Command = Setup | Job | Prompts | DropLora | Stop | Batch


class Child:
    """One process and its channel."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)
        environment = dict(os.environ)
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine_side.embedded.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ if sys.__stderr__ is not None else subprocess.DEVNULL,
                env=environment,
            )
        self.answered = 0
        self.collectives = (0, 0)
        self.channel = Channel(ours, f"rank {rank}, pid {self.process.pid}")

    def wait_done(self, number: int, deadline: Deadline) -> ErrorInfo | None:
        """The answer to `number`; late answers to earlier jobs are dropped. Raises what a dying child said last."""
        while True:
            done: Done = self.channel.receive(Done, deadline)
            self.answered, self.collectives = done.number, done.collectives
            if done.number == number:
                return done.error
            if done.error is not None and done.number == 0:
                raise done.error.rebuild()

    def catch_up(self, number: int, deadline: Deadline) -> None:
        """A job that outlasted its deadline may still run: wait, or the next collective would meet the wrong one."""
        if self.answered < number:
            self.wait_done(number, deadline)

    def last_words(self) -> BridgeError | None:
        """Why the child ended, if it did."""
        try:
            while self.channel.ready():
                done: Done = self.channel.receive(Done, Deadline.after(1.0))
                self.answered, self.collectives = done.number, done.collectives
                if done.number == 0 and done.error is not None:
                    return done.error.rebuild()
        except BridgeError as error:
            return error
        return None

    def end(self, grace_s: float = _GRACE_S) -> None:
        """Stop gracefully, then by force. Never raises for a process that is gone already."""
        with contextlib.suppress(BridgeError):  # it is gone, or hangs: the wait below decides
            self.channel.send(Stop(), Deadline.after(grace_s))
        self.channel.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Jobs:
    """The bridge's half in one rank, made at the first job: an engine that nobody syncs needs none of it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._run: Callable[[bytes], None] | None = None

    def attempt(self, job: bytes) -> ErrorInfo | None:
        """Run one job; errors come back as data, for raising here would leave the other ranks out of step."""
        try:
            if self._run is None:
                from engine_side.engines.embedded import rank_run

                self._run = rank_run(self._runner)
            self._run(job)
        except Exception as error:
            log.debug("a job failed in rank %d", self._runner.tp.rank, exc_info=True)
            return ErrorInfo.of(error)
        return None


class Ranks:
    """Rank 0's runner and the children that mirror it. Used by one thread at a time (the engine's execution lock).

    After a child has died, or one of the ranks has left a collective, every call raises PeerLost: the group is out of
    step for good, and the next collective would meet the remains of that one.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.size = config.tensor_parallel_size
        self._timeout_s = config.timeout_s
        self._number = 0
        self._collectives = (0, 0)  # rank 0's when its part of the last job was over
        self._lost: BridgeError | None = None
        self._children: list[Child] = []
        tp = Parallel(0, self.size, config.timeout_s)
        folder = tempfile.mkdtemp(prefix="weighbridge-ranks-") if self.size > 1 else None
        try:
            if folder is not None:
                self._start(config, f"{folder}/store")
            self.runner = ModelRunner(config, tp)
            self._jobs = Jobs(self.runner)
            if folder is not None:
                self._join(tp, f"{folder}/store")
        except BaseException:
            self.close()
            raise
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of ranks 1 .. size-1."""
        return tuple(child.process.pid for child in self._children)

    def _start(self, config: EngineConfig, store: str) -> None:
        threads = config.threads or max(1, torch.get_num_threads() // self.size)
        deadline = Deadline.after(max(self._timeout_s, _START_S))
        for rank in range(1, self.size):
            self._children.append(Child(rank))
        for child in self._children:
            child.channel.send(Setup(config, child.rank, threads, store), deadline)

    def _join(self, tp: Parallel, store: str) -> None:
        deadline = Deadline.after(max(self._timeout_s, _START_S))
        for child in self._children:
            error = child.wait_done(0, deadline)
            if error is not None:
                raise error.rebuild()
        tp.connect(store)

    def forward(self, batch: Batch) -> torch.Tensor:
        """One step in all ranks; logits [sequences, vocabulary]."""
        return self._in_step(batch, lambda: self.runner.forward(batch))

    def prompt_logprobs(self, prompts: list[list[int]], adapter: str | None = None) -> list[list[float]]:
        """`ModelRunner.prompt_logprobs` in all ranks; rank 0's answer."""
        # before the children are told: what rank 0 refuses must not leave them waiting
        self.runner.check(prompts)
        self.runner.check_lora(adapter)
        message = Prompts(tuple(tuple(p) for p in prompts), adapter)
        return self._in_step(message, lambda: self.runner.prompt_logprobs(prompts, adapter))

    def drop_lora(self, name: str) -> None:
        """Drop an adapter in all ranks. Unknown names are ignored."""
        self._in_step(DropLora(name), lambda: self.runner.drop_lora(name))

    def run_job(self, job: bytes, deadline: Deadline) -> None:
        """Have every rank run `job`, this one in the calling thread; returns when all have.

        Raises PeerLost, now and from then on, when a rank has left a collective that another one is in: for what it
        sent or waits for would be met by the next. A job that fails alike in all ranks, or without any collective,
        costs nothing but itself.
        """
        self._tell(Job(self._number + 1, job, deadline.remaining_s), deadline)
        self._number += 1
        with self.runner.tp.until(deadline):
            own = self._jobs.attempt(job)  # an error is held back until the children have answered too
        self._collectives = self.runner.tp.collectives
        self._check_step(())  # one that rank 0 has left: nobody's answer can mend that
        errors = [own] + [self._watch(child, lambda c: c.wait_done(self._number, deadline)) for child in self._children]
        self._check_step(self._children)
        for error in errors:
            if error is not None:
                raise error.rebuild()
        deadline.check("a job in the engine's ranks")

    def _in_step(self, message: Command, local: Callable[[], T]) -> T:
        """Tell the children and take part in their collectives."""
        self._tell(message, Deadline.after(self._timeout_s))
        try:
            return local()
        except Exception as error:
            # The children are in the middle of collectives that this rank has left, or the other way round.
            if self._children:
                self._lost = self._cause(error)
                raise self._lost from error
            raise

    def _tell(self, message: Command, deadline: Deadline) -> None:
        if self._lost is not None:
            remedy = "restart the engine"
            raise PeerLost("this engine has lost its ranks before", got=self._lost.what, remedy=remedy)
        for child in self._children:
            self._watch(child, lambda c: c.catch_up(self._number, deadline))
        self._check_step(self._children)
        try:
            for child in self._children:
                self._watch(child, lambda c: c.channel.send(message, deadline))
        except DeadlineExceeded as error:
            self._lost = error  # half a frame may lie there, and some children have been told
            raise

    def _check_step(self, children: Sequence[Child]) -> None:
        """Raises PeerLost unless rank 0 and these children have ended every collective that one of them has begun."""
        begun = max(self._collectives)
        if all(count == (begun, begun) for count in (self._collectives, *(child.collectives for child in children))):
            return
        said = self._last_words()
        answered = [(c.rank, c.collectives) for c in self._children if c.answered == self._number]
        counts = ((0, self._collectives), *answered)
        self._lost = said or PeerLost(
            "the ranks of this engine are out of step",
            where=f"rank 0 and {', '.join(str(child.rank) for child in self._children)}",
            expected="as many collectives begun and ended in every rank",
            got=", ".join(f"rank {rank}: {began} begun, {ended} ended" for rank, (began, ended) in counts),
            remedy="restart the engine; the log of the rank that fell behind says why",
        )
        raise self._lost

    def _watch(self, child: Child, action: Callable[[Child], T]) -> T:
        try:
            return action(child)
        except PeerLost as error:
            self._lost = error
            raise

    def _cause(self, error: Exception) -> BridgeError:
        """What a dying child said, rather than the broken collective that it left behind."""
        own = error if isinstance(error, BridgeError) else BridgeError(f"a step failed: {error!r}")
        return self._last_words() or own

    def _last_words(self) -> BridgeError | None:
        told = [words for child in self._children if (words := child.last_words()) is not None]
        return min(told, key=lambda words: isinstance(words, PeerLost), default=None)

    def close(self) -> None:
        """End the children. Idempotent."""
        for child in self._children:
            # one that was left alone in a collective cannot end by itself before that collective's timeout
            child.end(_GRACE_S if self._lost is None else _LOST_GRACE_S)
        self._children.clear()
