"""CPU path beside PyTorch's CPU kernel and the naive NumPy formula, on the same numbers and as many threads.

How many threads is settled in ``__main__``, before anybody imports NumPy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import cuflash

from .check import Inputs, Reference
from .providers import leaves
from .rows import Row
from .runner import Candidate, Case, Options, run_case
from .shapes import Workload
from .timing import Call, WallTimer

MEASURES = ("forward", "forward+backward")

Array = np.ndarray[Any, np.dtype[Any]]


def cuflash_call(measure: str, workload: Workload, inputs: Inputs) -> Call:
    """The public functions on NumPy arrays."""
    q, k, v, d_out = _arrays(inputs)

    def forward() -> tuple[Array, ...]:
        return (cuflash.attention(q, k, v, is_causal=workload.is_causal),)

    def both() -> tuple[Array, ...]:
        out, lse = cuflash.attention(q, k, v, is_causal=workload.is_causal, return_lse=True)
        gradients = cuflash.attention_backward(d_out, q, k, v, out, lse, is_causal=workload.is_causal)
        return out, gradients.d_q, gradients.d_k, gradients.d_v

    return Call(forward if measure == "forward" else both)


def torch_call(measure: str, workload: Workload, inputs: Inputs) -> Call:
    """PyTorch's scaled_dot_product_attention on CPU tensors."""
    attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=workload.is_causal)
    operands = leaves(inputs)

    def both() -> tuple[torch.Tensor, ...]:
        out = attention(*operands)
        return (out.detach(), *torch.autograd.grad(out, operands, inputs.d_out))

    if measure == "forward":
        return Call(lambda: (attention(inputs.q, inputs.k, inputs.v),), torch.no_grad)
    return Call(both)


def naive_call(measure: str, workload: Workload, inputs: Inputs) -> Call:
    """The formulas as one writes them down, the whole probability matrix in memory."""
    q, k, v, d_out = _arrays(inputs)
    hidden = ~workload.band.visible(np.arange(workload.seqlen_q)[:, None], np.arange(workload.seqlen_k))

    def weights() -> Array:
        scores = q @ k.mT
        scores *= np.float32(workload.scale)
        if workload.is_causal:
            scores[..., hidden] = -math.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores

    def forward() -> tuple[Array, ...]:
        return (weights() @ v,)

    def both() -> tuple[Array, ...]:
        p = weights()
        out = p @ v
        d_scores = d_out @ v.mT
        d_scores -= (d_out * out).sum(axis=-1, keepdims=True)
        d_scores *= p
        d_scores *= np.float32(workload.scale)
        return out, d_scores @ k, d_scores.mT @ q, p.mT @ d_out

    return Call(forward if measure == "forward" else both)


PROVIDERS: dict[str, Callable[[str, Workload, Inputs], Call]] = {
    "cuflash": cuflash_call,
    "torch": torch_call,
    "numpy": naive_call,
}


def run(options: Options) -> list[Row]:
    """Full and causal float32 workloads of 8 heads."""
    names = options.providers or tuple(PROVIDERS)
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"unknown provider {', '.join(unknown)}; known: {', '.join(PROVIDERS)}")
    timer = WallTimer(pause=0.02)
    rows = []
    for head_dim in options.dims or (64,):
        for seqlen in options.lens or ((1024,) if options.quick else (4096,)):
            for is_causal in (False, True):
                workload = Workload("float32", 1, 8, seqlen, head_dim, is_causal)
                inputs = Inputs.random(workload, "cpu")
                reference = Reference(workload, inputs)
                for measure in MEASURES:

                    def check(_: str, call: Call, measure: str = measure, reference: Reference = reference) -> float:
                        return reference.error(measure, [torch.as_tensor(result) for result in call()])

                    candidates = [
                        Candidate(name, functools.partial(PROVIDERS[name], measure, workload, inputs)) for name in names
                    ]
                    case = Case("cpu", measure, workload, "ms")
                    # The formula alone: whoever came after it would pay for the memory that it gives back.
                    formula = [candidate for candidate in candidates if candidate.name == "numpy"]
                    kernels = [candidate for candidate in candidates if candidate.name != "numpy"]
                    rounds = options.num_rounds(25, 3)
                    rows += run_case(case, kernels, check, timer, rounds)
                    rows += run_case(case, formula, check, timer, min(rounds, 5))
    return rows


def _arrays(inputs: Inputs) -> tuple[Array, Array, Array, Array]:
    q, k, v, d_out = (t.numpy() for t in (inputs.q, inputs.k, inputs.v, inputs.d_out))
    return q, k, v, d_out
