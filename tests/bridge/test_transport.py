"""One contract for every transport, run with real processes: a source and two receivers, each with its own arena."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore

from bridge import transports
from bridge.errors import Closed, ConfigError, DeadlineExceeded, PeerLost, ProtocolError, TransportError
from bridge.model.manifest import Manifest, TensorInfo, lay_out
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena
from bridge.transports import TRANSPORTS, connect, torch_errors

WORKER = Path(__file__).with_name("transport_worker.py")
CHUNK = 64 << 10
MANIFEST = lay_out(
    [
        TensorInfo("emb", "bf16", (1000, 128)),
        TensorInfo("scalar", "fp32", ()),
        TensorInfo("empty", "fp32", (0, 3)),
        *(TensorInfo(f"w.{i}", "fp32", (64, 65)) for i in range(40)),
    ]
)
OTHER = lay_out([TensorInfo("emb", "bf16", (1000, 128))])
EMPTY = lay_out([TensorInfo("empty", "fp32", (0, 3))])


class Rank:
    """One worker process; `ask` waits for its answer, `begin` gives a future of it."""

    def __init__(self, port: int, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(port), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._pool = ThreadPoolExecutor(1)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            self.process.wait(20)
            return {"died": self.process.returncode, "stderr": self.process.stderr.read()}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def begin(self, do: str, **options: Any) -> Future[dict[str, Any]]:
        def run() -> dict[str, Any]:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
            self.process.stdin.flush()
            return self._line()

        return self._pool.submit(run)

    def ask(self, do: str, **options: Any) -> Any:
        answer = self.begin(do, **options).result(60)
        assert "value" in answer, answer
        return answer["value"]

    def end(self) -> None:
        self.process.kill()
        self._pool.shutdown()
        self.process.communicate(timeout=20)


Group = Callable[..., list[Rank]]


def usable() -> list[str]:
    """The transports that can run between processes of this machine; the others are asked for their reason below."""
    names = []
    for name in TRANSPORTS:
        with contextlib.suppress(ConfigError):
            connect(name, HashStore(), 0, 2)
            names.append(name)
    return names


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], list[Rank]]]:
    """Worker processes that tests share, and the store, which lives here as it would in the daemon."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    folder = tmp_path_factory.mktemp("arenas")
    ranks: list[Rank] = []

    def take(count: int) -> list[Rank]:
        for rank in [r for r in ranks if not r.alive]:
            ranks.remove(rank)
            rank.end()
        ranks.extend(Rank(store.port, folder) for _ in range(count - len(ranks)))
        return ranks[:count]

    yield take
    for rank in ranks:
        rank.end()


_epochs = itertools.count()


@pytest.fixture(params=usable())
def group(request: pytest.FixtureRequest, pool: Callable[[int], list[Rank]]) -> Group:
    """Connects worker processes as a new group: rank 0 is the source."""

    def make(world: int = 3, manifests: dict[int, Manifest] | None = None) -> list[Rank]:
        ranks, epoch = pool(world), next(_epochs)
        answers = [
            worker.begin(
                "connect", transport=request.param, rank=rank, world=world, epoch=epoch,
                manifest=msgspec.to_builtins((manifests or {}).get(rank, MANIFEST)), options={"chunk_nbytes": CHUNK},
            )
            for rank, worker in enumerate(ranks)
        ]  # fmt: skip
        for answer in answers:
            assert "value" in answer.result(60), answer.result()
        return ranks

    return make


def transfer(source: Rank, receivers: list[Rank], slot: int = 0, into: int = 0, timeout_s: float = 20) -> None:
    waiting = [receiver.begin("receive", slot=into, timeout_s=timeout_s) for receiver in receivers]
    source.ask("send", slot=slot, timeout_s=timeout_s)
    version = source.ask("sealed", slot=slot)
    assert [answer.result(30).get("value") for answer in waiting] == [version] * len(receivers)
    root = source.ask("check", slot=slot)
    assert [receiver.ask("check", slot=into) for receiver in receivers] == [root] * len(receivers)


def test_versions_arrive_whole_and_sealed_one_after_the_other(group: Group) -> None:
    source, *receivers = group()
    for version, slot, into in ((1, 0, 1), (2, 1, 0), (7, 0, 0)):
        source.ask("fill", slot=slot, seed=version)
        transfer(source, receivers, slot, into)


def test_a_late_receiver_gets_the_version(group: Group) -> None:
    source, early, late = group()
    source.ask("fill", slot=0, seed=1)
    sending = source.begin("send", slot=0, timeout_s=30)
    first = early.begin("receive", slot=0, timeout_s=30)
    with pytest.raises(TimeoutError):
        sending.result(0.7)
    assert late.ask("receive", slot=0, timeout_s=30) == 1
    assert first.result(30)["value"] == 1
    assert "value" in sending.result(30)


