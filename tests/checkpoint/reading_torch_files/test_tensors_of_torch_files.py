"""Tensors of a torch zip file come back exactly, read as data and without torch."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.torch_files import bits, members_of, patched, saved, zipped

from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.tensors.headers import ITEMSIZE


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_comes_back_as_torch_saved_it(tmp_path: Path, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (3, 4 * ITEMSIZE[dtype]), generator=generator)
    expected = raw.to(torch.uint8).view(getattr(torch, dtype))  # [3, 4], every bit pattern, also NaN

    file = TorchFile(saved(tmp_path / "a.bin", {"w": expected.clone()}))
    loaded = file.load("w")

    assert (file.tensors["w"].dtype, file.tensors["w"].shape) == (dtype, (3, 4))
    assert (loaded.dtype, loaded.shape, loaded.is_contiguous()) == (expected.dtype, expected.shape, True)
    assert bits(loaded) == bits(expected)
    assert b"".join(file.chunks("w", 5)) == bits(expected)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1), (2, 3, 4, 5)])
def test_every_shape_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    expected = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)

    file = TorchFile(saved(tmp_path / "a.bin", {"before": torch.ones(3), "w": expected, "x": torch.ones(2)}))

    assert torch.equal(file.load("w"), expected)
    assert b"".join(file.chunks("w")) == bits(expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t(),
        lambda w: w[1:3],
        lambda w: w[:, 2:5],
        lambda w: w[::2, 1::3],
        lambda w: w.view(4, 3, 2).permute(2, 0, 1),
        lambda w: w[:, 5],
        lambda w: w[3, 5],
        lambda w: w[2:2],
        lambda w: w[:, :1],
    ],
    ids=["transposed", "rows", "columns", "strided", "permuted", "column", "element", "nothing", "thin"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint16])
def test_a_view_comes_back_contiguous_and_with_its_own_values(tmp_path: Path, view: Any, dtype: torch.dtype) -> None:
    expected = view(torch.arange(24, dtype=torch.float32).reshape(4, 6).to(dtype))

    file = TorchFile(saved(tmp_path / "a.bin", {"w": expected}))
    loaded = file.load("w")

    assert loaded.is_contiguous()
    assert (loaded.shape, bits(loaded)) == (expected.shape, bits(expected))
    assert b"".join(file.chunks("w", 5)) == bits(expected)
    if expected.ndim:
        for start, stop in [(0, expected.shape[0]), (expected.shape[0] // 2, expected.shape[0]), (0, 0)]:
            assert bits(file.load_rows("w", start, stop)) == bits(expected[start:stop])


def test_rows_that_do_not_exist_are_the_callers_mistake(tmp_path: Path) -> None:
    file = TorchFile(saved(tmp_path / "a.bin", {"w": torch.ones(5, 2)}))

    with pytest.raises(ValueError, match="no rows 3:6"):
        file.load_rows("w", 3, 6)


def test_a_models_state_dict_is_read_in_its_order(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2, bias=False))
    state = model.state_dict()  # an OrderedDict with a _metadata attribute

    file = TorchFile(saved(tmp_path / "pytorch_model.bin", state))

    assert list(file.tensors) == list(state)
    assert all(torch.equal(file.load(name), value) for name, value in state.items())


def test_parameters_are_read_as_their_tensors(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))

    file = TorchFile(saved(tmp_path / "a.bin", {"w": parameter, "v": parameter}))

    assert torch.equal(file.load("w"), parameter.detach())
    assert file.tensors["v"].alias_of == "w"


def test_a_tied_tensor_names_the_first_one(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(4, 3)
    state = {"embed": weight, "copy": weight.clone(), "head": weight, "again": weight.view(4, 3), "part": weight[:2]}

    file = TorchFile(saved(tmp_path / "a.bin", state))

    aliases = {name: ref.alias_of for name, ref in file.tensors.items()}
    assert aliases == {"embed": None, "copy": None, "head": "embed", "again": "embed", "part": None}
    assert torch.equal(file.load("head"), weight)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_one_level_down_is_found(tmp_path: Path, key: str) -> None:
    inner = OrderedDict(w=torch.ones(2))

    file = TorchFile(
        saved(tmp_path / "a.pt", {"epoch": 3, "loss": 0.5, "by": "me", "done": True, "x": None, key: inner})
    )

    assert list(file.tensors) == ["w"]


def test_a_tensor_that_is_called_model_is_a_tensor(tmp_path: Path) -> None:
    assert list(TorchFile(saved(tmp_path / "a.pt", {"model": torch.ones(2)})).tensors) == ["model"]


def test_a_tensor_saved_on_a_gpu_is_read_like_any_other(tmp_path: Path) -> None:
    path = patched(tmp_path / "a.bin", {"w": torch.arange(3.0)}, b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")

    assert torch.equal(TorchFile(path).load("w"), torch.arange(3.0))


def test_files_without_a_byteorder_record_are_read(tmp_path: Path) -> None:
    members = members_of(saved(tmp_path / "a.bin", {"w": torch.arange(3.0)}))  # torch before 2.0 wrote none
    old = zipped(tmp_path / "b.bin", {name: data for name, data in members.items() if "byteorder" not in name})

    assert torch.equal(TorchFile(old).load("w"), torch.arange(3.0))


def test_many_tensors_are_read(tmp_path: Path) -> None:
    state = {f"{i}": torch.tensor([float(i)]) for i in range(3000)}  # short names: the smallest pickle for its objects

    file = TorchFile(saved(tmp_path / "a.bin", state))

    assert list(file.tensors) == list(state)
    assert file.load("2999").item() == 2999.0


def test_the_pickle_is_read_without_torch(tmp_path: Path) -> None:
    saved(tmp_path / "a.bin", {"w": torch.ones(1)})
    program = (
        "import sys; from pathlib import Path\n"
        "from loftq_cli.checkpoint.source import open_checkpoint\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1]))\n"
        "assert list(checkpoint.tensors) == ['w'] and b''.join(checkpoint.chunks('w')) == b'\\0\\0\\x80?'\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )

    subprocess.run([sys.executable, "-c", program, tmp_path / "a.bin"], check=True, timeout=60)
