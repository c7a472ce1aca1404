"""A model that runs with the weights of a single block in memory. All batches pass a block before any batch enters the
next block: a block's weights are loaded when all batches wait before the block, and dropped when all batches have left.
Every batch computes in a single thread, and several batches compute at once: no number depends on the count of threads.
Measures nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq_cli.activations import transformers_models
from loftq_cli.activations.paused_forward import EndForward, PausedForward, copied, current_forward
from loftq_cli.activations.transformers_models import reason_of, report_failures
from loftq_cli.errors import InputError, LoftqError, UsageError, is_memory_shortage, printable
from loftq_cli.runtime.workers import Workers

if TYPE_CHECKING:
    from loftq_cli.activations.transformers_models import LoadedWeight


class StreamedModel:
    """A model with parameters on the meta device, and the checkpoint that gives the parameters in float32.

    model     a model of transformers, see `build_empty_model`
    path      the checkpoint, for errors
    load      loads a tensor of the checkpoint by name
    weights   name of a tensor of the model -> the source in the checkpoint: see `match_weights`
    """

    def __init__(
        self,
        model: Any,
        path: Path,
        load: Callable[[str], torch.Tensor],
        weights: Mapping[str, LoadedWeight],
        device: torch.device | str = "cpu",
    ) -> None:
        """Reads the buffers of the model that the checkpoint holds."""
        self.model, self._path, self._load_tensor, self._weights = model, path, load, weights
        self._device, self._loading = torch.device(device), threading.Lock()
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._shared = _names_of_shared(model)
        owners = [self.block_of(name.rpartition(".")[0]) for name, _ in model.named_parameters()]
        self._blocks = {block for block in owners if block is not None}
        self._ahead = set[str]()
        self._loose: list[_Place] = []  # parameters outside of blocks: loaded by their module, dropped after the step
        for name, buffer in model.named_buffers():
            if name in weights:
                stored = self._read(name)[name]
                self._check_shape(name, stored, buffer)
                buffer.copy_(stored)
        _move_buffers(model, self._device)

    @classmethod
    def of_config(
        cls,
        directory: Path,
        config: Any,
        names: Iterable[str],
        path: Path,
        load: Callable[[str], torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> StreamedModel:
        """The model of a config, without weights. Raises as `build_empty_model` does.

        directory   the folder of the config, for errors
        config      the result of `load_config`
        names       names of the tensors in the checkpoint
        path        the checkpoint, for errors
        load        loads a tensor of the checkpoint by name
        device      the device of the model
        """
        model = transformers_models.build_empty_model(directory, config)
        return cls(model, path, load, transformers_models.match_weights(model, names), device)

    def block_of(self, module: str) -> str | None:
        """The name of the block around the module `module`: the outermost module with a numbered name that is no
        container of modules. None outside of blocks.
        """
        parts = module.split(".")
        for count, part in enumerate(parts, 1):
            path = ".".join(parts[:count])
            if part.isdecimal() and not isinstance(self._modules[path], (nn.ModuleList, nn.ModuleDict)):
                return path
        return None

    def load_all(self) -> Any:
        """The model with all weights in memory, float32. Raises InputError for a weight that the checkpoint lacks."""
        for name, _ in self.model.named_parameters():
            source = self._source(name)
            if source is None:
                raise InputError("the checkpoint does not have it", file=self._path, tensor=name)
            if _Place.of(self._modules, name).is_empty:
                self._load(name, [])
            loaded = self._modules[name.rpartition(".")[0]]._parameters[name.rpartition(".")[2]]
            for alias in self._shared.get(name, ()):
                path, _, leaf = alias.rpartition(".")
                self._modules[path]._parameters[leaf] = loaded
        return self.model

    def run(
        self,
        feeds: Sequence[Mapping[str, torch.Tensor]],
        blocks: Iterable[str],
        block_done: Callable[[str], None],
        *,
        threads: int = 1,
        batch_done: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Call the model with each of `feeds`, up to the output head; parameters as for `visits`.

        block_done   takes the name of a block after all batches have left the block
        """
        for visit in self.visits(feeds, blocks, threads=threads, batch_done=batch_done):
            visit.leave()
            block_done(visit.block)

    def visits(
        self,
        feeds: Sequence[Mapping[str, torch.Tensor]],
        blocks: Iterable[str],
        *,
        threads: int = 1,
        batch_done: Callable[[int], None] = lambda number: None,
    ) -> Generator[Visit]:
        """Call the model with each of `feeds`, without gradients, up to the output head. Yields each block in the order
        of the model, with the weights of the block in memory and all batches waiting before the block; the batches
        leave the block when the caller asks for the next block, or earlier by `Visit.leave`. Hooks of the model see
        every call.

        feeds        keyword arguments of the forwards, a batch each
        blocks       names of the blocks to reach. After the last of `blocks`, a missing weight outside of blocks ends
                     the run: loaders make up a pooler.
        threads      number of batches that compute at once, with a thread each
        batch_done   takes the number of each batch, in order, when the batch has tried out or left a block

        Raises InputError for a needed weight that the checkpoint lacks; UsageError for a model that takes a different
        way with each input, or uses weights past their modules.
        """
        handles = list(self._register_hooks())
        feeds = [{name: tensor.to(self._device) for name, tensor in feed.items()} for feed in feeds]
        runners = [PausedForward(self.model, feed, number) for number, feed in enumerate(feeds)]
        workers = Workers(min(threads, len(runners)), inline=False)
        self._ahead = set(blocks)
        places = list[_Place]()

        def step(is_trial: bool) -> str | None:
            return self._step(runners, workers, batch_done, is_trial=is_trial)

        try:
            block = step(False)
            while block is not None:
                self._ahead.discard(block)
                self._load_block(block, places)
                visit = Visit(block, step, self._modules, places)
                yield visit
                block = visit.leave()
        finally:
            for runner in runners:
                runner.stop()
            workers.close()
            for handle in handles:
                handle.remove()
            _drop_parameters(places)
            self._drop_loose(to_nothing=True)

    def _step(
        self, runners: Sequence[PausedForward], workers: Workers, batch_done: Callable[[int], None], *, is_trial: bool
    ) -> str | None:
        """Let every batch run up to the next block, or through the block ahead and back if `is_trial` is true. Returns
        the name of the block ahead, or None at the end.
        """
        blocks = list[str | None]()
        try:
            for number, block in enumerate(workers.map(lambda runner: runner.resume(is_trial=is_trial), runners)):
                batch_done(number)
                blocks.append(block)
        except LoftqError:
            raise
        except Exception as error:
            if is_memory_shortage(error):
                raise
            if isinstance(error, (NotImplementedError, RuntimeError)) and "meta" in str(error):
                message = "the model uses weights past the modules that hold them, and cannot be run block by block"
                raise UsageError(message, file=self._path) from error
            raise InputError(f"the model of its config does not run: {reason_of(error)}", file=self._path) from error
        if not is_trial:
            self._drop_loose()
        if len(set(blocks)) > 1:
            message = "the model takes a different way with each input, and cannot be run block by block"
            raise UsageError(message, file=self._path)
        return blocks[0]

    def _register_hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Hooks that pause a forward before a block, load loose parameters, and end a forward at the output head."""

        def enter(name: str) -> Callable[..., None]:
            def pause(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                # `forward` in place of a call: hooks of the block would pause the trial. A block may change its inputs.
                current_forward().pause(name, lambda: module.forward(*copied(args), **copied(kwargs)))

            return pause

        def load_own(name: str) -> Callable[..., None]:
            return lambda module, args: self._load_own(name, module)

        for name, module in self.model.named_modules():
            if name in self._blocks:
                yield module.register_forward_pre_hook(enter(name), with_kwargs=True)
            if module._parameters:
                yield module.register_forward_pre_hook(load_own(name))
        head = _output_head(self.model)
        if head is not None:
            yield head.register_forward_pre_hook(_end_forward, prepend=True)

    def _load_block(self, block: str, places: list[_Place]) -> None:
        for name, parameter in self._modules[block].named_parameters(f"{block}", remove_duplicate=False):
            if parameter.is_meta and self._source(name) is not None:
                self._load(name, places)

    def _load_own(self, name: str, module: nn.Module) -> None:
        """Load the parameters of a module, without submodules, just before the module runs; a block's weights are in
        memory already.
        """
        with self._loading:  # several batches may reach the module at once
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    parameter_name = f"{name}.{leaf}" if name else leaf
                    if self._source(parameter_name) is None:
                        if not self._ahead and self.block_of(name) is None:
                            raise EndForward
                        message = "is needed, and the checkpoint does not have it"
                        raise InputError(message, file=self._path, tensor=parameter_name)
                    self._load(parameter_name, self._loose)

    def _load(self, name: str, places: list[_Place]) -> None:
        """Load the parameter `name`, and the parameters made from the same checkpoint tensors, and add the filled
        places to `places`.
        """
        source = str(self._source(name))
        tensors = self._read(source)
        for target, tensor in ({name: tensors[source]} if source != name else tensors).items():
            place = _Place.of(self._modules, target)
            if place.empty is None or not place.is_empty:
                continue
            self._check_shape(target, tensor, place.empty)
            place.fill(tensor)
            places.append(place)

    def _check_shape(self, name: str, stored: torch.Tensor, wanted: torch.Tensor) -> None:
        if stored.shape != wanted.shape:
            message = f"is {tuple(stored.shape)}, and the model of its config has {tuple(wanted.shape)}"
            raise InputError(message, file=self._path, tensor=name)

    def _source(self, name: str) -> str | None:
        """The name of a parameter in `weights`: `name`, or another name of a shared parameter. None when the checkpoint
        lacks the parameter.
        """
        if name in self._weights:
            return name
        return next((alias for alias in self._shared.get(name, ()) if alias in self._weights), None)

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of the model by name, float32, from the checkpoint tensors behind `name`."""
        weight = self._weights[name]
        tensors = {source: self._load_tensor(source) for source in weight.sources}
        tensors = {source: t.float() if t.is_floating_point() else t for source, t in tensors.items()}
        with report_failures(self._path, f"transformers cannot convert {printable(name)}"):
            converted = weight.convert(tensors, self.model)
        return {target: tensor.to(self._device) for target, tensor in converted.items()}

    def _drop_loose(self, *, to_nothing: bool = False) -> None:
        """Drop the parameters outside of blocks. Parameters of a module around a block stay, because the module still
        runs; `to_nothing` drops all parameters.
        """
        remaining = [] if to_nothing else [place for place in self._loose if place.is_around(self._blocks)]
        _drop_parameters([place for place in self._loose if place not in remaining])
        self._loose = remaining


