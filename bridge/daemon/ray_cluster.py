"""The daemon's life on Ray: start, find, stop. Ray is imported on use.

One TrainerActor (coordinator and ledger) and one EngineActor per engine, named, detached, in namespace `weighbridge`.
Calls carry one `wire` frame each way; Ray moves bytes as they are, so nothing is pickled on the way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bridge import entry_points
from bridge.config import COPY_TUNABLE, Config
from bridge.daemon.processes import started_at
from bridge.errors import BridgeError, ConfigError, DeadlineExceeded, NotFound, PeerLost, TransportError
from bridge.journal.state_dir import checked_name, state_dir
from bridge.ports import expect
from bridge.protocol.codec import pack, unpack
from bridge.protocol.coordinator_messages import (
    Accepted,
    CloseRequest,
    DaemonStatus,
    FromCoordinator,
    StatusRequest,
)
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineGenerate, EngineHello, EngineIs, FromEngine

log = logging.getLogger(__name__)
T = TypeVar("T")

NAMESPACE = "weighbridge"
START_TIMEOUT_S = 180.0
ROLLOUTS, ROLLOUT_THREADS = "rollouts", 64
"""Callers of `generate` that an EngineActor serves at once, apart from the control calls."""
ANSWER_GRACE_S = 0.5
"""The other side has the same deadline, and its own error tells more: it is waited for a little longer."""
RAY_FILE = "ray.json"
OBJECT_STORE_NBYTES = 100 << 20
"""Ray's smallest comfortable store: tensors never go through it."""


class RayPort:
    """One actor as a port: `call` packs a request, waits for the reply's bytes, unpacks it."""

    def __init__(self, actor_id: str, handle: Any, replies: Any) -> None:
        self.id = actor_id
        self._handle = handle
        self._replies = replies

    def call(self, request: Any, reply: type[T], deadline: Deadline) -> T:
        """Blocks. Raises PeerLost when the actor is gone, DeadlineExceeded when it does not answer in time."""
        import ray
        from ray import exceptions

        if self._handle is None:
            raise PeerLost("an actor is gone", where=self.id, remedy="weighbridge down, then up again")
        method = self._handle.call
        if isinstance(request, EngineGenerate):
            # rollouts wait at the gate while the engine is paused: they must never fill the threads of the push
            method = method.options(concurrency_group=ROLLOUTS)
        try:
            frame = ray.get(
                method.remote(pack((deadline.remaining_s, request))), timeout=deadline.remaining_s + ANSWER_GRACE_S
            )
        except exceptions.GetTimeoutError as error:
            raise DeadlineExceeded(
                "an actor did not answer in time", where=self.id, got=type(request).__name__, remedy="look at its log"
            ) from error
        except (exceptions.RayActorError, exceptions.ActorUnavailableError) as error:
            raise PeerLost(
                "an actor is gone",
                where=self.id,
                got=str(error).splitlines()[0],
                remedy="weighbridge down, then up again; the other engines go on until then",
            ) from error
        except exceptions.RayError as error:
            raise TransportError("a call through Ray failed", where=self.id, got=str(error)[:500]) from error
        return expect(unpack(frame, self._replies), reply)


def engine_port(actor_id: str, handle: Any) -> RayPort:
    return RayPort(actor_id, handle, FromEngine)


# ---- Ray itself ----------------------------------------------------------------------------------------------------


def ensure_ray(start: bool = True) -> None:
    """Connect this process to Ray: the one it is connected to already, `RAY_ADDRESS`, or a local one of ours, started
    as a head process of its own when none runs. (Not Ray's "auto": it follows addresses of clusters that are long gone
    and then blocks for minutes.)

    A Ray that a driver starts dies with it, detached actors included; hence the separate head (DESIGN 10). Raises
    NotFound when none runs and `start` is False, TransportError when it cannot be started.
    """
    loaded = sys.modules.get("ray")
    if loaded is not None and loaded.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        address = _our_ray()
        if address is None and not start:
            # said before Ray is imported, which takes seconds
            raise NotFound("no Ray is running here", remedy="weighbridge up starts one; RAY_ADDRESS names another")
        _authenticate()
        address = address or _start_ray()
    _require_listening(address)
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise TransportError("cannot connect to Ray", where=address, got=str(error).splitlines()[0]) from error


