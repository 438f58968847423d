"""Generation: greedy equals transformers, caches, sampling, pausing in the middle of a sequence, the gate."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge.errors import BridgeError, Busy, Closed, ConfigError, DeadlineExceeded, EngineQuarantined, NotFound
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.embedded.kv import BlockPool
from engine_side.embedded.scheduler import GenerationRequest, Scheduler
from engine_side.engines.embedded import EmbeddedDriver, attach, host
from tests.engine_side import embedded_models as tiny
from tests.engine_side.stopped_engine import Call, no_step, scheduler_of

GREEDY = Sampling(max_tokens=24, temperature=0)
LONG = Sampling(max_tokens=200, temperature=0)
PROMPT = tiny.prompts()[-1]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return tiny.save(tmp_path, "qwen2")


@pytest.fixture
def engine(tmp_path: Path, model: Any) -> Iterator[Engine]:
    with Engine(EngineConfig(str(tmp_path))) as engine:
        yield engine


def until_steps(engine: Engine, steps: int) -> None:
    deadline = Deadline.after(20)
    while engine.steps < steps:
        deadline.check("waiting for the engine")
        time.sleep(0.001)


def replace_weights(engine: Engine, tmp_path: Path) -> Any:
    """Other weights in place, by the engine's own loader."""
    other = tiny.make_model("qwen2", seed=99)
    other.save_pretrained(tmp_path / "other")
    from engine_side.embedded.runner import load_checkpoint

    load_checkpoint(engine.runner.model, tmp_path / "other")
    return other


@pytest.mark.parametrize("family", ["llama-biased", "qwen3", "moe-mixed"])
def test_greedy_is_transformers_greedy(tmp_path: Path, family: str) -> None:
    model = tiny.save(tmp_path, family, tied=True)
    with Engine(EngineConfig(str(tmp_path), layout="packed")) as engine:
        got = engine.generate(tiny.prompts(), GREEDY)
        scored = engine.prompt_logprobs([(*p, *c.token_ids) for p, c in zip(tiny.prompts(), got)])
    for prompt, completion, scores in zip(tiny.prompts(), got, scored):
        assert list(completion.token_ids) == tiny.reference_greedy(model, prompt, 24)
        assert completion.finish_reason == "length"
        assert completion.logprobs == pytest.approx(scores[len(prompt) - 1 :], abs=1e-4)


def test_prefix_cache_is_read_and_changes_nothing(engine: Engine) -> None:
    (cold,) = engine.generate([PROMPT], GREEDY)
    assert engine.cached_blocks_read == 0
    (warm,) = engine.generate([PROMPT], GREEDY)
    assert engine.cached_blocks_read == len(PROMPT) // 16
    assert warm.token_ids == cold.token_ids
    assert warm.logprobs == pytest.approx(cold.logprobs, abs=1e-5)
    (longer,) = engine.generate([(*PROMPT, *cold.token_ids[:20])], Sampling(max_tokens=4, temperature=0))
    assert longer.token_ids == cold.token_ids[20:24]
    assert engine.cached_blocks_read == len(PROMPT) // 16 + (len(PROMPT) + 20) // 16


def test_a_block_is_known_by_all_that_came_before_it(engine: Engine, model: Any) -> None:
    a, b, c, d = ([token] * 16 for token in (3, 50, 90, 120))
    engine.generate([[*a, *b, 1], [*c, *d, 1]], GREEDY)
    (got,) = engine.generate([[*c, *b, 1]], GREEDY)
    assert engine.cached_blocks_read == 1
    assert list(got.token_ids) == tiny.reference_greedy(model, [*c, *b, 1], 24)


def test_a_stale_cache_is_wrong_until_it_is_reset(engine: Engine, tmp_path: Path) -> None:
    engine.generate([PROMPT], GREEDY)
    model = replace_weights(engine, tmp_path)
    (fresh,) = tiny.reference_logprobs(model, [(*PROMPT, 7)])
    assert engine.prompt_logprobs([(*PROMPT, 7)])[0][-1] == pytest.approx(fresh[-1], abs=1e-4)
    wanted = tiny.reference_greedy(model, PROMPT, 24)
    (stale,) = engine.generate([PROMPT], GREEDY)
    assert list(stale.token_ids) != wanted
    assert engine.reset_prefix_cache()
    (again,) = engine.generate([PROMPT], GREEDY)
    assert list(again.token_ids) == wanted


