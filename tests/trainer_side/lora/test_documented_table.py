"""The capability table in docs/lora.md is the one that the code refuses by."""

from __future__ import annotations

from pathlib import Path

from trainer_side.lora.capability import capability_table


def test_the_documents_print_the_table_of_the_code() -> None:
    page = (Path(__file__).parents[3] / "docs" / "lora.md").read_text(encoding="utf-8")
    head = "<!-- capability table: printed by trainer_side.lora.capability.capability_table() -->\n"
    printed = page.split(head)[1].split("\n<!-- end of the capability table -->")[0]
    assert printed.strip() == capability_table().strip()
