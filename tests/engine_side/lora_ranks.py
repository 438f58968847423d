"""Tensor-parallel ranks as threads of one process, for tests of sharded LoRA layers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from engine_side.embedded.parallel import Parallel

T = TypeVar("T")


class Room:
    """Where the threads of one group meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.given: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadRank(Parallel):
    """One rank. `calls` counts its collectives."""

    def __init__(self, rank: int, room: Room) -> None:
        super().__init__(rank, room.size)
        self.room = room
        self.calls = 0

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.calls += 1
        self.room.given[self.rank] = x.clone()
        self.room.barrier.wait()
        found = list(self.room.given)
        self.room.barrier.wait()
        return found

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim)


def on_ranks(size: int, work: Callable[[Parallel], T]) -> list[T]:
    """`work` on every rank at the same time; one rank runs in this thread, without collectives."""
    if size == 1:
        return [work(Parallel())]
    room = Room(size)

    def run(rank: int) -> T:
        try:
            return work(ThreadRank(rank, room))
        except BaseException:
            room.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
