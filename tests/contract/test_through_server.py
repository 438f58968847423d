"""A real server of one engine, shared by all tests here: pushes through its own endpoints, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.api import examine
from bridge.cli import commands
from bridge.errors import Busy, ConfigError, DeadlineExceeded, EngineQuarantined, PushAborted
from tests.contract.scenarios import closed, jiggle
from tests.contract.served import EngineServer, ServedRig
from tests.ray.conftest import ROOT, eventually, gone
from tests.rigs import PROMPTS, Rigs, difference
from tests.servers import Answers

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def _own_state(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bridge lives longer than one test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(state))


@pytest.fixture(scope="module")
def shared(
    state: Path, rigs: Rigs, server_class: type[EngineServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedRig]:
    rigs.close()  # two engines at once are too much for a small machine
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        made = ServedRig(tmp_path_factory.mktemp("served") / "checkpoint", server_class)
    yield made
    made.close()


@pytest.fixture
def rig(shared: ServedRig) -> Iterator[ServedRig]:
    shared.step()
    assert shared.push().verified is True
    yield shared
    shared.server.mend()
    shared.step()
    assert shared.push().verified is True, "a good push works after every test"
    assert shared.off() < shared.server.largest_noise


def test_a_push_and_the_way_back(rig: ServedRig) -> None:
    before = rig.said()
    rig.step()
    receipt = rig.push()
    assert receipt.verified is True
    assert receipt.engines[0].canary is not None
    assert difference(before, rig.said()) > 0.1
    assert rig.server.version == str(receipt.version)
    assert rig.server.generate(PROMPTS[0], 4).versions == [receipt.version]
    assert rig.b.engines[0].generate(PROMPTS[:1], bridge.Sampling(max_tokens=3))[0].weight_version == receipt.version
    rig.b.rollback()
    assert rig.said() == before
    assert rig.server.version == str(receipt.previous)


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("keep", "length"), ("drain", "length")])
def test_clients_in_flight(rig: ServedRig, mode: str, reason: str) -> None:
    rig.step()
    with ThreadPoolExecutor(3) as pool:
        prompts, tokens = ([5, 6], [7, 8], [9, 3]), rig.server.in_flight_tokens
        running = [pool.submit(rig.server.generate, ids, tokens) for ids in prompts]
        time.sleep(0.3)
        receipt = rig.push(inflight=mode)
        answers = [future.result(60) for future in running]
    assert {answer.reason for answer in answers} == {reason}
    for answer in answers:
        assert answer.versions[0] == receipt.previous
        assert answer.versions[-1] == (receipt.version if mode == "keep" else receipt.previous)


def test_a_lora_push(rig: ServedRig) -> None:
    """In memory; clients ask for it by its name."""
    import peft

    model = peft.get_peft_model(rig.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    jiggle(model, 1)
    rig.b.bind(model)
    try:
        receipt = rig.b.push(model.named_parameters(), mode="adapter")
        assert receipt.verified is True
        asked = bridge.Sampling(max_tokens=4, temperature=0.0)
        acting = rig.b.engines[0].generate(PROMPTS, asked)
        assert acting != rig.b.engines[0].generate(PROMPTS, asked, "base")
        for name in rig.server.lora_names:
            for ids, answer in zip(PROMPTS, acting, strict=True):
                served = rig.server.generate(ids, 4, lora=name or receipt.engines[0].adapter, stops=True)
                assert served.tokens == answer.token_ids
        with pytest.raises(urllib.error.HTTPError, match="400"):
            rig.server.generate(PROMPTS[0], lora="nobody's")
    finally:
        model.unload()
        rig.b.bind(rig.model)


@pytest.mark.parametrize("k", [0, 3, 9])
def test_a_push_that_fails_midway_leads_back(rig: ServedRig, k: int) -> None:
    before, version = rig.said(), rig.server.version
    rig.step()
    rig.server.break_write(k)
    with pytest.raises(PushAborted, match="failed"):
        rig.push()
    assert rig.server.mend(), "the fault struck"
    assert rig.said() == before
    assert rig.server.version == version
    assert examine(rig.server.url).healthy


def test_a_torn_server_refuses(rig: ServedRig) -> None:
    """Also after somebody has let it go on, and after its bridge has gone; the next one mends it."""
    rig.step()
    rig.server.break_write(4, always=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(rig.server.generate, [5, 6], 2 * rig.server.in_flight_tokens)
        time.sleep(0.2)
        with pytest.raises(EngineQuarantined):
            rig.push(inflight="keep")
        assert running.result(60).reason == "abort"
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as refused:
            rig.server.generate(PROMPTS[0], timeout=10)
        assert refused.value.code == 503
        assert b"nobody verified" in refused.value.read()
        rig.server.check_refusals()
        rig.server.let_go_on()
    with pytest.raises(EngineQuarantined):
        rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=1))
    assert commands.main(["health", "--server", rig.server.url, "--json"]) == 1
    with closed(rig):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            rig.server.generate(PROMPTS[0], timeout=10)
        rig.server.mend()
    assert rig.b.status().engines[0].state == "QUARANTINED"
    assert rig.push().verified is True
    assert rig.off() < rig.server.largest_noise


def test_health_of_a_server_that_somebody_drives(rig: ServedRig, capsys: pytest.CaptureFixture[str]) -> None:
    assert rig.b.health().healthy
    assert commands.main(["health", "--server", rig.server.url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {check["name"]: check for check in report["checks"]}
    assert names["server driver"]["got"] == "bridge 'served'"
    assert "checked" in names[f"rank 0 {rig.server.telling_level}"]["got"]
    rig.server.flip()
    found = examine(rig.server.url)
    assert not found.healthy, found
    assert any(not check.ok and "read-back" in check.name for check in found.checks), found


def test_clients_do_not_notice_an_examination(rig: ServedRig) -> None:
    calm = rig.server.generate([5, 6], rig.server.in_flight_tokens)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(rig.server.generate, [5, 6], rig.server.in_flight_tokens)
        time.sleep(0.1)
        assert not running.done()
        assert rig.b.health().healthy
        assert examine(rig.server.url).healthy
        assert running.result(60) == calm


def test_a_server_that_its_owner_has_paused(rig: ServedRig) -> None:
    """It stays paused, whatever is asked of it; nothing is generated and nothing changes hands."""
    version = rig.b.status().engines[0].serving
    rig.server.pause()
    try:
        started = time.monotonic()
        refusal = DeadlineExceeded if rig.server.no_paused_refusal else ConfigError
        with pytest.raises(refusal, match=None if rig.server.no_paused_refusal else rig.server.paused):
            rig.b.engines[0].generate([[5, 6, 7]], bridge.Sampling(max_tokens=3), timeout_s=3)
        rig.step()
        with pytest.raises((ConfigError, PushAborted), match=rig.server.paused):
            rig.push(timeout_s=30)
        assert time.monotonic() - started < 15
        assert rig.server.holds
    finally:
        rig.server.let_go_on()
    assert rig.b.status().engines[0].serving == version
    assert rig.server.generate([5, 6], 2).tokens


def test_a_second_bridge_is_refused(rig: ServedRig) -> None:
    with pytest.raises(Busy, match="served"):
        bridge.attach(rig.server.url, model=rig.model)


def test_a_trainer_that_dies_in_the_middle(rig: ServedRig) -> None:
    """Nobody knows what the weights are then: nothing is served until a push has verified some."""
    rig.b.close()
    rig.server.hang_write()
    code = (
        "import sys, bridge; from transformers import AutoModelForCausalLM as M\n"
        "m = M.from_pretrained(sys.argv[2], dtype='bfloat16'); b = bridge.attach(sys.argv[1], name='dying', model=m)\n"
        "b.push([(n, p * 1.01) for n, p in m.named_parameters()], verify='weights')\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, rig.server.url, str(rig.server.folder)], cwd=ROOT)
    assert eventually(lambda: rig.server.hangs, 120), "the push has begun"
    waiting: list[int] = []

    def client() -> None:
        try:
            rig.server.generate(PROMPTS[0])
            waiting.append(200)
        except urllib.error.HTTPError as error:
            waiting.append(error.code)

    thread = threading.Thread(target=client)
    thread.start()
    time.sleep(0.5)
    assert not waiting
    trainer.kill()
    trainer.wait(30)
    thread.join(60)
    assert rig.server.mend(), "the fault struck"
    rig.attach()
    assert waiting == [503]
    assert "died" in rig.b.status().engines[0].detail
    for left in Path(os.environ["WEIGHBRIDGE_SHM_DIR"]).glob("weighbridge-dying-*"):
        left.unlink()  # the next start would do it, a minute later


def test_a_server_that_cannot_see_our_memory(rig: ServedRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another node: the probe file is not there."""
    monkeypatch.setattr("engine_side.engines.common.server_checks.device_and_inode", lambda descriptor: (0, 0))
    with pytest.raises(ConfigError, match="node"):
        bridge.attach(rig.server.url)


def test_servers_that_cannot_be_driven(unattachable: tuple[dict[str, Any], str]) -> None:
    routes, said = unattachable
    handler = type("Handler", (Answers,), {"routes": routes})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(ConfigError, match=said) as caught:
                bridge.attach(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    assert caught.value.remedy


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nobody.invalid:80", "http://"])
def test_nobody_there(url: str) -> None:
    with pytest.raises(ConfigError):
        bridge.attach(url)
    assert commands.main(["health", "--server", url]) == 2


def test_a_real_server_without_the_bridge(shared: ServedRig) -> None:
    """Last: two servers at once are too much for a small machine."""
    shared.b.close()
    shared.stop()
    assert gone(shared.server.process.pid)
    server = type(shared.server)(shared.folder, bridged=False).wait()
    try:
        with pytest.raises(ConfigError, match=server.without_bridge):
            bridge.attach(server.url)
        assert server.generate([5, 6, 7], 3).tokens, "it is none the worse for it"
    finally:
        server.close()
