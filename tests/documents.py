"""The documents of the repository as tests read them: their links, anchors, code spans and code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block; `language` is "" where none is given."""

    language: str
    code: str


class Document:
    """One Markdown file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.text = path.read_text(encoding="utf-8")
        self.prose = FENCE.sub("", self.text)
        """The text without its code blocks."""

    def __repr__(self) -> str:
        return self.name

    @property
    def blocks(self) -> list[Block]:
        return [Block(*found) for found in FENCE.findall(self.text)]

    @property
    def spans(self) -> list[str]:
        """Code within the prose."""
        return SPAN.findall(self.prose)

    @property
    def code(self) -> list[str]:
        """All code: spans, and the lines of the blocks."""
        return [*self.spans, *(line for block in self.blocks for line in block.code.splitlines())]

    @cached_property
    def anchors(self) -> frozenset[str]:
        """The anchors of the headings, as GitHub makes them: of headings alike the second has "-1" at its end."""
        seen: dict[str, int] = {}
        found = []
        for heading in HEADING.findall(self.prose):
            slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            count = seen[slug] = seen.get(slug, -1) + 1
            found.append(f"{slug}-{count}" if count else slug)
        return frozenset(found)

    def links(self) -> Iterator[tuple[Path, str]]:
        """(target file, anchor or "") of every link into this repository."""
        for target in LINK.findall(SPAN.sub("", self.prose)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            yield (self.path.parent / file).resolve() if file else self.path, anchor


def documents() -> list[Document]:
    """README, CONTRIBUTING, CHANGELOG and all of docs/."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [Document(path) for path in (*top, *sorted((ROOT / "docs").glob("**/*.md")))]
