"""Collect tensors that come in buckets into one push: `Bridge.collect`."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from bridge.errors import Closed
from bridge.push_settings import PushArguments

if TYPE_CHECKING:
    import torch

    from bridge.client import Bridge
    from bridge.model.receipt import Receipt


class Collection:
    """One push in the making. Made by `Bridge.collect`, used in a `with` block by one thread.

    Attributes:
        receipt: of the push, once the block has ended; None before, and when the block raised.
    """

    def __init__(self, bridge: Bridge, options: PushArguments) -> None:
        self._bridge = bridge
        self._options = options
        self._kept: list[tuple[str, torch.Tensor]] | None = None
        self.receipt: Receipt | None = None

    def __enter__(self) -> Collection:
        self._kept = []
        return self

    def add(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add one bucket. Its values are copied to host memory before this returns, so its storage may be used again
        or freed: a streaming iterator is read tensor by tensor.

        Args:
            named: `(name, tensor)` pairs, any iterable, as for `push`.

        Raises, and adds nothing of the bucket: ConfigError for what is no pair; DtypeMismatch or IntegrityError for a
        tensor without values of its own; Closed outside of the block.
        """
        if self._kept is None:
            raise Closed(
                "this collection takes nothing any more",
                where=self._bridge.name,
                expected="add() inside of the block",
                got="add() after it",
                remedy="with b.collect() as push: push.add(bucket)",
            )
        self._kept += self._bridge.keep(named)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Push everything that was added, as one version; drop it when the block raised. Raises as `Bridge.push`."""
        kept, self._kept = self._kept or [], None
        if kind is None:
            self.receipt = self._bridge.push(kept, **self._options)
