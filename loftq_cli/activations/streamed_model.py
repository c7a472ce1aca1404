"""A model that runs with the weights of a single block in memory. All batches pass a block before any batch enters the
next block: a block's weights are loaded when all batches wait before the block, and dropped when all batches have left.
Measures nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loftq_cli.activations.transformers_models import reason_of, report_failures
from loftq_cli.errors import InputError, LoftqError, UsageError, is_memory_shortage, printable
from loftq_cli.runtime.workers import use_torch_threads

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
        self, model: Any, path: Path, load: Callable[[str], torch.Tensor], weights: Mapping[str, LoadedWeight]
    ) -> None:
        """Reads the buffers of the model that the checkpoint holds."""
        self.model, self._path, self._load_tensor, self._weights = model, path, load, weights
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
    ) -> None:
        """Call the model with each of `feeds`, without gradients, up to the output head. Hooks of the model see every
        call.

        feeds        keyword arguments of the forwards, a batch each
        blocks       names of the blocks to reach. After the last of `blocks`, a missing weight outside of blocks ends
                     the run: loaders make up a pooler.
        block_done   takes the name of a block after all batches have left the block
        threads      number of torch's threads in each forward

        Raises InputError for a needed weight that the checkpoint lacks; UsageError for a model that takes a different
        way with each input, or uses weights past their modules.
        """
        handles = list(self._register_hooks())
        runners = [_Runner(self.model, feed, threads) for feed in feeds]
        current, places = None, list[_Place]()
        self._ahead = set(blocks)
        try:
            while (block := self._step(runners)) is not None:
                if block != current:
                    if current is not None:
                        _drop_parameters(places)
                        block_done(current)
                    current, places = block, []
                    self._ahead.discard(block)
                    self._load_block(block, places)
            if current is not None:
                block_done(current)
        finally:
            for runner in runners:
                runner.stop()
            for handle in handles:
                handle.remove()
            _drop_parameters(places)
            self._drop_loose(to_nothing=True)

    def _step(self, runners: Sequence[_Runner]) -> str | None:
        """Let every batch run up to the next block. Returns the name of the block, or None at the end."""
        try:
            blocks = [runner.resume() for runner in runners]
        except LoftqError:
            raise
        except Exception as error:
            if is_memory_shortage(error):
                raise
            if isinstance(error, (NotImplementedError, RuntimeError)) and "meta" in str(error):
                message = "the model uses weights past the modules that hold them, and cannot be run block by block"
                raise UsageError(message, file=self._path) from error
            raise InputError(f"the model of its config does not run: {reason_of(error)}", file=self._path) from error
        self._drop_loose()
        if len(set(blocks)) > 1:
            message = "the model takes a different way with each input, and cannot be run block by block"
            raise UsageError(message, file=self._path)
        return blocks[0]

    def _register_hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Hooks that pause a forward before a block, load loose parameters, and end a forward at the output head."""

        def enter(name: str) -> Callable[..., None]:
            return lambda module, args: _current_runner().pause(name)

        def load_own(name: str) -> Callable[..., None]:
            return lambda module, args: self._load_own(name, module)

        for name, module in self.model.named_modules():
            if name in self._blocks:
                yield module.register_forward_pre_hook(enter(name))
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
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                parameter_name = f"{name}.{leaf}" if name else leaf
                if self._source(parameter_name) is None:
                    if not self._ahead and self.block_of(name) is None:
                        raise _End
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
            return weight.convert(tensors, self.model)

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


class _End(BaseException):
    """Ends a forward from inside: the rest of the forward is of no interest."""


class _Runner(threading.Thread):
    """A forward in a separate thread, which runs only while `resume` waits."""

    def __init__(self, model: Any, feed: Mapping[str, torch.Tensor], threads: int) -> None:
        super().__init__(daemon=True)
        self._model, self._feed, self._threads = model, feed, threads
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._block: str | None = None
        self._error: BaseException | None = None
        self._is_ending = self._is_over = False

    def run(self) -> None:
        self._go.acquire()
        use_torch_threads(self._threads)
        try:
            if not self._is_ending:
                with torch.no_grad():
                    self._model(**self._feed)
        except _End:
            pass
        except BaseException as error:  # `resume` raises the error again
            self._error = error
        self._block, self._is_over = None, True
        self._parked.release()

    def resume(self) -> str | None:
        """Run up to the next block. Returns the name of the block, or None when the forward is over. Raises the
        forward's exception.
        """
        if self.ident is None:
            self.start()
        if self._is_over:
            return None
        self._go.release()
        self._parked.acquire()
        if self._error is not None:
            raise self._error
        return self._block

    def pause(self, block: str) -> None:
        """Wait before the block called `block`. Called inside the forward."""
        self._block = block
        self._parked.release()
        self._go.acquire()
        if self._is_ending:
            raise _End

    def stop(self) -> None:
        """End the waiting forward, and return when the thread has ended."""
        if self.ident is not None:
            self._is_ending = True
            self._go.release()
            self.join()


def _current_runner() -> _Runner:
    runner = threading.current_thread()
    assert isinstance(runner, _Runner)
    return runner


def _end_forward(module: nn.Module, args: Any) -> None:
    raise _End


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
