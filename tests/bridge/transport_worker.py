"""One rank of a transport in a process of its own, driven over stdin by `test_transport.py`. Not a test module.

Arguments: store port, folder for arenas. Then one JSON command per line, `connect` first; each is answered by one JSON
line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch.distributed import TCPStore

from bridge.errors import BridgeError
from bridge.model.manifest import Manifest
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena
from bridge.shm.seal import check_slot, digest_slot, seal_slot
from bridge.transports import Transport, connect


class CorruptingSource:
    """A transport whose source sends one byte other than what was sealed."""

    def __init__(self, inner: Transport, at: int) -> None:
        self._inner = inner
        self._at = at

    def send(self, arena: Arena, slot: int, deadline: Deadline) -> None:
        arena.flat(slot)[self._at] ^= 1
        try:
            self._inner.send(arena, slot, deadline)
        finally:
            arena.flat(slot)[self._at] ^= 1

    def receive(self, arena: Arena, slot: int, deadline: Deadline) -> int:
        return self._inner.receive(arena, slot, deadline)

    def close(self) -> None:
        self._inner.close()


class FaultyGroup:
    """A process group that does something to chunk number `at` of the transfer, at this rank only."""

    def __init__(self, inner: Any, fault: str, at: int) -> None:
        self._inner = inner
        self._fault = fault
        self._at = at
        self._count = 0
        self._kept: torch.Tensor | None = None

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        number, self._count = self._count, self._count + 1
        (tensor,) = tensors
        if self._fault == "drop" and number == self._at:
            tensor = torch.empty_like(tensor)
        if self._fault == "repeat" and number == self._at + 1 and self._kept is not None:
            tensor = self._kept
        if self._fault == "kill" and number == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "stop" and number == self._at:
            os.kill(os.getpid(), signal.SIGSTOP)
        self._kept = tensors[0] if number == self._at else self._kept
        return self._inner.broadcast([tensor], options)

    def abort(self) -> None:
        self._inner.abort()


def filled(arena: Arena, slot: int, seed: int) -> None:
    """Every byte of a slot from a seed, sealed under the seed as its version."""
    arena.begin(slot)
    arena.flat(slot)[:] = np.random.default_rng(seed).integers(0, 256, arena.manifest.nbytes, dtype=np.uint8)
    seal_slot(arena, slot, seed, digest_slot(arena, slot))


class Worker:
    """The commands. `connect` may come again: processes are dear, so tests share them."""

    transport: Transport
    arena: Arena

    def __init__(self, store: TCPStore, folder: Path) -> None:
        self._store = store
        self._folder = folder

    def connect(
        self, transport: str, rank: int, world: int, epoch: int, manifest: dict[str, Any], options: dict[str, Any]
    ) -> None:
        if hasattr(self, "transport"):
            self.transport.close()
            self.arena.close()
        shape = msgspec.convert(manifest, Manifest)
        self.arena = Arena.create(shape, name=f"rank{rank}", directory=self._folder)
        self.arena.unlink()
        self.transport = connect(transport, self._store, rank, world, epoch=epoch, **options)

    def fill(self, slot: int, seed: int) -> int:
        filled(self.arena, slot, seed)
        return seed

    def unseal(self, slot: int) -> None:
        self.arena.begin(slot)

    def send(self, slot: int, timeout_s: float) -> None:
        self.transport.send(self.arena, slot, Deadline.after(timeout_s))

    def receive(self, slot: int, timeout_s: float) -> int:
        return self.transport.receive(self.arena, slot, Deadline.after(timeout_s))

    def check(self, slot: int) -> str:
        return check_slot(self.arena, slot).root.hex()

    def sealed(self, slot: int) -> int | None:
        seal = self.arena.seal_of(slot)
        return None if seal is None else seal.version

    def corrupt(self, at: int) -> None:
        self.transport = CorruptingSource(self.transport, at)

    def fault(self, kind: str, at: int) -> None:
        collective: Any = self.transport
        make: Callable[..., Any] = collective._make_group
        collective._make_group = lambda *args: FaultyGroup(make(*args), kind, at)

    def close(self) -> None:
        self.transport.close()


def main() -> None:
    port, folder = sys.argv[1:]
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=60))
    worker = Worker(store, Path(folder))
    for line in sys.stdin:
        command = json.loads(line)
        started = time.monotonic()
        try:
            answer: dict[str, Any] = {"value": getattr(worker, command.pop("do"))(**command)}
        except BridgeError as error:
            answer = {
                "error": type(error).__name__, "text": str(error), "where": error.where, "names": error.names,
                "cause": type(error.__cause__).__name__,
            }  # fmt: skip
        print(json.dumps({**answer, "took_s": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
