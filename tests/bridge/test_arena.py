from __future__ import annotations

import dataclasses
import fcntl
import gc
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import ArenaFull, Closed, ConfigError, NotFound, ProtocolError
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.torch_dtypes import DTYPES
from bridge.shm import arena as arena_module
from bridge.shm import files
from bridge.shm.arena import Arena, Seal, file_nbytes
from bridge.shm.mailbox import Mailbox

MANIFEST = lay_out(
    [
        TensorInfo("matrix", "bf16", (3, 5)),
        TensorInfo("scalar", "fp32", ()),
        TensorInfo("empty", "fp16", (0, 4)),
        *(TensorInfo(f"of.{name}", name, (7,)) for name in DTYPES),
        TensorInfo("tail", "uint8", (0,)),
    ]
)
SEAL = Seal(7, bytes(range(16)), bytes(range(8)) * len(MANIFEST.tensors))


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    with Arena.create(MANIFEST, name="test", directory=tmp_path) as made:
        yield made
    made.unlink()


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_private_and_its_name_cannot_be_guessed(tmp_path: Path, arena: Arena) -> None:
    other = Arena.create(MANIFEST, name="test", directory=tmp_path)
    assert re.fullmatch(r"weighbridge-test-[0-9a-f]{16}\.data", arena.path.name)
    assert arena.path != other.path
    info = arena.path.stat()
    assert info.st_mode & 0o777 == 0o600
    assert info.st_size == arena.nbytes == file_nbytes(MANIFEST, 2)
    other.close()
    other.unlink()


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o277)
    try:
        with Arena.create(MANIFEST, name="x", directory=tmp_path) as made:
            assert made.path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("name", "expected"), [("a/../b", r"a-..-b"), ("run 1", "run-1"), ("x" * 99, "x" * 48), ("é!n", "n")]
)
def test_a_name_is_made_safe_for_a_file(tmp_path: Path, name: str, expected: str) -> None:
    with Arena.create(MANIFEST, name=name, directory=tmp_path) as made:
        assert made.path.parent == tmp_path
        assert made.path.name[len("weighbridge-") : -len("-0123456789abcdef.data")] == expected
        assert files.FILE_PATTERN.fullmatch(made.path.name)


@pytest.mark.parametrize("name", ["", "/", "..", "-"])
def test_a_name_without_a_letter_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        Arena.create(MANIFEST, name=name, directory=tmp_path)
    assert listed(tmp_path) == []


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHBRIDGE_SHM_DIR", str(tmp_path))
    with Arena.create(MANIFEST, name="test") as made:
        assert made.path.parent == tmp_path


def test_every_dtype_and_shape_round_trips_to_a_reader(arena: Arena) -> None:
    torch.manual_seed(0)
    with Arena.open(arena.path, MANIFEST) as reader:
        assert reader.slots == 2
        for slot in range(2):
            for spec, tensor in zip(MANIFEST.tensors, arena.tensors(slot), strict=True):
                assert tensor.dtype is DTYPES[spec.dtype]
                assert tuple(tensor.shape) == spec.shape
                assert tensor.is_contiguous()
                raw = torch.randint(0, 2 if spec.dtype == "bool" else 256, (spec.nbytes,), dtype=torch.uint8)
                arena.flat_tensor(slot)[spec.offset : spec.offset + spec.nbytes] = raw
        for slot in range(2):
            for spec, mine, theirs in zip(MANIFEST.tensors, arena.tensors(slot), reader.tensors(slot), strict=True):
                assert torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
                again = reader.tensor(slot, spec)
                assert torch.equal(again.reshape(-1).view(torch.uint8), mine.reshape(-1).view(torch.uint8))
            assert bytes(arena.bytes(slot)) == bytes(reader.bytes(slot)) == reader.flat(slot).tobytes()
            assert [bytes(v) for v in reader.views(slot)] == [
                bytes(reader.bytes(slot)[s.offset : s.offset + s.nbytes]) for s in MANIFEST.tensors
            ]
        assert bytes(arena.bytes(0)) != bytes(arena.bytes(1))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)), max_size=6
    ),
    st.integers(1, 3),
)
def test_no_two_tensors_share_a_byte(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, tuple[int, ...]]], slots: int
) -> None:
    manifest = lay_out(TensorInfo(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors))
    folder = tmp_path_factory.mktemp("arena")
    with Arena.create(manifest, name="t", directory=folder, slots=slots) as made:
        seals = [Seal(slot, bytes([slot] * 16), bytes([slot + 1] * 8 * len(tensors))) for slot in range(slots)]
        for slot in range(slots):
            made.seal(slot, seals[slot])
        marks = [(slot, i) for slot in range(slots) for i in range(len(tensors))]
        for number, (slot, i) in enumerate(marks):
            made.flat(slot)[manifest.tensors[i].offset :][: manifest.tensors[i].nbytes] = number + 1
        for number, (slot, i) in enumerate(marks):
            assert set(bytes(made.views(slot)[i])) <= {number + 1}
        assert [made.seal_of(slot) for slot in range(slots)] == seals


