"""One pass of a text through a model during a conversion: the inputs of a block are measured just before the block is
converted, and the next block reads the outputs of the converted block. Writes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.activations import transformers_models
from loftq_cli.activations.input_sums import BATCH_TOKENS, MomentSums
from loftq_cli.activations.self_written import write_windows
from loftq_cli.activations.text_sources import TextSource, make_windows
from loftq_cli.checkpoint.source import Checkpoint
from loftq_cli.output.writer import tensor_bytes
from loftq_cli.planning.jobs import LayerJob
from loftq_cli.planning.recipe import TextOptions

if TYPE_CHECKING:
    import torch

    from loftq_cli.activations.streamed_model import StreamedModel, Visit
    from loftq_cli.activations.text_windows import TokenizerFacts, Windows

OUTSIDE = "outside of the blocks"  # the name of the last step of a pass


class TextBlock:
    """A block of the model, while the text waits before the block.

    name    the name of the block; OUTSIDE for the layers outside of blocks, which come last
    names   names of the weights of the block with a module in the model
    """

    def __init__(self, name: str, jobs: Mapping[str, LayerJob], sums: MomentSums, visit: Visit | None, *, stays: bool):
        self.name, self.names = name, frozenset(jobs)
        self._jobs, self._sums, self._visit, self._stays = jobs, sums, visit, stays

    def measure(self) -> dict[str, torch.Tensor]:
        """The means of x·xᵀ over the inputs x of the layers, by weight, float32 [in, in]; weights that read no text are
        absent. Weights with a common input get one tensor.
        """
        if self._visit is not None:
            with self._sums.watch():
                if self._stays:
                    self._visit.try_out()
                else:
                    self._visit.leave()
        return self._sums.take_means()

    def replace(self, name: str, weight: torch.Tensor) -> None:
        """Let the text leave the block through `weight` [out, in] in place of the weight called `name`."""
        if self._visit is not None:
            job = self._jobs[name]
            self._visit.replace(job.module, weight.T.contiguous() if job.matrix.transposed else weight)


@dataclass(frozen=True)
class TextPass:
    """A text ready to run through a model.

    streamed   the model, with one block in memory
    windows    the text as token ids
    jobs       the weights to measure
    options    how to read the text
    threads    number of batches that compute at once
    """

    streamed: StreamedModel
    windows: Windows
    jobs: tuple[LayerJob, ...]
    options: TextOptions
    threads: int
    path: Path

    @property
    def sha256(self) -> str:
        """Hash of all token ids."""
        digest = hashlib.sha256()
        for ids in self.windows.by_length:
            digest.update(repr(tuple(ids.shape)).encode() + tensor_bytes(ids))
        return digest.hexdigest()

    def blocks(self) -> Generator[TextBlock]:
        """Run the text through the model. Yields each block in the order of the model, and in the end a step for the
        layers outside of blocks.

        Raises as `StreamedModel.visits` and `MomentSums.take_means` do.
        """
        modules = {name for name, _ in self.streamed.model.named_modules()}
        of_block: dict[str, dict[str, LayerJob]] = {}
        for job in self.jobs:
            if job.input_module in modules:
                of_block.setdefault(self.streamed.block_of(job.input_module) or OUTSIDE, {})[job.name] = job
        outside = of_block.pop(OUTSIDE, {})
        inside = [job for jobs in of_block.values() for job in jobs.values()]
        sums = MomentSums(self.streamed, inside, diagonal=False, path=self.path)
        loose_sums = MomentSums(self.streamed, list(outside.values()), diagonal=False, path=self.path)

        def merge(batch: int) -> None:
            sums.merge(batch)
            loose_sums.merge(batch)

        config = self.streamed.model.config
        feeds = [transformers_models.text_inputs(config, batch) for batch in self.windows.batches(BATCH_TOKENS)]
        visits = self.streamed.visits(feeds, sums.blocks, threads=self.threads, batch_done=merge)
        with transformers_models.silence(), loose_sums.watch():
            for visit in visits:
                jobs = of_block.pop(visit.block, None)
                if jobs is not None:
                    yield TextBlock(visit.block, jobs, sums, visit, stays=self.options.sequential)
                if not of_block and not outside:
                    visits.close()
                    return
        if outside:
            yield TextBlock(OUTSIDE, outside, loose_sums, None, stays=False)


@transformers_models.silence()
def open_text_pass(
    checkpoint: Checkpoint,
    jobs: Sequence[LayerJob],
    source: TextSource,
    options: TextOptions,
    *,
    seed: int,
    threads: int,
    device: torch.device | str,
    phase: Callable[[str], None],
    note: Callable[[str], None],
) -> TextPass:
    """Build the model without weights, and cut or write the text.

    checkpoint   the original, with a config.json and a tokenizer beside
    jobs         the weights to measure
    source       the text, see `open_text`
    seed         start of random draws
    phase        takes the next part of the work
    note         takes a sentence for the user

    Raises InputError for a model or tokenizer that transformers does not load; UsageError for a model with an input
    other than text, and without transformers.
    """
    from loftq_cli.activations.streamed_model import StreamedModel

    directory = transformers_models.model_directory(checkpoint)
    config = transformers_models.load_config(directory)

    def build() -> StreamedModel:
        return StreamedModel.of_config(directory, config, checkpoint.tensors, checkpoint.path, checkpoint.load, device)

    def write(facts: TokenizerFacts, count: int, length: int) -> torch.Tensor | None:
        phase(f"the model writes {count} texts of {length} tokens")
        return write_windows(build(), facts, count, length, seed=seed, threads=threads)

    windows = make_windows(source, options, directory, config, seed=seed, write=write, note=note)
    if windows.tokens + windows.longest <= options.tokens:
        note(f"the text gives {windows.tokens} tokens, fewer than --tokens {options.tokens}")
    return TextPass(build(), windows, tuple(jobs), options, threads, directory)
