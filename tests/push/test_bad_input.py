"""Everything wrong that can be handed to a push: the error says what, where, expected, got and the remedy; nothing
moves."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.coordinator.coordinator import Coordinator
from bridge.errors import (
    ArenaFull,
    Busy,
    Closed,
    ConfigError,
    DeadlineExceeded,
    DtypeMismatch,
    DuplicateTensor,
    IntegrityError,
    LeaseHeld,
    MissingTensor,
    NonFinite,
    NotFound,
    ShapeMismatch,
    StaleVersion,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.journal.ledger import Ledger
from engine_side.engines.embedded import EmbeddedDriver
from engine_side.load.loader import Loader
from tests.conftest import perturb, tiny_qwen2
from tests.push.rig import Rig, refused
from tests.rigs import refuses_what_does_not_fit

Save = Callable[[Any], Path]
GATE = "model.layers.1.mlp.gate_proj.weight"  # [80, 48]
BIAS = "model.layers.0.self_attn.k_proj.bias"


@pytest.fixture(scope="module")
def folder(checkpoint: Save) -> Path:
    return checkpoint(tiny_qwen2())


@pytest.fixture(scope="module")
def rig(folder: Path) -> Iterator[Rig]:
    """A bound bridge that has pushed once."""
    made = Rig(folder, tiny_qwen2())
    made.good_push()
    yield made
    made.close()


@pytest.fixture(scope="module")
def unbound(folder: Path) -> Iterator[Rig]:
    """The same without a bound model: every check is the engine's own."""
    made = Rig(folder, tiny_qwen2(), bound=False)
    made.good_push()
    yield made
    made.close()


