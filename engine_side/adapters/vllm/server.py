"""`vllm serve` at an address on this node: recognised, examined, driven through its own endpoints."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

from bridge.config import from_environment
from bridge.deadline import Deadline
from bridge.errors import BridgeError, ConfigError
from bridge.health import Check
from bridge.jobs import ExamineJob, RankLoaded
from bridge.mailbox import Mailbox
from bridge.procs import started_at
from bridge.shm import directory
from engine_side.adapters.http import HttpClient, HttpStatus
from engine_side.adapters.vllm import front_messages as msg
from engine_side.adapters.vllm.common import number
from engine_side.adapters.vllm.facts import check_facts
from engine_side.adapters.vllm.lines import HttpLine
from engine_side.adapters.vllm.remote import AsyncAdapter
from engine_side.adapters.vllm.versions import check_version
from engine_side.rankline import RankLine

FLAG = '--weight-transfer-config \'{"backend":"bridge"}\''
LEVELS = ("attributes", "read-back", "probe")
START = f"VLLM_SERVER_DEV_MODE=1 vllm serve PATH {FLAG}"


class ServerAdapter(AsyncAdapter):
    """Over a server that stays its owner's."""

    def examine(self, deadline: Deadline) -> Iterator[Check]:
        """What the server says of itself, and what its workers find in their weights."""
        state, label = self.state(), str(self._call("get_weight_version"))
        yield Check("server alive", True, "answers", f"vLLM, {self.ranks} rank(s), {state.unfinished} requests")
        busy = state.held and bool(state.owner)
        got = f"refuses: {state.refusal}" if state.refusal else "held by a push" if state.held else "paused"
        fine = state.refusal is None and (busy or not (state.held or self._call("is_sleeping")))
        remedy = "" if fine else "push a version that verifies, or POST /resume if nobody has pushed"
        yield Check("server serves", fine, "requests are answered", got if busy or not fine else "open", remedy)
        agreed = busy or number(label) == state.version or state.refusal is not None
        shown = f"{label!r}" + (f", adapter {state.adapter}" if state.adapter else "")
        yield Check(
            "server version", agreed, f"version {state.version}, as it was pushed", f"weight_version {shown}",
            "" if agreed else "somebody else changed weights or label: push again",
        )  # fmt: skip
        driver = f"bridge {state.owner!r}" if state.owner else "nobody"
        yield Check("server driver", True, "a bridge", driver, "" if state.owner else "bridge.attach", not state.owner)
        yield from self._weights(deadline)

    def _weights(self, deadline: Deadline) -> Iterator[Check]:
        """A read-back of every weight against the arena of whoever has pushed, by the workers themselves."""
        mailbox = Mailbox.create("examine", self.ranks, directory=from_environment().shm_dir)
        line = RankLine("server", self)
        try:
            line.assign(mailbox.path, 0)
            reports = [said.report for said in line.ask(ExamineJob(LEVELS), RankLoaded, deadline)]
        finally:
            line.close()
            mailbox.close()
            mailbox.unlink()
        for report in reports:
            if not report.levels:
                nothing = "nothing to compare with: no bridge is attached that has pushed"
                yield Check(f"rank {report.rank} weights", True, "what was pushed", nothing, "push once", True)
            for level in report.levels:
                wrong = ", ".join(f"{failure.name}: {failure.got}" for failure in level.failures[:5])
                yield Check(
                    f"rank {report.rank} {level.level}", level.ok, "what was pushed, bit for bit",
                    wrong or level.note or f"{level.checked} checked",
                    "" if level.ok else "something changed it after the sync: push again",
                )  # fmt: skip


def recognise(client: HttpClient, deadline: Deadline) -> ServerAdapter | None:
    """The adapter of a vLLM server; None for anything else. Raises ConfigError, with the remedy, for one that was
    started without its development endpoints, without the backend, or on another node."""
    version = _version(client, deadline)
    if version is None:
        return None
    check_version(version)
    ranks = _require_endpoints(client, deadline)
    if ranks > 1:
        _require_backend(client, deadline)
    line = HttpLine(client)
    front = _hello(line, client, deadline)
    check_facts(front.facts, where=client.url, expected=FLAG, remedy=f"start it with {START}")
    if front.clients != 1:
        raise ConfigError(
            "this server has several API server processes, of which a bridge would reach one",
            where=client.url, expected="--api-server-count 1", got=str(front.clients), remedy=f"start it with {START}",
        )  # fmt: skip
    if not front.sees:
        raise ConfigError(
            "this server cannot see the shared memory of this process, through which weights travel",
            where=client.url,
            expected=f"a server on this node, that sees {directory(from_environment().shm_dir)}",
            got=f"it runs on {front.node}",
            remedy="start the server on the trainer's node; in a container, share the host's /dev/shm",
        )
    own = (os.getpid(), started_at(os.getpid()) or "")
    return ServerAdapter(line, front.facts, client.url, own, remedy=f"POST {client.url}/wake_up or /resume")


def _version(client: HttpClient, deadline: Deadline) -> str | None:
    """vLLM's version; None for a server that does not answer as vLLM's does."""
    try:
        said, load = client.get("/version", deadline), client.get("/load", deadline)
    except (HttpStatus, BridgeError):
        return None
    known = isinstance(said, dict) and isinstance(load, dict) and "server_load" in load
    return str(said["version"]) if known and "version" in said else None


def _require_endpoints(client: HttpClient, deadline: Deadline) -> int:
    """How many workers there are."""
    try:
        return int(client.get("/get_world_size", deadline)["world_size"])
    except HttpStatus as error:
        raise ConfigError(
            "this vLLM server was started without its development endpoints, through which a bridge pauses and updates",
            where=client.url,
            expected="VLLM_SERVER_DEV_MODE=1 in its environment",
            got=str(error),
            remedy=f"start it with {START}; these endpoints are not for an open network",
        ) from error


def _require_backend(client: HttpClient, deadline: Deadline) -> None:
    """Before the workers are asked for what they may not know: of several, one that raises leaves vLLM out of step."""
    config = client.get("/server_info?config_format=json", deadline).get("vllm_config", {})
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if backend != "bridge":
        raise _without(client, "none" if backend is None else f"backend {backend!r}")


def _without(client: HttpClient, got: str) -> ConfigError:
    return ConfigError(
        "this vLLM server was started without the bridge's weight-transfer backend",
        where=client.url, expected=FLAG, got=got, remedy=f"start it with {START}",
    )  # fmt: skip


def _hello(line: HttpLine, client: HttpClient, deadline: Deadline) -> msg.FrontIs:
    """Show the server a file in the folder of the arenas."""
    folder = directory(from_environment().shm_dir)
    with tempfile.NamedTemporaryFile(prefix="wb-probe-", dir=folder) as probe:
        try:
            answer = line.ask(msg.Hello(probe.name, *device_and_inode(probe.fileno())), deadline)
        except HttpStatus as error:
            raise _without(client, str(error)) from error
        except BridgeError as error:
            if isinstance(error, ConfigError):
                raise
            raise _without(client, error.got or error.what) from error
    if not isinstance(answer, msg.FrontIs):
        raise _without(client, type(answer).__name__)
    return answer


def device_and_inode(descriptor: int) -> tuple[int, int]:
    """What names a file on this machine, whatever its path is elsewhere."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
