"""The command `loftq recipes`."""

from __future__ import annotations

import dataclasses
import json

from loftq_cli.api.recipes import recipes as list_recipes
from loftq_cli.cli import options
from loftq_cli.cli.render.console import format_nbytes, print_table, write_result


def recipes(as_json: options.Json = False) -> None:
    """List the presets of `loftq quantize --recipe`.

    Sizes are those of a model of 7 billion weights (Llama 2 7B), 13.48 GB in 16 bits: base and adapter together.
    """
    presets = list_recipes()
    if as_json:
        write_result(json.dumps([dataclasses.asdict(preset) for preset in presets], indent=2))
        return
    print_table(
        ("recipe", "bits", "rank", "7B", "loads in"),
        (
            (preset.name, f"{preset.bits_per_weight:.2f}", str(preset.rank))
            + (format_nbytes(preset.base_nbytes + preset.adapter_nbytes), preset.loaders)
            for preset in presets
        ),
    )
    write_result("")
    for preset in presets:
        write_result(f"{preset.name}: {preset.summary}")
