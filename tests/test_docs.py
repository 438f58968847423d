"""The documents say what is there: links, anchors, paths, commands, targets and names exist, and examples compile."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from functools import cache
from itertools import takewhile
from pathlib import Path

import click
import pytest

from bridge.cli import commands
from bridge.config import Config
from bridge.errors import ERRORS_BY_NAME
from bridge.model.levels import LEVELS
from bridge.model.receipt import Receipt
from tests.documents import LINK, ROOT, SPAN, Document, documents

DOCUMENTS = documents()
PRODUCT = ("bridge", "trainer_side", "engine_side")
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=repr)
README = next(document for document in DOCUMENTS if document.name == "README.md")

OUTSIDE = (
    r"\bDESIGN(?:\.md)?\b",
    r"\b(?:transports|house|style|users|cases)\.md\b",
    r"(?<!docs/)\b(?:lora|engines)\.md\b",
    r"(?<![\w/#-])[Ii]ssues? #?\d{1,2}\b",
    r"\.\./shared\b|(?<!\w)shared/|(?<!\w)field/",
)
"""Plans, notes and issue numbers that a reader of this repository does not have. Upstream issues are named with their
project (SGLang #22169), and have more digits."""


@cache
def tracked() -> tuple[str, ...]:
    """Files of the repository, and all folders above them."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split() if listed.returncode == 0 else []
    files = files or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    files = [file for file in files if (ROOT / file).is_file()]
    folders = {str(parent) for file in files for parent in Path(file).parents if str(parent) != "."}
    return (*files, *sorted(folders))


def sources(*folders: str) -> list[Path]:
    return [ROOT / name for name in tracked() if name.endswith(".py") and name.split("/")[0] in folders]


# ---- what is linked and named exists ---------------------------------------------------------------------------------


@each_document
def test_links_and_their_anchors_resolve(document: Document) -> None:
    anchors = {each.path: each.anchors for each in DOCUMENTS}
    broken = []
    for file, anchor in document.links():
        if not file.exists():
            broken.append(f"{file.relative_to(ROOT)} does not exist")
        elif anchor and anchor not in anchors[file]:
            broken.append(f"{file.relative_to(ROOT)} has no heading #{anchor}")
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set(), [README]
    by_path = {document.path: document for document in DOCUMENTS}
    while todo:
        document = todo.pop()
        reached.add(document.path)
        todo += [by_path[file] for file, _ in document.links() if file in by_path and file not in reached]
    assert set(by_path) - reached == set()


def is_path_of_ours(text: str) -> bool:
    """A path below one of the repository's folders, or the name of one file; NAME stands for any name."""
    if not re.fullmatch(r"[\w./*-]+", text):
        return False
    top = {name.split("/")[0] for name in tracked()}
    if "/" in text:
        return text.split("/")[0] in top
    return bool(re.fullmatch(r"[\w.-]+\.(py|md|toml|txt|yaml)", text))


@each_document
def test_paths_exist(document: Document) -> None:
    missing = []
    for text in filter(is_path_of_ours, document.spans):
        pattern = re.sub(r"\bNAME\b", "*", text.rstrip("/"))
        names = tracked() if "/" in text else [name.split("/")[-1] for name in tracked()]
        if not any(fnmatch(name, pattern) for name in names):
            missing.append(text)
    assert missing == []


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Every folder that it shows exists, and every folder of a package is shown."""
    tree = next(block.code for block in README.blocks if block.code.startswith("bridge/"))
    shown: set[str] = set()
    package = ""
    for line in tree.splitlines():
        names = [word.rstrip("/") for word in takewhile(lambda word: word.endswith("/"), line.split())]
        if line.startswith(" "):
            shown |= {f"{package}/{name}" for name in names}
        else:
            package = names[0]
            shown |= set(names)
    folders = {name for name in tracked() if (ROOT / name).is_dir()}
    rooms = {name for name in folders if name.split("/")[0] in PRODUCT and name.count("/") == 1}
    assert shown - folders == set(), "shown, and not there"
    assert rooms - shown == set(), "there, and not shown"


COMMAND = re.compile(r"(?:^|[\s/])(?:weighbridge|python -m bridge) ((?:[^|;&]|\[)*)")


@each_document
def test_commands_and_their_options_exist(document: Document) -> None:
    unknown = []
    for code in document.code:
        for words in (found.split() for found in COMMAND.findall(code)):
            name = words[0] if words else ""
            if not re.fullmatch(r"[a-z]+", name):
                continue
            command = commands.cli.commands.get(name)
            if command is None:
                unknown.append(code)
                continue
            known = {
                option for p in command.params if isinstance(p, click.Option) for option in (*p.opts, *p.secondary_opts)
            }
            options = {word.split("=")[0].strip("[]") for word in words if word.strip("[").startswith("--")}
            unknown += [f"{code}: {option}" for option in sorted(options - known)]
    assert unknown == []


def test_every_command_is_documented() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert [name for name in commands.cli.commands if f"`weighbridge {name}" not in operations] == []


@each_document
def test_make_targets_exist(document: Document) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {name for code in document.code for name in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", code)}
    assert named - targets == set()


@each_document
def test_names_exist(document: Document) -> None:
    """Names in code style that look like those of classes, functions or constants occur in the code, in a dotted path
    as a whole. The changelog also names what is gone."""
    if document.name == "CHANGELOG.md":
        pytest.skip("names what was there before")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources(*PRODUCT, "tests", "tools", "examples"))
    text += (ROOT / "pyproject.toml").read_text(encoding="utf-8") + (ROOT / "Makefile").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", text))
    missing = []
    for span in document.spans:
        span = span.removesuffix("()").split("(")[0]
        if re.fullmatch(r"(?:bridge|trainer_side|engine_side)(?:\.\w+)+", span):
            parts = span.split(".")
            folder = "/".join(parts[:-1])
            known = {f"{'/'.join(parts)}.py", f"{'/'.join(parts)}/__init__.py", f"{folder}.py", f"{folder}/__init__.py"}
            if not known & set(tracked()) or not set(parts) <= words | {Path(name).stem for name in tracked()}:
                missing.append(span)
        elif re.fullmatch(r"(?:[A-Z][a-z0-9]+){2,}|[A-Za-z]{2,}(?:_[A-Za-z0-9]+)+", span) and span not in words:
            missing += [] if span.startswith("WEIGHBRIDGE_") else [span]  # settings have a test of their own
    assert missing == []


# ---- what the code can do is documented ------------------------------------------------------------------------------


def test_every_setting_is_documented_and_no_other() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`(WEIGHBRIDGE_\w+)`", operations))
    fields = {f"WEIGHBRIDGE_{name.upper()}" for name in Config.__struct_fields__}
    assert fields - documented == set()
    read = {name for path in sources("bridge") for name in re.findall(r"WEIGHBRIDGE_[A-Z_]+\b", path.read_text())}
    assert documented - fields - read == set()


def test_every_level_error_and_receipt_field_is_documented() -> None:
    guarantees = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    assert [level for level in LEVELS if f"\n| {level} |" not in guarantees] == []
    for name, error in ERRORS_BY_NAME.items():
        if name == "BridgeError":
            continue
        row = next(
            line
            for line in guarantees.splitlines()
            if line.startswith("|") and f"`{name}`" in line and line[2].isdigit()
        )
        assert row.startswith(f"| {error.exit_code} |"), name
    spans = {span for document in DOCUMENTS if document.name == "docs/guarantees.md" for span in document.spans}
    assert set(Receipt.__struct_fields__) - {"at"} - spans == set()


def test_the_readme_names_the_extras() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = re.search(r"\(extras: ([^)]*)\)", README.text)
    assert named is not None
    assert set(SPAN.findall(named[1])) == set(extras)


def test_the_readme_is_short() -> None:
    assert len(README.text.splitlines()) <= 250


@each_document
def test_python_blocks_compile(document: Document) -> None:
    for block in document.blocks:
        if block.language == "python":
            compile(block.code, document.name, "exec")


# ---- nothing refers to what a reader does not have -------------------------------------------------------------------


def references(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if any(re.search(pattern, line) for pattern in OUTSIDE)]


@each_document
def test_documents_refer_to_nothing_outside(document: Document) -> None:
    text = LINK.sub("", document.text)  # links into the repository have a test of their own
    assert references(text) == []


@pytest.mark.parametrize("folder", [*PRODUCT, "examples", "tools", "tests"])
def test_code_refers_to_nothing_outside(folder: str) -> None:
    files = [path for path in sources(folder) if path != Path(__file__)]
    found = {str(path.relative_to(ROOT)): references(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


# ---- the targets of the Makefile -------------------------------------------------------------------------------------


def test_a_commit_is_checked_by_what_ci_runs() -> None:
    """The hook is the very target, so that the two lists of tools cannot differ; nothing is fetched from anywhere."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^\s*entry: (.*)$", hooks, re.MULTILINE) == ["make lint"]
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    assert re.search(r"^make lint$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(r"^make wheel-demo$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
