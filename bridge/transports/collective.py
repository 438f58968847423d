"""Replication over torch.distributed: gloo, nccl, rccl.

Control goes through the store, bytes through a process group of our own (never the default one). A round n:

1. source posts its offer (manifest, version, digests);
2. each receiver answers ready, or refuses with the reason;
3. when all are ready the source posts go, else it calls the round off;
4. all take part in the same broadcasts, chunk by chunk, straight from and into the arenas;
5. each receiver digests what lies in its arena now, seals it and acknowledges.

So a late or unwilling receiver costs a wait on the store and no more. It must not cost more: a group in which one
collective timed out is broken for good, and a collective that succeeded on one rank may have failed on another (both
seen with gloo). Hence the acknowledgements, and hence a group that is formed, and used, only when all ranks are there.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from bridge.errors import (
    BridgeError,
    Closed,
    ConfigError,
    DeadlineExceeded,
    ProtocolError,
    TransportError,
)
from bridge.model.regions import cut
from bridge.protocol.codec import Count, ErrorInfo, Message, pack, unpack
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import DIGEST_NBYTES, Arena, Seal
from bridge.shm.seal import digest_slot, require_equal, root_digest
from bridge.transports import Transport, torch_errors

CHUNK_NBYTES = 16 << 20
"""Bytes per broadcast; several are under way at once."""
_WINDOW = 4
_GRACE = timedelta(milliseconds=50)
"""Added to torch's timeouts, so that our own deadline has passed when they fire."""
_POLL_S = 100e-6

Store = Any
"""A torch.distributed store; torch's own annotations neither export it nor let it hold bytes."""
MakeGroup = Callable[[Store, int, int, timedelta], Any]


class Offer(Message, tag=True, frozen=True):
    """The source announces a version; `root` covers `digests` (8 bytes per tensor) and the manifest."""

    manifest: bytes
    nbytes: Count
    chunk: Count
    version: Count
    root: bytes
    digests: bytes


class Ready(Message, tag=True, frozen=True):
    """A receiver accepts the offer, or, as an acknowledgement, holds the version sealed."""


class Refusal(Message, tag=True, frozen=True):
    """A receiver refuses, with the reason."""

    error: ErrorInfo


class Go(Message, tag=True, frozen=True):
    """All receivers are ready: the broadcasts begin."""


class CalledOff(Message, tag=True, frozen=True):
    """The source ends this round before any byte was sent; the group is as it was."""

    reason: str


def connect_gloo(store: Store, rank: int, world: int, **options: Any) -> Transport:
    """Connect one end over gloo (CPU); options as CollectiveTransport. GLOO_SOCKET_IFNAME chooses the interface."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError(
            "this transport is not available",
            where="gloo",
            expected="a torch with gloo",
            got="torch was built without gloo",
            remedy="install a build of torch with gloo",
        )
    return CollectiveTransport(store, rank, world, _gloo_group, **options)


def connect_nccl(store: Store, rank: int, world: int, **options: Any) -> Transport:
    """Connect one end over NCCL; needs a CUDA device per rank, `device` or else the current one."""
    return _connect_device("nccl", torch.version.cuda, store, rank, world, **options)


def connect_rccl(store: Store, rank: int, world: int, **options: Any) -> Transport:
    """Connect one end over RCCL, which ROCm builds of torch offer in NCCL's place."""
    return _connect_device("rccl", torch.version.hip, store, rank, world, **options)


def _connect_device(name: str, built_for: str | None, store: Store, rank: int, world: int, **options: Any) -> Transport:
    reason = None
    if built_for is None:
        reason = f"this torch ({torch.__version__}) was not built for it"
    elif not dist.is_nccl_available():
        reason = "torch was built without it"
    elif not torch.cuda.is_available():
        reason = "no device is visible"
    if reason is not None:
        raise ConfigError(
            "this transport is not available", where=name, expected="a torch that has it", got=reason, remedy="use gloo"
        )
    device = options.pop("device", None) or torch.device("cuda", torch.cuda.current_device())
    return CollectiveTransport(store, rank, world, _nccl_group, device=device, **options)


def _gloo_group(store: Store, rank: int, world: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, world, timeout)


def _nccl_group(store: Store, rank: int, world: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world, options)


