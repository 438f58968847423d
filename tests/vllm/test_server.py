"""A real `vllm serve`, shared by the tests of this file: pushes through its own endpoints, and what must be refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bridge
from bridge.api import examine
from bridge.cli import commands
from bridge.errors import Busy, ConfigError, EngineQuarantined, PushAborted
from tests.families import make_model, perturb
from tests.ray.conftest import eventually, gone
from tests.rigs import PROMPTS, difference
from tests.servers import Answers, free_port
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(400)
BACKEND = ("--weight-transfer-config", '{"backend":"bridge"}')
FAULTS = Path(__file__).with_name("server_faults.py")
ROOT = Path(__file__).parents[2]


class Server:
    """`vllm serve` on a tiny qwen2 and, on demand, faults in its worker (see `server_faults.py`)."""

    def __init__(self, folder: Path, port: int, *arguments: str, **variables: str) -> None:
        self.url, self.folder = f"http://127.0.0.1:{port}", folder
        self.switch = folder.with_name("fault.txt")
        self.log = folder.with_name(f"server-{port}.log").open("w+")
        folder.with_name("sitecustomize.py").write_text(FAULTS.read_text())
        _metadata(folder.parent)
        path = os.pathsep.join((str(folder.parent), str(ROOT)))
        environment = {**os.environ, "PYTHONPATH": path, "WEIGHBRIDGE_TEST_FAULT": str(self.switch)}
        environment.update({"VLLM_CPU_OMP_THREADS_BIND": "0", **variables})
        self.process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--host", "127.0.0.1",
                "--port", str(port), "--skip-tokenizer-init", "--enforce-eager", "--enable-scale-out",
                "--max-model-len", "4096", "--dtype", "bfloat16", *arguments,
            ],
            env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> Server:
        def up() -> bool:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except OSError:
                return False
            return True

        assert eventually(up, 240), Path(self.log.name).read_text()[-4000:]
        return self

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.log.close()

    def get(self, route: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{route}", timeout=60) as reply:
            return json.load(reply)

    def generate(self, ids: list[int], timeout: float = 60.0, **sampling: Any) -> Any:
        """As a client does, token ids in and out."""
        body = {"token_ids": ids, "sampling_params": {"temperature": 0.0, "max_tokens": 1, **sampling}}
        request = urllib.request.Request(
            f"{self.url}/inference/v1/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.load(reply)

    def said(self) -> list[list[float]]:
        """Prompt log-probabilities, as a client gets them."""
        out = []
        for ids in PROMPTS:
            rows = self.generate(ids, prompt_logprobs=0)["prompt_logprobs"]
            out.append([row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)])
        return out


def _metadata(path: Path) -> None:
    """`vllm serve` asks for the version of a distribution "vllm"; builds for CPU have other names."""
    import vllm

    info = path / f"vllm-{vllm.__version__}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n")


class Rig:
    def __init__(self, folder: Path) -> None:
        self.model = make_model("qwen2", max_position_embeddings=4096)
        self.model.save_pretrained(folder)
        self._first = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._seed = 0
        lora = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "3")
        self.server = Server(folder, free_port(), *BACKEND, *lora, VLLM_SERVER_DEV_MODE="1").wait()
        self.b = bridge.attach(self.server.url, name="served", model=self.model)

    def close(self) -> None:
        self.b.close()
        self.server.close()

    def step(self) -> None:
        import torch

        self._seed += 1
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._first:
                    parameter.copy_(self._first[name])
        perturb(self.model, self._seed)

    def push(self, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = self.b.push(self.model.named_parameters(), **options)
        return receipt

    def off(self) -> float:
        return difference(self.server.said(), reference_logprobs(self.model, PROMPTS))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def _own_state(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bridge lives longer than one test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(state))


@pytest.fixture(scope="module")
def shared(state: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        made = Rig(tmp_path_factory.mktemp("served") / "checkpoint")
    yield made
    made.close()


@pytest.fixture
def rig(shared: Rig) -> Iterator[Rig]:
    shared.step()
    assert shared.push().verified is True
    yield shared
    shared.server.switch.unlink(missing_ok=True)
    shared.step()
    assert shared.push().verified is True, "a good push works after every test"
    assert shared.off() < 0.02


def test_a_push_serves_the_new_version(rig: Rig) -> None:
    before = rig.server.said()
    rig.step()
    receipt = rig.push()
    assert receipt.verified is True
    assert receipt.engines[0].canary is not None
    assert difference(before, rig.server.said()) > 0.1
    assert rig.server.get("/weight_info") == {"weight_version": str(receipt.version)}
    answer = rig.server.generate(PROMPTS[0], max_tokens=4)["choices"][0]
    assert [span["version"] for span in answer["weight_versions"]] == [str(receipt.version)]
    assert rig.b.engines[0].generate(PROMPTS[:1], bridge.Sampling(max_tokens=3))[0].weight_version == receipt.version


def test_rollback(rig: Rig) -> None:
    before = rig.server.said()
    rig.step()
    rig.push()
    rig.b.rollback()
    assert rig.server.said() == before


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("keep", "length"), ("drain", "length")])
def test_clients_in_flight(rig: Rig, mode: str, reason: str) -> None:
    """And one that comes in the middle of it waits, and gets the new version."""
    old = rig.b.status().committed
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(rig.server.generate, ids, max_tokens=200, ignore_eos=True) for ids in ([5, 6], [7, 8], [9, 3])
        ]
        time.sleep(0.3)
        rig.step()
        receipt = rig.push(inflight=mode)
        answers = [future.result(60)["choices"][0] for future in running]
    assert {answer["finish_reason"] for answer in answers} == {reason}
    for answer in answers:
        served = [span["version"] for span in answer["weight_versions"]]
        assert served[0] == str(old)
        assert served[-1] == str(receipt.version if mode == "keep" else old)


def test_an_adapter_push(rig: Rig) -> None:
    """In memory; clients ask for it by a sampling argument."""
    import peft
    import torch

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(make_model("qwen2", max_position_embeddings=4096), config)
    with torch.no_grad():
        for (name, parameter), (_, value) in zip(
            [(n, p) for n, p in model.named_parameters() if "lora_" not in n],
            rig.model.named_parameters(),
            strict=True,
        ):
            assert name
            parameter.copy_(value)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    rig.b.bind(model)
    try:
        receipt = rig.b.push(model.named_parameters(), mode="adapter")
        assert receipt.verified is True
        asked = bridge.Sampling(max_tokens=4, temperature=0.0)
        acting = rig.b.engines[0].generate(PROMPTS, asked)
        assert acting != rig.b.engines[0].generate(PROMPTS, asked, "base")
        for ids, answer in zip(PROMPTS, acting, strict=True):
            extra = {"extra_args": {"weighbridge_adapter": "current"}}
            (choice,) = rig.server.generate(ids, max_tokens=4, **extra)["choices"]
            assert tuple(choice["token_ids"]) == answer.token_ids
        wrong = {"extra_args": {"weighbridge_adapter": "nobody's"}}
        with pytest.raises(urllib.error.HTTPError, match="400"):
            rig.server.generate(PROMPTS[0], **wrong)
    finally:
        rig.b.bind(rig.model)


@pytest.mark.parametrize("k", [0, 3, 9])
def test_a_push_that_fails_midway_leads_back(rig: Rig, k: int) -> None:
    before, version = rig.server.said(), rig.server.get("/weight_info")
    rig.step()
    rig.server.switch.write_text(f"{k} once")
    with pytest.raises(PushAborted, match="failed"):
        rig.push()
    assert not rig.server.switch.exists(), "the fault struck"
    assert rig.server.said() == before
    assert rig.server.get("/weight_info") == version
    assert examine(rig.server.url).healthy


def test_a_torn_server_refuses(rig: Rig) -> None:
    """Also after a /resume of somebody's, and after its bridge has gone; the next one mends it."""
    rig.step()
    rig.server.switch.write_text("4 always")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(rig.server.generate, [5, 6], max_tokens=200, ignore_eos=True)
        time.sleep(0.2)
        with pytest.raises(EngineQuarantined):
            rig.push(inflight="keep")
        assert running.result(60)["choices"][0]["finish_reason"] == "abort"
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as refused:
            rig.server.generate(PROMPTS[0], timeout=10)
        assert refused.value.code == 503
        assert b"nobody verified" in refused.value.read()
        urllib.request.urlopen(urllib.request.Request(f"{rig.server.url}/resume", method="POST"), timeout=10).close()
    with pytest.raises(EngineQuarantined):
        rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=1))
    assert commands.main(["health", "--server", rig.server.url, "--json"]) == 1
    rig.b.close()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        rig.server.generate(PROMPTS[0], timeout=10)
    rig.server.switch.unlink()
    rig.b = bridge.attach(rig.server.url, name="served", model=rig.model)
    assert rig.b.status().engines[0].state == "QUARANTINED"
    assert rig.push().verified is True
    assert rig.off() < 0.02


