"""Which errors the source can raise, and a block in which one of them is provoked on purpose.

A key is "file: what" as the source has it, with {} for what is only known when it is raised. Several places of a file
that say the same are one key: they have one remedy.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from bridge.errors import ERRORS_BY_NAME, REPORT, BridgeError

ROOT = Path(__file__).parents[2]
ROOMS = ("bridge", "trainer_side", "engine_side")
ERRORS = "bridge/errors.py"


@cache
def catalogue() -> Mapping[str, tuple[ast.Call, ...]]:
    """Collect every construction of an error of our tree in the source, by key."""
    found: dict[str, list[ast.Call]] = {}
    for file in sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        where = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text())) if where != ERRORS else ():
            if isinstance(node, ast.Call) and _is_construction(node):
                found.setdefault(f"{where}: {_template(node.args[0])}", []).append(node)
    return {key: tuple(calls) for key, calls in found.items()}


def _is_construction(call: ast.Call) -> bool:
    """True for a call of a class of our tree, by name or, where it is chosen at run time, as `kind`."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    return name in ERRORS_BY_NAME or (name == "kind" and bool(call.keywords))


def _template(what: ast.expr) -> str:
    """The text of a message, with {} for every part that is computed."""
    if isinstance(what, ast.Constant):
        return str(what.value)
    if isinstance(what, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in what.values)
    return "{}"


def facts_of(call: ast.Call) -> dict[str | None, str]:
    """The keyword arguments of a construction as source text; None stands for `**facts`."""
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def to_report(key: str) -> bool:
    """True when every construction of this key says that it is a fault of ours: no user's action leads there."""
    return all(facts_of(call).get("remedy") == "REPORT" for call in catalogue()[key])


@contextmanager
def constructions() -> Iterator[list[tuple[str, str]]]:
    """Note (file, what) of every error that is made inside, in whatever thread of this process."""
    made: list[tuple[str, str]] = []
    init = BridgeError.__init__

    def noted(self: BridgeError, what: str, **facts: Any) -> None:
        init(self, what, **facts)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.endswith(ERRORS):
            frame = frame.f_back
        if frame is not None:
            file = Path(frame.f_code.co_filename)
            made.append((str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file), what))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BridgeError, "__init__", noted)
        yield made


@contextmanager
def provoked(kind: type[BridgeError], key: str, *words: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Inside, exactly this error is raised: made where the key says, complete, and with these words in its remedy.

    The test goes on by doing what the remedy says.
    """
    assert key in catalogue(), f"no such error any more: {key}"
    file, _, template = key.partition(": ")
    with constructions() as made, pytest.raises(BridgeError) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    pattern = re.escape(template).replace(re.escape("{}"), ".*")
    here = [what for where, what in made if where == file and re.fullmatch(pattern, what, re.DOTALL)]
    assert here, f"{error}\nwas not made in {file}, but here: {made}"
    assert any(what in error.what for what in here) or error.__cause__ is not None, error
    assert error.facts().keys() == {"where", "expected", "got", "remedy"}, f"incomplete: {error}"
    assert all(value.strip() for value in error.facts().values()), f"empty: {error}"
    assert error.remedy != REPORT, error
    missing = [word for word in words if word not in str(error.remedy)]
    assert not missing, f"{missing} not in the remedy: {error}"


def keys_in(test: Path) -> frozenset[str]:
    """Collect the keys that a test file spells out; f-strings may hold constants of the file."""
    tree = ast.parse(test.read_text())
    texts = {text for node in tree.body if isinstance(node, ast.Assign) for text in _assigned(node)}
    known = dict(texts)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.add("".join(_text(part, known) for part in node.values))
    return frozenset(found & catalogue().keys())


def _assigned(node: ast.Assign) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of `A = "..."` and of `A, B = "...", "..."`."""
    target, value = node.targets[0], node.value
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    values = value.elts if isinstance(value, ast.Tuple) else [value]
    for name, each in zip(names, values, strict=False):
        if isinstance(name, ast.Name) and isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield name.id, each.value


def _text(part: ast.expr, known: Mapping[str, str]) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    held = part.value if isinstance(part, ast.FormattedValue) else part
    return known.get(held.id, "?") if isinstance(held, ast.Name) else "?"
