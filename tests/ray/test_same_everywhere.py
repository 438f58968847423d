"""`launch`, `connect` and `attach` give the same Bridge: one scenario, three ways to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.daemon import actors
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.conftest import perturb, tiny_qwen2
from tests.ray.test_daemon import greedy, serves


@pytest.fixture(params=["attach", "launch", "connect"])
def made(
    request: pytest.FixtureRequest, run: dict[str, Any], start_folder: Path
) -> Iterator[tuple[bridge.Bridge, Any, int]]:
    """(bridge, its bound model, the version that is served)."""
    model = tiny_qwen2(seed=0)
    if request.param == "connect":
        with bridge.connect("run", model=model) as b:
            b.push(model.named_parameters())
            yield b, model, b.status().committed or 0
    elif request.param == "launch":
        b = bridge.launch(f"embedded:{start_folder}", name="launched", model=model)
        yield b, model, 0
        b.shutdown()
        assert "launched" not in actors.running()
        assert "run" in actors.running(), "a daemon that ends leaves the others and their Ray alone"
    else:
        engine = Engine(EngineConfig(str(start_folder)))
        b = bridge.attach(engine, model=model)
        yield b, model, 0
        b.shutdown()
        assert not engine.paused, "an attached engine stays its owner's, running"
        engine.close()


def test_the_same_calls_do_the_same(made: tuple[bridge.Bridge, Any, int]) -> None:
    b, model, version = made
    first = greedy(model)
    serves(b, version, model)
    perturb(model, seed=1)
    receipt = b.push(model.named_parameters())
    assert (receipt.version, receipt.previous, receipt.verified) == (version + 1, version, True)
    assert receipt.engines[0].canary is not None
    assert set(receipt.phases) >= {"plan", "snapshot", "transfer", "load", "verify", "commit"}
    serves(b, version + 1, model)
    pending = b.push(model.named_parameters(), wait=False)
    assert pending.result(60).version == version + 2
    assert pending.done()
    with pytest.raises(bridge.StaleVersion):
        b.push(model.named_parameters(), version=version + 2)
    named = dict(model.named_parameters())
    lost = named.pop("model.layers.1.self_attn.k_proj.bias")
    with pytest.raises(bridge.MissingTensor, match=r"layers\.1\.self_attn\.k_proj\.bias"):
        b.push(named.items())
    with pytest.raises(bridge.ShapeMismatch, match="k_proj"):
        b.push([*named.items(), ("model.layers.1.self_attn.k_proj.bias", lost[:-1])])
    serves(b, version + 2, model)
    perturb(model, seed=2)
    b.push(model.named_parameters(), version=version + 9)
    assert greedy(model) != first
    back = b.rollback()
    assert back.version == version + 2
    assert [row["version"] for row in b.history()][-2:] == [version + 9, version + 2]
    rows = b.explain("model.layers.0.self_attn.q_proj.bias")
    assert {row["parameter"] for row in rows} == {"model.layers.0.self_attn.qkv_proj.bias"}
    assert len(rows) == len(b.engines)
    assert b.push(model.named_parameters()).version == version + 10
    report = b.health()
    assert report.status == "healthy", [check for check in report.checks if not check.ok or check.degraded]
    b.close()
    with pytest.raises(bridge.Closed):
        b.push(model.named_parameters())
