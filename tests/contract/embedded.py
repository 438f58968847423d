"""One embedded engine, the bridge into it and the trainer's model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import BASE, Engine
from engine_side.engines.embedded import EmbeddedRankHost
from tests.rigs import PROMPTS, Answer, EngineRig, Logprobs, bits_of, broken_writes_here, doubled_after_post_load

FAMILIES = ("deepseek", "llama", "qwen2", "qwen3", "qwen3-moe")


class EmbeddedRig(EngineRig):
    """`tp` is the number of ranks; `lora` gives the engine two slots."""

    families = [*[(family, {}) for family in FAMILIES], ("qwen2-tied", {"tp": 2}), ("qwen2-tied", {})]
    lora_families = [(family, {"lora": True}) for family in ("qwen2", "qwen2-tied", "llama", "qwen3")]
    config_changes = {"deepseek": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}}  # it has no yarn
    largest_noise = 0.03
    last_write = 16
    in_flight_tokens = 350
    no_spans = "a completion has one version, that which it began with"
    no_torn_error = "the pause before the way back has aborted it, and that is its answer"
    no_user_loras = "the engine takes LoRAs from a push alone"

    def __init__(self, folder: Path, family: str, *, tp: int = 1, lora: bool = False, **changes: Any) -> None:
        super().__init__(folder, family, **changes)
        self._ways: dict[str, Any] = {"tensor_parallel_size": tp, "max_loras": 2 * lora}
        self.engine = Engine(EngineConfig(str(folder), **self._ways))
        self._users = ThreadPoolExecutor(1)
        self._begun: Future[Any] | None = None
        self.attach()

    @property
    def handle(self) -> Any:
        return self.engine

    def stop(self) -> None:
        self._users.shutdown()
        self.engine.close()

    def said(self, lora: Any = None) -> Logprobs:
        self.engine.generate(PROMPTS[:1], bridge.Sampling(max_tokens=1), lora or BASE)  # waits, and is refused
        return self.engine.prompt_logprobs(PROMPTS, lora or BASE)

    def fresh(self) -> Logprobs:
        folder = self.folder / "fresh"
        self.model.save_pretrained(folder)
        with Engine(EngineConfig(str(folder), **self._ways)) as other:
            return other.prompt_logprobs(PROMPTS)

    @property
    def version(self) -> str:
        return str(self.engine.weight_version)

    @property
    def longest(self) -> int:
        return self.engine.runner.limits.max_seq_len - 1

    def bits(self) -> Mapping[str, Any]:
        return bits_of(self.engine.runner.model)

    def scale(self, path: str, factor: float) -> None:
        with torch.no_grad():
            self.engine.runner.model.get_parameter(path).mul_(factor)

    def begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        steps, until = self.engine.steps, time.monotonic() + 60
        self._begun = self._users.submit(
            self.engine.generate, prompts, bridge.Sampling(max_tokens=tokens, temperature=0.0)
        )
        while self.engine.steps < steps + 6:
            assert time.monotonic() < until
            time.sleep(0.001)

    def finish(self) -> list[Answer]:
        assert self._begun is not None
        return [Answer(one.token_ids, one.finish_reason, [one.weight_version]) for one in self._begun.result(60)]

    @property
    def busy(self) -> bool:
        """As in `EngineRig`: an engine with requests takes steps."""
        steps = self.engine.steps
        time.sleep(0.05)
        return self.engine.steps > steps

    @property
    def gate_shut(self) -> bool:
        return self.engine.paused

    def hooks(self) -> Mapping[str, Any]:
        return {name: value for name, value in vars(self.engine).items() if name != "steps"}

    def broken_writes(self, k: int, *, always: bool = False) -> AbstractContextManager[None]:
        return broken_writes_here(k, always=always)

    @contextmanager
    def stale_caches(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine, "reset_prefix_cache", lambda *_, **__: True)
            yield

    def wrong_absorption(self) -> AbstractContextManager[None]:
        return doubled_after_post_load(EmbeddedRankHost, self.engine.runner.model, "w_uv", 4)

    def wake(self) -> None:
        self.engine.resume()

    def our_lora(self, receipt: bridge.Receipt) -> Any:
        return receipt.engines[0].adapter

    def loras(self) -> list[str]:
        return sorted(self.engine.adapters)
