"""The table of targets: a name, what starts it, and its share of all inputs. Slow ones get a small share."""

from __future__ import annotations

from loftq_cli.layouts.layout import LAYOUTS
from tests.fuzzing import adapters, models, results, weight_files
from tests.fuzzing.engine import Target

TARGETS: dict[str, Target] = {
    "json": Target(weight_files.json_objects, 24),
    "safetensors": Target(weight_files.safetensors, 12),
    "torch-zip": Target(weight_files.torch_zip, 5),
    "torch-pickle": Target(weight_files.torch_pickle, 16),
    "folder": Target(weight_files.folder, 5),
    "family": Target(models.families, 14),
    "plan": Target(models.plans, 6),
    **{f"base-{name}": Target(models.container(name), 1) for name, row in LAYOUTS.items() if row.stores_codes},
    "adapter": Target(adapters.adapter, 5),
    "merge": Target(adapters.merge, 2),
    "inspection": Target(adapters.inspection, 2),
    "report": Target(results.report, 6),
    "provenance": Target(results.provenance, 3),
    "checksums": Target(results.checksums, 8),
    "journal": Target(results.journal, 6),
    "recipe": Target(results.recipe, 2),
}
