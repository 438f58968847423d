"""The capability table of the README is the one that the code refuses by."""

from __future__ import annotations

from pathlib import Path

from trainer_side.lora.capability import capability_table


def test_the_readme_prints_the_table() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    head = "<!-- capability table: printed by trainer_side.lora.capability.capability_table() -->\n"
    printed = readme.split(head)[1].split("\n<!-- end of the capability table -->")[0]
    assert printed.strip() == capability_table().strip()