def test_a_small_pool_preempts_and_gives_the_same(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [tiny.reference_greedy(model, prompt, 24) for prompt in tiny.prompts()]
    config = EngineConfig(str(tmp_path), max_seq_len=64, block_size=8, num_blocks=9)
    with Engine(config) as engine:
        preempted: list[int] = []
        preempt = scheduler_of(engine).preempt
        monkeypatch.setattr(scheduler_of(engine), "preempt", lambda rs: preempted.append(len(rs)) or preempt(rs))
        for _ in range(2):
            assert [list(c.token_ids) for c in engine.generate(tiny.prompts(), GREEDY)] == wanted
        assert preempted
        assert engine.reset_prefix_cache(), "no block leaked"


def test_many_threads_get_their_own_answers(engine: Engine, model: Any) -> None:
    calls = [(prompt, Call(lambda p=prompt: engine.generate([p], GREEDY))) for prompt in tiny.prompts() * 2]  # type: ignore[misc]
    for prompt, call in calls:
        assert list(call.result()[0].token_ids) == tiny.reference_greedy(model, prompt, 24)


def test_a_seed_repeats_a_call_but_not_a_prompt(engine: Engine) -> None:
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5)
    group = [PROMPT] * 4
    first, second = engine.generate(group, sampling), engine.generate(group, sampling)
    assert [c.token_ids for c in first] == [c.token_ids for c in second]
    assert len({c.token_ids for c in first}) == 4
    other = engine.generate(group, Sampling(max_tokens=12, temperature=1.0, seed=6))
    assert [c.token_ids for c in first] != [c.token_ids for c in other]


def test_temperature_and_top_p_sample_what_they_should(engine: Engine, model: Any) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].float()
    probs = (logits / 0.7).softmax(-1)
    n = 3000
    got = engine.generate([PROMPT] * n, Sampling(max_tokens=1, temperature=0.7, seed=1))
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in got]), minlength=len(probs)) / n
    assert (counts - probs).abs().sum() < 0.25
    ordered, order = probs.sort(descending=True)
    kept = int((ordered.cumsum(0) - ordered < 0.3).sum())
    nucleus = set(order[:kept].tolist())
    cut = engine.generate([PROMPT] * 500, Sampling(max_tokens=1, temperature=0.7, top_p=0.3, seed=1))
    assert {c.token_ids[0] for c in cut} <= nucleus
    assert len({c.token_ids[0] for c in cut}) > min(2, kept - 1)
    # at temperature 1 and before top-p, whatever was sampled with
    logprobs = logits.log_softmax(-1)
    assert cut[0].logprobs[0] == pytest.approx(float(logprobs[cut[0].token_ids[0]]), abs=1e-4)


def test_stop_tokens_end_a_completion_and_belong_to_it(engine: Engine, model: Any) -> None:
    greedy = tiny.reference_greedy(model, PROMPT, 24)
    stop = greedy[9]
    (got,) = engine.generate([PROMPT], Sampling(max_tokens=24, temperature=0, stop_token_ids=(stop,)))
    assert list(got.token_ids) == greedy[: greedy.index(stop) + 1]
    assert got.finish_reason == "stop"
    assert len(got.logprobs) == len(got.token_ids)


def test_limits(engine: Engine) -> None:
    (none,) = engine.generate([PROMPT], Sampling(max_tokens=0))
    assert none == Completion((), (), "length")
    (full,) = engine.generate([[1] * 250], Sampling(max_tokens=100, temperature=0))
    assert (len(full.token_ids), full.finish_reason) == (6, "length")
    assert engine.generate([], GREEDY) == []
    for prompt, words in (([], "1 to 256"), ([1] * 257, "257"), ([5, 173], "173"), ([-1], "-1")):
        with pytest.raises(ConfigError, match=words):
            engine.generate([[3], prompt], GREEDY)
        with pytest.raises(ConfigError, match="prompt 1"):
            engine.prompt_logprobs([[3], prompt])


def test_pause_keep_goes_on_under_the_new_weights(engine: Engine, model: Any, tmp_path: Path) -> None:
    engine.weight_version = 4
    call = Call(lambda: engine.generate([PROMPT], LONG))
    until_steps(engine, 5)
    engine.pause("keep")
    done = engine.steps
    assert 5 <= done < 200
    assert call.waits()
    assert engine.steps == done, "a paused engine computes nothing"
    other = replace_weights(engine, tmp_path)
    engine.weight_version = 5
    assert not engine.reset_prefix_cache(), "a kept request holds keys and values"
    assert engine.reset_prefix_cache(reset_running_requests=True)
    engine.resume()
    (got,) = call.result()
    old, new = list(got.token_ids[:done]), list(got.token_ids[done:])
    assert old == tiny.reference_greedy(model, PROMPT, done)
    assert new == tiny.reference_greedy(other, (*PROMPT, *old), 200 - done)
    assert got.weight_version == 4
    assert engine.generate([PROMPT], GREEDY)[0].weight_version == 5


