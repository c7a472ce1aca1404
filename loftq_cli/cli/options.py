"""Options of merge, and options of several commands. Each option has a single declaration, with help and default."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from loftq_cli.errors import UsageError
from loftq_cli.layouts.layout import DENSE, LAYOUTS
from loftq_cli.quant.formats import FORMATS
from loftq_cli.runtime.gpu import DEVICES
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.specs import POOLINGS

ADVANCED = "Advanced options"  # the panel of the help after the basic options


def one_of(names: Iterable[str]) -> str:
    """The choices of an option as help shows the choices.

    >>> one_of(["nf4", "fp4"])
    'nf4|fp4'
    """
    return "|".join(names)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model directory of transformers or diffusers, a pipeline of diffusers, one .safetensors or torch .bin "
        "file, or builtin:NAME. FP8 with scales is decoded.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="The directory to write.", show_default=False)]
MaxShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="[default: 5GB]", show_default=False, rich_help_panel=ADVANCED)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result under OUTPUT.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads to compute with. [default: one a processor]"),
]
Device = Annotated[
    str,
    typer.Option(
        metavar=DEVICES,
        help="Device to compute on. auto takes a GPU if there is a GPU and the work is worth the start.",
    ),
]
Restart = Annotated[
    bool,
    typer.Option("--restart", help="Discard an interrupted run; else the run continues.", rich_help_panel=ADVANCED),
]
NoRemoteCode = Annotated[
    bool,
    typer.Option(
        "--no-remote-code",
        help="Leave out the model's Python files and auto_map, which loaders run with trust_remote_code.",
        rich_help_panel=ADVANCED,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Print every iteration's error and every copied tensor.", rich_help_panel=ADVANCED
    ),
]
Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE", help="A converted directory, a full-precision checkpoint or builtin:NAME.", show_default=False
    ),
]
Adapter = Annotated[
    str,
    typer.Argument(
        metavar="[ADAPTER]",
        help="A PEFT LoRA directory made or trained on BASE; DIR:0.5 multiplies what the adapter adds. Left out, the "
        "adapters are those of --adapter.",
        show_default=False,
    ),
]
MergeOutput = Annotated[
    Path | None, typer.Argument(metavar="OUTPUT", help="The directory to write.", show_default=False)
]
FurtherAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="DIR[:WEIGHT]",
        help="A further adapter, with a weight; repeatable. What the adapters add to the base adds up.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None, typer.Option(metavar=one_of(MODEL_DTYPES), help="Dtype of the merged weights. [default: the model's]")
]
Requantize = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(FORMATS),
        help="Quantize the merged weights again. Measures the surviving share of the adapter, and refuses below half.",
    ),
]
MergeLayout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar=one_of(LAYOUTS),
        help="Container of the merged weights. [default: with --requantize the format's usual container; with "
        "--round-zeros a container with integer zero points; for QA-LoRA on integers a container with float offsets, "
        f"an exact merge; else {DENSE}]",
    ),
]
MergeGroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        help="Weights with a common scale, for --requantize to integers. [default: 64]",
        rich_help_panel=ADVANCED,
    ),
]
MergeSymmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="For --requantize to integers: without or with a zero point per group. [default: int8 symmetric]",
        rich_help_panel=ADVANCED,
    ),
]
MergeScaleDtype = Annotated[
    str | None,
    typer.Option(
        "--scale-dtype",
        metavar=one_of(MODEL_DTYPES),
        help="Dtype of scales and offsets. [default: float32 for offsets]",
        rich_help_panel=ADVANCED,
    ),
]
RoundZeros = Annotated[
    bool,
    typer.Option(
        "--round-zeros",
        help="Merge a QA-LoRA adapter into integer zero points. Measures the lost share of the update, and refuses "
        "above half.",
        rich_help_panel=ADVANCED,
    ),
]
MergePooling = Annotated[
    str | None,
    typer.Option(
        "--pooling",
        metavar=one_of(POOLINGS),
        help="Pooling of a QA-LoRA adapter; wins over the config of the adapter.",
        rich_help_panel=ADVANCED,
    ),
]
MergeTokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="base|adapter",
        help="Whose tokenizer and chat template the result gets; the adapter's where its directory holds one.",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Merge although the adapter was fitted to another base, does not survive, or weights beside it are lost.",
    ),
]


def adapters_and_output(adapter: str, output: Path | None, further: list[str]) -> tuple[str, Path, list[str]]:
    """The first adapter, the output and the further adapters of a merge. A command may name all adapters by --adapter.

    Raises UsageError for a command without an output.

    >>> adapters_and_output("merged", None, ["style:0.5", "facts"])
    ('style:0.5', PosixPath('merged'), ['facts'])
    """
    if output is not None:
        return adapter, output, further
    if not further:
        raise UsageError("no OUTPUT to write", hint="loftq merge BASE ADAPTER OUTPUT")
    return further[0], Path(adapter), further[1:]
