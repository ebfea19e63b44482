"""Training step: forward and backward of one transformer block, to see what attention is worth in its place.

The block projects to q, k and v in one product, so attention reads strided views of the packed result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .check import allowed_error, max_error, worst
from .memory import meter, peak_bytes
from .providers import GPU_PROVIDERS, PROVIDERS, Attention, Provider, select
from .rows import Row
from .runner import Candidate, Case, Options, Timer, run_case
from .shapes import HIDDEN_SIZE, Workload, grid
from .timing import Call, CudaTimer

#: The answer is checked on a block this small, where dense attention in float64 is cheap.
CHECKED_TOKENS = (2, 256)

FACTOR = 3.0


def block(workload: Workload, attention: Attention, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Pre-norm transformer block on x (batch, seqlen, hidden): attention and a 4x MLP, each added to its input."""
    w_qkv, w_out, w_up, w_down = weights
    batch, seqlen, hidden = x.shape
    packed = F.linear(F.layer_norm(x, (hidden,)), w_qkv).view(batch, seqlen, 3, workload.num_heads, workload.head_dim)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    x = x + F.linear(attention(q, k, v).transpose(1, 2).reshape(batch, seqlen, hidden), w_out)
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (hidden,)), w_up)), w_down)


def dense_attention(workload: Workload, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention from its definition, differentiated by autograd."""
    q_idx, k_idx = (torch.arange(t.shape[2], device=t.device) for t in (q, k))
    hidden = ~workload.band.visible(q_idx[:, None], k_idx)
    scores = (q @ k.mT * workload.scale).masked_fill(hidden, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def make_tensors(workload: Workload, batch: int, seqlen: int, device: str) -> list[Tensor]:
    """Leaves x, w_qkv, w_out, w_up, w_down, and the gradient of the block's output."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, workload.dtype)
    size = HIDDEN_SIZE
    shapes = ((batch, seqlen, size), (3 * size, size), (size, size), (4 * size, size), (size, 4 * size))
    tensors = []
    for shape in shapes:
        spread = 1.0 if shape == shapes[0] else shape[-1] ** -0.5  # keeps activations of order 1
        tensor = (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)
        tensors.append(tensor.requires_grad_())
    return [*tensors, torch.randn(shapes[0], generator=generator, device=device).to(dtype)]


def step(workload: Workload, attention: Attention, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Output of the block and gradients of its input and weights."""
    *leaves, d_out = tensors
    out = block(workload, attention, leaves[0], leaves[1:])
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out))


def step_call(workload: Workload, provider: Provider, tensors: Sequence[Tensor]) -> Call:
    """One training step with the attention of ``provider``."""
    return Call(functools.partial(step, workload, provider.bind(workload), tensors), provider.context)


def check_step(workload: Workload, provider: Provider, device: str) -> float:
    """Largest error of a small step, as a fraction of what the rule in check.py allows."""
    batch, seqlen = CHECKED_TOKENS
    small = Workload(workload.dtype, batch, workload.num_heads, seqlen, workload.head_dim, workload.is_causal)
    tensors = make_tensors(small, batch, seqlen, device)
    exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    dense = functools.partial(dense_attention, small)
    results = zip(
        step_call(small, provider, tensors)(),
        step(small, dense, tensors),
        step(small, dense, exact_tensors),
        strict=True,
    )
    return worst([max_error(ours, exact) / allowed_error(FACTOR, naive, exact) for ours, naive, exact in results])


def run(options: Options) -> list[Row]:
    """Causal blocks of constant hidden size and token count."""
    providers = select(options.providers or GPU_PROVIDERS)
    lengths = options.lens or ((4096,) if options.quick else (4096, 16384))
    timer = CudaTimer()
    rows = []
    for dtype in options.dtype or ("bfloat16",):
        for workload in grid(dtype, options.dims or (64, 128), lengths):
            if workload.is_causal:
                rows += _run_workload(workload, providers, timer, options.num_rounds())
    return rows


def _run_workload(workload: Workload, providers: Sequence[Provider], timer: Timer, rounds: int) -> list[Row]:
    tensors = make_tensors(workload, workload.batch, workload.seqlen_q, "cuda")

    error = functools.cache(lambda name: check_step(workload, PROVIDERS[name], "cuda"))

    def check(name: str, _: Call) -> float:
        return error(name)

    candidates = [
        Candidate(
            provider.name,
            functools.partial(step_call, workload, provider, tensors),
            provider.unsupported(workload),
        )
        for provider in providers
    ]
    rows = run_case(Case("step", "training step", workload, "ms"), candidates, check, timer, rounds)
    # The block's own activations and its gradients are part of it, for everyone alike.
    peaks = functools.partial(meter, peak_bytes)
    return rows + run_case(Case("step", "training step peak", workload, "MiB"), candidates, check, peaks, 1)
