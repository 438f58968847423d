"""vLLM hosted on Ray, as a user has it: `weighbridge up`, a trainer that connects, `weighbridge down`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bridge
from bridge.errors import ConfigError, PeerLost
from engine_side.engines.registry import host
from tests.families import make_model, perturb
from tests.ray.conftest import Home, eventually, gone, home  # noqa: F401
from tests.rigs import PROMPTS
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(400)
GREEDY = bridge.Sampling(max_tokens=6, temperature=0.0)


@pytest.fixture(autouse=True)
def _own_state(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("XDG_STATE_HOME", str(home.state))
    monkeypatch.setenv("WEIGHBRIDGE_THREADS", "1")


class Hosted:
    """The daemon, the trainer's model (PEFT over qwen2) and what the machine held before."""

    def __init__(self, home: Home, folder: Path) -> None:  # noqa: F811
        import peft

        self.home = home
        model = make_model("qwen2", eos_token_id=None, max_position_embeddings=4096)  # rollouts as long as asked for
        model.save_pretrained(folder)
        targets = ["q_proj", "v_proj", "down_proj"]
        self.model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        self.shm = set(os.listdir("/dev/shm"))
        settings = ("enforce_eager=true", "max_model_len=4096", "enable_lora=true", "max_lora_rank=8", "max_loras=3")
        more = [word for setting in settings for word in ("--set", setting)]
        self.status = home.cli("up", "hosted", "--engine", f"vllm:{folder}", "--dtype", "bf16", *more)
        self.pid = int(self.status["engines"][0]["pid"])

    def step(self, seed: int) -> None:
        perturb(self.model, seed)

    def push(self, mode: str, b: bridge.Bridge, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = b.push(self.model.named_parameters(), mode=mode, **options)
        assert receipt.verified is True, receipt
        return receipt


@pytest.fixture(scope="module")
def hosted(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")  # else rollouts take every core, and pushes come too late
        yield Hosted(home, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def b(hosted: Hosted) -> Iterator[bridge.Bridge]:
    with bridge.connect("hosted", model=hosted.model) as connected:
        yield connected


def said(b: bridge.Bridge, adapter: str = "current") -> list[tuple[float, ...]]:
    """Log-probabilities of greedy answers."""
    return [answer.logprobs for answer in b.engines[0].generate(PROMPTS, GREEDY, adapter)]


def off(b: bridge.Bridge, model: Any, adapter: str = "current") -> float:
    """How far they are from what the trainer gives the same tokens."""
    answers = b.engines[0].generate(PROMPTS, GREEDY, adapter)
    whole = [[*prompt, *answer.token_ids] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    wanted = reference_logprobs(model, whole)
    pairs = [
        (x, y)
        for answer, row in zip(answers, wanted, strict=True)
        for x, y in zip(answer.logprobs, row[-len(answer.logprobs) :], strict=True)
    ]
    return sum(abs(x - y) for x, y in pairs) / len(pairs)


def test_base_and_adapter_pushes(hosted: Hosted, b: bridge.Bridge) -> None:
    assert hosted.status["engines"][0]["kind"] == "vllm"
    hosted.step(1)
    receipt = hosted.push("base", b)
    assert receipt.engines[0].canary is not None
    with hosted.model.disable_adapter():
        assert off(b, hosted.model) < 0.03
    first = hosted.push("adapter", b)
    assert off(b, hosted.model) < 0.03
    with hosted.model.disable_adapter():
        assert off(b, hosted.model, "base") < 0.03
    with_first = said(b)
    hosted.step(2)
    assert hosted.push("merged", b).version > first.version
    assert off(b, hosted.model) < 0.03
    assert said(b) != with_first
    assert b.engines[0].generate(PROMPTS[:1], GREEDY)[0].weight_version == b.status().committed


def test_rollback_and_health(hosted: Hosted, b: bridge.Bridge) -> None:
    before = hosted.push("merged", b)
    old = said(b)
    hosted.step(3)
    hosted.push("merged", b)
    assert said(b) != old
    report = hosted.home.cli("health", "hosted")
    assert report["healthy"], report
    assert b.rollback().version == before.version
    assert said(b) == old


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("keep", "length"), ("drain", "length")])
def test_rollouts_of_several_callers_at_once(hosted: Hosted, b: bridge.Bridge, mode: str, reason: str) -> None:
    """They run beside each other; a push meanwhile ends them with what they have, keeps them or waits for them."""
    version = hosted.push("merged", b).version
    hosted.step(4)
    asked = bridge.Sampling(max_tokens=3000 if mode == "abort" else 400, temperature=0.0)
    prompts = [[[k + 5, 6, 7]] for k in range(3)]
    with ThreadPoolExecutor(3) as pool:
        rolling = [pool.submit(b.engines[0].generate, prompt, asked) for prompt in prompts]
        time.sleep(0.3)
        receipt = hosted.push("merged", b, inflight=mode)
        answers = [future.result(60)[0] for future in rolling]
    assert {answer.finish_reason for answer in answers} == {reason}, answers
    assert {answer.weight_version for answer in answers} == {version}
    assert receipt.version == version + 1


ARGUMENTS = [
    ({"tensor_paralel_size": 2}, "tensor_paralel_size.*tensor_parallel_size"),
    ({"max_model_len": -5}, "max_model_len"),
    ({"dtype": "bf17"}, "dtype"),
    ({"layout": "packed"}, "layout"),
    ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
    ({"weight_transfer_config": {"backend": "nccl"}}, "weight_transfer_config"),
    ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "kv_transfer_config.*without"),
    ({"kv_offloading_size": 0.1}, "kv_offloading_size.*without"),
]


@pytest.mark.parametrize(("arguments", "said"), ARGUMENTS, ids=lambda value: next(iter(value), None))
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        host(f"vllm:{tmp_path}", arguments)


def test_down_leaves_nothing(hosted: Hosted) -> None:
    """Not even with a rollout that is still running: its caller is told."""
    import ray

    b = bridge.connect("hosted", model=hosted.model)
    ended: list[BaseException | None] = []

    def roll() -> None:
        try:
            b.engines[0].generate([[5, 6]] * 4, bridge.Sampling(max_tokens=3000, temperature=1.0))
            ended.append(None)
        except bridge.BridgeError as error:
            ended.append(error)

    thread = threading.Thread(target=roll)
    thread.start()
    time.sleep(0.2)
    family = [hosted.pid, *descendants(hosted.pid)]
    assert len(family) > 1
    hosted.home.cli("down", "hosted")
    b.close()
    ray.shutdown()  # its cluster has gone, and Ray ends processes that notice later, without a word
    thread.join(60)
    assert ended
    assert ended[0] is None or isinstance(ended[0], PeerLost), ended
    assert eventually(lambda: all(gone(pid) for pid in family)), "a process of vLLM's is left"
    left = {name for name in set(os.listdir("/dev/shm")) - hosted.shm if name.startswith(("vllm", "psm", "sem."))}
    mine = {name for name in left if (Path("/dev/shm") / name).stat().st_uid == os.getuid() and not mapped(name)}
    assert not mine
    assert hosted.home.files() == []


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in (Path("/proc") / str(pid) / "task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def mapped(name: str) -> bool:
    """Somebody else's vLLM may run on this machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"/dev/shm/{name}" in (folder / "maps").read_text():
                return True
        except OSError:
            continue
    return name.startswith("sem.")