def test_seal_begin_and_seal_again(arena: Arena) -> None:
    with Arena.open(arena.path, MANIFEST) as reader:
        assert reader.seal_of(0) is None
        arena.begin(0)
        arena.seal(0, SEAL)
        assert reader.seal_of(0) == SEAL
        assert reader.seal_of(1) is None
        arena.begin(0)
        assert reader.seal_of(0) is None
        arena.seal(0, Seal(8, SEAL.root, SEAL.digests))
        found = reader.seal_of(0)
        assert found is not None
        assert found.version == 8


def _seal_range(arena: Arena) -> tuple[int, int]:
    digests = arena.path.read_bytes().index(SEAL.digests)
    return digests - 48 - 8, digests + len(SEAL.digests)


def _overwrite(arena: Arena, at: int, data: bytes) -> bytes:
    """Another program writes into the file; what was there before."""
    with arena.path.open("r+b") as file:
        file.seek(at)
        before = file.read(len(data))
        file.seek(at)
        file.write(data)
    return before


def test_a_seal_torn_at_any_byte_is_no_seal(arena: Arena) -> None:
    arena.seal(0, SEAL)
    start, end = _seal_range(arena)
    whole = arena.path.read_bytes()
    for at in range(start, end):
        kept = _overwrite(arena, at, bytes([whole[at] ^ 0x10]))
        assert arena.seal_of(0) is None, at - start
        _overwrite(arena, at, kept)
    assert arena.seal_of(0) == SEAL


