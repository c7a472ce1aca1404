"""The reference kernels, and a command that gives its status and stderr."""

from __future__ import annotations

import pytest

from loftq_cli.cli.main import _run
from loftq_cli.triton_kernels.backend import use_reference_kernels


@pytest.fixture(scope="module", autouse=True)
def reference_kernels():
    use_reference_kernels()
    yield
    use_reference_kernels()


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command in an empty directory of this process: (status, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: object) -> tuple[int, str]:
        status = _run([str(argument) for argument in arguments])
        return status, capsys.readouterr().err

    return run_command
