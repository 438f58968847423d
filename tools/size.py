"""Count the lines of code: those without docstrings, comments and blank lines, per room and in total (`make size`)."""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("bridge", "trainer_side", "engine_side")
LAYOUT = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)
"""Tokens that do not make their line a line of code."""


def code_lines(source: str) -> int:
    """Count the lines of `source` that hold code. A string that stands alone as a statement is documentation: all of
    its lines are left out, and so are comments and blank lines. Raises SyntaxError for text that is no Python."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documentation.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - documentation)


def count_rooms(packages: Iterable[str], root: Path = ROOT) -> Counter[str]:
    """Lines of code per room: a package's own modules count under its name, those of a folder inside under
    "package/folder". Raises FileNotFoundError for a package that does not exist."""
    rooms: Counter[str] = Counter()
    for package in packages:
        files = sorted((root / package).rglob("*.py"))
        if not files:
            raise FileNotFoundError(f"no Python files in {root / package}")
        for path in files:
            parts = path.relative_to(root).parts
            rooms["/".join(parts[:2]) if len(parts) > 2 else parts[0]] += code_lines(path.read_text(encoding="utf-8"))
    return rooms


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and return the exit code: 1 when `--max` is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", default=PRODUCT, help="folders to count (default: %(default)s)")
    parser.add_argument("--max", type=int, metavar="LINES", help="exit 1 when the total is larger")
    options = parser.parse_args(argv)
    rooms = count_rooms(options.packages)
    for room, lines in sorted(rooms.items()):
        print(f"{lines:7,} {room}")
    total = sum(rooms.values())
    print(f"{total:7,} total")
    if options.max is not None and total > options.max:
        print(f"{total:,} lines of code; at most {options.max:,} are meant", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