def test_pause_abort_returns_what_there_is(engine: Engine, model: Any) -> None:
    call = Call(lambda: engine.generate([PROMPT], LONG))
    until_steps(engine, 3)
    engine.pause("abort")
    (got,) = call.result()
    assert got.finish_reason == "abort"
    assert 3 <= len(got.token_ids) < 200
    assert list(got.token_ids) == tiny.reference_greedy(model, PROMPT, len(got.token_ids))
    assert engine.reset_prefix_cache()
    waiting = Call(lambda: engine.generate([PROMPT], GREEDY))
    assert waiting.waits()
    engine.resume()
    assert waiting.result()[0].finish_reason == "length"


def test_pause_drain_lets_running_requests_finish_and_holds_new_ones(engine: Engine) -> None:
    call = Call(lambda: engine.generate([PROMPT], LONG))
    until_steps(engine, 3)
    pausing = Call(lambda: engine.pause("drain") or [])  # type: ignore[func-returns-value]
    pausing.waits()
    late = Call(lambda: engine.generate([PROMPT], GREEDY))
    assert len(call.result()[0].token_ids) == 200
    pausing.result()
    assert engine.paused
    assert late.waits()
    engine.pause("drain")
    engine.resume()
    engine.resume()
    assert late.result()[0].finish_reason == "length"


def test_a_drain_that_takes_too_long_leaves_the_engine_running(engine: Engine) -> None:
    call = Call(lambda: engine.generate([PROMPT], LONG))
    until_steps(engine, 1)
    with pytest.raises(DeadlineExceeded, match="paused in time"):
        engine.pause("drain", Deadline.after(0.01))
    assert len(call.result()[0].token_ids) == 200
    with pytest.raises(ConfigError, match=r"drain \| abort \| keep"):
        engine.pause("gently")


def test_past_gate_reads_the_cache_while_others_wait(engine: Engine) -> None:
    driver = EmbeddedDriver(engine)
    kept = Call(lambda: engine.generate([PROMPT], LONG))
    until_steps(engine, 3)
    driver.pause("keep", Deadline.after(5))
    before = engine.cached_blocks_read
    (got,) = driver.generate([PROMPT], Sampling(max_tokens=2, temperature=0), past_gate=True)
    assert len(got.token_ids) == 2
    assert engine.cached_blocks_read > before
    assert kept.waits()
    driver.refuse("not verified")
    assert driver.generate([PROMPT], GREEDY, past_gate=True)[0].finish_reason == "length"
    with pytest.raises(EngineQuarantined, match="not verified"):
        kept.result()


def test_refusing_raises_instead_of_hanging(engine: Engine) -> None:
    engine.pause("keep")
    waiting = Call(lambda: engine.generate([PROMPT], GREEDY))
    assert waiting.waits()
    engine.refuse("weights of version 7 are half written")
    with pytest.raises(EngineQuarantined, match="version 7"):
        waiting.result()
    engine.resume()
    with pytest.raises(EngineQuarantined, match="version 7"):
        engine.generate([PROMPT], GREEDY)
    assert engine.prompt_logprobs([PROMPT])
    engine.refuse(None)
    assert engine.generate([PROMPT], GREEDY)[0].finish_reason == "length"


def test_a_failing_step_raises_in_its_caller_and_the_engine_lives(engine: Engine) -> None:
    norm = engine.runner.model.model.norm
    norm.forward = lambda x: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(Exception, match="ZeroDivisionError"):
        engine.generate([PROMPT], GREEDY)
    del norm.forward
    assert engine.generate([PROMPT], GREEDY)[0].finish_reason == "length"


@pytest.mark.parametrize("where", ["_end_without_lora", "schedule", "advance", "_drop_unused"])
def test_no_error_of_a_step_ends_the_engines_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise IndexError(where)

    owner = engine if where.startswith("_") else scheduler_of(engine)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, broken)
        call = Call(lambda: engine.generate([PROMPT], GREEDY))
        if where == "_drop_unused":
            assert call.result()
            assert "could not be dropped" in caplog.text
        else:
            with pytest.raises(BridgeError, match=where):
                call.result()
    assert engine.generate([PROMPT], GREEDY)[0].finish_reason == "length"
    assert engine.reset_prefix_cache(), "no block leaked"


