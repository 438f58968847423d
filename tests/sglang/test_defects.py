"""Updates of SGLang's own that fail or lie, and ours beside them on the same engine or the same classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import MissingTensor, NonFinite, ShapeMismatch, UnexpectedTensor
from tests.families import make_model, perturb
from tests.rigs import Rigs, one_version

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def rig(rigs: Rigs) -> Iterator[Any]:
    yield from one_version(rigs, "qwen2")


def tensors(rig: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.detach().clone()) for name, parameter in rig.model.named_parameters()]


def refused(rig: Any, error: type[Exception], sent: list[tuple[str, torch.Tensor]], match: str) -> None:
    """Ours raises, names the tensor, and has written nothing."""
    before, said = rig.inside("bits"), rig.said()
    with pytest.raises(error, match=match):
        rig.b.push(sent)
    assert rig.inside("bits") == before
    assert rig.said() == said


def test_a_part_of_the_tensors(rig: Any) -> None:
    rig.step()
    part = tensors(rig)[:5]
    refused(rig, MissingTensor, part, "model")
    assert rig.own_update(part)[0] is True
    assert rig.off() > 0.06, "SGLang reports success over a model that is half of each"


def test_a_value_that_is_not_a_number(rig: Any) -> None:
    rig.step()
    sent = tensors(rig)
    name, value = next((n, t) for n, t in sent if n.endswith("layers.1.mlp.down_proj.weight"))
    value[0, 0] = float("nan")
    refused(rig, NonFinite, sent, "layers.1.mlp.down_proj")
    assert rig.own_update([(name, value)])[0] is True
    values = [x for row in rig.said() for x in row]
    assert any(x != x for x in values), "SGLang reports success and serves NaN"


def test_a_name_that_the_engine_does_not_know(rig: Any) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    old = rig.inside("bits")[name]
    rig.step()
    sent = tensors(rig)
    renamed = [(n.replace("layers.1.mlp.down_proj", "layers.1.mlp.dawn_proj"), t) for n, t in sent]
    refused(rig, UnexpectedTensor, renamed, "dawn_proj")
    assert rig.own_update(renamed)[0] is True
    assert rig.inside("bits")[name] == old, "SGLang reports success and keeps an old tensor"


def test_a_shape_error_in_the_middle(rig: Any, tmp_path: Path) -> None:
    """SGLang's loader raises with half of the tensors written, and the error ends its scheduler: on a model beside. A
    tensor that lacks columns it does not even notice on CPU: it fills up with zeros."""
    rig.step()
    sent = tensors(rig)
    at = next(k for k, (n, _) in enumerate(sent) if n.endswith("layers.1.mlp.down_proj.weight"))
    sent[at] = (sent[at][0], sent[at][1][:, :-8].contiguous())
    refused(rig, ShapeMismatch, sent, "layers.1.mlp.down_proj")
    rig.model.save_pretrained(tmp_path)
    found = rig.inside("workshop", job="shape_error_in_the_middle", folder=str(tmp_path))
    assert "error" not in found, found["error"]
    assert found["raised"]
    assert found["raised changed"] > 0
    assert found["filled up"] == ""
    assert found["filled up changed"] > 0
    for refusal, bad in zip(found["ours"], found["bad"], strict=True):
        assert refusal.startswith("ShapeMismatch")
        assert bad in refusal
    assert found["ours untouched"]


def test_experts_below_a_lora_wrapper(rig: Any, tmp_path: Path) -> None:
    make_model("qwen3-moe").save_pretrained(tmp_path)
    found = rig.inside("workshop", job="experts_below_a_wrapper", folder=str(tmp_path))
    assert found == {"before": True, "own": "", "own stale": True, "ours": "", "ours right": True}


def test_block_scales_that_a_model_class_drops(rig: Any, tmp_path: Path) -> None:
    """SGLang's Llama renames them to what it has no parameter for, with and without a wrapper, and says nothing."""
    block_fp8(tmp_path, "llama")
    found = rig.inside("workshop", job="scales_below_a_wrapper", folder=str(tmp_path))
    assert found["before"] == [True, False]
    assert (found["own"], found["own right"]) == ("", [True, False])
    assert "q_proj.weight_scale_inv" in found["ours"] or "k_proj.weight_scale_inv" in found["ours"]


def test_block_scales_below_a_lora_wrapper(rig: Any, tmp_path: Path) -> None:
    block_fp8(tmp_path, "qwen2")
    found = rig.inside("workshop", job="scales_below_a_wrapper", folder=str(tmp_path))
    assert found == {
        "before": [True, True], "own": "", "own right": [True, False], "ours": "", "ours right": [True, True],
    }  # fmt: skip


def test_values_become_the_block_codes_of_real_layers(rig: Any, tmp_path: Path) -> None:
    block_fp8(tmp_path / "first", "qwen2")
    block_fp8(tmp_path / "second", "qwen2", seed=3)
    (tmp_path / "second" / "values.safetensors").rename(tmp_path / "values.safetensors")
    found = rig.inside("workshop", job="values_for_block_codes", folder=str(tmp_path))
    assert found.pop("before", 0) > 0, found
    assert found == {"ours": "", "differ": [], "part": ""}


def test_values_are_quantised_as_real_layers_quantise_their_own(rig: Any, tmp_path: Path) -> None:
    model = make_model("qwen2")
    model.save_pretrained(tmp_path / "first")
    perturb(model, 3)
    model.save_pretrained(tmp_path / "second")
    found = rig.inside("workshop", job="values_for_layers_that_quantise_them", folder=str(tmp_path))
    assert found.pop("before", 0) > 0, found
    assert found == {"codes": "torch.float8_e4m3fn", "ours": "", "differ": []}


def block_fp8(folder: Path, family: str, seed: int | None = None) -> None:
    """A checkpoint whose projections are fp8 codes with a scale per block of 128 x 128; with a seed also its values."""
    from safetensors.torch import load_file, save_file

    model = make_model(family, num_key_value_heads=4)
    if seed is not None:
        perturb(model, seed)
    model.save_pretrained(folder)
    if seed is not None:
        save_file(load_file(folder / "model.safetensors"), folder / "values.safetensors")
    out: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            out[name] = tensor
            continue
        rows, columns = (n // 128 for n in tensor.shape)
        tiles = tensor.float().reshape(rows, 128, columns, 128)
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        out[name] = codes.reshape(tensor.shape)
        out[f"{name}_scale_inv"] = scale
    save_file(out, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
