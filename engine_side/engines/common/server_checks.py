"""Checks of an engine server: before a bridge drives it, and for `weighbridge health --server`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator

from bridge.config import from_environment
from bridge.coordinator.health import Check
from bridge.errors import ConfigError
from bridge.ports import expect
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import ExamineJob, RankLoaded
from bridge.shm.files import directory
from bridge.shm.mailbox import Mailbox
from engine_side.driver.rank_client import RankClient
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.published_state import parse_version
from engine_side.protocol import EngineDriver

LEVELS = ("attributes", "read-back", "probe")


def identify(ask: Callable[[msg.Hello], msg.FrontendReply], url: str) -> msg.FrontendIdentity:
    """Ask a server's frontend who it is, with a probe file in the folder of the arenas for it to look at.

    Args:
        ask: sends the request and returns the reply. What it raises passes through.

    Raises:
        ConfigError: the server does not see the probe file: it runs on another node.
        ProtocolError: the reply is of another kind.
    """
    folder = directory(from_environment().shm_dir)
    with tempfile.NamedTemporaryFile(prefix="wb-probe-", dir=folder) as probe:
        reply = ask(msg.Hello(probe.name, *device_and_inode(probe.fileno())))
    front = expect(reply, msg.FrontendIdentity, url)
    if not front.sees:
        raise ConfigError(
            "this server cannot see the shared memory of this process, through which weights travel",
            where=url,
            expected=f"a server on this node, that sees {folder}",
            got=f"it runs on {front.node}",
            remedy="start the server on the trainer's node; in a container, share the host's /dev/shm",
        )
    return front


def device_and_inode(descriptor: int) -> tuple[int, int]:
    """The identity of an open file on this machine, whatever path another process sees it under."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def check_service(
    kind: str, ranks: int, state: msg.FrontendState, label: str, asleep: bool, resume: str
) -> Iterator[Check]:
    """Check what a server says of itself.

    Args:
        label: its own weight version.
        asleep: somebody else has paused its engine.
        resume: the route that ends that pause.
    """
    yield Check("server alive", True, "answers", f"{kind}, {ranks} rank(s), {state.unfinished} requests")
    busy = state.held and bool(state.owner)
    got = f"refuses: {state.refusal}" if state.refusal else "held by a push" if state.held else "paused"
    fine = state.refusal is None and (busy or not (state.held or asleep))
    remedy = "" if fine else f"push a version that verifies, or POST {resume} if nobody has pushed"
    yield Check("server serves", fine, "requests are answered", got if busy or not fine else "open", remedy)
    agreed = busy or parse_version(label) == state.version or state.refusal is not None
    shown = f"{label!r}" + (f", adapter {state.lora}" if state.lora else "")
    yield Check(
        "server version", agreed, f"version {state.version}, as it was pushed", f"weight_version {shown}",
        "" if agreed else "somebody else changed weights or label: push again",
    )  # fmt: skip
    owner = f"bridge {state.owner!r}" if state.owner else "nobody"
    yield Check("server driver", True, "a bridge", owner, "" if state.owner else "bridge.attach", not state.owner)


def check_weights(driver: EngineDriver, deadline: Deadline) -> Iterator[Check]:
    """Have every rank compare its weights with the arena of the bridge that pushed them. Blocks; writes no weight."""
    mailbox = Mailbox.create("examine", driver.ranks, directory=from_environment().shm_dir)
    ranks = RankClient("server", driver)
    try:
        ranks.assign(mailbox.path, 0)
        reports = [answer.report for answer in ranks.ask(ExamineJob(LEVELS), RankLoaded, deadline)]
    finally:
        ranks.close()
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
