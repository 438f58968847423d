"""A base in 4 or 8 bit, by the real library: merged from its values, and left as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from bridge.errors import UnsupportedLora
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, apart, everything, stir, wrap

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROUNDED = 0.02
"""In nats: the library's own kernels compute in bfloat16, or round activations to 8 bit."""


def in_4_bit(linear: nn.Linear) -> Any:
    made: Any = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = bitsandbytes.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    return made


def in_8_bit(linear: nn.Linear) -> Any:
    made: Any = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
    made.weight = bitsandbytes.nn.Int8Params(
        linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False
    )
    return made


@pytest.fixture(params=[in_4_bit, in_8_bit])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LoraRig]:
    base = tiny_qwen2(hidden_size=64, intermediate_size=128)
    base.save_pretrained(tmp_path)
    for name, linear in list(base.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            path, _, child = name.rpartition(".")
            made = request.param(linear)
            if linear.bias is not None:
                made.bias = linear.bias
            setattr(base.get_submodule(path), child, made.to("cpu"))
    made = LoraRig(tmp_path, wrap(base))
    yield made
    made.close()


@pytest.mark.parametrize("verify", ["weights", None])
def test_merged_pushes(rig: LoraRig, verify: str | None) -> None:
    for seed in range(2):
        stir(rig.model, seed=seed)
        before = everything(rig.model)
        receipt = rig.push(mode="merged", verify=verify)
        assert receipt.verified is True, receipt.notes
        assert everything(rig.model) == before
        assert rig.serves(rig.truth(), limit=ROUNDED)
        assert everything(rig.model) == before


def test_after_an_evaluation_of_the_trainers_own(rig: LoraRig) -> None:
    """On CPUs with avx512_bf16 the library packs 4-bit weights anew there, and its dequantiser no longer reads them."""
    stir(rig.model, seed=1)
    weights = [m.weight for m in rig.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    shapes = [weight.shape for weight in weights]
    rig.model.eval()
    with torch.no_grad():
        rig.model(input_ids=torch.tensor([[1, 2, 3]]))
    if [weight.shape for weight in weights] == shapes:
        assert rig.push(mode="merged", verify="weights").verified is True
        assert rig.serves(rig.truth(), limit=ROUNDED)
    else:
        with pytest.raises(UnsupportedLora, match="not what the layer computes"):
            rig.push(mode="merged", verify="weights")


@pytest.mark.parametrize("evaluated", [False, True])
def test_adapters_over_a_packed_base_have_the_shapes_of_its_values(rig: LoraRig, evaluated: bool) -> None:
    """The engine holds the base as it was before it was packed, so the two answer alike only as far as that goes."""
    stir(rig.model, seed=1, scale=0.3)
    if evaluated:
        rig.model.eval()
        with torch.no_grad():
            rig.model(input_ids=torch.tensor([[1, 2, 3]]))
    base, before = rig.answers("base"), rig.answers()
    receipt = rig.push(mode="adapter", verify="weights")
    assert receipt.verified == "partial"  # over a base that cannot be compared
    assert any("base weights were not compared" in note for note in receipt.notes)
    effect = apart(rig.answers(), before)
    assert rig.answers("base") == base
    assert effect > 5 * apart(rig.answers(), rig.truth())
