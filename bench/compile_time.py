"""Compile time: from the first call to its result, in a fresh process, with an empty and with a filled kernel cache.

Imports and the creation of the CUDA context are done before the clock starts: they cost the same
whatever is called first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .check import worst
from .context import ROOT
from .rows import Row, print_rows
from .runner import Options
from .shapes import Workload
from .timing import Spread

PROVIDERS = ("cuflash",)

MEASURES = ("forward", "backward")

#: Every cache on disk that a contestant could find its kernels in.
CACHE_VARIABLES = ("CUPY_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def run(options: Options) -> list[Row]:
    """Cold and warm first calls of forward and backward, a process each time."""
    rows = []
    for provider in options.providers or PROVIDERS:
        for head_dim in options.dims or ((128,) if options.quick else (64, 128)):
            rows += _run_workload(provider, Workload("float16", 1, 4, 512, head_dim, True), options.num_rounds(2, 1))
    return rows


def _run_workload(provider: str, workload: Workload, rounds: int) -> list[Row]:
    seconds: dict[str, list[float]] = {f"{cache} {name}": [] for name in MEASURES for cache in ("cold", "warm")}
    errors: dict[str, list[float]] = {measure: [] for measure in seconds}
    failure = None
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                answer = _first_calls(provider, workload, Path(folder))
                failure = failure or answer.get("failure")
                for name, (elapsed, error) in answer.get("measures", {}).items():
                    seconds[f"{cache} {name}"].append(elapsed)
                    errors[f"{cache} {name}"].append(error)
    rows = []
    for measure, samples in seconds.items():
        row = Row.of("compile", measure, provider, workload)
        if failure is not None:
            row = replace(row, status="failed", note=failure)
        else:
            row = row.checked(worst(errors[measure]))
            if not row.is_bad:
                row = row.measured(Spread.of(samples), "s")
        rows.append(row)
    print_rows(rows)
    return rows


def _first_calls(provider: str, workload: Workload, cache: Path) -> dict[str, Any]:
    """Run ``main`` below in a process of its own."""
    environment = dict(os.environ)
    for variable in CACHE_VARIABLES:
        environment[variable] = str(cache / variable.lower())
    question = json.dumps({"provider": provider, "workload": asdict(workload)})
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile_time", question],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        return {"failure": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main(question: str) -> None:
    """Time the first forward and the first backward of this process; print them as JSON, with their errors."""
    import importlib.util

    import torch

    from .check import Inputs, Reference
    from .providers import select

    if importlib.util.find_spec("cupy") is not None:
        import cupy

        cupy.zeros(1)  # its own start-up
    # That of autograd: with a gradient given, its first call imports some five hundred modules.
    one = torch.ones(1, device="cuda", requires_grad=True)
    torch.autograd.grad(one * 1, one, torch.ones(1, device="cuda"))
    asked = json.loads(question)
    workload = Workload(**asked["workload"])
    (provider,) = select([asked["provider"]])
    inputs = Inputs.random(workload, "cuda")
    reference = Reference(workload, inputs)
    measures = {}
    for name in MEASURES:
        torch.cuda.synchronize()
        # The forward of "backward" has just been compiled, so that only the backward is new.
        started = time.perf_counter()
        result = provider.call(name, workload, inputs)()
        torch.cuda.synchronize()
        measures[name] = (time.perf_counter() - started, reference.error(name, result))
    print(json.dumps({"measures": measures}))


if __name__ == "__main__":
    main(sys.argv[1])
