"""Memory: what a call needs beyond its inputs and outputs, and what a forward keeps for its backward."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .check import Inputs, Reference
from .providers import GPU_PROVIDERS, Provider, leaves, select
from .rows import Row
from .runner import Candidate, Case, Options, run_case
from .shapes import Workload, grid
from .timing import Call, Spread


@dataclass(frozen=True, slots=True)
class Measure:
    """``prepare`` makes the call, ``result`` names what it returns, ``used`` reads its bytes."""

    prepare: Callable[[Provider, Workload, Inputs], Call]
    result: str
    used: Callable[[Call], int]


def peak_bytes(call: Call) -> int:
    """Most bytes that ``call`` holds at any time, beyond its results.

    CuPy's pool counts as well: PyTorch's allocator does not see it, and memory taken from it is no cheaper.
    """
    _free_cupy_pool()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, pool_before = torch.cuda.memory_allocated(), _cupy_pool_bytes()
    result = call()
    peak = torch.cuda.max_memory_allocated() - before + _cupy_pool_bytes() - pool_before
    return peak - sum(tensor.nbytes for tensor in result)


def held_bytes(call: Call) -> int:
    """Bytes that stay allocated while the results of ``call`` are alive, beyond those results."""
    before = torch.cuda.memory_allocated()
    result = call()
    return torch.cuda.memory_allocated() - before - sum(tensor.nbytes for tensor in result)


def graph_call(provider: Provider, workload: Workload, inputs: Inputs) -> Call:
    """A forward that keeps what its backward needs."""
    attention = provider.bind(workload)
    operands = leaves(inputs)
    return Call(lambda: (attention(*operands),), provider.context)


MEASURES = {
    "forward peak": Measure(Provider.forward, "forward", peak_bytes),
    "kept for backward": Measure(graph_call, "forward", held_bytes),
    "backward peak": Measure(Provider.backward, "backward", peak_bytes),
}


def meter(used: Callable[[Call], int], calls: Mapping[str, Call], rounds: int) -> dict[str, Spread]:
    """What ``used`` reads of every call: a ``Timer`` of bytes, once its first argument is bound."""
    return {name: Spread.of([used(call) for _ in range(rounds)]) for name, call in calls.items()}


def run(options: Options) -> list[Row]:
    """Causal workloads of constant token count: a cost that grows with seqlen squared shows at once."""
    providers = select(options.providers or (*GPU_PROVIDERS, "sdpa-math"))
    lengths = options.lens or ((2048,) if options.quick else (1024, 4096, 16384))
    rows = []
    for dtype in options.dtype or ("bfloat16",):
        for workload in grid(dtype, options.dims or (128,), lengths):
            if workload.is_causal:
                rows += _run_workload(workload, providers)
    return rows


def _run_workload(workload: Workload, providers: list[Provider]) -> list[Row]:
    inputs = Inputs.random(workload, "cuda")
    reference = Reference(workload, inputs)
    rows = []
    for name, measure in MEASURES.items():

        def check(_: str, call: Call, result: str = measure.result) -> float:
            inputs.poison()
            return reference.error(result, [tensor.detach() for tensor in call()])

        candidates = [
            Candidate(
                provider.name,
                functools.partial(measure.prepare, provider, workload, inputs),
                provider.unsupported(workload),
            )
            for provider in providers
        ]
        rows += run_case(
            Case("memory", name, workload, "MiB"), candidates, check, functools.partial(meter, measure.used), 1
        )
    return rows


def _cupy_pool_bytes() -> int:
    cupy = sys.modules.get("cupy")
    return int(cupy.get_default_memory_pool().total_bytes()) if cupy is not None else 0


def _free_cupy_pool() -> None:
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        cupy.get_default_memory_pool().free_all_blocks()
