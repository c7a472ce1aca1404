"""The conversion: the jobs of a plan run in order; proof and publication follow.

Arithmetic is in methods/, containers are in layouts/, the order of changes to the disk is in output/staged_run.py.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loftq_cli.adapter import config as adapter_config
from loftq_cli.adapter.base_record import with_record
from loftq_cli.checkpoint.statistics import InputStatistics
from loftq_cli.conversion.head_tensors import write_head
from loftq_cli.conversion.jobs import JobRunner
from loftq_cli.conversion.model_card import render_adapter_card, render_model_card
from loftq_cli.conversion.prepare import Conversion
from loftq_cli.conversion.readback import verify_bytes, verify_layers
from loftq_cli.conversion.report import (
    LayerResult,
    base_note,
    provenance_json,
    report_json,
    text_json,
    total_plain_error,
    unread_notes,
)
from loftq_cli.errors import LoftqError
from loftq_cli.output.checksums import fingerprint_of
from loftq_cli.output.copies import NOT_FINITE, is_intact, not_finite_note
from loftq_cli.output.journal import JournalEntry
from loftq_cli.output.records import (
    PROVENANCE_NAME,
    RECIPE_NAME,
    REPORT_NAME,
    dump_json,
    index_json,
    source_name,
    without_local_path,
    write_texts,
)
from loftq_cli.output.side_files import code_paragraph, copy_side_files
from loftq_cli.output.staged_run import Entries, run_staged
from loftq_cli.output.writer import OutputFiles
from loftq_cli.planning.jobs import CopyJob, LayerJob
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.recipe import DEFAULT_TEXT_TOKENS, WEIGHTS
from loftq_cli.planning.recipe_files import recipe_toml
from loftq_cli.runtime.gpu import Device, open_device
from loftq_cli.runtime.kernel_choice import choose_kernels
from loftq_cli.runtime.schedule import Steps, in_order
from loftq_cli.runtime.workers import Workers
from loftq_cli.tensors.libraries import DEFAULT_LIBRARY
from loftq_cli.tensors.metrics import LayerError, total_error

if TYPE_CHECKING:
    from loftq_cli.activations.text_pass import TextPass
    from loftq_cli.activations.text_sources import TextSource


class ConversionObserver(Protocol):
    """The callbacks of a conversion, a part of `loftq_cli.api.observer.Observer`."""

    def layer_started(self, name: str) -> None: ...

    def layer_converted(self, layer: LayerResult, *, resumed: bool) -> None: ...

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """The report of a finished conversion.

    output           directory of the result
    adapter          directory of the adapter, inside `output`
    layers           results of all quantized layers, in the order of the plan
    total            the error of all layers together
    resumed_layers   number of layers taken over from an interrupted run
    verified         whether the result was read back before the publication
    notes            the notes of the plan, and sentences about numbers that are not finite in copied tensors
    """

    output: Path
    adapter: Path
    layers: tuple[LayerResult, ...]
    total: LayerError
    resumed_layers: int
    verified: bool
    notes: tuple[str, ...] = ()

    @property
    def plain_error(self) -> float | None:
        """Relative error of the weights of all layers together after plain rounding; None if a layer has none."""
        return total_plain_error((layer.plain_error, layer.error) for layer in self.layers)


def convert_checkpoint(
    conversion: Conversion,
    observer: ConversionObserver,
    *,
    overwrite: bool,
    restart: bool,
    verify: bool,
    threads: int = 1,
    device: str = "cpu",
    max_memory: int | None = None,
) -> Outcome:
    """Convert, verify, publish. An interrupted run of an equal conversion is continued.

    conversion   from `prepare_conversion` or `prepare_within_target`
    observer     receives phases, layers and notes
    overwrite    whether an earlier result under the output's name is replaced
    restart      whether an interrupted run is discarded
    verify       whether the written files are read back and compared before the publication
    threads      number of threads; the bytes are the same with any number
    device       see `open_device`; the order of sums differs on a GPU, so adapters differ in the last digits
    max_memory   bytes of GPU memory to use at most

    Raises LoftqError; the directory under the output's name is then unchanged.
    """
    plan, output = conversion.plan, conversion.output
    gpu = open_device(device, plan.work, max_memory)
    message = choose_kernels(plan.work) if gpu is None else f"computing on {gpu}"
    if message is not None:
        observer.phase(message)
    work = ConversionWork(conversion, observer, gpu, verify=verify)
    kind = "cpu" if gpu is None else gpu.device.type
    run_staged(conversion.result, work, overwrite=overwrite, restart=restart, threads=threads, device=kind)
    layers = tuple(work.layers)
    total = total_error(layer.error for layer in layers)
    notes = (*plan.notes, *work.warnings)
    return Outcome(output, output / plan.adapter_dir, layers, total, work.resumed_layers, verify, notes)


class ConversionWork:
    """The steps of a conversion, for `run_staged`.

    layers           results of the layers so far
    resumed_layers   number of layers taken over from an interrupted run
    warnings         sentences about the result: numbers that are not finite in copied tensors, layers that read no
                     text, and a base that needs the adapter
    """

    def __init__(
        self, conversion: Conversion, observer: ConversionObserver, gpu: Device | None, *, verify: bool
    ) -> None:
        self.layers: list[LayerResult] = []
        self.resumed_layers = 0
        self.warnings: list[str] = []
        self._conversion, self._observer, self._gpu, self._verify = conversion, observer, gpu, verify
        self._layer_names = {job.name for job in conversion.plan.layers}
        self._text: TextPass | None = None

    def announce(self, text: str) -> None:
        """Tell the observer about a phase of the run."""
        self._observer.phase(text)

    def run_units(
        self, files: OutputFiles, finished: Entries, workers: Workers
    ) -> Generator[tuple[JournalEntry, bool]]:
        """Run the jobs of the plan. Yields the journal entry of each job, in the order of the plan, and whether
        `finished` held the entry.
        """
        conversion = self._conversion
        if conversion.text is not None:
            yield from self._run_with_text(conversion.text, files, finished, workers)
            yield from write_head(conversion.plan, conversion.checkpoint, files, finished)
            return
        runner = JobRunner(conversion.checkpoint, files, finished, self._statistics(workers))
        yield from self._run_jobs(runner, conversion.plan.jobs, workers)
        yield from write_head(conversion.plan, conversion.checkpoint, files, finished)

    def _statistics(self, workers: Workers) -> InputStatistics | None:
        """The statistics of the inputs; statistics from the weights are measured."""
        conversion = self._conversion
        if conversion.plan.recipe.calibration != WEIGHTS:
            return conversion.statistics
        from loftq_cli.activations.weight_statistics import measure_weights

        if conversion.plan.family.library is DEFAULT_LIBRARY:  # no further library's models read text
            self._observer.phase(_without_text(conversion.plan, workers.threads))
        device = "cpu" if self._gpu is None else self._gpu.device
        family = conversion.plan.family
        experts = [job.name for job in conversion.plan.layers if job.input_module != job.module]
        return measure_weights(conversion.checkpoint, family, workers=workers, device=device, experts=experts)

    def _run_jobs(
        self, runner: JobRunner, jobs: Sequence[LayerJob | CopyJob], workers: Workers
    ) -> Generator[tuple[JournalEntry, bool]]:
        if self._gpu is None:
            steps = Steps(runner.load, runner.compute, runner.write)
            return in_order(jobs, steps, lambda job: job.numel, workers, self._announce_layer)
        from loftq_cli.conversion.gpu_jobs import DeviceRunner, run_on_device

        return run_on_device(DeviceRunner(runner, self._gpu), jobs, workers.threads, self._announce_layer)

    def _run_with_text(
        self, source: TextSource, files: OutputFiles, finished: Entries, workers: Workers
    ) -> Generator[tuple[JournalEntry, bool]]:
        from loftq_cli.activations.text_pass import open_text_pass
        from loftq_cli.conversion.block_by_block import BlockStatistics, WrittenLayers, convert_block_by_block

        conversion, plan = self._conversion, self._conversion.plan
        assert plan.recipe.text is not None
        text = open_text_pass(
            conversion.checkpoint,
            plan.layers,
            source,
            plan.recipe.text,
            seed=plan.recipe.seed,
            threads=workers.threads,
            device="cpu" if self._gpu is None else self._gpu.device,
            phase=self._observer.phase,
            note=self._observer.note,
        )
        self._text = text
        self._observer.phase(f"{text.windows.tokens} tokens run through the model, block by block")
        statistics = BlockStatistics()
        runner = JobRunner(conversion.checkpoint, files, {}, statistics)
        hash_input = conversion.hash_input
        intact = {n: e for n, e in finished.items() if is_intact(partial(hash_input, n), e, files)}
        config = plan.model_config(conversion.config)
        written = WrittenLayers(plan, config, files, conversion.output)
        return convert_block_by_block(
            plan, text, statistics, intact, lambda jobs: self._run_jobs(runner, jobs, workers), written.effective
        )

    def finish_unit(self, entry: JournalEntry, *, is_resumed: bool) -> None:
        """Collect the result of a layer, or warn of a copied tensor with NaN or infinite values."""
        if entry.unit in self._layer_names:
            self.layers.append(LayerResult.from_json(entry.result))
            self.resumed_layers += is_resumed
            self._observer.layer_converted(self.layers[-1], resumed=is_resumed)
        elif NOT_FINITE in entry.result:
            self._warn(not_finite_note(entry.unit))

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        self._observer.warning(warning)

    def check_result(self, files: OutputFiles, entries: Entries, directory: Path, workers: Workers) -> None:
        """Read the result back, unless the user wants no proof. Raises StorageError naming a tensor."""
        places = {job.name: place for place, job in enumerate(self._conversion.plan.layers)}
        self.layers.sort(key=lambda layer: places[layer.name])  # a text meets layers in the order of the model
        if self._verify:
            self._observer.phase("verifying what was written")
            if self._gpu is None:
                verify_layers(self._conversion, directory, self.layers, workers)
            else:
                verify_bytes(files, entries, directory, workers)

    def write_side_files(self, directory: Path, entries: Entries) -> None:
        """Write config, index, report, recipe, model card, and the adapter's config, provenance and card; copy the
        original's side files.
        """
        note = base_note(self._conversion.plan.recipe, self.layers)
        for warning in [*([] if self._text is None else unread_notes(self.layers)), *([] if note is None else [note])]:
            self._warn(warning)
        self._observer.phase("publishing")
        conversion = self._conversion
        copy_side_files(conversion.side_files, directory, remote_code=conversion.remote_code)
        write_texts(directory, _make_texts(conversion, self.layers, entries, self._text))

    def check_inputs_unchanged(self) -> None:
        """Raises StorageError for a weight file, or a file of the statistics, changed since the plan."""
        self._conversion.checkpoint.check_unchanged()
        if self._conversion.statistics is not None:
            self._conversion.statistics.check_unchanged()

    def keeps_unfinished(self, error: LoftqError) -> bool:
        """Always true: after any error, finished layers are right."""
        return True

    def _announce_layer(self, job: LayerJob | CopyJob) -> None:
        if isinstance(job, LayerJob):
            self._observer.layer_started(job.name)


# KL of base and adapter in multiples of plain NF4, SmolLM2-135M: see tests/benchmarks/README.md.
_GAIN_OF_TEXT = "from 0.33 to 0.23 of plain NF4's on SmolLM2-135M"
_FLOPS_PER_SECOND = 4e10  # of a thread, in float32: for a rough estimate


def _without_text(plan: Plan, threads: int) -> str:
    """What a conversion without a text would gain by a text, and the time to write the text and to read it twice."""
    flops = 3 * 2 * DEFAULT_TEXT_TOKENS * sum(job.numel for job in plan.layers)
    minutes = max(1, round(flops / (_FLOPS_PER_SECOND * threads) / 60))
    return (
        "no text: the inputs of the layers are estimated from the weights. --text self takes about "
        f"{minutes} min more here, and lowers the change of predictions, {_GAIN_OF_TEXT}"
    )


def _fingerprint_base(plan: Plan, entries: Entries) -> str:
    """The fingerprint of all quantized weights of the base; an adapter names the base by the fingerprint."""
    tensors = ((job.name, tensor.name) for job in plan.layers for tensor in job.base_tensors)
    return fingerprint_of({tensor: entries[name].outputs[tensor] for name, tensor in tensors})


def _make_texts(
    conversion: Conversion, layers: Sequence[LayerResult], entries: Entries, text: TextPass | None
) -> dict[str, str]:
    """Make the text of each small file of the result, by relative name, in the order of writing."""
    plan = conversion.published_plan
    source, base_fingerprint = source_name(conversion.checkpoint.path), _fingerprint_base(plan, entries)
    provenance = provenance_json(plan, source=source, base_fingerprint=base_fingerprint)
    report = report_json(
        plan,
        layers,
        [
            *([] if text is None else unread_notes(layers)),
            *(not_finite_note(job.name) for job in plan.copies if NOT_FINITE in entries[job.name].result),
        ],
        text=None if text is None or conversion.text is None else text_json(conversion.text, text),
        source=source,
        base_fingerprint=base_fingerprint,
        allocation=None if conversion.allocation is None else conversion.allocation.to_json(),
    )
    texts = {
        f"{plan.adapter_dir}/{adapter_config.CONFIG_NAME}": dump_json(
            with_record(plan.adapter_config(conversion.base_model), provenance)
        ),
        f"{plan.adapter_dir}/{PROVENANCE_NAME}": dump_json(provenance),
        f"{plan.adapter_dir}/README.md": render_adapter_card(plan, layers),
        "README.md": render_model_card(plan, layers, source=source) + code_paragraph(conversion.code_files),
        RECIPE_NAME: recipe_toml(plan.recipe),
        REPORT_NAME: dump_json(report),
    }
    if len(plan.shards) > 1:
        index = f"{plan.part}{plan.family.library.weights}.safetensors.index.json"
        texts[index] = index_json(plan.shard_of, plan.base_nbytes)
    config = without_local_path(plan.model_config(conversion.config))
    return texts | ({f"{plan.part}config.json": dump_json(config)} if config else {})
