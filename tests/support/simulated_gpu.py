"""A simulated CUDA device, on which tests of a GPU pipeline run where there is none: they see whether the discipline of
device code is kept, not how fast it is.

A tensor on it is a wrapper with device cuda:0 around a tensor of the CPU, which every operation runs on at once, in the
order of the program. What order a real device would be bound to is kept in vector clocks: each stream counts its
operations and knows how far it has waited for the others, and so does the host. Modelled:

- Devices: an operation on tensors of both raises, but for 0-dimensional ones of the CPU and for copies. A generator of
  the CPU is refused. Kernels of Triton's interpreter take tensors of the device only.
- Order: two operations on overlapping bytes (of storage, from the first to the last that a tensor has), one of which
  writes, must be ordered by a stream, events or the host. Else `AssertionError("race: ...")`. There is no implicit
  order with the default stream. Memory that a stream frees may be given away on it at once: what other streams do with
  it must be waited for, or announced with record_stream. A new tensor counts as written by the stream that made it.
- Copies that are `non_blocking` between the device and pinned memory are late by as much as is legal. Before the host
  has waited, the destination is full of 0xFF; and a source that has changed by then is a race.
- Waits of the host: `syncs` has them, with the line of loftq_cli that waits.
- Memory: the bytes of live storages, against a limit. Until it is written it is full of 0xFF, which is NaN in a float.

Not modelled: time, more than one device, generators and graphs of the device, peers, work space inside operations,
fragmentation, the rounding of allocations, TF32 and the device's own last bits. Races of host threads with each other
are not seen, nor is a write of pinned memory that changes no byte. What runs is one operation at a time, under a lock.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map_only

from loftq_cli.triton_kernels.backend import has_triton
from support.interpreter import compute_as_hardware_does
from support.simulated_timeline import (
    DEVICE,
    PendingCopy,
    SimulatedEvent,
    SimulatedStream,
    Timeline,
    activate,
    active,
    bytes_of,
    covers,
    overlap,
    place,
)

NAME = "simulated GPU"
aten = torch.ops.aten

# Operations for whose result or error check the host waits, and what `syncs` calls them.
_WAITING = {
    "_local_scalar_dense": "item",
    "_linalg_check_errors": "linalg error check",
    "_linalg_eigh": "linalg_eigh",
    "_linalg_svd": "linalg_svd",
    "_unique2": "unique",
    "allclose": "allclose",
    "bincount": "bincount",
    "equal": "equal",
    "linalg_eig": "linalg_eig",
    "linalg_lstsq": "linalg_lstsq",
    "masked_select": "masked_select",
    "nonzero": "nonzero",
    "unique_consecutive": "unique",
    "unique_dim": "unique",
}


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SimulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return active().run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"simulated {self.inner!r}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def record_stream(self, stream: SimulatedStream) -> None:  # type: ignore[override]
        active().memory_of(self.inner).recorded.add(stream)

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.Tensor': only dense CPU tensors can be pinned")


class SimulatedGpu(Timeline):
    """Operations on the device. For tests: `syncs`, `races`, `expect_race`, `allocated`, `max_allocated`."""

    def new(self, made: torch.Tensor, stream: SimulatedStream, index: int, *, is_empty: bool) -> SimulatedTensor:
        """`made` as a tensor on the device."""
        if is_empty:
            bytes_of(made).fill_(0xFF)
        self.allocate(made, stream, index)
        return SimulatedTensor(made)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation with at least one tensor of the device."""
        device = kwargs.get("device")
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        with self.lock:
            if func is aten.copy_.default and not (is_there(args[0]) and is_there(args[1])):
                return self._copy(*args, **kwargs)
            if device is not None and device.type == "cpu":
                return self._to_host(func, args, kwargs)
            if device is not None:
                check_device(device)
                kwargs["device"] = torch.device("cpu")
            return self._compute(func, args, kwargs)

    def _compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """On tensors of the device, for tensors of the device."""
        tensors = list(tensors_of(func, args, kwargs))
        self._check_devices(func, tensors, args, kwargs)
        stream = self.current_stream()
        index = stream.advance()
        for tensor, is_write in tensors:
            if is_there(tensor) and not func.is_view:
                self.touch(inner(tensor), stream, index, is_write=is_write)
        result = func(*tree_map_only(SimulatedTensor, inner, args), **tree_map_only(SimulatedTensor, inner, kwargs))
        known = {id(inner(tensor)): tensor for tensor, is_write in tensors if is_write}
        for tensor in known.values():
            if tensor.shape != inner(tensor).shape:
                raise NotImplementedError(f"{func} resizes a tensor, which is not simulated")
        if kind := waits(func, args, kwargs):
            self.wait(kind, stream.clock)

        def wrapped(made: torch.Tensor) -> torch.Tensor:
            return known[id(made)] if id(made) in known else self.new(made, stream, index, is_empty=is_empty(func))

        return tree_map_only(torch.Tensor, wrapped, result)

    def make(self, func: Any, *args: Any, **kwargs: Any) -> SimulatedTensor:
        """A factory function's tensor."""
        check_device(kwargs.pop("device"))
        if kwargs.pop("pin_memory", None):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        with self.lock:
            stream = self.current_stream()
            made = func(*args, **kwargs, device="cpu")
            return self.new(made, stream, stream.advance(), is_empty=is_empty(func))

    def launch(self, run: Callable[..., None], executor: Any, *args: Any, **kwargs: Any) -> None:
        """A kernel in Triton's interpreter, which is not made for threads. It writes where bytes have changed."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        with self.lock:
            if not any(map(is_there, tensors)):
                return run(executor, *args, **kwargs)
            if not all(map(is_there, tensors)):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            stream = self.current_stream()
            index, before = stream.advance(), [inner(tensor).clone() for tensor in tensors]
            run(executor, *map(inner, args), **{name: inner(value) for name, value in kwargs.items()})
            for tensor, old in zip(tensors, before, strict=True):
                is_write = not torch.equal(bytes_of(inner(tensor)), bytes_of(old))
                self.touch(inner(tensor), stream, index, is_write=is_write)

    def _to_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """`.to("cpu")`, and new_empty and its like with the CPU as device, which do not read the device."""
        is_async = kwargs.pop("non_blocking", False)
        made: torch.Tensor = func(*tree_map_only(SimulatedTensor, inner, args), **kwargs, device="cpu")
        if func is aten._to_copy.default:
            made = self.pin(made) if is_async else made  # as torch has it
            self._copy(made, args[0], is_async)
        return made

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """Between the host and the device. What is converted or gathered by the host is not pinned on its way."""
        if target.numel() == 0:
            return target
        host, to_host = (source, False) if is_there(target) else (target, True)
        is_pinned = self.is_pinned(host)
        is_async = is_pinned and non_blocking and host.is_contiguous()
        if not to_host:
            is_async = is_async and source.dtype == target.dtype and source.shape == target.shape
        stream = self.current_stream()
        index = stream.advance()
        for tensor in (source, target):
            if is_there(tensor) or is_pinned:
                self.touch(inner(tensor), stream, index, is_write=tensor is target)
        if is_pinned:  # copies that this one follows on the device
            self.land(lambda copy: overlap(copy.host, host) and covers(stream.clock, copy.stream, copy.index))
            if to_host:
                self.give_back(lambda copy: overlap(copy.host, host))
        value = torch.empty(host.shape, dtype=host.dtype).copy_(inner(source)) if to_host else source.clone()
        if is_async and to_host:
            bytes_of(host).fill_(0xFF)
            self.landings.append(PendingCopy(stream, index, host, value, place()))
        else:
            inner(target).copy_(value)
        if is_async and not to_host:
            self.loans.append(PendingCopy(stream, index, host, value, place()))
        if not is_async:
            kind = "copy to host" if to_host else "blocking copy" if is_pinned else "pageable copy"
            is_late = non_blocking and not to_host  # from a buffer of the driver's: only what came before is done
            self.wait(kind, stream.clock | {stream: index - 1} if is_late else stream.clock)
        return target

    def _check_devices(self, func: Any, tensors: list[tuple[torch.Tensor, bool]], args: Any, kwargs: Any) -> None:
        for value in kwargs.values():
            if isinstance(value, torch.Generator):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        is_index = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        indices = {id(index) for index in args[1]} if is_index and is_there(args[0]) else set()
        for tensor, is_write in tensors:
            if is_there(tensor) or (tensor.dim() == 0 and not is_write):
                continue
            if id(tensor) not in indices:
                found = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
                raise RuntimeError(f"{found} (in {func})")
            self.wait("pageable copy", self.current_stream().clock)


def is_there(value: Any) -> bool:
    return isinstance(value, SimulatedTensor)


def inner(value: Any) -> Any:
    return value.inner if is_there(value) else value


def is_empty(func: Any) -> bool:
    """Whether it makes tensors that nothing is written to."""
    return func._schema.name.removeprefix("aten::").removeprefix("new_").startswith("empty")


def check_device(device: torch.device) -> None:
    if device.type != "cuda" or device.index not in (None, 0):
        raise RuntimeError(f"invalid device ordinal: {device}")


def tensors_of(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensors among an operation's arguments, and whether it writes to them."""
    named = {argument.name: argument for argument in func._schema.arguments}
    for argument, value in [*zip(named.values(), args, strict=False), *((named[n], v) for n, v in kwargs.items())]:
        is_write = argument.alias_info is not None and argument.alias_info.is_write
        yield from ((leaf, is_write) for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor))