def test_a_request_that_cannot_be_taken_off_the_books_still_answers_its_caller(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise IndexError("the books")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "forward", broken)
        patch.setattr(scheduler_of(engine), "_drop_blocks", broken)
        with pytest.raises(BridgeError, match="the books"):
            Call(lambda: engine.generate([PROMPT], GREEDY)).result()
    assert engine.generate([PROMPT], GREEDY)[0].finish_reason == "length"


def request(first: int, tokens: int, privileged: bool = False) -> GenerationRequest:
    ids = list(range(first, first + tokens))
    return GenerationRequest(ids, Sampling(max_tokens=9), random.Random(0), privileged)


def test_a_privileged_request_does_not_wait_behind_the_queue() -> None:
    scheduler = Scheduler(BlockPool(6, 8), 1, 64)
    running, waiting, push = request(0, 9), request(100, 9), request(200, 9, True)
    scheduler.add([running])
    assert scheduler.schedule(False, 1)
    scheduler.add([waiting, push])
    planned = scheduler.schedule(False, 1)
    assert planned is not None
    assert planned[0] == [push]


def test_no_request_is_preempted_in_the_step_that_admits_it() -> None:
    scheduler = Scheduler(BlockPool(6, 8), 8, 64)
    scheduler.add([request(0, 30), request(50, 30, True)])
    for _ in range(3):
        planned = scheduler.schedule(False, 1)
        assert planned is not None
        chosen, batch = planned
        assert [r.privileged for r in chosen] == [True]
        assert all(batch.tables)
        scheduler.advance(chosen, [1], [0.0])


def test_what_a_step_has_chosen_is_no_victim() -> None:
    scheduler = Scheduler(BlockPool(4, 8), 8, 64)
    scheduler.add([request(0, 20)])
    planned = scheduler.schedule(False, 1)
    assert planned is not None
    assert not scheduler._room(2, (), True, planned[0])
    assert scheduler._room(2, (), True, ())


def test_blocks_that_only_the_victim_shared_are_not_counted_twice() -> None:
    scheduler = Scheduler(BlockPool(6, 8), 8, 64)
    for first in (request(500, 9, True), request(0, 17)):  # two blocks and three
        scheduler.add([first])
        planned = scheduler.schedule(False, 1)
        assert planned is not None
        scheduler.advance(planned[0], [1], [0.0])
    assert scheduler.pool.free == 1
    push = request(0, 33, True)  # two of its five blocks are the victim's; four are left without it
    scheduler.add([push])
    planned = scheduler.schedule(False, 1)
    assert planned is not None
    assert push not in planned[0]


def test_a_decoding_request_pushes_out_no_privileged_one() -> None:
    scheduler = Scheduler(BlockPool(4, 8), 8, 64)
    user, push = request(0, 15), request(50, 14, True)
    scheduler.add([user, push])
    for _ in range(3):
        planned = scheduler.schedule(False, 1)
        assert planned is not None
        scheduler.advance(planned[0], [1] * len(planned[0]), [0.0] * len(planned[0]))
    assert push in scheduler.running
    assert user in scheduler.waiting


def test_a_deadline_ends_what_has_not_finished(engine: Engine) -> None:
    driver = EmbeddedDriver(engine)
    assert len(driver.generate([PROMPT], GREEDY, deadline=Deadline.after(20))[0].token_ids) == 24
    with no_step(engine), pytest.raises(DeadlineExceeded, match="finished"):
        driver.generate([PROMPT], GREEDY, past_gate=True, deadline=Deadline.after(0.05))
    assert not scheduler_of(engine).waiting
    engine.pause("keep")
    with pytest.raises(DeadlineExceeded, match="paused"):
        driver.generate([PROMPT], GREEDY, deadline=Deadline.after(0.05))
    engine.resume()
    assert engine.generate([PROMPT], GREEDY)[0].finish_reason == "length"
    assert engine.reset_prefix_cache(), "no block leaked"


def test_closing_ends_callers(tmp_path: Path, model: Any) -> None:
    engine = Engine(EngineConfig(str(tmp_path)))
    call = Call(lambda: engine.generate([PROMPT], LONG))
    until_steps(engine, 1)
    engine.close()
    engine.close()
    with pytest.raises(Closed):
        call.result()
    with pytest.raises(Closed):
        engine.generate([PROMPT], GREEDY)
    with pytest.raises(Closed):
        engine.prompt_logprobs([PROMPT])


