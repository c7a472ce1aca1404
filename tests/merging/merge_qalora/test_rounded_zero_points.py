"""Integer zero points: what rounding loses is measured, and refused where most of the update would be lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapters import names_in
from support.qalora_merges import (
    BASES,
    assert_exact,
    config_of,
    container_of,
    grids,
    loaded_weights,
    lost_by_hand,
    trained,
)

from loftq_cli.cli.main import _run
from loftq_cli.model.stored import BaseModel

# Integer zero points: measured, and refused where they lose most of the update.


def rounded_by_hand(base: Path, updates: dict[str, np.ndarray], bits: int) -> tuple[dict[str, np.ndarray], float]:
    """Zero points round(zero − U / scale) inside the codes' range, and ||W_merged − W_exact|| / ||update||."""
    zeros, wrong = {}, 0.0
    for module, grid in grids(base).items():
        update = updates[module][:, :: grid.group_size]
        zeros[module] = np.clip(np.rint(grid.zero_points - update / grid.scales), 0, 2**bits - 1)
        wrong += np.square(grid.scales * (grid.zero_points - zeros[module]) - update).sum() * grid.group_size
    return zeros, float(np.sqrt(wrong / sum(np.square(update).sum() for update in updates.values())))


@pytest.mark.parametrize(("container", "bits"), [(c, b) for c, b in BASES if c not in ("metal", "mlx")])
@pytest.mark.parametrize("share", [0.05, 2.0])
def test_rounded_zero_points_lose_what_they_lose_by_hand(share, container, bits, converted, merge, tmp_path):
    base = converted(container, bits)
    adapter = trained(base, tmp_path / "adapter", share=share)
    zeros, lost = rounded_by_hand(base, adapter.updates, bits)
    ends = np.concatenate([np.isin(zero, (0, 2**bits - 1)).ravel() for zero in zeros.values()])
    assert ends.mean() > (0.02 if share > 1 else -1)  # a large update reaches the ends of the codes' range

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros", "--force", "--json")

    own = "gptq" if container == "gptq" else "compressed-tensors"
    assert (ran.status, ran.err, ran.json["layout"]) == (0, "", own)
    assert container_of(tmp_path / "out") == (own, bits, 32)
    before, after = grids(base), grids(tmp_path / "out")
    for module, grid in after.items():
        assert np.array_equal(grid.codes, before[module].codes)
        assert np.array_equal(grid.scales, before[module].scales)
        assert np.allclose(grid.zero_points, zeros[module], rtol=1e-12)
    # squares of float32 sums
    assert ran.json["lost"] == pytest.approx(lost, rel=1e-5)
    assert ran.json["lost"] == pytest.approx(lost_by_hand(base, tmp_path / "out", adapter.updates), rel=1e-5)


