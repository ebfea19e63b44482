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

import cuflash
from cuflash import rng

from .check import TENSORS, Inputs, Reference, Slice, checked_slices
from .providers import OURS, PROVIDERS, Provider, bind_cuflash, bind_flex, bind_sdpa
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


def _blocks(workload: Workload, device: str, size: int = 128, visible: float = 0.25) -> tuple[Tensor, MaskFunction]:
    num_blocks = -(-workload.seqlen_k // size)
    blocks = torch.rand((num_blocks, num_blocks), generator=_generator(device), device=device) < visible
    blocks.fill_diagonal_(True)
    return blocks, lambda b, h, i, j: blocks[i // size, j // size]


def _block_sparse(workload: Workload, device: str, size: int = 128) -> Bound:
    blocks, function = _blocks(workload, device, size)
    mask = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[: workload.seqlen_q, : workload.seqlen_k]
    return Bound({"mask": mask.contiguous()}, mask=function)


def _block_mask(workload: Workload, device: str, size: int = 128) -> Bound:
    """The same, looked at once, as FlexAttention's own is."""
    blocks, function = _blocks(workload, device, size)
    return Bound({"mask": cuflash.BlockMask(blocks, size)}, mask=function)


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
    Option("block mask", _block_mask),
    Option("dropout", _dropout),
    Option("grouped dropout", _dropout, lambda w: replace(w, is_causal=True, num_heads_kv=max(w.num_heads // 4, 1))),
    Option("tutorial dropout", _dropout, lambda w: Workload("float16", 32, 8, 2048, 64)),
)


# --- what is right --------------------------------------------------------------------------------


def definition(workload: Workload, bound: Bound, part: Slice, operands: Sequence[Tensor]) -> dict[str, Tensor]:
    """Attention of the heads that share keys and its gradients, by autograd, in the dtype of the operands.

    q and d_out are (heads, seqlen_q, head_dim); k and v are (seqlen_k, head_dim).
    """
    q, k, v = (x.detach().requires_grad_() for x in operands[:3])
    batch, heads, _ = part
    h = torch.arange(heads.start, heads.stop, device=q.device)[:, None, None]
    i, j = torch.arange(workload.seqlen_q, device=q.device)[:, None], torch.arange(workload.seqlen_k, device=q.device)
    score = q @ k.mT * workload.scale
    if bound.score is not None:
        score = bound.score(score, batch, h, i, j).to(q.dtype)
    visible = workload.band.visible(i, j)
    if bound.mask is not None:
        visible = visible & bound.mask(batch, h, i, j)
    weights = torch.softmax(score.masked_fill(~visible, -math.inf), dim=-1)
    if bound.dropout_p:
        kept = _kept(workload, bound.dropout_p, batch, heads.start, heads.stop)
        weights = weights * kept.to(q.device) / (1 - bound.dropout_p)
    out = weights @ v
    gradients = torch.autograd.grad(out, (q, k, v), operands[3])
    return dict(zip(TENSORS["forward+backward"], (out.detach(), *gradients), strict=True))


@functools.lru_cache(maxsize=1)  # the same for the exact and the naive values, and slow to draw
def _kept(workload: Workload, dropout_p: float, batch: int, first_head: int, end_head: int) -> Tensor:
    axes = slice(first_head, end_head), slice(0, workload.seqlen_q), slice(0, workload.seqlen_k)
    return torch.from_numpy(rng.keep(SEED, dropout_p, batch, *axes))


def reference(workload: Workload, bound: Bound, inputs: Inputs) -> Reference:
    """What answers have to be; with dropout only the first heads are checked, whose kept weights take long to draw."""
    slices = list(checked_slices(workload))
    return Reference(
        workload, inputs, functools.partial(definition, workload, bound), slices[:1] if bound.dropout_p else slices
    )


# --- who is measured ------------------------------------------------------------------------------


def _ours(bound: Bound) -> Provider:
    return replace(PROVIDERS[OURS], bind=lambda workload: bind_cuflash(workload, **bound.arguments))


def _flex(bound: Bound) -> Provider:
    return replace(PROVIDERS["flex"], bind=lambda workload: bind_flex(workload, bound.score, bound.mask))


def _fa2(dropout_p: float) -> Provider:
    return replace(PROVIDERS["sdpa-fa2"], bind=lambda workload: bind_sdpa(workload, dropout_p=dropout_p))


def run_option(option: Option, workload: Workload, timer: Timer, rounds: int, device: str = "cuda") -> list[Row]:
    """Rows of an option on the workload as it adapts it."""
    workload = option.adapt(workload)
    bound = option.bind(workload, device)
    inputs = Inputs.random(workload, device)
    right = reference(workload, bound, inputs)
    peer = _fa2(bound.dropout_p) if bound.dropout_p else _flex(bound)
    # Which weights a peer drops is its own affair: its answer is checked without.
    checked = _fa2(0.0) if bound.dropout_p else None
    undropped = reference(workload, Bound({}, bound.score, bound.mask), inputs) if checked else right
    rows = []
    for measure in ("forward", "backward"):

        def check(name: str, call: Call, measure: str = measure) -> float:
            inputs.poison()
            if name == OURS or checked is None:
                return right.error(measure, call())
            return undropped.error(measure, checked.call(measure, workload, inputs)())

        candidates = [
            Candidate(
                provider.name,
                functools.partial(provider.call, measure, workload, inputs),
                provider.unsupported(workload),
            )
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