def _require_listening(address: str) -> None:
    """Ray itself looks for minutes for a cluster that has gone. Forms other than HOST:PORT are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise TransportError(
            "no Ray answers there", where=address, got=str(error), remedy="unset RAY_ADDRESS, or start that cluster"
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

    # Ray reads its environment when it is imported; this is the refresh that ray.init does when it turns the mode on
    ray._raylet.Config.initialize("")


def _ray_file() -> Path:
    return state_dir("_ray") / RAY_FILE


def _our_ray() -> str | None:
    """Address of the local Ray that we started earlier, if its process still runs."""
    try:
        known = json.loads(_ray_file().read_text())
    except (FileNotFoundError, ValueError):
        return None
    if started_at(int(known["pid"])) != known["started"]:
        return None
    return str(known["address"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_ray() -> str:
    port = _free_port()
    executable = Path(sys.executable).with_name("ray")
    program = str(executable) if executable.exists() else shutil.which("ray")
    if program is None:
        raise ConfigError("the ray command is not installed", remedy="pip install ray")
    folder = _ray_file().parent
    command = [
        program, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1",
        "--include-dashboard=false", "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_NBYTES}",
    ]  # fmt: skip
    with (folder / "ray.log").open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=_child_environment(),
        )
    address = f"127.0.0.1:{port}"
    deadline = Deadline.after(START_TIMEOUT_S)
    while not _listens(port):
        if process.poll() is not None or deadline.expired:
            raise TransportError("a local Ray could not be started", where=str(folder / "ray.log"))
        time.sleep(0.1)
    record = {"address": address, "pid": process.pid, "started": started_at(process.pid)}
    _ray_file().write_text(json.dumps(record))
    return address


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return bool(probe.connect_ex(("127.0.0.1", port)) == 0)


def _child_environment() -> dict[str, str]:
    """The environment of processes we start."""
    return {"GLIBC_TUNABLES": COPY_TUNABLE, **os.environ}


def stop_ray() -> bool:
    """Stop the local Ray that we started, and only that one. False when there is none."""
    try:
        known = json.loads(_ray_file().read_text())
    except (FileNotFoundError, ValueError):
        return False
    pid = int(known["pid"])
    alive = bool(started_at(pid) == known["started"])
    if alive:
        os.kill(pid, signal.SIGTERM)
        deadline = Deadline.after(30)
        while started_at(pid) == known["started"] and not deadline.expired:
            _reap(pid)
            time.sleep(0.1)
    _ray_file().unlink(missing_ok=True)
    return alive


def stop_ray_if_idle() -> None:
    """Disconnect from the local Ray that we started, and stop it, when no daemon runs on it any more. A Ray of somebody
    else is left alone, and so is this process's connection to it."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().gcs_address.rpartition(":")[2] != _our_port():
        return
    if not running():
        ray.shutdown()
        stop_ray()


def _our_port() -> str | None:
    # by port: Ray turns the loopback address that it is given into the machine's own
    ours = _our_ray()
    return None if ours is None else ours.rpartition(":")[2]


