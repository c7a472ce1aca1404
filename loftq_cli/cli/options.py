"""Every option of the command line, declared once: name, help, and the reason for its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq_cli.activations.text_windows import DEFAULT_TOKENS
from loftq_cli.layouts.layout import LAYOUTS
from loftq_cli.methods.method import DEFAULT_METHOD, FITS, INITS, METHODS, STARTS, SVD_MODES
from loftq_cli.planning.recipe_files import presets
from loftq_cli.quant.formats import FORMATS, SCALES
from loftq_cli.runtime.gpu import DEVICES
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.specs import POOLINGS

_one_of = "|".join
_ADAPTER, _QUANT, _SELECT, _RUN = "Adapter", "Quantized base", "Which weights", "Running"
_METHODS = "; ".join(f"{name}: {entry.summary}" for name, entry in METHODS.items())
_OWN_ITERATIONS = "".join(f"; {name} {entry.iterations}" for name, entry in METHODS.items() if entry.iterations)
_OWN_SVD = "".join(f"; {name} {entry.svd}" for name, entry in METHODS.items() if entry.svd != "fast")
_PRESETS = ", ".join(f"{name} ({summary})" for name, summary in presets().items())

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face model directory, one .safetensors or torch .bin file, or builtin:NAME.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="The directory to write.", show_default=False)]

Recipe = Annotated[
    str | None,
    typer.Option(metavar="FILE|NAME", help=f"A TOML file, or a preset: {_PRESETS}. Other options override it."),
]
Method = Annotated[
    str | None,
    typer.Option(metavar=_one_of(METHODS), help=f"{_METHODS}. [default: {DEFAULT_METHOD}]", rich_help_panel=_ADAPTER),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapter. [default: 16]", rich_help_panel=_ADAPTER)]
Alpha = Annotated[
    float | None,
    typer.Option(help="lora_alpha; the rank by default, so that the scaling is 1.", rich_help_panel=_ADAPTER),
]
Rslora = Annotated[
    bool | None,
    typer.Option("--rslora/--no-rslora", help="Scale by alpha/√rank instead of alpha/rank.", rich_help_panel=_ADAPTER),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(FITS),
        help="The paper's alternation, or codes, constants and adapter fitted to each other. [default: joint]",
        rich_help_panel=_ADAPTER,
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(STARTS),
        help="What the alternation begins with: no adapter, or the best one of the weights. [default: principal "
        "for LoftQ's joint fit without --calibration, else zero]",
        rich_help_panel=_ADAPTER,
    ),
]
Iterations = Annotated[
    int | None,
    typer.Option(
        help="Alternations of quantizing and fitting the adapter. [default: 11, with --calibration 2; with --fit loftq "
        f"8, or 5 with another --svd than fast{_OWN_ITERATIONS}]",
        rich_help_panel=_ADAPTER,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        help="Rounds after them that refine codes and constants under what the adapter holds. [default: 0, with "
        "--calibration 2; with --fit loftq none]",
        rich_help_panel=_ADAPTER,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="STATS",
        help="What loftq calibrate wrote: errors then count by what they do to the layers' outputs.",
        rich_help_panel=_QUANT,
        show_default=False,
    ),
]
Svd = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(SVD_MODES),
        help=f"Low-rank solver: subspace iteration, within 0.2 % of exact, or the paper's. [default: fast{_OWN_SVD}]",
        rich_help_panel=_ADAPTER,
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(POOLINGS),
        help="How a QA-LoRA adapter reads a group of inputs: mean × number of groups, sum, or mean. [default: peft]",
        rich_help_panel=_ADAPTER,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(INITS),
        help="How a QA-LoRA adapter starts: fitted to the group means of the error, or zero. [default: residual]",
        rich_help_panel=_ADAPTER,
    ),
]
AdapterDtype = Annotated[
    str | None,
    typer.Option(metavar=_one_of(MODEL_DTYPES), help="[default: float32, as PEFT trains]", rich_help_panel=_ADAPTER),
]
Seed = Annotated[
    int | None, typer.Option(help="For random starts of adapters and of --svd fast|faithful.", rich_help_panel=_ADAPTER)
]
QuantType = Annotated[
    str | None,
    typer.Option(metavar=_one_of(FORMATS), help="Number format of the base. [default: nf4]", rich_help_panel=_QUANT),
]
BlockSize = Annotated[
    int | None,
    typer.Option(help="nf4, fp4: weights that share one absmax, 32 to 4096. [default: 64]", rich_help_panel=_QUANT),
]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="nf4, fp4: store block constants in 8 bits, 4.13 instead of 4.5 bits a weight. [default: on]",
        rich_help_panel=_QUANT,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Integers: neighbouring weights of a row that share one scale, 16 to 1024. [default: 64]",
        rich_help_panel=_QUANT,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Integers: without or with a zero point per group. [default: int8 without, others with]",
        rich_help_panel=_QUANT,
    ),
]
Scales = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(SCALES),
        help="Constants of blocks and groups: from their largest weights, or searched for the least squared error. "
        "[default: search with --fit joint or --calibration, else absmax]",
        rich_help_panel=_QUANT,
    ),
]
ScaleDtype = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(MODEL_DTYPES),
        help="Integers: what scales are stored in. [default: what the layout's loaders expect]",
        rich_help_panel=_QUANT,
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(LAYOUTS),
        help="Container of the base; dense writes the decoded values. [default: bitsandbytes for nf4 and fp4, "
        "compressed-tensors for integers]",
        rich_help_panel=_QUANT,
    ),
]
MaxShardSize = Annotated[str | None, typer.Option(metavar="SIZE", help="[default: 5GB]", rich_help_panel=_QUANT)]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Choose each layer's bits and group size, so that the base has at most so many bits a weight, constants "
        "included, and least error. Measures every layer first.",
        rich_help_panel=_QUANT,
        show_default=False,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The same, so that base and adapter have at most so many bytes.",
        rich_help_panel=_QUANT,
        show_default=False,
    ),
]
LoraBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Choose each layer's rank, 4 to 64, so that the adapter has at most so many bytes.",
        rich_help_panel=_ADAPTER,
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Quantize the matrices whose module name this finds, instead of all linear layers of the blocks. Heads "
        "only when it spells their name. Repeatable.",
        rich_help_panel=_SELECT,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Leave these in full precision. Repeatable.", rich_help_panel=_SELECT),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel=_RUN)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result under OUTPUT.", rich_help_panel=_RUN)
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads to compute with. [default: one a processor]", rich_help_panel=_RUN),
]
Device = Annotated[
    str,
    typer.Option(
        metavar=DEVICES,
        help="Where to compute. auto takes a GPU where there is one and the work is worth starting it.",
        rich_help_panel=_RUN,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Of the memory of --device cuda, at most; larger matrices pass in parts. [default: most of what is free]",
        rich_help_panel=_RUN,
        show_default=False,
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard an interrupted run instead of continuing it.", rich_help_panel=_RUN)
]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Do not read the result back to check its error.", rich_help_panel=_RUN),
]
Json = Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.", rich_help_panel=_RUN)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=_RUN)]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Every iteration's error, every copied tensor.", rich_help_panel=_RUN)
]

Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE", help="A converted directory, a full-precision checkpoint or builtin:NAME.", show_default=False
    ),
]
Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="A PEFT LoRA directory made or trained on BASE.", show_default=False)
]
Dtype = Annotated[
    str | None, typer.Option(metavar=_one_of(MODEL_DTYPES), help="Of the merged weights. [default: the model's]")
]
Requantize = Annotated[
    str | None,
    typer.Option(
        metavar=_one_of(FORMATS),
        help="Quantize the merged weights again. Measures how much of the adapter survives, and refuses below half.",
    ),
]
MergeLayout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar=_one_of(LAYOUTS),
        help="Container of the merged weights. [default: for QA-LoRA one with float offsets, which merges exactly; "
        "else dense]",
    ),
]
MergeGroupSize = Annotated[int | None, typer.Option("--group-size", help="Of --requantize to integers. [default: 64]")]
MergeSymmetric = Annotated[
    bool | None, typer.Option("--symmetric/--asymmetric", help="Of --requantize to integers. [default: int8 symmetric]")
]
MergeScaleDtype = Annotated[
    str | None,
    typer.Option(
        "--scale-dtype", metavar=_one_of(MODEL_DTYPES), help="Of scales and offsets. [default: float32 for offsets]"
    ),
]
RoundZeros = Annotated[
    bool,
    typer.Option(
        "--round-zeros",
        help="Merge a QA-LoRA adapter into integer zero points. Measures what is lost, and refuses above half.",
    ),
]
MergePooling = Annotated[
    str | None,
    typer.Option(
        "--pooling", metavar=_one_of(POOLINGS), help="Of a QA-LoRA adapter whose config does not say it, or wrongly."
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Merge although the adapter was fitted to another base, or does not survive.")
]

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
        metavar=_one_of(FORMATS),
        help="On a full-precision checkpoint: the error that this quant type would give. Repeatable.",
    ),
]
Sort = Annotated[
    str,
    typer.Option(
        metavar="name|error|base_error|numel", help="Order of the layers; with --reference also output_error."
    ),
]
Top = Annotated[int | None, typer.Option(min=1, help="Only the first N layers.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Re-check checksums, index, config and numbers; names what is damaged.")
]
FailAbove = Annotated[
    float | None, typer.Option(min=0.0, help="Exit with status 5 when the error of a layer is larger.")
]

Text = Annotated[
    list[Path],
    typer.Option("--text", metavar="FILE", help="A UTF-8 text like what the model will read. Repeatable."),
]
StatisticsOutput = Annotated[
    Path, typer.Option("--output", "-o", metavar="STATS", help="The directory to write.", show_default=False)
]
Tokens = Annotated[
    int, typer.Option(min=2, help="Tokens of the text to read, at most, in windows spread evenly over it.")
]
Context = Annotated[
    int | None, typer.Option(min=2, help="Tokens of a window. [default: what the model takes, at most 512]")
]
Lines = Annotated[
    bool,
    typer.Option("--lines", help="Each line of the text is a text of its own, as for encoders of sentences."),
]
Diagonal = Annotated[
    bool, typer.Option("--diagonal", help="Only the mean square of each input: one number instead of a row of them.")
]
OverwriteStatistics = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result under STATS.", rich_help_panel=_RUN)
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Run the original MODEL and the converted one on --text: errors of layers' outputs (--sort output_error), "
        "perplexity and KL, or the drift of an encoder. Needs transformers, the memory of both in float32, and no GPU.",
    ),
]
ReferenceText = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE", help="For --reference: a UTF-8 text to run the models on. Repeatable."),
]
ReferenceTokens = Annotated[
    int | None,
    typer.Option(
        "--tokens", min=2, help=f"For --reference: tokens of the text to read, at most. [default: {DEFAULT_TOKENS}]"
    ),
]
ReferenceContext = Annotated[
    int | None,
    typer.Option(
        "--context", min=2, help="For --reference: tokens of a window. [default: what the model takes, at most 512]"
    ),
]
ReferenceLines = Annotated[
    bool, typer.Option("--lines", help="For --reference: each line of the text is a text of its own.")
]
