"""Each level is broken on purpose: it fires alone, the others are blind to that fault, and the engine comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import bridge
from bridge.errors import (
    BridgeError,
    CanaryMismatch,
    DeadlineExceeded,
    DigestMismatch,
    EngineQuarantined,
    IntegrityError,
    MissingTensor,
    ProtocolError,
    PushAborted,
)
from bridge.model import canary
from bridge.model.levels import LEVELS, LEVELS_OF
from engine_side.embedded.config import LAYOUTS
from engine_side.engines.embedded import EmbeddedDriver
from tests.conftest import perturb, tiny_qwen2, tiny_qwen3_moe
from tests.push import faults
from tests.push.rig import Rig, said

Save = Callable[[Any], Path]


@pytest.fixture(scope="module")
def folder(checkpoint: Save) -> Path:
    return checkpoint(tiny_qwen2())


@pytest.fixture(scope="module")
def rigs(folder: Path) -> Iterator[Callable[[str], Rig]]:
    """One bridge per layout, shared: after each fault it has to be as good as new anyway."""
    made: dict[str, Rig] = {}

    def get(layout: str) -> Rig:
        if layout not in made:
            made[layout] = Rig(folder, tiny_qwen2(), layout=layout)
            made[layout].good_push()
        return made[layout]

    yield get
    for rig in made.values():
        rig.close()


@pytest.fixture
def fresh(folder: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(folder, tiny_qwen2(), **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


@dataclass(frozen=True)
class Case:
    """`blind`: levels that cannot see this fault; together they let it pass. `wrong`: what the engine then says is
    not what the trainer says. `planned`: the fault is in the plan, so the bridge must be new."""

    level: str
    inject: faults.Inject
    kind: type[BridgeError]
    words: tuple[str, ...]
    blind: tuple[str, ...]
    layout: str = "canonical"
    wrong: bool = True
    planned: bool = False


def without(*levels: str) -> tuple[str, ...]:
    return tuple(level for level in LEVELS if level not in levels)


CASES = {
    "corrupt byte": Case(
        "transfer", faults.corrupt_a_byte, DigestMismatch, (faults.DOWN, "sealed"), without("transfer", "canary"),
    ),
    "dropped move": Case(
        "coverage", faults.drop_a_move, MissingTensor, (faults.QKV, "never written"),
        without("coverage", "probe", "canary"), planned=True,
    ),
    "lost loader": Case(
        "attributes", faults.lose_a_loader, IntegrityError, (faults.QKV, "weight_loader"), without("attributes"),
        wrong=False,
    ),
    "replaced object": Case(
        "attributes", faults.replace_a_parameter, IntegrityError, (faults.QKV, "object_id"), without("attributes"),
        wrong=False,
    ),
    "swapped rows": Case(
        "read-back", faults.swap_rows, DigestMismatch, ("q_proj.weight", faults.QKV), without("read-back", "canary"),
    ),
    "no post-load": Case(
        "probe", faults.skip_post_load, IntegrityError, ("outputs off",), without("probe", "change", "canary"),
        layout="packed",
    ),
    "frozen tensor": Case(
        "change", faults.freeze_a_tensor, IntegrityError, (faults.DOWN, "version before"),
        without("change", "read-back", "canary"),
    ),
    "bent rope": Case(
        "canary", faults.bend_rope, CanaryMismatch, ("log-probabilities", "nats"), without("canary"),
    ),
    "swapped in the plan": Case(
        "canary", faults.swap_in_the_plan, CanaryMismatch, ("log-probabilities", "nats"), without("canary"),
        planned=True,
    ),
    "lying cache": Case(
        "cache", faults.lie_about_the_cache, CanaryMismatch, ("cached prompt",), without("cache"), wrong=False,
    ),
}  # fmt: skip


def pick(case: Case, rigs: Callable[[str], Rig], fresh: Callable[..., Rig], patch: pytest.MonkeyPatch) -> Rig:
    """The bridge for a case, with the fault in it, and a step that is to be pushed."""
    rig = fresh(layout=case.layout) if case.planned else rigs(case.layout)
    case.inject(rig, patch)
    rig.step()
    return rig


def found_bad(receipt: Any) -> set[str]:
    return {level.level for engine in receipt.engines for rank in engine.ranks for level in rank.levels if not level.ok}


@pytest.mark.parametrize("name", CASES)
def test_exactly_this_level_fires(
    name: str, rigs: Callable[[str], Rig], fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    rig = pick(case, rigs, fresh, monkeypatch)
    with rig.unmoved(then_push=False):
        with pytest.raises(BridgeError) as caught:
            rig.push(verify=[case.level])
        error = caught.value
        if case.level in ("transfer", "coverage"):
            assert type(error) is case.kind, "nothing was written yet: the cause itself is raised"
        else:
            assert type(error) is PushAborted
            assert type(error.__cause__) is case.kind
            assert error.exit_code == 7
            assert error.receipt is not None
            assert found_bad(error.receipt) <= {case.level}
            if case.level in ("attributes", "read-back", "probe", "change"):
                assert found_bad(error.receipt) == {case.level}
                said(error, f"the {case.level} check failed")
            assert list(error.serving.values()) == [rig.b.status().committed or 0]
        said(error, *case.words)
    last = rig.b.history(1)[0]
    assert last["error"]
    assert last["verify"] == case.level
    assert not last["verified"]
    monkeypatch.undo()
    if case.planned:
        rig.b.close()
        rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.engine.reset_prefix_cache(reset_running_requests=True)
    rig.good_push()
    assert rig.b.health().healthy


@pytest.mark.parametrize("name", CASES)
def test_the_others_are_blind_to_it(
    name: str, rigs: Callable[[str], Rig], fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that level the push reports success, and the fault is really there: it is this level that catches it."""
    case = CASES[name]
    rig = rigs(case.layout) if not case.planned else fresh(layout=case.layout)
    prompt = canary.prompts(131)[0]
    rig.engine.generate([prompt], bridge.Sampling(max_tokens=1, temperature=0.0))
    case.inject(rig, monkeypatch)
    rig.step()
    receipt = rig.push(verify=case.blind)
    assert receipt.error is None
    assert not found_bad(receipt)
    assert rig.serves(rig.model) is not case.wrong
    if case.level == "cache":
        (token,) = rig.engine.generate([prompt], bridge.Sampling(max_tokens=1, temperature=0.0))
        (right,) = rig.engine.prompt_logprobs([[*prompt, *token.token_ids]])
        assert abs(right[-1] - token.logprobs[0]) > 0.05, "the cache must really be stale"
    monkeypatch.undo()
    rig.engine.reset_prefix_cache(reset_running_requests=True)
    if case.planned:
        return
    if case.level == "attributes":
        with pytest.raises(PushAborted, match="attributes"):
            rig.push()
    elif case.level == "canary":
        rig.engine.runner.model.get_buffer("model.rotary_emb.inverse").div_(3)
    rig.good_push()


