"""What several cases push with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import tiny_qwen2
from tests.push.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    made = Rig(tmp_path, model)
    yield made
    made.close()