@pytest.mark.parametrize("container", ["compressed-tensors", "gptq"])
def test_rounding_away_an_update_of_one_percent_is_refused(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", share=0.01)
    _, lost = rounded_by_hand(base, adapter.updates, 4)
    assert lost > 0.98

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros")

    assert (ran.status, ran.out) == (5, "")
    assert ran.line.startswith(f"error: {base}: with rounded zero points, {lost:.1%} of the update would be lost (")
    assert "leave out --round-zeros; or --force" in ran.line
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize(("share", "low", "high", "status"), [(0.154, 0.5, 0.52, 5), (0.162, 0.48, 0.5, 0)])
def test_rounding_may_lose_half_of_an_update_and_no_more(share, low, high, status, converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=share)
    _, lost = rounded_by_hand(base, adapter.updates, 4)
    assert low < lost < high

    assert merge(base, adapter, tmp_path / "out", "--round-zeros").status == status


def test_a_large_update_survives_rounding(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    _, lost = rounded_by_hand(base, adapter.updates, 4)
    assert lost < 0.5

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros")

    assert ran.status == 0
    assert f"lost     {lost:.2%} of the update" in ran.out
    assert "7 layers, compressed-tensors" in ran.out


def test_progress_names_the_share_that_each_layer_lost(converted, tmp_path, capsys):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.01)

    status = _run(["merge", str(base), str(adapter.path), str(tmp_path / "out"), "--round-zeros", "--force"])

    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    report = json.loads((tmp_path / "out" / "loftq_merge_report.json").read_text())
    assert status == 0
    assert report["round_zeros"] is True
    for number, (line, layer) in enumerate(zip(said, report["layers"], strict=True), 1):
        assert line == f"[{number}/7] {layer['name']}: changed by 1.00%, {layer['lost']:.2g} of it lost"


def test_transformers_loads_rounded_zero_points(converted, merge, tmp_path):
    base = converted("compressed-tensors")
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    assert merge(base, adapter, tmp_path / "out", "--round-zeros").status == 0

    weights = loaded_weights(tmp_path / "out")

    for module, grid in grids(tmp_path / "out").items():
        # bfloat16 scale times a whole number is exact in float64: rounded once
        assert torch.equal(weights[module], torch.from_numpy(grid.values).to(torch.bfloat16))


def test_rounded_zero_points_of_gptq_are_read_back(converted, merge, tmp_path):
    base = converted("gptq")
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    assert merge(base, adapter, tmp_path / "out", "--round-zeros").status == 0

    config = config_of(tmp_path / "out")["quantization_config"]
    assert (config["checkpoint_format"], config["sym"], config["desc_act"]) == ("gptq_v2", False, False)
    with BaseModel.open(tmp_path / "out") as opened:
        for module, grid in grids(tmp_path / "out").items():
            expected = torch.from_numpy(grid.values).to(torch.float16).float()
            assert torch.equal(opened.matrix(f"{module}.weight"), expected)


@pytest.mark.parametrize("container", ["metal", "mlx"])
def test_a_base_of_float_offsets_can_be_rounded_to_integers(container, converted, merge, tmp_path):
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", share=0.3)
    _, lost = rounded_by_hand(base, adapter.updates, 4)

    ran = merge(base, adapter, tmp_path / "out", "--round-zeros", "--force", "--json")

    assert (ran.status, container_of(tmp_path / "out")[0]) == (0, "compressed-tensors")
    assert ran.json["lost"] == pytest.approx(lost, rel=1e-5)


# An adapter that adds nothing.


@pytest.mark.parametrize("arguments", [(), ("--round-zeros",), ("--layout", "dense")])
@pytest.mark.parametrize("container", ["compressed-tensors", "compressed-tensors of float32", "gptq"])
def test_an_adapter_that_adds_nothing_loses_nothing(container, arguments, converted, merge, tmp_path):
    base = converted(container)

    ran = merge(base, base / "qalora_init", tmp_path / "out", *arguments, "--json")

    assert (ran.status, ran.err) == (0, "")
    assert ran.json["lost"] in (0.0, None)


@pytest.mark.parametrize(
    ("container", "arguments"),
    [("metal", ("--round-zeros",)), ("compressed-tensors of float32", ("--scale-dtype", "bfloat16"))],
)
def test_offsets_that_move_the_base_under_an_adapter_of_nothing_are_refused(
    container, arguments, converted, merge, tmp_path
):
    base = converted(container)

    ran = merge(base, base / "qalora_init", tmp_path / "out", *arguments)
    forced = merge(base, base / "qalora_init", tmp_path / "out", *arguments, "--force", "--json")

    assert ran.status == 5
    assert "inf" not in ran.line
    assert (forced.status, forced.json["lost"]) == (0, None)  # a share of nothing


@pytest.mark.parametrize("container", ["compressed-tensors", "compressed-tensors of float32"])
def test_an_exact_merge_is_never_refused_for_a_tiny_update(container, converted, merge, tmp_path):
    # Below float32's own rounding of the weights there is nothing that could be kept, and nothing to be refused.
    base = converted(container)
    adapter = trained(base, tmp_path / "adapter", share=1e-9)

    ran = merge(base, adapter, tmp_path / "out")

    assert (ran.status, ran.err) == (0, "")
    assert_exact(base, tmp_path / "out", adapter.updates)
