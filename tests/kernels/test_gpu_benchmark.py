"""The benchmark for a GPU runs from end to end, on a simulated one and at sizes that mean nothing: so that on a real
one only the numbers are new.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from support.simulated_gpu import simulated_gpu

from tests.benchmarks import gpu
from tests.benchmarks.gpu_card import Effort
from tests.benchmarks.gpu_cases import GOALS
from tests.benchmarks.gpu_checkpoint import LlamaShape
from tests.benchmarks.gpu_conversion import RUNS
from tests.benchmarks.gpu_kernels import Sizes
from tests.benchmarks.gpu_timeline import RESOURCES, Span, busy, chart
from tests.benchmarks.measuring import Settings, rendered

SIZES = Sizes(((64, 128),), (2,), (1, 100), ((64, 128),), 2)
SHAPE = LlamaShape(layers=1, hidden=64, intermediate=128, vocabulary=70)
EFFORT = Effort(rounds=1, calls=1, most_sets=2)
RECIPE = {"rank": 2, "fit": "loftq", "iterations": 2}


@pytest.mark.interpreter
def test_every_row_comes_out_and_the_json_is_complete(tmp_path):
    pytest.importorskip("triton")
    settings = Settings(quick=True, threads=2, directory=tmp_path, rounds=1)
    with simulated_gpu(1 << 34):
        made = list(gpu.tables(settings, SIZES, EFFORT, SHAPE, RECIPE, copy_nbytes=1 << 12, product_size=32))
    card, kernels, *charts, conversions, summary = made
    print("\n".join(map(rendered, made)))
    assert card.rows[0]["device"] == "simulated GPU"

    unmeasured = [row for row in kernels.rows if row["note"]]
    assert unmeasured == []
    assert {row["kernel"] for row in kernels.rows} >= GOALS.keys()
    assert all(isinstance(row["copy rate"], float) for row in kernels.rows)
    with_peer = [row["× bitsandbytes"] for row in kernels.rows if row["× bitsandbytes"] is not None]
    assert len(with_peer) == 5 and set(with_peer) == {"not run: the device is simulated"}
    assert all(isinstance(row["× torch"], float) for row in kernels.rows if "LoftQ" not in str(row["kernel"]))

    assert not [row for row in conversions.rows if "failed" in str(row["note"])]
    found = {str(row["run"]): row for row in conversions.rows}
    assert found.keys() >= {run.name for run in RUNS} | {"qlora, starting", "loftq, starting"}
    for run in RUNS:
        assert not found[run.name]["note"] or "stays in the cache" in str(found[run.name]["note"])
    assert 0.0 < found["qlora, cached"]["read"] <= 1.0
    spans = conversions.details["LoftQ, cached"]["spans"]
    assert {span.resource for span in spans} == set(RESOURCES)
    assert any("C" in str(row["chart"]) for row in charts[0].rows)

    assert {row["figure"] for row in summary.rows} >= {f"{kernel}, share" for kernel in GOALS}
    assert {"device simulated GPU", f"torch {torch.__version__.partition('+')[0]}"} <= {
        part.partition("+")[0] for part in summary.notes[0].split(", ")
    }
    assert json.loads(json.dumps([asdict(table) for table in made]))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path, capsys):
    assert list(gpu.run(Settings(quick=False, threads=1, directory=tmp_path, rounds=1))) == []
    assert capsys.readouterr().out == "gpu: there is no CUDA device, and nothing is measured\n"


def test_what_overlaps_is_counted_once_and_drawn_in_its_place():
    spans = [Span("read", 0, 0.0, 2.0), Span("read", 0, 1.0, 3.0), Span("compute", 0, 3.0, 4.0)]
    spans += [Span("read", 1, 3.5, 4.0), Span("compute", 1, 8.0, 10.0)]
    found = busy(spans)
    assert found.seconds == 10.0
    assert found.shares["read"] == pytest.approx(0.35) and found.shares["compute"] == pytest.approx(0.3)
    legend, first, second = chart(spans)
    assert legend.startswith("stacks by 100.0 ms")
    assert first.split()[1][:45] == "r" * 30 + "C" * 11 + "." * 4
    assert second.split()[1][30:] == "." * 5 + "r" * 6 + "." * 39 + "C" * 20


def test_a_checkpoint_of_so_many_gigabytes_has_the_shapes_of_7b():
    shape = LlamaShape.of_gb(13.5)
    assert shape.layers == 32
    assert sum(tensor.nbytes for shard in shape.shards() for tensor in shard) == pytest.approx(13.5e9, rel=0.01)
    assert LlamaShape.of_gb(0.1).layers == 1
