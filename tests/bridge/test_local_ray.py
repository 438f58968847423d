"""`down` stops the local Ray that we started, once nothing of ours and nobody else needs it. A stand-in takes Ray's
place; `tests/ray/test_down.py` does it with a real one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from bridge.daemon import actors, ray_cluster

OURS = "127.0.0.1:6379"


@pytest.mark.parametrize(
    ("address", "connected", "daemons", "drivers", "stops"),
    [
        (OURS, "10.0.0.7:6379", [], [], True),
        (OURS, "10.0.0.7:6379", ["other:trainer", "other:engine0"], [], False),
        (OURS, "10.0.0.7:6379", [], [4711], False),
        (OURS, "10.0.0.7:6380", [], [], False),
        (OURS, None, [], [], False),
        (None, "10.0.0.7:6379", [], [], False),
    ],
    ids=["idle", "another daemon", "another driver", "somebody else's", "not connected", "none of ours"],
)
def test_the_local_ray_stops_only_when_nobody_needs_it(
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    connected: str | None,
    daemons: list[str],
    drivers: list[int],
    stops: bool,
) -> None:
    done: list[str] = []
    context = SimpleNamespace(gcs_address=connected)
    ray = SimpleNamespace(
        is_initialized=lambda: connected is not None,
        get_runtime_context=lambda: context,
        shutdown=lambda: done.append("disconnected"),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_cluster, "our_ray", lambda: None if address is None else SimpleNamespace(address=address))
    monkeypatch.setattr(ray_cluster, "other_drivers", lambda: drivers)
    monkeypatch.setattr(ray_cluster, "stop_ray", lambda: done.append("stopped"))
    monkeypatch.setattr(actors, "_named_actors", lambda: daemons)
    actors.stop_ray_if_idle()
    assert done == (["disconnected", "stopped"] if stops else [])
