"""The measuring process of `weighbridge bench`: a CopyJob comes in on stdin, measurements go to stdout.

Source and sink are private, touched memory on both sides; every value changes before every timed push, and after it the
engine's bytes are compared with the trainer's, untimed. The reference, one flat one-thread numpy copy of as many bytes,
takes its turn in the same rounds, in random order with the pushes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import psutil
import torch
from torch import nn

import bridge
from bridge.bench.copy_bench import VARIANTS, CopyJob, Measured, MeasurementFailed, Timed
from bridge.client import Bridge
from bridge.errors import BridgeError, DigestMismatch
from bridge.model.same_bits import same_bits
from bridge.protocol.codec import ErrorInfo
from bridge.shm.files import directory

J = TypeVar("J")
Shapes = list[tuple[str, tuple[int, ...]]]

QWEN2_05B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
"""The published config.json of Qwen2-0.5B: 290 tensors, 988 MB in bf16, embeddings tied."""
MANTISSA = 0x1F
"""The bits of a bf16 value that the rounds change: 32 states, many more than an arena has slots, in a model that keeps
its size, and with it an engine's own rounding (all 7 bits would take norms from 1 to 2)."""
UNCHANGED = 5


# ---- the trainer --------------------------------------------------------------------------------------------------


def shapes_of(job: CopyJob) -> Shapes:
    """List names and shapes of the tensors of one job."""
    return _decoder() if job.shapes == "qwen2-0.5b" else _experts(job.count)


