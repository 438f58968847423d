"""Rank 0 of a sharded trainer pushes gathered values: it enters no collective alone, and training goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import tiny_qwen2

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("kind", "verified"), [("fsdp2", "partial"), ("tensor parallel", "partial"), ("ddp", True)])
def test_rank_0_pushes_what_it_gathered(tmp_path: Path, kind: str, verified: object) -> None:
    tiny_qwen2().save_pretrained(tmp_path)
    meeting = str(tmp_path / "ranks-meet-here")  # a file: no port that another process may take first
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), meeting, kind, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=150) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
    pushes = json.loads(said[0][0].splitlines()[-1])
    assert [push["verified"] for push in pushes] == [verified, verified], pushes
    assert all(push["s"] < 10 for push in pushes), pushes
    assert pushes[1]["loss"] < pushes[0]["loss"]
    if verified == "partial":
        assert all(any("sharded" in note for note in push["notes"]) for push in pushes), pushes
