"""Every example in a docstring runs and prints what it shows."""

from __future__ import annotations

import doctest
import importlib

import pytest
from test_architecture import modules

WITH_EXAMPLES = [name for name, path in modules() if ">>> " in path.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_print_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried and not failed
