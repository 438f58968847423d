"""The server of one engine, the bridge into it and the trainer's model: all that the tests of servers know."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from engine_side.engines.common.hosting import Leavings
from tests.ray.conftest import ROOT, eventually
from tests.rigs import Answer, Logprobs, TrainerRig
from tests.servers import free_port

PATH = str(ROOT)
"""Of the packages that a server imports."""


class EngineServer(ABC):
    """A server on a checkpoint, what a client asks of it, and faults in its process with the weights.

    Attributes:
        up_route: answers as soon as the server does.
        in_flight_tokens: tokens of a request that still runs when a push that comes 0.3 s later pauses the engine.
        largest_noise: mean nats that its arithmetic may differ from transformers'.
        lora_names: names by which a client gets the LoRA that was pushed last; None stands for the engine's own.
        unattachable: answers of a server to its routes, and what the refusal to drive it says.
        paused: what is said about a server that its owner has paused.
        no_paused_refusal: why a rollout at such a server waits until its time is over.
        telling_level: the level that examines the weights as the engine uses them.
        without_bridge: what is said about a server of this engine that was started without the bridge.
        positions: of the model.
    """

    up_route: ClassVar[str]
    in_flight_tokens: ClassVar[int]
    largest_noise: ClassVar[float]
    lora_names: ClassVar[Sequence[str | None]]
    unattachable: ClassVar[Sequence[tuple[Mapping[str, Any], str]]]
    paused: ClassVar[str]
    no_paused_refusal: ClassVar[str] = ""
    telling_level: ClassVar[str]
    without_bridge: ClassVar[str]
    positions: ClassVar[int]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, folder: Path, *, bridged: bool = True) -> None:
        """Start the process; `wait` waits for it.

        Args:
            folder: the checkpoint; its parent is the server's own.
            bridged: with the bridge's part in it, and LoRA.
        """
        port = free_port()
        self.url, self.folder = f"http://127.0.0.1:{port}", folder
        self._leavings = Leavings()
        self._log = folder.with_name(f"server-{port}.log").open("w+")
        self.process = subprocess.Popen(
            self.command(port, bridged=bridged), env={**os.environ, **self.variables()}, stdout=self._log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    @abstractmethod
    def command(self, port: int, *, bridged: bool) -> list[str]:
        """Make the command line."""

    @abstractmethod
    def variables(self) -> Mapping[str, str]:
        """Make the environment variables that are added."""

    @abstractmethod
    def generate(
        self,
        ids: Sequence[int],
        tokens: int = 1,
        *,
        lora: str | None = None,
        stops: bool = False,
        timeout: float = 60.0,
    ) -> Answer:
        """Ask for a greedy completion as a client does, token ids in and out; with `stops` it may end early."""

    @abstractmethod
    def said(self) -> Logprobs:
        """Compute prompt log-probabilities, as a client gets them."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The version that the server tells its clients."""

    def check_refusals(self) -> None:  # noqa: B027  # most engines have none
        """Assert that a quarantined server refuses ways to generate that this engine alone has."""

    @abstractmethod
    def pause(self) -> None:
        """Pause the server, as its owner may."""

    @abstractmethod
    def let_go_on(self) -> None:
        """Let requests go on, as anybody may who reaches the server."""

    @abstractmethod
    def break_write(self, k: int, *, always: bool = False) -> None:
        """Make the k-th write of the next load fail, with `always` of every load."""

    @abstractmethod
    def hang_write(self) -> None:
        """Make a write in the middle of the next load take 5 seconds."""

    @property
    @abstractmethod
    def hangs(self) -> bool:
        """True in such a write."""

    @abstractmethod
    def flip(self) -> None:
        """Write to a live weight behind the bridge's back, before somebody looks at it next."""

    @abstractmethod
    def mend(self) -> bool:
        """Undo all faults; returns whether the last one struck, unless it was one for always."""

    def wait(self) -> Self:
        """Wait until the server answers."""

        def up() -> bool:
            assert self.process.poll() is None, Path(self._log.name).read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}{self.up_route}", timeout=5).close()
            except OSError:
                return False
            return True

        assert eventually(up, 240), Path(self._log.name).read_text()[-4000:]
        return self

    def close(self) -> None:
        self._leavings.note()
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self._log.close()
        self._leavings.remove()

    @property
    def holds(self) -> bool:
        """True while clients have to wait."""
        try:
            self.generate([5, 6], timeout=0.5)
        except TimeoutError:
            return True
        return False

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


def numbers(spans: Sequence[Mapping[str, Any]] | None) -> list[int]:
    """Read the versions off an answer's spans; a server without a bridge has names for them."""
    return [int(span["version"]) for span in spans or () if str(span["version"]).isdigit()]


class ServedRig(TrainerRig):
    """A server with LoRA slots on a tiny qwen2, and the bridge into it."""

    name = "served"

    def __init__(self, folder: Path, kind: type[EngineServer]) -> None:
        super().__init__(folder, "qwen2", {"max_position_embeddings": kind.positions})
        self.server = kind(folder).wait()
        self.attach()

    @property
    def handle(self) -> Any:
        return self.server.url

    def said(self, lora: Any = None) -> Logprobs:
        return self.server.said()

    def stop(self) -> None:
        self.server.close()
