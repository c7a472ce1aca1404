"""Whatever happens to the disk or the process, at whichever operation: under the output's name is nothing, the earlier
result or the complete new one; and the same command again ends with the bytes of a run that nothing happened to.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.conversions import Silent, StopAfter, files_of
from support.crashes import FailingDisk, Killed

from loftq_cli.conversion.prepare import is_conversion_done, prepare_conversion
from loftq_cli.conversion.run import convert_checkpoint
from loftq_cli.errors import StorageError
from loftq_cli.merging.form import MergeOptions
from loftq_cli.merging.plan import prepare_merge
from loftq_cli.merging.run import is_merge_done, merge_adapter
from loftq_cli.output import staging
from loftq_cli.planning.settle import make_recipe

RECIPE = make_recipe(method="qlora", rank=2, max_shard_size="1MB")


def checkpoint(directory: Path) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.proj.weight": torch.randn(64, 128, generator=generator) * 0.02 for i in range(3)}
    tensors |= {"embed.weight": torch.randn(512, 500, generator=generator), "norm.weight": torch.ones(128)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"dtype": "float32", "architectures": ["OddModel"]}))
    (directory / "tokenizer.json").write_text(json.dumps({"vocab": ["a", "b"]}))
    return directory


class Watching(Silent):
    """Remembers how many layers were finished, and how many of them were kept."""

    @property
    def kept(self) -> int:
        return sum(resumed for _, resumed in self.done)


def quantize(source: Path, output: Path, observer: Silent, *, overwrite: bool = False) -> None:
    conversion = prepare_conversion(str(source), output, RECIPE)
    if not is_conversion_done(conversion, overwrite=overwrite):
        convert_checkpoint(conversion, observer, overwrite=overwrite, restart=False, verify=True)


def merge_into(base: Path, output: Path, observer: Silent, *, overwrite: bool = False) -> None:
    prepared = prepare_merge(base, base / "qlora_init", output, MergeOptions())
    if not is_merge_done(prepared, overwrite=overwrite):
        merge_adapter(prepared, observer, overwrite=overwrite, restart=False)


class AtOnce:
    """Runs what is to run beside the work at once: then operations have the same number in every run."""

    def __init__(self, threads: int, name: str) -> None:
        pass

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: Callable[[int], None], argument: int) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(work(argument))
        except BaseException as error:
            future.set_exception(error)
        return future


@dataclass
class Scenario:
    """A command, the directory that it runs in, and what it leaves under `out` when nothing happens to it."""

    folder: Path
    command: Callable[[Watching], None]
    expected: dict[str, bytes]
    before: dict[str, bytes] | None
    is_mount: bool = False
    exchanges: bool = False

    @property
    def hidden(self) -> Path:
        """Where an unfinished result is."""
        return self.folder / "out" / ".partial" if self.is_mount else self.folder / ".out.partial"

    def run(self) -> Watching:
        observer = Watching()
        self.command(observer)
        return observer

    def visible(self) -> dict[str, bytes] | None:
        """What a loader finds under the output's name."""
        out = self.folder / "out"
        if self.is_mount:
            files = {name: data for name, data in files_of(out).items() if not name.startswith(".partial/")}
            return files if "config.json" in files else None
        return files_of(out) if out.exists() else None

    def check_nothing_half_is_visible(self) -> None:
        """Where names are exchanged, an earlier result never leaves without the new one in its place."""
        found, whole = self.visible(), [self.before, self.expected]
        if self.is_mount and found is not None:  # files move one by one there, and the completeness mark is apart
            found.pop("checksums.json", None)
            whole = [{k: v for k, v in files.items() if k != "checksums.json"} for files in whole if files is not None]
        assert (found is None and not self.exchanges) or found in whole

    def check_is_complete(self) -> None:
        assert self.visible() == self.expected
        assert sorted(os.listdir(self.folder)) == ["out"]
        assert not self.is_mount or ".partial" not in os.listdir(self.folder / "out")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that is possible: what a disk forgets is the failing one's business, and fsync takes time."""
    memory = "/dev/shm"
    has_room = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 500_000_000
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base") / "base"
    quantize(source, output, Silent())
    return output