def _decoder() -> Shapes:
    c: dict[str, Any] = QWEN2_05B
    hidden, middle = c["hidden_size"], c["intermediate_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes: Shapes = [("model.embed_tokens.weight", (c["vocab_size"], hidden))]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes += [
                (f"{layer}.self_attn.{name}_proj.weight", (rows, hidden)),
                (f"{layer}.self_attn.{name}_proj.bias", (rows,)),
            ]
        shapes.append((f"{layer}.self_attn.o_proj.weight", (hidden, hidden)))
        shapes += [(f"{layer}.mlp.{name}_proj.weight", (middle, hidden)) for name in ("gate", "up")]
        shapes.append((f"{layer}.mlp.down_proj.weight", (hidden, middle)))
        shapes += [(f"{layer}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
    return [*shapes, ("model.norm.weight", (hidden,))]


def _experts(count: int) -> Shapes:
    """Name `count` small matrices of 1 KiB like those of a mixture of experts."""
    return [
        (f"model.layers.{i // 300}.mlp.experts.{i // 3 % 100}.{('gate', 'up', 'down')[i % 3]}_proj.weight", (16, 32))
        for i in range(count)
    ]


def build(shapes: Shapes) -> nn.Module:
    """Build a module tree with these bf16 parameters: leaves are Linear where the weight is a matrix, else RMSNorm."""
    root = nn.Module()
    biased = {name.removesuffix(".bias") for name, _ in shapes if name.endswith(".bias")}
    for name, shape in shapes:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            _place(root, path, _leaf(shape, path in biased))
    return root


def _leaf(shape: tuple[int, ...], bias: bool) -> nn.Module:
    """One layer, its values not yet set."""
    with torch.device("meta"):
        made = nn.RMSNorm(shape[0]) if len(shape) == 1 else nn.Linear(shape[1], shape[0], bias=bias)
    return made.to(torch.bfloat16).to_empty(device="cpu")


def _place(root: nn.Module, path: str, leaf: nn.Module) -> None:
    *parents, last = path.split(".")
    for part in parents:
        child = getattr(root, part, None)
        if child is None:
            root.add_module(part, child := nn.Module())
        root = child
    root.add_module(last, leaf)


def fill(model: nn.Module, seed: int) -> None:
    """Fill every page with random finite values, zeros of both signs and subnormals among them."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    block[:4] = torch.tensor([0.0, -0.0, 1e-39, -1e-39])
    with torch.no_grad():
        for param in model.parameters():
            flat = param.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                piece = flat[start : start + block.numel()]
                piece.copy_(block[: piece.numel()])


@dataclass
class Trainer:
    """The trainer's model, whose values change before every push."""

    model: nn.Module
    state: int = 0

    def change(self) -> None:
        """Change every value in place: the low mantissa bits go to the next of their 32 states."""
        mask = (self.state ^ (self.state + 1)) & MANTISSA
        self.state += 1
        for param in self.model.parameters():
            param.detach().view(torch.int16).bitwise_xor_(mask)


# ---- engines ---------------------------------------------------------------------------------------------------


@dataclass
class Sink:
    """One engine with its bridge: a plain module of this process, or (None) one in an actor."""

    bridge: Bridge
    module: nn.Module | None

    def differing(self, trainer: nn.Module, version: int) -> list[str]:
        """List the tensors whose bytes in the engine are not the trainer's. The bytes of an engine in an actor are
        compared with the arena there, the arena's with the trainer here."""
        found: list[str] = []
        if self.module is not None:
            there: dict[str, torch.Tensor] = dict(self.module.named_parameters())
        elif (arena := self.bridge.arena) is None:
            return ["no arena"]
        else:
            found = [check.name for check in self.bridge.health().checks if "read-back" in check.name and not check.ok]
            seals = [arena.seal_of(slot) for slot in range(arena.slots)]
            slot = next(s for s, seal in enumerate(seals) if seal is not None and seal.version == version)
            there = dict(zip(arena.manifest.by_name, arena.tensors(slot), strict=True))
        return found + [name for name, param in trainer.named_parameters() if not same_bits(param, there[name])]


@contextlib.contextmanager
def opened(job: CopyJob, shapes: Shapes) -> Iterator[Sink]:
    """Start the engine of one job, with memory of its own, and stop it at the end."""
    if job.engine == "module":
        engine = build(shapes)
        fill(engine, job.seed + 1)
        with bridge.attach(engine) as made:
            yield Sink(made, engine)
        return
    with tempfile.TemporaryDirectory(prefix="weighbridge-bench-model-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN2_05B))
        name = f"bench-{os.getpid()}"
        made = bridge.launch(
            f"embedded:{folder}", name=name, load="dummy", dtype="bf16", num_blocks=64, max_seq_len=1024
        )
        try:
            yield Sink(made, None)
        finally:
            made.shutdown()


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The rounds of one job, and their measurements so far."""

    job: CopyJob
    trainer: Trainer
    sink: Sink
    copy: Callable[[], None]
    reference: list[Timed] = field(default_factory=list)
    variants: dict[str, list[Timed]] = field(default_factory=lambda: {name: [] for name in VARIANTS})
    unchanged: list[Timed] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def push(self, verify: str, *, change: bool = True) -> Timed:
        """Time one push, then check it. Raises DigestMismatch when the engine's bytes are not the trainer's."""
        if change:
            self.trainer.change()
        before, started = time.process_time(), time.perf_counter()
        receipt = self.sink.bridge.push(self.trainer.model.named_parameters(), verify=verify)
        seconds, spent = time.perf_counter() - started, time.process_time() - before
        wrong = self.sink.differing(self.trainer.model, receipt.version)
        if wrong:
            raise DigestMismatch(
                "after a timed push the engine's bytes are not the trainer's",
                where=f"{wrong[0]} and {len(wrong) - 1} more, verify={verify}",
                expected="the bits that were pushed",
                got=f"{len(wrong)} tensors with other bits",
                remedy="this is a fault of weighbridge, or of this machine's memory: please report it",
                names=tuple(wrong),
            )
        return Timed(seconds, spent, receipt.pause_s, dict(receipt.phases))

    def run(self) -> Timed:
        """Run all rounds. Returns the first push, which plans, makes the arena and touches it."""
        with _private_peak(self.peaks):
            first = self.push("weights")
        with _private_peak(self.peaks):
            for verify in VARIANTS:
                self.push(verify)
        self.copy()
        order = random.Random(self.job.seed)
        for _ in range(self.job.rounds):
            turns = ["reference", *VARIANTS]
            order.shuffle(turns)
            for turn in turns:
                if turn == "reference":
                    self.reference.append(self._copied())
                else:
                    self.variants[turn].append(self.push(turn))
        # The first push of the same values still has to bring the older slot up to date.
        self.push("weights", change=False)
        self.unchanged = [self.push("weights", change=False) for _ in range(UNCHANGED)]
        return first

    def _copied(self) -> Timed:
        before, started = time.process_time(), time.perf_counter()
        self.copy()
        return Timed(time.perf_counter() - started, time.process_time() - before)


def measure(job: CopyJob) -> Measured:
    """Measure one job in this process. Blocks for up to minutes."""
    torch.set_num_threads(job.threads)
    shapes = shapes_of(job)
    trainer = Trainer(build(shapes))
    fill(trainer.model, job.seed)
    nbytes = sum(param.nbytes for param in trainer.model.parameters())
    source, sink = np.full(nbytes, 1, dtype=np.uint8), np.full(nbytes, 2, dtype=np.uint8)
    with opened(job, shapes) as engine:
        gc.collect()
        shm_before, private, cpu_before = _shm_nbytes(), _private_nbytes(), psutil.cpu_times()
        began, ours = time.perf_counter(), time.process_time()
        bench = Bench(job, trainer, engine, lambda: np.copyto(sink, source))
        first = bench.run()
        shm, cpu = _shm_nbytes() - shm_before, psutil.cpu_times()
        took, ours = time.perf_counter() - began, time.process_time() - ours
    planning, steady = (shm + peak - private for peak in bench.peaks)
    spent = {name: now - then for name, now, then in zip(cpu._fields, cpu, cpu_before, strict=True)}
    idle = sum(spent[name] for name in ("idle", "iowait", "guest", "guest_nice"))  # guests count as users, too
    busy = sum(spent.values()) - idle
    others = max(0.0, busy - ours) / took if job.engine == "module" else 0.0
    return Measured(
        job, len(shapes), nbytes, bench.reference, bench.variants, bench.unchanged, first, planning, steady, shm, others
    )


@contextlib.contextmanager
def _private_peak(peaks: list[int]) -> Iterator[None]:
    """Append the most private memory that this process had meanwhile, in bytes, looked at every few milliseconds.

    The kernel's own peak also counts shared pages, and those once for each time that a process maps them.
    """
    done, seen = threading.Event(), [_private_nbytes()]

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(_private_nbytes())

    watcher = threading.Thread(target=watch, name="bench-memory", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peaks.append(max(*seen, _private_nbytes()))


def _private_nbytes() -> int:
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def _shm_nbytes() -> int:
    """Count the bytes in use on the file system of the arenas."""
    return int(psutil.disk_usage(str(directory(None))).used)


def serve_one_job(job_type: type[J], measure: Callable[[J], msgspec.Struct]) -> int:
    """Read one job from stdin and write its measurements to stdout. Errors of our tree travel as data; any other ends
    this process with its traceback on stderr."""
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not reach the answer
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=job_type)
    try:
        answer = measure(job)
    except BridgeError as error:
        answer = MeasurementFailed(ErrorInfo.of(error))
    with stdout:
        stdout.write(msgspec.json.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(serve_one_job(CopyJob, measure))
