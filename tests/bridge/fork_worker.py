"""A trainer process for `test_session.py`: attaches, pushes, and forks children, each of which does one thing.

    fork_worker.py CHECKPOINT ENGINE:WAY:ACTION ...

ENGINE is "module" or the number of tensor-parallel ranks of an embedded engine, WAY is "fork" or "multiprocessing". Its
last line on stdout is a JSON object: for every ENGINE its children, WAY:ACTION to how that child ended, how long it
took, what it said, and what the parent had afterwards; and what is left in shared memory when the engine has ended.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine

LONGEST_S = 20.0
Scene = dict[str, Any]


def said(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call raises, and how long that takes."""
    began = time.monotonic()
    try:
        call()
    except bridge.BridgeError as error:
        name, remedy = type(error).__name__, error.remedy
    else:
        name, remedy = "nothing", None
    return {"raised": name, "remedy": remedy, "took_s": time.monotonic() - began}


def exits(scene: Scene) -> dict[str, Any]:
    """End as any program does, exit hooks included."""
    return {}


def closes(scene: Scene) -> dict[str, Any]:
    scene["bridge"].close()
    return {"after": said(scene["bridge"].status)}


def shuts_down(scene: Scene) -> dict[str, Any]:
    scene["bridge"].shutdown()
    return {}


def drops(scene: Scene) -> dict[str, Any]:
    scene.clear()
    gc.collect()
    return {}


def calls(scene: Scene) -> dict[str, Any]:
    b, model = scene["bridge"], scene["model"]
    return {
        "push": said(lambda: b.push(model.named_parameters(), timeout_s=5)),
        "rollback": said(lambda: b.rollback(5)),
        "health": said(lambda: b.health(5)),
        "status": said(b.status),
        "bind": said(lambda: b.bind(model)),
        "generate": said(lambda: b.engines[0].generate([[1, 2, 3]], timeout_s=5)),
        "result": said(scene["pending"].result),
    }


def opens_its_own(scene: Scene) -> dict[str, Any]:
    live, model = nn.Linear(3, 3), nn.Linear(3, 3)
    with bridge.attach(live) as own:
        receipt = own.push(model.named_parameters())
    return {"verified": receipt.verified, "same": torch.equal(live.weight, model.weight)}


ACTIONS = {each.__name__: each for each in (exits, closes, shuts_down, drops, calls, opens_its_own)}


def child(action: str, scene: Scene, answer: int) -> None:
    os.write(answer, json.dumps(ACTIONS[action](scene)).encode() + b"\n")


def by_fork(action: str, scene: Scene, answer: int) -> tuple[int, Callable[[], int | None]]:
    pid = os.fork()
    if pid == 0:
        child(action, scene, answer)
        sys.exit(0)

    def poll() -> int | None:
        done, status = os.waitpid(pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    return pid, poll


def by_multiprocessing(action: str, scene: Scene, answer: int) -> tuple[int, Callable[[], int | None]]:
    process = multiprocessing.get_context("fork").Process(target=child, args=(action, scene, answer))
    process.start()
    assert process.pid is not None
    return process.pid, lambda: process.exitcode


def scene_of(engine: str, checkpoint: str) -> Scene:
    """An engine with a Bridge that has pushed twice."""
    if engine != "module":
        from transformers import Qwen2ForCausalLM
    gc.freeze()  # what was imported: every child would look through it as it ends
    if engine == "module":
        live: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    else:
        live = Engine(EngineConfig(checkpoint, tensor_parallel_size=int(engine)))
        model = Qwen2ForCausalLM.from_pretrained(checkpoint).eval()
    b = bridge.attach(live, model=model if engine != "module" else None)
    b.push(model.named_parameters())
    pending = b.push(model.named_parameters(), wait=False)
    while b.status().busy is not None:  # it ends, and nobody asks for its result yet
        time.sleep(0.01)
    return {"engine": live, "model": model, "bridge": b, "pending": pending}


def files_of(folder: Path) -> list[str]:
    """Shared memory, and the journals of Bridges without a name."""
    journals = Path(tempfile.gettempdir()).glob("weighbridge-*/*")
    return sorted([*os.listdir(folder), *map(str, journals)])


def outlived(scene: Scene, folder: Path, way: str, action: str) -> dict[str, Any]:
    """Fork a child, wait for it, and push again."""
    files = files_of(folder)
    read, write = os.pipe()
    began = time.monotonic()
    pid, poll = {"fork": by_fork, "multiprocessing": by_multiprocessing}[way](action, scene, write)
    while (code := poll()) is None and time.monotonic() - began < LONGEST_S:
        time.sleep(0.01)
    took = time.monotonic() - began
    if code is None:
        os.kill(pid, signal.SIGKILL)
    os.close(write)
    with os.fdopen(read, "rb") as answers:
        words = answers.readline()
    with torch.no_grad():
        next(scene["model"].parameters()).add_(1.0)
    b = scene["bridge"]
    return {
        "code": code,
        "took_s": took,
        "said": json.loads(words or b"null"),
        "kept": files_of(folder) == files,
        "verified": b.push(scene["model"].named_parameters(), timeout_s=20).verified,
        "healthy": b.health(20).healthy,
    }


def main(checkpoint: str, *wanted: str) -> None:
    torch.set_num_threads(1)
    folder = Path(os.environ["WEIGHBRIDGE_SHM_DIR"])
    said = {}
    for engine, children in itertools.groupby((each.split(":") for each in wanted), lambda each: each[0]):
        scene = scene_of(engine, checkpoint)
        found = {f"{way}:{action}": outlived(scene, folder, way, action) for _, way, action in children}
        scene["bridge"].close()
        if engine != "module":
            scene["engine"].close()
        scene.clear()
        said[engine] = {"children": found, "left": files_of(folder)}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
