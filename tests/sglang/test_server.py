"""A real SGLang server, shared by the tests of this file: pushes through its own endpoints, and what is refused."""

from __future__ import annotations

import http.client
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
from typing import Any

import pytest
import torch

import bridge
from bridge.api import examine
from bridge.cli import commands
from bridge.errors import Busy, ConfigError, EngineQuarantined, PushAborted
from engine_side.engines.common.hosting import Leavings
from tests.families import make_model, perturb
from tests.ray.conftest import eventually, gone
from tests.rigs import PROMPTS, difference
from tests.servers import Answers, free_port
from tests.sglang.inside import ACTION
from tests.sglang.rig import LOADER, SHIMS
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).parents[2]
LORA = (
    "--enable-lora", "--max-lora-rank", "8", "--max-loras-per-batch", "4", "--lora-backend", "torch_native",
    "--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


class Server:
    """`sglang.launch_server` on a tiny qwen2; `inside` reaches into its scheduler (see `tests.sglang.inside`)."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        port = free_port()
        self.url, self.folder = f"http://127.0.0.1:{port}", folder
        self._leavings = Leavings()
        self.log = folder.with_name(f"server-{port}.log").open("w+")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((SHIMS, str(ROOT))), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "sglang.launch_server", "--model-path", str(folder), "--port", str(port),
                "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
                "--skip-tokenizer-init", "--dtype", "bfloat16", "--disable-cuda-graph", "--mem-fraction-static", "0.2",
                "--max-total-tokens", "8192", "--context-length", "2048", "--disable-overlap-schedule",
                "--log-level", "warning", "--skip-server-warmup", "--random-seed", "0", *arguments,
            ],
            env=environment, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> Server:
        def up() -> bool:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-4000:]
            try:
                self.get("/model_info")
            except OSError:
                return False
            return True

        assert eventually(up, 240), Path(self.log.name).read_text()[-4000:]
        return self

    def close(self) -> None:
        self._leavings.note()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.log.close()
        self._leavings.remove()

    def get(self, route: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{route}", timeout=60) as reply:
            return json.load(reply)

    def post(self, route: str, timeout: float = 60.0, **body: Any) -> bytes:
        request = urllib.request.Request(
            f"{self.url}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            found: bytes = reply.read()
            return found

    def generate(self, ids: list[int], timeout: float = 60.0, lora_path: str | None = None, **sampling: Any) -> Any:
        """As a client does, token ids in and out."""
        parameters = {"temperature": 0, "max_new_tokens": 1, **sampling}
        more = {"return_logprob": True, "logprob_start_len": 0, "lora_path": lora_path}
        return json.loads(self.post("/generate", timeout, input_ids=ids, sampling_params=parameters, **more))

    def said(self) -> list[list[float]]:
        """Prompt log-probabilities, as a client gets them."""
        answers = [self.generate(ids) for ids in PROMPTS]
        return [[row[0] for row in answer["meta_info"]["input_token_logprobs"][1:]] for answer in answers]

    def inside(self, command: str, **arguments: Any) -> Any:
        words = [command, json.dumps(arguments)]
        return json.loads(json.loads(self.post("/weights_checker", action=ACTION, skip_tensor_list=words))["message"])

    @property
    def version(self) -> str:
        return str(self.get("/model_info")["weight_version"])


class Rig:
    def __init__(self, folder: Path) -> None:
        self.model = make_model("qwen2", max_position_embeddings=2048)
        self.model.save_pretrained(folder)
        self._first = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._seed = 0
        self.server = Server(folder, "--custom-weight-loader", LOADER, *LORA).wait()
        self.b = bridge.attach(self.server.url, name="served", model=self.model)

    def close(self) -> None:
        self.b.close()
        self.server.close()

    def step(self) -> None:
        self._seed += 1
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
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
def shared(state: Path, rigs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rigs.close()  # two engines at once are too much for a small machine
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
    shared.server.inside("mend")
    shared.step()
    assert shared.push().verified is True, "a good push works after every test"
    assert shared.off() < 0.025


def test_a_push_serves_the_new_version(rig: Rig) -> None:
    before = rig.server.said()
    rig.step()
    receipt = rig.push()
    assert receipt.verified is True
    assert receipt.engines[0].canary is not None
    assert difference(before, rig.server.said()) > 0.1
    assert rig.server.version == str(receipt.version)
    assert rig.server.generate(PROMPTS[0])["meta_info"]["weight_version"] == str(receipt.version)
    assert rig.b.engines[0].generate(PROMPTS[:1], bridge.Sampling(max_tokens=3))[0].weight_version == receipt.version
    rig.b.rollback()
    assert rig.server.said() == before
    assert rig.server.version == str(receipt.previous)


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("keep", "length"), ("drain", "length")])
def test_clients_in_flight(rig: Rig, mode: str, reason: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        rig.step()
        running = [
            pool.submit(rig.server.generate, ids, max_new_tokens=400, ignore_eos=True)
            for ids in ([5, 6], [7, 8], [9, 3])
        ]
        time.sleep(0.3)
        receipt = rig.push(inflight=mode)
        answers = [future.result(60)["meta_info"] for future in running]
    assert {answer["finish_reason"]["type"] for answer in answers} == {reason}
    if mode != "abort":
        spans = [[span["version"] for span in answer["weight_versions"]] for answer in answers]
        assert {span[0] for span in spans} == {str(receipt.previous)}
        assert {span[-1] for span in spans} == {str(receipt.version if mode == "keep" else receipt.previous)}


def test_an_adapter_push(rig: Rig) -> None:
    """In memory; clients ask for it by its name."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(make_model("qwen2", max_position_embeddings=2048), config)
    plain = dict(rig.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
            else:
                parameter.copy_(plain[name.removeprefix("base_model.model.").replace(".base_layer.", ".")])
    rig.b.bind(model)
    try:
        receipt = rig.b.push(model.named_parameters(), mode="adapter")
        assert receipt.verified is True
        asked = bridge.Sampling(max_tokens=4, temperature=0.0)
        acting = rig.b.engines[0].generate(PROMPTS, asked)
        assert acting != rig.b.engines[0].generate(PROMPTS, asked, "base")
        for name in ("current", receipt.engines[0].adapter):
            for ids, answer in zip(PROMPTS, acting, strict=True):
                served = rig.server.generate(ids, max_new_tokens=4, lora_path=name)
                assert tuple(served["output_ids"]) == answer.token_ids
        with pytest.raises(urllib.error.HTTPError, match="400"):
            rig.server.generate(PROMPTS[0], lora_path="nobody's")
    finally:
        rig.b.bind(rig.model)


@pytest.mark.parametrize("k", [0, 3, 9])
def test_a_push_that_fails_midway_leads_back(rig: Rig, k: int) -> None:
    before, version = rig.server.said(), rig.server.version
    rig.step()
    rig.server.inside("break_write", k=k)
    with pytest.raises(PushAborted, match="failed"):
        rig.push()
    assert rig.server.inside("mend"), "the fault struck"
    assert rig.server.said() == before
    assert rig.server.version == version
    assert examine(rig.server.url).healthy


def test_a_torn_server_refuses(rig: Rig) -> None:
    """Also after somebody has let it go on, and after its bridge has gone; the next one mends it."""
    rig.step()
    rig.server.inside("break_write", k=4, always=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(rig.server.generate, [5, 6], max_new_tokens=1000, ignore_eos=True)
        time.sleep(0.2)
        with pytest.raises(EngineQuarantined):
            rig.push(inflight="keep")
        assert running.result(60)["meta_info"]["finish_reason"]["type"] == "abort"
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as refused:
            rig.server.generate(PROMPTS[0], timeout=10)
        assert refused.value.code == 503
        assert b"nobody verified" in refused.value.read()
        with pytest.raises((http.client.HTTPException, OSError)):
            rig.server.post("/generate", 10, input_ids=[5, 6], stream=True, sampling_params={"max_new_tokens": 2})
        rig.server.post("/continue_generation")
    with pytest.raises(EngineQuarantined):
        rig.b.engines[0].generate(PROMPTS, bridge.Sampling(max_tokens=1))
    assert commands.main(["health", "--server", rig.server.url, "--json"]) == 1
    rig.b.close()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        rig.server.generate(PROMPTS[0], timeout=10)
    rig.server.inside("mend")
    rig.b = bridge.attach(rig.server.url, name="served", model=rig.model)
    assert rig.b.status().engines[0].state == "QUARANTINED"
    assert rig.push().verified is True
    assert rig.off() < 0.025


def test_health_of_a_server_that_somebody_drives(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert rig.b.health().healthy
    assert commands.main(["health", "--server", rig.server.url, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {check["name"]: check for check in report["checks"]}
    assert names["server driver"]["got"] == "bridge 'served'"
    assert "checked" in names["rank 0 read-back"]["got"]
    rig.server.inside("scale", path="model.norm.weight", factor=2.0)
    found = examine(rig.server.url)
    assert any(not check.ok and "read-back" in check.name for check in found.checks), found


def test_clients_do_not_notice_an_examination(rig: Rig) -> None:
    calm = rig.server.generate([5, 6], max_new_tokens=300, ignore_eos=True)["output_ids"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(rig.server.generate, [5, 6], max_new_tokens=300, ignore_eos=True)
        time.sleep(0.1)
        assert examine(rig.server.url).healthy
        assert rig.b.health().healthy
        assert running.result(60)["output_ids"] == calm


def test_two_bridges(rig: Rig) -> None:
    with pytest.raises(Busy, match="served"):
        bridge.attach(rig.server.url, model=rig.model)


def test_a_trainer_that_dies_in_the_middle(rig: Rig) -> None:
    """Nobody knows what the weights are then: nothing is served until a push has verified some."""
    rig.b.close()
    rig.server.inside("slow_write", k=5, seconds=5.0)
    code = (
        "import sys, bridge; from transformers import AutoModelForCausalLM as M\n"
        "m = M.from_pretrained(sys.argv[2], dtype='bfloat16'); b = bridge.attach(sys.argv[1], name='dying', model=m)\n"
        "b.push([(n, p * 1.01) for n, p in m.named_parameters()], verify='weights')\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, rig.server.url, str(rig.server.folder)], cwd=ROOT)
    assert eventually(lambda: rig.server.version != "" and _held(rig.server), 120), "the push has begun"
    time.sleep(1.0)
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
    assert rig.server.inside("mend"), "the fault struck"
    rig.b = bridge.attach(rig.server.url, name="served", model=rig.model)
    assert waiting == [503]
    assert "died" in rig.b.status().engines[0].detail
    for left in Path(os.environ["WEIGHBRIDGE_SHM_DIR"]).glob("weighbridge-dying-*"):
        left.unlink()  # the next start would do it, a minute later


def _held(server: Server) -> bool:
    """Does a client have to wait?"""
    try:
        server.generate([5, 6], timeout=0.5)
    except TimeoutError:
        return True
    return False


# ---- what cannot be driven -------------------------------------------------------------------------------------------

MODEL = {"/model_info": {"weight_version": "default"}}
INFO = {
    "version": "0.5.23", "custom_weight_loader": [LOADER], "pp_size": 1, "dp_size": 1, "nnodes": 1, "tp_size": 1,
    "tokenizer_worker_num": 1, "speculative_algorithm": None, "disaggregation_mode": "null", "quantization": None,
    "model_path": "x", "max_loras_per_batch": 4, "enable_lora": False, "device": "cpu", "load_format": "auto",
}  # fmt: skip
CASES = [
    ({"/model_info": {"weight_version": "default"}}, "another kind"),
    ({**MODEL, "/server_info": {**INFO, "version": "0.4.1"}}, ">=0.5.23"),
    ({**MODEL, "/server_info": {**INFO, "custom_weight_loader": []}}, "--custom-weight-loader engine_side"),
    *(
        ({**MODEL, "/server_info": {**INFO, name: value}}, f"without {name}")
        for name, value in {
            "enable_hierarchical_cache": True,
            "hicache_storage_backend": "file",
            "enable_lmcache": True,
            "enable_flexkv": True,
            "radix_cache_backend": "flexkv",
            "enable_eplb": True,
            "elastic_ep_backend": "mooncake",
        }.items()
    ),
    ({**MODEL, "/server_info": INFO, "/weights_checker": {"success": False, "message": "Unknown action"}}, "plugin"),
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


def test_a_server_that_cannot_see_our_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another node: the probe file is not there."""
    monkeypatch.setattr("engine_side.engines.common.server_checks.device_and_inode", lambda descriptor: (0, 0))
    with pytest.raises(ConfigError, match="node"):
        bridge.attach(rig.server.url)


def test_a_real_server_without_the_loader(shared: Rig) -> None:
    """Last: two servers at once are too much for a small machine."""
    shared.close()
    assert gone(shared.server.process.pid)
    server = Server(shared.server.folder).wait()
    try:
        with pytest.raises(ConfigError, match="custom_weight_loader"):
            bridge.attach(server.url)
        assert server.generate([5, 6, 7], max_new_tokens=3)["output_ids"], "it is none the worse for it"
    finally:
        server.close()
