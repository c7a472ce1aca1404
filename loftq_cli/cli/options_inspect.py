"""Options of inspect and calibrate. Each option has a single declaration, with help and default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq_cli.activations.text_windows import DEFAULT_TOKENS
from loftq_cli.cli.options import ADVANCED, one_of
from loftq_cli.planning.recipe import RANDOM, SELF
from loftq_cli.quant.formats import FORMATS

InspectPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH", help="A converted directory, a full-precision checkpoint or builtin:NAME.", show_default=False
    ),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="ORIGINAL", help="Recompute every error from the files, against the original checkpoint."),
]
Try = Annotated[
    list[str] | None,
    typer.Option(
        "--try",
        metavar=one_of(FORMATS),
        help="On a full-precision checkpoint: compute the error of this number format. Repeatable.",
    ),
]
Sort = Annotated[
    str,
    typer.Option(
        metavar="name|error|base_error|numel", help="Order of the layers; with --reference also output_error."
    ),
]
Top = Annotated[int | None, typer.Option(min=1, help="List only the first N layers.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Check checksums, index, config and numbers, and name every damaged file and tensor. "
        "Where transformers is installed, ask it whether each stored layer and adapter has a place in the model.",
    ),
]
FailAbove = Annotated[
    float | None,
    typer.Option(min=0.0, help="Exit with status 5 when the error of a layer is larger.", rich_help_panel=ADVANCED),
]
Text = Annotated[
    list[str],
    typer.Option(
        "--text",
        metavar=f"FILE|{SELF}|{RANDOM}",
        help="Text like the later inputs of the model: files, folders, *.jsonl conversations; or "
        f"{SELF} (the model writes the text) or {RANDOM} (random tokens). Repeatable.",
    ),
]
StatisticsOutput = Annotated[
    Path, typer.Option("--output", "-o", metavar="STATS", help="The directory to write.", show_default=False)
]
Tokens = Annotated[
    int,
    typer.Option(
        min=2, help="Most tokens of the text to read, in windows spread evenly over the text.", rich_help_panel=ADVANCED
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens of a window. [default: the model's longest input, at most 512]", rich_help_panel=ADVANCED
    ),
]
Lines = Annotated[
    bool,
    typer.Option(
        "--lines",
        help="Read each line of the text as a separate text, as for encoders of sentences.",
        rich_help_panel=ADVANCED,
    ),
]
Diagonal = Annotated[
    bool,
    typer.Option(
        "--diagonal",
        help="Keep only the mean square of each input: a number instead of a row.",
        rich_help_panel=ADVANCED,
    ),
]
OverwriteStatistics = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result under STATS.")]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Run the original MODEL and the converted model on --text: errors of layers' outputs (--sort "
        "output_error), perplexity and KL, or the drift of an encoder. Needs transformers, the memory of both in "
        "float32, and no GPU.",
    ),
]
ReferenceText = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE", help="For --reference: a UTF-8 text to run the models on. Repeatable."),
]
ReferenceTokens = Annotated[
    int | None,
    typer.Option(
        "--tokens",
        min=2,
        help=f"For --reference: most tokens of the text to read. [default: {DEFAULT_TOKENS}]",
        rich_help_panel=ADVANCED,
    ),
]
ReferenceContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="For --reference: tokens of a window. [default: the model's longest input, at most 512]",
        rich_help_panel=ADVANCED,
    ),
]
ReferenceLines = Annotated[
    bool,
    typer.Option(
        "--lines", help="For --reference: read each line of the text as a separate text.", rich_help_panel=ADVANCED
    ),
]
