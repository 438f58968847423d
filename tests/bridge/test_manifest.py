from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import DtypeMismatch, DuplicateTensor, ProtocolError
from bridge.model.dtypes import itemsize
from bridge.model.manifest import ALIGN, Manifest, Shard, TensorInfo, TensorSpec, lay_out, validate
from bridge.model.torch_dtypes import DTYPES

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
infos = st.lists(
    st.builds(
        TensorInfo,
        name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
        dtype=st.sampled_from(sorted(DTYPES)),
        shape=shapes,
    ),
    unique_by=lambda info: info.name,
    max_size=12,
)


@given(infos)
def test_lay_out_gives_every_tensor_bytes_of_its_own(tensors: list[TensorInfo]) -> None:
    manifest = lay_out(tensors)
    assert [spec.name for spec in manifest.tensors] == [info.name for info in tensors]
    owner = [""] * manifest.nbytes
    for spec in manifest.tensors:
        assert spec.offset % ALIGN == 0
        assert spec.offset + spec.nbytes <= manifest.nbytes
        for byte in range(spec.offset, spec.offset + spec.nbytes):
            assert owner[byte] == ""
            owner[byte] = spec.name
    assert manifest.payload_nbytes == sum(1 for name in owner if name)


@given(infos)
def test_a_laid_out_manifest_is_valid_after_a_round_trip(tensors: list[TensorInfo]) -> None:
    manifest = lay_out(tensors)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest)
    assert validate(back) == manifest
    assert back.digest == manifest.digest


@given(infos.filter(bool), st.data())
def test_any_changed_field_changes_the_digest(tensors: list[TensorInfo], data: st.DataObject) -> None:
    manifest = lay_out(tensors)
    at = data.draw(st.integers(0, len(tensors) - 1))
    spec = manifest.tensors[at]
    other_dtype = "fp16" if spec.dtype != "fp16" else "bf16"
    changed = data.draw(
        st.sampled_from(
            [
                TensorSpec(spec.name + "x", spec.dtype, spec.shape, spec.offset, spec.aliases),
                TensorSpec(spec.name, other_dtype, spec.shape, spec.offset, spec.aliases),
                TensorSpec(spec.name, spec.dtype, (*spec.shape, 1), spec.offset, spec.aliases),
                TensorSpec(spec.name, spec.dtype, spec.shape, spec.offset + ALIGN, spec.aliases),
                TensorSpec(spec.name, spec.dtype, spec.shape, spec.offset, ("alias",)),
            ]
        )
    )
    tampered = Manifest((*manifest.tensors[:at], changed, *manifest.tensors[at + 1 :]), manifest.nbytes)
    assert tampered.digest != manifest.digest


def test_order_changes_the_digest() -> None:
    a, b = TensorInfo("a", "fp32", (4,)), TensorInfo("b", "fp32", (4,))
    assert lay_out([a, b]).digest != lay_out([b, a]).digest


@given(infos.filter(bool), st.data())
def test_validate_refuses_a_moved_tensor(tensors: list[TensorInfo], data: st.DataObject) -> None:
    manifest = lay_out(tensors)
    at = data.draw(st.integers(0, len(tensors) - 1))
    shift = data.draw(st.integers(-3, 3).filter(bool))
    spec = msgspec.structs.replace(manifest.tensors[at], offset=manifest.tensors[at].offset + shift * ALIGN)
    with pytest.raises(ProtocolError):
        validate(Manifest((*manifest.tensors[:at], spec, *manifest.tensors[at + 1 :]), manifest.nbytes))


@pytest.mark.parametrize("nbytes", [0, ALIGN - 1, 2 * ALIGN, 2**40, -ALIGN])
def test_validate_refuses_another_total(nbytes: int) -> None:
    manifest = lay_out([TensorInfo("a", "fp32", (4,))])
    with pytest.raises(ProtocolError):
        validate(Manifest(manifest.tensors, nbytes))


@pytest.mark.parametrize("shape", [(-1,), (4, -2), (-2, -2), (2**40, 2**40)])
def test_a_shape_that_no_tensor_has_is_refused(shape: tuple[int, ...]) -> None:
    # a negative size would move the next offset back over the tensors before it
    with pytest.raises(ProtocolError, match=r"w\.bad"):
        lay_out([TensorInfo("a", "fp32", (64,)), TensorInfo("w.bad", "fp32", shape)])


def test_a_name_sent_twice_is_named() -> None:
    with pytest.raises(DuplicateTensor) as caught:
        lay_out([TensorInfo("a", "fp32", ()), TensorInfo("b", "fp32", ()), TensorInfo("a", "fp32", ())])
    assert caught.value.names == ("a",)


def test_an_alias_is_a_name_too() -> None:
    with pytest.raises(DuplicateTensor) as caught:
        lay_out([TensorInfo("emb", "fp32", (), aliases=("head",)), TensorInfo("head", "fp32", ())])
    assert caught.value.names == ("head",)


def test_a_dtype_outside_the_table_is_refused() -> None:
    with pytest.raises(DtypeMismatch, match="float32"):
        lay_out([TensorInfo("a", "float32", (2,))])
    with pytest.raises(DtypeMismatch):
        itemsize("__class__")


@pytest.mark.parametrize(
    ("globe", "offsets", "shape"),
    [((4,), (1,), (4,)), ((4,), (-1,), (2,)), ((4,), (0,), (-1,)), ((4, 4), (0,), (4,)), ((4,), (5,), (0,))],
)
def test_a_shard_outside_its_tensor_is_refused(
    globe: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ProtocolError):
        Shard(globe, offsets, shape)
