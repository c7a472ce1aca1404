"""A torch zip file is read as data: tensors come back exactly, and nothing in the file is ever run or inflated."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.errors import InputError, StorageError
from loftq_cli.tensors.headers import ITEMSIZE


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_pickle(path: Path, data: bytes) -> Path:
    return zipped(path, {"archive/data.pkl": data, "archive/byteorder": b"little"})


def patched(path: Path, value: Any, old: bytes, new: bytes) -> Path:
    """What torch.save writes for `value`, with `old` in its pickle replaced by `new`."""
    members = members_of(saved(path, value))
    name = next(name for name in members if name.endswith("/data.pkl"))
    assert members[name].count(old) == 1
    return zipped(path, {**members, name: members[name].replace(old, new)})


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    assert caught.value.file == str(path)
    assert caught.value.hint is not None
    return caught.value


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


class Runs:
    """An object whose pickle calls `function(*args)` when it is loaded."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


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


NO_PICKLE = "holds no folder/data.pkl, where torch.save puts its pickle"
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


def test_an_expanded_tensor_is_refused_before_its_160_gb_are_made(tmp_path: Path) -> None:
    error = refusal(saved(tmp_path / "a.bin", {"w": torch.zeros(1).expand(200_000, 200_000)}))

    assert error.tensor == "w"
    assert error.message == "it is expanded (stride 0) to shape [200000, 200000], more than its storage holds"


def test_a_sliding_window_over_a_small_storage_is_refused(tmp_path: Path) -> None:
    window = torch.zeros(1999).as_strided((1000, 1000), (1, 1))  # a million elements over two thousand

    error = refusal(saved(tmp_path / "a.bin", {"w": window}))

    assert (error.tensor, error.message) == ("w", "its shape [1000, 1000] reaches outside its storage of 7996 bytes")


def test_thousands_of_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    weight = torch.zeros(1000)

    error = refusal(saved(tmp_path / "a.bin", {f"w{i}": weight[i:] for i in range(100)}))

    assert (error.tensor, error.message) == ("w4", "it is one of too many views of storage 0")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "its shape [2, 4] reaches outside its storage of 24 bytes"),
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86", "its shape [2, 3] reaches outside its storage of 24 bytes"),
        (b"QK\x00K\x02", b"QK\x01K\x02", "its shape [2, 3] reaches outside its storage of 24 bytes"),
        (b"K\x06tq", b"K\x07tq", "its storage 0 should have 28 bytes and has 24 bytes"),
        (b"X\x01\0\0\x000", b"X\x01\0\0\x001", "its storage 1 should have 24 bytes and is missing"),
        (b"FloatStorage", b"HalfStorage", "its storage 0 should have 12 bytes and has 24 bytes"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    error = refusal(patched(tmp_path / "a.bin", {"w": torch.ones(2, 3)}, old, new))

    assert (error.tensor, error.message) == ("w", message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x02K\x03\x86", b"K\x02\x85", "whose shape, strides and offset do not fit together"),
        (b"K\x03K\x01\x86", b"J\xfd\xff\xff\xffK\x01\x86", "its shape holds something that is not a size"),
        (b"QK\x00K\x02", b"QJ\xff\xff\xff\xffK\x02", "whose shape, strides and offset do not fit together"),
        (b"QK\x00K\x02", b"Q\x88K\x02", "whose shape, strides and offset do not fit together"),
        (b"K\x02K\x03\x86", b"\x88K\x03\x86", "its shape holds something that is not a size"),
        (b"K\x02K\x03\x86", b"K\x00\x8a\x08" + b"\xff" * 7 + b"\x3f\x86", "something that is not a size"),
        (b"K\x06tq", b"J\xff\xff\xff\xfftq", "describes a storage in an unknown way"),
        (b"FloatStorage", b"bfloat16", "describes a storage in an unknown way"),
        (b"X\x01\0\0\x000", b"K\x00", "describes a storage in an unknown way"),
        (b")R", b")RX\x01\0\0\0aNs", "calls torch._utils._rebuild_tensor_v2 in a way"),
    ],
)
def test_a_tensor_described_with_nonsense_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = patched(tmp_path / "a.bin", {"w": torch.ones(2, 3)}, old, new)

    assert message in refusal(path).message


def test_a_deflated_bomb_is_refused_without_inflating_it(tmp_path: Path) -> None:
    members = members_of(saved(tmp_path / "a.bin", {"w": torch.zeros(16_000_000)}))
    bomb = zipped(tmp_path / "bomb.bin", members, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    del members

    tracemalloc.start()
    error = refusal(bomb)
    peak_nbytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert "is compressed or encrypted" in error.message
    assert peak_nbytes < 1_000_000  # inflated, it has 64 MB


def test_a_hostile_pickle_costs_a_small_multiple_of_its_size(tmp_path: Path) -> None:
    data = b"\x80\x02]" + (b"(" + b"}K\x01K\x01s" * 10_000 + b"e") * 10 + b"."
    path = with_pickle(tmp_path / "a.bin", data)

    tracemalloc.start()
    error = refusal(path)
    peak_nbytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert "needs more memory than its size allows" in error.message
    assert peak_nbytes < 25 * len(data)


@pytest.mark.parametrize("name", ["../w", "/etc/w", "archive/../../w", "archive\\..\\w"])
def test_a_member_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    members = members_of(saved(tmp_path / "a.bin", {"w": torch.ones(1)}))

    assert "has a name that leads elsewhere" in refusal(zipped(tmp_path / "b.bin", {**members, name: b""})).message


def test_a_member_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(1)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data/0", bytes(4))

    assert "its member a/data/0 stands twice" in refusal(path).message


def test_a_member_of_two_sizes_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 20] = 1  # the compressed size in the directory
    path.write_bytes(content)

    assert "its member archive/data.pkl has two sizes" in refusal(path).message