def test_health_of_a_server_that_somebody_drives(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert rig.b.health().healthy
    assert commands.main(["health", "--server", rig.server.url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {check["name"]: check for check in report["checks"]}
    assert names["server driver"]["got"] == "bridge 'served'"
    assert "checked" in names["rank 0 probe"]["got"]
    rig.server.switch.write_text("flip")
    report2 = examine(rig.server.url)
    assert not report2.healthy, report2
    assert any(not check.ok and "read-back" in check.name for check in report2.checks), report2


def test_clients_do_not_notice_an_examination(rig: Rig) -> None:
    calm = rig.server.generate([5, 6], max_tokens=100, ignore_eos=True)["choices"][0]["token_ids"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(rig.server.generate, [5, 6], max_tokens=100, ignore_eos=True)
        time.sleep(0.2)
        assert rig.b.health().healthy
        assert examine(rig.server.url).healthy
        assert not running.done()
        assert running.result(60)["choices"][0]["token_ids"] == calm


def test_a_server_that_its_owner_has_paused(rig: Rig) -> None:
    """It stays paused, whatever is asked of it; nothing is generated and nothing changes hands."""
    version = rig.b.status().engines[0].serving
    pause(rig.server, "/pause?mode=keep")
    try:
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"asleep or paused.*resume"):
            rig.b.engines[0].generate([[5, 6, 7]], bridge.Sampling(max_tokens=3))
        rig.step()
        with pytest.raises((ConfigError, PushAborted), match=r"asleep or paused.*resume"):
            rig.push(timeout_s=30)
        assert time.monotonic() - started < 15
        assert rig.server.get("/is_paused")["is_paused"] is True
    finally:
        pause(rig.server, "/resume")
    assert rig.b.status().engines[0].serving == version
    assert rig.server.generate([5, 6], max_tokens=2)["choices"]


def pause(server: Server, route: str) -> None:
    urllib.request.urlopen(urllib.request.Request(server.url + route, method="POST"), timeout=30).close()


def test_two_bridges(rig: Rig) -> None:
    with pytest.raises(Busy, match="served"):
        bridge.attach(rig.server.url, model=rig.model)


def test_a_trainer_that_dies_in_the_middle(rig: Rig) -> None:
    """Nobody knows what the weights are then: nothing is served until a push has verified some."""
    rig.b.close()
    rig.server.switch.write_text("5 hang")
    code = (
        "import sys, bridge; from transformers import AutoModelForCausalLM as M\n"
        "m = M.from_pretrained(sys.argv[2], dtype='bfloat16'); b = bridge.attach(sys.argv[1], name='dying', model=m)\n"
        "b.push([(n, p * 1.01) for n, p in m.named_parameters()], verify='weights')\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, rig.server.url, str(rig.server.folder)], cwd=ROOT)
    assert eventually(lambda: not rig.server.switch.exists(), 120), "the fault struck"
    waiting: list[int] = []

    def client() -> None:
        try:
            rig.server.generate(PROMPTS[0], timeout=60)
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
    rig.b = bridge.attach(rig.server.url, name="served", model=rig.model)
    assert waiting == [503]
    assert "died" in rig.b.status().engines[0].detail
    for left in Path(os.environ["WEIGHBRIDGE_SHM_DIR"]).glob("weighbridge-dying-*"):
        left.unlink()  # the next start would do it, a minute later


# ---- what cannot be driven -------------------------------------------------------------------------------------------


VLLM = {"/version": {"version": "0.32.0"}, "/load": {"server_load": 0}}
CASES = [
    ({}, "another kind"),
    ({"/get_model_info": {"model_path": "x"}, "/version": {"version": "0.5.23"}}, "another kind"),
    (VLLM, "VLLM_SERVER_DEV_MODE=1"),
    ({**VLLM, "/version": {"version": "0.11.0"}}, ">=0.32"),
    ({**VLLM, "/get_world_size": {"world_size": 1}}, "weight-transfer-config"),
    ({**VLLM, "/get_world_size": {"world_size": 2}, "/server_info": {"vllm_config": {}}}, "weight-transfer-config"),
    ({**VLLM, "/get_world_size": {"world_size": 1}, "/collective_rpc": {"results": [""]}}, "plugin"),
]


@pytest.mark.parametrize(("routes", "said"), CASES, ids=[str(k) for k in range(len(CASES))])
def test_servers_that_cannot_be_driven(routes: dict[str, Any], said: str) -> None:
    handler = type("Handler", (Answers,), {"routes": routes})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(ConfigError, match=said) as caught:
                bridge.attach(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    assert caught.value.remedy


UNREACHED = [
    (("kv_transfer_config", "kv_connector", "LMCacheConnectorV1"), "kv_transfer_config"),
    (("kv_transfer_config", "kv_connector", None), None),
    (("ec_transfer_config", "ec_connector", "ECExampleConnector"), "ec_transfer_config"),
    (("parallel_config", "enable_eplb", True), "enable_eplb"),
]


@pytest.mark.parametrize(("setting", "said"), UNREACHED)
def test_what_no_push_could_take_into_account_is_refused(
    tmp_path: Path, setting: tuple[str, str, Any], said: str | None
) -> None:
    """As a server's front tells it to a bridge."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    from bridge.protocol.codec import pack, unpack
    from engine_side.engines.vllm.facts import VllmFacts, check_facts, facts_of

    make_model("llama").save_pretrained(tmp_path)
    asked = EngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, weight_transfer_config=WeightTransferConfig(backend="bridge")
    )
    config = asked.create_engine_config()
    part, name, value = setting
    holder = getattr(config, part)
    if holder is None:
        setattr(config, part, SimpleNamespace(**{name: value}))
    else:
        setattr(holder, name, value)
    facts = unpack(pack(facts_of(config)), VllmFacts)
    if said is None:
        check_facts(facts, where="x", expected="x", remedy="x")
        return
    with pytest.raises(ConfigError) as caught:
        check_facts(facts, where="x", expected="x", remedy="x")
    assert caught.value.where == said
    assert said in (caught.value.remedy or "")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nobody.invalid:80", "http://"])
def test_nobody_there(url: str) -> None:
    with pytest.raises(ConfigError):
        bridge.attach(url)
    assert commands.main(["health", "--server", url]) == 2


def test_a_server_that_cannot_see_our_memory(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another node: the probe file is not there."""

    monkeypatch.setattr("engine_side.engines.common.server_checks.device_and_inode", lambda descriptor: (0, 0))
    with pytest.raises(ConfigError, match="node"):
        bridge.attach(rig.server.url)


def test_a_real_server_without_the_backend(shared: Rig, tmp_path: Path) -> None:
    """Last: two servers at once are too much for a small machine."""
    shared.close()
    assert gone(shared.server.process.pid)
    server = Server(shared.server.folder, free_port(), VLLM_SERVER_DEV_MODE="1").wait()
    try:
        with pytest.raises(ConfigError, match="weight-transfer-config"):
            bridge.attach(server.url)
        assert server.generate([5, 6, 7], max_tokens=3)["choices"][0]["token_ids"], "it is none the worse for it"
    finally:
        server.close()
