"""Settings: a frozen value, from defaults, then the environment (`WEIGHBRIDGE_*`), then arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from bridge.errors import ConfigError


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each field is the environment variable `WEIGHBRIDGE_<FIELD>` in capitals."""

    threads: int = 0
    """Copy and digest threads per process; 0 takes two, or one on a single core."""
    push_timeout_s: float = 300.0
    """Deadline of a push when `timeout_s` is not given."""
    plan_timeout_s: float = 600.0
    """Deadline of baking and mapping, once per layout; strategies are found by experiment."""
    start_timeout_s: float = 900.0
    """Deadline of starting the hosted engines of a daemon, all together: loading checkpoints, capturing graphs, and the
    trial whether quantised weights can be pushed. Raise it for models that take longer to load."""
    shm_dir: Path | None = None
    """Where the arena files lie; default /dev/shm."""

    @property
    def copy_threads(self) -> int:
        return self.threads or min(2, len(os.sched_getaffinity(0)))


def from_environment(environ: Mapping[str, str] | None = None) -> Config:
    """Read `WEIGHBRIDGE_*`. Raises ConfigError, naming the variable, for a value that does not fit its field."""
    env = os.environ if environ is None else environ
    given = {f: env[f"WEIGHBRIDGE_{f.upper()}"] for f in Config.__struct_fields__ if f"WEIGHBRIDGE_{f.upper()}" in env}
    try:
        return msgspec.convert(given, Config, strict=False, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as error:
        raise ConfigError("an environment variable does not fit", where="WEIGHBRIDGE_*", got=str(error)) from error