def waits(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """What to call the host's wait for this operation, if it waits."""
    name = func._schema.name.removeprefix("aten::")
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        is_fill = name != "index" and args[2].numel() == 1 and not is_there(args[2])
        return "boolean index" if any(map(is_there, masks)) and not is_fill else None
    return "linalg error check" if kwargs.get("check_errors") else _WAITING.get(name)


@contextmanager
def simulated_gpu(memory_nbytes: int = 1 << 34) -> Iterator[SimulatedGpu]:
    """The device, for the length of the block and in every thread. A race that was caught on its way fails the block.

    Skips the test where there is a real one: kernels are compiled for that.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    compute_as_hardware_does()
    gpu = SimulatedGpu(memory_nbytes)
    with ExitStack() as stack:
        stack.callback(activate, None)
        activate(gpu)
        SimulatedStream()  # the default one
        _set_device_guard()
        stack.callback(_make_factories(gpu)._destroy)
        _device_constructors()  # remembers for good what it finds in torch
        for target, name, replacement in _replacements(gpu):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield gpu
        gpu.give_back(lambda copy: True)  # sources of copies that were never waited for
    assert not gpu.races, gpu.races


def _set_device_guard() -> None:
    """What C++ calls to change the device does nothing from now on, as fake tensors of torch have it.

    Torch replaces a guard that counts no device. A build without CUDA has none, so it gets one that answers 0 to all.
    """
    c10 = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    guards = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[1] is None:
        zero = ctypes.CFUNCTYPE(ctypes.c_int64)(int)
        methods = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
        guard = ctypes.c_void_p(ctypes.addressof(methods))
        guards[1] = ctypes.addressof(guard)
        torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
        assert guards[1] != ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]


def _make_factories(gpu: SimulatedGpu) -> torch.library.Library:
    """Functions that make a tensor from none are CUDA kernels to torch: it finds them in any thread, from C++ too."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    library.impl("copy_", lambda *args: gpu.run(aten.copy_.default, args, {}))  # torch.tensor skips our class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a build with CUDA has kernels of its own, until the end of the block
        for schema in torch._C._jit_get_all_schemas():
            has_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
            has_device = any(argument.name == "device" for argument in schema.arguments)
            if has_tensor or not has_device or not schema.name.startswith("aten::"):
                continue
            name = f"{schema.name}.{schema.overload_name}".removesuffix(".").removeprefix("aten::")
            if _is_kernel(f"aten::{name}"):
                packet = getattr(aten, schema.name.removeprefix("aten::"))
                library.impl(name, partial(gpu.make, getattr(packet, schema.overload_name or "default")))
    return library


def _is_kernel(name: str) -> bool:
    """Whether the dispatcher knows it, and not as a function that calls others."""
    try:
        return not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    except RuntimeError:
        return False


def _replacements(gpu: SimulatedGpu) -> Iterator[tuple[Any, str, Any]]:
    """What of torch and Triton is another thing in the block."""
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=gpu.memory_nbytes, multi_processor_count=132, warp_size=32
    )
    of_cuda = {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "_exchange_device": lambda index: index if index < 0 else 0,
        "_maybe_exchange_device": lambda index: index if index < 0 else 0,
        "get_device_name": lambda _=None: NAME,
        "get_device_capability": lambda _=None: (9, 0),
        "get_device_properties": lambda _=None: properties,
        "mem_get_info": lambda _=None: (memory_nbytes_free(gpu), gpu.memory_nbytes),
        "memory_allocated": gpu.memory_allocated,
        "memory_reserved": gpu.memory_allocated,
        "max_memory_allocated": gpu.max_memory_allocated,
        "max_memory_reserved": gpu.max_memory_allocated,
        "reset_peak_memory_stats": gpu.reset_peak_memory_stats,
        "empty_cache": lambda: None,
        "synchronize": gpu.synchronize,
        "Stream": SimulatedStream,
        "Event": SimulatedEvent,
        "stream": gpu.stream,
        "set_stream": gpu.set_stream,
        "current_stream": gpu.current_stream,
        "default_stream": lambda _=None: gpu.streams[0],
    }
    yield from ((torch.cuda, name, replacement) for name, replacement in of_cuda.items())
    yield torch.Tensor, "is_pinned", lambda tensor, device=None: gpu.is_pinned(tensor)
    yield torch.Tensor, "pin_memory", lambda tensor, device=None: gpu.pinned(tensor)
    for name in ("empty", "zeros", "ones", "full", "tensor", "empty_strided", "empty_like", "zeros_like"):
        yield torch, name, _pinning(gpu, getattr(torch, name))
    if has_triton():
        from triton.runtime.interpreter import GridExecutor

        call = GridExecutor.__call__
        yield GridExecutor, "__call__", lambda *args, **kwargs: gpu.launch(call, *args, **kwargs)


def memory_nbytes_free(gpu: SimulatedGpu) -> int:
    return gpu.memory_nbytes - gpu.memory_allocated()


def _pinning(gpu: SimulatedGpu, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(function)
    def pinning(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = function(*args, **kwargs)
        if pin_memory and is_there(made):
            raise RuntimeError("Only dense CPU tensors can be pinned")
        return gpu.pin(made) if pin_memory else made

    return pinning