class CollectiveTransport:
    """One rank of a group. Rank `source` sends, all others receive.

    Args:
        store: a torch store that outlives all ranks (hosted by the daemon); this rank uses a connection of its own.
        rank, world: this rank and how many there are, at least 2.
        make_group: builds the process group over (store, rank, world, timeout), called in the first round.
        source: the rank that sends.
        epoch: raised for every new group on the same store; ranks of different epochs never meet.
        chunk_nbytes: bytes per broadcast, as the source has it.
        threads: threads of the receiver's digest pass.
        device: device on which chunks are staged; None for a group that moves CPU memory.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        make_group: MakeGroup,
        *,
        source: int = 0,
        epoch: int = 0,
        chunk_nbytes: int = CHUNK_NBYTES,
        threads: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if world < 2 or not 0 <= rank < world or not 0 <= source < world or chunk_nbytes < 1:
            raise ConfigError(
                "a transport needs a source and a receiver",
                where="a transport",
                expected="at least 2 ranks, numbered from 0",
                got=f"rank {rank} of {world}, source {source}",
                remedy="number the ranks from 0 and name one of them as the source",
            )
        self.rank = rank
        self.source = source
        self.receivers = tuple(r for r in range(world) if r != source)
        self._world = world
        self._make_group = make_group
        self._store: Store = PrefixStore(f"weighbridge/{epoch}", store.clone())
        self._chunk = chunk_nbytes
        self._threads = threads
        self._device = device
        self._group: Any = None
        self._round = 0
        self._ended: str | None = None

    # ---- the source --------------------------------------------------------------------------------------------------

    def send(self, arena: Arena, slot: int, deadline: Deadline) -> None:
        """*(source)* Replicate a sealed slot; see Transport.send."""
        self._require(sends=True)
        seal = arena.seal_of(slot)
        if seal is None:
            raise ProtocolError(
                "only a sealed version is sent",
                where=f"slot {slot} of {arena.path.name}",
                expected="a sealed slot",
                got="an open one",
                remedy="seal the slot first",
            )
        self._round += 1
        manifest = arena.manifest
        self._post("offer", Offer(manifest.digest, manifest.nbytes, self._chunk, seal.version, seal.root, seal.digests))
        try:
            self._collect("ready", deadline)
        except BridgeError as error:
            self._call_off(str(error))
            raise
        self._post("go", Go())
        self._stream(arena.flat_tensor(slot), self._chunk, deadline)
        self._collect("sealed", deadline)
        self._forget_round()

    def _collect(self, step: str, deadline: Deadline) -> None:
        """Wait for every receiver's answer; raises the first refusal, or DeadlineExceeded naming the silent ranks."""
        for receiver in self.receivers:
            try:
                answer = self._await(f"{step}/{receiver}", Ready | Refusal, deadline)
            except DeadlineExceeded as error:
                silent = [r for r in self.receivers if not self._store.check([self._key(f"{step}/{r}")])]
                raise DeadlineExceeded(
                    "receivers did not answer in time",
                    where=f"ranks {', '.join(map(str, silent))}",
                    expected=step,
                    got="no answer",
                    remedy=error.remedy,
                ) from error
            if isinstance(answer, Refusal):
                place = ", ".join(filter(None, (f"receiver {receiver}", answer.error.where)))
                raise msgspec.structs.replace(answer.error, where=place).rebuild()

    def _call_off(self, reason: str) -> None:
        # Under both keys: `go` for receivers that wait for it, `offer` for receivers that come only now.
        for step in ("go", "offer"):
            self._post(step, CalledOff(reason))

    def _forget_round(self) -> None:
        keys = ["offer", "go", *(f"{step}/{r}" for step in ("ready", "sealed") for r in self.receivers)]
        with torch_errors("forgetting a round", Deadline.after(1)):
            for key in keys:
                self._store.delete_key(self._key(key))

    # ---- the receivers -----------------------------------------------------------------------------------------------

    def receive(self, arena: Arena, slot: int, deadline: Deadline) -> int:
        """*(receiver)* Receive the next version; see Transport.receive."""
        self._require(sends=False)
        offer = self._next_offer(deadline)
        try:
            _check_offer(offer, arena)
        except BridgeError as error:
            self._answer("ready", error)
            raise
        self._answer("ready")
        go = self._await("go", Go | CalledOff, deadline)
        if isinstance(go, CalledOff):
            raise TransportError(
                "the source called this transfer off",
                where="a transfer",
                expected="a version from the source",
                got=go.reason,
                remedy="mend what the source says, then transfer again",
            )
        arena.begin(slot)
        try:
            self._stream(arena.flat_tensor(slot), offer.chunk, deadline)
            # Engines will load the bytes in the arena, so these are digested, not those on the wire.
            got = digest_slot(arena, slot, self._threads)
            require_equal(arena.manifest, offer.digests, got, f"slot {slot} of {arena.path.name}")
        except BridgeError as error:
            # The source may have sent all its bytes and wait for this answer alone.
            with contextlib.suppress(TransportError):
                self._answer("sealed", error)
            raise
        arena.seal(slot, Seal(offer.version, offer.root, offer.digests))
        self._answer("sealed")
        return offer.version

    def _next_offer(self, deadline: Deadline) -> Offer:
        while True:
            self._round += 1
            try:
                offer = self._await("offer", Offer | CalledOff, deadline)
            except TransportError:
                self._round -= 1
                raise
            if isinstance(offer, Offer):
                return offer

    def _answer(self, step: str, error: BridgeError | None = None) -> None:
        self._post(f"{step}/{self.rank}", Ready() if error is None else Refusal(ErrorInfo.of(error)))

    # ---- bytes -------------------------------------------------------------------------------------------------------

    def _stream(self, flat: torch.Tensor, chunk: int, deadline: Deadline) -> None:
        pending: deque[Callable[[], None]] = deque()
        try:
            with torch_errors("a transfer", deadline):
                if self._group is None:
                    timeout = timedelta(seconds=deadline.remaining_s) + _GRACE
                    store = PrefixStore("group", self._store)
                    self._group = self._make_group(store, self.rank, self._world, timeout)
                for start, end in cut(flat.numel(), chunk):
                    if len(pending) == _WINDOW:
                        pending.popleft()()
                    deadline.check("a transfer")
                    pending.append(self._broadcast(flat[start:end], deadline))
                while pending:
                    pending.popleft()()
        except BaseException as error:
            self._end(f"an earlier transfer failed: {error}")
            _drain(pending)
            raise

    def _broadcast(self, piece: torch.Tensor, deadline: Deadline) -> Callable[[], None]:
        """Start one broadcast; returns the function that finishes it: waits, and copies a staged chunk back."""
        wire = piece if self._device is None else torch.empty_like(piece, device=self._device)
        if wire is not piece and self.rank == self.source:
            wire.copy_(piece)
        options = dist.BroadcastOptions()
        options.rootRank = self.source
        options.rootTensor = 0
        options.timeout = timedelta(seconds=deadline.remaining_s) + _GRACE
        options.asyncOp = True
        work = self._group.broadcast([wire], options)

        def finish() -> None:
            if wire is piece:
                work.wait()
                return
            # Waiting for a device's collective only orders streams; the copy behind it would then block for ever.
            while not work.is_completed():
                deadline.check("a transfer")
                time.sleep(_POLL_S)
            work.wait()
            if self.rank != self.source:
                piece.copy_(wire)

        return finish

    # ---- store and life ----------------------------------------------------------------------------------------------

    def _key(self, step: str) -> str:
        return f"{self._round}/{step}"

    def _post(self, step: str, message: Message) -> None:
        with torch_errors("posting to the store", Deadline.after(60)):
            self._store.set(self._key(step), pack(message))

    def _await(self, step: str, kind: Any, deadline: Deadline) -> Any:
        key = self._key(step)
        with torch_errors(f"waiting for {step!r} of round {self._round}", deadline):
            # A timeout of zero means none to some stores.
            self._store.wait([key], timedelta(seconds=deadline.remaining_s) + timedelta(milliseconds=1))
            return unpack(self._store.get(key), kind)

    def _require(self, *, sends: bool) -> None:
        if self._ended is not None:
            raise Closed(
                "this transport has ended",
                where="a transport",
                expected="one that is open",
                got=self._ended,
                remedy="make a new group with a higher epoch",
            )
        if sends != (self.rank == self.source):
            raise ProtocolError(
                "only the source sends",
                where="a transport",
                expected=f"rank {self.source}",
                got=f"rank {self.rank}",
                remedy="call send at the source and receive at the others",
            )

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        group, self._group = self._group, None
        if group is not None:
            # Ends operations under way, so that none reads or writes an arena after we have returned.
            group.abort()

    def close(self) -> None:
        """Leave the group. Idempotent; never waits for a peer."""
        self._end("it was closed")


