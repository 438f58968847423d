"""Read a Hugging Face checkpoint folder as `(canonical name, tensor)` pairs; `weighbridge push NAME FOLDER` uses it."""

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
    """Yield every tensor of a checkpoint folder, file by file, memory-mapped where safetensors can.

    The files are those that `from_pretrained` would read: `model.safetensors`, else the ones that
    `model.safetensors.index.json` names, else the only safetensors file (or the only index) of another name. The folder
    and every file's header are checked before this returns; each tensor is read as the iterator advances.

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
            "no such checkpoint folder",
            where=str(root),
            expected="a folder with safetensors",
            got="a file" if root.exists() else "nothing",
            remedy="give the folder of a Hugging Face checkpoint",
        )
    open_file, first = _opener(), _first_file(root)
    expected = _read_index(first) if first.suffix == ".json" else None
    files = [first] if expected is None else [root / name for name in sorted(set(expected.values()))]
    held: dict[Path, list[str]] = {}
    for file in files:
        with open_file(file) as handle:
            held[file] = list(handle.keys())
    _check_unique(held)
    if expected is not None:
        _check_index(first, expected, {name: file.name for file, names in held.items() for name in names})
    return _read(open_file, held)


def _read(open_file: OpenFile, held: Mapping[Path, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    for file, names in held.items():
        with open_file(file) as handle:
            for name in names:
                yield name, handle.get_tensor(name)


def _opener() -> OpenFile:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError(
            "reading checkpoints needs safetensors",
            where="this environment",
            expected="the extra `hf`",
            got=str(error),
            remedy="pip install 'weighbridge[hf]'",
        ) from error

    def open_file(file: Path) -> AbstractContextManager[Any]:
        try:
            handle: AbstractContextManager[Any] = safe_open(file, framework="pt")
        except FileNotFoundError:
            raise NotFound(
                "a file of the checkpoint is not there",
                where=str(file),
                expected="every file that the index names",
                got="no such file",
                remedy="fetch the checkpoint again: the download may have been cut off",
            ) from None
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


def _first_file(root: Path) -> Path:
    """Return the file that holds everything, or the index that names the files."""
    for name in (WHOLE, INDEX):
        if (root / name).is_file():
            return root / name
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        if pattern == "*.safetensors" and (root / ADAPTER).is_file():
            raise ConfigError(
                "this folder holds a LoRA adapter, not a checkpoint",
                where=str(root / ADAPTER),
                expected=f"{WHOLE} or {INDEX}",
                got=ADAPTER,
                remedy="push from the trainer that has the base model bound, or save the merged model",
            )
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            raise ConfigError(
                "several checkpoints in one folder",
                where=str(root),
                expected=f"{WHOLE}, {INDEX} or one file",
                got=", ".join(path.name for path in found[:5]),
                remedy="keep one, or write the index that names its files",
            )
        if found:
            return found[0]
    others = sorted(path.name for path in root.iterdir())[:5]
    raise NotFound(
        "no safetensors in the checkpoint folder",
        where=str(root),
        expected=f"{WHOLE} or {INDEX}",
        got=", ".join(others) or "an empty folder",
        remedy="save it with save_pretrained(...); pickled .bin files are not read",
    )


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor name -> name of the file beside the index that holds it."""
    try:
        weights = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        wrong = [name for name in weights.values() if not isinstance(name, str) or Path(name).name != name]
        got = repr(wrong[0]) if wrong else "" if weights else "an empty weight_map"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
    if got:
        raise ConfigError(
            "the checkpoint's index cannot be read",
            where=str(index),
            expected='JSON with a "weight_map" of tensor names to plain names of files beside the index',
            got=got,
            remedy="fetch or save the checkpoint again",
        )
    return weights


def _check_unique(held: Mapping[Path, list[str]]) -> None:
    counts = Counter(name for names in held.values() for name in names)
    twice = tuple(name for name, count in counts.items() if count > 1)
    if twice:
        raise DuplicateTensor(
            "two files of the checkpoint hold the same tensor",
            where=twice[0],
            expected="each tensor in one file",
            got=" and ".join(file.name for file, names in held.items() if twice[0] in names),
            remedy="remove files that belong to another checkpoint, or save it again",
            names=twice,
        )


def _check_index(index: Path, expected: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Raise MissingTensor or UnexpectedTensor unless every tensor is in the file that the index names for it."""
    absent = [(name, file, there.get(name, "nowhere")) for name, file in expected.items() if there.get(name) != file]
    strange = [(name, "in the index", file) for name, file in there.items() if name not in expected]
    kind: type[BridgeError] = MissingTensor if absent else UnexpectedTensor
    found = absent or strange
    if found:
        name, wanted, got = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise kind(
            "the checkpoint's index names a tensor that its file does not hold"
            if absent
            else "a file of the checkpoint holds a tensor that the index does not name",
            where=f"{name}{more}, {index}",
            expected=wanted,
            got=got,
            remedy="save the checkpoint again",
            names=tuple(entry[0] for entry in found),
        )
