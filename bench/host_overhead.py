"""Host time of a small call: back-to-back calls whose kernel takes no time to speak of, wall time per call."""

from __future__ import annotations

import functools
from typing import Any

import torch

import cuflash

from .check import Inputs, Reference
from .providers import OURS, select
from .rows import Row
from .runner import Candidate, Case, Options, run_case
from .shapes import Workload
from .timing import Call, WallTimer

PROVIDERS = ("cuflash-cupy", "cuflash", "sdpa", "sdpa-fa2", "sdpa-efficient", "sdpa-cudnn")

WORKLOAD = Workload("float16", 1, 8, 32, 64)

#: Calls between two synchronisations.
REPEATS = 1000


def cupy_call(inputs: Inputs) -> Call:
    """The public function on CuPy arrays that share the memory of the tensors."""
    import cupy

    q, k, v = (cupy.from_dlpack(tensor) for tensor in (inputs.q, inputs.k, inputs.v))
    return Call(lambda: (cuflash.attention(q, k, v),))


def run(options: Options) -> list[Row]:
    """One workload, forward without a graph."""
    names = options.providers or PROVIDERS
    inputs = Inputs.random(WORKLOAD, "cuda")
    reference = Reference(WORKLOAD, inputs)

    def check(name: str, call: Call) -> float:
        inputs.poison()
        result: tuple[Any, ...] = call()
        return reference.error("forward", [torch.from_dlpack(array) for array in result])

    candidates = []
    for name in names:
        if name == f"{OURS}-cupy":
            candidates.append(Candidate(name, functools.partial(cupy_call, inputs)))
        else:
            (provider,) = select([name])
            prepare = functools.partial(provider.forward, WORKLOAD, inputs)
            candidates.append(Candidate(name, prepare, provider.unsupported(WORKLOAD)))
    timer = WallTimer(REPEATS, torch.cuda.synchronize)
    rounds = options.num_rounds(20, 5)
    return run_case(Case("host", "call", WORKLOAD, "us"), candidates, check, timer, rounds)
