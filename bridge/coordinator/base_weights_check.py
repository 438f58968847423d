"""Are the engines' weights the base that the bound model's adapter was trained on? Proven before one goes out."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from bridge.errors import DtypeMismatch, MissingTensor, UnsupportedLora
from bridge.ports import Snapshot, TrainerPort
from bridge.protocol.coordinator_messages import Compared


@dataclass(frozen=True)
class _Found:
    """What a comparison has shown: of which weights (the push that brought them), for which base (its mark)."""

    weights: int | None
    mark: Hashable
    against: UnsupportedLora | None = None


class BaseWeightsCheck:
    """What one Bridge knows of the engines' base weights. Used under the Bridge's push lock.

    Args:
        trainer: whose base it is.
        compare: bring a snapshot into a free slot and have it compared with what every engine serves.
        served: which push brought the weights that the engines serve now; asks them.
    """

    def __init__(
        self, trainer: TrainerPort, compare: Callable[[Snapshot], Compared], served: Callable[[], int | None]
    ) -> None:
        self._trainer = trainer
        self._compare = compare
        self._served = served
        self._found: _Found | None = None

    @property
    def over(self) -> int | None:
        """The push whose weights were shown to be the base; None: none was."""
        return None if self._found is None or self._found.against is not None else self._found.weights

    def forget(self) -> None:
        """Another model was bound, or other weights may be served."""
        self._found = None

    def note_pushed(self, version: int, snapshot: Snapshot) -> None:
        """A push of the base was submitted: if it is committed, the engines' weights are of its version. One that sent
        other values than the live ones proves nothing."""
        mark = self._trainer.base_mark(snapshot)
        self._found = None if mark is None else _Found(version, mark)

    @property
    def holds(self) -> bool:
        """Whether the comparison still says something about the trainer's base as it is now."""
        return self.over is not None and self._found is not None and self._found.mark == self._trainer.base_mark()

    def prove(self) -> str | None:
        """Compare, bit for bit, with every engine. Writes no engine. Returns why there is nothing to compare; raises
        UnsupportedLora when they differ, at once where the same two have been found to differ before."""
        before, self._found = self._found, None
        if before is not None and before.against is not None and before == self._now(before.against):
            self._found = before
            raise before.against
        try:
            mark = self._trainer.base_mark()
            snapshot = self._trainer.collect_base()
            compared = self._compare(snapshot)
        except UnsupportedLora as error:
            return f"the engines' base weights were not compared with the trainer's: {error}"
        except (DtypeMismatch, MissingTensor) as error:  # engines that hold their base in another format
            return f"the engines' base weights cannot be compared with the trainer's: {error}"
        if compared.known and not compared.differing:
            self._found = _Found(compared.weights, mark)
            return None
        against = _another_base(compared, len(snapshot.tensors))
        self._found = _Found(compared.weights, mark, against)
        raise against

    def _now(self, against: UnsupportedLora) -> _Found:
        return _Found(self._served(), self._trainer.base_mark(), against)


def _another_base(compared: Compared, total: int) -> UnsupportedLora:
    names = compared.differing
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return UnsupportedLora(
        "the engines do not serve the base weights that this adapter was trained on",
        where=shown or "the engines' weights",
        expected="the bound model's base, bit for bit",
        got=f"{len(names)} of {total} tensors differ" if compared.known else "weights that cannot be read back",
        remedy="push mode='base' once (it brings a base that its initialisation changed as well), then the adapter",
        names=names,
    )
