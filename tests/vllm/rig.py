"""One `vllm.LLM`, the bridge into it and the trainer's model."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch

import bridge
from tests.rigs import Logprobs, difference, variables
from tests.vllm.families import make_model, perturb
from trainer_side.reference import reference_logprobs

PROMPTS = [random.Random(n).choices(range(3, 400), k=n) for n in (5, 20, 150)]


class VllmRig:
    """`how` is "inproc", "mp" (an engine core of its own) or "tp2"; `lora` gives the engine three adapter slots."""

    def __init__(self, folder: Path, family: str, *, how: str = "inproc", lora: bool = False, **changes: Any) -> None:
        self.family, self.how, self.folder = family, how, folder
        self.model = make_model(family, **changes)
        self.model.save_pretrained(folder)
        more: dict[str, Any] = {}
        if lora:
            more.update(enable_lora=True, max_lora_rank=8, max_loras=3)
        if how == "tp2":
            more.update(tensor_parallel_size=2, distributed_executor_backend="mp")
        self._more = more
        self.llm = start(folder, how, **more)
        self._others: list[Any] = []
        self._known: Logprobs = []
        self.b = bridge.attach(self.llm, model=self.model)
        self._seed = 0
        self._first = {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def fresh(self) -> Logprobs:
        """What vLLM itself says of the trainer's weights: an engine of this process, started from a checkpoint of
        them. It lives as long as this rig: its end would be that of the parallel groups of this process. Two ranks add
        in another order than one does, and two such engines are too much for two cores: "tp2" is started anew, and the
        rig is of no use for pushes any more."""
        folder = self.folder / f"fresh{len(self._others)}"
        self.model.save_pretrained(folder)
        if self.how == "tp2":
            self.b.close()
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = start(folder, self.how, **self._more)
            return self.said()
        self._others.append(start(folder, "inproc"))
        return said_by(self._others[-1])

    def known(self) -> Logprobs:
        """What vLLM itself says of the weights of `step(0)`, which the trainer holds now; asked once."""
        self._known = self._known or self.fresh()
        return self._known

    def close(self) -> None:
        before = set(os.listdir("/dev/shm"))
        self.b.close()
        for llm in (*self._others, self.llm):
            llm.llm_engine.engine_core.shutdown()
        self._others.clear()
        del self.llm
        for name in before & set(os.listdir("/dev/shm")):
            if name.startswith("vllm_dist_"):  # vLLM's own: its workers are gone
                os.unlink(f"/dev/shm/{name}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def said(self, lora: Any = None) -> Logprobs:
        """Prompt log-probabilities through vLLM's own `generate`."""
        return said_by(self.llm, lora)

    def wanted(self) -> Logprobs:
        wanted: Logprobs = reference_logprobs(self.model, PROMPTS)
        return wanted

    def off(self) -> float:
        """Mean |difference| to transformers in nats."""
        return difference(self.said(), self.wanted())

    def step(self, seed: int | None = None) -> None:
        """Other weights, as far from the checkpoint's each time: noise between engines grows with them. `seed` 0 is
        never used otherwise."""
        self._seed += 1
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self._first[name])
        perturb(self.model, self._seed if seed is None else seed)

    def push(self, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = self.b.push(self.model.named_parameters(), **options)
        return receipt

    def rank(self) -> Any:
        """The rank object of an engine core in this process."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.weight_transfer_engine.rank


def said_by(llm: Any, lora: Any = None) -> Logprobs:
    """Prompt log-probabilities of an engine, through vLLM's own `generate`."""
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


def start(folder: Path, how: str, **more: Any) -> Any:
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    with variables(_variables(how)):
        return LLM(
            str(folder),
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=256,
            dtype="bfloat16",
            enable_prefix_caching=True,
            seed=0,
            weight_transfer_config=WeightTransferConfig(backend="bridge"),
            **more,
        )


def _variables(how: str) -> dict[str, str]:
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if how == "inproc" else "1"}
    return {**wanted, "VLLM_CPU_OMP_THREADS_BIND": "0|1"} if how == "tp2" else wanted
