"""Expressions of strangers: what is refused, in which words, and at which size."""

from __future__ import annotations

import re
import warnings

import pytest

from loftq_cli.checkpoint.patterns import check_expression, finds, first_matches
from loftq_cli.errors import UsageError

EVIL = "(a|aa)+$"
LONG = "a" * 100_001


def test_a_search_that_takes_too_long_is_refused_with_a_remedy():
    with pytest.raises(UsageError, match="takes too long to match") as caught:
        finds(EVIL, "a" * 60 + "b")
    assert caught.value.hint == "a simpler expression"
    assert repr(EVIL) in caught.value.message


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(", "missing ), unterminated subpattern at position 0"),
        ("(?(1)a|b)", "no regular expression in the syntax that is read here"),
        (LONG, "a regular expression of 100001 characters"),
        ("(a{1000}){1000}", "a regular expression that takes too long to match"),
    ],
)
def test_an_expression_is_refused_before_the_first_search(expression, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_expression(expression)


@pytest.mark.parametrize("expression", [LONG[1:], "a{1000}", r"layers\.[0-3]\..*", "[a&&b]"])
def test_what_can_be_searched_for_is_accepted(expression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # [[a] may mean something else in later versions of Python
        check_expression(expression)


def test_matching_says_nothing_of_later_versions_of_python():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_matches({"[a&&c]b": "[a&&c]b"}, ["ab", "&b", "b"]) == {"ab": "[a&&c]b", "&b": "[a&&c]b"}


def test_the_first_expression_that_matches_wins():
    expressions = {"one": r".*\.q", "two": ".*", "three": ".*"}
    assert first_matches(expressions, ["a.q", "a.k"]) == {"a.q": "one", "a.k": "two"}


def test_a_beginning_is_enough_unless_the_whole_name_is_asked_for():
    assert first_matches({"a": "a"}, ["ab", "ba"]) == {"ab": "a"}
    assert first_matches({"a.*b": "a.*b"}, ["abc", "acb"], whole=True) == {"acb": "a.*b"}


@pytest.mark.parametrize(("nchars", "is_read"), [(10_000, True), (10_001, False)])
def test_the_keys_of_an_adapter_have_a_bound(nchars, is_read):
    key = "a" * nchars
    if is_read:
        assert first_matches({key: key}, [key]) == {key: key}
    else:
        with pytest.raises(ValueError, match=f"a regular expression of {nchars} characters"):
            first_matches({key: key}, [key])
