"""Nothing in a pickle is ever run: what is not a plain tensor is refused by name."""

from __future__ import annotations

import os
import pickle
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.torch_files import Runs, refusal, saved, with_pickle, zipped

from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.checkpoint.torch_pickle import read_state_dict

STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ"
BYTES = STORAGE.replace(b"ctorch\nFloatStorage\nX", b"ctorch.storage\nUntypedStorage\nX").replace(b"K\x06", b"K\x18")
VIEW = b"K\x00K\x06\x85K\x01\x85\x89}"  # offset 0, shape [6], stride [1], no gradient, no hooks
V2 = b"ctorch._utils\n_rebuild_tensor_v2\n("
V3 = b"ctorch._utils\n_rebuild_tensor_v3\n("
TENSOR = V2 + STORAGE + VIEW + b"tR"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n("


def with_entry(path: Path, entry: bytes) -> Path:
    """A file whose dict maps "w" to what this piece of a pickle makes; storage 0 holds six float32."""
    data = b"\x80\x02}X\x01\0\0\0w" + entry + b"s."
    return zipped(path, {"a/data.pkl": data, "a/data/0": bytes(torch.arange(6.0).view(torch.uint8).tolist())})


@pytest.mark.parametrize(
    "entry",
    [
        TENSOR,
        PARAMETER + TENSOR + b"\x88}tR",
        V3 + BYTES + VIEW + b"ctorch\nfloat32\ntR",
        V2 + STORAGE + b"K\x00K\x01K\x06\x86K\x00K\x01\x86\x89}tR",  # [1, 6]: no step is ever taken along the 0
    ],
)
def test_a_hand_made_tensor_is_read(tmp_path: Path, entry: bytes) -> None:
    assert TorchFile(with_entry(tmp_path / "a.bin", entry)).load("w").flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (PARAMETER + b"N\x88}tR", "torch._utils._rebuild_parameter"),
        (PARAMETER + TENSOR + b"\x88tR", "torch._utils._rebuild_parameter"),
        (PARAMETER + TENSOR + b"\x88}NtR", "torch._utils._rebuild_parameter"),
        (PARAMETER + TENSOR + b"\x88}X\x01\0\0\0hNstR", "torch._utils._rebuild_parameter"),
        (b"ctorch\nFloatStorage\n(" + TENSOR + b"\x88}tR", "torch.FloatStorage"),
        (b"ctorch\nFloatStorage\n(" + STORAGE + VIEW + b"tR", "torch.FloatStorage"),
        (V2 + TENSOR + VIEW + b"tR", "torch._utils._rebuild_tensor_v2"),
        (V2 + STORAGE + VIEW + b"}X\x04\0\0\0conj\x88stR", "torch._utils._rebuild_tensor_v2"),
        (V2 + BYTES + VIEW + b"tR", "torch._utils._rebuild_tensor_v2"),
        (V2 + BYTES + VIEW + b"ctorch\nfloat32\ntR", "torch._utils._rebuild_tensor_v2"),
        (V3 + BYTES + VIEW + b"tR", "torch._utils._rebuild_tensor_v3"),
        (V3 + BYTES + VIEW + b"NtR", "torch._utils._rebuild_tensor_v3"),
        (V3 + BYTES + VIEW + b"ctorch\nFloatStorage\ntR", "torch._utils._rebuild_tensor_v3"),
        (V3 + STORAGE + VIEW + b"ctorch\nfloat32\ntR", "torch._utils._rebuild_tensor_v3"),
    ],
)
def test_a_rebuilder_called_in_another_way_is_refused_by_name(tmp_path: Path, entry: bytes, name: str) -> None:
    message = f"its data.pkl calls {name} in a way that torch.save does not for plain tensors"

    assert refusal(with_entry(tmp_path / "a.bin", entry)).message == message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"storage", b"pickles"),
        (b"X\x03\0\0\0cpu", b"N"),
        (b"X\x03\0\0\0cpu", b""),
        (b"X\x01\0\0\x000", b"N"),
        (b"K\x06", b"X\x01\0\0\x006"),
        (b"K\x06", b"K\x06K\x06"),
        (b"K\x06", b"J\xff\xff\xff\xff"),
        (b"ctorch\nFloatStorage\n", b"X\x12\0\0\0torch.FloatStorage"),
        (b"ctorch\nFloatStorage\n", b"ctorch\nfloat32\n"),
    ],
)
def test_a_storage_described_in_another_way_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = with_entry(tmp_path / "a.bin", TENSOR.replace(old, new, 1))

    assert refusal(path).message == "its data.pkl describes a storage in an unknown way"


