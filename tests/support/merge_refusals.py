"""A merge that is refused: its exit status and last line."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.cli.main import _run

Q0 = "model.layers.0.self_attn.q_proj"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit status and the last line of a merge that writes nothing."""
    status = _run(["merge", *map(str, arguments)])
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err.splitlines()[-1]


NAN = torch.full((128, 4), float("nan"))
