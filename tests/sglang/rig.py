"""One `sglang.Engine`, the bridge into it and the trainer's model.

`shims` stands in for what SGLang on CPU lacks without its kernels (each file says what it replaces); it is on the path
of these tests and of the processes they start, nowhere else. The bench needs them as well where there is no GPU
(`make bench-sglang`):

    PYTHONPATH=tests/sglang/shims:. python -m bridge bench --engine sglang:qwen2-0.5b
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import bridge
from engine_side.engines.common.hosting import Leavings
from tests.rigs import PROMPTS, Answer, EngineRig, Hosting, Logprobs, variables
from tests.sglang.inside import ACTION

SHIMS = str(Path(__file__).parent / "shims")
if SHIMS not in sys.path:
    sys.path.insert(0, SHIMS)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SHIMS, os.environ.get("PYTHONPATH")]))

LOADER = "engine_side.engines.sglang.load"
FRESH_S = 200.0
LORA = {
    "enable_lora": True, "max_lora_rank": 8, "max_loras_per_batch": 4, "lora_backend": "torch_native",
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}


def start(folder: Path, *, tp: int = 1, lora: bool = False, radix: bool = True, **more: Any) -> Any:
    """Start an Engine on CPU as the facts about SGLang recommend it."""
    import sglang

    if lora:
        more = {**LORA, **more}
    arguments: dict[str, Any] = {
        "model_path": str(folder), "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch",
        "skip_tokenizer_init": True, "dtype": "bfloat16", "disable_cuda_graph": True, "mem_fraction_static": 0.2,
        "tp_size": tp, "max_total_tokens": 4096, "context_length": 256, "disable_overlap_schedule": True,
        "log_level": "error", "disable_radix_cache": not radix, "random_seed": 0, "max_running_requests": 16,
        "custom_weight_loader": [LOADER], "sleep_on_idle": True,
    }  # fmt: skip
    with variables({"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if tp == 2 else {}):
        return sglang.Engine(**{**arguments, **more})


class SglangRig(EngineRig):
    """`lora` gives the engine four adapter slots, `tp` is the number of ranks."""

    families = [
        ("deepseek", {}),
        ("llama", {"disable_overlap_schedule": False}),  # SGLang's default, unlike what `start` recommends for CPU
        *[(family, {}) for family in ("qwen2", "qwen3", "phi3", "gemma2", "qwen3-moe")],
        *[(family, {"tp": 2}) for family in ("qwen3-moe", "qwen2-tied")],
        ("qwen2-tied", {}),
    ]
    lora_families = [
        *[(family, {"lora": True}) for family in ("qwen2", "qwen2-tied", "llama", "qwen3", "phi3", "gemma2")],
        ("qwen2", {"lora": True, "tp": 2}),
    ]
    lora_targets = {  # of a LoRA that its user loads, SGLang drops what fills a fused layer in part
        family: ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        for family in ("qwen2", "qwen2-tied", "llama", "qwen3", "gemma2")
    }
    config_changes = {
        # as DeepSeek's checkpoints have it, and the only rotary embedding that SGLang's latent attention has on CPU
        "deepseek": {
            "moe_layer_freq": 1,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 256, "rope_theta": 10000.0},
        },
    }
    largest_noise = 0.025
    last_write = 13
    in_flight_tokens = 90
    no_torn_error = "the pause before the way back has aborted it, and that is its answer"
    no_fresh = "each start takes half a minute"

    def __init__(self, folder: Path, family: str, *, tp: int = 1, lora: bool = False, **more: Any) -> None:
        super().__init__(folder, family)
        self._leavings = Leavings()
        self._ways = {"tp": tp, "lora": lora, **more}
        self.engine = start(folder, **self._ways)
        self._users = ThreadPoolExecutor(len(PROMPTS))
        self._begun: list[Future[Any]] = []
        self.attach()

    @property
    def handle(self) -> Any:
        return self.engine

    def stop(self) -> None:
        self._users.shutdown()
        self._leavings.note()
        self.engine.shutdown()
        del self.engine
        self._leavings.remove()

    def said(self, lora: Any = None) -> Logprobs:
        return said_by(self.engine, lora)

    def fresh(self) -> Logprobs:
        """Start it in a process of its own: the end of one engine ends every child of the process that it is in."""
        folder = self.folder / "fresh"
        self.model.save_pretrained(folder)
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            return other.submit(_said_by_fresh, folder, self._ways).result(FRESH_S)

    @property
    def version(self) -> str:
        out = self.engine.generate(input_ids=[PROMPTS[0]], sampling_params={"temperature": 0, "max_new_tokens": 1})
        return str(out[0]["meta_info"]["weight_version"])

    @property
    def longest(self) -> int:
        return int(self.b.status().engines[0].max_prompt)

    def bits(self) -> Mapping[str, Any]:
        found: dict[str, str] = self.inside("bits")
        return found

    def scale(self, path: str, factor: float) -> None:
        self.inside("scale", path=path, factor=factor)

    def begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}

        def user(ids: Sequence[int]) -> Any:
            return asyncio.run(self.engine.async_generate(input_ids=list(ids), sampling_params=sampling))

        states = self.engine.tokenizer_manager.rid_to_state
        self._begun = [self._users.submit(user, ids) for ids in prompts]
        until = time.monotonic() + 60
        while len(states) < len(prompts) or any(len(state.output_ids) < 3 for state in list(states.values())):
            assert time.monotonic() < until
            time.sleep(0.01)

    def finish(self) -> list[Answer]:
        ended = [future.result(60) for future in self._begun]
        return [
            Answer(
                tuple(out["output_ids"]),
                out["meta_info"]["finish_reason"]["type"],
                [int(span["version"]) for span in out["meta_info"]["weight_versions"]],
            )
            for out in ended
        ]

    @property
    def busy(self) -> bool:
        return bool(self.engine.tokenizer_manager.rid_to_state)

    @property
    def gate_shut(self) -> bool:
        return bool(self.engine.tokenizer_manager.is_pause_cond.shut)

    def hooks(self) -> Mapping[str, Any]:
        threads = [thread for thread in threading.enumerate() if thread.name == "weighbridge-sglang"]
        return {"loop": self.engine.loop, "threads": threads}

    @contextmanager
    def broken_writes(self, k: int, *, always: bool = False, rank: int = 0) -> Iterator[None]:
        self.inside("break_write", k=k, always=always, rank=rank)
        try:
            yield
        finally:
            fired = self.inside("mend")
        assert fired or rank, "only rank 0's answer is seen"

    @contextmanager
    def stale_caches(self) -> Iterator[None]:
        self.inside("keep_caches")
        try:
            yield
        finally:
            self.inside("mend")

    @contextmanager
    def wrong_absorption(self) -> Iterator[None]:
        self.inside("double_absorbed", times=2)
        try:
            yield
        finally:
            self.inside("mend")

    def wake(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        words = ContinueGenerationReqInput(torch_empty_cache=False)
        self.engine.loop.run_until_complete(self.engine.tokenizer_manager.continue_generation(words))

    def free(self) -> Mapping[str, Any]:
        """As in `EngineRig`; rows, and slots of the KV cache, too."""
        return {**super().free(), **self.inside("pools")}

    def user_lora(self, folder: Path) -> Any:
        assert self.engine.load_lora_adapter("mine", str(folder)).success
        return "mine"

    def our_lora(self, receipt: bridge.Receipt) -> Any:
        return receipt.engines[0].adapter

    def loras(self) -> list[str]:
        names: list[str] = self.inside("adapters")
        return names

    def inside(self, command: str, **arguments: Any) -> Any:
        """Run a command of `tests.sglang.inside` in every scheduler; rank 0's answer."""
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        words = CheckWeightsReqInput(action=ACTION, skip_tensor_list=[command, json.dumps(arguments)])
        _, message, *_ = self.engine.loop.run_until_complete(self.engine.tokenizer_manager.check_weights(words))
        return json.loads(message)

    def own_update(self, tensors: list[tuple[str, torch.Tensor]]) -> tuple[bool, str]:
        """Do SGLang's own in-memory update; returns what it says."""
        self.engine.begin_weight_update()
        answer = self.engine.update_weights_from_tensor(tensors)
        self.engine.end_weight_update()
        return bool(answer[0]), str(answer[1])


