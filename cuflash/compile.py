"""Config -> source text -> cubin -> loaded kernel: the only file that knows NVRTC and the kernel cache.

A kernel's source is a generated entry of a dozen lines that includes ``kernels_cu``. CuPy's disk cache is
keyed by that text and not by what it includes, so the text carries a hash of all headers: an edited
header is a new key.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import environment
from .configs import Config
from .expression import to_cuda
from .params import layout_assertions, sums_of_mod
from .problem import Mod

logger = logging.getLogger("cuflash")

#: Options beside -arch and -I; CuPy adds -ftz=true and --device-as-default-execution-space itself.
_OPTIONS = ("--std=c++20",)
_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
#: Oldest NVRTC that accepts a second -arch and C++20 struct template parameters.
MIN_NVRTC = (12, 9)


def kernel_root() -> Path:
    """Folder of the CUDA sources: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_kernels_cu"
    return installed if installed.is_dir() else package.parent / "kernels_cu"


@lru_cache(maxsize=8)
def _hash_tree(root: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(root.rglob("*.cuh"))
    if not files:
        raise FileNotFoundError(f"cuflash: no CUDA sources in {root}; the installation is incomplete")
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def header_hash() -> str:
    """Hash of every file under :func:`kernel_root`."""
    return _hash_tree(kernel_root())


def source(config: Config) -> str:
    """The generated entry: the text that NVRTC compiles and that names the cache key."""
    return "\n".join(
        (
            f"// headers {header_hash()}",
            f'#include "{config.header}"',
            f"constexpr {type(config).__name__} kConfig{config.cpp.removeprefix(type(config).__name__)};",
            *([] if config.mod is None else _score_mod(config.params, config.mod)),
            *layout_assertions(config.params, config.mod),
            *_size_assertions(config),
            f'extern "C" __global__ void __launch_bounds__({config.threads}, {config.min_blocks})',
            f"{config.name}(const __grid_constant__ {params_type(config)} params) {{",
            "    extern __shared__ __align__(1024) char smem[];",
            f"    {config.function}<kConfig>(params, smem_address(smem));",
            "}",
            "",
        )
    )


def params_type(config: Config) -> str:
    """Type of the kernel's parameter."""
    return config.params if config.mod is None else "Params"


#: How C++ reads elements of captured arrays, by their dtypes.
_REAL = {"float16": "kF16", "bfloat16": "kBF16", "float32": "kF32", "float64": "kF64"}
_INTEGER = {
    "bool": "unsigned char", "uint8": "unsigned char", "int8": "signed char", "int16": "short", "int32": "i32",
    "int64": "i64",
}  # fmt: skip


def _score_mod(params: str, mod: Mod) -> list[str]:
    """C++ of ``ScoreMod`` (``attention/score_mod.cuh``) for an expression, whose captures are numbered."""
    captures, dtypes = mod.expression.captures, dict(mod.dtypes)
    names = {name: f"captured_{index}" for index, name in enumerate(captures)}
    members, readers = [], []
    for name, found in captures.items():
        own = names[name]
        if found.num_axes is None:
            members.append(f"{'double' if found.is_real else 'i32'} {own};")
            readers.append(f"auto const {own} = static_cast<{'Acc' if found.is_real else 'int'}>(params.{own});")
            continue
        members.append(f"CapturedArray<{found.num_axes}> {own};")
        dtype = dtypes[name]
        read = f"real<Dtype::{_REAL[dtype]}, Acc>" if found.is_real else f"integer<{_INTEGER[dtype]}>"
        readers.append(f"auto const {own} = [&](auto... i) {{ return params.{own}.template {read}(i...); }};")
    members += [f"char* {own};" for own in sums_of_mod(mod)]
    program = to_cuda(mod.expression, names)
    statements = [
        "        auto const [b, h, h_kv, q_idx, k_idx, seqlen_q, seqlen_k, q_real, k_real] = pair;",
        *(f"        {line}" for line in (*readers, *program.statements.splitlines())),
    ]
    gradients = [
        (f"params.sums_{list(captures).index(name)}", names[name], places, derivative)
        for name, places, derivative in program.reads
        if captures[name].is_real
    ]
    given = "Params const& params, Acc score, PairIndices<Acc> const& pair"
    return [
        "template <>",
        "struct ScoreMod<kConfig.score> {",
        "    struct Params {",
        "        i32 seqlen_q, seqlen_k, first_key;",
        *(f"        {member}" for member in members),
        "    };",
        "    template <class Math, class Acc>",
        f"    __device__ static void evaluate({given}, Acc& changed, Acc& by_score) {{",
        *statements,
        f"        changed = {program.score};",
        f"        by_score = {program.by_score};",
        "    }",
        f"    static constexpr int kReads = {len(gradients)};",
        "    template <class Math, class Acc, class Add>",
        f"    __device__ static void for_each_read({given}, Add add) {{",
        *statements,
        *(
            f"        add(Constant<{number}>{{}}, {sums}, params.{own}.number({', '.join(places)}), {derivative});"
            for number, (sums, own, places, derivative) in enumerate(gradients)
        ),
        "    }",
        "    template <class Use>",
        "    __device__ static void for_each_sum(Params const& params, Use use) {",
        *(f"        use(Constant<{number}>{{}}, {sums});" for number, (sums, *_) in enumerate(gradients)),
        "    }",
        "};",
        f"using Params = ParamsOf<kConfig.score, {params}>;",
    ]


def _size_assertions(config: Config) -> list[str]:
    """C++ that fails to compile where the two sides count shared memory differently."""
    if not config.tiles:
        return []
    size = f"{config.tiles}<kConfig>::kBytes == {config.smem_bytes}"
    return [f'static_assert({size}, "shared memory: size differs from cuflash/configs.py");']


def arch_option(config: Config, arch: int) -> tuple[str, ...]:
    """-arch for the instructions that exist on one architecture only (wgmma, setmaxnreg: sm_90a).

    CuPy appends ``-arch=sm_90`` of its own; NVRTC >= 12.9 accepts both and keeps the more specific one,
    which is not documented: :func:`load` checks the outcome.
    """
    return (f"-arch=sm_{arch}a",) if config.arch_specific else ()


@dataclass(frozen=True, slots=True)
class Compiled:
    """Result of a compilation without a GPU."""

    cubin: bytes
    log: str
    registers: int
    spill_bytes: int
    seconds: float


class CompileError(RuntimeError):
    """A kernel that NVRTC rejects; the message carries its log."""


def compile_cubin(config: Config, arch: int) -> Compiled:
    """Compile for an architecture with NVRTC alone; needs no GPU."""
    nvrtc = _nvrtc()
    arch_name = f"-arch=sm_{arch}" + ("a" if config.arch_specific else "")
    options = (*_OPTIONS, *_CUPY_OPTIONS, arch_name, f"-I{kernel_root()}", "--ptxas-options=-v")
    start = time.perf_counter()
    program = nvrtc.createProgram(source(config), f"{config.name}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise CompileError(f"{config.name} for sm_{arch}:\n{nvrtc.getProgramLog(program)}") from error
        log = nvrtc.getProgramLog(program)
        cubin = nvrtc.getCUBIN(program)
        cubin += b"\0" * (-len(cubin) % 8)  # CuPy takes the last byte for the end of a string
    finally:
        nvrtc.destroyProgram(program)
    seconds = time.perf_counter() - start
    _dump(config, arch, cubin, log)
    registers = re.search(r"Used (\d+) registers", log)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return Compiled(cubin, log, int(registers.group(1)) if registers else 0, spills, seconds)


def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        version = nvrtc.getVersion()
    except ImportError as error:
        raise ImportError(
            'cuflash compiles its kernels with CuPy and NVRTC: pip install "cuflash[cuda12]" (or "cuflash[cuda13]")'
        ) from error
    except Exception as error:  # CuPy raises its own error where libnvrtc cannot be loaded
        raise ImportError(
            f'cuflash: NVRTC cannot be loaded ({error}): pip install "nvidia-cuda-nvrtc-cu12>=12.9"'
        ) from error
    if tuple(version) < MIN_NVRTC:
        raise ImportError(
            f"cuflash: NVRTC {version[0]}.{version[1]} is too old, wanted >= {MIN_NVRTC[0]}.{MIN_NVRTC[1]}: "
            f'pip install -U "nvidia-cuda-nvrtc-cu{version[0]}>={MIN_NVRTC[0]}.{MIN_NVRTC[1]}"'
        )
    return nvrtc


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in a device's context: the handle that a launch takes."""

    config: Config
    handle: int
    registers: int
    #: Keeps the module loaded.
    module: Any


_kernels: dict[tuple[Config, int], Kernel] = {}
_locks: dict[tuple[Config, int], threading.Lock] = {}
_guard = threading.Lock()


def loaded_kernels() -> int:
    """Number of kernels in memory; tests watch it not grow."""
    return len(_kernels)


def load(config: Config, device_id: int) -> Kernel:
    """The kernel on a device: from memory, from CuPy's disk cache, or compiled now (one thread per kernel)."""
    key = (config, device_id)
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        kernel = _kernels.get(key)
        if kernel is None:
            kernel = _kernels[key] = _load(config, device_id)
    return kernel


def _load(config: Config, device_id: int) -> Kernel:
    _nvrtc()
    import cupy

    start = time.perf_counter()
    with cupy.cuda.Device(device_id) as device:
        arch = int(device.compute_capability)
        text = source(config)
        options = (*_OPTIONS, *arch_option(config, arch), f"-I{kernel_root()}")
        hint = threading.Timer(1.0, _hint, (config.name,))
        hint.daemon = True
        hint.start()
        try:
            module = cupy.RawModule(code=text, options=options)
            function = module.get_function(config.name)
            if config.smem_bytes > 48 * 1024:
                function.max_dynamic_shared_size_bytes = config.smem_bytes
            attributes = function.attributes
        except cupy.cuda.compiler.CompileException as error:
            raise CompileError(f"{config.name} for sm_{arch}:\n{error}") from error
        finally:
            hint.cancel()
        if config.arch_specific and attributes["binary_version"] != arch:
            raise CompileError(f"{config.name}: built for sm_{attributes['binary_version']}, wanted sm_{arch}a")
        handle = function.kernel.ptr
    message = f"{config.name}: loaded in {time.perf_counter() - start:.2f} s, {attributes['num_regs']} registers"
    logger.info(message)
    if environment.log():
        print(f"cuflash: {message}", file=sys.stderr)
    if environment.dump():
        compile_cubin(config, arch)  # once more with NVRTC itself, for the log and the listing
    return Kernel(config, handle, attributes["num_regs"], (module, function))


def _hint(name: str) -> None:
    logger.warning("compiling %s (once; later processes take it from the cache)", name)


def _dump(config: Config, arch: int, cubin: bytes, log: str) -> None:
    """Write what CUFLASH_DUMP asks for, one folder of files named after the kernel."""
    kinds = environment.dump()
    if not kinds:
        return
    folder = environment.dump_dir()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{config.name}.sm_{arch}"
    if "cu" in kinds:
        stem.with_name(stem.name + ".cu").write_text(source(config))
    if "log" in kinds:
        stem.with_name(stem.name + ".log").write_text(log)
    if "sass" in kinds:
        path = stem.with_name(stem.name + ".cubin")
        path.write_bytes(cubin)
        _disassemble(path, stem.with_name(stem.name + ".sass"))
    if "ptx" in kinds:
        stem.with_name(stem.name + ".ptx").write_bytes(_ptx(config, arch))


def _disassemble(cubin: Path, target: Path) -> None:
    import shutil
    import subprocess

    tool = shutil.which("cuobjdump") or shutil.which("nvdisasm")
    if tool is None:
        logger.warning("CUFLASH_DUMP=sass needs cuobjdump or nvdisasm on the PATH; kept %s", cubin)
        return
    arguments = [tool, "-sass", str(cubin)] if Path(tool).stem == "cuobjdump" else [tool, str(cubin)]
    target.write_bytes(subprocess.run(arguments, check=True, capture_output=True).stdout)


def _ptx(config: Config, arch: int) -> bytes:
    nvrtc = _nvrtc()
    suffix = "a" if config.arch_specific else ""
    options = (*_OPTIONS, *_CUPY_OPTIONS, f"-arch=compute_{arch}{suffix}", f"-I{kernel_root()}")
    program = nvrtc.createProgram(source(config), f"{config.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        text = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    return text if isinstance(text, bytes) else os.fsencode(text)
