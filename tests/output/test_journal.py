"""A journal is believed line by line, up to the first one that is torn, foreign or out of place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_cli.output.journal import Journal, JournalContents, JournalEntry, by_unit, parse_journal, read_journal

FIRST = JournalEntry("a.weight", "0" * 64, {"a.weight": "1" * 64}, {"error": 0.1})
SECOND = JournalEntry("b.weight", "2" * 64, {"b.weight": "3" * 64}, {})


def line(value: Any) -> bytes:
    """As the format says: sixteen digits of the sha256 of the JSON, a blank, the JSON."""
    text = json.dumps(value).encode()
    return hashlib.sha256(text).hexdigest()[:16].encode() + b" " + text + b"\n"


def written(path: Path, *entries: JournalEntry) -> bytes:
    journal = Journal(path, JournalContents())
    journal.start("options")
    for entry in entries:
        journal.append(entry)
    journal.close()
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = written(tmp_path / "j", FIRST, SECOND)
    assert read_journal(tmp_path / "j") == JournalContents("options", (FIRST, SECOND), nbytes=len(data))


def test_of_a_unit_that_was_made_again_the_last_entry_counts() -> None:
    again = JournalEntry("a.weight", "4" * 64, {}, {})
    assert by_unit([FIRST, SECOND, again]) == {"a.weight": again, "b.weight": SECOND}


def test_a_journal_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "j") == JournalContents()


@pytest.mark.parametrize("kept", range(1, 36, 3))
def test_a_torn_line_ends_the_reading_and_is_written_over(tmp_path: Path, kept: int) -> None:
    whole = written(tmp_path / "j", FIRST)
    (tmp_path / "j").write_bytes(whole + line(["b", "2", {}, {}])[:kept])
    found = read_journal(tmp_path / "j")
    assert (found.entries, found.nbytes) == ((FIRST,), len(whole))
    journal = Journal(tmp_path / "j", found)
    journal.append(SECOND)
    journal.close()
    assert read_journal(tmp_path / "j").entries == (FIRST, SECOND)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "another fingerprint",
        [],
        ["a", "b", {}],
        [1, "b", {}, {}],
        ["a", 2, {}, {}],
        ["a", "b", [], {}],
        ["a", "b", {"c": 4}, {}],
        ["a", "b", {}, "result"],
        ["a", "b", {}, {}, 5],
    ],
)
def test_a_line_of_another_form_ends_the_reading(value: Any) -> None:
    head = line("options") + line(["a.weight", "0" * 64, {"a.weight": "1" * 64}, {"error": 0.1}])
    found = parse_journal(head + line(value) + line(["b", "2", {}, {}]))
    assert (found.entries, found.nbytes) == ((FIRST,), len(head))


def test_units_without_a_first_line_that_names_the_run_are_nobodys() -> None:
    assert parse_journal(line(["a", "b", {}, {}])) == JournalContents()


@pytest.mark.parametrize("damaged", range(0, 60, 7))
def test_a_flipped_bit_ends_the_reading(damaged: int) -> None:
    head, last = line("options"), bytearray(line(["a", "b", {}, {}]))
    last[damaged % (len(last) - 1)] ^= 1
    assert parse_journal(head + bytes(last)).entries == ()


def test_depth_and_digits_that_python_refuses_end_the_reading() -> None:
    for text in (b"[" * 100_000, b"9" * 5000, b"[1e999, NaN]"):
        checksum = hashlib.sha256(text).hexdigest()[:16].encode()
        assert parse_journal(line("options") + checksum + b" " + text + b"\n").entries == ()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.binary(max_size=40) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(line)))
def test_any_bytes_are_a_journal_of_what_is_whole(lines: list[bytes]) -> None:
    found = parse_journal(line("options") + b"".join(lines))
    assert found.fingerprint == "options"


def test_what_was_not_synced_can_be_taken_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", JournalContents())
    journal.start("options")
    journal.append(FIRST)
    journal.sync(journal.end)
    journal.append(SECOND)
    journal.cut()
    assert read_journal(tmp_path / "j").entries == (FIRST,)
    journal.cut(to_nothing=True)
    journal.close()
    assert (tmp_path / "j").read_bytes() == b""


def test_lines_of_an_earlier_process_are_taken_back_until_they_are_synced(tmp_path: Path) -> None:
    written(tmp_path / "j", FIRST)
    for syncs, entries in ((True, (FIRST,)), (False, ())):
        journal = Journal(tmp_path / "j", read_journal(tmp_path / "j"))
        if syncs:
            journal.sync(journal.end)
        journal.cut()
        journal.close()
        assert read_journal(tmp_path / "j").entries == entries


def test_publication_is_a_line_of_its_own_that_a_new_start_takes_back(tmp_path: Path) -> None:
    whole = written(tmp_path / "j", FIRST)
    journal = Journal(tmp_path / "j", read_journal(tmp_path / "j"))
    journal.publish("ab12")
    journal.close()
    found = read_journal(tmp_path / "j")
    assert (found.publishing, found.entries) == ("ab12", (FIRST,))
    Journal(tmp_path / "j", found).close()
    assert (tmp_path / "j").read_bytes() == whole