ON_CPU = {
    "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch", "disable_cuda_graph": True,
    "mem_fraction_static": 0.2, "max_total_tokens": 8192, "context_length": 2048, "disable_overlap_schedule": True,
}  # fmt: skip
HOSTING = Hosting(
    scheme="sglang",
    arguments={**ON_CPU, **LORA},
    variables={"PYTHONPATH": os.pathsep.join((SHIMS, str(Path(__file__).parents[2])))},
    wrong=[
        ({"tensor_paralel_size": 2}, "tensor_paralel_size"),
        ({"tp_sise": 2}, "tp_sise.*tp_size"),
        ({"tp_size": "two"}, "tp_size"),
        ({"dtype": "bf17"}, "dtype.*bfloat16"),
        ({"model_path": "elsewhere"}, "model_path"),
        ({"pp_size": 2}, "pp_size"),
        ({"custom_weight_loader": ["my.loader"]}, "custom_weight_loader"),
        ({"enable_hierarchical_cache": True}, "enable_hierarchical_cache.*without"),
        ({"enable_lmcache": True}, "enable_lmcache.*without"),
        ({"enable_eplb": True}, "enable_eplb.*without"),
        ({**ON_CPU, "context_length": 999_999_999}, "context_length"),
    ],
    model={"max_position_embeddings": 2048},
    longest=1200,
    in_flight_tokens=1200,
    leaves_files=True,
)


def _said_by_fresh(folder: Path, ways: dict[str, Any]) -> Logprobs:
    leavings = Leavings()
    engine = start(folder, **ways)
    try:
        return said_by(engine)
    finally:
        leavings.note()
        engine.shutdown()
        leavings.remove()


def said_by(engine: Any, adapter: str | None = None) -> Logprobs:
    """Compute prompt log-probabilities through SGLang's own `generate`."""
    outputs = [
        engine.generate(
            input_ids=[ids],
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
            lora_path=[adapter] if adapter else None,
        )[0]
        for ids in PROMPTS
    ]
    return [[row[0] for row in out["meta_info"]["input_token_logprobs"][1:]] for out in outputs]
