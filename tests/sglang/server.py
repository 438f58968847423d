"""`sglang.launch_server` for the contract's tests of servers; faults go into its scheduler (`tests.sglang.inside`)."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.contract.served import PATH, EngineServer, numbers
from tests.rigs import PROMPTS, Answer, Logprobs
from tests.sglang.inside import ACTION
from tests.sglang.rig import LOADER, SHIMS

MODEL = {"/model_info": {"weight_version": "default"}}
INFO = {
    "version": "0.5.23", "custom_weight_loader": [LOADER], "pp_size": 1, "dp_size": 1, "nnodes": 1, "tp_size": 1,
    "tokenizer_worker_num": 1, "speculative_algorithm": None, "disaggregation_mode": "null", "quantization": None,
    "model_path": "x", "max_loras_per_batch": 4, "enable_lora": False, "device": "cpu", "load_format": "auto",
}  # fmt: skip
OUTSIDE_KV = {
    "enable_hierarchical_cache": True, "hicache_storage_backend": "file", "enable_lmcache": True,
    "enable_flexkv": True, "radix_cache_backend": "flexkv", "enable_eplb": True, "elastic_ep_backend": "mooncake",
}  # fmt: skip


class SglangServer(EngineServer):
    up_route = "/model_info"
    stop_signal = signal.SIGTERM
    positions = 2048
    in_flight_tokens = 400
    largest_noise = 0.025
    lora_names = ("current", None)
    paused = "continue_generation"
    no_paused_refusal = "so do those of its own clients"
    telling_level = "read-back"  # nothing is packed on CPU
    without_bridge = "custom_weight_loader"
    unattachable = (
        (MODEL, "another kind"),
        ({**MODEL, "/server_info": {**INFO, "version": "0.4.1"}}, ">=0.5.23"),
        ({**MODEL, "/server_info": {**INFO, "custom_weight_loader": []}}, "--custom-weight-loader engine_side"),
        *(({**MODEL, "/server_info": {**INFO, name: value}}, f"without {name}") for name, value in OUTSIDE_KV.items()),
        (
            {**MODEL, "/server_info": INFO, "/weights_checker": {"success": False, "message": "Unknown action"}},
            "plugin",
        ),
    )

    def command(self, port: int, *, bridged: bool) -> list[str]:
        bridge = [
            "--custom-weight-loader", LOADER, "--enable-lora", "--max-lora-rank", "8", "--max-loras-per-batch", "4",
            "--lora-backend", "torch_native", "--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj",
            "gate_proj", "up_proj", "down_proj",
        ]  # fmt: skip
        return [
            sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.folder), "--port", str(port),
            "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
            "--skip-tokenizer-init", "--dtype", "bfloat16", "--disable-cuda-graph", "--mem-fraction-static", "0.2",
            "--max-total-tokens", "8192", "--context-length", "2048", "--disable-overlap-schedule",
            "--log-level", "warning", "--skip-server-warmup", "--random-seed", "0", *(bridge if bridged else []),
        ]  # fmt: skip

    def variables(self) -> Mapping[str, str]:
        return {"PYTHONPATH": os.pathsep.join((SHIMS, PATH)), "OMP_NUM_THREADS": "1"}

    def _ask(self, ids: Sequence[int], timeout: float = 60.0, lora: str | None = None, **sampling: Any) -> Any:
        parameters = {"temperature": 0, **sampling}
        more = {"return_logprob": True, "logprob_start_len": 0, "lora_path": lora}
        return json.loads(self.post("/generate", timeout, input_ids=list(ids), sampling_params=parameters, **more))

    def generate(
        self,
        ids: Sequence[int],
        tokens: int = 1,
        *,
        lora: str | None = None,
        stops: bool = False,
        timeout: float = 60.0,
    ) -> Answer:
        answer = self._ask(ids, timeout, lora, max_new_tokens=tokens, ignore_eos=not stops)
        meta = answer["meta_info"]
        return Answer(tuple(answer["output_ids"]), meta["finish_reason"]["type"], numbers(meta.get("weight_versions")))

    def said(self) -> Logprobs:
        answers = [self._ask(ids, max_new_tokens=1) for ids in PROMPTS]
        return [[row[0] for row in answer["meta_info"]["input_token_logprobs"][1:]] for answer in answers]

    @property
    def version(self) -> str:
        return str(self.get("/model_info")["weight_version"])

    def check_refusals(self) -> None:
        with pytest.raises((http.client.HTTPException, OSError)):
            self.post("/generate", 10, input_ids=[5, 6], stream=True, sampling_params={"max_new_tokens": 2})

    def pause(self) -> None:
        self.post("/pause_generation", mode="retract")

    def let_go_on(self) -> None:
        self.post("/continue_generation")

    def break_write(self, k: int, *, always: bool = False) -> None:
        self.inside("break_write", k=k, always=always)

    def hang_write(self) -> None:
        self.inside("slow_write", k=5, seconds=5.0)

    @property
    def hangs(self) -> bool:
        """As in `EngineServer`; a second after a client has to wait."""
        if self.holds:
            time.sleep(1.0)
            return True
        return False

    def flip(self) -> None:
        self.inside("scale", path="model.norm.weight", factor=2.0)

    def mend(self) -> bool:
        struck: bool = self.inside("mend")
        return struck

    def inside(self, command: str, **arguments: Any) -> Any:
        """Run a command of `tests.sglang.inside` in every scheduler; rank 0's answer."""
        words = [command, json.dumps(arguments)]
        return json.loads(json.loads(self.post("/weights_checker", action=ACTION, skip_tensor_list=words))["message"])