def test_a_member_name_with_a_hidden_end_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/data/0~x": b""})
    path.write_bytes(path.read_bytes().replace(b"a/data/0~x", b"a/data/0\0x"))

    assert r"its member a/data/0\x00x has a name that leads elsewhere" in refusal(path).message


def test_a_zip_directory_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    end = bytearray(path.read_bytes()[-22:])
    end[12:16] = (1 << 25).to_bytes(4, "little")  # the size of the directory
    os.truncate(path, 1 << 26)
    with path.open("ab") as stream:
        stream.write(end)

    assert refusal(path).message == "is not a usable torch file: its directory claims 33554432 bytes"


def test_two_pickles_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/b/data.pkl": b"\x80\x02}."})

    assert refusal(path).message == "holds 2 pickles named data.pkl, not one"


def test_a_pickle_outside_a_folder_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"data.pkl": b"\x80\x02}."})

    assert refusal(path).message == NO_PICKLE


def test_a_zip_file_of_something_else_is_refused(tmp_path: Path) -> None:
    assert refusal(zipped(tmp_path / "a.bin", {"a.txt": b""})).message == NO_PICKLE


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"})

    assert refusal(path).message == "was not written on a little-endian machine"


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # general purpose bit 0 of the first directory entry
    path.write_bytes(content)

    assert "its member archive/data.pkl is compressed or encrypted" in refusal(path).message


def test_a_member_whose_two_headers_disagree_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    content[30] = ord("x")  # the first letter of the name in the first local header
    path.write_bytes(content)

    assert "its member archive/data.pkl is described in two ways" in refusal(path).message


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.bin", {"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(4)})
    content = bytearray(path.read_bytes())
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content[second + 42 : second + 46] = (30).to_bytes(4, "little")  # where its local header is said to be
    path.write_bytes(content)

    assert "its member a/data/0 overlaps the one before it" in refusal(path).message


def test_a_member_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2  # compressed and plain size
    path.write_bytes(content)

    assert "its member archive/data.pkl ends after the data" in refusal(path).message


def test_a_pickle_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive, archive.open("a/data.pkl", "w") as member:
        for _ in range(101):
            member.write(bytes(1_000_000))

    assert refusal(path).message == "its data.pkl has 101000000 bytes; 100000000 are allowed"


def test_a_legacy_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)

    error = refusal(tmp_path / "a.bin")

    assert error.message == "is a bare pickle of the legacy torch format, which is not read here"


def test_a_tar_file_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.bin", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())

    assert refusal(tmp_path / "a.bin").message == "is a tar file of a very old torch, which is not read here"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a git-LFS pointer"),
        (b"hello", "is not a torch zip file"),
        (b"PK\x03\x04", "is not a usable torch file: its directory points outside the file"),
        (b"PK\x03\x04" + bytes(100), "is not a usable torch file: File is not a zip file"),
        (b"PK\x03\x04" + b"PK\x05\x06" + b"\xff" * 18, "is not a usable torch file"),
        (b"PK\x03\x04" + b"PK\x06\x07" + bytes(16) + b"PK\x05\x06" + b"\xff" * 18, "is not a usable torch file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)

    assert message in refusal(tmp_path / "a.bin").message


def test_a_script_module_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "a.pt", b"\x80\x02c__torch__.modules.Linear\nLinear\n)\x81.")

    assert "names __torch__.modules.Linear.Linear, which is not part of a tensor" in refusal(path).message


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(100)})
    os.truncate(path, path.stat().st_size - 200)

    assert refusal(path).message == "is not a usable torch file: File is not a zip file"


def test_a_file_cut_short_between_two_chunks_is_a_storage_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(1000)})
    chunks = TorchFile(path).chunks("w", 100)
    next(chunks)
    os.truncate(path, 2000)

    with pytest.raises(StorageError, match=r"changed while it was being read: it ends \d+ bytes early"):
        list(chunks)


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", {"w": torch.ones(100)})
    file = TorchFile(path)
    file.check_unchanged()
    os.replace(saved(tmp_path / "b.bin", {"w": torch.zeros(100)}), path)

    with pytest.raises(StorageError, match="changed while it was being read"):
        file.check_unchanged()
    with pytest.raises(StorageError, match="changed while it was being read"):
        file.load("w")


@pytest.mark.parametrize("is_view", [False, True])
def test_chunks_of_no_size_are_the_callers_mistake(tmp_path: Path, is_view: bool) -> None:
    weight = torch.ones(2, 3)
    file = TorchFile(saved(tmp_path / "a.bin", {"w": weight.t() if is_view else weight}))

    with pytest.raises(ValueError, match="chunk_nbytes is at least 1"):
        list(file.chunks("w", 0))
