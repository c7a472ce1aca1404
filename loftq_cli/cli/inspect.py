"""The command `loftq inspect`."""

from __future__ import annotations

from loftq_cli.api.inspect import inspect as inspect_path
from loftq_cli.api.results import check_errors
from loftq_cli.cli import options, options_inspect
from loftq_cli.cli.render.inspection import print_inspection
from loftq_cli.cli.render.progress import InspectionProgress
from loftq_cli.cli.render.verification import print_verification
from loftq_cli.inspecting.findings import Verification


def inspect(
    path: options_inspect.InspectPath,
    against: options_inspect.Against = None,
    try_: options_inspect.Try = None,
    sort: options_inspect.Sort = "name",
    top: options_inspect.Top = None,
    fail_above: options_inspect.FailAbove = None,
    verify: options_inspect.Verify = False,
    threads: options.Threads = None,
    device: options.Device = "cpu",
    reference: options_inspect.Reference = None,
    text: options_inspect.ReferenceText = None,
    tokens: options_inspect.ReferenceTokens = None,
    context: options_inspect.ReferenceContext = None,
    lines: options_inspect.ReferenceLines = False,
    as_json: options.Json = False,
) -> None:
    """Report the quantization error of every layer.

    PATH is a converted directory: the errors come from the report, or with --against ORIGINAL from the files. The
    options --reference ORIGINAL and --text FILE add the errors of the outputs of layers and model on a text.
    PATH is a full-precision checkpoint: the table shows the work of quantize, and --try adds the error of a quant type.
    PATH is a model, a weight file or an adapter: --verify names the damaged files and tensors.
    """
    inspection = inspect_path(
        path,
        against=against,
        try_=try_,
        sort=sort,
        top=top,
        fail_above=fail_above if verify else None,  # the check follows the table, except with --verify
        verify=verify,
        threads=threads,
        device=device,
        reference=reference,
        text=text,
        tokens=tokens,
        context=context,
        lines=lines,
        observer=InspectionProgress(as_json=as_json),
    )
    if isinstance(inspection, Verification):
        print_verification(inspection, as_json=as_json)
        return
    print_inspection(inspection, as_json=as_json)
    if fail_above is not None:
        check_errors(inspection, fail_above)