class _Place:
    """A parameter of a module, and the meta parameter that stands in the module until the parameter is loaded.

    empty   the parameter in the module when the place was made; None for a module without the parameter
    """

    def __init__(self, module: nn.Module, path: str, leaf: str) -> None:
        self._module, self._path, self._leaf = module, path, leaf
        self.empty = module._parameters[leaf]

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], name: str) -> _Place:
        path, _, leaf = name.rpartition(".")
        return cls(modules[path], path, leaf)

    @property
    def is_empty(self) -> bool:
        return self.empty is not None and self.empty.is_meta

    def fill(self, tensor: torch.Tensor) -> None:
        self._module._parameters[self._leaf] = nn.Parameter(tensor, requires_grad=False)

    def drop(self) -> None:
        self._module._parameters[self._leaf] = self.empty

    def is_around(self, blocks: set[str]) -> bool:
        return any(not self._path or block.startswith(f"{self._path}.") for block in blocks)


class Visit:
    """A block with the weights in memory, while all batches wait before the block.

    block   the name of the block
    """

    def __init__(
        self, block: str, step: Callable[[bool], str | None], modules: Mapping[str, nn.Module], places: list[_Place]
    ) -> None:
        self.block, self._step, self._modules, self._places = block, step, modules, places
        self._has_left = False
        self._next: str | None = None

    def try_out(self) -> None:
        """Run all batches through the block, and keep the batches before the block: the outputs are dropped."""
        self._step(True)

    def replace(self, module: str, weight: torch.Tensor) -> None:
        """Replace the weight of the linear `module` of the block, in the shape and on the device of the weight, until
        the batches have left.
        """
        place = _Place(self._modules[module], module, "weight")
        assert place.empty is not None
        place.fill(weight.to(place.empty.device).view(place.empty.shape))

    def leave(self) -> str | None:
        """Run all batches through the block, and drop the weights. Returns the name of the next block, or None at the
        end; a second call runs nothing.
        """
        if not self._has_left:
            self._next = self._step(False)
            while self._next == self.block:  # a block that runs several times in a row
                self._next = self._step(False)
            _drop_parameters(self._places)
            self._places.clear()
            self._has_left = True
        return self._next


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    if device.type != "cpu":
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)


def _end_forward(module: nn.Module, args: Any) -> None:
    raise EndForward


def _output_head(model: Any) -> nn.Module | None:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _names_of_shared(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter with several names -> all names of the parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def _drop_parameters(places: Sequence[_Place]) -> None:
    for place in places:
        place.drop()
