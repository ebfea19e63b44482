"""Contestants on a GPU: cuflash, PyTorch's and FlashAttention-4, all as one differentiable function of torch tensors.

Everyone gets the same tensors and is differentiated by autograd, so that a comparison never favours
the one that skipped a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cuflash

from .check import Inputs
from .context import FA4, installed
from .shapes import Workload
from .timing import Call

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Rule = Callable[[Workload], str | None]


@dataclass(frozen=True, slots=True)
class Provider:
    """One contestant.

    ``bind`` does what is done once per workload and returns attention as a function of (q, k, v).
    ``rules`` each say why a workload is not served, or None; ``context`` holds while it runs.
    """

    name: str
    bind: Callable[[Workload], Attention]
    rules: tuple[Rule, ...] = ()
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)

    def unsupported(self, workload: Workload) -> str | None:
        """Why this contestant does not serve ``workload``, or None where it does."""
        return next((reason for rule in self.rules if (reason := rule(workload)) is not None), None)

    def forward(self, workload: Workload, inputs: Inputs) -> Call:
        """The forward, without a graph."""
        attention = self.bind(workload)
        q, k, v = inputs.q, inputs.k, inputs.v
        return Call(lambda: (attention(q, k, v),), self._no_grad)

    def backward(self, workload: Workload, inputs: Inputs) -> Call:
        """The backward alone, through autograd, of a forward that ran once before."""
        attention = self.bind(workload)
        operands = leaves(inputs)
        with self.context():
            out = attention(*operands)
        return Call(lambda: torch.autograd.grad(out, operands, inputs.d_out, retain_graph=True))

    def forward_backward(self, workload: Workload, inputs: Inputs) -> Call:
        """Forward and backward in one, the graph built and freed each time."""
        attention = self.bind(workload)
        operands = leaves(inputs)

        def run() -> tuple[Tensor, ...]:
            out = attention(*operands)
            return (out.detach(), *torch.autograd.grad(out, operands, inputs.d_out))

        return Call(run, self.context)

    def call(self, measure: str, workload: Workload, inputs: Inputs) -> Call:
        """The call of a measure: ``forward``, ``backward`` or ``forward+backward``."""
        make = {"forward": self.forward, "backward": self.backward, "forward+backward": self.forward_backward}
        return make[measure](workload, inputs)

    @contextmanager
    def _no_grad(self) -> Iterator[None]:
        with self.context(), torch.no_grad():
            yield


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as leaves of a graph."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
    return q, k, v


# --- what the contestants run ---------------------------------------------------------------------


def bind_cuflash(workload: Workload, **options: Any) -> Attention:
    """Our attention, with further options."""
    return functools.partial(cuflash.attention, is_causal=workload.is_causal, **options)


def bind_sdpa(workload: Workload, **options: Any) -> Attention:
    """PyTorch's own attention, with further options."""
    if _is_grouped(workload):
        options["enable_gqa"] = True
    return functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=workload.is_causal, **options)


def bind_flex(workload: Workload, score: Any = None, mask: Any = None) -> Attention:
    """Compiled FlexAttention with functions of (score, b, h, q_idx, k_idx) and of (b, h, q_idx, k_idx), or without."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Each workload gets code for its own lengths, and its graph is differentiated more than once.
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    block_mask = None
    if mask is not None:
        block_mask = create_block_mask(mask, None, None, workload.seqlen_q, workload.seqlen_k)
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, score_mod=score, block_mask=block_mask, enable_gqa=_is_grouped(workload))


def _bind_flex(workload: Workload) -> Attention:
    offset = workload.seqlen_k - workload.seqlen_q
    causal = (lambda b, h, q_idx, k_idx: k_idx <= q_idx + offset) if workload.is_causal else None
    return bind_flex(workload, mask=causal)


def _bind_fa4(workload: Workload) -> Attention:
    from flash_attn.cute import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its layout is (batch, seqlen, heads, dim); its kernels take any strides.
        out, _ = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=workload.is_causal)
        return out.transpose(1, 2)

    return attention


# --- what they do not serve -----------------------------------------------------------------------


def _is_grouped(workload: Workload) -> bool:
    return workload.num_heads != workload.num_heads_kv


def _only_16_bit(workload: Workload) -> str | None:
    return None if workload.dtype in ("float16", "bfloat16") else f"serves 16-bit dtypes only, not {workload.dtype}"


def _up_to_256(workload: Workload) -> str | None:
    return None if workload.head_dim <= 256 else f"serves head_dim <= 256, not {workload.head_dim}"


def _no_groups(workload: Workload) -> str | None:
    return "serves no grouped heads" if _is_grouped(workload) else None


def _top_left(workload: Workload) -> str | None:
    other = workload.is_causal and workload.seqlen_q != workload.seqlen_k
    return "its causal mask is aligned top-left, not bottom-right" if other else None


def _needs_fa4(_: Workload) -> str | None:
    return None if installed(FA4) else f"{FA4} is not installed"


def _sdpa(name: str, backend: SDPBackend, *rules: Rule) -> Provider:
    return Provider(name, bind_sdpa, (_top_left, *rules), functools.partial(sdpa_kernel, backend))


OURS = "cuflash"

#: Every contestant by name. ``sdpa`` is whatever PyTorch chooses by itself.
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(OURS, bind_cuflash),
        _sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, _only_16_bit, _up_to_256),
        _sdpa("sdpa-fa2", SDPBackend.FLASH_ATTENTION, _only_16_bit, _up_to_256),
        _sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION, _no_groups),
        _sdpa("sdpa-math", SDPBackend.MATH),
        Provider("sdpa", bind_sdpa, (_top_left,)),
        Provider("flex", _bind_flex),
        Provider("fa4", _bind_fa4, (_needs_fa4, _only_16_bit, _up_to_256)),
    )
}

#: Who is measured unless asked otherwise: the peers that are fast, and that cost no compilation per shape.
GPU_PROVIDERS = (OURS, "sdpa-cudnn", "sdpa-fa2", "sdpa-efficient")


def select(names: Iterable[str]) -> list[Provider]:
    """Contestants by name; an unknown name is an error that lists the known ones."""
    names = list(names)
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"unknown provider {', '.join(unknown)}; known: {', '.join(PROVIDERS)}")
    return [PROVIDERS[name] for name in names]
