"""One `vllm.LLM`, the bridge into it and the trainer's model. Environment variables are set before vLLM is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from engine_side.engines.common.hosting import Leavings
from tests.families import FAMILIES, WITH_LORA
from tests.rigs import (
    PROMPTS,
    Answer,
    EngineRig,
    Hosting,
    Logprobs,
    bits_of,
    broken_writes_here,
    doubled_after_post_load,
    variables,
)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class VllmRig(EngineRig):
    """`how` is "inproc", "mp" (an engine core of its own) or "tp2"; `lora` gives the engine three adapter slots.
    Faults are for "inproc" alone."""

    families = [  # the first and the last share their engine with the tests before and after
        ("deepseek", {}),
        *[(family, {"how": "tp2"}) for family in ("qwen2-tied", "qwen3-moe")],
        *[(family, {"lora": True}) for family in WITH_LORA],
        *[(family, {"how": "mp"}) for family in FAMILIES],
        *[(family, {}) for family in FAMILIES if family not in ("deepseek", "qwen2-tied")],
        ("qwen2-tied", {}),
    ]
    lora_families = [
        *[(family, {"lora": True}) for family in WITH_LORA],
        *[("qwen2", {"lora": True, "how": how}) for how in ("mp", "tp2")],
    ]
    lora_targets = {"deepseek-dense": ["q_b_proj", "o_proj"]}
    # with a prefix cache vLLM's own forward of state-space layers ends on CPU: IndexError in varlen_states[...]
    recurrent_families = [(family, {"prefix_cache": False}) for family in ("falcon-h1", "granite-hybrid", "qwen3-next")]
    more_recurrent_families = [
        *[(family, {"prefix_cache": False}) for family in ("mamba2", "nemotron-h", "zamba2", "lfm2")],
        ("falcon-h1", {"prefix_cache": False, "lora": True}),
        ("qwen3-next", {"prefix_cache": False, "how": "mp"}),
        ("falcon-h1", {"prefix_cache": False, "how": "tp2"}),
    ]
    wrong_by_itself = {"lfm2": "the rotary kernel for CPU is not made for queries of shape [tokens, heads, features]"}
    largest_noise = 0.03  # in fp32 the two agree to 1e-3
    last_write = 16
    in_flight_tokens = 30

    def __init__(
        self,
        folder: Path,
        family: str,
        *,
        how: str = "inproc",
        lora: bool = False,
        prefix_cache: bool = True,
        **changes: Any,
    ) -> None:
        super().__init__(folder, family, **changes)
        self.how = how
        self._more: dict[str, Any] = {"enable_prefix_caching": prefix_cache}
        if lora:
            self._more.update(enable_lora=True, max_lora_rank=8, max_loras=3)
        if how == "tp2":
            self._more.update(tensor_parallel_size=2, distributed_executor_backend="mp")
        self._leavings = Leavings()
        self.llm = start(folder, how, **self._more)
        self._others: list[Any] = []
        self.attach()

    @property
    def handle(self) -> Any:
        return self.llm

    def fresh(self) -> Logprobs:
        """Start it in this process, for as long as this rig: its end would be that of this process's parallel groups.
        Two ranks add in another order than one does, and two such engines are too much for two cores: "tp2" is started
        anew, and the rig is of no use for pushes any more."""
        folder = self.folder / f"fresh{len(self._others)}"
        self.model.save_pretrained(folder)
        if self.how == "tp2":
            self.b.close()
            self.stop()
            self.llm = start(folder, self.how, **self._more)
            return self.said()
        self._others.append(start(folder, "inproc", enable_prefix_caching=self._more["enable_prefix_caching"]))
        return said_by(self._others[-1])

    def stop(self) -> None:
        self._leavings.note()
        for llm in (*self._others, self.llm):
            llm.llm_engine.engine_core.shutdown()
        self._others.clear()
        del self.llm
        self._leavings.remove()

    def said(self, lora: Any = None) -> Logprobs:
        return said_by(self.llm, lora)

    @property
    def version(self) -> str:
        return str(self.llm.llm_engine.get_weight_version())

    @property
    def longest(self) -> int:
        return int(self.llm.llm_engine.vllm_config.model_config.max_model_len) - 1

    def rank(self) -> Any:
        """Find the rank object of an engine core in this process."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.weight_transfer_engine.rank

    def bits(self) -> Mapping[str, Any]:
        return bits_of(self.rank().host.model)

    def scale(self, path: str, factor: float) -> None:
        with torch.no_grad():
            self.rank().host.model.get_parameter(path).mul_(factor)

    def begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
        self.llm.enqueue([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        for _ in range(6):
            assert not self.llm.llm_engine.step()

    def finish(self) -> list[Answer]:
        ended = [out.outputs[0] for out in self.llm.wait_for_completion(use_tqdm=False)]
        versions = [[int(span.version) for span in one.weight_versions] for one in ended]
        return [Answer(tuple(one.token_ids), one.finish_reason, v) for one, v in zip(ended, versions, strict=True)]

    @property
    def busy(self) -> bool:
        engine = self.llm.llm_engine
        return bool(type(engine).has_unfinished_requests(engine))  # past the gate, which refuses

    @property
    def gate_shut(self) -> bool:
        from engine_side.engines.vllm.gate import VllmGate

        return VllmGate.of(self.llm.llm_engine).held

    def hooks(self) -> Mapping[str, Any]:
        return dict(vars(self.llm.llm_engine))

    def broken_writes(self, k: int, *, always: bool = False) -> AbstractContextManager[None]:
        return broken_writes_here(k, always=always)

    @contextmanager
    def stale_caches(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(self.llm.llm_engine), "reset_prefix_cache", lambda *_, **__: True)
            yield

    def wrong_absorption(self) -> AbstractContextManager[None]:
        from engine_side.engines.vllm.host import VllmRankHost

        return doubled_after_post_load(VllmRankHost, self.rank().host.model, "W_UV", 4)

    def wake(self) -> None:
        self.llm.wake_up()

    def user_lora(self, folder: Path) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest("mine", 7, str(folder))

    def our_lora(self, receipt: bridge.Receipt) -> Any:
        """As in `EngineRig`; vLLM does not look at the folder of a LoRA that it holds."""
        from vllm.lora.request import LoRARequest

        (number,) = set(self.llm.llm_engine.list_loras()) - {7}
        return LoRARequest(receipt.engines[0].adapter, number, "/held/in/memory")

    def loras(self) -> list[str]:
        return sorted(str(number) for number in self.llm.llm_engine.list_loras())


HOSTING = Hosting(
    scheme="vllm",
    arguments={"enforce_eager": True, "max_model_len": 32768, "enable_lora": True, "max_lora_rank": 8, "max_loras": 3},
    variables={"VLLM_CPU_OMP_THREADS_BIND": "0"},  # else rollouts take every core, and pushes come too late
    wrong=[
        ({"tensor_paralel_size": 2}, "tensor_paralel_size.*tensor_parallel_size"),
        ({"max_model_len": -5}, "max_model_len"),
        ({"dtype": "bf17"}, "dtype"),
        ({"layout": "packed"}, "layout"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "weight_transfer_config"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config.*without",
        ),
        ({"kv_offloading_size": 0.1}, "kv_offloading_size.*without"),
    ],
    model={"eos_token_id": None, "max_position_embeddings": 32768},  # rollouts as long as asked for
    longest=30_000,  # for minutes: a push that waits for a busy machine still meets it
    in_flight_tokens=400,
    leaves_files=False,
)


def said_by(llm: Any, lora: Any = None) -> Logprobs:
    """Compute prompt log-probabilities through vLLM's own `generate`."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=0)
    # one at a time: with a wrapped head vLLM's own prompt log-probabilities fail on more
    outputs = [
        llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False, lora_request=lora)[0] for ids in PROMPTS
    ]
    return [
        [row[token].logprob for row, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)]
        for out, ids in zip(outputs, PROMPTS, strict=True)
    ]


def start(folder: Path, how: str, *, skip_tokenizer_init: bool = True, **more: Any) -> Any:
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    with variables(_variables(how)):
        return LLM(
            str(folder),
            skip_tokenizer_init=skip_tokenizer_init,
            enforce_eager=True,
            max_model_len=256,
            dtype="bfloat16",
            seed=0,
            weight_transfer_config=WeightTransferConfig(backend="bridge"),
            **{"enable_prefix_caching": True, **more},
        )


def _variables(how: str) -> dict[str, str]:
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if how == "inproc" else "1"}
    return {**wanted, "VLLM_CPU_OMP_THREADS_BIND": "0|1"} if how == "tp2" else wanted