def test_the_driver_knows_no_other_lora_and_no_shared_storage(engine: Engine) -> None:
    driver = EmbeddedDriver(engine)
    assert (driver.kind, driver.ranks, driver.can_generate) == ("embedded", 1, True)
    with pytest.raises(NotFound, match="current"):
        driver.generate([PROMPT], GREEDY, adapter="someone")
    driver.refuse_shared(frozenset({torch.zeros(1).untyped_storage().data_ptr()}))
    mine = engine.runner.model.get_parameter("model.norm.weight")
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        driver.refuse_shared(frozenset({mine.untyped_storage().data_ptr()}))
    driver.publish(9)
    assert engine.generate([PROMPT], GREEDY)[0].weight_version == 9
    assert driver.reset_caches()


def test_one_bridge_at_a_time_drives_an_engine(engine: Engine) -> None:
    first, second = EmbeddedDriver(engine), EmbeddedDriver(engine)
    first.claim("run1")
    with pytest.raises(Busy, match="run1"):
        second.claim("run2")
    first.close()
    second.claim("run2")
    del second
    gc.collect()
    first.claim("run1")


def test_a_refusal_outlives_its_driver(engine: Engine) -> None:
    first = EmbeddedDriver(engine)
    first.refuse("torn")
    first.close()
    second = EmbeddedDriver(engine)
    assert second.refusal == "torn"
    with pytest.raises(EngineQuarantined, match="torn"):
        engine.generate([PROMPT], GREEDY)
    second.refuse(None)
    assert first.refusal is None
    assert engine.generate([PROMPT], GREEDY)


def test_the_longest_prompt_can_be_scored_and_continued(engine: Engine) -> None:
    driver = EmbeddedDriver(engine)
    longest = driver.max_prompt
    assert driver.cache_grain == engine.config.block_size
    prompt = [3] * longest
    assert len(engine.prompt_logprobs([prompt])[0]) == longest - 1
    assert len(engine.generate([prompt], GREEDY)[0].token_ids) == 1
    assert engine.generate([[*prompt, 3]], GREEDY)[0].token_ids == ()
    with pytest.raises(ConfigError, match="length"):
        engine.prompt_logprobs([[*prompt, 3, 3]])


@pytest.mark.parametrize(
    "prompts",
    [
        "hi",
        ["hi"],
        [b"hi"],
        [["h", "i"]],
        [[1.5]],
        [[None]],
        [3, 4],
        [None],
        None,
        7,
        [[]],
        [[-1]],
        [[10**9]],
        [[2**70]],
    ],
)
def test_what_is_no_prompt_is_a_typed_error(engine: Engine, prompts: Any) -> None:
    for call in (lambda: engine.generate(prompts, GREEDY), lambda: engine.prompt_logprobs(prompts)):
        with pytest.raises(ConfigError) as caught:
            call()
        assert caught.value.where is not None
        assert caught.value.expected is not None
        assert caught.value.got is not None


def test_integers_of_any_kind_are_token_ids(engine: Engine) -> None:
    want = engine.generate([PROMPT], GREEDY)[0].token_ids
    for prompt in (tuple(PROMPT), np.array(PROMPT), torch.tensor(PROMPT), range(3)):
        found = engine.generate([prompt], GREEDY)[0].token_ids  # type: ignore[list-item]
        assert isinstance(prompt, range) or found == want


def test_a_hosted_engine_ends_with_its_driver_and_an_attached_one_does_not(tmp_path: Path, engine: Engine) -> None:
    hosted = host(str(tmp_path), {"layout": "packed", "timeout_s": 20})
    assert hosted.generate([PROMPT], GREEDY)[0].token_ids == engine.generate([PROMPT], GREEDY)[0].token_ids
    hosted.close()
    with pytest.raises(Closed):
        hosted.generate([PROMPT], GREEDY)
    attached = attach(engine)
    assert attached is not None
    attached.close()
    assert attached.generate([PROMPT], GREEDY)
    assert attach(torch.nn.Linear(1, 1)) is None
    for wrong in ({"lay_out": "packed"}, {"tensor_parallel_size": "2"}, {"layout": "zigzag"}):
        with pytest.raises(ConfigError, match=r"lay_?out|tensor_parallel_size"):
            host(str(tmp_path), wrong)
