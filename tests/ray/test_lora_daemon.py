"""LoRA through the Ray pair and the command line: three modes, killed trainers, lost engines, uneven fleets."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.config import from_environment
from bridge.daemon import actors, ray_cluster
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineCommit, EngineLoad, EngineLoaded, EngineRestore
from bridge.session import RaySession
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.engines.registry import host
from tests.conftest import perturb, tiny_qwen2
from tests.push.lora_rig import stir, wrap
from tests.ray.conftest import Home, Trainer, cli_here, eventually, gone
from tests.ray.lora_worker import policy
from trainer_side.trainer import TrainerSide

WORKER = Path(__file__).with_name("lora_worker.py")
PROMPT = [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
TOKENS = 8
GREEDY = bridge.Sampling(max_tokens=TOKENS, temperature=0.0)
SLOTS = 3
SETTINGS = (f"max_loras={SLOTS}", "max_lora_rank=8", 'lora_targets=["q_proj", "k_proj", "v_proj", "o_proj"]')


@torch.no_grad()
def greedy(model: Any) -> list[int]:
    """What transformers and PEFT generate."""
    ids = list(PROMPT)
    for _ in range(TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def base_of(model: Any) -> Any:
    twin = copy.deepcopy(model)
    twin.base_model.disable_adapter_layers()
    return twin


def tokens(engine: bridge.EngineHandle, adapter: str = "current") -> tuple[int, list[int]]:
    (found,) = engine.generate([PROMPT], GREEDY, adapter=adapter)
    return found.weight_version, list(found.token_ids)


def serves(b: bridge.Bridge, version: int, model: Any) -> None:
    assert [tokens(engine) for engine in b.engines] == [(version, greedy(model))] * len(b.engines)


def healthy(b: bridge.Bridge) -> None:
    report = b.health()
    assert report.status == "healthy", [check for check in report.checks if not check.ok or check.degraded]


@pytest.fixture(scope="module")
def up(home: Home, start_folder: Path) -> Iterator[dict[str, Any]]:
    """Daemon "lora", two engines with slots for adapters; what `weighbridge up` said of it."""
    before = home.files()
    settings = [word for pair in SETTINGS for word in ("--set", pair)]
    yield home.cli("up", "lora", "--engine", f"embedded:{start_folder}", "--engines", "2", *settings)
    home.cli("down", "lora")
    assert home.files() == before


@pytest.fixture
def b(up: dict[str, Any]) -> Iterator[bridge.Bridge]:
    with bridge.connect("lora") as made:
        yield made


@pytest.fixture
def started(home: Home, start_folder: Path, up: dict[str, Any]) -> Iterator[Callable[..., bridge.Bridge]]:
    """A daemon of the test's own, with an engine per dict of arguments; nothing may be left of it."""
    made: list[bridge.Bridge] = []
    before = home.files()

    def start(name: str, *arguments: dict[str, Any]) -> bridge.Bridge:
        specs = [(f"embedded:{start_folder}", each) for each in arguments]
        config = from_environment()
        made.append(bridge.Bridge(RaySession.launch(name, specs, config), TrainerSide(), config))
        return made[-1]

    yield start
    for each in made:
        each.shutdown()
    assert home.files() == before


@pytest.fixture
def trainer(home: Home) -> Iterator[Callable[..., Trainer]]:
    begun: list[Trainer] = []

    def start(*args: str) -> Trainer:
        begun.append(LoraTrainer(home, *args))
        return begun[-1]

    yield start
    for each in begun:
        each.kill()
        if each.process.stdout is not None:
            each.process.stdout.close()


class LoraTrainer(Trainer):
    """A trainer with a LoRA policy: `lora_worker.py`."""

    def __init__(self, home: Home, *args: str) -> None:
        command = [sys.executable, str(WORKER), *args]
        self.process = subprocess.Popen(command, env=home.environment, stdout=subprocess.PIPE, text=True)


