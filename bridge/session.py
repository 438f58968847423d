"""Sessions: what a Bridge talks to, and what its end stops. `attach`, `connect` and `launch` differ in this alone.

`InProcessSession` runs the coordinator and one engine's service in this process; `RaySession` talks to the actors of a
daemon. A session belongs to the process that made it: in a forked child it closes nothing and refuses every call.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge import entry_points
from bridge.config import Config
from bridge.coordinator.coordinator import Coordinator
from bridge.daemon import actors, ray_cluster
from bridge.errors import BridgeError
from bridge.journal.lease import Lease
from bridge.journal.ledger import Ledger
from bridge.journal.state_dir import checked_name
from bridge.ports import CoordinatorPort, EnginePort, InProcessPort, require_own_process
from bridge.shm.remains import remove_remains


class Session:
    """One Bridge's connection to its coordinator and engines, and its lease. Closed by `Bridge.close`, when the Bridge
    is collected, or at the end of the process.

    Attributes:
        name: the daemon's name; of an unnamed attached engine one that nobody else uses.
        state: folder of lease and journal; None is `$XDG_STATE_HOME/weighbridge/NAME`.
    """

    def __init__(
        self, name: str, coordinator: CoordinatorPort, engines: Sequence[EnginePort], state: Path | None = None
    ) -> None:
        self.name = name
        self.coordinator = coordinator
        self.engines = tuple(engines)
        self.state = state
        self.closed = False
        self._pid = os.getpid()
        self._lease: Lease | None = None
        self._closing = threading.RLock()
        # Not weakref.finalize: its exit hook may run after that of an engine started later than the hook was installed,
        # and an attached engine has to run while its arenas are let go of. Exit hooks run last in, first out.
        atexit.register(self.close)

    @property
    def forked(self) -> bool:
        """True in a child process that was forked after this session was made."""
        return os.getpid() != self._pid

    def require_usable(self) -> None:
        """Raise Closed in a forked child, ConfigError in the thread that runs the engine's event loop, which would wait
        for itself. Called before every call of a Bridge. Does not block."""
        if os.getpid() != self._pid:
            require_own_process(self._pid, self.name)
        self.refuse_caller()

    def hold_lease(self) -> None:
        """Check that this process and thread may push, and take the right to, unless this session has it. Raises as
        `require_usable`, and LeaseHeld, naming the holder. Does not block."""
        self.require_usable()
        if self._lease is None:
            self._lease = Lease.acquire(self.name, directory=self.state)

    def refuse_caller(self) -> None:
        """Raise ConfigError when this thread runs the event loop of the engine, which would wait for itself."""

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Raise ConfigError when one of these storage addresses belongs to an engine of this process."""

    def close(self) -> None:
        """Give up the lease and what this process holds of the session. Idempotent; does nothing in a forked child. May
        block for as long as a running push and the engines' own deadlines take."""
        if self.forked:
            return
        with self._closing:  # the exit hook waits here for a close that is under way on another thread
            if self.closed:
                return
            try:
                self._end()
            finally:
                self.closed = True
                atexit.unregister(self.close)
                if self._lease is not None:
                    self._lease.release()
                    self._lease = None

    def shutdown(self) -> None:
        """Close, and stop the daemon if there is one. Does nothing in a forked child."""
        self.close()

    def _end(self) -> None:
        """Let go of what the kind of session holds besides the lease."""


class InProcessSession(Session):
    """An engine of this process (or a server on this node, by its address) and its coordinator; what `attach` makes.

    The engine stays the caller's: the end of the session leaves it running.
    """

    def __init__(self, engine: object, name: str | None, config: Config) -> None:
        """Claim the engine and start its coordinator. Blocks for the engine's answers. Without a `name` versions begin
        at 1 and the journal lies in a temporary folder. Raises ConfigError for an object that no driver fits, Busy for
        an engine or a name that another bridge has."""
        chosen = f"attached-{os.getpid()}-{secrets.token_hex(4)}" if name is None else checked_name(name)
        driver = entry_points.load(entry_points.ADAPT)(engine, entry_points.load(entry_points.ROUTES))
        node = socket.gethostname()
        self._temporary = Path(tempfile.mkdtemp(prefix="weighbridge-")) if name is None else None
        try:
            service = entry_points.load(entry_points.SERVICE)("engine0", driver, node=node, threads=config.copy_threads)
            port = InProcessPort("engine0", service)
            ledger = Ledger.open(chosen, directory=self._temporary)
            try:
                remove_remains(ledger.path, config.shm_dir)
                self._coordinator = Coordinator(
                    chosen, [port], ledger, node=node, shm_dir=config.shm_dir, start_timeout_s=config.start_timeout_s
                )
            except BaseException:
                ledger.close()
                raise
        except BaseException:
            self._forget_journal()
            with contextlib.suppress(BridgeError):  # the first error is the one to report
                driver.close()
            raise
        self._driver = driver
        self._service = service
        super().__init__(chosen, InProcessPort(chosen, self._coordinator), [port], self._temporary)

    def refuse_caller(self) -> None:
        """Raise ConfigError in the thread of the attached engine's event loop."""
        self._service.refuse_caller()

    def refuse_shared(self, storages: frozenset[int]) -> None:
        """Raise ConfigError when the attached engine holds weights at one of these storage addresses."""
        self._driver.refuse_shared(storages)

    def _end(self) -> None:
        try:
            self._coordinator.close()
        finally:
            self._forget_journal()

    def _forget_journal(self) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


class RaySession(Session):
    """A daemon on Ray: its coordinator and its hosted engines are actors, which outlive the session."""

    @classmethod
    def launch(cls, name: str, specs: Sequence[tuple[str, Mapping[str, Any]]], config: Config) -> RaySession:
        """Start daemon `name` with one hosted engine per (spec, arguments), and a local Ray when none runs. Blocks
        until every engine can serve. Raises ConfigError for a bad argument, Busy for a name that is taken; then nothing
        that was started is left running."""
        ray_cluster.ensure_ray()
        try:
            return cls(name, *actors.start(name, specs, config))
        except BaseException:
            actors.stop_ray_if_idle()
            raise

    @classmethod
    def find(cls, name: str) -> RaySession:
        """Connect to a running daemon. Raises NotFound, naming the daemons that run."""
        return cls(name, *actors.find(name))

    def shutdown(self) -> None:
        """Close, then stop the daemon: engines gracefully, and the local Ray if it is ours and idle."""
        self.close()
        if not self.forked:
            actors.stop(self.name)
