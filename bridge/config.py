"""The settings of a process: defaults, overridden by the environment (`WEIGHBRIDGE_*`)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from bridge.errors import ConfigError

COPY_TUNABLE = "glibc.cpu.x86_non_temporal_threshold=0x100000"
"""Setting of GLIBC_TUNABLES with which memcpy streams from 1 MiB up: large copies then leave the caches alone."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings of one process; the variable `WEIGHBRIDGE_<FIELD>`, in capitals, sets a field."""

    threads: int = 0
    """Threads that copy and digest, per process; 0 takes two, or one on a single core."""
    push_timeout_s: float = 300.0
    """Deadline of a push when `timeout_s` is not given."""
    plan_timeout_s: float = 600.0
    """Deadline of baking and mapping, once per layout; strategies are found by experiment."""
    start_timeout_s: float = 900.0
    """Deadline of starting the hosted engines of a daemon, all together: loading checkpoints, capturing graphs, and the
    trial whether quantised weights can be pushed. Raise it for models that take longer to load."""
    shm_dir: Path | None = None
    """Folder of the arena files; default /dev/shm."""

    @property
    def copy_threads(self) -> int:
        """Threads to copy and digest with."""
        return self.threads or min(2, len(os.sched_getaffinity(0)))


def from_environment() -> Config:
    """Read `WEIGHBRIDGE_*`. Raises ConfigError, naming the variable, for a value that does not fit its field."""
    variables = {field: f"WEIGHBRIDGE_{field.upper()}" for field in Config.__struct_fields__}
    given = {field: os.environ[name] for field, name in variables.items() if name in os.environ}
    try:
        return msgspec.convert(given, Config, strict=False, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        raise ConfigError(
            "an environment variable does not fit",
            where="WEIGHBRIDGE_*",
            expected="values of the types that the documentation lists",
            got=str(error),
            remedy="correct the variable that `got` names after `$.`, or unset it",
        ) from error
