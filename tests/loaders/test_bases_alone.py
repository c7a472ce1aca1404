"""The base alone of an encoder is not farther from the original than plain rounding, where the fit starts from the
constants of plain rounding. (Where constants are searched, the base of the encoder here drifts between 10 % less and
10 % more than plain rounding, by the text and by the seed: see tests/benchmarks/README.md.)

The measure is the drift of embeddings, 1 − cosine, on a text that no conversion has seen: the errors that a fit lowers
are no measure of the fit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import models
from support.conversions import run_conversion
from support.pages import ROOT

from loftq_cli.cli.main import _run

TOKENS, CONTEXT = 2048, 64


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_an_encoder_with_absmax_constants_drifts_less_than_plainly_rounded(
    quant_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_conversion(models.minilm(), tmp_path / "fitted", quant_type=quant_type, fit="joint", scales="absmax")
    run_conversion(models.minilm(), tmp_path / "plain", quant_type=quant_type, method="qlora")
    drifts = {}
    for name in ("fitted", "plain"):
        capsys.readouterr()
        reading = ["--text", ROOT / "LICENSE", "--tokens", TOKENS, "--context", CONTEXT, "--threads", 1]
        assert _run(["inspect", *map(str, [tmp_path / name, "--reference", models.minilm(), *reading]), "--json"]) == 0
        drifts[name] = json.loads(capsys.readouterr().out)["reference"]["drift"]
    assert drifts["fitted"]["adapted"] < 0.8 * drifts["plain"]["base"]
    assert drifts["fitted"]["base"] < drifts["plain"]["base"]
