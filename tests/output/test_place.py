"""What the hidden folder says after a kill at each point of a publication, from its files alone."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from loftq_cli.errors import UsageError
from loftq_cli.output.journal import Journal, JournalContents
from loftq_cli.output.place import Place

MARK = b'{"the": "mark"}'


def begun(root: Path, *, publishing: bool, is_mount: bool = False) -> Place:
    """A marked hidden folder of the output `out` with a journal, and a whole result inside."""
    place = Place(root / "out", root / "out" / ".partial" if is_mount else root / ".out.partial", is_mount)
    place.root.mkdir(parents=True)
    place.claim()
    place.result.mkdir()
    (place.result / "checksums.json").write_bytes(MARK)
    (place.result / "config.json").write_text("new")
    journal = Journal(place.journal, JournalContents())
    journal.start("fingerprint")
    if publishing:
        journal.publish(hashlib.sha256(MARK).hexdigest())
    journal.close()
    return place


def state(place: Place) -> tuple[bool, bool, bool]:
    return place.is_published(), place.is_half_published(), place.is_left_over()


NOTHING, HALF, WHOLE = (False, False, False), (False, True, False), (True, False, True)


def test_before_publication_the_folder_is_a_run_to_continue(tmp_path):
    assert state(begun(tmp_path, publishing=False)) == NOTHING


def test_a_result_that_did_not_move_yet_is_half_published(tmp_path):
    assert state(begun(tmp_path, publishing=True)) == HALF


def test_a_result_that_moved_is_published(tmp_path):
    place = begun(tmp_path, publishing=True)
    place.result.rename(place.target)
    assert state(place) == WHOLE


@pytest.mark.parametrize("earlier", [b'{"an": "earlier mark"}', None])
def test_after_an_exchange_the_folder_holds_the_earlier_result_and_the_new_one_is_published(earlier, tmp_path):
    place = begun(tmp_path, publishing=True)
    (place.result / "checksums.json").unlink()
    if earlier is not None:
        (place.result / "checksums.json").write_bytes(earlier)
    assert state(place) == WHOLE


def test_an_earlier_result_that_was_moved_away_waits_for_the_new_one(tmp_path):
    place = begun(tmp_path, publishing=True)
    place.replaced.mkdir()
    assert state(place) == HALF
    place.result.rename(place.target)
    assert state(place) == WHOLE


def test_in_a_mount_point_the_mark_goes_last(tmp_path):
    place = begun(tmp_path, publishing=True, is_mount=True)
    (place.result / "config.json").rename(place.target / "config.json")
    assert state(place) == HALF
    (place.result / "checksums.json").rename(place.target / "checksums.json")
    assert state(place) == WHOLE


def test_a_folder_that_was_marked_and_never_used_is_left_over(tmp_path):
    place = begun(tmp_path, publishing=False)
    place.empty()
    assert os.listdir(place.root) == [".loftq-cli"]
    assert state(place) == (False, False, True)
    place.release()
    assert not place.root.exists()


def test_release_keeps_a_folder_that_holds_more(tmp_path):
    place = begun(tmp_path, publishing=False)
    place.release()
    assert place.result.is_dir()


def test_recovery_brings_an_earlier_result_back_where_nothing_stands_in_its_place(tmp_path):
    place = begun(tmp_path, publishing=True)
    place.replaced.mkdir()
    (place.replaced / "config.json").write_text("earlier")
    place.recover()
    assert (place.target / "config.json").read_text() == "earlier"
    assert not place.replaced.exists()


def test_recovery_leaves_a_published_result_alone(tmp_path):
    place = begun(tmp_path, publishing=True)
    place.result.rename(place.target)
    place.replaced.mkdir()
    place.recover()
    assert (place.target / "config.json").read_text() == "new"
    assert place.replaced.is_dir()


def test_recovery_in_a_mount_point_takes_back_what_moved(tmp_path):
    place = begun(tmp_path, publishing=False, is_mount=True)
    mark = '{"tool": "loftq-cli", "fingerprint": "f", "files": {"config.json": "%s"}, "tensors": {}}' % ("0" * 64)
    (place.result / "checksums.json").write_text(mark)
    journal = Journal(place.journal, JournalContents())
    journal.start("fingerprint")
    journal.publish(hashlib.sha256(mark.encode()).hexdigest())
    journal.close()
    (place.result / "config.json").rename(place.target / "config.json")
    place.replaced.mkdir()
    (place.replaced / "config.json").write_text("earlier")

    place.recover()

    assert (place.target / "config.json").read_text() == "earlier"
    assert (place.result / "config.json").read_text() == "new"
    assert not place.replaced.exists()


def is_ours(place: Place) -> bool:
    try:
        place.check_owned()
    except UsageError as error:
        assert (error.file, error.hint) == (str(place.root), "rename it, or choose another output")
        return False
    return True


def test_a_folder_is_ours_by_its_marker_its_journal_or_its_emptiness(tmp_path):
    place = Place(tmp_path / "out", tmp_path / ".out.partial", moves=False)
    assert is_ours(place)
    place.root.mkdir()
    assert is_ours(place)
    (place.root / "notes.txt").write_text("mine")
    assert not is_ours(place)
    journal = Journal(place.journal, JournalContents())
    journal.start("fingerprint")
    journal.close()
    assert is_ours(place)


@pytest.mark.parametrize("torn", [b"", b"An unfinished", b"An unfinished\0\0"])
def test_a_torn_marker_is_ours_while_nothing_lies_beside_it(torn, tmp_path):
    place = Place(tmp_path / "out", tmp_path / ".out.partial", moves=False)
    place.root.mkdir()
    (place.root / ".loftq-cli").write_bytes(torn)
    assert is_ours(place)
    (place.root / "notes.txt").write_text("mine")
    assert not is_ours(place)


def test_a_marker_of_another_text_a_file_and_a_link_are_not_ours(tmp_path):
    place = Place(tmp_path / "out", tmp_path / ".out.partial", moves=False)
    place.root.mkdir()
    (place.root / ".loftq-cli").write_text("Something else.")
    assert not is_ours(place)
    place.root.rename(tmp_path / "elsewhere")
    place.root.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".loftq-cli").unlink()
    assert not is_ours(place)
    place.root.unlink()
    place.root.write_text("a file")
    assert not is_ours(place)
