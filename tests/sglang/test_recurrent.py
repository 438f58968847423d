"""Layers that keep a state from token to token: SGLang has no kernels for them on CPU, and ends at its first forward.
Its real model classes are loaded beside the engine's, and compared, bit for bit, with what its own loader makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families import make_model

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("family", ["falcon-h1", "granite-hybrid", "qwen3-next", "lfm2"])
def test_a_recurrent_family_beside_the_engine(rigs: Any, family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # as Qwen3-Next's checkpoints have it; transformers leaves it out
    (tmp_path / "config.json").write_text(json.dumps({**config, "full_attention_interval": 2}))
    found = rigs.get("qwen2").inside("workshop", job="recurrent_layers", folder=str(tmp_path))
    assert "error" not in found, found["error"]
    assert found["before"], "the step must show"
    assert found["part"]
    assert found["ours"] == ["", ""]
    assert found["ours wrong"] == [[], []]