def _reap(pid: int) -> None:
    """Collect the head process if it is our own child, else it stays a zombie until we end."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


# ---- actors --------------------------------------------------------------------------------------------------------


def _trainer_name(name: str) -> str:
    return f"{name}:trainer"


def start(
    name: str, specs: list[tuple[str, Mapping[str, Any]]], config: Config, *, threads: int | None = None
) -> tuple[RayPort, list[RayPort]]:
    """Start the actors of daemon `name` on the connected Ray: one EngineActor per (spec, arguments), then the
    TrainerActor. Blocks until all answer. Raises ConfigError when the name is taken or an engine cannot be started as
    asked; on any failure everything that was started is stopped again."""
    import ray

    checked_name(name)
    if _find_actor(_trainer_name(name)) is not None:
        raise ConfigError(
            "a daemon of that name runs already", where=name, remedy="bridge.connect(name), or another name"
        )
    workers = threads or config.copy_threads
    started: list[Any] = []
    try:
        engines: list[RayPort] = []
        for index, (spec, arguments) in enumerate(specs):
            engine = f"engine{index}"
            actor = _actor(
                entry_points.ENGINE_ACTOR, f"{name}:{engine}", workers, engine, spec, pack(dict(arguments)), workers,
                environment=entry_points.load(entry_points.ENVIRONMENT)(spec),
            )  # fmt: skip
            started.append(actor)
            engines.append(engine_port(engine, actor))
        for engine_actor in engines:
            engine_actor.call(EngineHello(), EngineIs, Deadline.after(START_TIMEOUT_S))
        trainer = _actor(
            entry_points.TRAINER_ACTOR, _trainer_name(name), workers, name, [e.id for e in engines], workers
        )
        started.append(trainer)
        port = RayPort(_trainer_name(name), trainer, FromCoordinator)
        port.call(StatusRequest(), DaemonStatus, Deadline.after(START_TIMEOUT_S))
    except BaseException:
        for actor in started:
            ray.kill(actor, no_restart=True)
        raise
    return port, engines


def _actor(
    target: str, actor_name: str, threads: int, *arguments: Any, environment: Mapping[str, str] | None = None
) -> Any:
    """A detached, named actor on this node, with its thread count said explicitly."""
    import ray

    variables = {**(environment or {}), "OMP_NUM_THREADS": str(threads), "WEIGHBRIDGE_THREADS": str(threads)}
    return (
        ray.remote(concurrency_groups={ROLLOUTS: ROLLOUT_THREADS})(entry_points.load(target))
        .options(
            name=actor_name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_concurrency=16,
            runtime_env={"env_vars": variables},
            scheduling_strategy=_here(),
        )
        .remote(*arguments)
    )


def _here() -> Any:
    """Place the actors on this node: they share the trainer's arena (replication between nodes is not wired yet)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)


def _find_actor(actor_name: str) -> Any | None:
    import ray

    try:
        return ray.get_actor(actor_name, namespace=NAMESPACE)
    except ValueError:
        return None


def find(name: str) -> tuple[RayPort, list[RayPort]]:
    """Ports of a running daemon. Raises NotFound, naming the daemons that do run."""
    try:
        ensure_ray(start=False)
    except NotFound as error:
        raise NotFound(f"no daemon of that name: {error.what}", where=name, remedy=error.remedy) from error
    actor = _find_actor(_trainer_name(name))
    if actor is None:
        raise NotFound(
            "no daemon of that name",
            where=name,
            expected=", ".join(running()) or "none runs",
            remedy="weighbridge up NAME --engine embedded:PATH, or bridge.launch",
        )
    port = RayPort(_trainer_name(name), actor, FromCoordinator)
    engines = port.call(StatusRequest(), DaemonStatus, Deadline.after(60)).engines
    return port, [engine_port(info.id, _find_actor(f"{name}:{info.id}")) for info in engines]


def running() -> list[str]:
    """Names of the daemons on the connected Ray."""
    from ray.util import list_named_actors

    names = [str(entry["name"]) for entry in list_named_actors(all_namespaces=True) if entry["namespace"] == NAMESPACE]
    return sorted(name.removesuffix(":trainer") for name in names if name.endswith(":trainer"))


def stop(name: str, *, and_ray: bool = True) -> None:
    """Stop a daemon: engines gracefully first, then the actors, then the local Ray if we started it and nothing else of
    ours runs on it. Raises NotFound when there is no such daemon."""
    import ray

    port, engines = find(name)
    try:
        port.call(CloseRequest(), Accepted, Deadline.after(120))
    except BridgeError as error:
        log.warning("%s did not close gracefully: %s", name, error)
    for actor_name in (*(f"{name}:{engine.id}" for engine in engines), _trainer_name(name)):
        actor = _find_actor(actor_name)
        if actor is not None:
            ray.kill(actor, no_restart=True)
    if and_ray:
        stop_ray_if_idle()
