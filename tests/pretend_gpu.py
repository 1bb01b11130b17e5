"""A stand-in for GPUs on a machine that has none: it computes on the CPU and is as strict as CUDA.

Tensors that are made on or moved to a GPU are wrapped, and every operation on them is checked. As on real devices,
tensors of two devices do not mix, NumPy cannot read device memory, and a CUDA graph is recorded without being computed,
holds addresses and constants instead of Python code, and can neither wait for the device nor copy from the host. What
it cannot show: speed, memory, the numbers of CUDA's kernels, and operations that CUDA lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPUS = [torch.device("cuda", number) for number in range(2)]
GPU, CPU = GPUS[0], torch.device("cpu")
INSIDE = torch.device("meta")  # what PyTorch's C++ takes the tensors' device for: one that it has without CUDA
MEMORY = 2**33  # bytes

COPIES = {"_to_copy", "copy_"}  # the operations that may see two devices
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index"}  # with a mask they wait, with a CPU tensor they copy
WAITING = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "repeat_interleave"}


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, its `place`; `held` has its numbers."""

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> OnGpu:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        wrapped = Tensor._make_wrapper_subclass(cls, held.shape, device=INSIDE, **layout)
        wrapped.held, wrapped.place = held, place
        return wrapped

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_cuda(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} on a GPU that is pretended no longer")


class OnGpuGenerator(torch.Generator):
    """In place of torch.Generator, whose GPU form needs CUDA; the numbers are those of the CPU."""

    def __new__(cls, device: Any = "cpu") -> OnGpuGenerator:
        generator = super().__new__(cls)
        generator.place = numbered(torch.device(device))
        return generator

    @property
    def device(self) -> torch.device:
        return self.place


class Graph:
    """In place of torch.cuda.CUDAGraph: the operations of a step, with the addresses they read and write."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def record(self, function: Any, args: Any, kwargs: Any) -> Any:
        read, taken = tensors_of((args, kwargs)), zip(function._schema.arguments, args, strict=False)
        for tensor in tensors_of([value for argument, value in taken if argument.is_write] + [kwargs.get("out")]):
            self.written.setdefault(id(tensor), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        old = {tensor.untyped_storage().data_ptr() for tensor in read}
        made = [tensor for tensor in tensors_of(result) if tensor.untyped_storage().data_ptr() not in old]
        self.operations.append((function, args, kwargs, made))
        return result

    def end(self) -> None:
        """A capture computes nothing: what was written is as before, and for results there is room only."""
        for tensor, value in reversed(self.written.values()):
            tensor.copy_(value)
        for *_, made in self.operations:
            for tensor in made:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    def replay(self) -> None:
        for function, args, kwargs, made in self.operations:
            results = tensors_of(function(*args, **kwargs))
            for tensor, value in zip(made, results, strict=bool(made)):
                tensor.copy_(value)


class PretendGpu(TorchDispatchMode):
    """Runs every operation on what the tensors hold, and records it while a graph is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.graph: Graph | None = None
        self.asked_for_meta = False
        self.last = GPU  # where PyTorch's C++ makes tensors beside others that it works on

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        with self:
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        given, target = tensors_of((args, kwargs)), kwargs.get("device")
        self.last = next((tensor.place for tensor in given if isinstance(tensor, OnGpu)), self.last)
        if target == INSIDE and not self.asked_for_meta:
            target = self.last
        on_gpu = any(isinstance(tensor, OnGpu) for tensor in given)
        if on_gpu and any(tensor.device == INSIDE for tensor in given):
            raise RuntimeError(f"{name} reads a tensor that PyTorch's C++ made where it has no numbers")
        target = self.last if target is None and on_gpu else torch.device(target or "cpu")
        if not on_gpu and target.type != "cuda":
            return function(*args, **kwargs)
        self.check(name, args, given, crosses=name in COPIES and {target} != places(given))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(held, (args, kwargs))
        result = self.graph.record(function, args, kwargs) if self.graph else function(*args, **kwargs)
        if target.type != "cuda":
            return result
        known = {id(held(tensor)): tensor for tensor in given}
        return tree_map(lambda value: known.get(id(value), wrapped(value, target)), result)

    def check(self, name: str, args: Any, given: list[Tensor], crosses: bool) -> None:
        """Raises what CUDA would raise."""
        indexed = name in INDEXED and isinstance(args[0], OnGpu)
        found = places([tensor for tensor in given if tensor.ndim or isinstance(tensor, OnGpu)])
        if len(found) > 1 and name not in COPIES and not (indexed and found <= {args[0].place, CPU}):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {found}")
        masks = indexed and any(tensor.dtype == torch.bool for tensor in tensors_of(args[1]))
        if self.graph and (crosses or masks or name in WAITING or (indexed and CPU in places(given))):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")

    @contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        """In place of torch.cuda.graph; as there, ending a capture that failed raises an error of its own."""
        self.graph = graph
        try:
            yield
        except RuntimeError as error:
            if "stream is capturing" in str(error):
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
            raise
        finally:
            self.graph = None
            graph.end()


class GpuCalls(TorchFunctionMode):
    """Calls that PyTorch answers before any operation is dispatched."""

    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(numbered, (args, dict(kwargs or {})))
        if function is Tensor.cuda:
            function, args = Tensor.to, (args[0], *(args[1:] or [GPU]))
        if function in (Tensor.to, torch.device):
            args, kwargs = tree_map(lambda value: GPUS[value] if type(value) is int else value, (args, kwargs))
        if function is Tensor.to and isinstance(args[0], OnGpu):  # where it is already
            args = (args[0], *(value for value in args[1:] if value != args[0].place))
            kwargs = {key: value for key, value in kwargs.items() if key != "device" or value != args[0].place}
            wanted = torch.dtype | torch.device | str | Tensor
            if not any(isinstance(value, wanted) for value in (*args[1:], *kwargs.values())):
                return args[0]
            args = tuple(value for value in args if value is not None)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnGpu):
            args = (args[0], indexing(args[1]), *args[2:])
        if function is Tensor.tolist and isinstance(args[0], OnGpu):
            args = (args[0].cpu(),)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") in GPUS:  # a copy from the host
            return function(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        self.gpu.asked_for_meta = any(names(value, "meta") for value in (*args, kwargs.get("device")))
        return function(*args, **kwargs)


def names(value: Any, device: str) -> bool:
    return isinstance(value, str | torch.device) and str(value) == device


def numbered(value: Any) -> Any:
    """`cuda` is `cuda:0`."""
    return next((gpu for gpu in GPUS if names(value, str(gpu))), GPU if names(value, "cuda") else value)


def indexing(index: Any) -> Any:
    """With tensors for lists, which PyTorch's C++ would make where they have no numbers."""
    if isinstance(index, tuple):
        return tuple(indexing(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def wrapped(value: Any, place: torch.device) -> Any:
    with torch.inference_mode(False):  # whose tensors cannot be views of others
        return OnGpu(value, place) if isinstance(value, Tensor) else value


def places(tensors: list[Tensor]) -> set[torch.device]:
    return {tensor.place if isinstance(tensor, OnGpu) else CPU for tensor in tensors}


@contextmanager
def pretended(count: int = 1) -> Iterator[PretendGpu]:
    """Makes PyTorch believe in so many GPUs."""
    gpu = PretendGpu()
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "pretended",
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: gpu.graph is not None,
        "CUDAGraph": Graph,
        "graph": gpu.capture,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", OnGpuGenerator))
        stack.enter_context(GpuCalls(gpu))
        stack.enter_context(gpu)
        yield gpu
