"""Finite differences of every option of scores, in float64, by torch.autograd on any device."""

from __future__ import annotations

from typing import Any

import cuflash

SETS = (
    ("bias",),
    ("bias of keys",),
    ("alibi_slopes",),
    ("sinks",),
    ("softcap",),
    ("mask",),
    ("dropout",),
    ("window", "alibi_slopes"),
    ("expression",),
    ("mask", "bias", "alibi_slopes", "sinks", "softcap", "dropout", "window", "expression"),
)


def gradcheck(names: tuple[str, ...], device: str) -> None:
    """Compare the gradients of out and LSE by q, k, v and the option's arrays with finite differences."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(device).requires_grad_()

    operands = [draw(2, 4, 5, 3), draw(2, 2, 7, 3), draw(2, 2, 7, 4)]
    arrays: dict[str, Any] = {}
    if "bias" in names:
        arrays["bias"] = draw(4, 5, 7)
    if "bias of keys" in names:
        arrays["bias"] = draw(2, 1, 1, 7)
    if "alibi_slopes" in names:
        arrays["alibi_slopes"] = draw(4)
    if "sinks" in names:
        arrays["sinks"] = draw(4)
    options: dict[str, Any] = {}
    if "softcap" in names:
        options["softcap"] = 1.5
    if "mask" in names:
        options["mask"] = (torch.rand((2, 1, 5, 7), generator=generator) < 0.7).to(device)
    if "dropout" in names:
        options |= {"dropout_p": 0.3, "seed": 11}
    if "window" in names:
        options |= {"window": (3, 2), "q_offset": 1}

    captured = {}
    if "expression" in names:
        captured = {"rel": draw(4, 5), "gate": draw()}
        seen = (torch.rand((2, 7), generator=generator) < 0.8).to(device)

    def attend(*inputs: Any) -> Any:
        own = dict(zip(arrays, inputs[3:], strict=False))
        if captured:
            changed = "score * sigmoid(gate) + rel[h, q_idx - k_idx + 2] ** 2 if seen[b, k_idx] else -inf"
            rel, gate = inputs[3 + len(arrays) :]
            own["score_mod"] = cuflash.score_mod(changed, rel=rel, gate=gate, seen=seen)
        out, lse = cuflash.attention(*inputs[:3], return_lse=True, **own, **options)
        # Rows that see nothing have an LSE of -inf, which finite differences cannot judge.
        return out, lse.masked_fill(lse.isinf(), 0.0)

    # Gradients may be summed in any order (deterministic=False), so two runs differ by rounding.
    assert torch.autograd.gradcheck(attend, (*operands, *arrays.values(), *captured.values()), nondet_tol=1e-12)
