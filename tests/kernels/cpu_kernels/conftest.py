"""After every test, the reference serves again."""

from __future__ import annotations

from typing import Any

import pytest

from loftq_cli.triton_kernels.backend import use_reference_kernels


@pytest.fixture(autouse=True)
def the_reference_again() -> Any:
    yield
    use_reference_kernels()