@pytest.mark.parametrize("verify", ["weights", "outputs"])
def test_named_sets_of_levels_run_all_of_theirs(rigs: Callable[[str], Rig], verify: str) -> None:
    rig = rigs("canonical")
    receipt = rig.good_push(verify=verify)
    ran = {level.level for level in receipt.engines[0].ranks[0].levels}
    if receipt.engines[0].canary is not None:
        ran.add("canary")
    assert ran == set(LEVELS_OF[verify])


def test_verify_off_says_so(rigs: Callable[[str], Rig]) -> None:
    rig = rigs("canonical")
    rig.step()
    for verify in ("off", [], "transfer"):
        receipt = rig.push(verify=verify)
        assert receipt.verified is False
        assert not rig.b.health().healthy
    rig.good_push()
    assert rig.b.health().healthy


def test_what_nothing_will_read_back_is_written_whole(rigs: Callable[[str], Rig]) -> None:
    """Tensors that did not change in the trainer too: somebody may have written to them in the engine."""
    rig = rigs("canonical")
    rig.good_push()
    with torch.no_grad():
        faults.parameter(rig, faults.DOWN)[0, 0] += 5
    assert not rig.serves(rig.model)
    rig.push(verify="off")
    assert rig.serves(rig.model)


# ---- a slot that is not what was announced --------------------------------------------------------------------------