def engine_actor(name: str, engine: str) -> Any:
    import ray

    return ray.get_actor(f"{name}:{engine}", namespace=ray_cluster.NAMESPACE)


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_every_mode_through_the_actors(b: bridge.Bridge, home: Home) -> None:
    model = policy(1)
    b.bind(model)
    base, first = base_of(model), b.push(model.named_parameters())
    assert (first.mode, first.verified) == ("adapter", True), first.reason
    assert len({e.adapter for e in first.engines}) == 1
    assert greedy(model) != greedy(base), "the adapter must be visible, else this test shows nothing"
    serves(b, first.version, model)
    assert [tokens(engine, "base") for engine in b.engines] == [(first.version, greedy(base))] * 2
    healthy(b)

    before = greedy(model)
    stir(model, seed=2, scale=0.3)
    assert greedy(model) != before
    second = b.push(model.named_parameters(), mode="adapter")
    serves(b, second.version, model)
    back = b.rollback()
    assert (back.version, back.mode, back.verified) == (first.version, "adapter", True)
    assert [tokens(engine)[1] for engine in b.engines] == [before] * 2
    healthy(b)

    merged = b.push(model.named_parameters(), mode="merged")
    assert (merged.mode, merged.verified) == ("merged", True)
    assert merged.version > second.version
    serves(b, merged.version, model)
    assert [tokens(engine, "base") for engine in b.engines] == [(merged.version, greedy(model))] * 2
    healthy(b)
    with pytest.raises(bridge.UnsupportedLora, match="mode='base'"):
        b.push(model.named_parameters(), mode="adapter")

    only_base = b.push(model.named_parameters(), mode="base")
    assert (only_base.mode, only_base.verified) == ("base", True)
    serves(b, only_base.version, base)
    healthy(b)
    last = b.push(model.named_parameters(), mode="adapter")
    serves(b, last.version, model)


def test_modules_that_were_not_asked_for_by_lora_targets(b: bridge.Bridge) -> None:
    model = wrap(tiny_qwen2(seed=0), target_modules=["q_proj", "down_proj"])
    b.bind(model)
    b.push(model.named_parameters(), mode="base")
    with pytest.raises(bridge.UnexpectedTensor, match="down_proj"):
        b.push(model.named_parameters(), mode="adapter")
    receipt = b.push(model.named_parameters())
    assert receipt.mode == "merged"
    assert "down_proj" in receipt.reason
    serves(b, receipt.version, model)


# ---- trainers that die -----------------------------------------------------------------------------------------------


def test_a_sealed_adapter_outlives_its_trainer(b: bridge.Bridge, trainer: Callable[..., Trainer]) -> None:
    model = policy(11)
    b.bind(model)
    b.push(model.named_parameters(), mode="base")
    b.close()
    worker = trainer("push_and_die", "lora", "11")
    worker.line()
    told = worker.line()
    worker.killed()
    with bridge.connect("lora", model=model) as after:
        assert eventually(lambda: after.status().committed == told["version"] and after.status().busy is None)
        receipt = after.history()[-1]
        assert (receipt["version"], receipt["mode"], receipt["verified"]) == (told["version"], "adapter", True)
        assert receipt["at"] > told["time"], "it was committed after the trainer's last word"
        serves(after, told["version"], model)
        healthy(after)


def test_a_trainer_that_dies_in_an_adapter_snapshot(b: bridge.Bridge, trainer: Callable[..., Trainer]) -> None:
    """Nothing of it is served, and the next trainer goes on after the base was compared again."""
    model = policy(21)
    b.bind(model)
    b.push(model.named_parameters(), mode="base")
    version = b.push(model.named_parameters(), mode="adapter").version
    b.close()
    worker = trainer("die_in_the_snapshot", "lora", "22")
    worker.line()
    worker.killed()
    with bridge.connect("lora") as after:
        serves(after, version, model)
        other = policy(23)
        norm = other.get_base_model().model.norm.weight
        norm.data[0] *= 1 + 1e-6
        after.bind(other)
        with pytest.raises(bridge.UnsupportedLora, match=r"model\.norm\.weight"):
            after.push(other.named_parameters(), mode="adapter")
        serves(after, version, model)
        norm.data.fill_(1)
        receipt = after.push(other.named_parameters(), mode="adapter")
        assert receipt.version > version + 1, "the version that the dead trainer was given is not used twice"
        serves(after, receipt.version, other)
        healthy(after)


# ---- engines that are lost -------------------------------------------------------------------------------------------


