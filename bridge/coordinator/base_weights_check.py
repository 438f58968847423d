"""Base weights check: before a LoRA adapter goes out, prove that the engines hold the base that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from bridge.errors import DtypeMismatch, MissingTensor, UnsupportedLora, some_names
from bridge.ports import Snapshot, TrainerPort
from bridge.protocol.coordinator_messages import Compared


@dataclass(frozen=True)
class _Finding:
    """Result of a comparison: of the weights that push `weights` brought with the base whose fingerprint is `mark`.
    `against` is the error when they differ."""

    weights: int | None
    mark: Hashable
    against: UnsupportedLora | None = None


class BaseWeightsCheck:
    """Remembers what one Bridge knows of the engines' base weights. Used under the Bridge's push lock.

    Args:
        trainer: holds the bound model, whose base it is.
    """

    def __init__(self, trainer: TrainerPort) -> None:
        self._trainer = trainer
        self._found: _Finding | None = None
        self._merged: int | None = None
        """Version of the last push whose weights hold adapters."""

    @property
    def over(self) -> int | None:
        """Version of the push whose weights were shown to be the base; None: none was."""
        return None if self._found is None or self._found.against is not None else self._found.weights

    def forget(self) -> None:
        """Forget what was shown, because another model was bound or other weights may be served."""
        self._found = None

    def note_pushed(self, version: int, snapshot: Snapshot) -> None:
        """Note that a push of the base was submitted: if it is committed, the engines' weights are of its version.
        Ignored if the pushed values differ from the bound model's current base weights."""
        mark = self._trainer.base_mark(snapshot)
        self._found = None if mark is None else _Finding(version, mark)

    def note_merged(self, version: int) -> None:
        """Note that a push of weights that hold adapters was submitted."""
        self._merged = version

    @property
    def holds(self) -> bool:
        """True while the last comparison still applies to the trainer's base as it is now."""
        return self.over is not None and self._found is not None and self._found.mark == self._trainer.base_mark()

    def prove(self, compare: Callable[[Snapshot], Compared], served: Callable[[], int | None]) -> str | None:
        """Compare the base, bit for bit, with every engine. Blocks; writes no engine.

        Args:
            compare: writes a snapshot into a free slot and compares it with what every engine serves.
            served: asks which push brought the weights that the engines serve now.

        Returns the reason when there is nothing to compare with. Raises UnsupportedLora when they differ, at once where
        the same base and weights were found to differ before.
        """
        before, self._found = self._found, None
        against = before.against if before is not None else None
        if against is not None and before == _Finding(served(), self._trainer.base_mark(), against):
            self._found = before
            raise against
        try:
            mark = self._trainer.base_mark()
            snapshot = self._trainer.collect_base()
            compared = compare(snapshot)
        except UnsupportedLora as error:
            if self._merged is not None and served() == self._merged:
                raise _holds_adapters(self._merged) from error
            return f"the engines' base weights were not compared with the trainer's: {error}"
        except (DtypeMismatch, MissingTensor) as error:  # engines that hold their base in another format
            return f"the engines' base weights cannot be compared with the trainer's: {error}"
        if compared.known and not compared.differing:
            self._found = _Finding(compared.weights, mark)
            return None
        names = compared.differing
        against = UnsupportedLora(
            "the engines do not serve the base weights that this adapter was trained on",
            where=some_names(names) or "the engines' weights",
            expected="the bound model's base, bit for bit",
            got=f"{len(names)} of {len(snapshot.layout.tensors)} tensors differ"
            if compared.known
            else "weights that cannot be read back",
            remedy="push mode='base' once (it brings a base that its initialisation changed as well), then the adapter",
            names=names,
        )
        self._found = _Finding(compared.weights, mark, against)
        raise against


def _holds_adapters(version: int) -> UnsupportedLora:
    return UnsupportedLora(
        "the engines serve merged weights, over which an adapter would act a second time",
        where="the engines' weights",
        expected="the base that the adapter was trained on",
        got=f"those of version {version}, a merged push",
        remedy="go on with mode='merged'; or push mode='merged' once while the adapters are disabled "
        "(model.disable_adapter()), then the adapter",
    )
