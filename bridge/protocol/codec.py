"""Messages: frozen structs and their MessagePack form.

Control frames are MessagePack through `msgpack` with its limits set, validated into frozen structs with
`msgspec.convert`. Nothing here unpickles, resolves a class from outside except by the message table, or trusts a
length. Tensor bytes never travel in frames; they lie in the arena.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, overload

import msgpack
import msgspec

from bridge.errors import ERRORS_BY_NAME, REPORT, BridgeError, ProtocolError

PROTOCOL = 1
"""Raised when a message changes in a way an older peer cannot read; the first field of every frame."""
MAX_FRAME = 256 << 20
"""Largest frame that is read, in bytes: a manifest of a few million tensors."""
MAX_ITEMS = 8 << 20
"""Largest array or map inside a frame."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of every message; the class name in `kind` selects it. Constructors do not validate, decoding does."""


class Sampling(Message, tag=True, frozen=True):
    """Settings of sampling one completion. `temperature` 0 is greedy; `top_p` in (0, 1]; a `seed` (below
    2**62) makes a call repeatable."""

    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 16
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    stop_token_ids: tuple[Count, ...] = ()
    seed: Count | None = None


class Completion(Message, tag=True, frozen=True):
    """One sampled continuation: token ids, their log-probabilities (nats, of the sampled token under the distribution
    at temperature 1 before top-p), why it ended ("stop" | "length" | "abort") and the weight version it began with."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weight_version: int = 0


class ErrorInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An error of our tree as data. `name` is a class name of `bridge.errors`, anything else is rebuilt as a bug."""

    name: str
    what: str
    where: str | None = None
    expected: str | None = None
    got: str | None = None
    remedy: str | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        """Describe any exception; one from outside our tree keeps its class in the text."""
        if isinstance(error, BridgeError):
            e = error
            return cls(type(e).__name__, e.what, e.where, e.expected, e.got, e.remedy, e.names)
        return cls(type(error).__name__, f"{type(error).__name__}: {error}")

    def rebuild(self, at: str | None = None) -> BridgeError:
        """The exception again, as the class it had, or plain BridgeError for one that is not ours; `at` is added to
        its `where`."""
        cls = ERRORS_BY_NAME.get(self.name, BridgeError)
        where = self.where if at is None else f"{self.where} ({at})" if self.where else at
        return cls(self.what, where=where, expected=self.expected, got=self.got, remedy=self.remedy, names=self.names)


T = TypeVar("T")


def _unique_keys(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"duplicate key {key!r}")
        out[key] = value
    return out


def _refuse_ext(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not part of this protocol")


def pack(value: msgspec.Struct | tuple[Any, ...] | list[Any] | dict[str, Any]) -> bytes:
    """The MessagePack form of a struct (or of plain data).

    Raises ProtocolError above MAX_FRAME and for what has no form: integers past 64 bits, text that is not Unicode.
    """
    try:
        plain = msgspec.to_builtins(value, builtin_types=(bytes,))
        frame: bytes = msgpack.packb([PROTOCOL, plain], use_bin_type=True)
    except (ValueError, OverflowError) as error:
        raise ProtocolError(
            "a message cannot be packed",
            where="a message",
            expected="fields that MessagePack can hold",
            got=str(error),
            remedy=REPORT,
        ) from error
    if len(frame) > MAX_FRAME:
        raise ProtocolError(
            "a frame is too large to send",
            where="a message",
            expected=f"at most {MAX_FRAME} bytes",
            got=str(len(frame)),
            remedy=REPORT,
        )
    return frame


@overload
def unpack(frame: bytes | bytearray | memoryview, kind: type[T]) -> T: ...
@overload
def unpack(frame: bytes | bytearray | memoryview, kind: Any) -> Any: ...
def unpack(frame: bytes | bytearray | memoryview, kind: Any) -> Any:
    """Decode and validate one frame as `kind` (a struct class or a union of them). Raises ProtocolError, naming the
    path inside the message, for anything that is not exactly that."""
    if len(frame) > MAX_FRAME:
        raise ProtocolError(
            "a frame is too large",
            where="a message",
            expected=f"at most {MAX_FRAME} bytes",
            got=str(len(frame)),
            remedy=REPORT,
        )
    try:
        raw = msgpack.unpackb(
            frame,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_unique_keys,
            ext_hook=_refuse_ext,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(
            "a frame is not valid MessagePack",
            where="a message",
            expected="MessagePack",
            got=str(error) or type(error).__name__,
            remedy="run one version of weighbridge on both sides",
        ) from error
    # True and 1.0 equal 1
    if not isinstance(raw, list) or len(raw) != 2 or type(raw[0]) is not int or raw[0] != PROTOCOL:
        got = raw[0] if isinstance(raw, list) and raw else type(raw).__name__
        raise ProtocolError(
            "a frame of another protocol",
            where="a message",
            expected=f"version {PROTOCOL}",
            got=repr(got)[:80],
            remedy="run one version",
        )
    try:
        return msgspec.convert(raw[1], kind, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise ProtocolError(
            "a message does not fit its form",
            where="a message",
            expected="the fields of its type",
            got=str(error),
            remedy="run one version of weighbridge on both sides",
        ) from error
