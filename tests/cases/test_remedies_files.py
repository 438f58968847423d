"""Checkpoint folders and embedded engines that do not start: each remedy is followed, and ends in a served push."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bridge
from bridge.errors import ConfigError, DuplicateTensor, MissingTensor, NotFound
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.cases.raised import provoked
from tests.conftest import tiny_qwen2, tiny_qwen3_moe
from tests.engine_side import embedded_models as tiny
from tests.push.rig import Rig
from trainer_side.checkpoint import ADAPTER, INDEX, WHOLE, named_tensors

READER, CONFIG = "trainer_side/checkpoint.py", "engine_side/embedded/config.py"
EMBEDDED, RUNNER = "engine_side/embedded", "engine_side/embedded/runner.py"
MANAGER = "engine_side/embedded/lora/manager.py"


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(tiny_qwen2())


def pushes(folder: Path, rig: Rig) -> None:
    """The folder is read, and what it holds is served."""
    assert rig.b.push(named_tensors(folder), verify="weights").verified is True
    assert rig.serves(tiny_qwen2())


def test_folders(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tiny_qwen2())
    broken = tmp_path / "broken"
    try:
        with provoked(NotFound, f"{READER}: no such checkpoint folder", "folder"):
            dict(named_tensors(broken))
        broken.mkdir()
        with provoked(NotFound, f"{READER}: no safetensors in the checkpoint folder", "save_pretrained"):
            dict(named_tensors(broken))
        save_file({"a": torch.zeros(1)}, broken / ADAPTER)
        with provoked(ConfigError, f"{READER}: this folder holds a LoRA adapter, not a checkpoint", "save the merged"):
            dict(named_tensors(broken))
        (broken / ADAPTER).unlink()
        for name in ("one.safetensors", "two.safetensors"):
            shutil.copy(folder / WHOLE, broken / name)
        with provoked(ConfigError, f"{READER}: several checkpoints in one folder", "keep one"):
            dict(named_tensors(broken))
        (broken / "two.safetensors").unlink()
        pushes(broken, rig)
        (broken / "one.safetensors").write_bytes((folder / WHOLE).read_bytes()[:200])
        with provoked(ConfigError, f"{READER}: a checkpoint file cannot be read", "save it again"):
            dict(named_tensors(broken))
        tiny_qwen2().save_pretrained(broken)
        pushes(broken, rig)
    finally:
        rig.close()


def test_indices(folder: Path, tmp_path: Path) -> None:
    rig = Rig(folder, tiny_qwen2())
    whole = load_file(folder / WHOLE)
    files = {"a.safetensors": dict(list(whole.items())[:5]), "b.safetensors": dict(list(whole.items())[5:])}
    weight_map = {name: file for file, held in files.items() for name in held}

    def write(weights: Any) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}) if weights is not None else "no JSON")

    try:
        for file, held in files.items():
            save_file(held, tmp_path / file)
        for wrong in (None, {}, {"x": "../x"}):
            write(wrong)
            with provoked(ConfigError, f"{READER}: the checkpoint's index cannot be read", "again"):
                dict(named_tensors(tmp_path))
        write({**weight_map, "x": "c.safetensors"})
        with provoked(NotFound, f"{READER}: a file of the checkpoint is not there", "fetch"):
            dict(named_tensors(tmp_path))
        save_file(dict(list(whole.items())[:2]), tmp_path / "c.safetensors")
        write({**weight_map, next(iter(whole)): "c.safetensors"})
        with provoked(DuplicateTensor, f"{READER}: two files of the checkpoint hold the same tensor", "remove"):
            dict(named_tensors(tmp_path))
        (tmp_path / "c.safetensors").unlink()
        write(weight_map)
        pushes(tmp_path, rig)
    finally:
        rig.close()


# ---- an embedded engine ---------------------------------------------------------------------------------------------


def starts(folder: Path, model: Any, **options: Any) -> None:
    """The engine starts and serves what is pushed into it."""
    rig = Rig(folder, model, **options)
    try:
        rig.good_push()
    finally:
        rig.close()


@pytest.mark.parametrize(
    ("wrong", "key", "right"),
    [
        ({"threads": 0}, f"{CONFIG}: an engine option does not fit", {}),
        ({"layout": "scrambled"}, f"{CONFIG}: an engine option does not fit", {}),
        ({"lora_targets": ("q_proj",)}, f"{CONFIG}: lora_targets without room for a LoRA", {"max_loras": 2}),
        ({"max_seq_len": 4096}, f"{CONFIG}: longer than the model's positions", {"max_seq_len": 256}),
        ({"num_blocks": 1}, f"{CONFIG}: too few KV blocks for one sequence", {"num_blocks": 40}),
    ],
)
def test_engine_options(folder: Path, wrong: dict[str, Any], key: str, right: dict[str, Any]) -> None:
    with provoked(ConfigError, key):
        Engine(EngineConfig(str(folder), **wrong))
    starts(folder, tiny_qwen2(), **({**wrong, **right} if right else {}))


def test_lora_targets_of_an_engine(folder: Path) -> None:
    with provoked(ConfigError, f"{MANAGER}: a LoRA target matches no module of this model", "dotted segments"):
        Engine(EngineConfig(str(folder), max_loras=2, lora_targets=("z_proj",)))
    with provoked(ConfigError, f"{MANAGER}: a module of lora_targets cannot carry LoRA", "take it out"):
        Engine(EngineConfig(str(folder), max_loras=2, lora_targets=("q_proj", "norm")))
    starts(folder, tiny_qwen2(), max_loras=2, lora_targets=("q_proj",))


def test_a_size_that_does_not_divide(folder: Path) -> None:
    key = "engine_side/embedded/parallel.py: {} cannot be divided over the tensor-parallel ranks"
    with provoked(ConfigError, key, "tensor_parallel_size"):
        Engine(EngineConfig(str(folder), tensor_parallel_size=3, timeout_s=20.0))
    starts(folder, tiny_qwen2())


def changed(folder: Path, tmp_path: Path, **fields: Any) -> Path:
    """A copy of the checkpoint whose config.json has other fields."""
    made = tmp_path / "changed"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(folder, made)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, **fields}))
    return made


@pytest.mark.parametrize(
    ("fields", "key", "word"),
    [
        (
            {"architectures": ["Gpt9"]},
            f"{EMBEDDED}/decoder.py: the embedded engine does not know this architecture",
            "vLLM",
        ),
        (
            {"hidden_size": "many"},
            f"{EMBEDDED}/config.py: config.json does not describe a supported model",
            "save_pretrained",
        ),
        ({"rope_parameters": {"rope_type": "spiral"}}, f"{EMBEDDED}/config.py: unsupported rope type", "vLLM"),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            f"{EMBEDDED}/config.py: rope type {{}} lacks fields",
            "save_pretrained",
        ),
        ({"hidden_act": "sine"}, f"{EMBEDDED}/moe.py: unsupported activation", "vLLM"),
        (
            {"sliding_window": 16, "layer_types": ["sliding_attention"] * 2},
            f"{EMBEDDED}/config.py: sliding-window attention is not supported",
            "max_seq_len",
        ),
        ({"quantization_config": {"quant_method": "magic"}}, f"{EMBEDDED}/quant.py: unsupported quantisation", "bf16"),
    ],
)
def test_configurations(folder: Path, tmp_path: Path, fields: dict[str, Any], key: str, word: str) -> None:
    """Another engine, or the configuration that save_pretrained writes."""
    with provoked(ConfigError, key, word):
        Engine(EngineConfig(str(changed(folder, tmp_path, **fields))))
    starts(changed(folder, tmp_path), tiny_qwen2())


def test_a_window_that_is_never_full(folder: Path, tmp_path: Path) -> None:
    windowed = changed(folder, tmp_path, sliding_window=64, layer_types=["sliding_attention"] * 2)
    with pytest.raises(ConfigError, match="set max_seq_len to the window or below"):
        Engine(EngineConfig(str(windowed)))
    starts(windowed, tiny_qwen2(), max_seq_len=64)


def test_routings(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_qwen3_moe()
    folder = checkpoint(model)
    with provoked(ConfigError, f"{EMBEDDED}/moe.py: a token cannot use so many experts", "config.json"):
        Engine(EngineConfig(str(changed(folder, tmp_path, num_experts_per_tok=9))))
    starts(changed(folder, tmp_path), model)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"topk_method": "dice"}, f"{EMBEDDED}/decoder.py: unknown routing"),
        ({"moe_layer_freq": 2}, f"{EMBEDDED}/decoder.py: unsupported spacing of sparse layers"),
        ({"n_group": 3}, f"{EMBEDDED}/moe.py: the experts cannot be grouped so"),
    ],
)
def test_latent_models(tmp_path: Path, fields: dict[str, Any], key: str) -> None:
    model = tiny.make_model("deepseek-v2")
    model.save_pretrained(tmp_path / "saved")
    with provoked(ConfigError, key, "vLLM" if "decoder" in key else "config.json"):
        Engine(EngineConfig(str(changed(tmp_path / "saved", tmp_path, **fields))))
    with (
        Engine(EngineConfig(str(changed(tmp_path / "saved", tmp_path)))) as engine,
        bridge.attach(engine, model=model) as b,
    ):
        assert b.push(model.named_parameters(), verify="weights").verified is True


def test_checkpoints_of_an_engine(folder: Path, tmp_path: Path) -> None:
    made = changed(folder, tmp_path)
    (made / "config.json").write_text("no JSON")
    with provoked(ConfigError, f"{CONFIG}: config.json is not JSON", "save_pretrained"):
        Engine(EngineConfig(str(made)))
    (made / "config.json").unlink()
    with provoked(NotFound, f"{CONFIG}: no config.json in the checkpoint folder", "folder of a Hugging Face"):
        Engine(EngineConfig(str(made)))
    made = changed(folder, tmp_path)
    (made / WHOLE).rename(tmp_path / "kept")
    with provoked(NotFound, f"{RUNNER}: no safetensors in the checkpoint folder"):
        Engine(EngineConfig(str(made)))
    save_file(dict(list(load_file(tmp_path / "kept").items())[:5]), made / WHOLE)
    with provoked(MissingTensor, f"{RUNNER}: the checkpoint lacks tensors of its own architecture", "save_pretrained"):
        Engine(EngineConfig(str(made)))
    tiny_qwen2().save_pretrained(made)
    starts(made, tiny_qwen2())
