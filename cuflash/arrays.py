"""Any array, in its own framework: reading its facts, allocating beside it, finding its stream.

One object per framework does the work; ``framework_of`` finds it by the type of the array. NumPy
and CuPy live here, PyTorch in ``cuflash/torch.py``. Every other library is served through DLPack:
its arrays come in as NumPy or CuPy arrays without a copy, and results go back the same way.
Frameworks are looked up in ``sys.modules``, never imported for the user.
"""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy

#: ``ArrayView.device`` of host memory; CUDA devices count from 0.
CPU = -1

#: Bytes to which the kernels' vector loads align.
ALIGNMENT = 16

_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


@dataclass(frozen=True, slots=True)
class ArrayView:
    """The facts of one array, free of its framework."""

    name: str
    pointer: int
    shape: tuple[int, ...]
    #: In elements.
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    device: int
    writable: bool = True
    #: The queries and keys that an element stands for; a mask's may be more.
    block: tuple[int, int] = (1, 1)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape

    @property
    def place(self) -> str:
        """The device in words."""
        return "the CPU" if self.device == CPU else f"cuda:{self.device}"


class Framework(ABC):
    """What cuflash asks of an array library; ``signature``, ``pointer`` and ``empty`` are hot."""

    name: str

    def __init__(self) -> None:
        #: Prepared calls by signature; one cache per framework, so that keys need not name it.
        self.prepared: dict[Hashable, Any] = {}

    @abstractmethod
    def signature(self, array: Any) -> Hashable:
        """Everything about ``array`` that a prepared call depends on, as cheaply as possible."""

    @abstractmethod
    def view(self, array: Any, name: str) -> ArrayView:
        """Facts of ``array``; raises for arrays that no kernel could read."""

    @abstractmethod
    def pointer(self, array: Any) -> int:
        """Address of the first element."""

    @abstractmethod
    def empty(self, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """Uninitialised array in C order on the device of ``like``."""

    def dtype(self, name: str) -> Any:
        """The framework's own dtype of that name."""
        return numpy_dtype(name)

    @abstractmethod
    def namespace(self, array: Any) -> Any:
        """The module of the array's own operations (``exp``, ``where``, ...)."""

    @abstractmethod
    def contiguous(self, array: Any) -> Any:
        """``array`` in C order; itself where it is already."""

    def cast(self, array: Any, dtype: Any) -> Any:
        """``array`` in another dtype of its own framework; itself where it has that already."""
        return array.astype(dtype, copy=False)

    def is_lazy(self, *arrays: Any) -> bool:
        """Whether the memory of an array waits for an operation, as PyTorch's lazy negation does."""
        return False

    def resolve(self, array: Any) -> Any:
        """``array`` with such operations done."""
        return array

    def mark_written(self, array: Any) -> None:  # noqa: B027
        """Tell the framework that ``array`` is written to behind its back."""

    def records(self, *arrays: Any) -> bool:
        """Whether a call on these arrays, of which some may be None, has to be recorded for differentiation."""
        return False

    def seed(self, array: Any) -> Any:
        """A fresh seed from the framework's own generator, on the device of `array`; None if calls draw from none."""
        return None

    def attention(self, q: Any, k: Any, v: Any, options: tuple[Any, ...], *rest: Any) -> tuple[Any, Any]:
        """``functional.forward``, recorded; asked for only where ``records`` says so."""
        raise NotImplementedError(f"{self.name} arrays do not record")

    def attention_backward(self, *arguments: Any) -> Any:
        """``functional.backward``, recorded."""
        raise NotImplementedError(f"{self.name} arrays do not record")

    def as_numpy(self, array: Any) -> numpy.ndarray:
        """A host array as NumPy array that shares its memory."""
        raise NotImplementedError(f"{self.name} arrays are not on the host")

    # The rest is asked only of arrays on a GPU.

    def stream(self, device: int) -> int:
        """The caller's current stream, as an integer handle."""
        raise NotImplementedError(f"{self.name} arrays are not on a GPU")

    def is_capturing(self) -> bool:
        """Whether the caller's current stream is being captured into a graph."""
        raise NotImplementedError(f"{self.name} arrays are not on a GPU")

    def current_device(self) -> int:
        raise NotImplementedError(f"{self.name} arrays are not on a GPU")

    def use_device(self, device: int) -> AbstractContextManager[Any]:
        raise NotImplementedError(f"{self.name} arrays are not on a GPU")

    def compute_capability(self, device: int) -> int:
        """90 for compute capability 9.0; raises where CUDA cannot be used at all."""
        raise NotImplementedError(f"{self.name} arrays are not on a GPU")


class NumPyArrays(Framework):
    """NumPy's arrays, which are all on the CPU."""

    name = "NumPy"

    def signature(self, array: numpy.ndarray) -> Hashable:
        return array.shape, array.strides, array.dtype, array.flags.writeable

    def view(self, array: numpy.ndarray, name: str) -> ArrayView:
        if isinstance(array, numpy.ma.MaskedArray):
            raise TypeError(f"{name}: got a numpy.ma.MaskedArray, whose mask would be lost; wanted a plain array")
        return _view(array, name, self.pointer(array), CPU, array.flags.writeable)

    def pointer(self, array: numpy.ndarray) -> int:
        return array.__array_interface__["data"][0]

    def empty(self, like: numpy.ndarray, shape: tuple[int, ...], dtype: str) -> numpy.ndarray:
        return numpy.empty(shape, numpy_dtype(dtype))

    def namespace(self, array: numpy.ndarray) -> Any:
        return numpy

    def contiguous(self, array: numpy.ndarray) -> numpy.ndarray:
        return numpy.ascontiguousarray(array)

    def as_numpy(self, array: numpy.ndarray) -> numpy.ndarray:
        return array


class CuPyArrays(Framework):
    """CuPy's arrays, which are all on a GPU."""

    name = "CuPy"

    def __init__(self, cupy: Any) -> None:
        super().__init__()
        self.cupy = cupy

    def signature(self, array: Any) -> Hashable:
        memory = array.data
        return array.shape, array.strides, array.dtype, memory.device_id, memory.ptr % ALIGNMENT

    def view(self, array: Any, name: str) -> ArrayView:
        return _view(array, name, array.data.ptr, array.data.device_id, writable=True)

    def pointer(self, array: Any) -> int:
        return array.data.ptr

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return self.cupy.empty(shape, numpy_dtype(dtype))

    def namespace(self, array: Any) -> Any:
        return self.cupy

    def contiguous(self, array: Any) -> Any:
        return self.cupy.ascontiguousarray(array)

    def stream(self, device: int) -> int:
        return self.cupy.cuda.get_current_stream().ptr

    def is_capturing(self) -> bool:
        return self.cupy.cuda.get_current_stream().is_capturing()

    def current_device(self) -> int:
        return self.cupy.cuda.runtime.getDevice()

    def use_device(self, device: int) -> AbstractContextManager[Any]:
        return self.cupy.cuda.Device(device)

    def compute_capability(self, device: int) -> int:
        if self.cupy.cuda.runtime.is_hip:
            raise RuntimeError("this CuPy is built for ROCm; cuflash needs CUDA")
        return int(self.cupy.cuda.Device(device).compute_capability)


_NUMPY = NumPyArrays()
#: What serves a type of array; None means that its arrays come in through DLPack.
frameworks: dict[type, Framework | None] = {numpy.ndarray: _NUMPY}


def framework_of(**named: Any) -> Framework | None:
    """The one framework that all arrays are of; None where they come in through DLPack.

    Raises TypeError, naming the argument, for what is not an array and where frameworks are mixed.
    """
    (first_name, first), *rest = named.items()
    framework = _framework_of_one(first, first_name)
    for name, array in rest:
        other = _framework_of_one(array, name)
        if other is not framework or (framework is None and _library(array) != _library(first)):
            raise TypeError(
                f"{name}: got an array of {_library(array)}, wanted one of {_library(first)} as {first_name} is; "
                "convert one of them without a copy by from_dlpack"
            )
    return framework


def operations(**named: Any) -> tuple[Any, Callable[[Any, Any], Any]] | None:
    """Namespace and cast(array, dtype) of the arrays' own library; None where they have to come in through DLPack."""
    namespaces: list[Any] = [getattr(array, "__array_namespace__", lambda: None)() for array in named.values()]
    if hasattr(namespaces[0], "astype") and all(namespace is namespaces[0] for namespace in namespaces):
        return namespaces[0], namespaces[0].astype
    framework = framework_of(**named)
    if framework is None:
        return None
    return framework.namespace(next(iter(named.values()))), framework.cast


def _framework_of_one(array: Any, name: str) -> Framework | None:
    kind = type(array)
    try:
        return frameworks[kind]
    except KeyError:
        frameworks[kind] = framework = _find_framework(array, name)
        return framework


def _find_framework(array: Any, name: str) -> Framework | None:
    if isinstance(array, numpy.ndarray):
        return _NUMPY
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return _cupy_arrays()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return importlib.import_module(".torch", __package__).ARRAYS
    if any(base.__name__ == "Tracer" and base.__module__.partition(".")[0] == "jax" for base in type(array).__mro__):
        raise TypeError(
            f"{name}: got a JAX tracer, wanted a JAX array; cuflash runs eagerly, so call it outside of jax.jit, "
            "jax.grad and jax.vmap, or from jax.pure_callback"
        )
    if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        return None
    raise TypeError(
        f"{name}: got {type(array).__name__}, wanted an array of NumPy, CuPy, PyTorch, JAX or any other library "
        f"that speaks DLPack (for example numpy.asarray({name}))"
    )


def _library(array: Any) -> str:
    framework = frameworks[type(array)]
    return framework.name if framework is not None else type(array).__module__.partition(".")[0]


def _cupy_arrays() -> CuPyArrays:
    cupy = import_cupy()
    framework = frameworks.get(cupy.ndarray)
    if framework is None:
        framework = frameworks[cupy.ndarray] = CuPyArrays(cupy)
    assert isinstance(framework, CuPyArrays)
    return framework


def import_cupy(cuda_version: str | None = None) -> Any:
    """CuPy, which compiles and launches every kernel, whoever owns the arrays."""
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        extras = ["cuda12", "cuda13"] if cuda_version is None else [f"cuda{cuda_version.partition('.')[0]}"]
        lines = " or ".join(f'pip install "cuflash[{extra}]"' for extra in extras)
        raise ImportError(f"arrays on a GPU need CuPy, which cannot be imported ({error}): {lines}") from error


_numpy_dtypes = {name: numpy.dtype(name) for name in ("float16", "float32", "float64", "uint8", "bool")}


def numpy_dtype(name: str) -> numpy.dtype:
    """NumPy's dtype of that name; ``bfloat16`` is the one of ml_dtypes."""
    try:
        return _numpy_dtypes[name]
    except KeyError:
        return _numpy_dtypes.setdefault(name, numpy.dtype(getattr(import_ml_dtypes(), name)))


def import_ml_dtypes() -> Any:
    """The package that teaches NumPy bfloat16."""
    try:
        return importlib.import_module("ml_dtypes")
    except ImportError as error:
        raise ImportError("bfloat16 arrays on the CPU need ml_dtypes: pip install ml_dtypes") from error


def _view(array: Any, name: str, pointer: int, device: int, writable: bool) -> ArrayView:
    """View of an array that has NumPy's dtype and strides in bytes."""
    dtype = array.dtype
    if not dtype.isnative:
        raise TypeError(
            f"{name}: got byte-swapped {dtype.name}, wanted native byte order ({name}.astype({dtype.name!r}))"
        )
    itemsize = dtype.itemsize
    if any(stride % itemsize for stride in array.strides):
        raise ValueError(
            f"{name}: got strides {array.strides} bytes, wanted multiples of the itemsize {itemsize}; copy it first"
        )
    strides = tuple(stride // itemsize for stride in array.strides)
    return ArrayView(name, pointer, array.shape, strides, dtype.name, itemsize, device, writable)


def sum_to(framework: Framework, array: Any, shape: tuple[int, ...]) -> Any:
    """Undo a broadcast: sum ``array`` over every axis along which ``shape`` was broadcast to it.

    16-bit arrays are summed in float32 and rounded once.
    """
    if tuple(array.shape) == shape:
        return array
    extra = array.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        extra + axis for axis, size in enumerate(shape) if array.shape[extra + axis] != size
    )
    if all(array.shape[axis] == 1 for axis in axes):
        return array.reshape(shape)
    xp = framework.namespace(array)
    accumulator = xp.float64 if array.dtype == xp.float64 else xp.float32
    return framework.cast(array.sum(axes, dtype=accumulator), array.dtype).reshape(shape)


def import_dlpack(array: Any, name: str) -> Any:
    """An array of another library as NumPy or CuPy array of the same memory."""
    device_type, device_id = array.__dlpack_device__()
    if device_type in _DLPACK_CUDA:
        return _cupy_arrays().cupy.from_dlpack(array)
    if device_type not in _DLPACK_HOST:
        raise ValueError(
            f"{name}: got an array on DLPack device ({int(device_type)}, {device_id}), wanted one on the CPU (1) or a "
            "CUDA device (2)"
        )
    try:
        return numpy.from_dlpack(array)
    except (BufferError, RuntimeError):
        # NumPy reads no bfloat16 through DLPack, but takes such arrays by the array protocol.
        if not hasattr(array, "__array__"):
            raise
        return numpy.asarray(array)


def check_mutable(out: Any) -> None:
    """Raise where ``out`` is an array that DLPack would let be written to, but whose library forbids it."""
    if _library(out) in ("jax", "jaxlib"):
        raise TypeError("out: got a JAX array, which is immutable; wanted None")


def export_dlpack(array: Any, like: Any) -> Any:
    """A NumPy or CuPy array as array of the library that ``like`` is of."""
    library = _namespace_with("from_dlpack", like)
    if array.dtype.name == "bfloat16" and isinstance(array, numpy.ndarray):
        return library.asarray(array)
    return library.from_dlpack(array)


def _namespace_with(function: str, array: Any) -> Any:
    """The array's own namespace, or the nearest enclosing module, that has ``function``."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    path = type(array).__module__.split(".")
    for length in range(len(path), 0, -1):
        module = sys.modules.get(".".join(path[:length]))
        if hasattr(module, function):
            return module
    raise TypeError(f"{path[0]} has no {function}, so results cannot be handed back as its arrays")
