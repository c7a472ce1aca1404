"""Freed buffers stay with the process: pages are zeroed once, not for each slab of rows."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from loftq_cli.runtime.allocator import LARGEST_HEAP_BUFFER

PROGRAM = """
import resource, sys, torch
from loftq_cli.runtime.allocator import keep_freed_buffers
assert keep_freed_buffers()
nbytes = int(sys.argv[1])
for _ in range(40):  # the heap grows until it has a place for the buffer
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(nbytes, dtype=torch.uint8).fill_(1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / nbytes)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's option")
@pytest.mark.parametrize(("nbytes", "is_kept"), [(LARGEST_HEAP_BUFFER // 2, True), (2 * LARGEST_HEAP_BUFFER, False)])
def test_a_buffer_of_a_slab_is_no_new_memory_and_a_larger_one_is(nbytes, is_kept):
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(nbytes)], capture_output=True, text=True, check=True)
    renewed = float(run.stdout)  # of 20 buffers
    assert renewed < 5 if is_kept else renewed > 15
