"""The engine's first weights: read from a checkpoint folder, or reproducible noise."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from bridge.errors import ConfigError, IntegrityError, MissingTensor, NotFound
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.weights import located

_DUMMY_SCALE = 1e-3


def checkpoint_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, CPU tensor) of every tensor in the folder's safetensors files, one at a time. Raises NotFound, or
    ConfigError without safetensors."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ConfigError("reading a checkpoint needs safetensors", remedy="pip install 'weighbridge[hf]'") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "save it with save_pretrained, or start with load='dummy'"
        raise NotFound("no safetensors in the checkpoint folder", where=str(folder), remedy=remedy)
    for path in files:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)


def load_checkpoint(model: CausalLM, folder: Path) -> None:
    """Fill `model` from `folder`. Raises MissingTensor, naming the tensors that the checkpoint lacks, and the errors of
    `load_weights`, with the folder in front."""
    try:
        loaded = model.load_weights(checkpoint_weights(folder))
    except IntegrityError as error:
        raise located(error, f"{folder}: {error.where}") from error
    missing = tuple(name for name in model.checkpoint_names() if name not in loaded)
    if missing:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise MissingTensor(
            "the checkpoint lacks tensors of its own architecture",
            where=str(folder),
            expected=some,
            got=f"{len(missing)} missing",
            remedy="save the checkpoint again with save_pretrained, or download it anew",
            names=missing,
        )


@torch.no_grad()
def load_dummy(model: nn.Module) -> None:
    """Fill `model` with small uniform noise, the same for the same parameter path on every start."""
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.empty(param.shape, dtype=torch.float32).uniform_(-1.0, 1.0, generator=generator)
        param.copy_(noise * _DUMMY_SCALE)
