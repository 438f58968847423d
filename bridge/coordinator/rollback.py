"""Rollback: find the version to return to, and the bytes that bring it about."""

from __future__ import annotations

from bridge.coordinator.versions import Held, Served, Versions
from bridge.errors import StaleVersion
from bridge.model.levels import LEVELS_OF
from bridge.push_settings import PushSettings


def find_rollback(versions: Versions, where: str, timeout_s: float) -> tuple[Served, Held, PushSettings]:
    """Work out the rollback to the version before the committed one. Pure; loads nothing.

    Returns the version to return to, the bytes that have to be loaded for it, and the settings of that load. Raises
    StaleVersion when there is none, or when weights and adapter would both have to be loaded.
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
    if back.weights == now.weights and back.lora is not None and back.lora != now.lora:
        held, mode = back.lora, "adapter"
    elif back.weights is None or back.lora_name not in (None, now.lora_name):
        raise StaleVersion(
            "the previous version cannot be brought back in one step",
            where=where,
            expected="other weights, or another adapter, but not both",
            got=f"version {back.version} had the adapter {back.lora_name} over other weights",
            remedy="push what should be served",
        )
    else:  # weights that lie under an adapter are its base, whichever of the two came last
        held, mode = back.weights, "base" if back.lora_name is not None else back.mode or "full"
    references = versions.references.get(back.version)
    verify = "weights" if references is None else "outputs"
    settings = PushSettings(
        verify, LEVELS_OF[verify], mode=mode, reason="rollback", timeout_s=timeout_s,
        canary_limit=None if references is None else references.canary_limit,
    )  # fmt: skip
    return back, held, settings
