"""Quantised checkpoints of tiny models, as vLLM reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Quantiser = Callable[[str, torch.Tensor], Tensors]


def int8_config(weights: str = "channel", activations: str = "token") -> dict[str, Any]:
    """compressed-tensors W8A8; activations are quantised as they come ("token") or by a calibrated scale ("tensor")."""
    one = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**one, "strategy": weights, "dynamic": False},
        "input_activations": {**one, "strategy": activations, "dynamic": activations == "token"},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


INT8: Mapping[str, Any] = int8_config()


def int8(name: str, weight: torch.Tensor, *, peak: float = 127, whole: bool = False) -> Tensors:
    """One scale per row, or for the `whole` matrix, whose largest value is `peak` scales."""
    values = weight.float()
    scale = (values.abs().amax().reshape(1) if whole else values.abs().amax(1, keepdim=True)) / peak
    return {name: (values / scale).round().clamp(-128, 127).to(torch.int8), f"{name}_scale": scale}


def quantised(model: Any, into: Quantiser) -> Tensors:
    out: Tensors = {}
    for name, parameter in model.named_parameters():
        out.update(into(name, parameter.data) if "_proj.weight" in name else {name: parameter.data.clone()})
    return out


def save(folder: Path, model: Any, how: Mapping[str, Any], tensors: Tensors) -> None:
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