def test_a_receiver_that_never_comes_is_named_and_the_group_lives(group: Group) -> None:
    source, early, late = group()
    source.ask("fill", slot=0, seed=1)
    early.ask("fill", slot=0, seed=99)
    first = early.begin("receive", slot=0, timeout_s=20)
    failed = source.begin("send", slot=0, timeout_s=0.5).result(30)
    assert failed["error"] == "DeadlineExceeded"
    assert failed["where"] == "ranks 2"
    assert 0.4 < failed["took_s"] < 5
    called_off = first.result(30)
    assert called_off["error"] == "TransportError"
    assert "ranks 2" in called_off["text"]
    assert early.ask("sealed", slot=0) == 99, "nothing was written before everybody was there"
    # the one that came too late does not take the old offer for the new one
    source.ask("fill", slot=0, seed=2)
    transfer(source, [early, late])


def test_a_receiver_without_a_source_gives_up_in_time(group: Group) -> None:
    source, *receivers = group()
    receivers[0].ask("fill", slot=0, seed=5)
    failed = receivers[0].begin("receive", slot=0, timeout_s=0.3).result(30)
    assert failed["error"] == "DeadlineExceeded"
    assert failed["took_s"] < 5
    assert receivers[0].ask("sealed", slot=0) == 5
    source.ask("fill", slot=0, seed=6)
    transfer(source, receivers)


def test_a_corrupt_byte_is_refused_by_name_and_never_sealed(group: Group) -> None:
    source, *receivers = group()
    source.ask("fill", slot=0, seed=1)
    source.ask("corrupt", at=MANIFEST.by_name["w.17"].offset + 5)
    waiting = [receiver.begin("receive", slot=0, timeout_s=20) for receiver in receivers]
    failed = source.begin("send", slot=0, timeout_s=20).result(30)
    for answer in (failed, *(w.result(30) for w in waiting)):
        assert answer["error"] == "DigestMismatch"
        assert answer["names"] == ["w.17"]
    assert "receiver 1" in failed["where"]
    assert [receiver.ask("sealed", slot=0) for receiver in receivers] == [None, None]
    assert source.ask("check", slot=0)


@pytest.mark.parametrize("fault", ["drop", "repeat"])
def test_a_lost_or_misplaced_chunk_is_refused(group: Group, fault: str) -> None:
    source, good, bad = group()
    source.ask("fill", slot=0, seed=1)
    bad.ask("fill", slot=0, seed=2)
    bad.ask("fault", kind=fault, at=3)
    waiting = [receiver.begin("receive", slot=0, timeout_s=20) for receiver in (good, bad)]
    failed = source.begin("send", slot=0, timeout_s=20).result(30)
    assert failed["error"] == "DigestMismatch"
    assert "receiver 2" in failed["where"]
    assert waiting[0].result(30)["value"] == 1
    assert waiting[1].result(30)["error"] == "DigestMismatch"
    assert bad.ask("sealed", slot=0) is None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_ends_the_transfer_and_survivors_go_on_in_a_new_group(group: Group, victim: int) -> None:
    ranks = group()
    ranks[0].ask("fill", slot=0, seed=1)
    ranks[victim].ask("fault", kind="kill", at=4)
    calls = [rank.begin("receive", slot=0, timeout_s=6) for rank in ranks[1:]]
    calls.insert(0, ranks[0].begin("send", slot=0, timeout_s=6))
    answers = [call.result(40) for call in calls]
    assert answers[victim]["died"] == -signal.SIGKILL
    for rank, answer in enumerate(answers):
        if rank != victim:
            assert answer["error"] in ("PeerLost", "DeadlineExceeded"), answer
            assert answer["took_s"] < 9
    survivors = [rank for i, rank in enumerate(ranks) if i not in (0, victim)]
    assert [rank.ask("sealed", slot=0) for rank in survivors] == [None] * len(survivors)
    # the old group says so instead of hanging
    again = survivors[0].begin("receive", slot=0, timeout_s=5).result(30)
    assert again["error"] == "Closed"
    fresh_source, *fresh = group(2)
    fresh_source.ask("fill", slot=0, seed=3)
    transfer(fresh_source, fresh)


def test_a_stalled_receiver_costs_the_deadline_and_no_more(group: Group) -> None:
    source, good, stalled = group()
    source.ask("fill", slot=0, seed=1)
    stalled.ask("fault", kind="stop", at=2)
    waiting = good.begin("receive", slot=0, timeout_s=2)
    stopped = stalled.begin("receive", slot=0, timeout_s=2)
    failed = source.begin("send", slot=0, timeout_s=2).result(30)
    assert failed["error"] in ("DeadlineExceeded", "PeerLost")
    assert failed["took_s"] < 6
    assert waiting.result(30)["took_s"] < 6
    os.kill(stalled.process.pid, signal.SIGCONT)
    assert stopped.result(30)["error"] in ("DeadlineExceeded", "PeerLost")
    assert stalled.ask("sealed", slot=0) is None
    if "value" in waiting.result(30):
        assert good.ask("check", slot=0) == source.ask("check", slot=0)
    else:
        assert good.ask("sealed", slot=0) is None