@pytest.fixture
def fresh(folder: Path) -> Iterator[Callable[..., Rig]]:
    """Rigs of one test."""
    made: list[Rig] = []

    def make(model: Any = None, **options: Any) -> Rig:
        made.append(Rig(folder, model if model is not None else tiny_qwen2(), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


BOTH = pytest.mark.parametrize("which", ["rig", "unbound"])


# ---- names ----------------------------------------------------------------------------------------------------------


@BOTH
def test_a_missing_name(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    with rig.unmoved(), refused(MissingTensor, 5, GATE, "expected", "got", "partial=True") as caught:
        rig.b.push([(n, p) for n, p in rig.named() if n != GATE])
    assert GATE in caught.value.names


@BOTH
def test_an_unknown_name(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    extra = "model.layers.0.self_attn.z_proj.weight"
    with rig.unmoved(), refused(UnexpectedTensor, 5, extra, "expected", "got", "bind") as caught:
        rig.b.push([*rig.named(), (extra, torch.zeros(4, 4))])
    assert caught.value.names == (extra,)


@BOTH
def test_a_name_twice(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    with rig.unmoved(), refused(DuplicateTensor, 5, GATE, "twice", "each name once", "remedy"):
        rig.b.push([*rig.named(), (GATE, torch.zeros(80, 48))])


@BOTH
def test_a_name_twice_in_two_spellings(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    with rig.unmoved(), refused(DuplicateTensor, 5, GATE, "_orig_mod"):
        rig.b.push([*rig.named(), (f"_orig_mod.{GATE}", torch.zeros(80, 48))])


def test_live_names_that_are_not_the_engines_advise_to_bind(unbound: Rig) -> None:
    prefixed = [(f"policy.{n}", p) for n, p in unbound.named()]
    with (
        unbound.unmoved(),
        refused(UnexpectedTensor, 5, "policy.model.embed_tokens", "bind the model") as error,
    ):
        unbound.b.push(prefixed)
    assert len(error.value.names) == len(prefixed)


def test_peft_names_of_the_base_need_no_binding(unbound: Rig) -> None:
    unbound.step()
    hop = {n: n.replace("_proj.", "_proj.base_layer.") for n, _ in unbound.named()}
    receipt = unbound.b.push([(f"base_model.model.{hop[n]}", p) for n, p in unbound.named()])
    assert receipt.verified is True
    assert unbound.serves(unbound.model)


def test_lora_parameters_without_a_bound_model(unbound: Rig) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    with unbound.unmoved(), refused(UnsupportedLora, 5, name, "without their model", "b.bind"):
        unbound.b.push([*unbound.named(), (name, torch.zeros(2, 48))])


# ---- shapes ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shape", [(80, 47), (79, 48), (80, 48, 1), (3840,), (1, 48), ()])
def test_a_wrong_shape(which: str, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    with rig.unmoved(then_push=shape == ()), refused(ShapeMismatch, 5, GATE, str(list(shape)), "expected") as caught:
        rig.b.push(rig.replaced(GATE, torch.ones(shape)))
    assert caught.value.expected
    assert caught.value.remedy


@BOTH
@pytest.mark.parametrize("name", [GATE, "model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight"])
def test_the_transpose(which: str, name: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    right = dict(rig.named())[name]
    with rig.unmoved(then_push=False), refused(ShapeMismatch, 5, name, str(list(right.t().shape)), "expected"):
        rig.b.push(rig.replaced(name, right.t()))


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}, ShapeMismatch, ("configuration",)),
        ({"num_hidden_layers": 3}, UnexpectedTensor, ("model.layers.2.",)),
        ({"num_hidden_layers": 1}, MissingTensor, ("model.layers.1.",)),
        ({"vocab_size": 140}, ShapeMismatch, ("embed_tokens",)),
    ],
    ids=["narrower", "deeper", "shallower", "vocabulary"],
)
def test_a_model_that_is_not_the_engines(
    fresh: Callable[..., Rig], changes: dict[str, Any], kind: type[bridge.BridgeError], words: tuple[str, ...]
) -> None:
    rig = fresh(tiny_qwen2(**changes))
    with rig.unmoved(then_push=False), refused(kind, 5, *words, "expected", "got", "remedy"):
        rig.push()
    rig.model = tiny_qwen2()
    rig.b.bind(rig.model)
    rig.good_push()


# ---- dtypes and values ----------------------------------------------------------------------------------------------


@BOTH
def test_a_dtype_that_cannot_travel(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    with rig.unmoved(), refused(DtypeMismatch, 5, GATE, "complex64", "fp32", "convert"):
        rig.b.push(rig.replaced(GATE, torch.zeros(80, 48, dtype=torch.complex64)))


def test_another_dtype_than_last_time_is_cast_anew(fresh: Callable[..., Rig]) -> None:
    """A changed dtype is another layout: it is planned again, arrives, can be undone, and no old arena stays behind."""
    rig = fresh()
    rig.good_push()
    arenas = len(_shared_memory())
    first = rig.seen()
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        rig.step()
        receipt = rig.b.push([(n, p.to(dtype)) for n, p in rig.named()], verify="weights")
        assert receipt.verified is True
        live = dict(rig.engine.runner.model.named_parameters())["model.norm.weight"]
        assert torch.equal(live, dict(rig.named())["model.norm.weight"].to(dtype).float())
        assert len(_shared_memory()) <= arenas + 1, "arenas of layouts that nobody returns to have to go"
    assert not rig.seen().same(first)
    rig.good_push()
    assert len(_shared_memory()) <= arenas + 1


def _shared_memory() -> list[str]:
    return os.listdir(os.environ["WEIGHBRIDGE_SHM_DIR"])


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(which: str, value: float, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    bad = dict(rig.named())[GATE].clone()
    bad[7, 11] = value
    with (
        rig.unmoved(),
        refused(NonFinite, 5, f"{GATE}[7, 11]", "expected", str(value), "allow_nonfinite=True") as caught,
    ):
        rig.b.push(rig.replaced(GATE, bad))
    assert caught.value.names == (GATE,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_pass_when_allowed(unbound: Rig, value: float) -> None:
    """NaN equals NaN by its bits, so read-back, probes and change can weigh it like any other value."""
    before = unbound.seen()
    bad = dict(unbound.named())[BIAS].clone()
    bad[3] = value
    receipt = unbound.b.push(unbound.replaced(BIAS, bad), allow_nonfinite=True)
    assert receipt.verified is True
    live = dict(unbound.engine.runner.model.named_parameters())["model.layers.0.self_attn.qkv_proj.bias"]
    assert torch.equal(live[48:72], bad) or (math.isnan(value) and bool(live[48 + 3].isnan()))
    unbound.b.rollback()
    assert unbound.seen().same(before)
    unbound.good_push()


def test_an_overflow_of_the_cast(fresh: Callable[..., Rig]) -> None:
    """Finite in the trainer, infinite in the engine's dtype."""
    rig = fresh(dtype="fp16")
    bad = dict(rig.named())[GATE].clone()
    bad[0, 5] = 1e5
    with rig.unmoved(then_push=False), refused(NonFinite, 5, f"{GATE}[0, 5]", "fp16", "inf", "overflow"):
        rig.b.push(rig.replaced(GATE, bad))
    rig.step()
    assert rig.push().verified is True


@BOTH
def test_nothing_at_all(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    with rig.unmoved(then_push=False), refused(MissingTensor, 5, "empty", "expected", "named_parameters()"):
        rig.b.push([])
    used = rig.model.named_parameters()
    list(used)
    with rig.unmoved(), refused(MissingTensor, 5, "used only once"):
        rig.b.push(used)


@BOTH
def test_a_tensor_without_values(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    with rig.unmoved(), refused(IntegrityError, 5, GATE, "meta", "expected", "materialise"):
        rig.b.push(rig.replaced(GATE, torch.empty(80, 48, device="meta")))


@pytest.mark.parametrize("what", ["state dict keys", "triples", "numbers", "names of bytes", "arrays", "a model"])
def test_things_that_are_not_pairs(rig: Rig, what: str) -> None:
    pairs: Any = {
        "state dict keys": [n for n, _ in rig.named()],
        "triples": [(n, p, 1) for n, p in rig.named()],
        "numbers": 3,
        "names of bytes": [(n.encode(), p) for n, p in rig.named()],
        "arrays": [(n, p.numpy()) for n, p in rig.named()],
        "a model": rig.model,
    }[what]
    with rig.unmoved(then_push=False), refused(ConfigError, 2, "(name, tensor) pairs", "expected", "got", "remedy"):
        rig.b.push(pairs)


def test_an_iterable_that_fails_half_way(rig: Rig) -> None:
    def broken() -> Iterator[tuple[str, Any]]:
        yield from rig.named()[:3]
        raise RuntimeError("the data loader died")

    with rig.unmoved(), pytest.raises(RuntimeError, match="the data loader died"):
        rig.b.push(broken())


# ---- words and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("verify", "everything"), ("verify", ["read-back", "nonsense"]), ("verify", 3), ("verify", True),
        ("mode", "fast"), ("mode", None), ("inflight", "kill"), ("kv", "maybe"), ("kv", None),
        ("timeout_s", 0), ("timeout_s", -1.0), ("timeout_s", math.nan), ("timeout_s", "soon"),
        ("version", "7"), ("version", 2.5), ("version", -3), ("version", True), ("version", 1 << 80),
    ],
)  # fmt: skip
def test_options_that_do_not_exist(rig: Rig, option: str, value: Any) -> None:
    shown = "'nonsense'" if isinstance(value, list) else repr(value)
    with rig.unmoved(then_push=False), refused(ConfigError, 2, option, f"got: {shown}"):
        rig.push(**{option: value})


@BOTH
def test_the_canary_needs_a_bound_model(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    if which == "rig":
        assert rig.push(verify="outputs").engines[0].canary is not None
        return
    with rig.unmoved(), refused(ConfigError, 2, "canary", "b.bind(model)", "verify='weights'"):
        rig.push(verify="outputs")


@BOTH
def test_an_old_version(which: str, request: pytest.FixtureRequest) -> None:
    rig: Rig = request.getfixturevalue(which)
    now = rig.push().version
    for old in (now, now - 1, 0):
        with rig.unmoved(then_push=False), refused(StaleVersion, 6, f"above {now}", f"got: {old}", "version=None"):
            rig.push(version=old)
    assert rig.good_push(version=now + 5).version == now + 5
    assert rig.good_push().version == now + 6


# ---- who may push, and when -----------------------------------------------------------------------------------------


def test_a_push_while_another_is_in_flight(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before its snapshot: the trainer side is not even asked to write."""
    held, release = threading.Event(), threading.Event()
    apply = Loader.apply

    def slow(self: Loader, slot: int, changed: Any = None) -> Any:
        held.set()
        release.wait(60)
        return apply(self, slot, changed)

    rig.step()
    monkeypatch.setattr(Loader, "apply", slow)
    try:
        pending = rig.push(wait=False)
        assert held.wait(60)
        assert not pending.done()
        sent = copy.deepcopy(rig.model)
        perturb(rig.model, seed=77)  # the snapshot was taken: this must not arrive

        def write(*_: Any, **__: Any) -> Any:
            raise AssertionError("a snapshot of a refused push")

        with monkeypatch.context() as patch:
            patch.setattr(rig.b._trainer, "write", write)
            for _ in range(2):
                with refused(Busy, 2, "in flight", f"version {pending.version}", f"pid {os.getpid()}", "wait"):
                    rig.push()
            with refused(Busy, 2, "in flight"):
                rig.b.rollback()
    finally:
        release.set()
    receipt = pending.result()
    assert receipt.verified is True
    assert receipt.version == pending.version
    assert rig.serves(sent)
    monkeypatch.undo()
    assert rig.good_push().version == pending.version + 1


def test_a_push_from_inside_a_push(rig: Rig) -> None:
    def nested() -> Iterator[tuple[str, Any]]:
        rig.push()
        yield from rig.named()

    with rig.unmoved(), refused(Busy, 2, "of this process", "wait"):
        rig.b.push(nested())


HOLD_LEASE = """
import sys
from bridge.journal.lease import Lease
lease = Lease.acquire(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_two_trainers(fresh: Callable[..., Rig]) -> None:
    rig = fresh(name="two-trainers")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LEASE, "two-trainers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with rig.unmoved(then_push=False), refused(LeaseHeld, 2, "another trainer", f"pid {other.pid}", "two-trainers"):
            rig.push()
        with refused(LeaseHeld, 2, f"pid {other.pid}"):
            rig.b.rollback()
        other.stdin.close()
        other.wait(30)
    rig.good_push()


def test_a_name_that_another_bridge_of_this_process_uses(fresh: Callable[..., Rig]) -> None:
    fresh(name="taken").good_push()
    with refused(Busy, 2, "journal", "choose another name"):
        fresh(name="taken")


def test_a_closed_bridge(fresh: Callable[..., Rig]) -> None:
    rig = fresh()
    rig.good_push()
    before = rig.seen()
    rig.b.close()
    rig.b.close()
    calls: list[Callable[[], Any]] = [
        rig.push, rig.b.health, rig.b.history, rig.b.rollback, rig.b.status, lambda: rig.b.explain(GATE),
        lambda: rig.b.bind(rig.model),
    ]  # fmt: skip
    for call in calls:
        with refused(Closed, 2, "closed", "connect"):
            call()
    completions = rig.engine.generate([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]], bridge.Sampling(6, temperature=0.0))
    assert completions[0].token_ids == before.tokens[0]
    rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.good_push()


def test_a_name_that_nobody_launched() -> None:
    with refused(NotFound, 2, "nobody-launched-this", "weighbridge up"):
        bridge.connect("nobody-launched-this")


def test_shared_memory_is_full(fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = fresh()
    before = set(_shared_memory())
    monkeypatch.setenv("WEIGHBRIDGE_SHM_LIMIT", "65536")
    with (
        rig.unmoved(then_push=False),
        refused(ArenaFull, 3, "WEIGHBRIDGE_SHM_LIMIT", "expected", "got", "remedy") as got,
    ):
        rig.push()
    assert "65536" in str(got.value) or "64" in str(got.value)
    assert set(_shared_memory()) == before, "nothing may be created"
    monkeypatch.delenv("WEIGHBRIDGE_SHM_LIMIT")
    rig.good_push()


def test_prompts_and_samplings_that_do_not_fit(rig: Rig) -> None:
    limits = rig.engine.runner
    refuses_what_does_not_fit(rig.b.engines[0], limits.model_config.vocab_size, limits.limits.max_seq_len - 1)


def test_a_caller_at_a_paused_engine_waits_as_long_as_it_said(rig: Rig) -> None:
    rig.engine.pause()
    try:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            rig.b.engines[0].generate([[3, 1, 4]], timeout_s=0.3)
        assert 0.2 < time.monotonic() - started < 5
    finally:
        rig.engine.resume()
    assert rig.b.engines[0].generate([[3, 1, 4]], bridge.Sampling(max_tokens=2))


@pytest.mark.parametrize("name", ["no/such name", "", ".hidden", "a" * 65])
def test_a_name_that_is_none_is_refused_before_anything_is_made(
    name: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr("engine_side.engines.registry.adapt", lambda *given: made.append(given))
    with refused(ConfigError, 2, "not a name", "expected", "got"):
        bridge.attach(rig.engine, name=name)
    assert not made


@pytest.mark.parametrize(
    "part", ["engine_side.driver.service.EngineService", "bridge.session.Ledger.open", "bridge.session.Coordinator"]
)
def test_a_refused_attach_lets_go_of_the_engine_and_tells_the_first_error(
    part: str, fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = fresh()
    rig.b.close()
    closed: list[object] = []

    def breaks(*args: Any, **options: Any) -> Any:
        raise RuntimeError("the first error")

    def close(adapter: EmbeddedDriver) -> None:
        closed.append(adapter.engine)
        raise bridge.PeerLost("and a second one")

    with monkeypatch.context() as patch:
        patch.setattr(part, breaks)
        patch.setattr(EmbeddedDriver, "close", close)
        with pytest.raises(RuntimeError, match="the first error"):
            bridge.attach(rig.engine)
    assert closed == [rig.engine]
    rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.good_push()


def test_a_close_that_is_refused_closes_nothing(fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """As by an engine whose event loop runs in the calling thread."""
    rig = fresh()
    rig.good_push()

    def refuse_caller(adapter: EmbeddedDriver) -> None:
        raise ConfigError("not in this thread")

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedDriver, "refuse_caller", refuse_caller, raising=False)
        with pytest.raises(ConfigError, match="not in this thread"):
            rig.b.close()
    rig.good_push()
    rig.b.close()
    with refused(Closed, 2, "closed"):
        rig.push()


def test_no_engine(tmp_path: Path) -> None:
    with refused(ConfigError, 2, "without engines"):
        Coordinator("nobody", [], Ledger.open("nobody", directory=tmp_path), node="here")
    with refused(ConfigError, 2, "nobody knows how to push", "expected", "NoneType"):
        bridge.attach(None)
    with refused(ConfigError, 2, "at least one engine", "0"):
        bridge.launch("embedded:nowhere", engines=0)


# ---- whose storage --------------------------------------------------------------------------------------------------


def test_a_module_pushed_into_itself() -> None:
    model = tiny_qwen2()
    with bridge.attach(model, model=model) as b:
        before = {n: p.clone() for n, p in model.named_parameters()}
        with refused(ConfigError, 2, "share storage", "model.embed_tokens.weight", "copy"):
            b.push(model.named_parameters())
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    twin = copy.deepcopy(model)
    with bridge.attach(twin, model=model) as b:
        perturb(model)
        assert b.push(model.named_parameters()).verified is True
        assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in twin.named_parameters())


def test_an_engines_own_tensor_among_those_sent(rig: Rig) -> None:
    own = dict(rig.engine.runner.model.named_parameters())["model.norm.weight"].detach()
    with rig.unmoved(), refused(ConfigError, 2, "share storage", "model.norm.weight", "clone"):
        rig.b.push(rig.replaced("model.norm.weight", own))
