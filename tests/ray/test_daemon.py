"""The Ray pair: trainer, TrainerActor and EngineActors in processes of their own, started by `weighbridge up`."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.daemon import ray_cluster
from tests.conftest import perturb, tiny_qwen2
from tests.ray.conftest import Home, Trainer, eventually

PROMPT = [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
TOKENS = 12
GREEDY = bridge.Sampling(max_tokens=TOKENS, temperature=0.0)


@torch.no_grad()
def greedy(model: Any) -> list[int]:
    """What transformers generates."""
    ids = list(PROMPT)
    for _ in range(TOKENS):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def stepped(seed: int) -> Any:
    """The model that a `trainer_worker` with this seed pushes."""
    model = tiny_qwen2(seed=0)
    perturb(model, seed=seed)
    return model


def generated(b: bridge.Bridge) -> list[tuple[int, list[int]]]:
    """(version, greedy tokens) of every engine."""
    found = [engine.generate([PROMPT], GREEDY)[0] for engine in b.engines]
    return [(c.weight_version, list(c.token_ids)) for c in found]


def serves(b: bridge.Bridge, version: int, model: Any) -> None:
    assert generated(b) == [(version, greedy(model))] * len(b.engines)


# ---- the pair --------------------------------------------------------------------------------------------------------


def test_up_leaves_a_daemon_running(run: dict[str, Any], home: Home, connected: bridge.Bridge) -> None:
    assert [engine["state"] for engine in run["engines"]] == ["SERVING"] * 2
    pids = [run["pid"], *(engine["pid"] for engine in run["engines"]), home.ray["pid"], os.getpid()]
    assert len(set(pids)) == 5, "trainer, TrainerActor, two EngineActors and Ray's head are different processes"
    assert connected.status().pid == run["pid"]
    assert [daemons["name"] for daemons in home.cli("status")["daemons"]] == ["run"]


def test_a_sealed_push_outlives_its_trainer(
    trainer: Callable[..., Trainer], connected: bridge.Bridge, run: dict[str, Any]
) -> None:
    """THE test of the pair: three processes; the trainer is killed as soon as `push(wait=False)` has returned."""
    worker = trainer("push_and_die", "run", "11")
    assert worker.line()["pid"] == worker.pid
    told = worker.line()
    worker.killed()
    assert len({worker.pid, run["pid"], *(e["pid"] for e in run["engines"])}) == 4
    version = told["version"]
    assert eventually(lambda: connected.status().committed == version)
    assert eventually(lambda: connected.status().busy is None)
    receipt = connected.history()[-1]
    assert (receipt["version"], receipt["verified"], receipt["verify"]) == (version, True, "outputs")
    assert receipt["at"] > told["time"], "it was committed after the trainer's last word"
    model = stepped(11)
    serves(connected, version, model)
    report = connected.health()
    assert report.status == "healthy", [check for check in report.checks if not check.ok or check.degraded]
    # the read-back of every weight against the arena passed above; and the arena holds what this trainer had
    connected.bind(model)
    assert connected.push(model.named_parameters()).wire_nbytes in (0, _nbytes(model))
    serves(connected, version + 1, model)


def _nbytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_trainer_that_dies_in_its_snapshot_leaves_no_trace(
    trainer: Callable[..., Trainer], connected: bridge.Bridge
) -> None:
    model = stepped(21)
    connected.bind(model)
    version = connected.push(model.named_parameters()).version
    connected.close()
    worker = trainer("die_in_the_snapshot", "run", "22")
    worker.line()
    worker.killed()
    with bridge.connect("run", model=model) as b:
        serves(b, version, model)
        # the next trainer comes at once, and goes on with a higher version
        perturb(model, seed=23)
        receipt = b.push(model.named_parameters())
        assert receipt.version > version + 1, "the version that the dead trainer was given is not used twice"
        serves(b, receipt.version, model)
        assert b.health().healthy


def test_one_trainer_at_a_time(trainer: Callable[..., Trainer], connected: bridge.Bridge) -> None:
    worker = trainer("push_and_hold", "run", "31")
    worker.line()
    version = worker.line()["version"]
    model = stepped(32)
    connected.bind(model)
    with pytest.raises(bridge.LeaseHeld, match=f"pid {worker.pid}"):
        connected.push(model.named_parameters())
    serves(connected, version, stepped(31))
    worker.kill()
    receipt = connected.push(model.named_parameters())
    assert receipt.version > version
    serves(connected, receipt.version, model)


def test_every_engine_serves_the_same_version(connected: bridge.Bridge, home: Home, tmp_path: Path) -> None:
    model = stepped(41)
    connected.bind(model)
    receipt = connected.push(model.named_parameters())
    assert [(e.id, e.serving, e.state) for e in receipt.engines] == [
        ("engine0", receipt.version, "SERVING"),
        ("engine1", receipt.version, "SERVING"),
    ]
    serves(connected, receipt.version, model)
    assert {row["engine"] for row in connected.explain("model.norm.weight")} == {"engine0", "engine1"}
    # a checkpoint folder, by the command line, which takes the lease like any trainer
    connected.close()
    model = stepped(42)
    model.save_pretrained(tmp_path)
    pushed = home.cli("push", "run", str(tmp_path))["receipt"]
    assert pushed["verified"] is True
    assert home.cli("health", "run")["healthy"] is True
    assert home.cli("history", "run", "--last", "1")["receipts"][0]["version"] == pushed["version"]
    with bridge.connect("run") as b:
        serves(b, pushed["version"], model)


def test_only_plain_bytes_go_through_ray(connected: bridge.Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray pickles what it is given; it is given one `bytes` each way."""
    import ray

    seen: list[object] = []
    get = ray.get

    class Spy:
        """An actor's method that looks at what is sent, and the handle on which it hangs."""

        def __init__(self, method: Any) -> None:
            self.method = method
            self.call = self

        def options(self, **options: Any) -> Spy:
            return Spy(self.method.options(**options))

        def remote(self, *args: object, **options: object) -> Any:
            seen.extend((*args, *options.values()))
            return self.method.remote(*args, **options)

    def look(*args: Any, **options: Any) -> Any:
        seen.append(get(*args, **options))
        return seen[-1]

    for port in (connected._coordinator, *(engine._port for engine in connected.engines)):
        monkeypatch.setattr(port, "_handle", Spy(port._handle.call))
    monkeypatch.setattr(ray, "get", look)
    model = stepped(51)
    connected.push(model.named_parameters(), verify="weights")
    connected.engines[0].generate([PROMPT], GREEDY)
    assert len(seen) >= 10
    assert {type(frame) for frame in seen} == {bytes}
    assert all(frame[:2] == b"\x92\x01" for frame in seen if isinstance(frame, bytes)), "a MessagePack frame, version 1"


