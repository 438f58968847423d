"""The processes of the other tensor-parallel ranks: their frames (length, then MessagePack), rank 0's view of them, and
what runs in each of them, `python -m engine_side.embedded.ranks FD`.

Such a process, started by `RankProcess` only, runs the calls that arrive on the inherited socket until the socket ends:
when the engine is closed, or when the engine's process ends for whatever reason.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch

from bridge.errors import REPORT, BridgeError, DeadlineExceeded, PeerLost, ProtocolError
from bridge.protocol.codec import MAX_FRAME, Count, ErrorInfo, Message, pack, unpack
from bridge.protocol.deadline import Deadline
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner, SequenceBatch

T = TypeVar("T")
_HEAD = struct.Struct(">I")
_GRACE_S = 3.0
_LOST_GRACE_S = 0.3
_SEND_S = 30.0
_START_S = 60.0
"""A process needs this long to import torch on a busy machine, however short the waits are meant to be later."""


class RankSetup(Message, tag=True, frozen=True):
    """First frame to a child: its rank and configuration. It answers `CallDone` when its weights are loaded, then joins
    the group. The end of the stream, at any time, ends the child."""

    config: EngineConfig
    rank: int
    threads: int
    store: str


class JobCall(Message, tag=True, frozen=True):
    """Run one opaque job of the bridge, whose collectives end `within_s`; answered by `CallDone` of this number."""

    number: Count
    job: bytes
    within_s: Annotated[float, msgspec.Meta(ge=0)]


class LogprobsCall(Message, tag=True, frozen=True):
    """Take part in one `prompt_logprobs`; not answered."""

    prompts: tuple[tuple[Count, ...], ...]
    lora: str | None = None


class DropLoraCall(Message, tag=True, frozen=True):
    """Drop a LoRA that no request uses any more; not answered."""

    name: str


RankCall = JobCall | LogprobsCall | DropLoraCall | SequenceBatch
"""Frames to a child after the setup; a `SequenceBatch` is one forward, not answered."""


class CallDone(Message, tag=True, frozen=True):
    """A child's answer, and how many collectives it has begun and ended so far. An `error` to number 0
    means that the child is ending."""

    number: Count
    error: ErrorInfo | None = None
    collectives: tuple[Count, Count] = (0, 0)


class Channel:
    """One end of a socketpair. Used by one thread at a time."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._buffer = bytearray()

    def send(self, message: Message, deadline: Deadline) -> None:
        """Send one message. Raises PeerLost when the other end is gone, DeadlineExceeded when it does not read."""
        frame = pack(message)
        try:
            self._sock.settimeout(max(deadline.remaining_s, 0.001))
            self._sock.sendall(_HEAD.pack(len(frame)) + frame)
        except TimeoutError:
            raise self._late() from None
        except OSError as error:
            raise self._lost(str(error)) from error

    def receive(self, kind: type[T] | Any, deadline: Deadline | None) -> T:
        """Wait for the next message; None waits for ever (a child for its parent). Raises PeerLost at the end of the
        stream, DeadlineExceeded, ProtocolError."""
        (length,) = _HEAD.unpack(self._take(_HEAD.size, deadline))
        if length > MAX_FRAME:
            expected, remedy = f"<= {MAX_FRAME}", "run one version of weighbridge in all processes"
            raise ProtocolError(
                "a frame is too large", where=self._peer, expected=expected, got=str(length), remedy=remedy
            )
        message: T = unpack(self._take(length, deadline), kind)
        return message

    def ready(self) -> bool:
        """Tell if something arrived, or the other end is gone."""
        return bool(self._buffer) or bool(select.select([self._sock], [], [], 0)[0])

    def _take(self, size: int, deadline: Deadline | None) -> bytes:
        # What has arrived stays in the buffer when the deadline passes, so a later call goes on in step.
        while len(self._buffer) < size:
            timeout = None if deadline is None else deadline.remaining_s
            if not select.select([self._sock], [], [], timeout)[0]:
                raise self._late()
            try:
                part = self._sock.recv(1 << 20)
            except OSError as error:
                raise self._lost(str(error)) from error
            if not part:
                raise self._lost("end of stream")
            self._buffer += part
        out = bytes(self._buffer[:size])
        del self._buffer[:size]
        return out

    def close(self) -> None:
        """End the stream, also where another process has inherited the socket."""
        with contextlib.suppress(OSError):  # the other end is gone
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            "a rank did not answer in time",
            where=self._peer,
            expected="an answer before the deadline",
            got="none",
            remedy="look for a hung process",
        )

    def _lost(self, got: str) -> PeerLost:
        remedy = "restart the engine; the log of the process says why it ended"
        return PeerLost(
            "the process of a rank is gone", where=self._peer, expected="a running process", got=got, remedy=remedy
        )