def test_another_manifest_is_refused_before_a_byte_moves(group: Group) -> None:
    source, good, other = group(manifests={2: OTHER})
    source.ask("fill", slot=0, seed=1)
    for rank in (good, other):
        rank.ask("fill", slot=0, seed=9)
    waiting = [rank.begin("receive", slot=0, timeout_s=20) for rank in (good, other)]
    failed = source.begin("send", slot=0, timeout_s=20).result(30)
    assert failed["error"] == "ProtocolError"
    assert failed["where"].startswith("receiver 2")
    assert waiting[0].result(30)["error"] == "TransportError"
    assert waiting[1].result(30)["error"] == "ProtocolError"
    assert good.ask("sealed", slot=0) == other.ask("sealed", slot=0) == 9


def test_an_unsealed_slot_is_not_sent(group: Group) -> None:
    source, receiver = group(2)
    source.ask("fill", slot=0, seed=1)
    source.ask("unseal", slot=0)
    assert source.begin("send", slot=0, timeout_s=5).result(30)["error"] == "ProtocolError"
    source.ask("fill", slot=0, seed=2)
    transfer(source, [receiver])


def test_a_version_without_bytes_arrives(group: Group) -> None:
    source, receiver = group(2, manifests={0: EMPTY, 1: EMPTY})
    source.ask("fill", slot=0, seed=4)
    transfer(source, [receiver])


def test_roles_and_the_end(group: Group) -> None:
    source, receiver = group(2)
    source.ask("fill", slot=0, seed=1)
    assert source.begin("receive", slot=0, timeout_s=5).result(30)["error"] == "ProtocolError"
    assert receiver.begin("send", slot=0, timeout_s=5).result(30)["error"] == "ProtocolError"
    transfer(source, [receiver])
    for rank in (source, receiver):
        rank.ask("close")
        rank.ask("close")
    assert source.begin("send", slot=0, timeout_s=5).result(30)["error"] == "Closed"


def test_a_store_whose_host_died_is_a_lost_peer(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom torch.distributed import TCPStore\n"
        "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\nsys.stdin.read()\n"
    )
    host = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert host.stdout is not None
    store = TCPStore("127.0.0.1", int(host.stdout.readline()), is_master=False, timeout=timedelta(seconds=20))
    with Arena.create(MANIFEST, name="x", directory=tmp_path) as arena:
        transport = connect("gloo", store, 1, 2)
        host.kill()
        host.communicate(timeout=20)
        with pytest.raises(PeerLost) as caught:
            transport.receive(arena, 0, Deadline.after(20))
        assert isinstance(caught.value.__cause__, RuntimeError)


# ---- without processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "seconds", "expected"),
    [
        (RuntimeError, 60, PeerLost),
        (RuntimeError, -1, DeadlineExceeded),
        ("DistStoreError", -1, DeadlineExceeded),
        ("DistNetworkError", 60, PeerLost),
        ("DistBackendError", 60, PeerLost),
        (OSError, 60, TransportError),
    ],
)
def test_torch_errors_become_ours(kind: Any, seconds: float, expected: type[TransportError]) -> None:
    cls = kind if isinstance(kind, type) else {n: vars(dist)[n] for n in dir(dist) if n.startswith("Dist")}[kind]
    with pytest.raises(expected) as caught, torch_errors("a transfer", Deadline.after(seconds)):
        raise cls("Connection closed by peer\nstack")
    assert type(caught.value) is expected
    assert isinstance(caught.value.__cause__, cls)
    assert "a transfer" in str(caught.value)


def test_our_own_errors_pass_unchanged() -> None:
    with pytest.raises(ProtocolError), torch_errors("x", Deadline.after(1)):
        raise ProtocolError("mine")


def test_a_transport_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"gone": "bridge.transports.nowhere:connect", "typo": "bridge.transports.collective:no"}
    monkeypatch.setattr(transports, "TRANSPORTS", {**TRANSPORTS, **broken})
    for name, reason in (("gone", "nowhere"), ("typo", "no")):
        with pytest.raises(ConfigError, match=reason):
            connect(name)
    with pytest.raises(ConfigError, match="gloo"):
        connect("carrier-pigeon")


@pytest.mark.parametrize("name", sorted(set(TRANSPORTS) - set(usable())))
def test_a_backend_that_torch_lacks_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=r"torch|device"):
        connect(name, HashStore(), 0, 2)


@pytest.mark.parametrize(("rank", "world", "source"), [(0, 1, 0), (2, 2, 0), (-1, 2, 0), (0, 2, 2)])
def test_a_group_of_no_sense_is_refused(rank: int, world: int, source: int) -> None:
    with pytest.raises(ConfigError):
        connect("gloo", HashStore(), rank, world, source=source)


def test_a_closed_end_refuses_without_waiting(tmp_path: Path) -> None:
    transport = connect("gloo", HashStore(), 1, 2)
    transport.close()
    with Arena.create(EMPTY, name="x", directory=tmp_path) as arena, pytest.raises(Closed):
        transport.receive(arena, 0, Deadline.after(60))


def test_importing_the_registry_imports_no_backend() -> None:
    code = "import sys, bridge.transports\nprint('bridge.transports.collective' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
