from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import DigestMismatch
from bridge.model.manifest import TensorInfo, lay_out
from bridge.shm.arena import Arena, Seal
from bridge.shm.seal import CHUNK, check_slot, digest_slot, fold, root_digest, seal_slot

INFOS = [
    TensorInfo("small.0", "fp32", (33,)),
    TensorInfo("big", "uint8", (2 * CHUNK + 77,)),
    TensorInfo("empty", "bf16", (0,)),
    TensorInfo("middle.0", "bf16", (40_000,)),
    TensorInfo("exact", "uint8", (CHUNK,)),
    TensorInfo("scalar", "fp32", ()),
    TensorInfo("middle.1", "bf16", (40_000,)),
    *(TensorInfo(f"small.{i}", "fp16", (i,)) for i in range(1, 30)),
]
MANIFEST = lay_out(INFOS)


@contextmanager
def sealed(folder: Path) -> Iterator[Arena]:
    """An arena whose slot 0 holds random bytes, sealed as version 3."""
    with Arena.create(MANIFEST, name="test", directory=folder) as made:
        rng = np.random.default_rng(0)
        made.flat(0)[:] = rng.integers(0, 256, MANIFEST.nbytes, dtype=np.uint8)
        seal_slot(made, 0, 3, digest_slot(made, 0))
        yield made
    made.unlink()


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    with sealed(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def lasting_arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """For tests that leave every byte as it was."""
    with sealed(tmp_path_factory.mktemp("arena")) as made:
        yield made


@contextmanager
def flipped(arena: Arena, at: int) -> Iterator[None]:
    """Another bit in slot 0's byte `at`, for as long as this lasts."""
    arena.flat(0)[at] ^= 1
    try:
        yield
    finally:
        arena.flat(0)[at] ^= 1


def digest_of(data: bytes) -> bytes:
    """The digest of one tensor, computed another way. Pinned: a peer of another release has to compute the same."""
    if len(data) <= CHUNK:
        return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
    chunks = [xxhash.xxh3_64_intdigest(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]
    return xxhash.xxh3_64_intdigest(b"".join(chunk.to_bytes(8, "little") for chunk in chunks)).to_bytes(8, "little")


def test_the_digest_of_no_bytes_is_pinned() -> None:
    assert digest_of(b"").hex() == "c294d3380580062d"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_chunks_fold_into_their_tensor(count: int) -> None:
    data = (bytes(range(256)) * (CHUNK // 256 * count))[: CHUNK * count - 3]
    chunks = [xxhash.xxh3_64_intdigest(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)]
    assert fold(chunks).to_bytes(8, "little") == digest_of(data)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_slot_is_digested_tensor_by_tensor(arena: Arena, threads: int) -> None:
    one_by_one = b"".join(digest_of(bytes(view)) for view in arena.views(0))
    assert digest_slot(arena, 0, threads) == one_by_one


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_one_flipped_bit_names_its_tensor(lasting_arena: Arena, info: TensorInfo, threads: int) -> None:
    arena, spec = lasting_arena, MANIFEST.by_name[info.name]
    if not spec.nbytes:
        return
    assert check_slot(arena, 0, threads).version == 3
    index = MANIFEST.tensors.index(spec)
    seal = arena.seal_of(0)
    assert seal is not None
    with flipped(arena, spec.offset + spec.nbytes - 1):
        with pytest.raises(DigestMismatch, match=info.name) as caught:
            check_slot(arena, 0, threads)
        assert caught.value.names == (info.name,)
        assert caught.value.expected == seal.digests[8 * index : 8 * index + 8].hex()
        assert caught.value.got == digest_of(bytes(arena.views(0)[index])).hex()


def test_every_differing_tensor_is_listed(arena: Arena) -> None:
    for name in ("scalar", "big", "small.7"):
        arena.flat(0)[MANIFEST.by_name[name].offset] ^= 0xFF
    with pytest.raises(DigestMismatch) as caught:
        check_slot(arena, 0)
    assert caught.value.names == ("big", "scalar", "small.7")


def test_swapped_rows_are_seen(arena: Arena) -> None:
    arena.tensors(0)[1][:CHUNK], arena.tensors(0)[1][CHUNK : 2 * CHUNK] = (
        arena.tensors(0)[1][CHUNK : 2 * CHUNK].clone(),
        arena.tensors(0)[1][:CHUNK].clone(),
    )
    with pytest.raises(DigestMismatch) as caught:
        check_slot(arena, 0, 2)
    assert caught.value.names == ("big",)


def test_an_unsealed_slot_is_refused(arena: Arena) -> None:
    with pytest.raises(DigestMismatch, match="not sealed"):
        check_slot(arena, 1)
    arena.begin(0)
    with pytest.raises(DigestMismatch, match="not sealed"):
        check_slot(arena, 0)


def test_digests_that_are_not_those_of_the_root_are_refused(arena: Arena) -> None:
    digests = digest_slot(arena, 0)
    arena.seal(0, Seal(3, bytes(16), digests))
    with pytest.raises(DigestMismatch, match="root"):
        check_slot(arena, 0)


@given(st.permutations(range(4)))
def test_the_root_sees_the_order(order: list[int]) -> None:
    digests = [bytes([i]) * 8 for i in range(4)]
    manifest = lay_out(TensorInfo(f"t{i}", "fp32", (2,)) for i in range(4))
    root = root_digest(manifest, b"".join(digests))
    assert (root_digest(manifest, b"".join(digests[i] for i in order)) == root) == (order == [0, 1, 2, 3])
    assert len(root) == 16


def test_the_root_sees_names_dtypes_shapes_and_offsets() -> None:
    manifests = [
        lay_out([TensorInfo("a", "fp32", (2, 3))]),
        lay_out([TensorInfo("b", "fp32", (2, 3))]),
        lay_out([TensorInfo("a", "int32", (2, 3))]),
        lay_out([TensorInfo("a", "fp32", (3, 2))]),
    ]
    roots = [root_digest(manifest, bytes(8)) for manifest in manifests]
    assert all(a != b for a, b in itertools.combinations(roots, 2))


def test_a_model_without_tensors_has_a_digest_too(tmp_path: Path) -> None:
    manifest = lay_out([])
    with Arena.create(manifest, name="x", directory=tmp_path) as arena:
        assert digest_slot(arena, 0, 2) == b""
        seal_slot(arena, 0, 1, b"")
        assert check_slot(arena, 0).version == 1