def test_thread_counts_are_those_asked_for(run: dict[str, Any], connected: bridge.Bridge, start_folder: Path) -> None:
    import ray

    def threads(name: str) -> int:
        actor = ray.get_actor(name, namespace=ray_cluster.NAMESPACE)
        return int(ray.get(actor.__ray_call__.remote(lambda self: torch.get_num_threads())))

    assert [threads(f"run:{actor}") for actor in ("trainer", "engine0", "engine1")] == [1, 1, 1]


# ---- Ray itself ------------------------------------------------------------------------------------------------------


def test_ray_asks_for_its_token(run: dict[str, Any], home: Home) -> None:
    token = home.state / "weighbridge" / "_ray" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    environment = Path(f"/proc/{home.ray['pid']}/environ").read_bytes().split(b"\0")
    assert b"RAY_AUTH_MODE=token" in environment
    address = home.ray["address"]
    right = home.cli("status", "run", RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token.read_text())
    assert right["name"] == "run"
    wrong = home.cli("status", "run", code=3, RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert wrong["error"]["name"] == "TransportError"


def test_a_ray_that_is_gone_is_not_waited_for(home: Home) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    began = time.monotonic()
    error = home.cli("status", "run", code=3, RAY_ADDRESS=address)["error"]
    assert (error["name"], error["where"]) == ("TransportError", address)
    assert time.monotonic() - began < 20


def test_a_name_that_is_taken_or_unknown(run: dict[str, Any], connected: bridge.Bridge, start_folder: Path) -> None:
    with pytest.raises(bridge.ConfigError, match="runs already"):
        bridge.launch(f"embedded:{start_folder}", name="run")
    with pytest.raises(bridge.NotFound, match="run"):
        bridge.connect("nobody")
    assert [e.state for e in connected.status().engines] == ["SERVING"] * 2
