"""What is particular to vLLM around a push: its gate, its sleep, requests that it keeps or that its users enqueue."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import bridge
from bridge.errors import ConfigError, DeadlineExceeded, EngineQuarantined, PushAborted
from bridge.protocol.deadline import Deadline
from engine_side.engines.vllm.gate import VllmGate
from tests.contract.scenarios import quarantine, wait_for
from tests.rigs import PROMPTS, Rigs, one_version

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def rig(rigs: Rigs) -> Iterator[Any]:
    yield from one_version(rigs)


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


def test_a_receipt_says_that_caches_are_not_kept(rig: Any) -> None:
    """The canary's prompts run in the blocks of the paused engine, so `kv="keep"` keeps none."""
    assert cached(rig.llm, PROMPTS[2]) < cached(rig.llm, PROMPTS[2])
    receipt = rig.push(kv="keep")
    assert receipt.verified is True
    assert cached(rig.llm, PROMPTS[2]) == 0
    assert any("kept no KV or prefix cache" in note for note in receipt.notes), receipt.notes
    assert not any("kept no KV" in note for note in rig.push().notes)


def cached(llm: Any, ids: list[int]) -> int:
    """Tokens of a prompt that came out of the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return int(out.num_cached_tokens)


def scored(output: Any) -> list[float]:
    """What the engine said of each token that it sampled."""
    return [row[token].logprob for row, token in zip(output.logprobs, output.token_ids, strict=True)]


def largest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_a_caller_behind_the_gate_waits_as_long_as_it_said(rig: Any) -> None:
    gate = VllmGate.of(rig.llm.llm_engine)
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


def test_callers_that_overlapped_are_refused_like_everybody(rig: Any) -> None:
    """Also when somebody wakes the engine up by accident."""

    def roll(tokens: int) -> None:
        rig.b.engines[0].generate([[tokens, 6, 7]], bridge.Sampling(max_tokens=tokens, temperature=0.0))

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        first = one.submit(roll, 20)
        wait_for(lambda: rig.busy or first.done())
        second = other.submit(roll, 200)
        first.result(60)
        assert not second.done()
        second.result(60)
        rig.step()
        quarantine(rig)
        rig.llm.wake_up()
        for pool in (one, other):
            with pytest.raises(EngineQuarantined):
                pool.submit(rig.said).result(60)


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
        rig.step()
        quarantine(rig, inflight="keep")
    unfinished = rig.busy
    assert rig.push().verified is True
    (output,) = rig.llm.wait_for_completion(use_tqdm=False)
    assert not unfinished
    assert output.outputs[0].finish_reason == "abort"
