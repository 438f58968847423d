"""An engine hosted on Ray, as a user has it: `weighbridge up`, a trainer that connects, `weighbridge down`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import bridge
from bridge.errors import ConfigError, PeerLost
from engine_side.engines.registry import host
from tests.families import make_model, perturb
from tests.ray.conftest import Home, eventually, gone, home  # noqa: F401
from tests.rigs import PROMPTS, Hosting, Rigs, shared_files
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(400)
GREEDY = bridge.Sampling(max_tokens=6, temperature=0.0)
LARGEST = 0.03


@pytest.fixture(autouse=True)
def _own_state(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("XDG_STATE_HOME", str(home.state))
    monkeypatch.setenv("WEIGHBRIDGE_THREADS", "1")


class Hosted:
    """The daemon, and the trainer's model (PEFT over qwen2)."""

    def __init__(self, home: Home, folder: Path, hosting: Hosting) -> None:  # noqa: F811
        import peft

        self.home, self.hosting = home, hosting
        model = make_model("qwen2", **hosting.model)
        model.save_pretrained(folder)
        targets = ["q_proj", "v_proj", "down_proj"]
        self.model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        more = [word for k, v in hosting.arguments.items() for word in ("--set", f"{k}={json.dumps(v)}")]
        words = ("up", "hosted", "--engine", f"{hosting.scheme}:{folder}", "--dtype", "bf16", *more)
        self.status = home.cli(*words, **hosting.variables)
        self.pid = int(self.status["engines"][0]["pid"])

    def push(self, mode: str, b: bridge.Bridge, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = b.push(self.model.named_parameters(), mode=mode, **options)
        assert receipt.verified is True, receipt
        return receipt


@pytest.fixture(scope="module")
def hosted(home: Home, hosting: Hosting, rigs: Rigs, tmp_path_factory: pytest.TempPathFactory) -> Hosted:  # noqa: F811
    rigs.close()  # two engines at once are too much for a small machine
    return Hosted(home, tmp_path_factory.mktemp("checkpoint"), hosting)


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


def test_base_and_lora_pushes(hosted: Hosted, b: bridge.Bridge) -> None:
    assert hosted.status["engines"][0]["kind"] == hosted.hosting.scheme
    perturb(hosted.model, 1)
    assert hosted.push("base", b).engines[0].canary is not None
    with hosted.model.disable_adapter():
        assert off(b, hosted.model) < LARGEST
    first = hosted.push("adapter", b)
    assert off(b, hosted.model) < LARGEST
    with hosted.model.disable_adapter():
        assert off(b, hosted.model, "base") < LARGEST
    with_first = said(b)
    perturb(hosted.model, 2)
    assert hosted.push("merged", b).version > first.version
    assert off(b, hosted.model) < LARGEST
    assert said(b) != with_first
    assert b.engines[0].generate(PROMPTS[:1], GREEDY)[0].weight_version == b.status().committed


def test_rollback_and_health(hosted: Hosted, b: bridge.Bridge) -> None:
    before = hosted.push("merged", b)
    old = said(b)
    perturb(hosted.model, 3)
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
    perturb(hosted.model, 4)
    tokens = hosted.hosting.longest if mode == "abort" else hosted.hosting.in_flight_tokens
    asked = bridge.Sampling(max_tokens=tokens, temperature=0.0)
    with ThreadPoolExecutor(3) as pool:
        rolling = [pool.submit(b.engines[0].generate, [[k + 5, 6, 7]], asked) for k in range(3)]
        time.sleep(0.3)
        receipt = hosted.push("merged", b, inflight=mode)
        answers = [future.result(120)[0] for future in rolling]
    ended = [(answer.finish_reason, answer.weight_version, len(answer.token_ids)) for answer in answers]
    assert {found[0] for found in ended} == {reason}, (ended, receipt.phases)
    assert {found[1] for found in ended} == {version}, ended
    assert receipt.version == version + 1


def test_wrong_arguments_are_named(
    hosting: Hosting, wrong_argument: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    arguments, said = wrong_argument
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        host(f"{hosting.scheme}:{tmp_path}", arguments)


def test_down_leaves_nothing(hosted: Hosted) -> None:
    """Not even with a rollout that is still running: its caller is told."""
    b = bridge.connect("hosted", model=hosted.model)
    ended: list[BaseException | None] = []

    def roll() -> None:
        try:
            asked = bridge.Sampling(max_tokens=hosted.hosting.longest, temperature=1.0)
            b.engines[0].generate([[5, 6]] * 4, asked)
            ended.append(None)
        except bridge.BridgeError as error:
            ended.append(error)

    thread = threading.Thread(target=roll)
    thread.start()
    time.sleep(0.2)
    family = [hosted.pid, *(child.pid for child in psutil.Process(hosted.pid).children(recursive=True))]
    assert len(family) > 1
    files = shared_files(family)
    assert files or not hosted.hosting.leaves_files
    hosted.home.cli("down", "hosted")
    b.close()
    thread.join(60)
    assert ended
    assert ended[0] is None or isinstance(ended[0], PeerLost), ended
    assert eventually(lambda: all(gone(pid) for pid in family)), "a process of the engine's is left"
    assert not [path for path in files if path.exists()]
    assert hosted.home.files() == []
