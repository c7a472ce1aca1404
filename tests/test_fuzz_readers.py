"""Readers under mutated input: a file is read, or refused with our own error; nothing else may escape."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loftq_cli.checkpoint.json_files import parse_json_object
from loftq_cli.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from loftq_cli.checkpoint.source import WeightsFile, open_checkpoint
from loftq_cli.checkpoint.torch_file import TorchFile
from loftq_cli.errors import LoftqError

bounded = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
