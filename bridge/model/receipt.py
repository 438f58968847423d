"""The receipt of one push: tensors sent, written and verified, by engine and rank, and the seconds of each phase."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import msgspec

Verified = bool | Literal["partial"]


class Failure(msgspec.Struct, frozen=True):
    """One thing that a level found wrong, with what should have been there.

    Attributes:
        name: for people: "tensor -> parameter", or whichever of the two, or the module, it is about.
        tensor: name of the sent tensor, "" where none is concerned alone.
        parameter: path of the engine's parameter or module in the live model's skeleton, "" for a check before any.
    """

    name: str
    expected: str
    got: str
    tensor: str = ""
    parameter: str = ""

    @classmethod
    def between(cls, tensor: str, parameter: str, expected: str, got: str) -> Failure:
        """The failure of one tensor at one place of the engine."""
        return cls(f"{tensor} -> {parameter}", expected, got, tensor, parameter)


class LevelResult(msgspec.Struct, frozen=True):
    """The findings of one level on one rank; `checked` counts the tensors, parameters, modules or tokens compared."""

    level: str
    ok: bool
    checked: int
    failures: tuple[Failure, ...] = ()
    note: str = ""


class RankReport(msgspec.Struct, frozen=True):
    """One rank's part of a push. `strategies` counts modules by strategy; `rebound` lists parameters whose storage
    moved (captured graphs are then invalid); `canary_only` lists modules that no probe could call. `quantised` maps
    the weights that this rank quantised to the relative error of what their codes stand for; `kept` lists calibrated
    values (of activations, of KV caches) that no trainer has and the engine keeps."""

    rank: int
    levels: tuple[LevelResult, ...] = ()
    strategies: dict[str, int] = {}
    rebound: tuple[str, ...] = ()
    canary_only: tuple[str, ...] = ()
    written: int = 0
    skipped_only: bool = False
    """True when every failed tensor was one that this load skipped as unchanged: another writer has changed it."""
    load_s: float = 0.0
    postload_s: float = 0.0
    verify_s: float = 0.0
    quantised: dict[str, float] = {}
    kept: tuple[str, ...] = ()


class CanaryResult(msgspec.Struct, frozen=True):
    """|trainer - engine| of log-probabilities on the canary prompts, in nats; `limit` bounds the mean.

    Attributes:
        spread: standard deviation of the trainer's log-probabilities.
        noise: the noise to expect of this engine with these weights, as a fraction of the spread, from what was
            measured before anything was pushed; None where nothing was, or it is no part of the limit.
        conclusive: False when the noise is so large that this canary shows nothing.
    """

    mean_abs: float
    max_abs: float
    kl: float
    limit: float
    tokens: int
    spread: float = 0.0
    noise: float | None = None
    conclusive: bool = True

    @property
    def ok(self) -> bool:
        """True when the mean is within its limit, or nothing can be concluded from it."""
        return self.mean_abs <= self.limit or (not self.conclusive and math.isfinite(self.mean_abs))


class EngineReport(msgspec.Struct, frozen=True):
    """One engine's part of a push: its state afterwards, the version it serves (None: nothing), each rank's report."""

    id: str
    state: str
    serving: int | None
    ranks: tuple[RankReport, ...] = ()
    canary: CanaryResult | None = None
    adapter: str | None = None
    pause_s: float = 0.0
    error: str | None = None

    @property
    def coverage(self) -> bool | None:
        """True when every rank proved that each engine element is written exactly once; None when not checked."""
        found = [level.ok for rank in self.ranks for level in rank.levels if level.level == "coverage"]
        return all(found) if found else None

    @property
    def strategies(self) -> dict[str, int]:
        """Number of modules by strategy, over all ranks."""
        return dict(sum((Counter(rank.strategies) for rank in self.ranks), Counter()))

    @property
    def rebound(self) -> tuple[str, ...]:
        """Parameters whose storage moved, over all ranks; captured graphs are then invalid."""
        return tuple(sorted({name for rank in self.ranks for name in rank.rebound}))

    @property
    def quantised(self) -> dict[str, float]:
        """Weights that the engine quantised, with the largest relative error over all ranks of what their codes stand
        for against the trainer's values."""
        out: dict[str, float] = {}
        for name, error in (found for rank in self.ranks for found in rank.quantised.items()):
            out[name] = max(error, out.get(name, 0.0))
        return out

    @property
    def kept(self) -> tuple[str, ...]:
        """Calibrated values that this engine keeps, over all ranks."""
        return tuple(sorted({name for rank in self.ranks for name in rank.kept}))


class Receipt(msgspec.Struct, frozen=True):
    """The record of one push, as `push` returns it, the journal keeps it and `history` lists it.

    `nbytes` counts the tensors of the version, `wire_nbytes` those written to the arena for it (unchanged tensors are
    not). `phases` and `pause_s` are seconds; `pause_s` is the longest time that any engine did not serve.
    `verified` is "partial" when some module was checked by the canary alone. `unused` lists, by engine, the tensors
    that were pushed and that the engine has no place for.
    """

    version: int
    previous: int | None
    mode: str
    reason: str
    tensors: int
    nbytes: int
    wire_nbytes: int
    phases: dict[str, float]
    pause_s: float
    engines: tuple[EngineReport, ...]
    verify: str
    verified: Verified
    at: float = 0.0
    error: str | None = None
    notes: tuple[str, ...] = ()
    unused: dict[str, tuple[str, ...]] = {}

    @property
    def kept(self) -> tuple[str, ...]:
        """Calibrated values that some engine keeps, since no trainer has them; `engines` tells which engine."""
        return tuple(sorted({name for engine in self.engines for name in engine.kept}))

    @property
    def total_s(self) -> float:
        """Seconds of the whole push."""
        return sum(self.phases.values())

    def metrics(self, prefix: str = "weight_sync/") -> dict[str, float]:
        """Flatten the receipt for a tracker: seconds per phase, pause, bytes, rate, version, verified, canary drift."""
        out = {f"{prefix}{name}_s": seconds for name, seconds in self.phases.items()}
        out[f"{prefix}total_s"] = self.total_s
        out[f"{prefix}pause_s"] = self.pause_s
        out[f"{prefix}nbytes"] = float(self.nbytes)
        out[f"{prefix}wire_nbytes"] = float(self.wire_nbytes)
        out[f"{prefix}gb_per_s"] = self.nbytes / self.total_s / 1e9 if self.total_s else 0.0
        out[f"{prefix}version"] = float(self.version)
        out[f"{prefix}verified"] = {True: 1.0, "partial": 0.5, False: 0.0}[self.verified]
        drifts = [engine.canary.mean_abs for engine in self.engines if engine.canary is not None]
        if drifts:
            out[f"{prefix}canary_mean_abs"] = max(drifts)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Convert the receipt to plain data, ready for JSON."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain
