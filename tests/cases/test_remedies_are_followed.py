"""Every error that the source can raise: complete, and its remedy followed by a test, or the reason why it is not."""

from __future__ import annotations

import ast

import pytest

from tests.cases.raised import ROOT, catalogue, facts_of, keys_in, to_report
from tests.cases.unfollowed import FOLLOWED_BY, NOT_YET, UNCAUSED

FACTS = {"where", "expected", "got", "remedy"}


def followed() -> frozenset[str]:
    """The keys that the tests beside this one provoke."""
    files = [file for file in (ROOT / "tests" / "cases").glob("test_remedies_*.py") if file.name != __file__]
    return frozenset().union(*map(keys_in, files))


def test_every_error_says_where_what_was_expected_what_came_and_what_to_do() -> None:
    incomplete = {
        key: FACTS - facts_of(call).keys()
        for key, calls in catalogue().items()
        for call in calls
        if not facts_of(call).keys() >= FACTS and None not in facts_of(call)
    }
    assert incomplete == {}


def test_every_error_is_followed_or_stands_in_one_list() -> None:
    uncaused = [key for keys in UNCAUSED.values() for key in keys]
    lists = [*followed(), *uncaused, *FOLLOWED_BY, *NOT_YET]
    twice = sorted({key for key in lists if lists.count(key) > 1})
    assert twice == [], "in two lists, or followed by now"
    assert sorted(set(lists) - catalogue().keys()) == [], "no such error any more"
    reported = {key for key in catalogue() if to_report(key)}
    assert sorted(reported & set(lists)) == [], "its remedy is to report it"
    assert sorted(catalogue().keys() - set(lists) - reported) == [], (
        "a new error: follow its remedy in tests/cases/test_remedies_*.py"
    )


def test_nothing_is_put_off() -> None:
    assert len(NOT_YET) <= 64, "follow the remedy instead, then lower the number"


@pytest.mark.parametrize("test", sorted(set(FOLLOWED_BY.values())))
def test_what_is_followed_elsewhere_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    functions = ast.walk(ast.parse((ROOT / path).read_text()))
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}
