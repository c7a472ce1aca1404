"""Every kernel compiles for GPUs that are not there, spills no registers, and decides codes with exact arithmetic.

The compiler and the disassembler are those in Triton's wheel; what is compiled is every launch that triton_launches
makes. A kernel that is not among them fails here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.triton_builds import TARGETS

pytest.importorskip("triton")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All builds, made in a process in which Triton compiles; without what an earlier run may have left in a cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.support.triton_builds"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def described(build: dict[str, Any]) -> str:
    return f"{build['name']} {build['constants']} {build['types']} for {build['target']}"


def kernels() -> set[str]:
    """The names of all kernels: functions under @triton.jit that return nothing."""
    names = set()
    for path in (ROOT / "triton_kernels").rglob("*triton.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            if not any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
                continue
            if not any(isinstance(inner, ast.Return) for inner in ast.walk(node)):
                names.add(node.name)
    return names


def test_every_kernel_is_built_for_every_target(builds):
    assert {(b["name"], b["target"]) for b in builds} == {(name, target) for name in kernels() for target in TARGETS}


def test_no_kernel_spills_registers(builds):
    for build in builds:
        assert build["spills"] == 0 and build["stack_nbytes"] == 0, described(build)


def test_no_kernel_divides_approximately(builds):
    assert not [described(build) for build in builds if build["divides_fast"]]


def test_what_decides_codes_is_fused_only_where_it_says_so(builds):
    """An explicit tl.fma packs two codes; the compiler adds none."""
    for build in builds:
        if build["name"] == "_quantize_blocks" and build["target"].startswith("sm_"):
            weights = int(build["constants"]["BLOCKS"]) * int(build["constants"]["WIDTH"]) // build["threads"]
            assert build["fused"] == weights // 2, described(build)


def test_integers_and_constants_are_made_and_decoded_without_fused_multiply_adds(builds):
    exact = {"_quantize_groups", "_dequantize_groups", "_quantize_constants", "_dequantize_constants"}
    for build in builds:
        assert build["name"] not in exact or build["fused"] == 0, described(build)


def test_quantizing_bfloat16_takes_at_most_22_instructions_a_weight_on_hopper(builds):
    measured = []
    for build in builds:
        constants = build["constants"]
        is_plain = constants.get("BLOCK_SIZE") == "64" and constants.get("HAS_MINUS") == "False"
        if (
            build["name"] == "_quantize_blocks"
            and build["target"] == "sm_90"
            and is_plain
            and "*bf16" in build["types"]
        ):
            weights = int(constants["BLOCKS"]) * int(constants["WIDTH"]) // build["threads"]
            measured.append(build["instructions"] / weights)
    assert measured and max(measured) <= 22
