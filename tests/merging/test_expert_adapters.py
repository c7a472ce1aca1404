"""Adapters on experts merge into the files of any family: the merged model computes what PEFT computes."""

from __future__ import annotations

import pytest
import torch
from support.mixtures import BOTH, MIXTURES, load, logits, mixture, tensors_of, trained

from loftq_cli.cli.main import _run

pytest.importorskip("peft")


def merged(base, adapter, out, *flags):
    assert _run(["merge", str(base), str(adapter), str(out), "--dtype", "float32", "--quiet", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(name, **values):
        key = (name, *values.items())
        if key not in made:
            made[key] = mixture(name, tmp_path_factory.mktemp("bases") / name, **values)
        return made[key]

    return base


@pytest.mark.parametrize("name", MIXTURES)
def test_a_merged_mixture_computes_what_peft_computes(name, bases, tmp_path):
    base = bases(name)
    adapter = trained(base, tmp_path / "adapter", target_parameters=BOTH, rank_pattern={r".*\.gate_up_proj": 5})
    out = merged(base, adapter.path, tmp_path / "out")
    assert adapter.wrappers
    assert (logits(load(out)) - adapter.logits).abs().max() < 1e-5
    before, after = tensors_of(base), tensors_of(out)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all("experts." in n or "put_linear" in n for n in changed)
