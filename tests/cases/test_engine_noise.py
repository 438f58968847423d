"""The noise of an engine is known, and a fault is never taken for noise.

The engine computes in fp32, where the floor is 0.002 nats, so every loss and every fault here lies above it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.families import make_model
from tests.push.lora_rig import LoraRig
from tests.push.rig import Rig

KV = ["fp8_e4m3", "fp8_e5m2"]


class NoisyRig(Rig):
    """A model with log-probabilities that are not flat, and an engine started from it.

    Args:
        dtype: of trainer and engine.
        config: changes to the engine's `config.json` only: a fault that is there before anything is pushed.
        head: factor on the trainer's head, in the checkpoint already.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        family: str = "qwen2",
        config: dict[str, Any] | None = None,
        head: float = 1.0,
        **engine: Any,
    ) -> None:
        model = make_model(family).to(dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(head)
        model.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **(config or {})}))
        super().__init__(folder, model, **engine)

    @property
    def info(self) -> Any:
        return self.b.status().engines[0]


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Callable[..., NoisyRig]]:
    made: list[NoisyRig] = []

    def make(**options: Any) -> NoisyRig:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(NoisyRig(folder, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def rotary(base: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


# ---- honest engines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("head", [1.0, 10.0])
def test_a_coarse_kv_cache_is_served(rigs: Callable[..., NoisyRig], kv: str, head: float) -> None:
    """First the very weights that it was started with, then others, then ten times the logits."""
    rig = rigs(kv_dtype=kv, head=head)
    first = rig.push()
    drift = first.engines[0].canary
    assert first.verified is True
    assert drift is not None
    assert drift.mean_abs > 0.002 * max(1.0, drift.spread), "more than the floor"
    assert drift.noise == pytest.approx(drift.mean_abs / drift.spread)
    assert str(rig.info.losses) == f"a KV cache in {kv}"
    assert rig.info.noise.fraction == pytest.approx(drift.noise)
    assert rig.info.noise.of_rounding == pytest.approx(1, abs=0.2), "the trainer's rounding is this engine's"
    for _ in range(2):
        rig.step()
        assert rig.push().verified is True
        with torch.no_grad():
            rig.model.lm_head.weight.mul_(10)
    assert rig.b.health().healthy
    assert rig.b.rollback().verified is True


def test_an_adapter_goes_over_a_coarse_kv_cache(tmp_path: Path) -> None:
    """Its noise is that of the base, which the engine was started with and the trainer has frozen."""
    from peft import LoraConfig, get_peft_model

    base = make_model("qwen2").float()
    base.save_pretrained(tmp_path)
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    rig = LoraRig(tmp_path, wrapped, kv_dtype="fp8_e5m2")
    try:
        for _ in range(3):
            rig.step()
            receipt = rig.push(mode="adapter")
            drift = receipt.engines[0].canary
            assert drift is not None
            assert drift.noise is not None
            assert receipt.verified is True
    finally:
        rig.close()


def test_an_honest_bf16_engine_is_served_whatever_the_size_of_the_logits(rigs: Callable[..., NoisyRig]) -> None:
    """Its rounding, 0.004 nats here, grows with the head; the floor has to grow with it, also after the start."""
    rig = rigs(dtype=torch.bfloat16, head=10.0)
    drift = rig.push().engines[0].canary
    assert drift is not None
    assert drift.noise is None, "nothing is declared, so nothing is taken for noise"
    with torch.no_grad():
        rig.model.lm_head.weight.mul_(3)
    receipt = rig.push()
    drift = receipt.engines[0].canary
    assert receipt.verified is True
    assert drift is not None
    assert 0.05 < drift.mean_abs < drift.limit == pytest.approx(0.05 * drift.spread)


# ---- faults that were there before anything was pushed --------------------------------------------------------------

FAULTS: Mapping[str, dict[str, Any]] = {
    "rotary base": {"config": rotary(1e6)},
    "a near rotary base": {"config": rotary(2e4)},
    "norm epsilon": {"config": {"rms_norm_eps": 1e-2}},
    "a near norm epsilon": {"config": {"rms_norm_eps": 1e-4}},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_an_undeclared_difference_is_refused_before_the_first_write(
    rigs: Callable[..., NoisyRig], fault: dict[str, Any]
) -> None:
    rig = rigs(**fault)
    before = rig.seen()
    for _ in range(2):  # also the second time: it is no noise that was measured
        with pytest.raises(bridge.CanaryMismatch) as caught:
            rig.push()
        assert type(caught.value) is bridge.CanaryMismatch, "nothing was written, so nothing was aborted"
        assert "before anything was pushed" in str(caught.value)
        assert rig.seen().same(before)
        assert (rig.info.state, rig.info.serving, rig.info.noise) == ("SERVING", 0, None)
    rig.step()
    with pytest.raises(bridge.PushAborted, match="canary"):
        rig.push()


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("fault", ["rotary base", "norm epsilon"])
def test_what_a_coarse_kv_cache_does_not_explain_is_refused(rigs: Callable[..., NoisyRig], kv: str, fault: str) -> None:
    """The trainer knows how much rounding keys and values changes in it; an engine that is as far off again and more
    has something else wrong."""
    rig = rigs(kv_dtype=kv, **FAULTS[fault])
    before = rig.seen()
    for _ in range(2):
        with pytest.raises(bridge.CanaryMismatch, match=f"by more than a KV cache in {kv} can explain") as caught:
            rig.push()
        assert type(caught.value) is bridge.CanaryMismatch
        assert rig.seen().same(before)
        assert rig.info.noise is None


def test_a_stale_scale_is_refused_before_the_first_write(rigs: Callable[..., NoisyRig]) -> None:
    """No bit of the weights shows a rotary table with a scale of other weights."""
    rig = rigs()
    table = rig.engine.runner.model.model.rotary_emb
    turn = type(table).forward

    def scaled(self: Any, *arguments: Any) -> Any:
        cos, sin = turn(self, *arguments)
        return cos * 1.1, sin * 1.1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(table), "forward", scaled)
        with pytest.raises(bridge.CanaryMismatch, match="before anything was pushed"):
            rig.push()
    assert rig.push().verified is True, "and served once it is gone: nothing of it was kept"


# ---- what is no measurement -----------------------------------------------------------------------------------------


def test_a_trainer_that_has_moved_measures_nothing(rigs: Callable[..., NoisyRig]) -> None:
    rig = rigs(kv_dtype="fp8_e5m2")
    rig.step()
    with pytest.raises(bridge.PushAborted) as caught:
        rig.push()
    cause = caught.value.__cause__
    assert isinstance(cause, bridge.CanaryMismatch)
    assert "a KV cache in fp8_e5m2, and its noise is not known" in cause.remedy
    assert rig.info.noise is None
    receipt = rig.push(canary_limit=0.2)  # the last part of the remedy
    drift = receipt.engines[0].canary
    assert receipt.verified is True
    assert drift is not None
    assert (drift.limit, drift.noise) == (0.2, None)
    assert rig.b.health().healthy, "the user's number holds there, too"


def test_nothing_is_measured_after_a_write(rigs: Callable[..., NoisyRig]) -> None:
    """A failing push was put back, and the engine holds its checkpoint's bits; what else was broken, no bit shows."""
    rig = rigs(kv_dtype="fp8_e5m2")
    start = {name: tensor.clone() for name, tensor in rig.model.state_dict().items()}
    rig.step()
    with pytest.raises(bridge.PushAborted):
        rig.push()
    rig.model.load_state_dict(start)
    with pytest.raises(bridge.PushAborted, match="canary"):
        rig.push()
    assert rig.info.noise is None
    rig.b.close()
    rig.b = bridge.attach(rig.engine, model=rig.model)
    with pytest.raises(bridge.PushAborted, match="canary"):
        rig.push()


def test_noise_outlives_the_bridge_that_measured_it(rigs: Callable[..., NoisyRig]) -> None:
    rig = rigs(kv_dtype="fp8_e5m2")
    rig.push()
    noise = rig.info.noise
    rig.b.close()
    rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.step()
    receipt = rig.push()
    drift = receipt.engines[0].canary
    assert receipt.verified is True
    assert drift is not None
    assert drift.noise is not None
    assert rig.info.noise == noise


def test_noise_that_drowns_the_canary_is_said(rigs: Callable[..., NoisyRig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys so large that rounding them turns the attention: the level shows nothing, and the push is "partial"."""
    make = make_model

    def sharp(*arguments: Any) -> Any:
        model = make(*arguments)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.mul_(30)
        return model

    monkeypatch.setattr("tests.cases.test_engine_noise.make_model", sharp)
    rig = rigs(kv_dtype="fp8_e5m2")
    for _ in range(2):
        receipt = rig.push()
        drift = receipt.engines[0].canary
        assert drift is not None
        assert drift.noise is not None
        assert drift.noise > 1 / 4
        assert not drift.conclusive
        assert receipt.verified == "partial"
        assert any("shows nothing" in note and "fp8_e5m2" in note for note in receipt.notes)
        rig.step()
    check = next(check for check in rig.b.health().checks if check.name == "engine0 canary")
    assert (check.ok, check.degraded) == (True, True)
    assert rig.push(canary_limit=5.0).verified is True


# ---- the user's number ----------------------------------------------------------------------------------------------


def test_the_users_number_wins(rigs: Callable[..., NoisyRig]) -> None:
    rig = rigs(config=rotary(1e6))
    with pytest.raises(bridge.CanaryMismatch, match=r"at most 0\.0010 nats"):
        rig.push(canary_limit=0.001)
    drift = rig.push(canary_limit=1).engines[0].canary
    assert drift is not None
    assert drift.limit == 1.0
    rig.step()
    with pytest.raises(bridge.PushAborted, match=r"at most 0\.0020 nats"):
        rig.push(canary_limit="auto")


def test_the_users_number_holds_for_a_rollback(rigs: Callable[..., NoisyRig]) -> None:
    rig = rigs(config=rotary(1e6))
    for limit in (2.0, 3.0):
        assert rig.push(canary_limit=limit).verified is True
        rig.step()
    drift = rig.b.rollback().engines[0].canary
    assert drift is not None
    assert drift.limit == 2.0, "that of the version which is served again"


@pytest.mark.parametrize("limit", [0, -0.1, True, float("nan"), float("inf"), "0.1", None])
def test_what_is_no_limit_is_refused(rigs: Callable[..., NoisyRig], limit: Any) -> None:
    rig = rigs()
    with pytest.raises(bridge.ConfigError, match="where: canary_limit"):
        rig.push(canary_limit=limit)
    assert rig.push(canary_limit=0.1).verified is True


@pytest.mark.parametrize("options", [{"verify": "weights"}, {"verify": "off"}, {"partial": True}])
def test_a_limit_without_a_canary_is_refused(rigs: Callable[..., NoisyRig], options: dict[str, Any]) -> None:
    rig = rigs()
    with pytest.raises(bridge.ConfigError, match="a canary that does not run"):
        rig.push(canary_limit=0.1, **options)
    assert rig.push(**options).version == 1


def test_an_engines_own_dtype_is_declared_by_its_options(tmp_path: Path) -> None:
    make_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(bridge.ConfigError, match="kv_dtype"):
        EngineConfig(str(tmp_path), kv_dtype="fp4")  # type: ignore[arg-type]
    engine = Engine(EngineConfig(str(tmp_path), kv_dtype="fp8_e4m3"))
    (cache, _) = engine.runner._make_kv(1).layers[0]
    assert cache.dtype is torch.float8_e4m3fn
    engine.close()
