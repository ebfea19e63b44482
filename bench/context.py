"""Context: the machine, the versions and the commit that a result belongs to."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: FlashAttention-4 on the package index.
FA4 = "flash-attn-4"


def collect(commit: str | None = None) -> dict[str, Any]:
    """Everything known about where this runs; what is absent is None.

    ``commit`` overrides what git says, for a copy of the tree without its history.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or _commit(),
        **_gpu(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "cupy", "torch", "triton")},
        FA4: installed(FA4),
    }


def device_name(suite: str, context: dict[str, Any]) -> str:
    """What a suite ran on: the GPU, or for ``cpu`` the CPU."""
    if suite == "cpu":
        return f"{context['cpu']}, {context['cores']} cores"
    return str(context["gpu"])


def slug(name: str) -> str:
    """``name`` as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _commit() -> str | None:
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    # Results are written while they are being measured, so they do not count as a change.
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return f"{commit} with changes" if commit and changed else commit


def _gpu() -> dict[str, Any]:
    """GPU, driver, CUDA, cuDNN and NVRTC, as far as PyTorch and CuPy are there to ask."""
    facts: dict[str, Any] = dict.fromkeys(("gpu", "sms", "driver", "max_sm_clock", "cuda", "cudnn", "nvrtc"))
    torch = _module("torch")
    if torch is None or not torch.cuda.is_available():
        return facts
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts.update(gpu=properties.name, sms=properties.multi_processor_count, cuda=torch.version.cuda)
    facts["cudnn"] = torch.backends.cudnn.version()
    query = _output("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader", "--id=0")
    if query is not None and "," in query:
        facts["driver"], facts["max_sm_clock"] = (part.strip() for part in query.split(",", 1))
    cupy = _module("cupy")
    if cupy is not None:
        facts["nvrtc"] = ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion())
    return facts


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def installed(distribution: str) -> str | None:
    """Version of a package by its name on the index, or None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(name: str) -> str | None:
    return getattr(_module(name), "__version__", None)
