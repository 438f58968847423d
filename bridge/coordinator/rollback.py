"""Rollback: find the version to return to, and the bytes that bring it about."""

from __future__ import annotations

from dataclasses import dataclass

from bridge.coordinator.versions import Held, Served, Versions
from bridge.errors import ProtocolError, StaleVersion
from bridge.model.levels import LEVELS_OF
from bridge.push_settings import PushSettings


@dataclass(frozen=True)
class Rollback:
    """A return from `now` to `back`, brought about by loading the bytes of `held`, which were sealed with `root`."""

    now: Served
    back: Served
    held: Held
    root: bytes
    settings: PushSettings


def find_rollback(versions: Versions, where: str, timeout_s: float) -> Rollback:
    """Work out the rollback to the version before the committed one. Pure; loads nothing.

    Raises StaleVersion when there is none, or when weights and adapter would both have to be loaded.
    """
    back, now = versions.previous, versions.committed
    if back is None or now is None:
        raise StaleVersion(
            "there is no previous version to return to",
            where=where,
            expected="the version before the last committed one, one level deep",
            got=f"committed: {now.version if now else None}",
            remedy="push the weights that should be served",
        )
    held = _bytes_to_load(back, now, where)
    seal = held.plan.arena.seal_of(held.slot)
    if seal is None:
        raise ProtocolError("the previous version is no longer sealed", where=where, got=f"version {back.version}")
    verify = "outputs" if back.version in versions.references else "weights"
    settings = PushSettings(verify, LEVELS_OF[verify], mode=_mode(back, held), reason="rollback", timeout_s=timeout_s)
    return Rollback(now, back, held, seal.root, settings)


def _bytes_to_load(back: Served, now: Served, where: str) -> Held:
    """The weights of `back`, or its adapter where the weights are the same."""
    if back.weights == now.weights and back.lora is not None and back.lora != now.lora:
        return back.lora
    if back.weights is None or not (back.lora_name is None or back.lora_name == now.lora_name):
        raise StaleVersion(
            "the previous version cannot be brought back in one step",
            where=where,
            expected="other weights, or another adapter, but not both",
            got=f"version {back.version} had the adapter {back.lora_name} over other weights",
            remedy="push what should be served",
        )
    return back.weights


def _mode(back: Served, held: Held) -> str:
    if held.plan.lora is not None:
        return "adapter"
    # weights that lie under an adapter are its base, whichever of the two came last
    return "base" if back.lora_name is not None else back.mode or "full"
