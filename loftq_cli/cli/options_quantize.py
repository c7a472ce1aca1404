"""Options of quantize alone. Each option has a single declaration, with help and default."""

from __future__ import annotations

from typing import Annotated

import typer

from loftq_cli.cli.options import ADVANCED, one_of
from loftq_cli.layouts.layout import DENSE, LAYOUTS, default_layouts_text
from loftq_cli.methods.method import DEFAULT_METHOD, FITS, INITS, METHODS, STARTS, SVD_MODES
from loftq_cli.model.task_heads import TASKS
from loftq_cli.planning.recipe import DEFAULT_TEXT_TOKENS, NONE, RANDOM, SELF, WEIGHTS
from loftq_cli.quant.formats import FORMATS, SCALES
from loftq_cli.tensors.headers import MODEL_DTYPES
from loftq_cli.tensors.specs import POOLINGS

_METHODS = "; ".join(f"{name}: {entry.summary}" for name, entry in METHODS.items())
_OWN_ITERATIONS = "".join(f"; {name} {entry.iterations}" for name, entry in METHODS.items() if entry.iterations)
_OWN_SVD = "".join(f"; {name} {entry.svd}" for name, entry in METHODS.items() if entry.svd != "fast")

Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="A TOML file, or a preset: loftq recipes lists the presets. Options on the command line win.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(metavar=one_of(METHODS), help=f"{_METHODS}. [default: {DEFAULT_METHOD}]"),
]
Rank = Annotated[int | None, typer.Option(help="Rank of the adapter. [default: 16]")]
Task = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(TASKS),
        help="The task to train for: SEQ_CLS starts a classifier or a reward model, with a new head in the adapter. "
        "[default: the task of the model's class]",
        rich_help_panel=ADVANCED,
    ),
]
BaseName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Name of the base in the adapter's config, such as a hub id: AutoPeftModel loads the base by the name. "
        "[default: OUTPUT, without the folders of an absolute path]",
        rich_help_panel=ADVANCED,
    ),
]
NumLabels = Annotated[
    int | None,
    typer.Option(
        help="Labels of a classifier. [default: the config's; else 1 on a language model, 2 on other models]",
        rich_help_panel=ADVANCED,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="lora_alpha. [default: the rank, for a scaling of 1]", rich_help_panel=ADVANCED),
]
Rslora = Annotated[
    bool | None,
    typer.Option("--rslora/--no-rslora", help="Scale by alpha/√rank instead of alpha/rank.", rich_help_panel=ADVANCED),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(FITS),
        help="The paper's alternation, or codes, constants and adapter fitted to each other. [default: joint]",
        rich_help_panel=ADVANCED,
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(STARTS),
        help="Start of the alternation: no adapter, or the best adapter of the weights; the base alone is then no "
        "model. [default: zero]",
        rich_help_panel=ADVANCED,
    ),
]
Iterations = Annotated[
    int | None,
    typer.Option(
        help="Alternations of quantizing and fitting the adapter. [default: 2, with --calibration none 11; with --fit "
        f"loftq 8, or 5 with another --svd than fast{_OWN_ITERATIONS}]",
        rich_help_panel=ADVANCED,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        help="Rounds of refining codes and constants, after the iterations. [default: 2, with a text "
        "or STATS 4, with --calibration none 0; with --fit loftq none]",
        rich_help_panel=ADVANCED,
    ),
]
KeepBase = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the error that counts the base alone, 0 to 1: at 0 only base and adapter together count, at 1 "
        "the base is as good as without an adapter. [default: 0.3, with --calibration none 0.5; with --fit loftq 0]",
        rich_help_panel=ADVANCED,
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar=f"STATS|{WEIGHTS}|{NONE}",
        help="Statistics of the layers' inputs, so that errors count by the effect on the outputs: a directory from "
        f"loftq calibrate; {WEIGHTS} estimates the statistics from the weights alone; {NONE} counts all errors alike. "
        f"[default: {WEIGHTS} with --fit joint, else {NONE}]",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        metavar=f"FILE|{SELF}|{RANDOM}",
        help=f"Text that the model reads during the conversion: files, folders, *.jsonl conversations, {SELF} (the "
        f"model writes the text) or {RANDOM} (random tokens). Errors then count by the effect on the layers' outputs. "
        "Repeatable. Needs: pip install transformers accelerate.",
        show_default=False,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=2, help=f"Most tokens of --text to read. [default: {DEFAULT_TEXT_TOKENS}]", rich_help_panel=ADVANCED
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of a window of --text. [default: the model's longest input, at most 512; 128 for self]",
        rich_help_panel=ADVANCED,
    ),
]
Lines = Annotated[
    bool | None,
    typer.Option("--lines", help="Read each line of --text as a separate text.", rich_help_panel=ADVANCED),
]
Sequential = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--no-sequential",
        help="Whether a block reads the outputs of the converted blocks before, or of the original blocks. "
        "[default: on]",
        rich_help_panel=ADVANCED,
    ),
]
Svd = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(SVD_MODES),
        help=f"Low-rank solver: subspace iteration, within 0.2 % of exact, or the paper's. [default: fast{_OWN_SVD}]",
        rich_help_panel=ADVANCED,
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(POOLINGS),
        help="How a QA-LoRA adapter reads a group of inputs: mean × number of groups, sum, or mean. [default: peft]",
        rich_help_panel=ADVANCED,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(INITS),
        help="How a QA-LoRA adapter starts: fitted to the group means of the error, or zero. [default: residual]",
        rich_help_panel=ADVANCED,
    ),
]
AdapterDtype = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(MODEL_DTYPES),
        help="Dtype of the adapter. [default: float32, as PEFT trains]",
        rich_help_panel=ADVANCED,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of random starts, of adapters and of --svd fast|faithful.", rich_help_panel=ADVANCED),
]
QuantType = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(FORMATS),
        help="Number format of the base. [default: nf4; int4 where loaders read packed experts]",
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(help="nf4, fp4: weights that share one absmax, 32 to 4096. [default: 64]", rich_help_panel=ADVANCED),
]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="nf4, fp4: store block constants in 8 bits, 4.13 instead of 4.5 bits a weight. [default: on]",
        rich_help_panel=ADVANCED,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Integers: neighbouring weights of a row that share one scale, 16 to 1024. [default: 64]",
        rich_help_panel=ADVANCED,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Integers: without or with a zero point per group. [default: int8 and experts without, others with]",
        rich_help_panel=ADVANCED,
    ),
]
Scales = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(SCALES),
        help="Constants of blocks and groups: from their largest weights, or searched for the least squared error. "
        "[default: search with --fit joint or --calibration, else absmax]",
        rich_help_panel=ADVANCED,
    ),
]
ScaleDtype = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(MODEL_DTYPES),
        help="Integers: dtype of the scales. [default: as the container's loaders expect]",
        rich_help_panel=ADVANCED,
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(
        metavar=one_of(LAYOUTS),
        help=f"Container of the base; {DENSE} writes the decoded values. [default: {default_layouts_text()}]",
    ),
]
TargetBpw = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Choose each layer's bits and group size, so that the base has at most so many bits a weight, constants "
        "included, and least error. Measures every layer first.",
        show_default=False,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Choose each layer's bits and group size, so that base and adapter together have at most so many bytes, "
        "and least error. Measures every layer first.",
        show_default=False,
    ),
]
LoraBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Choose each layer's rank, 4 to 64, so that the adapter has at most so many bytes.",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="Quantize the matrices with a match in the module name, not all linear layers of the blocks. "
        "Heads only when the expression spells the name of the head. Repeatable.",
        rich_help_panel=ADVANCED,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX", help="Leave matching matrices in full precision. Repeatable.", rich_help_panel=ADVANCED
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Most memory of the GPU to use; larger matrices pass in parts. [default: most of the free memory]",
        show_default=False,
        rich_help_panel=ADVANCED,
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Do not read the result back to check the error.", rich_help_panel=ADVANCED),
]
