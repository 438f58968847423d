"""A checkpoint folder as named tensors: what `from_pretrained` would read, all of it, or an error that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bridge.errors import BridgeError, ConfigError, DuplicateTensor, MissingTensor, NotFound, UnexpectedTensor
from tests.conftest import tiny_qwen2
from trainer_side.checkpoint import INDEX, WHOLE, named_tensors

A = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
B = torch.tensor([1.0, -0.0, 3.0])
C = torch.tensor(7, dtype=torch.int64)


def _sharded(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    save_file({"a": A, "b": B}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": C}, folder / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weights = {"a": first, "b": first, "c": second} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        t.dtype == expected[n].dtype and torch.equal(t, expected[n]) for n, t in found.items()
    )


def test_one_file(tmp_path: Path) -> None:
    save_file({"a": A, "b": B, "c": C}, tmp_path / WHOLE)
    assert _same(dict(named_tensors(tmp_path)), {"a": A, "b": B, "c": C})


def test_shards(tmp_path: Path) -> None:
    _sharded(tmp_path)
    assert _same(dict(named_tensors(str(tmp_path))), {"a": A, "b": B, "c": C})


def test_one_file_goes_before_an_index_as_in_from_pretrained(tmp_path: Path) -> None:
    _sharded(tmp_path)
    save_file({"a": A}, tmp_path / WHOLE)
    assert _same(dict(named_tensors(tmp_path)), {"a": A})


def test_what_save_pretrained_wrote(tmp_path: Path) -> None:
    model = tiny_qwen2(tied=False)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).is_file()
    assert _same(dict(named_tensors(tmp_path)), dict(model.named_parameters()))


def test_tensors_outlive_the_iterator(tmp_path: Path) -> None:
    _sharded(tmp_path)
    pairs = list(named_tensors(tmp_path))
    assert torch.equal(pairs[0][1], A)


def _cut(folder: Path) -> None:
    save_file({"a": A}, folder / WHOLE)
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:-3])


def _write_index(folder: Path, text: str) -> None:
    _sharded(folder)
    (folder / INDEX).write_text(text)


def _remap(folder: Path, **changes: str) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weights = {"a": first, "b": first, "c": second, **changes}
    _sharded(folder, {name: file for name, file in weights.items() if file})


def _two(folder: Path) -> None:
    save_file({"a": A}, folder / "one.safetensors")
    save_file({"a": A}, folder / "two.safetensors")


def _twice(folder: Path) -> None:
    _sharded(folder)
    save_file({"a": A, "c": C}, folder / "model-00002-of-00002.safetensors")


CASES = {
    "an empty folder": (lambda f: None, NotFound, "an empty folder"),
    "pickles only": (lambda f: (f / "pytorch_model.bin").touch(), NotFound, "pytorch_model.bin"),
    "an adapter": (lambda f: save_file({"a": A}, f / "adapter_model.safetensors"), ConfigError, "LoRA adapter"),
    "a cut file": (_cut, ConfigError, "cannot be read"),
    "no safetensors file": (lambda f: (f / WHOLE).write_text("hello"), ConfigError, "cannot be read"),
    "two checkpoints": (_two, ConfigError, "one.safetensors, two.safetensors"),
    "an index that is no JSON": (lambda f: _write_index(f, "{"), ConfigError, INDEX),
    "an index without a map": (lambda f: _write_index(f, "[]"), ConfigError, "weight_map"),
    "an index of numbers": (lambda f: _write_index(f, '{"weight_map": {"a": 1}}'), ConfigError, "1"),
    "an empty index": (lambda f: _write_index(f, '{"weight_map": {}}'), ConfigError, "empty"),
    "a file elsewhere": (lambda f: _remap(f, c="../c.safetensors"), ConfigError, "../c.safetensors"),
    "a missing file": (lambda f: _remap(f, c="model-9.safetensors"), NotFound, "model-9.safetensors"),
    "a missing tensor": (lambda f: _remap(f, d="model-00001-of-00002.safetensors"), MissingTensor, "d, "),
    "a tensor in another file": (lambda f: _remap(f, a="model-00002-of-00002.safetensors"), MissingTensor, "a, "),
    "a tensor that nobody names": (lambda f: _remap(f, b=""), UnexpectedTensor, "b, "),
    "a tensor in two files": (_twice, DuplicateTensor, "a"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_folders_are_refused_before_anything_is_read(case: str, tmp_path: Path) -> None:
    prepare, kind, words = CASES[case]
    prepare(tmp_path)
    with pytest.raises(BridgeError) as caught:
        named_tensors(tmp_path)
    assert type(caught.value) is kind
    assert words in str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such checkpoint folder"):
        named_tensors(tmp_path / "nowhere")