def test_an_engine_hangs_and_dies_in_an_adapter_push(started: Callable[..., bridge.Bridge]) -> None:
    arguments = {"max_loras": SLOTS, "max_lora_rank": 8}
    pair = started("pair", arguments, arguments)
    model = policy(31)
    pair.bind(model)
    version = pair.push(model.named_parameters(), mode="adapter").version
    served = greedy(model)
    victim = next(e.pid for e in pair.status().engines if e.id == "engine1")

    def still_serves() -> None:
        assert tokens(pair.engines[0]) == (version, served)

    # it hangs: the push ends at its deadline, everybody keeps the version before
    stir(model, seed=32, scale=0.3)
    assert greedy(model) != served
    os.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(bridge.PushAborted, match="engine1"):
        pair.push(model.named_parameters(), mode="adapter", verify="weights", timeout_s=3)
    assert time.monotonic() - began < 3 + 5
    still_serves()
    # an adapter is not even tried while nobody knows what it would go over
    began = time.monotonic()
    with pytest.raises(bridge.BridgeError, match="engine1") as refused:
        pair.push(model.named_parameters(), mode="adapter", verify="weights", timeout_s=30)
    assert "mode='base'" in str(refused.value)
    assert time.monotonic() - began < 10
    os.kill(victim, signal.SIGCONT)
    assert eventually(lambda: [e.state for e in pair.status().engines] == ["SERVING"] * 2)
    assert [tokens(engine) for engine in pair.engines] == [(version, served)] * 2
    pair.push(model.named_parameters(), mode="base")
    for seed in range(33, 33 + SLOTS + 1):  # one that was left in a slot would use them up
        stir(model, seed=seed, scale=0.3)
        version = pair.push(model.named_parameters(), mode="adapter").version
    serves(pair, version, model)
    served = greedy(model)
    healthy(pair)

    # it dies in the middle of a push
    os.kill(victim, signal.SIGSTOP)
    stir(model, seed=41, scale=0.3)
    pending = pair.push(model.named_parameters(), mode="adapter", verify="weights", timeout_s=30, wait=False)
    time.sleep(0.5)
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(bridge.PushAborted, match="engine1") as lost:
        pending.result()
    assert isinstance(lost.value.__cause__, bridge.PeerLost)
    still_serves()
    assert eventually(lambda: gone(victim))
    with pytest.raises(bridge.PeerLost, match="engine1"):
        pair.push(model.named_parameters(), mode="adapter", verify="weights", timeout_s=20)
    still_serves()
    assert [c.name for c in pair.health().checks if not c.ok and "alive" in c.name] == ["engine1 alive"]


@pytest.mark.parametrize("state", ["STALE", "QUARANTINED"])
def test_no_adapter_into_an_engine_without_verified_weights(b: bridge.Bridge, state: str) -> None:
    import ray

    model = policy(51)
    b.bind(model)
    b.push(model.named_parameters(), mode="base")
    version = b.push(model.named_parameters(), mode="adapter").version

    def spoil(self: Any) -> None:
        from bridge.model.engine_state import EngineState

        if state == "QUARANTINED":
            self._service._quarantine("a test says so")
        else:
            self._service._standing.move(EngineState.STALE)

    ray.get(engine_actor("lora", "engine1").__ray_call__.remote(spoil))
    with pytest.raises(bridge.BridgeError, match="engine1") as refused:
        b.push(model.named_parameters(), mode="adapter")
    assert "mode='base'" in str(refused.value)
    assert tokens(b.engines[0]) == (version, greedy(model))
    assert b.push(model.named_parameters(), mode="base").verified is True
    receipt = b.push(model.named_parameters(), mode="adapter")
    serves(b, receipt.version, model)
    healthy(b)


# ---- uneven fleets ---------------------------------------------------------------------------------------------------


def test_one_engine_with_lora_and_one_without(started: Callable[..., bridge.Bridge]) -> None:
    mixed = started("mixed", {"max_loras": 2, "max_lora_rank": 8}, {})
    model = policy(61)
    mixed.bind(model)
    with pytest.raises(bridge.UnsupportedLora, match="without LoRA"):
        mixed.push(model.named_parameters(), mode="adapter")
    receipt = mixed.push(model.named_parameters())
    assert (receipt.mode, receipt.verified) == ("merged", True)
    assert "without LoRA" in receipt.reason
    serves(mixed, receipt.version, model)


# ---- an engine that wakes up late ------------------------------------------------------------------------------------


