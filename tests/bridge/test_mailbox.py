from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.errors import ArenaFull, Closed, ConfigError, DeadlineExceeded, NotFound, ProtocolError
from bridge.model.manifest import lay_out
from bridge.protocol.deadline import Deadline
from bridge.shm.arena import Arena
from bridge.shm.mailbox import Mailbox


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Mailbox]:
    with Mailbox.create("test", 3, page_nbytes=8192, directory=tmp_path) as made:
        yield made
    made.unlink()


def test_the_file_is_private_and_sparse(tmp_path: Path) -> None:
    with Mailbox.create("a b", 64, directory=tmp_path) as made:
        info = made.path.stat()
        assert made.path.name.startswith("weighbridge-a-b-")
        assert made.path.name.endswith(".mailbox")
        assert info.st_mode & 0o777 == 0o600
        assert info.st_size > 64 * (8 << 20)
        assert info.st_blocks * 512 < 1 << 20


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 2), st.integers(0, 2**64 - 1), st.binary(max_size=8000))
def test_what_was_posted_is_read(box: Mailbox, rank: int, nonce: int, payload: bytes) -> None:
    with Mailbox.open(box.path) as other:
        other.post(rank, nonce, payload)
    assert box.read(rank, nonce) == payload
    assert box.read(rank, nonce ^ 1) is None


def test_nothing_is_read_before_a_post(box: Mailbox) -> None:
    assert box.read(0, 0) is None


def test_pages_do_not_touch_each_other(box: Mailbox) -> None:
    payloads = [bytes([65 + rank]) * box.capacity for rank in range(3)]
    for rank in (1, 0, 2):
        box.post(rank, 5, payloads[rank])
    assert [box.read(rank, 5) for rank in range(3)] == payloads


def test_a_payload_above_the_page_is_refused_and_changes_nothing(box: Mailbox) -> None:
    box.post(1, 1, b"kept")
    with pytest.raises(ProtocolError, match="rank 1"):
        box.post(1, 2, b"x" * (box.capacity + 1))
    assert box.read(1, 1) == b"kept"


@pytest.mark.parametrize("rank", [-1, 3])
def test_an_unknown_rank_is_refused(box: Mailbox, rank: int) -> None:
    with pytest.raises(ProtocolError, match="no such rank"):
        box.post(rank, 1, b"")
    with pytest.raises(ProtocolError, match="no such rank"):
        box.read(rank, 1)


def test_any_damaged_byte_is_an_error_or_no_answer(box: Mailbox) -> None:
    box.post(2, 9, b"payload")
    start = 4096 + 2 * 8192
    raw = bytearray(box.path.read_bytes())
    refused = 0
    for at in range(start, start + 40 + len(b"payload")):
        with box.path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([raw[at] ^ 0x80]))
        try:
            assert box.read(2, 9) is None
        except ProtocolError:
            refused += 1
        with box.path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([raw[at]]))
    assert box.read(2, 9) == b"payload"
    assert refused >= 8 + 16 + len(b"payload")  # length, digest and payload; another state word or nonce is no answer


def test_a_post_killed_before_its_end_is_no_answer(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of its five writes but the last, neither payload is shown."""
    box.post(0, 1, b"old")
    pwrite = os.pwrite
    for steps in range(1, 5):
        left = [steps]

        def stop(fd: int, data: bytes, at: int, left: list[int] = left) -> int:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return pwrite(fd, data, at)

        with monkeypatch.context() as patch:
            patch.setattr("bridge.shm.mailbox.os.pwrite", stop)
            with pytest.raises(KeyboardInterrupt):
                box.post(0, 2, b"new")
        assert box.read(0, 1) is None
        assert box.read(0, 2) is None
    box.post(0, 2, b"new")
    assert box.read(0, 2) == b"new"


def test_a_full_file_system_is_an_error_in_the_rank_that_posts(box: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes, at: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridge.shm.mailbox.os.pwrite", full)
    with pytest.raises(ArenaFull, match="No space left"):
        box.post(0, 1, b"x")


def test_wait_returns_in_the_order_asked_for(box: Mailbox) -> None:
    def answer() -> None:
        with Mailbox.open(box.path) as other:
            for rank in (2, 0, 1):
                time.sleep(0.02)
                other.post(rank, 77, b"%d" % rank)

    thread = threading.Thread(target=answer)
    thread.start()
    assert box.wait([1, 0, 2], 77, Deadline.after(20)) == [b"1", b"0", b"2"]
    thread.join()


def test_wait_names_the_ranks_that_are_missing(box: Mailbox) -> None:
    box.post(1, 4, b"here")
    box.post(2, 3, b"an older answer")
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="ranks 0, 2 of"):
        box.wait([0, 1, 2], 4, Deadline.after(0.1))
    assert 0.1 <= time.monotonic() - started < 5


def test_wait_takes_answers_that_are_there_when_the_time_is_over(box: Mailbox) -> None:
    box.post(0, 4, b"here")
    assert box.wait([0], 4, Deadline.after(-1)) == [b"here"]


def test_wait_passes_a_damaged_answer_on(box: Mailbox) -> None:
    box.post(0, 4, b"here")
    with box.path.open("r+b") as file:
        file.seek(4096 + 40)
        file.write(b"H")
    with pytest.raises(ProtocolError, match="damaged"):
        box.wait([0], 4, Deadline.after(5))


def test_readers_never_see_half_a_post_of_another_process(box: Mailbox) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bridge.shm.mailbox import Mailbox\n"
        "box = Mailbox.open(Path(sys.argv[1]))\n"
        "for n in range(2000):\n"
        "    box.post(0, n % 2, n.to_bytes(2, 'big') + bytes([n % 251]) * (n * 7 % 8000))\n"
        "    time.sleep(0.05 if n % 100 == 99 else 0)\n"  # so that a reader on a busy machine sees some of them
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(box.path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    while box.read(0, 1) is None and writer.poll() is None:
        time.sleep(0.001)  # it starts
    seen = set()
    while writer.poll() is None:
        payload = box.read(0, 1)
        if payload is not None:
            n = int.from_bytes(payload[:2], "big")
            assert n % 2 == 1
            assert payload[2:] == bytes([n % 251]) * (n * 7 % 8000)
            seen.add(n)
    assert writer.returncode == 0
    assert len(seen) > 1
    assert (box.read(0, 1) or b"")[:2] == (1999).to_bytes(2, "big")


def test_an_arena_is_no_mailbox_and_the_other_way_round(tmp_path: Path, box: Mailbox) -> None:
    manifest = lay_out([])
    with Arena.create(manifest, name="x", directory=tmp_path) as arena, pytest.raises(ProtocolError, match="a mailbox"):
        Mailbox.open(arena.path)
    with pytest.raises(ProtocolError, match="not an arena"):
        Arena.open(box.path, manifest)


def test_a_mailbox_that_is_gone_or_closed(tmp_path: Path, box: Mailbox) -> None:
    with pytest.raises(NotFound):
        Mailbox.open(tmp_path / "weighbridge-x-0000000000000000.mailbox")
    box.close()
    with pytest.raises(Closed):
        box.read(0, 1)


@pytest.mark.parametrize(("ranks", "page"), [(0, 8192), (1, 40), (-1, 8192)])
def test_a_mailbox_without_room_is_refused(tmp_path: Path, ranks: int, page: int) -> None:
    with pytest.raises(ConfigError):
        Mailbox.create("x", ranks, page_nbytes=page, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
