"""The answer check: whatever is timed must first be right.

The rule is that of the tests. For every tensor of a result,

    max |result - exact|  <=  factor * max |naive - exact|  +  eps * max |exact|

where *exact* is dense attention in float64, *naive* the same formulas with every intermediate in the
dtype of the inputs, eps that dtype's, and the factor 2 for the forward and 3 for gradients. Dense
attention on a whole benchmark shape would take too long, so it is evaluated for the first key/value
head of the first sequence and the last of the last, with all the queries that read it, in chunks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Workload

FACTORS = {"out": 2.0, "d_q": 3.0, "d_k": 3.0, "d_v": 3.0}

#: Which tensors the result of a measure holds, in order.
TENSORS = {
    "forward": ("out",),
    "backward": ("d_q", "d_k", "d_v"),
    "forward+backward": ("out", "d_q", "d_k", "d_v"),
}

#: Score elements held at once by the dense formulas: half a GiB in float64.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True, slots=True)
class Inputs:
    """Operands of a workload: normally distributed, never zeros (zeros are faster, and hide mistakes)."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor

    @classmethod
    def random(cls, workload: Workload, device: str) -> Inputs:
        """Fresh operands, the same ones for the same workload and device."""
        generator = torch.Generator(device).manual_seed(0)
        w = workload
        query_shape = (w.batch, w.num_heads, w.seqlen_q, w.head_dim)
        key_shape = (w.batch, w.num_heads_kv, w.seqlen_k, w.head_dim)
        dtype = getattr(torch, w.dtype)
        shapes = (query_shape, key_shape, key_shape, query_shape)
        return cls(*(torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes))

    def poison(self) -> None:
        """Leave NaN in the memory that the allocator hands out next, so that an element nobody writes shows."""
        for tensor in (self.q, self.k, self.v):
            torch.full_like(tensor, math.nan)


#: (batch, query heads, key/value head): heads that share keys.
Slice = tuple[int, slice, int]


class Reference:
    """Exact values and allowed errors of a workload's checked heads.

    ``attention`` computes what :func:`dense` does, given which heads it is about; it is that where none is given.
    """

    def __init__(
        self,
        workload: Workload,
        inputs: Inputs,
        attention: Callable[[Slice, Sequence[Tensor]], dict[str, Tensor]] | None = None,
        slices: Iterable[Slice] | None = None,
    ) -> None:
        attention = attention or (lambda _, operands: dense(workload, *operands))
        self._slices = list(checked_slices(workload) if slices is None else slices)
        self._exact: list[dict[str, Tensor]] = []
        self._allowed: list[dict[str, float]] = []
        for part in self._slices:
            batch, heads, head_kv = part
            operands = [
                inputs.q[batch, heads], inputs.k[batch, head_kv], inputs.v[batch, head_kv], inputs.d_out[batch, heads],
            ]  # fmt: skip
            exact = attention(part, [operand.double() for operand in operands])
            naive = attention(part, operands)
            self._exact.append(exact)
            self._allowed.append({name: allowed_error(FACTORS[name], naive[name], exact[name]) for name in exact})

    def error(self, measure: str, result: Sequence[Tensor]) -> float:
        """Largest error of ``result`` as a fraction of the allowed one: at most 1 where it is right, NaN never is."""
        errors = []
        for (batch, heads, head_kv), exact, allowed in zip(self._slices, self._exact, self._allowed, strict=True):
            for name, tensor in zip(TENSORS[measure], result, strict=True):
                part = tensor[batch, head_kv if name in ("d_k", "d_v") else heads]
                errors.append(max_error(part, exact[name]) / allowed[name])
        return worst(errors)


def worst(errors: Sequence[float]) -> float:
    """Largest of ``errors``, NaN if one of them is."""
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64; NaN where either holds one."""
    return float((value.double() - exact).abs().max())


def allowed_error(factor: float, naive: Tensor, exact: Tensor) -> float:
    """The right-hand side of the rule."""
    rounding = torch.finfo(naive.dtype).eps * float(exact.abs().max())
    return factor * max_error(naive, exact) + rounding


def dense(workload: Workload, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    """Attention and its gradients for one key/value head, every step in the dtype of the operands.

    q and d_out are (heads, seqlen_q, head_dim); k and v are (seqlen_k, head_dim).
    """
    out, d_q = torch.empty_like(q), torch.empty_like(q)
    d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
    num_heads, seqlen_q, _ = q.shape
    k_idx = torch.arange(workload.seqlen_k, device=q.device)
    chunk = max(CHUNK_ELEMENTS // (num_heads * workload.seqlen_k), 1)
    for start in range(0, seqlen_q, chunk):
        rows = slice(start, min(start + chunk, seqlen_q))
        q_idx = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
        hidden = ~workload.band.visible(q_idx, k_idx)
        scores = (q[:, rows] @ k.mT * workload.scale).masked_fill_(hidden, -math.inf)
        # A row that sees nothing is a row of NaN after the softmax, and of zeros by definition.
        weights = torch.softmax(scores, dim=-1).masked_fill_(hidden, 0.0)
        out[:, rows] = weights @ v
        d_weights = d_out[:, rows] @ v.mT
        delta = (d_out[:, rows] * out[:, rows]).sum(-1, keepdim=True)
        d_scores = weights * (d_weights - delta) * workload.scale
        d_q[:, rows] = d_scores @ k
        d_k += (d_scores.mT @ q[:, rows]).sum(0)
        d_v += (weights.mT @ d_out[:, rows]).sum(0)
    return {"out": out, "d_q": d_q, "d_k": d_k, "d_v": d_v}


def checked_slices(workload: Workload) -> Iterator[Slice]:
    """The first and the last."""
    group = workload.num_heads // workload.num_heads_kv
    for batch, head_kv in {(0, 0), (workload.batch - 1, workload.num_heads_kv - 1)}:
        yield batch, slice(head_kv * group, (head_kv + 1) * group), head_kv
