"""Options, versions, prompts, names, folders and who may push when: each remedy is followed, and a push then works."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.errors import (
    ArenaFull,
    Busy,
    Closed,
    ConfigError,
    DeadlineExceeded,
    EngineQuarantined,
    LeaseHeld,
    NotFound,
    ProtocolError,
    StaleVersion,
)
from bridge.journal.ledger import JOURNAL
from engine_side.load.loader import Loader
from tests.cases.raised import provoked
from tests.conftest import tiny_qwen2
from tests.push.faults import Breaker
from tests.push.rig import PROMPTS, Rig

OPTIONS, GENERATE = "bridge/push_settings.py", "bridge/generate_options.py"
CHECKS, SERVICE = "engine_side/driver/prompt_checks.py", "engine_side/driver/service.py"
PORTS = "bridge/ports.py"
REGISTRY, CLI = "engine_side/engines/registry.py", "bridge/cli/commands.py"
COORDINATOR, LEDGER, FILES = "bridge/coordinator/coordinator.py", "bridge/journal/ledger.py", "bridge/shm/files.py"
SHORT = bridge.Sampling(max_tokens=2, temperature=0.0)


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(tiny_qwen2())


@pytest.fixture(scope="module")
def rig(folder: Path) -> Iterator[Rig]:
    made = Rig(folder, tiny_qwen2())
    yield made
    made.close()


@pytest.fixture
def fresh(folder: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(folder, tiny_qwen2(), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "key", "right"),
    [
        ("verify", "everything", f"{OPTIONS}: no such choice", {"verify": "weights"}),
        ("mode", "fast", f"{OPTIONS}: no such choice", {"mode": "auto"}),
        ("inflight", "kill", f"{OPTIONS}: no such choice", {"inflight": "abort"}),
        ("kv", "maybe", f"{OPTIONS}: no such choice", {"kv": "keep"}),
        ("timeout_s", -1, f"{OPTIONS}: a deadline must be positive", {"timeout_s": 60}),
        ("timeout_s", "soon", f"{OPTIONS}: a deadline must be positive", {}),
        ("version", "7", f"{OPTIONS}: not a version", {}),
    ],
)
def test_options(rig: Rig, option: str, value: Any, key: str, right: dict[str, Any]) -> None:
    with provoked(ConfigError, key):
        rig.push(**{option: value})
    rig.good_push(**right)


def test_modes_and_levels_that_need_a_bound_model(fresh: Callable[..., Rig]) -> None:
    unbound = fresh(bound=False)
    with provoked(ConfigError, f"{OPTIONS}: the canary needs the live model", "b.bind(model)", "verify='weights'"):
        unbound.push(verify="outputs")
    unbound.good_push(verify="weights")
    with provoked(ConfigError, "trainer_side/trainer.py: this mode needs a model with LoRA", "b.bind(model)"):
        unbound.push(mode="merged")
    unbound.b.bind(unbound.model)
    with provoked(ConfigError, "trainer_side/trainer.py: this mode needs a model with LoRA", "leave mode out"):
        unbound.push(mode="merged")
    unbound.good_push(verify="outputs")


def test_versions(rig: Rig) -> None:
    now = rig.push().version
    with provoked(StaleVersion, f"{LEDGER}: this version is not newer than what was issued before", "version=None"):
        rig.push(version=now)
    rig.good_push(version=None)


def test_nothing_to_go_back_to(fresh: Callable[..., Rig]) -> None:
    rig = fresh()
    with provoked(StaleVersion, "bridge/coordinator/rollback.py: there is no previous version to return to", "push"):
        rig.b.rollback()
    rig.good_push()


def test_explanations(fresh: Callable[..., Rig]) -> None:
    rig = fresh()
    key = f"{COORDINATOR}: nothing was pushed yet, so there is no plan to explain"
    with provoked(NotFound, key, "push once"):
        rig.b.explain("lm_head.weight")
    rig.good_push()
    with provoked(NotFound, f"{COORDINATOR}: no such tensor in the plan", "manifest") as caught:
        rig.b.explain("lm_head")
    assert rig.b.explain(str(caught.value.expected).rpartition("such as ")[2])


@pytest.mark.parametrize(
    ("prompts", "sampling", "key"),
    [
        ([5, 6], SHORT, f"{GENERATE}: not a prompt of token ids"),
        ([[5], []], SHORT, f"{GENERATE}: an empty prompt"),
        ([[-5]], SHORT, f"{GENERATE}: not a token id"),
        ([[5]], {"max_tokens": 3}, f"{GENERATE}: not a sampling"),
        ([[5]], bridge.Sampling(top_p=0.0), f"{GENERATE}: a sampling that no engine can take"),
        ([[5]], bridge.Sampling(temperature=float("nan")), f"{GENERATE}: a sampling that no engine can take"),
    ],
)
def test_prompts(rig: Rig, prompts: Any, sampling: Any, key: str) -> None:
    with provoked(ConfigError, key):
        rig.b.engines[0].generate(prompts, sampling)
    assert rig.b.engines[0].generate([[5]], SHORT)


def test_prompts_that_this_engine_cannot_take(rig: Rig) -> None:
    with provoked(ConfigError, f"{CHECKS}: a prompt's length does not fit", "shorten"):
        rig.b.engines[0].generate([[5] * 5000], SHORT)
    with provoked(ConfigError, f"{CHECKS}: a token id outside the vocabulary", "tokenise"):
        rig.b.engines[0].generate([[131]], SHORT)
    with provoked(ConfigError, f"{GENERATE}: an adapter is chosen by name", "leave it out"):
        rig.b.engines[0].generate([[5]], SHORT, adapter=3)  # type: ignore[arg-type]
    with provoked(ConfigError, f"{GENERATE}: a deadline must be positive", "leave it out"):
        rig.b.engines[0].generate([[5]], SHORT, timeout_s=0)
    with pytest.raises(NotFound, match="remedy: "):
        rig.b.engines[0].generate([[5]], SHORT, adapter="nobody's")
    assert rig.b.engines[0].generate([[130], [5] * 40], SHORT)


# ---- who, when ------------------------------------------------------------------------------------------------------


def test_pushes_that_meet(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def nested() -> Iterator[tuple[str, Any]]:
        rig.push()
        yield from rig.named()

    with provoked(Busy, "bridge/client.py: another push of this process is in flight", "wait"):
        rig.b.push(nested())
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
        with provoked(Busy, f"{COORDINATOR}: another push is in flight", "wait"):
            rig.push()
        with provoked(DeadlineExceeded, "bridge/handles.py: the push has not ended yet", "result()"):
            pending.result(0.1)
    finally:
        release.set()
    assert pending.result(60).verified is True
    rig.good_push()


def test_a_bridge_that_is_closed(fresh: Callable[..., Rig]) -> None:
    rig = fresh()
    with rig.b.collect() as push:
        push.add(rig.named())
    with provoked(Closed, "bridge/collection.py: this collection takes nothing any more", "with b.collect()"):
        push.add(rig.named())
    rig.b.close()
    with provoked(Closed, "bridge/client.py: this Bridge was closed", "bridge.attach"):
        rig.push()
    rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.good_push()


def test_two_bridges(fresh: Callable[..., Rig]) -> None:
    rig = fresh(name="first")
    with provoked(
        Busy, "engine_side/engines/common/claim.py: another bridge drives this engine", "close bridge 'first'"
    ):
        bridge.attach(rig.engine, name="second")
    with provoked(Busy, f"{LEDGER}: another daemon has this journal open", "another name"):
        fresh(name="first")
    rig.b.close()
    rig.b = bridge.attach(rig.engine, name="second", model=rig.model)
    rig.good_push()


def test_another_trainer(fresh: Callable[..., Rig]) -> None:
    rig = fresh(name="remedies-two-trainers")
    script = (
        "import sys; from bridge.journal.lease import Lease; lease = Lease.acquire(sys.argv[1]); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, "remedies-two-trainers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "held"
        with provoked(
            LeaseHeld, "bridge/journal/lease.py: another trainer holds the right to push", "end that trainer"
        ):
            rig.push()
        other.stdin.close()
        other.wait(30)
    rig.good_push()


def test_a_forked_child(fresh: Callable[..., Rig]) -> None:
    rig = fresh()
    rig.good_push()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with provoked(
                Closed,
                f"{PORTS}: this Bridge belongs to the process that opened it, and this is a forked child of it",
                "in the parent",
            ):
                rig.push()
            os.write(write, b"right")
        except BaseException as error:
            os.write(write, str(error).encode()[:400])
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 400) == b"right"
    os.close(read)
    os.close(write)
    rig.good_push()


def test_what_can_be_attached(fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    key = "engine_side/engines/registry.py: nobody knows how to push into this object"
    with provoked(ConfigError, key, "attach the engine itself"):
        bridge.attach(None)
    with provoked(ConfigError, key, "bridge.launch"):
        bridge.attach("embedded:here")
    with pytest.raises(bridge.BridgeError, match=r"remedy: "):
        bridge.attach("http://")
    key = "engine_side/engines/common/server_discovery.py: no server answers at this address"
    with provoked(ConfigError, key, "start it"):
        bridge.attach("http://127.0.0.1:9")
    rig = fresh()
    with provoked(ConfigError, "bridge/journal/state_dir.py: not a name for a bridge", "another name"):
        bridge.attach(rig.engine, name="no/such name")
    with provoked(ConfigError, "bridge/config.py: an environment variable does not fit", "unset"):
        monkeypatch.setenv("WEIGHBRIDGE_THREADS", "many")
        rig.b.close()
        bridge.attach(rig.engine)
    monkeypatch.delenv("WEIGHBRIDGE_THREADS")
    rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.good_push()


def test_what_can_be_launched(folder: Path) -> None:
    with provoked(ConfigError, "bridge/api.py: at least one engine is needed", "leave it out"):
        bridge.launch(f"embedded:{folder}", engines=0)
    with provoked(ConfigError, f"{REGISTRY}: no such kind of engine", "in front of the folder"):
        bridge.launch(str(folder))
    with provoked(NotFound, f"{REGISTRY}: no such checkpoint folder", "folder"):
        bridge.launch("embedded:nowhere")
    with provoked(NotFound, "bridge/daemon/actors.py: no daemon of that name: {}", "weighbridge up"):
        bridge.connect("nobody-launched-this")


def test_the_most_recent_bridge(rig: Rig, fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.api._most_recent", None)
    with provoked(ConfigError, "bridge/api.py: there is no Bridge yet", "keep b"):
        bridge.push(rig.model.named_parameters())
    monkeypatch.setattr("bridge.api._most_recent", lambda: None)
    gone = "bridge/api.py: the most recent Bridge is gone: nothing referred to it any more"
    with provoked(ConfigError, gone, "keep b"):
        bridge.push(rig.model.named_parameters())
    monkeypatch.undo()
    kept = fresh()
    kept.step()
    assert bridge.push(kept.model.named_parameters()).verified is True
    assert kept.serves(kept.model)


# ---- memory and folders ---------------------------------------------------------------------------------------------


def test_shared_memory(fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = fresh()
    monkeypatch.setenv("WEIGHBRIDGE_SHM_LIMIT", "65536")
    with provoked(ArenaFull, f"{FILES}: not enough shared memory for the arena", "raise the limit"):
        rig.push()
    monkeypatch.setenv("WEIGHBRIDGE_SHM_LIMIT", "much")
    with provoked(ConfigError, f"{FILES}: not a number of bytes", "unset"):
        rig.push()
    monkeypatch.delenv("WEIGHBRIDGE_SHM_LIMIT")
    rig.good_push()


def test_a_folder_that_is_not_there(fresh: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rig = fresh()
    rig.b.close()
    before = os.environ["WEIGHBRIDGE_SHM_DIR"]
    monkeypatch.setenv("WEIGHBRIDGE_SHM_DIR", str(tmp_path / "nowhere"))
    with provoked(ConfigError, f"{FILES}: the shared memory folder does not exist", "WEIGHBRIDGE_SHM_DIR"):
        rig.b = bridge.attach(rig.engine, model=rig.model)
    monkeypatch.setenv("WEIGHBRIDGE_SHM_DIR", before)
    (tmp_path / "file").write_text("")
    state = os.environ["XDG_STATE_HOME"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with provoked(ConfigError, "bridge/journal/state_dir.py: the state folder cannot be used", "XDG_STATE_HOME"):
        rig.b = bridge.attach(rig.engine, name="somewhere", model=rig.model)
    monkeypatch.setenv("XDG_STATE_HOME", state)
    rig.b = bridge.attach(rig.engine, name="somewhere", model=rig.model)
    rig.good_push()


def test_a_journal_that_is_none(fresh: Callable[..., Rig]) -> None:
    rig = fresh(name="journalled")
    rig.good_push()
    rig.b.close()
    (journal,) = Path(os.environ["XDG_STATE_HOME"]).rglob(JOURNAL)
    journal.write_bytes(b"not a journal at all" * 400)
    with pytest.raises(ProtocolError, match=r"remedy: (move it away|restore)"):
        rig.b = bridge.attach(rig.engine, name="journalled", model=rig.model)
    for path in journal.parent.glob(f"{journal.name}*"):
        path.rename(path.with_name(f"away-{path.name}"))
    rig.b = bridge.attach(rig.engine, name="journalled", model=rig.model)
    rig.good_push()


# ---- engines that serve nothing -------------------------------------------------------------------------------------


def test_a_quarantined_engine(fresh: Callable[..., Rig]) -> None:
    rig = fresh()
    rig.good_push()
    with pytest.MonkeyPatch.context() as patch:
        Breaker(patch, 0, always=True)
        rig.step()
        with pytest.raises(EngineQuarantined, match=r"remedy: engines now serve engine0: nothing"):
            rig.push()
    with provoked(
        EngineQuarantined, f"{SERVICE}: this engine holds weights that nobody verified and serves nothing", "push"
    ):
        rig.b.engines[0].generate(PROMPTS, SHORT)
    with provoked(EngineQuarantined, "engine_side/embedded/engine.py: this engine refuses to generate", "push"):
        rig.engine.generate(PROMPTS, SHORT)
    rig.good_push()
    assert rig.b.engines[0].generate(PROMPTS, SHORT)


def test_a_paused_engine(rig: Rig) -> None:
    rig.engine.pause()
    try:
        with pytest.raises(DeadlineExceeded, match="remedy: "):
            rig.b.engines[0].generate([[3, 1, 4]], SHORT, timeout_s=0.2)
    finally:
        rig.engine.resume()
    assert rig.b.engines[0].generate([[3, 1, 4]], SHORT)


def test_a_closed_engine(folder: Path) -> None:
    rig = Rig(folder, tiny_qwen2())
    rig.engine.close()
    with provoked(Closed, "engine_side/embedded/engine.py: the engine was closed", "another Engine"):
        rig.engine.generate([[5]], SHORT)
    rig.b.close()
    rig = Rig(folder, tiny_qwen2())
    rig.good_push()
    rig.close()


def test_a_command_line() -> None:
    from bridge.cli import commands

    for arguments, key, word in (
        (["max_num_seqs"], f"{CLI}: not a setting", "max_num_seqs=8"),
        (["a=1", "a=2"], f"{CLI}: a setting was given twice", "once"),
    ):
        with provoked(ConfigError, key, word):
            commands._settings(arguments)
    assert commands._settings(["max_num_seqs=8"]) == {"max_num_seqs": 8}
