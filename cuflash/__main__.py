"""The command line: ``python -m cuflash {demo, info, plan, compile, bench}``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import runpy
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cuflash

from . import compile as compiler
from . import configs, demo, environment
from .plan import DeviceInfo, plan_backward, plan_forward
from .problem import ITEMSIZE, Problem
from .scores import make_band

#: Distributions that may provide what `info` lists.
_PACKAGES = {
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    "torch": ("torch",),
    "jax": ("jax",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])  # its flags are the suite's
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        return parsed.command(parsed) or 0
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"cuflash {parsed.name}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cuflash", description="Exact attention without the score matrix.")
    parser.add_argument("--version", action="version", version=f"cuflash {cuflash.__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")

    command = commands.add_parser("demo", help="attention with and without a stored score matrix: time and memory")
    demo.add_arguments(command)
    command.set_defaults(command=demo.main)

    command = commands.add_parser("info", help="versions, devices, caches, and what a call would use")
    command.set_defaults(command=_info)

    command = commands.add_parser("plan", help="what a call would launch on a given architecture, GPU or no GPU")
    shape = "BATCH,HEADS,SEQLEN,DIM"
    command.add_argument("--q", type=_shape, required=True, metavar=shape)
    command.add_argument("--k", type=_shape, metavar=shape, help="default: as --q")
    command.add_argument("--v", type=_shape, metavar=shape, help="default: as --k")
    command.add_argument("--dtype", choices=ITEMSIZE, default="float16", help="default: float16")
    command.add_argument("--causal", action="store_true")
    command.add_argument("--window", type=_window, metavar="LEFT,RIGHT", help="keys on either side, or 'none'")
    command.add_argument("--precision", choices=("ieee", "tf32"), default="ieee", help="of float32; default: ieee")
    command.add_argument("--deterministic", action="store_true", help="reproducible gradients")
    command.add_argument("--q-offset", type=int, help="position of the first query; default: seqlen_k - seqlen_q")
    command.add_argument("--arch", type=_arch, help="such as sm_80; default: the current device, else sm_90")
    command.add_argument("--backward", action="store_true", help="plan the gradients too")
    command.set_defaults(command=_plan)

    command = commands.add_parser("compile", help="compile kernels, for which NVRTC needs no GPU")
    command.add_argument("--arch", type=_arch, help="such as sm_80; default: the current device, else sm_90")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--match", metavar="TEXT", help="the configurations with TEXT in their name")
    which.add_argument("--all", action="store_true", help="all configurations; with neither, they are listed")
    command.add_argument("--jobs", type=demo.positive, default=os.cpu_count() or 1, help="default: one per core")
    command.set_defaults(command=_compile)

    commands.add_parser("bench", help="measure beside other implementations; needs a checkout", add_help=False)
    return parser


# ---- info ----------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    """Print what a bug report needs; works with nothing but NumPy."""
    print(f"cuflash    {cuflash.__version__} in {Path(cuflash.__file__).parent}")
    print(f"python     {platform.python_version()} on {platform.platform()}")
    for name, distributions in _PACKAGES.items():
        print(f"{name:<9}  {_version(distributions) or 'not installed'}")

    devices, reason = _devices()
    print()
    for number, (device, details) in enumerate(devices):
        print(f"device {number}: {device.name}, sm_{device.arch}, {device.num_sms} SMs, {details}")
    if reason:
        print(f"no GPU: {reason}")

    print(f"\nkernels    {compiler.kernel_root()}, hash {compiler.header_hash()}")
    print(f"cache      {os.environ.get('CUPY_CACHE_DIR') or Path.home() / '.cupy' / 'kernel_cache'}")
    for variable in environment.VARIABLES:
        if variable.name in os.environ:
            print(f"{variable.name}={os.environ[variable.name]}")

    print("\nAttention over 4096 tokens, head_dim 128:")
    paths = [["dtype", "CPU", *(f"device {number}" for number in range(len(devices)))]]
    for dtype in ITEMSIZE:
        row = [dtype, "NumPy"]
        if dtype == "bfloat16" and not _version(_PACKAGES["ml_dtypes"]):
            row[1] = "needs ml_dtypes"
        problem = Problem(dtype, 1, 16, 16, 4096, 4096, 128, 128, scale=128**-0.5)
        row += [_kernel_name(problem, device) for device, _ in devices]
        paths.append(row)
    print(demo.format_table(paths, left=len(paths[0])))


def _kernel_name(problem: Problem, device: DeviceInfo) -> str:
    """The kernel of a forward call, or that the kernel family that is asked for has none."""
    try:
        return plan_forward(problem, device, environment.kernel()).config.name
    except ValueError:
        return f"an error, with {environment.KERNEL.name}={environment.kernel()}"


def _version(distributions: Sequence[str]) -> str | None:
    """Version of the first of these distributions that is installed."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> tuple[list[tuple[DeviceInfo, str]], str]:
    """Every GPU with its memory and driver, or the reason why there is none."""
    try:
        import cupy
    except ImportError:
        return [], 'CuPy is not installed: pip install "cuflash[cuda12]" or "cuflash[cuda13]"'
    runtime = cupy.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
        devices = []
        for device_id in range(runtime.getDeviceCount()):
            memory = runtime.getDeviceProperties(device_id)["totalGlobalMem"] / 2**30
            details = f"{memory:.1f} GiB, driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
            devices.append((DeviceInfo.current(device_id), details))
    except runtime.CUDARuntimeError as error:
        return [], str(error)
    return devices, ""


# ---- plan ----------------------------------------------------------------------------------------


def _plan(args: argparse.Namespace) -> None:
    q = args.q
    k = args.k or q
    v = args.v or k
    if not (q[0] == k[0] == v[0]) or k[1:3] != v[1:3] or q[3] != k[3] or q[1] % k[1]:
        raise ValueError(
            f"shapes disagree: q {q}, k {k}, v {v}; wanted (b,h,m,d), (b,g,n,d), (b,g,n,e) with h a multiple of g"
        )
    problem = Problem(
        dtype=args.dtype,
        batch=q[0],
        num_heads=q[1],
        num_heads_kv=k[1],
        seqlen_q=q[2],
        seqlen_k=k[2],
        head_dim=q[3],
        head_dim_v=v[3],
        scale=q[3] ** -0.5,
        band=make_band(args.causal, args.window, args.q_offset, q[2], k[2]),
        precision=args.precision,
        deterministic=args.deterministic,
        vectorized=all(dim * ITEMSIZE[args.dtype] % 16 == 0 for dim in (q[3], v[3])),
    )
    if args.precision == "tf32" and args.dtype != "float32":
        raise ValueError(f"--precision tf32 is a way to multiply float32, not {args.dtype}")
    device = _device(args.arch)
    print(f"{problem}\n\nforward: {problem.forward_flops / 1e9:.4g} GFLOP on {device.name}")
    print(plan_forward(problem, device, environment.kernel()))
    if args.backward:
        print(f"\nbackward: {problem.backward_flops / 1e9:.4g} GFLOP")
        for plan in plan_backward(problem, device, environment.kernel()):
            print(plan)


def _device(arch: int | None) -> DeviceInfo:
    """The described device, by default the current one, or a Hopper GPU where there is none."""
    if arch is not None:
        return DeviceInfo.of_arch(arch)
    devices, _ = _devices()
    return devices[0][0] if devices else DeviceInfo.of_arch(90)


def _shape(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers BATCH,HEADS,SEQLEN,DIM")
    return tuple(int(number) for number in numbers)


def _window(text: str) -> tuple[int | None, int | None]:
    sides = [side.strip().lower() for side in text.split(",")]
    if len(sides) != 2 or not all(side in ("", "none") or side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not LEFT,RIGHT with a number or 'none' on either side")
    left, right = (None if side in ("", "none") else int(side) for side in sides)
    return left, right


def _arch(text: str) -> int:
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})a?", text)
    if not match or int(match[1]) < min(configs.ARCHS):
        raise argparse.ArgumentTypeError(f"{text!r} is not an architecture of sm_{min(configs.ARCHS)} or newer")
    return int(match[1])


# ---- compile -------------------------------------------------------------------------------------


def _compile(args: argparse.Namespace) -> int:
    device = _device(args.arch)
    chosen = [config for config in configs.all_configs(device.arch) if args.all or (args.match or "") in config.name]
    if not chosen:
        raise ValueError(f"no configuration of sm_{device.arch} has {args.match!r} in its name")
    if not args.all and args.match is None:
        print("\n".join(config.name for config in chosen))
        print(f"\n{len(chosen)} configurations; compile them with --all, or some with --match TEXT", file=sys.stderr)
        return 0

    rows = [["kernel", "registers", "spilled bytes", "seconds"]]
    failures = []
    progress = demo.Progress(len(chosen))
    # NVRTC compiles one kernel at a time in a process, so several need several processes.
    with ProcessPoolExecutor(min(args.jobs, len(chosen)), mp_context=get_context("spawn")) as pool:
        tasks = [(config.name, pool.submit(compiler.compile_cubin, config, device.arch)) for config in chosen]
        for name, task in tasks:
            progress.step(name)
            try:
                compiled = task.result()
                rows.append([name, str(compiled.registers), str(compiled.spill_bytes), f"{compiled.seconds:.2f}"])
            except ImportError:
                raise  # no NVRTC: the same for all of them
            except Exception as error:  # whatever it is, the other kernels are still worth compiling
                failures.append(f"{name}: {error}")
                rows.append([name, "failed", "", ""])
    progress.finish()
    print(demo.format_table(rows))
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if failures else 0


# ---- bench ---------------------------------------------------------------------------------------


def _bench(arguments: Sequence[str]) -> int:
    """Run ``python -m bench`` of the checkout that this package belongs to."""
    checkout = Path(cuflash.__file__).resolve().parent.parent
    if not (checkout / "bench" / "__main__.py").is_file():
        print("cuflash bench: the benchmarks are not installed; they run from a checkout of cuflash", file=sys.stderr)
        return 2
    sys.path.insert(0, str(checkout))
    sys.argv[1:] = arguments
    runpy.run_module("bench", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