def test_a_writer_killed_right_after_the_state_word_has_sealed(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word is the last thing written: who sees it sees the new seal, not the old one's bytes."""
    arena.seal(0, SEAL)
    put, new = arena._put_state, Seal(9, SEAL.root, SEAL.digests)

    def stop_after_the_word(slot: int, state: int) -> None:
        put(slot, state)
        if state:
            raise KeyboardInterrupt

    monkeypatch.setattr(arena, "_put_state", stop_after_the_word)
    with pytest.raises(KeyboardInterrupt):
        arena.seal(0, new)
    assert arena.seal_of(0) == new


def test_a_writer_killed_inside_seal_leaves_no_seal(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of a second seal is the last one, a reader sees the old seal gone and no new one."""
    arena.seal(0, SEAL)
    calls: list[int] = []
    put = arena._put_state

    def stop_before_the_word(slot: int, state: int) -> None:
        calls.append(state)
        if state:
            raise KeyboardInterrupt
        put(slot, state)

    monkeypatch.setattr(arena, "_put_state", stop_before_the_word)
    with pytest.raises(KeyboardInterrupt):
        arena.seal(0, Seal(9, SEAL.root, SEAL.digests))
    assert calls[0] == 0
    assert arena.seal_of(0) is None


@pytest.mark.parametrize(
    "seal",
    [
        Seal(1, SEAL.root, SEAL.digests[:-8]),
        Seal(1, SEAL.root[:-1], SEAL.digests),
        Seal(-1, SEAL.root, SEAL.digests),
        Seal(2**63, SEAL.root, SEAL.digests),
    ],
)
def test_a_seal_that_does_not_fit_is_refused(arena: Arena, seal: Seal) -> None:
    arena.seal(0, SEAL)
    with pytest.raises(ProtocolError):
        arena.seal(0, seal)
    assert arena.seal_of(0) == SEAL


def test_a_reader_can_neither_open_nor_seal_a_slot(arena: Arena) -> None:
    arena.seal(0, SEAL)
    with Arena.open(arena.path, MANIFEST) as reader:
        with pytest.raises(ProtocolError, match="read-only"):
            reader.begin(0)
        with pytest.raises(ProtocolError, match="read-only"):
            reader.seal(0, SEAL)
        assert not reader.flat(0).flags.writeable
        assert reader.bytes(0).readonly
    assert arena.seal_of(0) == SEAL


def test_a_reader_that_writes_dies_instead_of_corrupting_weights(arena: Arena) -> None:
    arena.flat(0)[:] = 3
    code = (
        "import sys\nfrom pathlib import Path\nimport msgspec\nfrom bridge.shm.arena import Arena\n"
        "from bridge.model.manifest import Manifest\n"
        "m = msgspec.json.decode(sys.stdin.buffer.read(), type=Manifest)\n"
        "a = Arena.open(Path(sys.argv[1]), m)\nprint('mapped', flush=True)\na.tensors(0)[0].zero_()\nprint('wrote')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(arena.path)], input=msgspec.json.encode(MANIFEST), capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == b"mapped\n", done.stderr.decode()
    assert done.returncode == -signal.SIGSEGV
    assert set(bytes(arena.bytes(0))) == {3}


def test_a_second_writer_shares_the_slots(arena: Arena) -> None:
    with Arena.open(arena.path, MANIFEST, writable=True) as writer:
        writer.tensors(1)[0].fill_(2.5)
        writer.seal(1, SEAL)
    assert arena.tensors(1)[0].eq(2.5).all()
    assert arena.seal_of(1) == SEAL


def test_lists_of_views_are_made_once(arena: Arena) -> None:
    assert arena.tensors(0) is arena.tensors(0)
    assert arena.views(0) is arena.views(0)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_that_is_not_there_is_refused(arena: Arena, slot: int) -> None:
    for call in (arena.bytes, arena.flat, arena.tensors, arena.views, arena.begin, arena.seal_of):
        with pytest.raises(ProtocolError, match="no such slot"):
            call(slot)


def test_a_spec_outside_the_version_is_refused(arena: Arena) -> None:
    foreign = lay_out([TensorInfo("huge", "fp32", (10_000,))]).tensors[0]
    with pytest.raises(ProtocolError, match="huge"):
        arena.tensor(0, foreign)


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_another_manifest_is_refused(arena: Arena) -> None:
    same = [TensorInfo(s.name, s.dtype, s.shape) for s in MANIFEST.tensors[:-1]]
    other = lay_out([*same, TensorInfo("another", "uint8", (0,))])
    assert other.nbytes == MANIFEST.nbytes
    with pytest.raises(ProtocolError, match="another manifest"):
        Arena.open(arena.path, other)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o400, 0o700])
def test_another_mode_is_refused(arena: Arena, mode: int) -> None:
    arena.path.chmod(mode)
    with pytest.raises(ConfigError, match=f"{mode:04o}"):
        Arena.open(arena.path, MANIFEST)


def test_a_foreign_owner_is_refused(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "geteuid", lambda: arena.path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="another user"):
        Arena.open(arena.path, MANIFEST)


@pytest.mark.parametrize("change", [-1, 1, -4096, 4096])
def test_another_size_is_refused(arena: Arena, change: int) -> None:
    os.truncate(arena.path, arena.nbytes + change)
    with pytest.raises(ProtocolError, match="wrong size"):
        Arena.open(arena.path, MANIFEST)
    os.truncate(arena.path, arena.nbytes)


def test_a_header_damaged_at_any_byte_is_refused(arena: Arena) -> None:
    header = arena.path.read_bytes()[: files.HEADER_NBYTES]
    for at, byte in enumerate(header):
        _overwrite(arena, at, bytes([byte ^ 1]))
        with pytest.raises(ProtocolError):
            Arena.open(arena.path, MANIFEST)
        _overwrite(arena, at, bytes([byte]))
    Arena.open(arena.path, MANIFEST).close()


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_a_header_of_another_geometry_is_refused(arena: Arena, slots: int) -> None:
    header = files.decode_header(arena.path.read_bytes()[: files.HEADER_NBYTES], "")
    _overwrite(arena, 0, files.encode_header(dataclasses.replace(header, count=slots)))
    with pytest.raises(ProtocolError, match="geometry"):
        Arena.open(arena.path, MANIFEST)


def test_a_link_a_folder_and_nothing_are_refused(tmp_path: Path, arena: Arena) -> None:
    link = tmp_path / "link"
    link.symlink_to(arena.path)
    with pytest.raises(ConfigError):
        Arena.open(link, MANIFEST)
    with pytest.raises(ConfigError):
        Arena.open(tmp_path, MANIFEST)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(ConfigError):
        Arena.open(fifo, MANIFEST)
    with pytest.raises(NotFound):
        Arena.open(tmp_path / "gone", MANIFEST)


def test_an_empty_file_is_no_arena(tmp_path: Path) -> None:
    path = tmp_path / "weighbridge-x-0123456789abcdef.data"
    path.touch(mode=0o600)
    with pytest.raises(ProtocolError):
        Arena.open(path, MANIFEST)


# ---- room ------------------------------------------------------------------------------------------------------------


def test_too_little_room_names_both_sizes_and_creates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = file_nbytes(MANIFEST, 2)
    monkeypatch.setenv("WEIGHBRIDGE_SHM_LIMIT", str(needed - 1))
    with pytest.raises(ArenaFull) as caught:
        Arena.create(MANIFEST, name="x", directory=tmp_path)
    assert str(needed) in (caught.value.expected or "")
    assert str(needed - 1) in (caught.value.got or "")
    assert caught.value.remedy
    assert listed(tmp_path) == []
    monkeypatch.setenv("WEIGHBRIDGE_SHM_LIMIT", str(needed))
    Arena.create(MANIFEST, name="x", directory=tmp_path).close()


def test_a_create_that_fails_midway_keeps_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Arena) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Arena, "_populate", broken)
    with pytest.raises(KeyboardInterrupt) as caught:
        Arena.create(MANIFEST, name="x", directory=tmp_path)
    assert caught.value.__traceback__ is not None, "it keeps the frames, and what they hold"
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not [fd for fd in Path("/proc/self/fd").iterdir() if str(tmp_path) in os.path.realpath(fd)]
    assert listed(tmp_path) == []


def test_the_limit_can_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHBRIDGE_SHM_LIMIT", "4096")
    with pytest.raises(ArenaFull, match="WEIGHBRIDGE_SHM_LIMIT"):
        Arena.create(MANIFEST, name="x", directory=tmp_path)
    monkeypatch.setenv("WEIGHBRIDGE_SHM_LIMIT", "4 GB")
    with pytest.raises(ConfigError, match="WEIGHBRIDGE_SHM_LIMIT"):
        Arena.create(MANIFEST, name="x", directory=tmp_path)
    assert listed(tmp_path) == []


def test_more_than_the_machine_has_is_refused(tmp_path: Path) -> None:
    huge = lay_out([TensorInfo("w", "fp32", (2**40,))])
    with pytest.raises(ArenaFull):
        Arena.create(huge, name="x", directory=tmp_path)
    assert listed(tmp_path) == []


def test_running_out_while_reserving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, start: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arena_module.os, "posix_fallocate", full)
    with pytest.raises(ArenaFull, match="No space left"):
        Arena.create(MANIFEST, name="x", directory=tmp_path)
    assert listed(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Arena.create(MANIFEST, name="x", directory=tmp_path / "nowhere")


def test_no_slots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Arena.create(MANIFEST, name="x", directory=tmp_path, slots=0)


def _cgroup(folder: Path, values: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name).write_text(value)


def test_cgroup_limits_of_both_hierarchies_and_all_ancestors_count(tmp_path: Path) -> None:
    gib = 1 << 30
    mount = tmp_path / "cgroup"
    _cgroup(mount / "a" / "b", {"memory.max": "max\n", "memory.current": f"{gib}\n"})
    _cgroup(
        mount / "a",
        {"memory.max": f"{4 * gib}\n", "memory.current": f"{3 * gib}\n", "memory.stat": f"inactive_file {gib}\n"},
    )
    _cgroup(mount / "memory" / "v1", {"memory.limit_in_bytes": f"{2 * gib}\n", "memory.usage_in_bytes": f"{gib}\n"})
    member = tmp_path / "self"
    member.write_text("0::/a/b\n4:memory:/v1\n3:cpu:/v1\n")
    rooms = sorted(room.nbytes + files.MEMORY_MARGIN for room in files.cgroup_rooms(mount, member))
    assert rooms == [gib, 2 * gib]


def test_a_cgroup_path_of_the_host_falls_back_to_the_mount(tmp_path: Path) -> None:
    _cgroup(tmp_path, {"memory.max": "1000000000", "memory.current": "0"})
    member = tmp_path / "self"
    member.write_text("0::/kubepods/pod7\n")
    assert [r.nbytes for r in files.cgroup_rooms(tmp_path, member)] == [1000000000 - files.MEMORY_MARGIN]


def test_pages_are_there_before_the_first_push(tmp_path: Path) -> None:
    manifest = lay_out([TensorInfo("w", "uint8", (8 << 20,))])
    with Arena.create(manifest, name="x", directory=tmp_path) as made:
        assert made.path.stat().st_blocks * 512 >= made.nbytes
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        made.flat(0)[:: files.PAGE] = 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < (8 << 20) // files.PAGE // 4


def test_without_populate_pages_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 12345)
    with Arena.create(MANIFEST, name="x", directory=tmp_path) as made:
        made.seal(0, SEAL)
        with Arena.open(made.path, MANIFEST) as reader:
            assert reader.seal_of(0) == SEAL


# ---- life ------------------------------------------------------------------------------------------------------------


def _locked(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_the_file_is_locked_while_anybody_has_it_open(arena: Arena) -> None:
    reader = Arena.open(arena.path, MANIFEST)
    assert _locked(arena.path)
    arena.close()
    assert _locked(arena.path)
    reader.close()
    assert not _locked(arena.path)


def test_a_view_outlives_the_arena(arena: Arena) -> None:
    arena.tensors(0)[0].fill_(1.5)
    reader = Arena.open(arena.path, MANIFEST)
    view = reader.tensors(0)[0]
    reader.close()
    arena.close()
    arena.unlink()
    gc.collect()
    assert view.eq(1.5).all()


def test_after_close_everything_is_refused(arena: Arena) -> None:
    arena.close()
    arena.close()
    for call in (arena.bytes, arena.flat, arena.seal_of, arena.begin, arena.flat_tensor):
        with pytest.raises(Closed):
            call(0)


def test_unlink_leaves_readers_their_mapping(arena: Arena) -> None:
    reader = Arena.open(arena.path, MANIFEST)
    arena.tensors(0)[0].fill_(2)
    arena.unlink()
    arena.unlink()
    assert reader.tensors(0)[0].eq(2).all()
    with pytest.raises(NotFound):
        Arena.open(arena.path, MANIFEST)
    reader.close()


def test_a_forked_child_neither_removes_nor_unlocks_the_files(arena: Arena, tmp_path: Path) -> None:
    arena.tensors(0)[0].fill_(2)
    with Mailbox.create("x", 1, directory=tmp_path) as box:
        child = os.fork()
        if child == 0:
            try:
                for shared in (arena, box):
                    shared.unlink()
                    shared.close()
                    shared.unlink()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for shared in (arena, box):
            assert shared.path.exists()
            assert _locked(shared.path)
        box.post(0, 1, b"here")
        assert box.read(0, 1) == b"here"
        assert arena.tensors(0)[0].eq(2).all()
    box.unlink()
    assert listed(tmp_path) == [arena.path.name], "the parent still can"