@pytest.fixture(params=["quantize", "merge", "overwrite", "overwrite without exchange", "mounted", "mounted overwrite"])
def scenario(
    request: pytest.FixtureRequest, source: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Scenario]]:
    """Makes fresh copies of one scenario, each in a folder of its own; the output is always typed as `out`."""
    name = str(request.param)
    # A clock on which minutes pass between units: every unit is brought to the disk.
    monkeypatch.setattr(time, "monotonic", itertools.count(0.0, 60.0).__next__)
    monkeypatch.setattr(staging, "ThreadPoolExecutor", AtOnce)
    if "without exchange" in name:  # as on a C library without the call
        monkeypatch.setattr("ctypes.CDLL", lambda *arguments, **options: object())
    if "mounted" in name:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")

    def command(observer: Watching) -> None:
        run, given = (merge_into, base) if name == "merge" else (quantize, source)
        run(given, Path("out"), observer, overwrite="overwrite" in name)

    def make(folder: Path) -> Scenario:
        folder.mkdir()
        monkeypatch.chdir(folder)
        if "overwrite" in name:
            earlier = make_recipe(method="qlora", rank=3, layout="dense")
            convert_checkpoint(
                prepare_conversion(str(source), Path("out"), earlier),
                Silent(),
                overwrite=False,
                restart=False,
                verify=False,
            )
        elif "mounted" in name:
            (folder / "out").mkdir()
        before = files_of(folder / "out") if "overwrite" in name else None
        return Scenario(folder, command, {}, before, "mounted" in name, exchanges=name == "overwrite")

    whole = make(tmp_path / "whole")
    whole.run()
    expected = files_of(tmp_path / "whole" / "out")
    numbers = iter(range(10**6))

    def fresh() -> Scenario:
        made = make(tmp_path / f"{next(numbers)}")
        made.expected = expected
        return made

    yield fresh


def operations(scenario: Callable[[], Scenario], tmp_path: Path, **options: object) -> int:
    """How many operations a run takes that nothing happens to."""
    made, counting = scenario(), FailingDisk(tmp_path / "trash", **options)  # type: ignore[arg-type]
    with counting.installed():
        made.run()
    return counting.count


def stop_at(made: Scenario, failing: FailingDisk) -> Watching:
    observer = Watching()
    with failing.installed(), pytest.raises(Killed):
        made.command(observer)
        raise Killed  # the last operations are clean-up after the end, which may fall to the next run
    return observer


def some(count: int, wanted: int) -> list[int]:
    """Evenly spread numbers below `count`, the last ones included: there the result is being published."""
    spread = {round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)}
    return sorted(spread | set(range(max(0, count - 12), count)))


def kill_everywhere(scenario: Callable[[], Scenario], tmp_path: Path, wanted: int, *, loses_power: bool) -> None:
    count = operations(scenario, tmp_path)
    assert count > 60
    for at in some(count, wanted):
        made = scenario()
        failing = FailingDisk(tmp_path / f"trash{at}", at, loses_power=loses_power, seed=at)
        first = stop_at(made, failing)
        made.check_nothing_half_is_visible()
        is_unfinished = made.hidden.exists()
        again = made.run()
        made.check_is_complete()
        if not loses_power and is_unfinished and again.done:
            assert again.kept >= len(first.done), f"finished layers were done again after a kill at {failing.log[-1]}"
        for folder in (made.folder, failing.trash):
            shutil.rmtree(folder, ignore_errors=True)


def test_a_kill_at_any_operation_loses_one_unit_at_most(scenario: Callable[[], Scenario], tmp_path: Path) -> None:
    kill_everywhere(scenario, tmp_path, 4, loses_power=False)


def test_a_power_failure_at_any_operation_loses_nothing_that_was_visible(
    scenario: Callable[[], Scenario], tmp_path: Path
) -> None:
    kill_everywhere(scenario, tmp_path, 4, loses_power=True)


@pytest.mark.slow
@pytest.mark.parametrize("loses_power", [False, True])
def test_a_kill_at_every_single_operation(
    scenario: Callable[[], Scenario], tmp_path: Path, *, loses_power: bool
) -> None:
    kill_everywhere(scenario, tmp_path, 10**6, loses_power=loses_power)


