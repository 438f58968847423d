"""One `sglang.Engine`, the bridge into it and the trainer's model."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import bridge
from engine_side.engines.common.hosting import Leavings
from tests.rigs import Logprobs, difference, variables
from tests.sglang.inside import ACTION
from tests.vllm.families import make_model, perturb
from trainer_side.reference import reference_logprobs

LOADER = "engine_side.engines.sglang.load"
FRESH_S = 200.0
PROMPTS = [random.Random(n).choices(range(3, 400), k=n) for n in (5, 20, 150)]
YARN = {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
CHANGES: dict[str, Any] = {
    # as DeepSeek's checkpoints have it, and the only rotary embedding that SGLang's latent attention has on CPU
    "deepseek": {
        "moe_layer_freq": 1,
        "rope_parameters": {**YARN, "original_max_position_embeddings": 256, "rope_theta": 10000.0},
    },
}


def start(folder: Path, *, tp: int = 1, lora: bool = False, radix: bool = True, **more: Any) -> Any:
    """An Engine on CPU as the facts about SGLang recommend it."""
    import sglang

    if lora:
        more = {
            "enable_lora": True, "max_lora_rank": 8, "max_loras_per_batch": 4, "lora_backend": "torch_native",
            "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            **more,
        }  # fmt: skip
    arguments: dict[str, Any] = {
        "model_path": str(folder), "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch",
        "skip_tokenizer_init": True, "dtype": "bfloat16", "disable_cuda_graph": True, "mem_fraction_static": 0.2,
        "tp_size": tp, "max_total_tokens": 4096, "context_length": 256, "disable_overlap_schedule": True,
        "log_level": "error", "disable_radix_cache": not radix, "random_seed": 0, "max_running_requests": 16,
        "custom_weight_loader": [LOADER], "sleep_on_idle": True,
    }  # fmt: skip
    with variables({"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if tp == 2 else {}):
        return sglang.Engine(**{**arguments, **more})


class SglangRig:
    """`lora` gives the engine four adapter slots, `tp` is the number of ranks."""

    def __init__(self, folder: Path, family: str, *, tp: int = 1, lora: bool = False, **more: Any) -> None:
        self.family, self.folder = family, folder
        self._leavings = Leavings()
        self.model = make_model(family, **CHANGES.get(family, {}))
        if hasattr(self.model.config, "hidden_activation"):  # as checkpoints have it; SGLang reads the older name
            self.model.config.hidden_act = self.model.config.hidden_activation
        self.model.save_pretrained(folder)
        self._ways = {"tp": tp, "lora": lora, **more}
        self.engine = start(folder, **self._ways)
        self.b = bridge.attach(self.engine, model=self.model)
        self._seed = 0
        self._first = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def close(self) -> None:
        self.b.close()
        self._leavings.note()
        self.engine.shutdown()
        del self.engine
        self._leavings.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def said(self, adapter: str | None = None) -> Logprobs:
        """Prompt log-probabilities through SGLang's own `generate`."""
        return said_by(self.engine, adapter)

    def fresh(self) -> Logprobs:
        """What SGLang itself says of the trainer's weights: an engine like this one, started from a checkpoint of
        them. In a process of its own, since the end of one engine ends every child of the process that it is in."""
        folder = self.folder / "fresh"
        self.model.save_pretrained(folder)
        with ProcessPoolExecutor(1, get_context("spawn")) as other:
            return other.submit(_said_by_fresh, folder, self._ways).result(FRESH_S)

    def wanted(self) -> Logprobs:
        wanted: Logprobs = reference_logprobs(self.model, PROMPTS)
        return wanted

    def off(self) -> float:
        """Mean |difference| to transformers in nats."""
        return difference(self.said(), self.wanted())

    def step(self) -> None:
        """Other weights, as far from the checkpoint's each time: noise between engines grows with them."""
        self._seed += 1
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self._first[name])
        perturb(self.model, self._seed)

    def push(self, **options: Any) -> bridge.Receipt:
        receipt: bridge.Receipt = self.b.push(self.model.named_parameters(), **options)
        return receipt

    def inside(self, command: str, **arguments: Any) -> Any:
        """Run a command of `tests.sglang.inside` in every scheduler; rank 0's answer."""
        from sglang.srt.managers.io_struct import CheckWeightsReqInput

        words = CheckWeightsReqInput(action=ACTION, skip_tensor_list=[command, json.dumps(arguments)])
        _, message, *_ = self.engine.loop.run_until_complete(self.engine.tokenizer_manager.check_weights(words))
        return json.loads(message)

    def own_update(self, tensors: list[tuple[str, torch.Tensor]]) -> tuple[bool, str]:
        """SGLang's own in-memory update; what it says."""
        self.engine.begin_weight_update()
        answer = self.engine.update_weights_from_tensor(tensors)
        self.engine.end_weight_update()
        return bool(answer[0]), str(answer[1])

    @property
    def version(self) -> str:
        """The label on what SGLang generates."""
        out = self.engine.generate(input_ids=[PROMPTS[0]], sampling_params={"temperature": 0, "max_new_tokens": 1})
        return str(out[0]["meta_info"]["weight_version"])


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
    """Prompt log-probabilities of an engine, through SGLang's own `generate`."""
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


def check_family(rig: SglangRig, limit: float = 0.025) -> None:
    """Two pushes and a rollback: verified without the canary's help, as near to transformers as SGLang is, and with one
    rank equal to an engine that was started from a checkpoint of the same weights."""
    serving = rig.b.status().engines[0].serving or 0
    for version in (serving + 1, serving + 2):
        rig.step()
        assert rig.off() > 2 * limit, "the step must show"
        receipt = rig.push()
        assert receipt.verified is True
        assert rig.off() < limit
        assert rig.version == str(version)
        for rank in receipt.engines[0].ranks:
            assert not rank.canary_only
            assert "native" not in rank.strategies
    if rig.b.status().engines[0].ranks == 1:  # four schedulers are too many for two cores
        assert rig.said() == rig.fresh()
    rig.b.rollback()
    assert rig.off() > 2 * limit
    assert rig.version == str(serving + 1)
