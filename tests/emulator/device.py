"""A stand-in for the CUDA driver: global memory is a file, a kernel is a program, and a launch is a process.

`cuflash.launch` does not notice: the parameters and descriptors that it hands to the driver are, byte for byte, those
that the kernels get here.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash import compile as compiler
from cuflash import params, tensor_map
from cuflash.configs import Config, ceil_div

FOLDER = Path(__file__).parent
#: Where programs map the memory file: far from what the system puts into a process by itself.
_ADDRESS = 0x1000_0000_0000
_MEMORY_BYTES = 8 << 20
#: A launch takes some tenths of a second.
_SECONDS = 30
#: The emulator knows registers by their address, which therefore belongs to one variable; reports follow the frames.
_FLAGS = (
    "-std=c++20", "-march=native", "-g1", "-no-pie", "-fno-strict-aliasing", "-fstack-reuse=none",
    "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls", "-Wno-unknown-pragmas", "-Wno-invalid-offsetof",
)  # fmt: skip


def is_available() -> bool:
    """Whether there is a compiler that knows float16, and a machine that the switch of stacks is written for."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None:
        return False
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    return int(version.split(".")[0]) >= 12


def _gxx(*arguments: object) -> None:
    done = subprocess.run(["g++", *_FLAGS, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[:4000])


def compile_emulator(folder: Path) -> list[Path]:
    """Object files of the emulator itself, which all programs share."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _gxx("-O3", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, FOLDER.glob("*.cpp")))


class Programs:
    """Kernels compiled by g++, each once: from a copy of `kernels_cu` whose wrappers of instructions are replaced."""

    def __init__(self, folder: Path, objects: Sequence[Path], edits: Sequence[tuple[str, str, str]] = ()) -> None:
        """`objects` are those of the emulator; `edits`, (header, old, new), put a bug into the copy."""
        self._folder, self._objects = folder, objects
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        shutil.copytree(compiler.kernel_root(), folder / "kernels")
        shutil.copytree(FOLDER / "ptx", folder / "kernels" / "ptx", dirs_exist_ok=True)
        for header, old, new in edits:
            path = folder / "kernels" / header
            text = path.read_text()
            assert old in text, f"{header} no longer has {old!r}"
            path.write_text(text.replace(old, new))

    def of(self, config: Config) -> Path:
        """The program of a configuration; threads may ask at the same time."""
        with self._guard:
            lock = self._locks.setdefault(config.name, threading.Lock())
        path = self._folder / config.name
        with lock:
            if not path.exists():
                self._compile(config, path)
        return path

    def _compile(self, config: Config, path: Path) -> None:
        # NVRTC has no offsetof, and g++ does not take what the entry says instead.
        entry = compiler.source(config).replace("__INTADDR__(&static_cast<", "offsetof(").replace("*>(nullptr)->", ", ")
        source = path.with_suffix(".cpp")
        source.write_text(
            '#include "cuda.h"\n'
            f"{entry}"
            "char smem[1];  // never touched: only its address is asked for\n"
            f"static {compiler.params_type(config)} parameters;\n"
            "int main(int, char** arguments) {\n"
            f"    auto const kernel = [] {{ {config.name}(parameters); }};\n"
            f"    emulator::Launch const launch{{{config.threads}, {config.smem_bytes}, kernel}};\n"
            "    return emulator::main(arguments, &parameters, sizeof parameters, launch);\n"
            "}\n"
        )
        _gxx("-O1", f"-I{FOLDER}", f"-I{self._folder / 'kernels'}", source, *self._objects, "-o", path)


class KernelError(AssertionError):
    """What the emulator found, or that a launch never came to an end."""


class Device:
    """Memory, and the functions of the driver that `cuflash.launch` calls."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self._folder, self._programs = folder, programs
        (folder / "memory").write_bytes(b"\xff" * _MEMORY_BYTES)  # NaN, whatever the dtype
        self._memory = np.memmap(folder / "memory", np.uint8, "r+")
        self._used = 0

    def put(self, array: np.ndarray) -> np.ndarray:
        """A copy in the memory of the device."""
        begin, self._used = self._used, ceil_div(self._used + array.nbytes, 256) * 256
        assert self._used <= _MEMORY_BYTES
        place = self._memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        place[...] = array
        return place

    def address(self, array: np.ndarray) -> int:
        """Where a kernel finds an array of this memory."""
        return _ADDRESS + array.ctypes.data - self._memory.ctypes.data

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of the driver, and of what compiles for it."""
        driver = SimpleNamespace(launchKernel=self._launch)
        runtime = SimpleNamespace(setDevice=lambda device_id: None)
        api = SimpleNamespace(driver=driver, runtime=runtime)
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", api)
        monkeypatch.setattr(compiler, "load", lambda config, device_id: SimpleNamespace(handle=config))
        monkeypatch.setattr(tensor_map, "_encode_function", lambda: _encode)

    def _launch(self, config: Config, *arguments: int) -> None:
        grid, grid_y, grid_z, threads, threads_y, threads_z, shared_bytes, stream, pointers, extra = arguments
        assert (grid_y, grid_z, threads_y, threads_z, extra) == (1, 1, 1, 1, 0)
        assert (threads, shared_bytes) == (config.threads, config.smem_bytes)
        parameters = self._folder / f"{config.name}.params"
        block = ctypes.c_uint64.from_address(pointers).value
        parameters.write_bytes(ctypes.string_at(block, params.block_dtype(config.params, config.mod).itemsize))
        program = self._programs.of(config)
        # What tells launches apart is the seed of their schedule, and it comes as stream.
        words = [str(word) for word in (program, self._folder / "memory", _ADDRESS, parameters, grid, stream)]
        again = f"again: {shlex.join(words)}"
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise KernelError(f"not done in {_SECONDS} s; {again}") from None
        if done.returncode:
            raise KernelError(f"{done.stderr[:8000]}exit code {done.returncode}; {again}")


def _encode(target: Any, dtype: Any, rank: Any, address: Any, *arrays: Any) -> int:
    """Stand for cuTensorMapEncodeTiled: writes a `TensorMapContent` (copy_engine.h), or refuses as the driver would."""
    lengths, strides, box, steps = map(list, arrays[:4])
    is_valid = address.value % 16 == 0 and all(stride % 16 == 0 and stride < 1 << 40 for stride in strides)
    is_valid &= all(0 < length <= 1 << 32 for length in lengths) and all(0 < length <= 256 for length in box)
    # What is emulated: rows of 128 bytes, each element of them, swizzled, and zeros outside.
    if not is_valid or box[0] != 64 or set(steps) != {1} or [flag.value for flag in arrays[4:]] != [0, 3, 3, 0]:
        return 1
    lengths, strides, box = (axes + [0] * (size - len(axes)) for axes, size in ((lengths, 5), (strides, 4), (box, 5)))
    content = struct.pack("=Q5Q4Q5II", address.value, *lengths, *strides, *box, rank.value)
    ctypes.memmove(target.value, content, len(content))
    return 0