def test_after_success_a_power_failure_takes_nothing(scenario: Callable[[], Scenario], tmp_path: Path) -> None:
    for seed in range(8):
        made, failing = scenario(), FailingDisk(tmp_path / f"trash{seed}", seed=seed)
        with failing.installed():
            made.run()
        failing.lose_power()
        assert made.visible() == made.expected


def test_three_kills_in_a_row_lose_nothing(scenario: Callable[[], Scenario], tmp_path: Path) -> None:
    count = operations(scenario, tmp_path)
    made = scenario()
    for turn in range(3):
        stop_at(made, FailingDisk(tmp_path / f"trash{turn}", count // 3 + 5 * turn, loses_power=turn == 1, seed=turn))
        made.check_nothing_half_is_visible()
    made.run()
    made.check_is_complete()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_a_write_is_one_line_and_the_same_command_goes_on(
    scenario: Callable[[], Scenario], tmp_path: Path, number: int
) -> None:
    only = ("write_at", "resize", "open_file", "make_directory")
    count = operations(scenario, tmp_path, only=only)
    for at in some(count, 5)[:-10]:
        made = scenario()
        with FailingDisk(tmp_path / f"trash{at}", at, number, only).installed(), pytest.raises(StorageError) as caught:
            made.run()
        assert caught.value.exit_code == 3
        assert os.strerror(number).lower() in str(caught.value)
        if number != errno.EIO:
            assert "then run the same command to continue" in str(caught.value)
        made.check_nothing_half_is_visible()
        made.run()
        made.check_is_complete()


def test_a_sync_that_fails_is_an_error_and_what_it_spoke_of_is_not_believed(
    scenario: Callable[[], Scenario], tmp_path: Path
) -> None:
    count = operations(scenario, tmp_path, only=("sync",))
    for at in some(count, 4)[::3]:
        made = scenario()
        failing = FailingDisk(tmp_path / f"trash{at}", at, errno.EIO, ("sync",))
        with failing.installed(), pytest.raises(StorageError, match="input/output error"):
            made.run()
        made.check_nothing_half_is_visible()
        made.run()
        made.check_is_complete()


def test_after_a_sync_that_failed_no_unit_is_kept_that_it_was_to_make_durable(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may call pages clean that it could not write: their hash would be right, and the disk wrong."""
    monkeypatch.chdir(tmp_path)
    counting = FailingDisk(tmp_path / "trash", only=("sync",))
    with counting.installed():
        quantize(source, Path("whole"), Watching())
    first_of_data = next(i for i, line in enumerate(counting.log) if "safetensors" in line)
    with FailingDisk(tmp_path / "trash", first_of_data, errno.EIO, ("sync",)).installed(), pytest.raises(StorageError):
        quantize(source, Path("out"), Watching())
    again = Watching()
    quantize(source, Path("out"), again)
    assert again.kept == 0


def test_a_failed_publication_puts_the_earlier_result_back(scenario: Callable[[], Scenario], tmp_path: Path) -> None:
    only = ("rename", "exchange")
    for at in range(operations(scenario, tmp_path, only=only)):
        made = scenario()
        if made.before is None or made.is_mount:
            return  # nothing stands there, or the next run puts it back
        with FailingDisk(tmp_path / f"trash{at}", at, errno.EIO, only).installed(), pytest.raises(StorageError):
            made.run()
        assert made.visible() == made.before
        made.run()
        made.check_is_complete()


def test_after_a_sync_that_failed_no_unit_of_a_killed_process_is_kept_either(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed has synced nothing of its last units, and the sync of the next process fails."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, Path("out"), StopAfter(2))
    shutil.copytree(".out.partial", "interrupted")
    counting = FailingDisk(tmp_path / "trash", only=("sync",))
    with counting.installed():
        continued = Watching()
        quantize(source, Path("out"), continued)
    assert continued.kept == 2
    first_of_data = next(i for i, line in enumerate(counting.log) if "safetensors" in line)
    shutil.rmtree("out")
    Path("interrupted").rename(".out.partial")

    with FailingDisk(tmp_path / "trash", first_of_data, errno.EIO, ("sync",)).installed(), pytest.raises(StorageError):
        quantize(source, Path("out"), Watching())

    again = Watching()
    quantize(source, Path("out"), again)
    assert again.kept == 0
