from __future__ import annotations

import struct
import typing

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import ERRORS_BY_NAME, BridgeError, MissingTensor, ProtocolError, PushAborted
from bridge.model.manifest import Manifest, TensorInfo, lay_out
from bridge.model.regions import Move, Region
from bridge.protocol import codec, coordinator_messages, rank_jobs
from bridge.protocol.codec import Completion, ErrorInfo, Sampling, pack, unpack

SAMPLING = Sampling(max_tokens=3, temperature=0.5, top_p=0.25, stop_token_ids=(7, 300), seed=1)
GOLDEN = bytes.fromhex(
    "920186a46b696e64a853616d706c696e67aa6d61785f746f6b656e7303ab74656d7065726174757265cb3fe0000000000000"
    "a5746f705f70cb3fd0000000000000ae73746f705f746f6b656e5f6964739207cd012ca47365656401"
)
MANIFEST = lay_out([TensorInfo("a", "bf16", (3, 5)), TensorInfo("b", "fp32", (), ("c",))])
SAMPLES: list[tuple[typing.Any, typing.Any]] = [
    (SAMPLING, Sampling),
    (Completion((1, 2), (-0.5, -1.0), "stop", 7), Completion),
    (MANIFEST, Manifest),
    (ErrorInfo("MissingTensor", "no", "w", names=("a", "b")), ErrorInfo),
    (
        rank_jobs.RankJob("m", 0, 2**40, rank_jobs.MapJob(1, "p", MANIFEST, (2,))),
        rank_jobs.RankJob,
    ),
    (coordinator_messages.BeginRequest(1, None, "h"), coordinator_messages.ToCoordinator),
    (rank_jobs.RankAnswer(0, 1, rank_jobs.RankBake(b"\0" * 16, {"a": "bf16"}, read={"a": (Region(0, (2,), (1,)),)})),
     rank_jobs.RankAnswer),
]  # fmt: skip


def test_the_frame_of_a_message_is_these_bytes() -> None:
    # Change PROTOCOL together with this: an older peer reads exactly these bytes.
    assert codec.PROTOCOL == 1
    assert pack(SAMPLING) == GOLDEN
    assert unpack(GOLDEN, Sampling) == SAMPLING


@pytest.mark.parametrize(("value", "kind"), SAMPLES, ids=lambda v: type(v).__name__)
def test_round_trip(value: typing.Any, kind: typing.Any) -> None:
    assert unpack(pack(value), kind) == value
    assert unpack(bytearray(pack(value)), kind) == value
    assert unpack(memoryview(pack(value)), kind) == value


@pytest.mark.parametrize(("value", "kind"), SAMPLES, ids=lambda v: type(v).__name__)
def test_every_truncation_is_refused(value: typing.Any, kind: typing.Any) -> None:
    frame = pack(value)
    for end in range(len(frame)):
        with pytest.raises(ProtocolError):
            unpack(frame[:end], kind)


@pytest.mark.parametrize(("value", "kind"), SAMPLES, ids=lambda v: type(v).__name__)
def test_every_flipped_bit_is_refused_or_still_a_message(value: typing.Any, kind: typing.Any) -> None:
    frame = bytearray(pack(value))
    for at in range(len(frame)):
        for bit in range(8):
            frame[at] ^= 1 << bit
            try:
                unpack(bytes(frame), kind)
            except BridgeError:
                pass
            finally:
                frame[at] ^= 1 << bit


