"""The experiment of the FlashAttention tutorials: attention that stores its scores against attention that does not.

Standard attention is written out below in the same framework and dtype, the way everyone writes it
first; cuflash computes the same function. Both are timed, forward alone and with gradients, and
their peak memory is read from the framework's allocator.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cuflash

from .problem import ITEMSIZE

PASSES = ("forward", "forward + backward")


@dataclass(frozen=True, slots=True)
class Workload:
    """Shape, dtype and mask of self-attention, and how often to time it."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str
    causal: bool
    repeats: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of q, k and v alike."""
        return (self.batch, self.heads, self.seqlen, self.head_dim)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"batch {self.batch}, {self.heads} heads, head_dim {self.head_dim}, {self.dtype}, {mask}"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One way of computing one pass: median time, and peak memory beyond the inputs."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both ways of computing one pass; None where a way ran out of memory."""

    seqlen: int
    name: str
    standard: Measurement | None
    ours: Measurement | None
    difference: float | None


def _random_inputs(workload: Workload) -> list[np.ndarray]:
    """q, k, v and d_out in float32, the same for every framework."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(workload.shape, dtype=np.float32) for _ in range(4)]


class ArrayFramework:
    """NumPy, and what CuPy has in common with it: gradients are formulas, not a tape.

    A *pass*, here and below, maps the inputs to a tuple of results.
    """

    out_of_memory: tuple[type[BaseException], ...] = (MemoryError,)

    def __init__(self, xp: Any, description: str) -> None:
        self.xp = xp
        self.description = description

    def inputs(self, workload: Workload) -> tuple[Any, ...]:
        """q, k, v, d_out."""
        dtype = _numpy_dtype(workload.dtype)
        return tuple(self.xp.asarray(array.astype(dtype)) for array in _random_inputs(workload))

    def standard(self, workload: Workload, name: str) -> Callable[..., tuple[Any, ...]]:
        """Softmax of a stored score matrix, and its gradients."""
        xp = self.xp
        scale = workload.head_dim**-0.5

        def probabilities(q: Any, k: Any) -> Any:
            s = q @ k.swapaxes(-1, -2)
            s *= s.dtype.type(scale)
            if workload.causal:
                row, column = xp.arange(workload.seqlen)[:, None], xp.arange(workload.seqlen)
                s[..., row < column] = -xp.inf
            s -= s.max(axis=-1, keepdims=True)
            p = xp.exp(s, out=s)
            p /= p.sum(axis=-1, keepdims=True)
            return p

        def forward(q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
            return (probabilities(q, k) @ v,)

        def forward_backward(q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
            p = probabilities(q, k)
            out = p @ v
            d_v = p.swapaxes(-1, -2) @ d_out
            d_s = d_out @ v.swapaxes(-1, -2)
            d_s -= (d_out * out).sum(axis=-1, keepdims=True)
            d_s *= p
            d_s *= d_s.dtype.type(scale)
            return out, d_s @ k, d_s.swapaxes(-1, -2) @ q, d_v

        return forward if name == "forward" else forward_backward

    def ours(self, workload: Workload, name: str) -> Callable[..., tuple[Any, ...]]:
        """The same by the library."""

        def forward(q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
            return (cuflash.attention(q, k, v, is_causal=workload.causal),)

        def forward_backward(q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
            out, lse = cuflash.attention(q, k, v, is_causal=workload.causal, return_lse=True)
            gradients = cuflash.attention_backward(d_out, q, k, v, out, lse, is_causal=workload.causal)
            return out, gradients.d_q, gradients.d_k, gradients.d_v

        return forward if name == "forward" else forward_backward

    def seconds(self, function: Callable[[], Any]) -> float:
        """Duration of one call."""
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """Most memory held at once by NumPy during one call; its allocations are known to tracemalloc."""
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def to_numpy(self, array: Any) -> np.ndarray:
        """The array on the host, in a dtype that NumPy computes with."""
        return array if array.dtype.itemsize >= 4 else array.astype(np.float32)


class CuPyFramework(ArrayFramework):
    """CuPy on its current device."""

    def __init__(self, cupy: Any) -> None:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        super().__init__(cupy, f"CuPy {cupy.__version__} on {properties['name'].decode()}")
        self.out_of_memory = (cupy.cuda.memory.OutOfMemoryError,)

    def seconds(self, function: Callable[[], Any]) -> float:
        """Device time between two events around one call."""
        start, stop = self.xp.cuda.Event(), self.xp.cuda.Event()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return float(self.xp.cuda.get_elapsed_time(start, stop)) / 1e3

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """Growth of an otherwise empty memory pool; a pool never shrinks by itself, so growth is the peak."""
        pool = self.xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        function()
        peak = pool.total_bytes() - before
        pool.free_all_blocks()
        return int(peak)

    def to_numpy(self, array: Any) -> np.ndarray:
        """The array on the host, in a dtype that NumPy computes with."""
        return super().to_numpy(self.xp.asnumpy(array))


class TorchFramework:
    """PyTorch on its current CUDA device; gradients by its autograd."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.description = f"PyTorch {torch.__version__} on {torch.cuda.get_device_name()}"
        self.out_of_memory: tuple[type[BaseException], ...] = (torch.cuda.OutOfMemoryError,)

    def inputs(self, workload: Workload) -> tuple[Any, ...]:
        """q, k, v (which require gradients) and d_out."""
        dtype = getattr(self.torch, workload.dtype)
        q, k, v, d_out = (
            self.torch.from_numpy(array).to(device="cuda", dtype=dtype) for array in _random_inputs(workload)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out

    def standard(self, workload: Workload, name: str) -> Callable[..., tuple[Any, ...]]:
        """Softmax of a stored score matrix."""
        torch = self.torch
        scale = workload.head_dim**-0.5

        def attention(q: Any, k: Any, v: Any) -> Any:
            s = (q @ k.mT) * scale
            if workload.causal:
                above = torch.ones(workload.seqlen, workload.seqlen, dtype=torch.bool, device=q.device).triu(1)
                s = s.masked_fill(above, float("-inf"))
            return s.softmax(dim=-1) @ v

        return self._pass(attention, name)

    def ours(self, workload: Workload, name: str) -> Callable[..., tuple[Any, ...]]:
        """The same by the library."""

        def attention(q: Any, k: Any, v: Any) -> Any:
            return cuflash.attention(q, k, v, is_causal=workload.causal)

        return self._pass(attention, name)

    def _pass(self, attention: Callable[..., Any], name: str) -> Callable[..., tuple[Any, ...]]:
        torch = self.torch

        def forward(q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
            with torch.no_grad():
                return (attention(q, k, v),)

        def forward_backward(q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
            out = attention(q, k, v)
            return (out.detach(), *torch.autograd.grad(out, (q, k, v), d_out))

        return forward if name == "forward" else forward_backward

    def seconds(self, function: Callable[[], Any]) -> float:
        """Device time between two events around one call."""
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """Peak of PyTorch's allocator during one call."""
        self.torch.cuda.empty_cache()
        self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated()
        function()
        return int(self.torch.cuda.max_memory_allocated() - before)

    def to_numpy(self, array: Any) -> np.ndarray:
        """The array on the host, in a dtype that NumPy computes with."""
        return (array if array.dtype.itemsize >= 4 else array.float()).cpu().numpy()


Framework = ArrayFramework | TorchFramework


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError("bfloat16 outside PyTorch needs ml_dtypes: pip install ml_dtypes") from None
    return ml_dtypes.bfloat16


def choose_framework(device: str, framework: str) -> Framework:
    """Framework to run in: PyTorch or CuPy where they see a GPU, else NumPy.

    Raises ValueError where what was asked for is not there.
    """
    if device == "cpu":
        if framework not in ("auto", "numpy"):
            raise ValueError(f"--framework {framework} runs on a GPU; on the CPU it is numpy")
    elif framework != "numpy":
        if framework in ("auto", "torch") and importlib.util.find_spec("torch"):
            import torch

            if torch.cuda.is_available():
                return TorchFramework(torch)
        if framework in ("auto", "cupy") and importlib.util.find_spec("cupy"):
            import cupy

            if cupy.cuda.is_available():
                return CuPyFramework(cupy)
    if framework in ("torch", "cupy") or device == "cuda":
        raise ValueError(
            f"no GPU through {'PyTorch or CuPy' if framework == 'auto' else framework}: it takes an NVIDIA GPU "
            'with its driver, and pip install "cuflash[cuda12]" or "cuflash[cuda13]"'
        )
    return ArrayFramework(np, f"NumPy {np.__version__} on the CPU ({_num_cores()} cores)")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """A bar on stderr: redrawn in place on a terminal, a line per step elsewhere."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.in_place = sys.stderr.isatty()

    def step(self, label: str) -> None:
        """Announce the next step; what it announced before is done."""
        self._draw(label)
        self.done += 1

    def finish(self) -> None:
        """All steps are done; leaves a terminal as it was."""
        if self.in_place:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        else:
            self._draw("done")

    def _draw(self, label: str) -> None:
        filled = 24 * self.done // self.steps
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done:>2}/{self.steps}  {label}"
        sys.stderr.write(f"\r\x1b[K{line}" if self.in_place else f"{line}\n")
        sys.stderr.flush()


def measure(
    framework: Framework, workload: Workload, name: str, method: str
) -> tuple[Measurement | None, tuple[np.ndarray, ...]]:
    """Time and memory of one pass (``name``) by one ``method``, and its results; None where memory is too small."""
    function = getattr(framework, method)(workload, name)
    try:
        inputs = framework.inputs(workload)
        # The first call also compiles, and its results are kept; neither belongs into what is measured.
        results = tuple(framework.to_numpy(array) for array in function(*inputs))
        peak_bytes = framework.peak_bytes(lambda: function(*inputs))
        seconds = statistics.median(framework.seconds(lambda: function(*inputs)) for _ in range(workload.repeats))
    except framework.out_of_memory:
        return None, ()
    return Measurement(seconds, peak_bytes), results


def run(framework: Framework, workload: Workload, seqlens: Sequence[int]) -> list[Comparison]:
    """Forward, and forward with backward, at every sequence length."""
    progress = Progress(steps=len(seqlens) * len(PASSES) * 2)
    comparisons = []
    for seqlen in seqlens:
        for name in PASSES:
            case = replace(workload, seqlen=seqlen)
            progress.step(f"{seqlen} tokens, {name}: standard attention")
            standard, expected = measure(framework, case, name, "standard")
            progress.step(f"{seqlen} tokens, {name}: cuflash")
            ours, results = measure(framework, case, name, "ours")
            difference = max(
                (float(np.abs(a - b).max(initial=0.0)) for a, b in zip(results, expected, strict=False)), default=None
            )
            comparisons.append(Comparison(seqlen, name, standard, ours, difference))
    progress.finish()
    return comparisons


def format_seconds(seconds: float) -> str:
    """Duration in milliseconds, or in seconds where it is long: 12.3 ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{0 if seconds >= 0.1 else 2}f} ms"


def format_bytes(count: float) -> str:
    """Size in binary units: 34.6 MiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows under a header, in aligned columns; the first ``left`` columns are flush left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def report(comparisons: Sequence[Comparison]) -> str:
    """Table of the comparisons at one sequence length."""
    rows = [["", "", "time", "speed-up", "peak memory", "less memory", "largest difference"]]
    for comparison in comparisons:
        standard, ours = comparison.standard, comparison.ours
        rows.append([comparison.name, "standard", *_time_and_memory(standard)])
        rows.append(["", "cuflash", *_time_and_memory(ours)])
        if standard is not None and ours is not None:
            rows[-1][3] = f"{standard.seconds / ours.seconds:.1f}x"
            rows[-1][5] = f"{standard.peak_bytes / max(ours.peak_bytes, 1):.1f}x"
            rows[-1][6] = f"{comparison.difference:.1e}"
    return format_table(rows, left=2)


def _time_and_memory(measurement: Measurement | None) -> list[str]:
    if measurement is None:
        return ["-", "", "too large", "", ""]
    return [format_seconds(measurement.seconds), "", format_bytes(measurement.peak_bytes), "", ""]


def plot(comparisons: Sequence[Comparison], title: str, path: Path) -> None:
    """Draw time and peak memory over sequence length, all axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for method, label, colour in (("standard", "standard", "tab:gray"), ("ours", "cuflash", "tab:green")):
        for name, style in zip(PASSES, ("-", "--"), strict=True):
            # What did not fit into memory leaves a line that ends early.
            points = [(c.seqlen, m) for c in comparisons if c.name == name and (m := getattr(c, method)) is not None]
            seqlens = [seqlen for seqlen, _ in points]
            line = {"color": colour, "linestyle": style, "marker": "o", "label": f"{label}, {name}"}
            panels[0].plot(seqlens, [m.seconds * 1e3 for _, m in points], **line)
            panels[1].plot(seqlens, [m.peak_bytes / 2**20 for _, m in points], **line)
    ticks = sorted({comparison.seqlen for comparison in comparisons})
    for panel, heading, unit in zip(panels, ("Time", "Peak memory"), ("milliseconds", "MiB"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [str(seqlen) for seqlen in ticks])
        panel.set(title=heading, xlabel="sequence length", ylabel=unit)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    """A whole number of one or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the experiment."""
    parser.add_argument("--batch", type=positive, help="default: 32 on a GPU, 1 on the CPU")
    parser.add_argument("--heads", type=positive, default=8, help="default: 8")
    parser.add_argument("--seqlen", type=positive, default=2048, help="default: 2048")
    parser.add_argument("--head-dim", type=positive, default=64, help="default: 64")
    parser.add_argument("--dtype", choices=ITEMSIZE, help="default: float16 on a GPU, float32 on the CPU")
    parser.add_argument("--causal", action="store_true", help="each token sees itself and those before it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPU if any")
    parser.add_argument(
        "--framework",
        choices=("auto", "torch", "cupy", "numpy"),
        default="auto",
        help="default: PyTorch, else CuPy, on a GPU; NumPy on the CPU",
    )
    parser.add_argument("--repeats", type=positive, help="timed calls, of which the median counts")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory up to --seqlen into FILE")


def main(args: argparse.Namespace) -> None:
    """Run the experiment and print its table."""
    if args.plot is not None and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    framework = choose_framework(args.device, args.framework)
    on_gpu = not isinstance(framework, ArrayFramework) or framework.xp is not np
    workload = Workload(
        batch=args.batch or (32 if on_gpu else 1),
        heads=args.heads,
        seqlen=args.seqlen,
        head_dim=args.head_dim,
        dtype=args.dtype or ("float16" if on_gpu else "float32"),
        causal=args.causal,
        repeats=args.repeats or (20 if on_gpu else 3),
    )
    if isinstance(framework, ArrayFramework):
        _numpy_dtype(workload.dtype)  # fails here rather than halfway

    print(f"cuflash {cuflash.__version__} against standard attention, which stores its scores")
    print(f"{framework.description}: {workload.seqlen} tokens, {workload}\n", flush=True)
    shifts = range(5) if args.plot is not None else range(1)
    comparisons = run(framework, workload, sorted({max(args.seqlen >> shift, 1) for shift in shifts}))
    print(report([comparison for comparison in comparisons if comparison.seqlen == args.seqlen]))
    print("\nTimes are medians. Memory is what a call holds at most beyond its inputs; results are part of it.")
    if args.plot is not None:
        plot(comparisons, f"{framework.description}: {workload}", args.plot)
        print(f"Time and memory over sequence length are drawn in {args.plot}")
