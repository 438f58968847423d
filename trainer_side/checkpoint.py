"""A Hugging Face checkpoint folder as `(canonical name, tensor)` pairs: what `weighbridge push NAME FOLDER` sends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from bridge.errors import BridgeError, ConfigError, DuplicateTensor, MissingTensor, NotFound, UnexpectedTensor

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"

OpenFile = Callable[[Path], AbstractContextManager[Any]]


def named_tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint folder, file by file, memory-mapped where safetensors can.

    Read is what `from_pretrained` would read: `model.safetensors`, else the files that `model.safetensors.index.json`
    names, else the only safetensors file (or the only index) of another name. The folder and every file's header are
    checked before this returns; tensors are read as the iterator advances, and each lives on its own.

    Raises:
        NotFound: no such folder, no safetensors in it, or a file that the index names is not there.
        ConfigError: the safetensors package is not installed, the folder holds a LoRA adapter only or several
            checkpoints, an index or a file cannot be read.
        MissingTensor, UnexpectedTensor: the index and the files disagree.
        DuplicateTensor: two files hold a tensor of one name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotFound(
            "no such checkpoint folder", where=str(root), remedy="give the folder of a Hugging Face checkpoint"
        )
    opener = _opener()
    index = _index_file(root)
    if index is not None:
        expected = _read_index(index)
        files = [root / name for name in sorted(set(expected.values()))]
    else:
        expected = None
        files = [_only_file(root)]
    held = {file: _names(opener, file) for file in files}
    _check_unique(held)
    if expected is not None:
        _check_index(index or root, expected, held)
    return _read(opener, held)


def _read(opener: OpenFile, held: Mapping[Path, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    for file, names in held.items():
        with opener(file) as handle:
            for name in names:
                yield name, handle.get_tensor(name)


def _opener() -> OpenFile:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError("reading checkpoints needs safetensors", remedy="pip install 'weighbridge[hf]'") from error

    def open_file(file: Path) -> AbstractContextManager[Any]:
        try:
            handle: AbstractContextManager[Any] = safe_open(file, framework="pt")
        except FileNotFoundError:
            raise NotFound("a file of the checkpoint is not there", where=str(file)) from None
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                "a checkpoint file cannot be read",
                where=str(file),
                expected="a safetensors file",
                got=str(error),
                remedy="fetch or save it again: it may have been cut off",
            ) from error
        return handle

    return open_file


def _index_file(root: Path) -> Path | None:
    """The index to follow, or None when one file holds everything."""
    if (root / WHOLE).is_file():
        return None
    if (root / INDEX).is_file():
        return root / INDEX
    return _only(root, sorted(root.glob("*.safetensors.index.json")))


def _only_file(root: Path) -> Path:
    if (root / WHOLE).is_file():
        return root / WHOLE
    if (root / ADAPTER).is_file():
        raise ConfigError(
            "this folder holds a LoRA adapter, not a checkpoint",
            where=str(root / ADAPTER),
            expected=f"{WHOLE} or {INDEX}",
            remedy="push from the trainer that has the base model bound, or save the merged model",
        )
    file = _only(root, sorted(root.glob("*.safetensors")))
    if file is None:
        others = sorted(path.name for path in root.iterdir())[:5]
        raise NotFound(
            "no safetensors in the checkpoint folder",
            where=str(root),
            expected=f"{WHOLE} or {INDEX}",
            got=", ".join(others) or "an empty folder",
            remedy="save it with save_pretrained(...); pickled .bin files are not read",
        )
    return file


def _only(root: Path, found: list[Path]) -> Path | None:
    if len(found) > 1:
        raise ConfigError(
            "several checkpoints in one folder",
            where=str(root),
            expected=f"{WHOLE}, {INDEX} or one file",
            got=", ".join(path.name for path in found[:5]),
            remedy="keep one, or write the index that names its files",
        )
    return found[0] if found else None


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, plain names of files beside the index."""
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wrong = [name for name in weights.values() if not isinstance(name, str) or Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            "the checkpoint's index cannot be read",
            where=str(index),
            expected='JSON with a "weight_map" of tensor names to file names',
            got=f"{type(error).__name__}: {error}",
        ) from error
    if wrong or not weights:
        raise ConfigError(
            "the checkpoint's index does not name files of its folder",
            where=str(index),
            expected="plain file names beside the index",
            got=repr(wrong[0]) if wrong else "an empty weight_map",
        )
    return dict(weights)


def _names(opener: OpenFile, file: Path) -> list[str]:
    with opener(file) as handle:
        return list(handle.keys())


def _check_unique(held: Mapping[Path, list[str]]) -> None:
    counts = Counter(name for names in held.values() for name in names)
    twice = tuple(name for name, count in counts.items() if count > 1)
    if twice:
        files = [file.name for file, names in held.items() if twice[0] in names]
        raise DuplicateTensor(
            "two files of the checkpoint hold the same tensor", where=twice[0], got=" and ".join(files), names=twice
        )


def _check_index(index: Path, expected: Mapping[str, str], held: Mapping[Path, list[str]]) -> None:
    there = {name: file.name for file, names in held.items() for name in names}
    _refuse(
        MissingTensor,
        "the checkpoint's index names a tensor that its file does not hold",
        [(name, file, there.get(name, "nowhere")) for name, file in expected.items() if there.get(name) != file],
        index,
    )
    _refuse(
        UnexpectedTensor,
        "a file of the checkpoint holds a tensor that the index does not name",
        [(name, "in the index", file) for name, file in there.items() if name not in expected],
        index,
    )


def _refuse(kind: type[BridgeError], what: str, found: list[tuple[str, str, str]], index: Path) -> None:
    if not found:
        return
    name, expected, got = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise kind(
        what, where=f"{name}{more}, {index}", expected=expected, got=got, remedy="save the checkpoint again",
        names=tuple(entry[0] for entry in found),
    )  # fmt: skip