class RankProcess:
    """One child process and its channel."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "engine_side.embedded.ranks", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ if sys.__stderr__ is not None else subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.answered = 0
        self.collectives = (0, 0)
        self.channel = Channel(ours, f"rank {rank}, pid {self.process.pid}")

    def wait_done(self, number: int, deadline: Deadline) -> ErrorInfo | None:
        """Wait for the answer to call `number`; late answers to earlier calls are dropped. Raises the last error of a
        child that is ending, PeerLost, DeadlineExceeded."""
        while (done := self._receive(deadline)).number != number:
            pass
        return done.error

    def last_error(self) -> BridgeError | None:
        """Return why the child ended, None while it runs."""
        try:
            while self.channel.ready():
                self._receive(Deadline.after(1.0))
        except BridgeError as error:
            return error
        return None

    def _receive(self, deadline: Deadline) -> CallDone:
        done: CallDone = self.channel.receive(CallDone, deadline)
        self.answered, self.collectives = done.number, done.collectives
        if done.error is not None and done.number == 0:
            raise done.error.rebuild()
        return done

    def end(self, grace_s: float) -> None:
        """End the process by the end of its stream, after `grace_s` by force. Never raises for one that is gone."""
        self.channel.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Ranks:
    """Rank 0's runner and the children that mirror it. Used by one thread at a time (the engine's execution lock).

    After a child has died, or one of the ranks has left a collective, every call raises PeerLost: the group is out of
    step for good, and the next collective would meet the remains of that one.
    """

    def __init__(self, config: EngineConfig) -> None:
        size = config.tensor_parallel_size
        self._timeout_s = config.timeout_s
        self._number = 0
        self._collectives = (0, 0)  # rank 0's when its part of the last job was over
        self._lost: BridgeError | None = None
        self.children: list[RankProcess] = []
        tp = Parallel(0, size, config.timeout_s)
        if size == 1:
            self.runner = ModelRunner(config, tp)
            return
        folder = tempfile.mkdtemp(prefix="weighbridge-ranks-")
        store = f"{folder}/store"
        threads = config.threads or max(1, torch.get_num_threads() // size)
        patience = max(config.timeout_s, _START_S)
        try:
            for rank in range(1, size):
                self.children.append(RankProcess(rank))
                setup = RankSetup(config, rank, threads, store)
                self.children[-1].channel.send(setup, Deadline.after(patience))
            self.runner = ModelRunner(config, tp)
            deadline = Deadline.after(patience)
            for child in self.children:
                child.wait_done(0, deadline)
            tp.connect(store)
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def forward(self, batch: SequenceBatch) -> torch.Tensor:
        """Run one step in all ranks; logits [sequences, vocabulary]. Raises PeerLost."""
        return self._in_step(batch, lambda: self.runner.forward(batch))

    def prompt_logprobs(self, prompts: list[list[int]], lora: str | None = None) -> list[list[float]]:
        """Run `ModelRunner.prompt_logprobs` in all ranks, over prompts that rank 0 has checked; rank 0's answer. Raises
        NotFound, PeerLost."""
        self.runner.check_lora(lora)  # before the children are told: a refusal of rank 0 must not leave them waiting
        call = LogprobsCall(tuple(tuple(p) for p in prompts), lora)
        return self._in_step(call, lambda: self.runner.prompt_logprobs(prompts, lora))

    def drop_lora(self, name: str) -> None:
        """Drop a LoRA in all ranks. Unknown names are ignored. Raises PeerLost."""
        self._in_step(DropLoraCall(name), lambda: self.runner.drop_lora(name))

    def run_job(self, job: bytes, deadline: Deadline) -> None:
        """Have every rank run `job`, this one in the calling thread; returns when all have.

        Raises PeerLost, now and from then on, when a rank has left a collective that another one is in: its remains
        would be met by the next one. A job that fails alike in all ranks, or without any collective, costs nothing but
        itself: the first rank's error is raised, or DeadlineExceeded.
        """
        self._tell(JobCall(self._number + 1, job, deadline.remaining_s), deadline)
        self._number += 1
        with self.runner.tp.until(deadline):
            own = self.runner.attempt(job)  # an error is held back until the children have answered too
        self._collectives = self.runner.tp.collectives
        self._check_step(())  # one that rank 0 has left: no answer can mend that
        errors = [own] + [self._watch(child, lambda c: c.wait_done(self._number, deadline)) for child in self.children]
        self._check_step(self.children)
        for error in errors:
            if error is not None:
                raise error.rebuild()
        deadline.check("a job in the engine's ranks")

    def _in_step(self, call: RankCall, local: Callable[[], T]) -> T:
        """Tell the children and take part in their collectives."""
        self._tell(call, Deadline.after(self._timeout_s))
        try:
            return local()
        except Exception as error:
            # The children are in the middle of collectives that this rank has left, or the other way round.
            if self.children:
                own = (
                    error
                    if isinstance(error, BridgeError)
                    else BridgeError(
                        f"a step failed: {error!r}",
                        where="the embedded engine",
                        expected="a step without errors",
                        got=type(error).__name__,
                        remedy=REPORT,
                    )
                )
                self._lost = self._last_error() or own
                raise self._lost from error
            raise

    def _tell(self, call: RankCall, deadline: Deadline) -> None:
        if self._lost is not None:
            remedy = "restart the engine"
            raise PeerLost(
                "this engine has lost its ranks before",
                where="the embedded engine",
                expected="all ranks",
                got=self._lost.what,
                remedy=remedy,
            )
        for child in self.children:
            # A job that outlasted its deadline may still run: the next collective would meet the wrong one.
            if child.answered < self._number:
                self._watch(child, lambda c: c.wait_done(self._number, deadline))
        self._check_step(self.children)
        try:
            for child in self.children:
                self._watch(child, lambda c: c.channel.send(call, deadline))
        except DeadlineExceeded as error:
            self._lost = error  # half a frame may lie there, and some children have been told
            raise

    def _check_step(self, children: Sequence[RankProcess]) -> None:
        """Raises PeerLost unless rank 0 and these children have ended every collective that one of them has begun."""
        begun = max(self._collectives)
        if all(count == (begun, begun) for count in (self._collectives, *(child.collectives for child in children))):
            return
        last = self._last_error()  # reads answers that have come meanwhile
        answered = [(c.rank, c.collectives) for c in self.children if c.answered == self._number]
        counts = ((0, self._collectives), *answered)
        self._lost = last or PeerLost(
            "the ranks of this engine are out of step",
            where=f"rank 0 and {', '.join(str(child.rank) for child in self.children)}",
            expected="as many collectives begun and ended in every rank",
            got=", ".join(f"rank {rank}: {began} begun, {ended} ended" for rank, (began, ended) in counts),
            remedy="restart the engine; the log of the rank that fell behind says why",
        )
        raise self._lost

    def _watch(self, child: RankProcess, action: Callable[[RankProcess], T]) -> T:
        try:
            return action(child)
        except PeerLost as error:
            self._lost = error
            raise

    def _last_error(self) -> BridgeError | None:
        """The last error of a child that is ending, rather than the broken collective that it left behind."""
        told = [error for child in self.children if (error := child.last_error()) is not None]
        return min(told, key=lambda error: isinstance(error, PeerLost), default=None)

    def close(self) -> None:
        """End the children. Idempotent."""
        for child in self.children:
            # one that was left alone in a collective cannot end by itself before that collective's timeout
            child.end(_GRACE_S if self._lost is None else _LOST_GRACE_S)
        self.children.clear()


# ---- the process of another rank ------------------------------------------------------------------------------------


def serve(channel: Channel) -> None:
    """Load the model, join the group, and run calls. Raises PeerLost at the end of the stream."""
    setup: RankSetup = channel.receive(RankSetup, Deadline.after(_SEND_S))
    torch.set_num_threads(setup.threads)
    tp = Parallel(setup.rank, setup.config.tensor_parallel_size, setup.config.timeout_s)
    runner = ModelRunner(setup.config, tp)
    channel.send(CallDone(0), Deadline.after(_SEND_S))
    tp.connect(setup.store)
    while True:
        call: RankCall = channel.receive(RankCall, None)
        if isinstance(call, JobCall):
            with tp.until(Deadline.after(call.within_s)):
                error = runner.attempt(call.job)
            channel.send(CallDone(call.number, error, tp.collectives), Deadline.after(_SEND_S))
        elif isinstance(call, LogprobsCall):
            runner.prompt_logprobs(call.prompts, call.lora)
        elif isinstance(call, DropLoraCall):
            runner.drop_lora(call.name)
        else:
            runner.forward(call)


def main() -> int:
    """Serve; exit code 0 at the end of the stream. Any other error is sent as the last frame."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it ends us
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), f"the engine, pid {os.getppid()}")
    try:
        serve(channel)
    except Exception as error:
        # Rank 0's collective fails as soon as this process ends; then it reads why.
        try:
            channel.send(CallDone(0, ErrorInfo.of(error)), Deadline.after(1.0))
        except PeerLost:
            return 0
        return error.exit_code if isinstance(error, BridgeError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
