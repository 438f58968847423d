"""The owner thread: the one thread of a coordinator that calls engines and changes what it knows of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from bridge.errors import Closed, DeadlineExceeded
from bridge.protocol.deadline import Deadline

T = TypeVar("T")

GRACE_S = 0.25
"""A job has the same deadline as its request, and its own error tells more: it is waited for a little longer."""


class OwnerThread:
    """Runs jobs one after the other on a daemon thread of its own.

    Request threads hand it whatever needs an engine and wait for the result without holding a lock, so a question that
    needs no engine is answered while a job hangs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job; returns at once. Raises Closed after `close`."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise Closed(
                    "this coordinator was closed",
                    where=self._name,
                    expected="a coordinator that runs",
                    got="a closed one",
                    remedy="start or attach a new one",
                )
            self._jobs.put((job, future))
        return future

    def run(self, job: Callable[[], T], deadline: Deadline, what: str) -> T:
        """Run a job and wait for its result. Raises what the job raises, and DeadlineExceeded, naming `what`, when it
        has not ended in time; a job that has begun goes on."""
        future = self.submit(job)
        try:
            return future.result(deadline.remaining_s + GRACE_S)
        except TimeoutError:
            if not future.cancel() and future.done():  # it ended just now, or raised a TimeoutError of its own
                return future.result()
            raise DeadlineExceeded(
                f"{what} has not ended in time",
                where=self._name,
                expected="an answer from every engine",
                got="none yet: an engine hangs, or an earlier job still waits for one",
                remedy="look for a hung engine (weighbridge health), or wait longer",
            ) from None

    def close(self, deadline: Deadline) -> bool:
        """Take no more jobs, let the queued ones end, then stop. False when a job still runs at the deadline."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join(deadline.remaining_s)
        return not self._thread.is_alive()


def _serve(jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
    while (item := jobs.get()) is not None:
        job, future = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # thread boundary: the waiting request raises it
                future.set_exception(error)
        del item, job, future  # an idle thread keeps nothing alive
