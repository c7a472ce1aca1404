"""Every kernel that the package launches, compiled for GPUs that need not be there, and what the machine code holds.

    python -m tests.triton_builds [ARCHITECTURE...]      JSON, one object a build

Launches are recorded, not run: the contracts are called with tensors on the CPU and a launcher that takes notes. So
what is compiled here is what a GPU would compile, with the same types, constants and alignment. Must run without
TRITON_INTERPRET, in a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Launch:
    """What one launch would have the compiler make. `weights` is how many elements a program works on."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, tuple(map(self._type, self.arguments)), tuple(self.constants.items()), self.num_warps

    @staticmethod
    def _type(argument: Any) -> str:
        if isinstance(argument, torch.Tensor):
            names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8", "int8": "i8"}
            names |= {"int32": "i32", "int64": "i64", "float64": "fp64", "bool": "i1", "int16": "i16"}
            return "*" + names[str(argument.dtype).removeprefix("torch.")]
        if isinstance(argument, bool):
            return "i1"
        if isinstance(argument, int):
            return "i32" if -(2**31) <= argument < 2**31 else "i64"
        return "fp32"

    def signature(self) -> tuple[dict[str, str], dict[tuple[int, ...], Any]]:
        """Of the kernel's parameters: types, and which are known to be multiples of 16."""
        types = dict(zip(self.kernel.arg_names, map(self._type, self.arguments), strict=False))
        attributes: dict[tuple[int, ...], Any] = {}
        for i, argument in enumerate(self.arguments):
            is_tensor = isinstance(argument, torch.Tensor)
            number = argument.data_ptr() if is_tensor else argument
            if isinstance(number, int) and not isinstance(number, bool) and (is_tensor or number) and number % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return types | dict.fromkeys(self.constants, "constexpr"), attributes


@dataclass(frozen=True)
class Build:
    """What is known of the machine code of a launch.

    stack_nbytes   of a thread's memory: nothing but spilled registers lies there
    instructions   in the code of one thread, subroutines included; None but for sm_90, as disassembling takes longest
    threads        of a program
    """

    name: str
    target: str
    constants: dict[str, str]
    types: list[str]
    registers: int
    stack_nbytes: int
    spills: int
    shared_nbytes: int
    instructions: int | None
    threads: int
    divides_fast: bool
    fused: int


def recorded(calls: Callable[[], Any]) -> list[Launch]:
    """The different launches of what `calls` calls; nothing is launched."""
    from loftq_cli.triton_kernels import launch_triton

    found: dict[tuple[Any, ...], Launch] = {}

    def note(kernel: Any, grid: Any, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        launch = Launch(kernel.fn.__name__, kernel, arguments, constants, num_warps)
        found.setdefault(launch.key, launch)

    modules = [m for name, m in list(sys.modules.items()) if name.endswith("triton") and hasattr(m, "launch")]
    before = [(module, module.launch) for module in modules]
    for module in [*modules, launch_triton]:
        module.launch = note
    try:
        calls()
    finally:
        for module, launch in before:
            module.launch = launch
    return list(found.values())


def build(launch: Launch, target: str) -> Build:
    """Compile it for "sm_90", "gfx942" ..."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if is_cuda else GPUTarget("hip", target, 64)
    types, attributes = launch.signature()
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=launch.constants, attrs=attributes)
    made = triton.compile(source, target=gpu, options={"num_warps": launch.num_warps, "enable_fp_fusion": False})
    registers = stack = spills = 0
    instructions = None
    if is_cuda:
        usage = told("cuobjdump", "-res-usage", made.asm["cubin"])
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
        if target == "sm_90":
            sass = told("nvdisasm", "-c", made.asm["cubin"])
            instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S.*?;", sass))
            spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        text = made.asm["ptx"]
    else:
        text = made.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # type: ignore[index]
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])  # type: ignore[index]
    return Build(
        name=launch.name,
        target=target,
        constants={name: str(value) for name, value in launch.constants.items()},
        types=[kind for kind in types.values() if kind != "constexpr"],
        registers=registers,
        stack_nbytes=stack,
        spills=spills,
        shared_nbytes=int(made.metadata.shared),
        instructions=instructions,
        threads=launch.num_warps * gpu.warp_size,
        divides_fast="div.full" in text or "div.approx" in text,
        fused=sum(2 if pair else 1 for pair in re.findall(r"\bfma\.rn\.f32(x2)?\b", made.asm.get("ptx", ""))),
    )


def told(tool: str, option: str, cubin: bytes) -> str:
    """What a tool in Triton's wheel says of machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        run = subprocess.run([str(tools / tool), option, str(file)], capture_output=True, text=True, check=True)
    return run.stdout


def launches() -> Iterator[Launch]:
    """Every kernel of the package in the forms that conversions use."""
    from tests.support.triton_launches import calls

    seen = set()
    for call in calls():
        for launch in recorded(call):
            if launch.key not in seen:
                seen.add(launch.key)
                yield launch


if __name__ == "__main__":
    for launch in launches():
        for target in sys.argv[1:] or TARGETS:
            print(json.dumps(asdict(build(launch, target))), flush=True)
