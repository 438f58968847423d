"""Load one LoRA from the arena into a slot of this rank's engine, and read it back for the proof.

A LoRA goes beside the weights under a name that was never used before, so nothing that is served changes until it is
published; one that does not pass is dropped. The engine itself says where it put A and B (`LoraView`); these views are
compared with the arena bit for bit, and the slot's padding with zero.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
import xxhash

from bridge.errors import UnsupportedLora
from bridge.model import lora_format
from bridge.model.manifest import Manifest, TensorInfo
from bridge.model.receipt import Failure, LevelResult, RankReport
from bridge.model.same_bits import same_bits
from bridge.protocol.rank_jobs import RankBake
from engine_side.protocol import LoraView, RankHost

SHOWN = 16
"""Failures listed per level."""


class LoraLoader:
    """A planned LoRA of one rank. Blocks; no collectives of its own.

    Raises, before anything is written, UnsupportedLora (no module at all, no LoRA in this engine, rank too large),
    UnexpectedTensor (modules that the engine lacks), ShapeMismatch.
    """

    def __init__(self, host: RankHost, tensors: Sequence[TensorInfo], spec: lora_format.LoraSpec) -> None:
        self.host = host
        self.spec = spec
        self.pairs = lora_format.pairs(tensors)
        if not self.pairs:
            raise UnsupportedLora(
                "an adapter without any module",
                where="adapter",
                expected="at least one A and B",
                got="none",
                remedy="check the adapter's target modules, or push mode='merged'",
            )
        self.dtypes = dict(host.plan_lora(tensors, spec))
        self._names = [info.name for info in tensors]
        self._slots: Sequence[Mapping[str, torch.Tensor]] = ()

    def rank_bake(self) -> RankBake:
        """Summarise the plan; tensors that lie on no part of this rank are unread."""
        digest = xxhash.xxh3_128_digest("\n".join(f"{n} {self.dtypes.get(n)}" for n in self._names).encode())
        unread = tuple(name for name in self._names if name not in self.dtypes)
        return RankBake(digest, self.dtypes, unread, strategies={"adapter": len(self.pairs)}, moves=len(self.dtypes))

    def map(self, manifest: Manifest, slots: Sequence[Sequence[torch.Tensor]]) -> None:
        """Use this arena from now on."""
        self._slots = [dict(zip(manifest.by_name, slot, strict=True)) for slot in slots]

    def close(self) -> None:
        """Let go of the arena. Idempotent."""
        self._slots = ()

    def load(self, slot: int, name: str, levels: Collection[str], previous: int | None) -> RankReport:
        """Write the slot's LoRA under `name` and run the levels. Raises what the engine's loader raises."""
        started = time.perf_counter()
        tensors = self._slots[slot]
        self.host.load_lora(name, {n: tensors[n] for n in self.dtypes}, self.spec)
        loaded_at = time.perf_counter()
        found = self.verify(slot, name, levels)
        if "change" in levels and previous is not None:
            # bits were read back; the open question is whether the trainer's changed at all
            before = self._slots[previous]
            same = all(same_bits(tensor, before[n]) for n, tensor in tensors.items())
            note = "the trainer's adapter did not change" if same else ""
            found = (*found, LevelResult("change", True, len(tensors), note=note))
        return RankReport(
            rank=self.host.rank,
            levels=found,
            strategies={"adapter": len(self.pairs)},
            written=sum(t.numel() * t.element_size() for n, t in tensors.items() if n in self.dtypes),
            load_s=loaded_at - started,
            verify_s=time.perf_counter() - loaded_at,
        )

    def verify(self, slot: int, name: str | None, levels: Collection[str]) -> tuple[LevelResult, ...]:
        """Run the levels of this rank. Without a `name` nothing is loaded yet, and coverage checks the plan alone."""
        if name is None:
            return (self.coverage(),) if "coverage" in levels else ()
        views = self.host.lora_views(name)
        covered = self.coverage(views)
        return (covered, self._read_back(slot, views)) if "read-back" in levels else (covered,)

    def explain(self, name: str) -> tuple[dict[str, str], ...]:
        """Describe to which module a tensor goes, and in which dtype its slot keeps it."""
        if name not in self.dtypes:
            return ()
        parts = lora_format.split(name)
        module = parts[0] if parts is not None else name
        return ({"tensor": name, "parameter": module, "strategy": "adapter", "reason": f"slot of {self.dtypes[name]}"},)

    # ---- levels ------------------------------------------------------------------------------------------------------

    def coverage(self, views: Sequence[LoraView] | None = None) -> LevelResult:
        """Check that every module of the LoRA is bound: by the plan before the load, by the slots after it."""
        bound = set(self.dtypes) if views is None else {view.name for view in views if view.live.numel()}
        missing = [n for pair in self.pairs for n in (pair.a.name, pair.b.name) if n in self.dtypes and n not in bound]
        failures = tuple(Failure(n, "bound in the engine", "nowhere", tensor=n) for n in missing[:SHOWN])
        note = f"{len(self.pairs)} modules bound" if not missing else ""
        return LevelResult("coverage", not missing and bool(bound), len(self.pairs), failures, note)

    def _read_back(self, slot: int, views: Sequence[LoraView]) -> LevelResult:
        tensors = self._slots[slot]
        wrong: list[tuple[str, str, str]] = []
        for view in views:
            wanted = tensors[view.name][view.index].to(view.live.dtype)
            if wanted.shape != view.live.shape:
                wrong.append((view.name, str(list(wanted.shape)), f"a slot of {list(view.live.shape)}"))
            elif not same_bits(view.live, wanted):
                wrong.append((view.name, "the arena's bits", "others in the engine's slot"))
            if any(bool(pad.count_nonzero()) for pad in view.padding):
                wrong.append((view.name, "zeros around it in the slot", "other values"))
        failures = tuple(Failure(name, expected, got, tensor=name) for name, expected, got in wrong[:SHOWN])
        return LevelResult("read-back", not wrong, len(views), failures)
