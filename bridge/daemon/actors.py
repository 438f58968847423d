"""Start, find and stop the daemon's actors. Ray is imported on use.

One TrainerActor (coordinator and ledger) and one EngineActor per engine, named, detached, in namespace `weighbridge`.
Calls carry one frame of `bridge.protocol.codec` each way; Ray moves bytes as they are: nothing is pickled on the way.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bridge import entry_points
from bridge.config import Config
from bridge.daemon import ray_cluster
from bridge.daemon.ray_cluster import NAMESPACE
from bridge.errors import BridgeError, Busy, Closed, DeadlineExceeded, NotFound, PeerLost, TransportError
from bridge.file_locks import take_lock
from bridge.journal.ledger import Ledger
from bridge.journal.state_dir import checked_name, state_dir
from bridge.ports import expect, require_own_process
from bridge.protocol.codec import pack, unpack
from bridge.protocol.coordinator_messages import Accepted, CloseRequest, DaemonStatus, FromCoordinator, StatusRequest
from bridge.protocol.deadline import Deadline
from bridge.protocol.engine_messages import EngineClose, EngineGenerate, EngineHello, EngineIs, EngineOk, FromEngine
from bridge.shm.remains import remove_remains

log = logging.getLogger(__name__)
T = TypeVar("T")

ROLLOUTS, ROLLOUT_THREADS = "rollouts", 64
"""Callers of `generate` that an EngineActor serves at once, apart from the control calls."""
ANSWER_GRACE_S = 0.5
"""The other side has the same deadline, and its own error tells more: it is waited for a little longer."""
ANSWER_TIMEOUT_S = 10.0
"""How long a daemon whose name is wanted has to show that it runs."""
CLOSE_TIMEOUT_S = 120.0
GONE_TIMEOUT_S = 30.0
"""Longest wait for the remains of a daemon to close, and then for Ray to report killed actors as gone."""
_TRAINER = "trainer"


class RayPort:
    """One actor as a port: `call` packs a request, waits for the reply's bytes, unpacks it."""

    def __init__(self, actor_id: str, handle: Any, replies: Any) -> None:
        self.id = actor_id
        self._handle = handle
        self._replies = replies
        self._pid = os.getpid()

    def call(self, request: Any, reply: type[T], deadline: Deadline) -> T:
        """Blocks. Raises PeerLost when the actor is gone, DeadlineExceeded when it does not answer in time, Closed in a
        forked child."""
        require_own_process(self._pid, self.id)
        import ray
        from ray import exceptions

        remedy = "weighbridge down, then up again; the other engines go on until then"
        if self._handle is None:
            raise PeerLost(
                "an actor is gone", where=self.id, expected="a running actor", got="none of this name", remedy=remedy
            )
        method = self._handle.call
        if isinstance(request, EngineGenerate):
            # rollouts wait at the gate while the engine is paused: they must never fill the threads of the push
            method = method.options(concurrency_group=ROLLOUTS)
        try:
            answer = method.remote(pack((deadline.remaining_s, request)))
            frame = ray.get(answer, timeout=deadline.remaining_s + ANSWER_GRACE_S)
        except exceptions.GetTimeoutError as error:
            raise DeadlineExceeded(
                "an actor did not answer in time",
                where=self.id,
                expected="an answer before the deadline",
                got=type(request).__name__,
                remedy="raise the time-out, or look for it in Ray's log folder (/tmp/ray/session_latest/logs)",
            ) from error
        except (exceptions.RayActorError, exceptions.ActorUnavailableError) as error:
            raise PeerLost(
                "an actor is gone",
                where=self.id,
                expected="a running actor",
                got=str(error).splitlines()[0],
                remedy=remedy,
            ) from error
        except exceptions.RayError as error:
            raise TransportError(
                "a call through Ray failed",
                where=self.id,
                expected="an answer",
                got=str(error)[:500],
                remedy="check that Ray runs: ray status",
            ) from error
        return expect(unpack(frame, self._replies), reply)


