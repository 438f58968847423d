"""`vllm serve` for the contract's tests of servers, with faults in its worker (see `server_faults.py`)."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.contract.served import PATH, EngineServer, numbers
from tests.rigs import PROMPTS, Answer, Logprobs

FAULTS = Path(__file__).with_name("server_faults.py")
VLLM = {"/version": {"version": "0.32.0"}, "/load": {"server_load": 0}}


class VllmServer(EngineServer):
    up_route = "/health"
    stop_signal = signal.SIGINT
    positions = 4096
    in_flight_tokens = 200  # of 10 ms each: see `server_faults.STEP_S`
    largest_noise = 0.02
    lora_names = ("current",)
    paused = r"asleep or paused.*resume"
    telling_level = "probe"
    without_bridge = "weight-transfer-config"
    unattachable = (
        ({}, "another kind"),
        ({"/get_model_info": {"model_path": "x"}, "/version": {"version": "0.5.23"}}, "another kind"),
        (VLLM, "VLLM_SERVER_DEV_MODE=1"),
        ({**VLLM, "/version": {"version": "0.11.0"}}, ">=0.32"),
        ({**VLLM, "/get_world_size": {"world_size": 1}}, "weight-transfer-config"),
        ({**VLLM, "/get_world_size": {"world_size": 2}, "/server_info": {"vllm_config": {}}}, "weight-transfer-config"),
        ({**VLLM, "/get_world_size": {"world_size": 1}, "/collective_rpc": {"results": [""]}}, "plugin"),
    )

    def command(self, port: int, *, bridged: bool) -> list[str]:
        """As in `EngineServer`; lays the faults beside the checkpoint, and a distribution "vllm", whose version it asks
        for: builds for CPU have other names."""
        import vllm

        parent = self.folder.parent
        (parent / "sitecustomize.py").write_text(FAULTS.read_text())
        info = parent / f"vllm-{vllm.__version__}+cpu.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n")
        bridge = [
            "--weight-transfer-config", '{"backend":"bridge"}', "--enable-lora", "--max-lora-rank", "8",
            "--max-loras", "3",
        ]  # fmt: skip
        return [
            str(Path(sys.executable).with_name("vllm")), "serve", str(self.folder), "--host", "127.0.0.1",
            "--port", str(port), "--skip-tokenizer-init", "--enforce-eager", "--enable-scale-out",
            "--max-model-len", "4096", "--dtype", "bfloat16", *(bridge if bridged else []),
        ]  # fmt: skip

    def variables(self) -> Mapping[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join((str(self.folder.parent), PATH)),
            "WEIGHBRIDGE_TEST_FAULT": str(self._switch),
            "VLLM_CPU_OMP_THREADS_BIND": "0",
            "VLLM_SERVER_DEV_MODE": "1",
        }

    @property
    def _switch(self) -> Path:
        return self.folder.with_name("fault.txt")

    def _ask(self, ids: Sequence[int], timeout: float = 60.0, **sampling: Any) -> Any:
        parameters = {"temperature": 0.0, **sampling}
        return json.loads(self.post("/inference/v1/generate", timeout, token_ids=list(ids), sampling_params=parameters))

    def generate(
        self,
        ids: Sequence[int],
        tokens: int = 1,
        *,
        lora: str | None = None,
        stops: bool = False,
        timeout: float = 60.0,
    ) -> Answer:
        more: dict[str, Any] = {"extra_args": {"weighbridge_adapter": lora}} if lora else {}
        (choice,) = self._ask(ids, timeout, max_tokens=tokens, ignore_eos=not stops, **more)["choices"]
        return Answer(tuple(choice["token_ids"]), choice["finish_reason"], numbers(choice.get("weight_versions")))

    def said(self) -> Logprobs:
        found = []
        for ids in PROMPTS:
            rows = self._ask(ids, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
            found.append([row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)])
        return found

    @property
    def version(self) -> str:
        return str(self.get("/weight_info")["weight_version"])

    def pause(self) -> None:
        self.post("/pause?mode=keep")

    def let_go_on(self) -> None:
        self.post("/resume")

    def break_write(self, k: int, *, always: bool = False) -> None:
        self._switch.write_text(f"{k} {'always' if always else 'once'}")

    def hang_write(self) -> None:
        self._switch.write_text("5 hang")

    @property
    def hangs(self) -> bool:
        return not self._switch.exists()

    def flip(self) -> None:
        self._switch.write_text("flip")

    def mend(self) -> bool:
        struck = not self._switch.exists()
        self._switch.unlink(missing_ok=True)
        return struck
