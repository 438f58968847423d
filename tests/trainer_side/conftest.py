"""A stand-in for transformers' conversion from live tensors to checkpoint tensors, for models of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trainer_side.names import naming


@pytest.fixture
def converts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """`converts(revert)`: from now on every model's checkpoint is what `revert(model, live tensors)` makes of it."""

    def become(revert: Any) -> None:
        monkeypatch.setattr(naming, "_revert", lambda model: revert)

    return become