def test_a_slot_that_is_not_sealed_as_announced_is_not_pushed(
    rigs: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rigs("canonical")
    rig.step()
    with rig.unmoved(then_push=False), monkeypatch.context() as patch:
        faults.on_submit(rig, patch, lambda request: msgspec.structs.replace(request, root=bytes(16)))
        with pytest.raises(ProtocolError, match="not sealed as announced"):
            rig.push()
    rig.good_push()


def test_a_slot_that_was_sealed_anew_is_not_loaded(rigs: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs("canonical")
    rig.step()
    with rig.unmoved(then_push=False), monkeypatch.context() as patch:
        faults.seal_anew(rig, patch)
        with pytest.raises(ProtocolError, match="does not hold the announced version"):
            rig.push()
    rig.good_push()


# ---- a write that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failure_at_any_write_leads_back(
    layout: str, rigs: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rigs(layout)
    with monkeypatch.context() as patch:
        counter = faults.Breaker(patch)
        rig.good_push()
        total = counter.count
    assert total > 8
    for k in sorted({0, 1, total // 2, total - 1}):
        rig.step()
        with rig.unmoved(then_push=False), monkeypatch.context() as patch:
            breaker = faults.Breaker(patch, k)
            with pytest.raises(PushAborted, match=f"write {k} failed") as caught:
                rig.push()
            assert type(caught.value) is PushAborted
            assert breaker.fired
    rig.good_push()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [tiny_qwen2, tiny_qwen3_moe], ids=["dense", "moe"])
def test_a_first_push_that_fails_half_way_leaves_version_0(
    layout: str, make: Any, checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    rig = Rig(checkpoint(model), model, layout=layout)
    try:
        rig.step()
        with rig.unmoved(), monkeypatch.context() as patch:
            faults.Breaker(patch, 9)
            with pytest.raises(PushAborted, match="write 9 failed") as caught:
                rig.push()
            assert caught.value.serving == {"engine0": 0}
    finally:
        rig.close()


def quarantine(rig: Rig, patch: pytest.MonkeyPatch) -> EngineQuarantined:
    with patch.context() as inner:
        faults.Breaker(inner, 3, always=True)
        with pytest.raises(EngineQuarantined, match="write 3 failed") as caught:
            rig.push()
    return caught.value


def test_a_way_back_that_brings_other_weights_is_quarantine(
    fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load that puts the version before back raises nothing, and is wrong. No canary was ever asked for here."""
    rig = fresh()
    rig.good_push(verify="weights")
    rig.step()
    with monkeypatch.context() as patch:
        faults.swap_rows(rig, patch, times=2)
        with pytest.raises(EngineQuarantined, match="the read-back check failed") as caught:
            rig.push(verify="weights")
    assert caught.value.serving == {"engine0": None}
    rig.good_push()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_way_back_that_fails_too_is_quarantine(
    layout: str, first: bool, fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = fresh(layout=layout)
    if not first:
        rig.good_push()
    rig.step()
    error = quarantine(rig, monkeypatch)
    assert error.exit_code == 7
    assert error.serving == {"engine0": None}
    assert error.receipt is not None
    assert error.receipt.engines[0].state == "QUARANTINED"
    assert "the way back failed" in str(error.receipt.engines[0].error)
    answers: list[BaseException] = []

    def ask(generate: Callable[..., Any]) -> None:
        try:
            generate([[1, 2, 3]], bridge.Sampling(max_tokens=2))
        except BaseException as refusal:
            answers.append(refusal)

    threads = [threading.Thread(target=ask, args=(g,)) for g in (rig.b.engines[0].generate, rig.engine.generate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [type(a) for a in answers] == [EngineQuarantined] * 2, "refused at once, on both ways in"
    report = rig.b.health()
    assert not report.healthy
    assert "QUARANTINED" in str(report.to_dict())
    rig.good_push()
    assert rig.b.health().healthy
    assert rig.b.engines[0].generate([[1, 2, 3]], bridge.Sampling(max_tokens=2))[0].token_ids


def test_a_caller_that_waits_is_told_of_the_quarantine(
    fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = fresh()
    rig.step()
    answers: list[Any] = []
    asked = threading.Event()

    def ask() -> None:
        try:
            answers.append(rig.b.engines[0].generate([[1, 2, 3]], bridge.Sampling(max_tokens=2)))
        except EngineQuarantined as refusal:
            answers.append(refusal)

    pause = rig.engine.pause

    def pause_then_ask(*args: Any) -> None:
        pause(*args)
        if not asked.is_set():
            asked.set()
            thread.start()

    thread = threading.Thread(target=ask)
    monkeypatch.setattr(rig.engine, "pause", pause_then_ask)
    quarantine(rig, monkeypatch)
    thread.join(20)
    assert len(answers) == 1
    assert isinstance(answers[0], EngineQuarantined)


def test_the_way_back_is_weighed_by_the_canary_too(fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Derived state that a load cannot mend: bits and probes of the previous version are right, its answers are not."""
    rig = fresh()
    rig.good_push()
    rig.step()
    inverse = rig.engine.runner.model.get_buffer("model.rotary_emb.inverse")
    right = inverse.clone()
    with monkeypatch.context() as patch:
        faults.bend_rope(rig, patch, forever=True)
        with pytest.raises(EngineQuarantined, match="log-probabilities") as caught:
            rig.push()
    assert caught.value.serving == {"engine0": None}
    with pytest.raises(EngineQuarantined):
        rig.b.engines[0].generate([[1, 2, 3]])
    inverse.copy_(right)
    rig.good_push()


def test_the_way_back_from_a_first_push_is_weighed_too(checkpoint: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_qwen2()
    perturb(model, seed=9, scale=0.2)
    rig = Rig(checkpoint(model), model)
    try:
        rig.step()
        faults.bend_rope(rig, monkeypatch, forever=True)
        with pytest.raises(EngineQuarantined, match="log-probabilities"):
            rig.push()
    finally:
        rig.close()


def test_storage_that_the_engine_itself_moved_is_listed(rigs: Callable[[str], Rig]) -> None:
    """An engine that slept and woke up has its parameters elsewhere: said in the receipt, once, and no failure."""
    rig = rigs("canonical")
    weight = rig.engine.runner.model.get_parameter(faults.DOWN)
    weight.data = weight.data.clone()
    assert faults.DOWN in rig.good_push().engines[0].rebound
    assert rig.good_push().engines[0].rebound == ()
    assert torch.equal(weight, dict(rig.model.named_parameters())[faults.DOWN])


def test_a_fault_of_the_load_is_not_healed_in_silence(
    rigs: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when most tensors were skipped as unchanged: the one that was written is wrong, and the push says so."""
    rig = rigs("canonical")
    rig.good_push()
    faults.swap_rows(rig, monkeypatch)
    with torch.no_grad():
        rig.model.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    with rig.unmoved(), pytest.raises(PushAborted, match="read-back"):
        rig.push()


@pytest.mark.parametrize("layout", ["canonical", "packed"])
def test_a_push_that_outlasts_its_deadline_leads_back(
    layout: str, rigs: Callable[[str], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back has a deadline of its own, so running out of time is no quarantine."""
    rig = rigs(layout)
    rig.step()
    with rig.unmoved(), monkeypatch.context() as patch:
        faults.around_apply(patch, None, lambda: time.sleep(0.6))
        with pytest.raises(PushAborted) as caught:
            rig.push(timeout_s=0.3)
        assert type(caught.value) is PushAborted
        assert type(caught.value.__cause__) is DeadlineExceeded


def test_verified_says_only_what_was_shown() -> None:
    trainer = nn.Linear(4, 4)
    with bridge.attach(nn.Linear(4, 4)) as b:
        b.push(trainer.named_parameters())
        assert b.push(trainer.named_parameters(), verify=["coverage"]).verified is False
        assert b.push(trainer.named_parameters(), verify=["read-back"]).verified == "partial"
        assert b.push(trainer.named_parameters(), verify="weights").verified is True


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_stale_prefix_cache_is_found_whatever_the_block_size(
    attached: Any, monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    model = tiny_qwen2()
    _, b = attached(model, block_size=block_size)
    b.push(model.named_parameters())
    perturb(model, scale=0.2)
    monkeypatch.setattr(EmbeddedDriver, "reset_caches", lambda self: True)
    with pytest.raises(bridge.PushAborted, match="cache"):
        b.push(model.named_parameters())
