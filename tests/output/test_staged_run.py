"""The one way from a plan to a published result, with a toy in place of quantizing and merging."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.conversions import files_of

from loftq_cli.errors import LoftqError, QualityError, StorageError, UsageError
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.staged_run import Entries, PlannedResult, is_result_complete, run_staged
from loftq_cli.output.writer import OutputFiles
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.headers import OutTensor

UNITS = ("a", "b", "c")


def hash_input(unit: str) -> str:
    return hashlib.sha256(unit.encode()).hexdigest()


class Doubling:
    """Writes twice the number of each unit. Remembers every call; fails at the step called `fails`."""

    def __init__(self, fails: str = "", error: type[LoftqError] = QualityError) -> None:
        self.steps: list[str] = []
        self._fails, self._error = fails, error

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name == self._fails:
            raise self._error("stopped here")

    def announce(self, text: str) -> None:
        self._step(text)

    def run_units(
        self, files: OutputFiles, finished: Entries, workers: Workers
    ) -> Generator[tuple[JournalEntry, bool]]:
        for number, unit in enumerate(UNITS):
            if unit in finished and files.hold(finished[unit].outputs):
                yield finished[unit], True
                continue
            self._step(f"run {unit}")
            sha256 = files[unit].write(unit, torch.tensor([2.0 * number]))
            yield JournalEntry(unit, hash_input(unit), {unit: sha256}, {}), False

    def finish_unit(self, entry: JournalEntry, *, is_resumed: bool) -> None:
        self._step(f"{'kept' if is_resumed else 'done'} {entry.unit}")

    def check_result(self, files: OutputFiles, entries: Entries, directory: Path, workers: Workers) -> None:
        assert files.hold({unit: entry.outputs[unit] for unit, entry in entries.items()})
        self._step("check")

    def write_side_files(self, directory: Path, entries: Entries) -> None:
        (directory / "config.json").write_text("{}")
        self._step("side files")

    def check_inputs_unchanged(self) -> None:
        self._step("inputs")

    def keeps_unfinished(self, error: LoftqError) -> bool:
        return isinstance(error, StorageError)


def planned(output: Path, fingerprint: str = "f") -> PlannedResult:
    tensors = [OutTensor(unit, "float32", (1,)) for unit in UNITS]
    return PlannedResult(output, fingerprint, UNITS, {"model.safetensors": tensors}, {})


def run(work: Doubling, output: Path, **options: bool) -> None:
    run_staged(planned(output), work, **{"overwrite": False, "restart": False, **options})


WHOLE = ["run a", "done a", "run b", "done b", "run c", "done c", "check", "side files", "inputs"]


def test_the_steps_come_in_one_order(tmp_path: Path) -> None:
    work = Doubling()
    run(work, tmp_path / "out")

    assert work.steps == WHOLE
    assert load_file(tmp_path / "out" / "model.safetensors") == {u: 2.0 * i for i, u in enumerate(UNITS)}
    assert sorted(files_of(tmp_path / "out")) == ["checksums.json", "config.json", "model.safetensors"]


def test_the_mark_holds_one_hash_of_the_inputs_of_all_units(tmp_path: Path) -> None:
    run(Doubling(), tmp_path / "out")
    mark = json.loads((tmp_path / "out" / "checksums.json").read_text())
    assert mark["input_sha256"] == fingerprint_of({unit: hash_input(unit) for unit in UNITS})


def test_the_mark_holds_the_sum_of_every_file_and_of_every_tensor(tmp_path: Path) -> None:
    run(Doubling(), tmp_path / "out")
    mark = json.loads((tmp_path / "out" / "checksums.json").read_text())
    files = {name: data for name, data in files_of(tmp_path / "out").items() if name != "checksums.json"}
    assert mark["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    numbers = {unit: torch.tensor([2.0 * place]).numpy().tobytes() for place, unit in enumerate(UNITS)}
    sums = {unit: hashlib.sha256(data).hexdigest() for unit, data in numbers.items()}
    assert mark["tensors"] == {"model.safetensors": sums}


@pytest.mark.parametrize("step", ["run b", "done b", "check", "side files", "inputs"])
def test_an_error_that_keeps_nothing_leaves_nothing(step: str, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match="stopped here"):
        run(Doubling(step), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "finished"), [("run b", "a"), ("done b", "ab"), ("check", "abc"), ("inputs", "abc")])
def test_a_run_that_the_disk_stopped_is_continued(step: str, finished: str, tmp_path: Path) -> None:
    run(Doubling(), tmp_path / "whole")
    with pytest.raises(StorageError, match="stopped here"):
        run(Doubling(step, StorageError), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    work = Doubling()
    run(work, tmp_path / "out")

    assert work.steps[0] == f"continuing: {len(finished)} of 3 tensors are finished; hashing them"
    assert [step for step in work.steps if step.startswith("kept")] == [f"kept {unit}" for unit in finished]
    assert [step for step in work.steps if step.startswith("run")] == [f"run {u}" for u in UNITS if u not in finished]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_restart_runs_every_unit_again(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        run(Doubling("run c", StorageError), tmp_path / "out")
    work = Doubling()
    run(work, tmp_path / "out", restart=True)
    assert work.steps == WHOLE


def test_files_of_an_earlier_run_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        run(Doubling("side files", StorageError), tmp_path / "out")
    (tmp_path / ".out.partial" / "result" / "stray.txt").write_text("from elsewhere")
    run(Doubling(), tmp_path / "out")
    assert "stray.txt" not in files_of(tmp_path / "out")


def test_a_result_is_complete_while_inputs_options_and_files_are_the_same(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert not is_result_complete(planned(output), hash_input, overwrite=False)
    run(Doubling(), output)

    assert is_result_complete(planned(output), hash_input, overwrite=False)
    assert not is_result_complete(planned(output), hash_input, overwrite=True)
    for plan, hasher in (
        (planned(output, "other options"), hash_input),
        (planned(output), lambda unit: hash_input(unit if unit != "b" else "another b")),
    ):
        with pytest.raises(UsageError, match="exists already"):
            is_result_complete(plan, hasher, overwrite=False)
    (output / "config.json").write_text("changed")
    with pytest.raises(UsageError, match="exists already"):
        is_result_complete(planned(output), hash_input, overwrite=False)


def test_a_side_file_that_changed_makes_the_result_incomplete(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    plan = PlannedResult(tmp_path / "out", "f", UNITS, planned(tmp_path / "out").files, {"config.json": tokenizer})
    run_staged(plan, Doubling(), overwrite=False, restart=False)
    assert is_result_complete(plan, hash_input, overwrite=False)
    tokenizer.write_text("{ }")
    with pytest.raises(UsageError, match="exists already"):
        is_result_complete(plan, hash_input, overwrite=False)


def test_a_result_takes_the_bytes_of_its_tensors_and_side_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("12345")
    plan = planned(tmp_path / "out")
    assert plan.nbytes == 3 * 4
    with_side_file = PlannedResult(plan.output, "f", UNITS, plan.files, {"t": tmp_path / "tokenizer.json"})
    assert with_side_file.nbytes == 3 * 4 + 5


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_is_continued_on_an_equal_kind_of_device_only(first: str, second: str, tmp_path: Path) -> None:
    plan, options = planned(tmp_path / "out"), {"overwrite": False, "restart": False}
    with pytest.raises(StorageError):
        run_staged(plan, Doubling("run c", StorageError), **options, device=first)
    with pytest.raises(UsageError, match="another version or device"):
        run_staged(plan, Doubling(), **options, device=second)
    work = Doubling()
    run_staged(plan, work, **options, device=first)
    assert "run a" not in work.steps