def test_a_call_to_the_shell_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    error = refusal(saved(tmp_path / "a.bin", {"w": Runs(os.system, f"touch {trace}")}))

    assert error.message == "its data.pkl names posix.system, which is not part of a tensor; nothing of it was run"
    assert error.hint == "convert it to .safetensors on a machine where you trust it"
    assert not trace.exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (subprocess.check_output, "subprocess.check_output"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
    ],
)
def test_any_other_function_is_refused_by_name(tmp_path: Path, function: Any, name: str) -> None:
    data = pickle.dumps({"w": Runs(function, "x")}, protocol=2, fix_imports=False)

    assert f"names {name}, which is not part of a tensor" in refusal(with_pickle(tmp_path / "a.bin", data)).message


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_call_in_a_later_pickle_protocol_is_refused_by_name(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps({"w": Runs(os.system, "true")}, protocol=protocol)

    assert "names posix.system by STACK_GLOBAL" in refusal(with_pickle(tmp_path / "a.bin", data)).message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"(S'true'\niposix\nsystem\n.", "holds the opcode STRING"),
        (b"(iposix\nsystem\n.", "holds the opcode INST for posix.system"),
        (b"\x80\x02\x82\x01.", "holds the opcode EXT1"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "holds the opcode NEWOBJ"),
        (b"\x80\x02(ccollections\nOrderedDict\no.", "holds the opcode OBJ"),
        (b"\x80\x02P1\n.", "holds the opcode PERSID"),
        (b"\x80\x02}0.", "holds the opcode POP"),
        (b"\x80\x02}\x80\x02.", "holds the opcode PROTO"),
        (b"\x80\x02C\x01a.", "holds the opcode SHORT_BINBYTES"),
        (b"\x80\x02ccollections\nOrderedDict\n}\x85R.", "calls collections.OrderedDict in a way"),
        (b"\x80\x02}}R.", "calls None in a way"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage in a way"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "calls torch._utils._rebuild_tensor_v2 in a way"),
        (b"\x80\x02}}X\x01\0\0\0aNsb.", "sets attributes on an object"),
        (b"\x80\x02}]b.", "sets attributes on an object"),
        (b"\x80\x04NX\x06\0\0\0system\x93.", "names something by STACK_GLOBAL"),
        (b"\x80\x04X\x05\0\0\0posixN\x93.", "names something by STACK_GLOBAL"),
        (b"\x80\x02}X\x01\0\0\0aNX\x01\0\0\0aNs.", "is not well formed"),
        (b"\x80\x02}(X\x01\0\0\0aNX\x01\0\0\0aNu.", "holds the key a twice"),
        (b"\x80\x02})Ns.", "holds a key that is neither text nor a number"),
        (b"\x80\x02}(Nu.", "is not well formed"),
        (b"\x80\x02Q.", "is not well formed"),
        (b"\x80\x02NQ.", "describes a storage in an unknown way"),
        (b"\x80\x02h\x05.", "is not well formed"),
        (b"\x80\x02(q\x00.", "is not well formed"),
        (b"\x80\x02Ne.", "is not well formed"),
        (b"\x80\x02.", "is not well formed"),
        (b"\x80\x02Nt.", "is not well formed"),
        (b"\x80\x02(.", "is not well formed"),
        (b"\x80\x02}.}", "goes on after its end"),
        (b"\x80\x02}", "pickle exhausted before seeing STOP"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "expected 2147483647 bytes"),
        (b"\x80\x02\xff.", "opcode b'\\xff' unknown"),
        (b"\x80\x02].", "does not hold a dict of tensors"),
        (b"N.", "does not hold a dict of tensors"),
        (b"\x80\x02K\x01" + b"\x85" * 200_000 + b".", "needs more memory than its size allows"),
        (b"\x80\x02" + b"}" * 200_000 + b".", "needs more memory than its size allows"),
        (b"\x80\x02" + b"K\x01" * 70_000 + b".", "needs more memory than its size allows"),
        (b"\x80\x02K\x01" + b"\x94" * 200_000 + b".", "needs more memory than its size allows"),
        (b"", "pickle exhausted before seeing STOP"),
    ],
)
def test_a_pickle_that_torch_would_not_write_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    error = refusal(with_pickle(tmp_path / "a.bin", data))

    assert error.message.startswith("its data.pkl ")
    assert message in error.message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), "does not hold a dict of tensors"),
        ([torch.ones(2)], "does not hold a dict of tensors"),
        ({"w": torch.ones(2), "epoch": 3}, "holds 'epoch' (int), which is not a tensor"),
        ({"w": torch.ones(2), "names": ["a"]}, "holds 'names' (list), which is not a tensor"),
        ({"w": torch.ones(2), "storage": torch.ones(2).untyped_storage()}, "holds 'storage' (storage)"),
        ({"w": torch.float8_e5m2}, "holds 'w' (type), which is not a tensor"),
        ({"a": {"w": torch.ones(2)}}, "holds 'a' (dict), which is not a tensor"),
        ({"model": {"model": {"w": torch.ones(2)}}}, "holds 'model' (dict), which is not a tensor"),
        ({"state_dict": {}, "optimizer": {}}, "holds 'optimizer' (dict) beside its state_dict"),
        ({"state_dict": {}, "ema": torch.ones(1)}, "holds 'ema' (tensor) beside its state_dict"),
        ({1: torch.ones(2)}, "names a tensor 1"),
        ({"": torch.ones(2)}, "names a tensor ''"),
        ({"\x1b[2J[bold]": 1}, r"holds '\x1b[2J[bold]' (int), which is not a tensor"),
        ({"w": torch.ones(2).to_sparse()}, "names torch._utils._rebuild_sparse_tensor, which is not part"),
        ({"w": torch.ones(2, device="meta")}, "names torch._utils._rebuild_meta_tensor_no_storage, which is not part"),
        ({"w": torch.zeros(2, dtype=torch.complex64).conj()}, "calls torch._utils._rebuild_tensor_v2 in a way"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "names torch.ComplexDoubleStorage, which is not part"),
    ],
)
def test_what_is_not_a_plain_tensor_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    error = refusal(saved(tmp_path / "a.bin", value))

    assert message in error.message


def test_a_script_module_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pt", b"\x80\x02c__torch__.modules.Linear\nLinear\n)\x81.")

    assert "names __torch__.modules.Linear.Linear, which is not part of a tensor" in refusal(path).message


def test_an_odd_backslash_is_no_warning_of_python() -> None:
    """Python decodes such a text with a DeprecationWarning, before the opcode is refused by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="STRING"):
            read_state_dict(bytearray(b"S'\\d'\n."))
