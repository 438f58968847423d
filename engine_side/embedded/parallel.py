"""Tensor-parallel state as a value that layers are given: rank, size, and the collectives between ranks."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist

from bridge.errors import ConfigError, PeerLost
from bridge.protocol.deadline import Deadline


class Parallel:
    """One rank's view of its tensor-parallel group. Of size 1 it holds no process group and its collectives are free.

    The group is the engine's own, never the default group: the trainer may have one in the same process.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout_s: float = 120.0) -> None:
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self._group: Any = None  # a ProcessGroupGloo; torch's stubs lack it
        self._deadline: Deadline | None = None
        self._begun = self._ended = 0

    @property
    def collectives(self) -> tuple[int, int]:
        """Counts of the collectives that this rank has begun and ended since it joined its group. Ranks are in step
        between two jobs when these numbers are equal in all of them."""
        return self._begun, self._ended

    def connect(self, store_path: str) -> None:
        """Join the group through a file that all ranks share. Blocks until all have; raises PeerLost. *(all ranks)*"""
        timeout = datetime.timedelta(seconds=self.timeout_s)
        c10d: Any = dist
        gloo = c10d.ProcessGroupGloo
        options = gloo._Options()
        # Loopback only: the ranks are one machine's, and gloo's sockets are not authenticated.
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        try:
            store = c10d.FileStore(store_path, self.size)
            store.set_timeout(timeout)
            self._group = gloo(store, self.rank, self.size, options)
            # The file is gone after this returns, so every rank has to have met every other one by then.
            self._group.barrier().wait(timeout)
        except RuntimeError as error:
            what = "the ranks could not form a group"
            remedy = "see the log for the rank's own error; raise timeout_s if it is slow"
            raise PeerLost(
                what, where=f"rank {self.rank}", expected=f"{self.size} ranks that meet", got=str(error), remedy=remedy
            ) from error

    @contextmanager
    def until(self, deadline: Deadline) -> Iterator[None]:
        """Bound every collective inside by `deadline` as well as by the timeout."""
        before, self._deadline = self._deadline, deadline
        try:
            yield
        finally:
            self._deadline = before

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place where `x` is contiguous. *(collective)*"""
        if self._group is None:
            return x
        x = x.contiguous()
        self._begun += 1
        self._wait(self._group.allreduce([x]), "all_reduce")
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate equal pieces of all ranks along `dim`. *(collective)*"""
        if self._group is None:
            return x
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._begun += 1
        self._wait(self._group.allgather([parts], [x]), "all_gather")
        return torch.cat(parts, dim)

    def _wait(self, work: dist.Work, what: str) -> None:
        limit = self.timeout_s if self._deadline is None else min(self.timeout_s, self._deadline.remaining_s)
        try:
            work.wait(datetime.timedelta(seconds=max(limit, 0.001)))
        except RuntimeError as error:
            where = f"{what} on rank {self.rank} of {self.size}"
            remedy = "restart the engine; a rank has ended or hangs"
            raise PeerLost(
                "a collective failed",
                where=where,
                expected="an answer of every rank",
                got=str(error)[:200],
                remedy=remedy,
            ) from error
        self._ended += 1


def divide(total: int, parts: int, what: str) -> int:
    """Return `total / parts`. Raises ConfigError, naming `what`, when it does not divide."""
    if total % parts:
        raise ConfigError(
            f"{what} cannot be divided over the tensor-parallel ranks",
            where="tensor_parallel_size",
            expected=f"a multiple of {parts}",
            got=str(total),
            remedy="choose another tensor_parallel_size",
        )
    return total // parts