@given(st.binary(max_size=200))
def test_noise_is_refused_with_our_error(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(noise, rank_jobs.RankJob)


@given(st.binary(max_size=100))
def test_noise_behind_a_good_header_is_refused_with_our_error(noise: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(b"\x92\x01" + noise, coordinator_messages.ToCoordinator)


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack(GOLDEN + b"\x00", Sampling)


@pytest.mark.parametrize("lead", [b"\xdd", b"\xdf", b"\xdb", b"\xc6"], ids=["array", "map", "str", "bin"])
@pytest.mark.parametrize("claim", [2**32 - 1, codec.MAX_ITEMS + 1, 1000])
def test_a_length_beyond_the_frame_is_refused(lead: bytes, claim: int) -> None:
    for prefix in (b"", b"\x92\x01"):
        with pytest.raises(ProtocolError):
            unpack(prefix + lead + struct.pack(">I", claim) + b"\x01" * 40, Sampling)


def test_a_frame_above_the_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_FRAME", len(GOLDEN) - 1)
    with pytest.raises(ProtocolError, match="too large"):
        unpack(GOLDEN, Sampling)
    with pytest.raises(ProtocolError, match="too large"):
        pack(SAMPLING)


def test_too_many_items_are_refused_by_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    many = Completion(tuple(range(50)), (), "stop")
    frame = pack(many)
    monkeypatch.setattr(codec, "MAX_ITEMS", 20)
    with pytest.raises(ProtocolError):
        unpack(frame, Completion)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack(b"\x92\x01" + b"\x91" * 100_000 + b"\x01", Sampling)


def test_extension_types_are_refused() -> None:
    for ext in (msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 0)):
        with pytest.raises(ProtocolError):
            unpack(msgpack.packb([codec.PROTOCOL, {"kind": "Sampling", "max_tokens": ext}]), Sampling)


def test_extension_types_are_refused_where_any_value_may_stand() -> None:
    body = {"kind": "Health", "facts": {"x": msgpack.ExtType(5, b"payload")}}
    with pytest.raises(ProtocolError, match="extension type 5"):
        unpack(msgpack.packb([codec.PROTOCOL, body]), coordinator_messages.HealthFacts)


def test_a_key_that_comes_twice_is_refused() -> None:
    twice = b"\x92\x01\x83\xa4kind\xa8Sampling\xaamax_tokens\x01\xaamax_tokens\x02"
    with pytest.raises(ProtocolError, match="duplicate"):
        unpack(twice, Sampling)


@pytest.mark.parametrize("key", [1, None, b"kind", 1.5])
def test_a_key_that_is_no_text_is_refused(key: object) -> None:
    with pytest.raises(ProtocolError):
        unpack(msgpack.packb([codec.PROTOCOL, {key: 1}]), Sampling)


@pytest.mark.parametrize("version", [0, 2, -1, "1", None, True, 1.0])
def test_another_protocol_is_refused(version: object) -> None:
    body = msgpack.unpackb(GOLDEN)[1]
    with pytest.raises(ProtocolError, match="another protocol"):
        unpack(msgpack.packb([version, body]), Sampling)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"stop_token_ids": [1, -1]}, r"stop_token_ids\[1\]"),
        ({"unknown": 1}, "unknown"),
        ({"kind": "os.system"}, "kind"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], path: str) -> None:
    body = {**msgpack.unpackb(GOLDEN)[1], **change}
    with pytest.raises(ProtocolError, match=path):
        unpack(msgpack.packb([codec.PROTOCOL, body]), Sampling)


def test_text_does_not_pass_for_bytes() -> None:
    body = {"kind": "RankBake", "digest": "AAAA", "dtypes": {}}
    with pytest.raises(ProtocolError, match="digest"):
        unpack(msgpack.packb([codec.PROTOCOL, body]), rank_jobs.RankBake)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1])
def test_a_number_that_does_not_fit_is_refused_when_packed(number: int) -> None:
    with pytest.raises(ProtocolError):
        pack(coordinator_messages.CancelRequest(number))


def test_text_that_is_no_unicode_is_refused_when_packed() -> None:
    with pytest.raises(ProtocolError):
        pack(coordinator_messages.ExplainRequest("a\udc80"))


names = st.text(st.characters(codec="utf-8"), max_size=20)
counts = st.integers(0, 2**40)
regions = st.lists(st.tuples(counts, counts), max_size=4).flatmap(
    lambda dims: st.builds(Region, counts, st.just(tuple(n for n, _ in dims)), st.just(tuple(s for _, s in dims)))
)


@given(st.builds(Move, names, regions, names, regions))
def test_moves_survive_the_trip(move: Move) -> None:
    assert unpack(pack([msgspec.to_builtins(move)]), list[Move]) == [move]


@given(st.sampled_from(sorted(ERRORS_BY_NAME)), names, st.none() | names, st.lists(names, max_size=3))
def test_errors_come_back_as_the_class_they_were(name: str, what: str, where: str | None, listed: list[str]) -> None:
    error = ERRORS_BY_NAME[name](what, where=where, names=tuple(listed))
    back = unpack(pack(ErrorInfo.of(error)), ErrorInfo).rebuild()
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.names == error.names


def test_an_error_from_outside_the_tree_comes_back_as_a_bug() -> None:
    back = ErrorInfo.of(ZeroDivisionError("x")).rebuild()
    assert type(back) is BridgeError
    assert back.exit_code == 70
    assert "ZeroDivisionError" in str(back)
    assert ErrorInfo("SystemExit", "x").rebuild().exit_code == 70
    assert issubclass(MissingTensor, BridgeError)
    assert isinstance(ErrorInfo.of(PushAborted("x")).rebuild(), PushAborted)
