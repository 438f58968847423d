"""How a daemon ends: `weighbridge down`."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.ray.conftest import Home, eventually, gone


def test_down_stops_what_up_started_and_nothing_else(tmp_path: Path, start_folder: Path) -> None:
    """In a home of its own, whose Ray nothing else uses: it ends there."""
    home = Home(tmp_path, tmp_path / "shm")
    home.shm.mkdir()
    run = home.cli("up", "run", "--engine", f"embedded:{start_folder}", "--engines", "2")
    head, address = home.ray["pid"], home.ray["address"]
    actors = [run["pid"], *(engine["pid"] for engine in run["engines"])]
    # somebody else's Ray, as seen from another home: `down` there stops the daemon, not Ray
    foreign = {
        "XDG_STATE_HOME": str(home.state / "elsewhere"),
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home.state / "weighbridge" / "_ray" / "token"),
    }
    home.cli("up", "guest", "--engine", f"embedded:{start_folder}", **foreign)
    assert home.cli("down", "guest", **foreign)["stopped"] is True
    assert not gone(head)
    children = [child.pid for child in psutil.Process(head).children(recursive=True)]
    assert len(children) >= 3
    assert home.cli("down", "run")["stopped"] is True
    assert eventually(lambda: gone(head))
    assert eventually(lambda: all(gone(pid) for pid in (*actors, *children)))
    assert home.files() == []
    assert not (home.state / "weighbridge" / "_ray" / "ray.json").exists()
    assert home.cli("status")["daemons"] == []
    home.cli("down", "run", code=2)
