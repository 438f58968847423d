"""`weighbridge bench --engine`: what is not an engine, and the figures of known measurements."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bridge.bench import engine_bench
from bridge.bench.copy_bench import Timed
from bridge.bench.engine_bench import EngineJob, EngineMeasured
from bridge.errors import ConfigError, NotFound


@pytest.mark.parametrize("spec", ["vllm", "vllm:", "embedded:x", ":x", ""])
def test_what_cannot_be_measured(spec: str) -> None:
    with pytest.raises(ConfigError, match="vllm:PATH"):
        engine_bench.run(spec, 1, 0)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        engine_bench.run(f"vllm:{tmp_path}", 1, 0)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_an_engine_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,'
        ' "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}'
    )
    with pytest.raises(ConfigError, match="not installed"):
        engine_bench.run(f"vllm:{tmp_path}", 1, 0)


def test_speed_is_the_engines_own_time_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(seconds: float) -> list[Timed]:
        return [Timed(seconds * k, 0.0, 0.1, {"load": seconds / 2}) for k in (1, 2, 3)]

    def measured(job: EngineJob) -> EngineMeasured:
        variants = {"unverified": timed(1.0), "bits and probes": timed(4.0), "its own": timed(2.0)}
        return EngineMeasured(job, "its own", 5, 10**9, variants, Timed(9.0, 0.0), 3.0)

    monkeypatch.setattr(engine_bench, "_measure", measured)
    rows: dict[str, Any] = engine_bench.run("sglang:anywhere", 3, 0)["variants"]
    assert {name: row["ratio"] for name, row in rows.items()} == {
        "unverified": 2.0, "bits and probes": 0.5, "its own": 1.0,
    }  # fmt: skip
    assert [row["target"] for row in rows.values()] == [1.5, 1.0, None]
    assert rows["unverified"]["phases"] == {"load": 0.5}
