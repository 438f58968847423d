"""What can go wrong and what may be in flight, on one dense family with tied embeddings (its head is packed twice)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import Busy, ConfigError, DeadlineExceeded, EngineQuarantined, MissingTensor, PushAborted
from bridge.protocol.deadline import Deadline
from tests.push.faults import Breaker
from tests.rigs import difference, refuses_what_does_not_fit
from tests.vllm.rig import PROMPTS

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def rig(rigs: Any) -> Iterator[Any]:
    made = rigs.get("qwen2-tied")
    made.step()
    assert made.push().verified is True
    yield made
    made.step(0)
    assert made.push().verified is True, "a good push works after every test"
    assert made.said() == made.known()


def bits(rig: Any) -> dict[str, bytes]:
    model = rig.rank().host.model
    return {n: t.detach().view(torch.uint8).numpy().tobytes() for n, t in model.named_parameters() if t.numel()}


@pytest.mark.parametrize("k", [0, 1, 5, 9, 16])
def test_a_push_that_fails_midway_leads_back(rig: Any, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, said = bits(rig), rig.said()
    version = rig.b.status().engines[0].serving
    rig.step()
    with monkeypatch.context() as patch:
        faults = Breaker(patch, k)
        with pytest.raises(PushAborted):
            rig.push()
        assert faults.fired
    assert rig.b.status().engines[0].serving == version
    assert bits(rig) == before
    assert rig.said() == said, "packed weights too"


def test_an_engine_that_cannot_be_put_back_refuses(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.step()
    with monkeypatch.context() as patch:
        Breaker(patch, 5, always=True)
        with pytest.raises(EngineQuarantined):
            rig.push()
    with pytest.raises(EngineQuarantined):
        rig.said()
    rig.b.close()
    with pytest.raises(EngineQuarantined):
        rig.said()
    rig.b = bridge.attach(rig.llm, model=rig.model)
    assert rig.push().verified is True


def test_a_subset_leaves_the_rest_bit_identical(rig: Any) -> None:
    before = bits(rig)
    kept = {n: p.detach().clone() for n, p in rig.model.named_parameters()}
    rig.step()
    with pytest.raises(MissingTensor):
        rig.b.push([(n, p) for n, p in rig.model.named_parameters() if ".layers.1." in n])
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if ".layers.1." not in name:
                parameter.copy_(kept[name])
    receipt = rig.b.push([(n, p) for n, p in rig.model.named_parameters() if ".layers.1." in n], partial=True)
    assert receipt.verified is True
    after = bits(rig)
    assert {n for n in before if before[n] != after[n]} == {n for n in before if ".layers.1." in n}
    assert rig.said() == rig.fresh()


def test_only_norms(rig: Any) -> None:
    with torch.no_grad():
        for name, parameter in rig.model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.mul_(1.25)
    norms = [(n, p) for n, p in rig.model.named_parameters() if "norm" in n]
    receipt = rig.b.push(norms, partial=True)
    assert receipt.verified is True
    assert rig.said() == rig.fresh()


def test_a_request_that_is_kept_goes_on_under_the_new_weights_over_all_of_its_tokens(rig: Any) -> None:
    """Its tokens so far stay as they were sampled; its KV is computed anew, so that what follows is what the new
    weights say after them, and not a mixture of both."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=24, temperature=0, detokenize=False, ignore_eos=True, logprobs=0)
    alone = sampling.clone()
    ids = PROMPTS[1]
    (under_old,) = rig.llm.generate([{"prompt_token_ids": ids}], alone, use_tqdm=False)
    old = int(rig.llm.llm_engine.get_weight_version())
    rig.llm.enqueue([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    for _ in range(6):
        assert not rig.llm.llm_engine.step()
    rig.step()
    receipt = rig.push(inflight="keep")
    (cache,) = [level for level in receipt.engines[0].ranks[0].levels if level.level == "cache"]
    assert "kept" in str(cache.note), "to ask the cached prompt again, vLLM would have run the kept one as well"
    ((output,),) = [out.outputs for out in rig.llm.wait_for_completion(use_tqdm=False)]
    spans = [(int(span.version), int(span.start)) for span in output.weight_versions]
    assert [version for version, _ in spans] == [old, receipt.version]
    kept = spans[1][1]
    assert 0 < kept < 24
    assert list(output.token_ids[:kept]) == list(under_old.outputs[0].token_ids[:kept])
    rest = SamplingParams(max_tokens=24 - kept, temperature=0, detokenize=False, ignore_eos=True, logprobs=0)
    begun = [*ids, *output.token_ids[:kept]]
    (fresh,) = rig.llm.generate([{"prompt_token_ids": begun}], rest, use_tqdm=False)
    assert list(output.token_ids[kept:]) == list(fresh.outputs[0].token_ids)
    assert list(output.token_ids[kept:]) != list(under_old.outputs[0].token_ids[kept:])
    assert largest(scored(output)[:kept], scored(under_old.outputs[0])[:kept]) < 0.02, "sampled under the old weights"
    assert largest(scored(output)[kept:], scored(fresh.outputs[0])) < 0.02


def scored(output: Any) -> list[float]:
    """What the engine said of each token that it sampled."""
    return [row[token].logprob for row, token in zip(output.logprobs, output.token_ids, strict=True)]


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["keep", "abort", "drain"])
def test_requests_in_flight(rig: Any, mode: str) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=30, temperature=0, detokenize=False, ignore_eos=True)
    rig.llm.enqueue([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    for _ in range(6):
        assert not rig.llm.llm_engine.step()
    old = int(rig.llm.llm_engine.get_weight_version())
    rig.step()
    receipt = rig.push(inflight=mode)
    assert receipt.verified is True
    outputs = rig.llm.wait_for_completion(use_tqdm=False)
    assert len(outputs) == len(PROMPTS)
    for output in outputs:
        (first,) = output.outputs
        served = [int(span.version) for span in first.weight_versions]
        if mode == "keep":
            assert (len(first.token_ids), first.finish_reason, served) == (30, "length", [old, receipt.version])
        elif mode == "abort":
            assert len(first.token_ids) < 30
            assert (first.finish_reason, served) == ("abort", [old])
        else:
            assert (len(first.token_ids), first.finish_reason, served) == (30, "length", [old])


@pytest.mark.parametrize("mode", ["keep", "abort", "drain"])
def test_rollouts_in_flight(rig: Any, mode: str) -> None:
    """Those that were asked of the bridge are requests like others."""
    old = int(rig.llm.llm_engine.get_weight_version())
    asked = bridge.Sampling(max_tokens=150, temperature=0.0)
    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(rig.b.engines[0].generate, PROMPTS[:2], asked)
        while not (rig.llm.llm_engine.has_unfinished_requests() or rolling.done()):
            pass
        rig.step()
        receipt = rig.push(inflight=mode)
        said = rolling.result(60)
    assert receipt.verified is True
    assert [one.weight_version for one in said] == [old, old]
    assert [one.finish_reason for one in said] == ["abort" if mode == "abort" else "length"] * 2
    assert all((len(one.token_ids) == 150) is (mode != "abort") for one in said)


def test_a_thread_that_generates_meanwhile(rig: Any) -> None:
    """It waits while the weights change hands, and sees one version after the other."""
    said: list[Any] = []
    stop = threading.Event()

    def user() -> None:
        while not stop.is_set():
            said.append(rig.b.engines[0].generate(PROMPTS[:1], bridge.Sampling(max_tokens=8, temperature=0.0)))

    thread = threading.Thread(target=user)
    thread.start()
    try:
        for _ in range(3):
            rig.step()
            assert rig.push(inflight="keep").verified is True
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    versions = [row[0].weight_version for row in said]
    assert versions == sorted(versions)


def test_caches_that_are_not_reset_are_found(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of seeds of their own: the check weighs one token, which may be as likely over old KV by chance."""
    rig.step(101)
    assert rig.push().verified is True
    rig.step(102)
    with monkeypatch.context() as patch:
        patch.setattr(type(rig.llm.llm_engine), "reset_prefix_cache", lambda *_, **__: True)
        with pytest.raises(PushAborted, match="cache"):
            rig.push()


def test_two_bridges(rig: Any) -> None:
    """The one that is refused leaves the gate of the other one where it is."""
    gate = vars(rig.llm.llm_engine)["_weighbridge_gate"]
    with pytest.raises(Busy):
        bridge.attach(rig.llm, model=rig.model)
    assert vars(rig.llm.llm_engine)["_weighbridge_gate"] is gate


def test_a_refused_attach_leaves_the_engine_as_it_was(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: Any, **options: Any) -> Any:
        raise RuntimeError("on purpose")

    rig.b.close()
    before = dict(vars(rig.llm.llm_engine))
    with monkeypatch.context() as patch:
        patch.setattr("bridge.session.Coordinator", breaks)
        with pytest.raises(RuntimeError, match="on purpose"):
            bridge.attach(rig.llm)
    assert vars(rig.llm.llm_engine) == before
    rig.b = bridge.attach(rig.llm, model=rig.model)


def test_prompts_and_samplings_that_do_not_fit(rig: Any) -> None:
    config = rig.llm.llm_engine.vllm_config.model_config
    refuses_what_does_not_fit(rig.b.engines[0], rig.model.config.vocab_size, config.max_model_len - 1)


def test_a_caller_behind_the_gate_waits_as_long_as_it_said(rig: Any) -> None:
    gate = vars(rig.llm.llm_engine)["_weighbridge_gate"]
    gate.hold(Deadline.after(10))
    try:
        with pytest.raises(DeadlineExceeded):
            rig.b.engines[0].generate([[5]], timeout_s=0.3)
    finally:
        gate.release()
    assert rig.b.engines[0].generate([[5]], bridge.Sampling(max_tokens=1))


def test_an_engine_asleep(rig: Any) -> None:
    rig.llm.sleep(level=0, mode="keep")
    try:
        with pytest.raises((ConfigError, PushAborted), match="asleep"):
            rig.push()
    finally:
        rig.llm.wake_up()


def test_rollback(rig: Any) -> None:
    said = rig.said()
    rig.step()
    rig.push()
    assert difference(rig.said(), said) > 0.1
    rig.b.rollback()
    assert rig.said() == said


def quarantine(rig: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    rig.step()
    with monkeypatch.context() as patch:
        Breaker(patch, 5, always=True)
        with pytest.raises(EngineQuarantined):
            rig.push(**options)


def test_callers_that_overlapped_are_refused_like_everybody(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when somebody wakes the engine up by accident."""

    def roll(tokens: int) -> None:
        rig.b.engines[0].generate([[tokens, 6, 7]], bridge.Sampling(max_tokens=tokens, temperature=0.0))

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        first = one.submit(roll, 20)
        while not (rig.llm.llm_engine.has_unfinished_requests() or first.done()):
            pass
        second = other.submit(roll, 200)
        first.result(60)
        assert not second.done()
        second.result(60)
        quarantine(rig, monkeypatch)
        rig.llm.wake_up()
        for pool in (one, other):
            with pytest.raises(EngineQuarantined):
                pool.submit(rig.said).result(60)


def test_what_is_inside_a_torn_engine_is_ended(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = bridge.Sampling(max_tokens=200, temperature=0.0)
        rolling = pool.submit(rig.b.engines[0].generate, [[5, 6, 7]], asked)
        while not (rig.llm.llm_engine.has_unfinished_requests() or rolling.done()):
            pass
        quarantine(rig, monkeypatch, inflight="keep")
        rig.llm.wake_up()
        with pytest.raises(EngineQuarantined):
            rolling.result(30)
    assert not rig.llm.llm_engine.has_unfinished_requests()


def test_users_requests_inside_are_ended(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=200, temperature=0, detokenize=False, ignore_eos=True)
    rig.llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], sampling, use_tqdm=False)
    for _ in range(6):
        assert not rig.llm.llm_engine.step()

    def torn(*_: Any) -> None:
        raise RuntimeError("no way back")

    with monkeypatch.context() as patch:
        patch.setattr("engine_side.driver.service.EngineService._load_back", torn)
        quarantine(rig, monkeypatch, inflight="keep")
    engine = rig.llm.llm_engine
    unfinished = type(engine).has_unfinished_requests(engine)
    assert rig.push().verified is True
    (output,) = rig.llm.wait_for_completion(use_tqdm=False)
    assert not unfinished
    assert output.outputs[0].finish_reason == "abort"


def test_who_waits_is_refused(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    gate = vars(rig.llm.llm_engine)["_weighbridge_gate"]

    def late() -> None:
        while not gate.held:
            time.sleep(0.001)
        rig.llm.enqueue([{"prompt_token_ids": PROMPTS[0]}], SamplingParams(max_tokens=4), use_tqdm=False)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(late)
        time.sleep(0.1)
        quarantine(rig, monkeypatch)
        with pytest.raises(EngineQuarantined):
            waiting.result(30)
    engine = rig.llm.llm_engine
    assert not type(engine).has_unfinished_requests(engine)