def engine_port(actor_id: str, handle: Any) -> RayPort:
    """The port of an EngineActor; `handle` None for one that is gone."""
    return RayPort(actor_id, handle, FromEngine)


def _trainer_port(name: str, handle: Any) -> RayPort:
    return RayPort(f"{name}:{_TRAINER}", handle, FromCoordinator)


def _actors_of(name: str) -> dict[str, Any]:
    """Ray name -> handle of every actor of daemon `name` that Ray reports as alive."""
    import ray

    found: dict[str, Any] = {}
    for actor in _named_actors():
        if actor.startswith(f"{name}:"):
            with contextlib.suppress(ValueError):  # it has ended since it was listed
                found[actor] = ray.get_actor(actor, namespace=NAMESPACE)
    return found


def _named_actors() -> list[str]:
    from ray.util import list_named_actors

    return [str(each["name"]) for each in list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE]


def running() -> list[str]:
    """Names of the daemons on the connected Ray."""
    return sorted(name.removesuffix(f":{_TRAINER}") for name in _named_actors() if name.endswith(f":{_TRAINER}"))


# ---- start -----------------------------------------------------------------------------------------------------------


def start(name: str, specs: Sequence[tuple[str, Mapping[str, Any]]], config: Config) -> tuple[RayPort, list[RayPort]]:
    """Start the actors of daemon `name` on the connected Ray: one EngineActor per (spec, arguments), then the
    TrainerActor. What a crashed daemon of that name left is removed first. Blocks until all answer, for at most
    `config.start_timeout_s` per kind of actor; on any failure everything that was started is stopped again.

    Raises:
        Busy: a daemon of that name runs, or is being started.
        BridgeError: an engine or the coordinator could not be started; the error that its own process raised.
    """
    with _starting(checked_name(name)):
        found = _actors_of(name)
        trainer = found.get(f"{name}:{_TRAINER}")
        if trainer is not None and _runs(name, trainer):
            raise Busy(
                "a daemon of that name runs already",
                where=name,
                expected="a name that is free",
                got="a running daemon",
                remedy=f"bridge.connect({name!r}), weighbridge down {name}, or another name",
            )
        if found:
            log.warning("%s: removing what a daemon that crashed left behind: %s", name, ", ".join(sorted(found)))
            _remove(found, name)
        return _start_actors(name, specs, config)


