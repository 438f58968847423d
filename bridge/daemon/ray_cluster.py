"""Find, start and stop a Ray cluster. Ray is imported on use.

A Ray that a driver starts ends with that driver, detached actors included. So a local Ray is started as a head process
of its own (`ray start --head`), recorded in the state folder, and only that one is ever stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from bridge.config import COPY_TUNABLE
from bridge.daemon.processes import started_at
from bridge.errors import ConfigError, NotFound, TransportError
from bridge.journal.state_dir import state_dir
from bridge.protocol.deadline import Deadline

log = logging.getLogger(__name__)

NAMESPACE = "weighbridge"
"""Ray namespace of all our actors."""
RAY_FILE = "ray.json"
RAY_START_TIMEOUT_S = 180.0
RAY_STOP_TIMEOUT_S = 30.0
OBJECT_STORE_NBYTES = 100 << 20
"""Ray's smallest comfortable store: tensors never go through it."""

_connected_by: dict[str, int] = {}
"""Address that this process connected to -> its pid then. Ray's connection does not survive a fork."""


class RayHead(msgspec.Struct, frozen=True):
    """The head process of a local Ray of ours, as recorded on disk from the moment that it was started."""

    address: str
    pid: int
    started: str | None
    """The kernel's start time of the process: with the pid, its identity."""

    @property
    def alive(self) -> bool:
        return self.started is not None and started_at(self.pid) == self.started

    def require_listening(self, deadline: Deadline) -> None:
        """Block until it accepts connections. Raises TransportError when the process ends or the time is over."""
        host, _, port = self.address.rpartition(":")
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=0.5):
                return
            if deadline.expired or not self.alive:
                raise TransportError(
                    "a local Ray could not be started",
                    where=self.address,
                    expected="a head process that accepts connections",
                    got="it was not ready in time" if self.alive else "its head process ended",
                    remedy=f"read {_ray_file().with_name('ray.log')}",
                )
            time.sleep(0.1)

    def end(self) -> None:
        """Stop the process, gracefully first, and forget its record. Blocks for at most about half a minute."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            deadline = Deadline.after(RAY_STOP_TIMEOUT_S)
            while self.alive and not deadline.expired:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, sent)
                time.sleep(0.1)
        with contextlib.suppress(ChildProcessError):  # if it is a child of ours, its entry stays until it is collected
            os.waitpid(self.pid, os.WNOHANG)
        _ray_file().unlink(missing_ok=True)


def ensure_ray(start: bool = True) -> None:
    """Connect this process to Ray: the one that it is connected to already, `RAY_ADDRESS`, or the local one of ours,
    which is started when none runs. Ray's own "auto" is not used: it follows addresses of clusters that are long gone,
    and then blocks for minutes. Blocks until Ray is ready.

    Raises:
        NotFound: none runs, and `start` is False.
        ConfigError: this is a forked child of a process that was connected.
        TransportError: Ray cannot be started or does not answer; a Ray that was started here is stopped again.
    """
    loaded = sys.modules.get("ray")
    if loaded is not None and loaded.is_initialized():
        for address, pid in _connected_by.items():
            if pid != os.getpid():
                raise ConfigError(
                    "Ray cannot be used in a forked child of a process that is connected to it",
                    where=address,
                    expected=f"pid {pid}",
                    got=f"pid {os.getpid()}",
                    remedy="start the child by multiprocessing's 'spawn', and connect there",
                )
        return
    given = os.environ.get("RAY_ADDRESS")
    if given is not None:
        _require_answer(given)
        _connect(given)
        return
    head = our_ray()
    if head is None and not start:  # raised before Ray is imported, which takes seconds
        raise NotFound(
            "no Ray is running here",
            where="this machine",
            expected="a Ray that weighbridge started, or RAY_ADDRESS",
            got="none",
            remedy="weighbridge up starts one; RAY_ADDRESS names another",
        )
    _authenticate()
    ours = head is None
    head = head or _start_ray()
    try:
        head.require_listening(Deadline.after(RAY_START_TIMEOUT_S))
        _connect(head.address)
    except BaseException:
        if ours:
            head.end()
        raise


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise TransportError(
            "cannot connect to Ray",
            where=address,
            expected="a Ray that accepts this process",
            got=str(error).splitlines()[0],
            remedy="check RAY_AUTH_TOKEN for that cluster, and that both sides run the same versions of Ray and Python",
        ) from error
    _connected_by.clear()
    _connected_by[address] = os.getpid()


def _require_answer(address: str) -> None:
    """Ray itself looks for minutes for a cluster that has gone. Forms other than HOST:PORT are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise TransportError(
            "no Ray answers there",
            where=address,
            expected="a Ray head that accepts connections",
            got=str(error),
            remedy="unset RAY_ADDRESS, or start that cluster",
        ) from error


def _authenticate() -> None:
    """Keep Ray's token authentication on for the Ray that we start: `ray start` alone leaves it off where no token
    exists. A mode or token that the user has set is left alone."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        token = state_dir("_ray") / "token"
        if not token.exists():
            descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    # Ray reads its environment when it is imported; ray.init does this same refresh when it turns the mode on
    ray._raylet.Config.initialize("")


def _ray_file() -> Path:
    return state_dir("_ray") / RAY_FILE


def our_ray() -> RayHead | None:
    """The local Ray that we started earlier, if its head process still runs; it may not be ready yet."""
    try:
        head = msgspec.json.decode(_ray_file().read_bytes(), type=RayHead)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return head if head.alive else None


def _start_ray() -> RayHead:
    """Start the head process and record it at once: whoever comes next waits for it or ends it, it is never lost."""
    executable = Path(sys.executable).with_name("ray")
    program = str(executable) if executable.exists() else shutil.which("ray")
    if program is None:
        raise ConfigError(
            "the ray command is not installed",
            where=sys.executable,
            expected="`ray` beside this Python, or on PATH",
            got="none",
            remedy="pip install ray",
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [
        program, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1",
        "--include-dashboard=false", "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_NBYTES}",
    ]  # fmt: skip
    output = _ray_file().with_name("ray.log")
    pid = os.posix_spawn(
        program,
        command,
        {"GLIBC_TUNABLES": COPY_TUNABLE, **os.environ},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(output), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    head = RayHead(f"127.0.0.1:{port}", pid, started_at(pid))
    _ray_file().write_bytes(msgspec.json.encode(head))
    return head


def other_drivers() -> list[int]:
    """Find the other processes that are connected to this process's Ray as drivers; their pids. Blocks for Ray's
    answer."""
    import ray

    # Ray's public way to list jobs needs its dashboard, which our Ray runs without
    jobs = ray._private.worker.global_worker.gcs_client.get_all_job_info()
    return sorted(job.driver_pid for job in jobs.values() if not job.is_dead and job.driver_pid != os.getpid())


def stop_ray() -> None:
    """Stop the local Ray that we started, and only that one, if it runs. Blocks until it has ended."""
    head = our_ray()
    if head is None:
        _ray_file().unlink(missing_ok=True)
    else:
        head.end()