def _drain(pending: Iterable[Callable[[], None]]) -> None:
    """Wait for operations of an ended group: each fails at once or at its own timeout, which is the deadline."""
    for finish in pending:
        try:
            finish()
        except (RuntimeError, TransportError):
            continue


def _check_offer(offer: Offer, arena: Arena) -> None:
    if not arena.writable:
        raise ProtocolError(
            "a receiver needs a writable arena",
            where=arena.path.name,
            expected="writable=True",
            got="a read-only arena",
            remedy="open it with writable=True",
        )
    manifest = arena.manifest
    if offer.manifest != manifest.digest or offer.nbytes != manifest.nbytes or offer.chunk < 1:
        raise ProtocolError(
            "the source sends another manifest", where=arena.path.name,
            expected=f"{manifest.digest.hex()}, {manifest.nbytes} bytes",
            got=f"{offer.manifest.hex()}, {offer.nbytes} bytes", remedy="make both arenas from one manifest",
        )  # fmt: skip
    whole = len(offer.digests) == DIGEST_NBYTES * len(manifest.tensors)
    if not whole or root_digest(manifest, offer.digests) != offer.root:
        raise ProtocolError(
            "the offered digests are not those of their root",
            where="the source's offer",
            expected="the digest of its digests",
            got=offer.root.hex()[:64],
            remedy="transfer again; the source was damaged or another writer is at work",
        )
