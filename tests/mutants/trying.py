"""`python -m tests.mutants.trying PLAN` in the copied tree: which tests see each mutant of the plan.

pytest collects once. One fork runs every test and writes down the lines that each test runs. After that a fork for each
mutant puts the changed function in place, writes the changed file for programs that tests start, and runs the tests of
the changed line, quick tests first, until one fails.
"""

from __future__ import annotations
import __future__

import ast
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.making import PACKAGES, Mutant, functions

_NOT_PLACED = 98  # exit status of a fork
_START = 20.0  # seconds that a fork may take before its tests' own seconds count, on a busy machine
_FORK = 0.1  # seconds that a fork takes anyway
_FACTOR = 5.0  # times as long as without the change may tests take
_MEMORY = 16 << 30  # bytes of address space of a fork
_FILE = 1 << 30  # bytes of a file that a fork writes
_TESTS = ("tests/output", "tests/checkpoint", "tests/merging", "tests/test_docstrings.py")
# The first one imports a module of another folder. The second one runs programs that a budget of seconds cannot hold.
_LEFT_OUT = ("tests/merging/test_gpu_merge.py", "tests/checkpoint/test_fuzzing.py")


class Trial:
    """A pytest plugin that tries mutants in place of the ordinary run."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.work = Path(plan["work"])
        self.seconds: float = plan["seconds"]
        self.until: float = plan["until"]
        self.mutants = [Mutant(**record) for record in plan["mutants"]]
        self.sources: dict[str, str] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Measure, then try every mutant."""
        if session.testsfailed:
            raise session.Interrupted("tests do not collect")
        self.items = {item.nodeid: item for item in session.items if _is_near(item.nodeid)}
        self.coverage = self._measured()
        for name in self.coverage["modules"]:
            _import(name)
        verdicts = (self.work / "verdicts.jsonl").open("a")
        for number, mutant in enumerate(self.mutants, 1):
            if time.time() > self.until:
                print(f"out of time before mutant {number} of {len(self.mutants)}")
                break
            record = self._try(mutant)
            verdicts.write(json.dumps(record) + "\n")
            verdicts.flush()
            print(
                f"{number}/{len(self.mutants)} {record['verdict']:9} {record['took']:6.1f} s  {mutant.key}"[:200],
                flush=True,
            )
        return True

    def _measured(self) -> dict[str, Any]:
        """`lines` {file: {line: [tests]}}, `seconds` {test: s}, `failing` [tests], and the imported `modules`.

        Kept for the same `sources`: only tests of changed files are measured again.
        """
        cache, now = self.work / "coverage.json", _hashes(Path("loftq_cli"))
        known: dict[str, Any] = json.loads(cache.read_text()) if cache.is_file() else {}
        if known.get("sources") != now:
            known = {"sources": now, "files": {}, "lines": {}, "seconds": {}, "failing": [], "modules": []}
        files = _hashes(Path("tests"))
        changed = {file for file, digest in files.items() if known["files"].get(file) != digest}
        fresh = [
            item
            for name, item in self.items.items()
            if name not in known["seconds"] or name.partition("::")[0] in changed
        ]
        if fresh:
            print(f"measuring which lines {len(fresh)} tests run", flush=True)
            part, log = self.work / "measured.json", self.work / "measuring.log"
            status = _in_a_fork(lambda: part.write_text(json.dumps(self._measure(fresh))) and 0, 7200.0, log)
            if status:
                raise SystemExit(f"measuring ended with {status}: see {log}")
            known = {**_merged(known, json.loads(part.read_text()), changed), "files": files}
            cache.write_text(json.dumps(known))
        print(*(f"fails unchanged, left out: {test}" for test in known["failing"]), sep="\n")
        return known

    def _measure(self, items: list[pytest.Item]) -> dict[str, Any]:
        import coverage

        folders = [f"{Path.cwd()}/loftq_cli/{name}/*" for name in ("output", "checkpoint", "merging")]
        measuring = coverage.Coverage(data_file=None, include=folders, config_file=False)
        contexts = _Contexts(measuring)
        items[0].session.config.pluginmanager.register(contexts)
        measuring.start()
        seconds, failing = {}, []
        for item, following in zip(items, [*items[1:], None], strict=True):
            start = time.perf_counter()
            contexts.enter(item.nodeid)
            if not _passes(item, following):
                failing.append(item.nodeid)
            seconds[item.nodeid] = time.perf_counter() - start
        measuring.stop()
        data = measuring.get_data()
        users = contexts.users(items)
        lines = {
            str(Path(file).relative_to(Path.cwd())): {
                line: sorted({test for name in names for test in users.get(name, [name])} - {"", *failing})
                for line, names in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        return {"lines": lines, "seconds": seconds, "failing": failing, "modules": sorted(sys.modules)}

    def _try(self, mutant: Mutant) -> dict[str, Any]:
        """The record for verdicts.jsonl."""
        tests, is_cut = self._tests_of(mutant)
        record = {"key": mutant.key, "text": _digest(mutant), "tests": len(tests), "cut": is_cut, "killer": None}
        if not tests:
            return {**record, "verdict": "unreached", "took": 0.0}
        report = self.work / "killer"
        report.unlink(missing_ok=True)
        path = Path(mutant.file)
        source = self.sources.setdefault(mutant.file, path.read_text())
        start = time.perf_counter()
        limit = _START + _FACTOR * sum(self.coverage["seconds"][test] for test in tests)
        changed = changed_source(source, mutant)
        try:
            path.write_text(changed)
            stamp = time.time() + start  # no two changes of a file have one time, by which Python knows compiled files
            os.utime(path, (stamp, stamp))
            status = _in_a_fork(lambda: self._run(mutant, changed, tests, report), limit, self.work / "fork.log")
        finally:
            path.write_text(source)
        took = time.perf_counter() - start
        if status == _NOT_PLACED:
            raise SystemExit(f"{mutant.key}: cannot be put in place: see {self.work / 'fork.log'}")
        verdict = {0: "survived", 1: "killed", None: "timeout"}.get(status, "crashed")
        killer = report.read_text() if report.is_file() else None
        return {**record, "verdict": verdict, "took": round(took, 1), "killer": killer}

    def _tests_of(self, mutant: Mutant) -> tuple[list[str], bool]:
        """The tests that run the changed statement, and whether `seconds` left some out. First come examples in
        docstrings, then tests that run many lines of the file in a short time: such tests are about the file.
        """
        lines, seconds = self.coverage["lines"].get(mutant.file, {}), self.coverage["seconds"]
        span = statement_lines(Path(mutant.file).read_text(), mutant)
        found = {test for line in span for test in lines.get(str(line), ()) if test in self.items}
        n_lines = Counter(test for tests in lines.values() for test in tests)
        chosen, total = [], 0.0
        for _, _, test in sorted(("docstrings" not in t, -n_lines[t] / (seconds[t] + _FORK), t) for t in found):
            total += seconds[test]
            if total > self.seconds and chosen:
                return chosen, True
            chosen.append(test)
        return chosen, False

    def _run(self, mutant: Mutant, changed: str, tests: list[str], report: Path) -> int:
        """In the fork: 1 when a test fails, 0 when none does."""
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
        try:
            put_in_place(mutant, changed)
        except Exception:
            traceback.print_exc()
            return _NOT_PLACED
        items = [self.items[test] for test in tests]
        for item, following in zip(items, [*items[1:], None], strict=True):
            if not _passes(item, following):
                report.write_text(item.nodeid)
                return 1
        return 0


class _Contexts:
    """Tells coverage which test runs, or which fixture that several tests share."""

    def __init__(self, measuring: Any) -> None:
        self.measuring = measuring
        self.current = ""

    def enter(self, name: str) -> None:
        self.current = name
        self.measuring.switch_context(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        outer = self.current
        if fixturedef.scope != "function":
            self.enter(f"fixture {fixturedef.baseid} {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self.enter(outer)

    def users(self, items: list[pytest.Item]) -> dict[str, list[str]]:
        """The tests that use a shared fixture, by the fixture's context."""
        found: dict[str, list[str]] = {}
        for item in items:
            for definitions in getattr(item, "_fixtureinfo").name2fixturedefs.values():  # noqa: B009
                for fixture in definitions:
                    found.setdefault(f"fixture {fixture.baseid} {fixture.argname}", []).append(item.nodeid)
        return found


def _merged(known: dict[str, Any], part: dict[str, Any], changed: set[str]) -> dict[str, Any]:
    """What was known of unchanged tests, and what was measured now."""
    is_kept = {
        test: test.partition("::")[0] not in changed and test not in part["seconds"] for test in known["seconds"]
    }
    lines: dict[str, dict[str, list[str]]] = {}
    for file in {*known["lines"], *part["lines"]}:
        old, new = known["lines"].get(file, {}), part["lines"].get(file, {})
        lines[file] = {
            line: [*(test for test in old.get(line, ()) if is_kept[test]), *new.get(line, ())] for line in {*old, *new}
        }
    return {
        **known,
        "lines": lines,
        "seconds": {test: s for test, s in known["seconds"].items() if is_kept[test]} | part["seconds"],
        "failing": [test for test in known["failing"] if is_kept[test]] + part["failing"],
        "modules": sorted({*known["modules"], *part["modules"]}),
    }


def _hashes(folder: Path) -> dict[str, str]:
    """File -> a hash, of all Python files below the folder but those of this package."""
    paths = [path for path in folder.rglob("*.py") if "mutants" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in paths}


def changed_source(source: str, mutant: Mutant) -> str:
    """The file with the mutant's function in place of the function."""
    lines = source.splitlines(keepends=True)
    node = dict(functions(ast.parse(source)))[mutant.function]
    return "".join([*lines[: node.lineno - 1], mutant.text, *lines[node.end_lineno :]])


def put_in_place(mutant: Mutant, changed: str) -> None:
    """Give the loaded function the mutant's code and defaults, wherever the function was imported or listed."""
    module = importlib.import_module(mutant.file.removesuffix(".py").replace("/", "."))
    node = dict(functions(ast.parse(changed)))[mutant.function]
    owner, _, name = mutant.function.rpartition(".")
    node.decorator_list = []
    # A method that says super() reads the cell __class__ of the scope around. A function that calls itself by its name
    # reads a global.
    around = ast.parse(f"def around(__class__):\n    global {name}\n    pass\n    return {name}").body[0]
    assert isinstance(around, ast.FunctionDef)
    around.body[1] = node
    tree = ast.fix_missing_locations(ast.Module([around], []))
    scope: dict[str, Any] = dict(vars(module))
    exec(
        compile(
            tree, str(Path(mutant.file).absolute()), "exec", __future__.annotations.compiler_flag, dont_inherit=True
        ),
        scope,
    )
    holder = getattr(module, owner) if owner else module
    made = scope["around"](holder)
    target = vars(holder)[name]
    target = getattr(target, "__func__", None) or getattr(target, "fget", None) or target
    target.__code__, target.__defaults__, target.__kwdefaults__ = made.__code__, made.__defaults__, made.__kwdefaults__


def statement_lines(source: str, mutant: Mutant) -> range:
    """The lines of the innermost statement around the change, without its body; of the whole function where the head of
    the function changed.
    """
    function = dict(functions(ast.parse(source)))[mutant.function]
    best = range(function.lineno, (function.end_lineno or function.lineno) + 1)
    for node in ast.walk(function):
        if node is function or not isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
            continue
        first = node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if isinstance(body, list) and body[0].lineno > first else node_end(node, first)
        if first <= mutant.line <= last and last - first < len(best):
            best = range(first, last + 1)
    return best


def node_end(node: Any, first: int) -> int:
    return int(getattr(node, "end_lineno", None) or first)


def _is_near(test: str) -> bool:
    """Whether the examples of a docstring are those of a mutated package; True for every other test."""
    return "test_docstrings" not in test or any(f"loftq_cli.{name}." in test for name in PACKAGES)


def _digest(mutant: Mutant) -> str:
    return hashlib.sha256(mutant.text.encode()).hexdigest()[:12]


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception:
        return


def _passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    from _pytest.runner import runtestprotocol

    failed = [report for report in runtestprotocol(item, log=False, nextitem=following) if report.failed]
    for report in failed:
        print(item.nodeid, report.longreprtext, flush=True)
    return not failed


def _in_a_fork(act: Callable[[], int], limit: float, log: Path) -> int | None:
    """What `act` returned in a fork, 99 after an exception, a negative number after a signal, None after `limit` s."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        try:
            os._exit(act())
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(99)
    end = time.monotonic() + limit
    pause = 0.001
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            _end_group(child)  # programs that the tests started
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            _end_group(child)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def _end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> int:
    """The exit status of pytest."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    # A shell starts jobs in the background with the signal ignored, and tests send the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, str(Path.cwd()))
    with tempfile.TemporaryDirectory() as folder:  # of its own: pytest elsewhere removes what lies in the usual one
        arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", "-s", f"--basetemp={folder}/tests"]
        ignored = [f"--ignore={path}" for path in _LEFT_OUT]
        return int(pytest.main([*arguments, *ignored, *_TESTS], plugins=[Trial(plan)]))


if __name__ == "__main__":
    raise SystemExit(main())
