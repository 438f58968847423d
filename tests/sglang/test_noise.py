"""The noise of a real SGLang with a coarse KV cache: measured on the weights that it was started with, then served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.model.declared_losses import DeclaredLosses
from tests.sglang.rig import SglangRig

pytestmark = pytest.mark.timeout(300)


def test_a_coarse_kv_cache_is_served(rigs: Any, tmp_path: Path) -> None:
    rigs.close()
    rig = SglangRig(tmp_path, "llama", kv_cache_dtype="fp8_e5m2")
    try:
        drift = rig.push().engines[0].canary
        assert drift is not None
        assert drift.noise == pytest.approx(drift.mean_abs / drift.spread)
        assert rig.b.status().engines[0].losses == DeclaredLosses("float8_e5m2", "fp8_e5m2")
        for times in (1, 10):
            rig.step()
            with torch.no_grad():
                rig.model.lm_head.weight.mul_(times)
            receipt = rig.push()
            assert receipt.verified is True
        assert rig.b.status().engines[0].noise.fraction == pytest.approx(drift.noise)
    finally:
        rig.close()
