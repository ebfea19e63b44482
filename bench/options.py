"""Options: what is done to scores and weights, beside compiled FlexAttention; dropout beside FlashAttention-2.

An option is given to cuflash as arrays, and to FlexAttention as functions of indices. Evaluated for all pairs of a
head, these are its definition, too, which answers are checked against.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cuflash
from cuflash import rng

from .check import FACTORS, TENSORS, Inputs, allowed_error, checked_slices, max_error, worst
from .providers import OURS, Attention, Provider, bind_flex
from .rows import Row
from .runner import Candidate, Case, Options, Timer, run_case
from .shapes import Workload, default_grid
from .timing import Call, CudaTimer

#: A score after it was changed, and whether it is visible, by batch entry, head, query and key.
ScoreFunction = Callable[[Tensor, Any, Any, Any, Any], Tensor]
MaskFunction = Callable[[Any, Any, Any, Any], Tensor]

SEED = 1


@dataclass(frozen=True, slots=True)
class Bound:
    """An option of one workload: as arguments of cuflash, and as functions."""

    arguments: dict[str, Any]
    score: ScoreFunction | None = None
    mask: MaskFunction | None = None

    @property
    def dropout_p(self) -> float:
        """Probability with which weights are dropped."""
        return float(self.arguments.get("dropout_p", 0.0))


@dataclass(frozen=True, slots=True)
class Option:
    """``bind`` draws what the option needs for a workload on a device; ``adapt`` makes the workload fit it."""

    name: str
    bind: Callable[[Workload, str], Bound]
    adapt: Callable[[Workload], Workload] = field(default=lambda workload: workload)


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def _bias(workload: Workload, device: str) -> Bound:
    shape = workload.num_heads, workload.seqlen_q, workload.seqlen_k
    bias = torch.randn(shape, generator=_generator(device), device=device).to(getattr(torch, workload.dtype))
    return Bound({"bias": bias}, lambda score, b, h, i, j: score + bias[h, i, j])


def _alibi(workload: Workload, device: str) -> Bound:
    heads = torch.arange(1, workload.num_heads + 1, device=device)
    slopes = torch.exp2(-8 * heads / workload.num_heads)
    return Bound({"alibi_slopes": slopes}, lambda score, b, h, i, j: score - slopes[h] * (i - j).abs())


def _softcap(_: Workload, __: str, softcap: float = 30.0) -> Bound:
    return Bound({"softcap": softcap}, lambda score, b, h, i, j: softcap * torch.tanh(score / softcap))


def _window(_: Workload, __: str, width: int = 1024) -> Bound:
    return Bound({"window": (width - 1, 0)}, mask=lambda b, h, i, j: (i >= j) & (i - j < width))


def _documents(workload: Workload, device: str, length: int = 1000) -> Bound:
    document = torch.arange(workload.seqlen_k, device=device) // length
    return Bound({"mask": document[:, None] == document}, mask=lambda b, h, i, j: document[i] == document[j])


def _block_sparse(workload: Workload, device: str, size: int = 128, visible: float = 0.25) -> Bound:
    num_blocks = -(-workload.seqlen_k // size)
    blocks = torch.rand((num_blocks, num_blocks), generator=_generator(device), device=device) < visible
    blocks.fill_diagonal_(True)
    mask = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[: workload.seqlen_q, : workload.seqlen_k]
    return Bound({"mask": mask.contiguous()}, mask=lambda b, h, i, j: blocks[i // size, j // size])


def _dropout(_: Workload, __: str) -> Bound:
    return Bound({"dropout_p": 0.2, "seed": SEED})


#: All of them on full workloads, but for the last two.
OPTIONS = (
    Option("bias", _bias),
    Option("ALiBi", _alibi),
    Option("softcap", _softcap),
    Option("window", _window),
    Option("documents", _documents),
    Option("block-sparse", _block_sparse),
    Option("dropout", _dropout),
    Option("grouped dropout", _dropout, lambda w: replace(w, is_causal=True, num_heads_kv=max(w.num_heads // 4, 1))),
    Option("tutorial dropout", _dropout, lambda w: Workload("float16", 32, 8, 2048, 64)),
)


# --- what is right --------------------------------------------------------------------------------


def definition(
    workload: Workload, bound: Bound, batch: int, heads: slice, operands: Sequence[Tensor], kept: Tensor | None
) -> dict[str, Tensor]:
    """Attention of the heads that share keys and its gradients, by autograd, in the dtype of the operands.

    q and d_out are (heads, seqlen_q, head_dim); k and v are (seqlen_k, head_dim).
    """
    q, k, v = (x.detach().requires_grad_() for x in operands[:3])
    h = torch.arange(heads.start, heads.stop, device=q.device)[:, None, None]
    i, j = torch.arange(workload.seqlen_q, device=q.device)[:, None], torch.arange(workload.seqlen_k, device=q.device)
    score = q @ k.mT * workload.scale
    if bound.score is not None:
        score = bound.score(score, batch, h, i, j).to(q.dtype)
    visible = workload.band.visible(i, j)
    if bound.mask is not None:
        visible = visible & bound.mask(batch, h, i, j)
    weights = torch.softmax(score.masked_fill(~visible, -math.inf), dim=-1)
    if kept is not None:
        weights = weights * kept / (1 - bound.dropout_p)
    out = weights @ v
    gradients = torch.autograd.grad(out, (q, k, v), operands[3])
    return dict(zip(TENSORS["forward+backward"], (out.detach(), *gradients), strict=True))


class Definition:
    """Exact values and allowed errors of the first heads that share keys and, but for dropout, of the last."""

    def __init__(self, workload: Workload, bound: Bound, inputs: Inputs) -> None:
        slices = list(checked_slices(workload))
        self._slices = slices[:1] if bound.dropout_p else slices
        self._exact: list[dict[str, Tensor]] = []
        self._allowed: list[dict[str, float]] = []
        for batch, heads, head_kv in self._slices:
            kept = None
            if bound.dropout_p:
                pairs = slice(0, workload.seqlen_q), slice(0, workload.seqlen_k)
                kept = torch.from_numpy(rng.keep(SEED, bound.dropout_p, batch, heads, *pairs)).to(inputs.q.device)
            operands = inputs.q[batch, heads], inputs.k[batch, head_kv], inputs.v[batch, head_kv]
            operands += (inputs.d_out[batch, heads],)
            exact = definition(workload, bound, batch, heads, [x.double() for x in operands], kept)
            naive = definition(workload, bound, batch, heads, operands, kept)
            self._exact.append(exact)
            self._allowed.append({name: allowed_error(FACTORS[name], naive[name], exact[name]) for name in exact})

    def error(self, measure: str, result: Sequence[Tensor]) -> float:
        """Largest error of ``result`` as a fraction of the allowed one."""
        errors = []
        for (batch, heads, head_kv), exact, allowed in zip(self._slices, self._exact, self._allowed, strict=True):
            for name, tensor in zip(TENSORS[measure], result, strict=True):
                part = tensor[batch, head_kv if name in ("d_k", "d_v") else heads]
                errors.append(max_error(part, exact[name]) / allowed[name])
        return worst(errors)


# --- who is measured ------------------------------------------------------------------------------


def _ours(bound: Bound) -> Provider:
    return Provider(OURS, lambda w: functools.partial(cuflash.attention, is_causal=w.is_causal, **bound.arguments))


def _flex(bound: Bound) -> Provider:
    return Provider("flex", lambda w: bind_flex(w, bound.score, bound.mask))


def _fa2(dropout_p: float) -> Provider:
    def bind(workload: Workload) -> Attention:
        grouped = {"enable_gqa": True} if workload.num_heads != workload.num_heads_kv else {}
        attention = F.scaled_dot_product_attention
        return functools.partial(attention, is_causal=workload.is_causal, dropout_p=dropout_p, **grouped)

    return Provider("sdpa-fa2", bind, context=functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION))


def run_option(option: Option, workload: Workload, timer: Timer, rounds: int, device: str = "cuda") -> list[Row]:
    """Rows of an option on the workload as it adapts it."""
    workload = option.adapt(workload)
    bound = option.bind(workload, device)
    inputs = Inputs.random(workload, device)
    right = Definition(workload, bound, inputs)
    peer = _fa2(bound.dropout_p) if bound.dropout_p else _flex(bound)
    # Which weights a peer drops is its own affair: its answer is checked without.
    checked = _fa2(0.0) if bound.dropout_p else None
    undropped = Definition(workload, Bound({}, bound.score, bound.mask), inputs) if checked else right
    rows = []
    for measure in ("forward", "backward"):

        def check(name: str, call: Call, measure: str = measure) -> float:
            inputs.poison()
            if name == OURS or checked is None:
                return right.error(measure, call())
            return undropped.error(measure, checked.call(measure, workload, inputs)())

        candidates = [
            Candidate(provider.name, functools.partial(provider.call, measure, workload, inputs))
            for provider in (_ours(bound), peer)
        ]
        rows += run_case(Case("options", f"{option.name} {measure}", workload, "ms"), candidates, check, timer, rounds)
    return rows


def run(options: Options) -> list[Row]:
    """Rows of all options, each workload once."""
    timer = CudaTimer()
    lengths = options.lens or (8192,)
    rows: list[Row] = []
    for dtype in options.dtype or ("bfloat16",):
        for workload in default_grid(dtype, options.dims or (64, 128), lengths, options.quick):
            if not workload.is_causal:
                rows += _rows_of(workload, rows, timer, options.num_rounds())
    return rows


def _rows_of(workload: Workload, known: Iterable[Row], timer: Timer, rounds: int) -> list[Row]:
    seen = {(row.measure, row.workload) for row in known}
    rows = []
    for option in OPTIONS:
        if (f"{option.name} forward", option.adapt(workload)) not in seen:
            rows += run_option(option, workload, timer, rounds)
    return rows
