"""A small llama in every integer format, method and container, each converted once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.conversions import run_conversion
from support.integer_files import FAST, INTEGERS, Converted, Converter, combination

from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import METHODS


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.llama(tmp_path_factory.mktemp("source") / "llama", layers=1)


@pytest.fixture(scope="session")
def convert_once(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """The small llama by a recipe, each recipe once."""

    @functools.cache
    def convert_by(**recipe: Any) -> Converted:
        output = tmp_path_factory.mktemp("case") / "converted"
        run_conversion(source, output, **{**FAST, **recipe})
        return Converted(source, output, {**FAST, **recipe})

    return convert_by


ALL = [
    combination(quant_type, method, layout)
    for quant_type in INTEGERS
    for method in METHODS
    for layout, row in LAYOUTS.items()
    if quant_type in row.quant_types
]


@pytest.fixture(params=ALL, ids=lambda recipe: "-".join((recipe["quant_type"], recipe["method"], recipe["layout"])))
def converted(request: pytest.FixtureRequest, convert_once: Converter) -> Converted:
    return convert_once(**request.param)