@contextlib.contextmanager
def _starting(name: str) -> Iterator[None]:
    """Hold the right to start or clear daemon `name`: engines without a coordinator are remains only when nobody is
    about to start theirs. The kernel gives the lock back however this process ends."""
    descriptor = os.open(state_dir(name) / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not take_lock(descriptor, fcntl.LOCK_EX):
            raise Busy(
                "another process is starting a daemon of that name",
                where=name,
                expected="one start at a time",
                got="its lock is held",
                remedy="wait for it, then connect to it",
            )
        yield
    finally:
        os.close(descriptor)


def _runs(name: str, trainer: Any) -> bool:
    """True unless the TrainerActor is gone or closed; one that is late or fails may still be at work. Blocks."""
    try:
        _trainer_port(name, trainer).call(StatusRequest(), DaemonStatus, Deadline.after(ANSWER_TIMEOUT_S))
    except PeerLost:  # killed a moment ago, unless Ray goes on reporting it as alive
        return _ray_reports_it(name)
    except Closed:  # `weighbridge down` was interrupted
        return False
    except BridgeError as error:
        log.warning("%s runs, but did not answer: %s", name, error)
    return True


def _start_actors(
    name: str, specs: Sequence[tuple[str, Mapping[str, Any]]], config: Config
) -> tuple[RayPort, list[RayPort]]:
    threads, timeout_s = config.copy_threads, config.start_timeout_s
    started: dict[str, Any] = {}
    try:
        deadline = Deadline.after(timeout_s)
        engines: list[RayPort] = []
        for index, (spec, arguments) in enumerate(specs):
            engine = f"engine{index}"
            variables = entry_points.load(entry_points.ENVIRONMENT)(spec)
            actor = _actor(entry_points.ENGINE_ACTOR, f"{name}:{engine}", threads, variables)
            started[f"{name}:{engine}"] = actor.remote(engine, spec, pack(dict(arguments)), threads)
            engines.append(engine_port(engine, started[f"{name}:{engine}"]))
        for port in engines:
            try:
                port.call(EngineHello(), EngineIs, deadline)
            except DeadlineExceeded as error:
                raise DeadlineExceeded(
                    "an engine was not ready in time",
                    where=f"{name}:{port.id}",
                    expected=f"within {timeout_s:g} s",
                    got="no answer yet",
                    remedy="set WEIGHBRIDGE_START_TIMEOUT_S higher; Ray's log folder (/tmp/ray/session_latest/logs) "
                    "shows how far it came",
                ) from error
        actor = _actor(entry_points.TRAINER_ACTOR, f"{name}:{_TRAINER}", threads, {})
        started[f"{name}:{_TRAINER}"] = actor.remote(name, [port.id for port in engines], threads, timeout_s)
        trainer = _trainer_port(name, started[f"{name}:{_TRAINER}"])
        trainer.call(StatusRequest(), DaemonStatus, Deadline.after(timeout_s + 60))
    except BaseException:
        _kill(started, name)
        raise
    return trainer, engines


def _actor(target: str, actor_name: str, threads: int, environment: Mapping[str, str]) -> Any:
    """The class of a detached, named actor with its thread count said explicitly, on this node: it shares the trainer's
    arena."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    variables = {**environment, "OMP_NUM_THREADS": str(threads), "WEIGHBRIDGE_THREADS": str(threads)}
    return ray.remote(concurrency_groups={ROLLOUTS: ROLLOUT_THREADS})(entry_points.load(target)).options(
        name=actor_name,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_concurrency=16,
        runtime_env={"env_vars": variables},
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
    )


# ---- find, stop ------------------------------------------------------------------------------------------------------


def find(name: str) -> tuple[RayPort, list[RayPort]]:
    """Ports of a running daemon. Blocks for its answer. Raises NotFound, naming the daemons that do run."""
    found = _find_actors(name)
    actor = found.pop(f"{name}:{_TRAINER}", None)
    remains = _not_found(name, got=f"only what a crashed daemon left: {', '.join(sorted(found)) or 'nothing'}")
    if actor is None:
        raise remains
    port = _trainer_port(name, actor)
    try:
        engines = port.call(StatusRequest(), DaemonStatus, Deadline.after(60)).engines
    except PeerLost as error:
        if _ray_reports_it(name):
            raise
        raise remains from error
    return port, [engine_port(info.id, found.get(f"{name}:{info.id}")) for info in engines]


def _ray_reports_it(name: str) -> bool:
    """Tell if Ray goes on reporting the TrainerActor of `name`, which was found to be gone, as alive: it takes a moment
    to notice a killed one. Blocks for ANSWER_TIMEOUT_S at most."""
    return bool(_still_there([f"{name}:{_TRAINER}"], Deadline.after(ANSWER_TIMEOUT_S)))


def _find_actors(name: str) -> dict[str, Any]:
    """The actors of daemon `name`, at least one. Raises NotFound, also when no Ray runs."""
    try:
        ray_cluster.ensure_ray(start=False)
    except NotFound as error:
        raise NotFound(
            f"no daemon of that name: {error.what}",
            where=name,
            expected="a running Ray, with the daemon in it",
            got=error.got,
            remedy=error.remedy,
        ) from error
    found = _actors_of(name)
    if not found:
        raise _not_found(name)
    return found


def _not_found(name: str, got: str | None = None) -> NotFound:
    expected = ", ".join(running()) or "none runs"
    remedy = "weighbridge up NAME --engine embedded:PATH, or bridge.launch"
    return NotFound("no daemon of that name", where=name, expected=expected, got=got, remedy=remedy)


def stop(name: str) -> None:
    """Stop a daemon: engines gracefully first, then the actors, then the local Ray as `stop_ray_if_idle` does. Also
    removes what a crashed daemon left. Blocks, for minutes at most. Raises NotFound when there is no such daemon, Busy
    while another process starts it."""
    try:
        found = _find_actors(name)
    except NotFound:
        stop_ray_if_idle()  # an earlier `down` may have left it to a driver that has ended since
        raise
    if _closed(name, found.get(f"{name}:{_TRAINER}")):
        _kill(found, name)
    else:
        with _starting(name):
            _remove(_actors_of(name), name)
    stop_ray_if_idle()


def _closed(name: str, trainer: Any | None) -> bool:
    """Ask the TrainerActor to close its daemon; False when there is none any more, and the engines are on their own.
    Blocks."""
    if trainer is None:
        return False
    try:
        _trainer_port(name, trainer).call(CloseRequest(), Accepted, Deadline.after(CLOSE_TIMEOUT_S))
    except PeerLost as error:
        log.warning("%s did not close gracefully: %s", name, error)
        return _ray_reports_it(name)
    except BridgeError as error:
        log.warning("%s did not close gracefully: %s", name, error)
    return True


def _remove(found: Mapping[str, Any], name: str) -> None:
    """End the actors of a crashed daemon: engines close gracefully, for those may have processes and shared memory of
    their own. The daemon's shared memory goes too, where this process sees the journal that it names."""
    deadline = Deadline.after(GONE_TIMEOUT_S)
    for actor, handle in found.items():
        if not actor.endswith(f":{_TRAINER}"):
            try:
                engine_port(actor, handle).call(EngineClose(), EngineOk, deadline)
            except BridgeError as error:
                log.warning("%s did not close gracefully: %s", actor, error)
    _kill(found, name)
    try:
        ledger = Ledger.open(name)
    except BridgeError as error:  # another Ray may have a daemon of that name
        log.warning("%s: shared memory was not looked for: %s", name, error)
    else:
        remove_remains(ledger.path)
        ledger.close()


def _kill(found: Mapping[str, Any], name: str) -> None:
    """Kill these actors and wait until Ray has given their names free. Raises DeadlineExceeded when it does not."""
    import ray

    for handle in found.values():
        ray.kill(handle, no_restart=True)
    left = _still_there(found, Deadline.after(GONE_TIMEOUT_S))
    if left:
        raise DeadlineExceeded(
            "actors did not end after they were killed",
            where=name,
            expected="none left",
            got=", ".join(left),
            remedy="stop Ray itself: ray stop --force",
        )


def _still_there(names: Iterable[str], deadline: Deadline) -> list[str]:
    """Wait until Ray reports none of these actors as alive; returns those that it does at the deadline."""
    while left := sorted(set(names) & set(_named_actors())):
        if deadline.expired:
            return left
        time.sleep(0.05)
    return []


def stop_ray_if_idle() -> None:
    """Disconnect from the local Ray that we started, and stop it, when no actor of ours runs on it any more and no
    other process is connected: Ray ends such a process a minute after its cluster has gone, and it may be a trainer.
    Somebody else's Ray is left alone, and so is this process's connection to it."""
    import ray

    head = ray_cluster.our_ray()
    if head is None or not ray.is_initialized():
        return
    # by port: Ray turns the loopback address that it is given into the machine's own
    port = head.address.rpartition(":")[2]
    if ray.get_runtime_context().gcs_address.rpartition(":")[2] != port or _named_actors():
        return
    drivers = ray_cluster.other_drivers()
    if drivers:
        pids = ", ".join(map(str, drivers))
        log.warning(
            "Ray at %s goes on: connected to it are processes %s. Repeat this when they have ended.", head.address, pids
        )
        return
    ray.shutdown()
    ray_cluster.stop_ray()
