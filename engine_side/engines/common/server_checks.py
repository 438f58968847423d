"""What is asked of every server before it is driven, and what its ranks say of their weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator

from bridge.config import from_environment
from bridge.coordinator.health import Check
from bridge.errors import ConfigError
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import ExamineJob, RankLoaded
from bridge.shm.files import directory
from bridge.shm.mailbox import Mailbox
from engine_side.driver.rank_client import RankClient
from engine_side.engines.common import frontend_messages as msg
from engine_side.engines.common.published_state import number
from engine_side.protocol import EngineDriver

LEVELS = ("attributes", "read-back", "probe")


def hello(ask: Callable[[msg.Hello], msg.FrontendReply]) -> msg.FrontendReply:
    """The answer to Hello, with a file in the folder of the arenas to look at. Raises what `ask` raises."""
    with tempfile.NamedTemporaryFile(prefix="wb-probe-", dir=directory(from_environment().shm_dir)) as probe:
        return ask(msg.Hello(probe.name, *device_and_inode(probe.fileno())))


def require_sight(front: msg.FrontendIdentity, url: str) -> None:
    """Raises ConfigError for a server that cannot see the arenas."""
    if front.sees:
        return
    raise ConfigError(
        "this server cannot see the shared memory of this process, through which weights travel",
        where=url,
        expected=f"a server on this node, that sees {directory(from_environment().shm_dir)}",
        got=f"it runs on {front.node}",
        remedy="start the server on the trainer's node; in a container, share the host's /dev/shm",
    )


def device_and_inode(descriptor: int) -> tuple[int, int]:
    """What names a file on this machine, whatever its path is elsewhere."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def service(kind: str, ranks: int, state: msg.FrontendState, label: str, asleep: bool, resume: str) -> Iterator[Check]:
    """What a server says of itself. `label` is its own weight version, `asleep` whether somebody else has paused its
    engine, `resume` the call that ends that."""
    yield Check("server alive", True, "answers", f"{kind}, {ranks} rank(s), {state.unfinished} requests")
    busy = state.held and bool(state.owner)
    got = f"refuses: {state.refusal}" if state.refusal else "held by a push" if state.held else "paused"
    fine = state.refusal is None and (busy or not (state.held or asleep))
    remedy = "" if fine else f"push a version that verifies, or POST {resume} if nobody has pushed"
    yield Check("server serves", fine, "requests are answered", got if busy or not fine else "open", remedy)
    agreed = busy or number(label) == state.version or state.refusal is not None
    shown = f"{label!r}" + (f", adapter {state.adapter}" if state.adapter else "")
    yield Check(
        "server version", agreed, f"version {state.version}, as it was pushed", f"weight_version {shown}",
        "" if agreed else "somebody else changed weights or label: push again",
    )  # fmt: skip
    driver = f"bridge {state.owner!r}" if state.owner else "nobody"
    yield Check("server driver", True, "a bridge", driver, "" if state.owner else "bridge.attach", not state.owner)


def weights(adapter: EngineDriver, deadline: Deadline) -> Iterator[Check]:
    """A read-back of every weight against the arena of whoever has pushed, by the ranks themselves."""
    mailbox = Mailbox.create("examine", adapter.ranks, directory=from_environment().shm_dir)
    line = RankClient("server", adapter)
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