def test_what_an_engine_begins_after_it_was_told_to_go_back(
    start_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that hung finds two calls waiting, and takes them in any order: the load must not come last."""
    model = policy(81)
    engine = Engine(EngineConfig(str(start_folder), max_loras=SLOTS, max_lora_rank=8))
    with bridge.attach(engine, model=model) as b:
        b.push(model.named_parameters(), mode="adapter")
        served = greedy(model)
        stir(model, seed=82, scale=0.3)
        waiting: list[EngineLoad] = []
        port = b.engines[0]._port
        call = port.call

        def hang(request: Any, reply: Any, deadline: Any) -> Any:
            if isinstance(request, EngineLoad) and not waiting:
                waiting.append(request)
                raise bridge.DeadlineExceeded("an actor did not answer in time", where="engine0")
            return call(request, reply, deadline)

        monkeypatch.setattr(port, "call", hang)
        with pytest.raises(bridge.PushAborted):
            b.push(model.named_parameters(), mode="adapter")
        with pytest.raises(bridge.ProtocolError, match="a push that has ended"):
            call(waiting[0], EngineLoaded, Deadline.after(10))
        assert not engine.paused
        assert len(engine.adapters) == 1
        assert tokens(b.engines[0])[1] == served
        assert b.push(model.named_parameters(), mode="adapter").verified is True
    engine.close()


def test_an_engine_that_hangs_before_the_commit_is_not_waited_for(
    start_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(EngineConfig(str(start_folder), max_loras=SLOTS, max_lora_rank=8))
    with bridge.attach(engine, model=(model := policy(83))) as b:
        base = greedy(base_of(model))
        waited: list[float] = []
        port = b.engines[0]._port
        call = port.call

        def hang(request: Any, reply: Any, deadline: Any) -> Any:
            if isinstance(request, EngineCommit) and not waited:
                raise bridge.DeadlineExceeded("an actor did not answer in time", where="engine0")
            if isinstance(request, EngineRestore):
                waited.append(deadline.remaining_s)
            return call(request, reply, deadline)

        monkeypatch.setattr(port, "call", hang)
        with pytest.raises(bridge.PushAborted):
            b.push(model.named_parameters(), mode="adapter")
        assert 0 < waited[0] < 10
        assert (tokens(b.engines[0])[1], engine.adapters) == (base, ())
        assert b.push(model.named_parameters(), mode="adapter").verified is True
    engine.close()


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_tells_of_the_adapter(b: bridge.Bridge, tmp_path: Path) -> None:
    model = policy(71)
    b.bind(model)
    weights = b.push(model.named_parameters(), mode="base").version
    receipt = b.push(model.named_parameters(), mode="adapter")
    name = receipt.engines[0].adapter
    assert name is not None
    status = cli_here("status", "lora")
    assert (status["mode"], status["committed"]) == ("adapter", receipt.version)
    assert (status["weights"], status["adapter"]) == (weights, receipt.version)
    assert [engine["adapter"] for engine in status["engines"]] == [name] * 2
    told = cli_here("history", "lora", "--last", "2")["receipts"]
    assert [row["mode"] for row in told] == ["base", "adapter"]
    assert told[1]["engines"][0]["adapter"] == name
    tensor = "model.layers.1.self_attn.v_proj.lora_B.weight"
    rows = cli_here("explain", "lora", tensor)["rows"]
    assert [(row["engine"], row["tensor"], row["strategy"]) for row in rows] == [
        (f"engine{k}", tensor, "adapter") for k in (0, 1)
    ]
    assert cli_here("health", "lora")["status"] == "healthy"
    # the weights below it may change under the adapter, which is then still the one of its own version
    perturb(model.get_base_model().model.norm, seed=70)
    below = b.push(model.named_parameters(), mode="base").version
    status = cli_here("status", "lora")
    assert (status["mode"], status["weights"], status["adapter"]) == ("base", below, receipt.version)
    serves(b, below, model)
    b.close()

    # a checkpoint of full weights takes the adapter away, and says so
    other = tiny_qwen2(seed=0)
    perturb(other, seed=72)
    other.save_pretrained(tmp_path)
    pushed = cli_here("push", "lora", str(tmp_path))["receipt"]
    assert pushed["verified"] is True
    assert any(name in note for note in pushed["notes"]), pushed["notes"]
    status = cli_here("status", "lora")
    assert (status["mode"], status["weights"], status["adapter"]) == ("full", pushed["version"], None)
    assert [engine["adapter"] for engine in status["engines"]] == [None] * 2
    assert not any(name in note for note in cli_here("push", "lora", str(tmp_path))["receipt"]["notes"])
    with bridge.connect("lora", model=model) as after:
        serves(after, pushed["version"] + 1, other)
        with pytest.raises(bridge.UnsupportedLora, match="mode='base'"):
            after.push(model.named_parameters(), mode="adapter")
        after.push(model.named_parameters(), mode="base")
        serves(after, after.push(model.named_parameters(), mode="adapter").version, model)


def test_a_wrong_lora_setting(up: dict[str, Any], start_folder: Path) -> None:
    error = cli_here("up", "wrong", "--engine", f"embedded:{start_folder}", "--set", "lora_targets=5", code=2)["error"]
    assert error["name"] == "ConfigError"
    assert "lora_targets" in error["where"]
    assert "wrong" not in actors.running()


@pytest.mark.parametrize(
    "setting", [{"max_loras": -1}, {"max_loras": "3"}, {"max_lora": 3}, {"max_loras": 1, "max_lora_rank": 0},
                {"lora_targets": ["q_proj"]}, {"max_loras": 1, "lora_targets": []}]
)  # fmt: skip
def test_wrong_lora_settings_start_nothing(start_folder: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(bridge.ConfigError) as caught:
        host(f"embedded:{start_folder}", setting)
    assert list(setting)[-1] in str(caught.value)
