"""Attention written down plainly: dense, slow, and what every other path is compared with.

``attention`` and ``attention_backward`` are the formulas in float64. ``naive`` and ``naive_backward``
are the same formulas with every intermediate rounded to the dtype of the inputs, which is what a
straightforward program in that dtype would do: a fast path has to be about as accurate as that.

Arrays are 4-D, (batch, heads, seqlen, dim), and NumPy's or CuPy's; keys and values may have fewer
heads (GQA). Non-finite keys, values and queries reach exactly those results that see them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .scores import Band

_Rounding = Callable[[Any], Any]


def attention(q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float) -> tuple[Any, Any]:
    """Out (batch, heads, seqlen_q, head_dim_v) and natural-log LSE (batch, heads, seqlen_q), in float64.

    ``out = softmax(scale * q @ k.T, over visible keys) @ v``; a query that sees no key has out 0 and LSE -inf.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    _, out, lse = _forward(q, k, v, band, scale, _exactly)
    return out, lse


def attention_backward(
    d_out: Any, q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float, d_lse: Any = None
) -> tuple[Any, Any, Any]:
    """Gradients d_q, d_k, d_v in float64 of a loss whose gradients by out and LSE are ``d_out`` and ``d_lse``."""
    d_out, q, k, v = (x.astype(np.float64) for x in (d_out, q, k, v))
    d_lse = None if d_lse is None else d_lse.astype(np.float64)
    return _backward(d_out, q, k, v, d_lse, band, scale, _exactly)


def naive(q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float) -> tuple[Any, Any]:
    """``attention`` with scores, probabilities, out and LSE rounded to the dtype of ``q`` as they are computed."""
    work, rounding = _as_program_in(q.dtype)
    _, out, lse = _forward(q.astype(work), k.astype(work), v.astype(work), band, scale, rounding)
    return out.astype(q.dtype), lse.astype(q.dtype)


def naive_backward(
    d_out: Any, q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float, d_lse: Any = None
) -> tuple[Any, Any, Any]:
    """``attention_backward`` with every intermediate rounded to the dtype of ``q``."""
    work, rounding = _as_program_in(q.dtype)
    dtype = q.dtype
    d_out, q, k, v = (x.astype(work) for x in (d_out, q, k, v))
    d_lse = None if d_lse is None else d_lse.astype(work)
    d_q, d_k, d_v = _backward(d_out, q, k, v, d_lse, band, scale, rounding)
    return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype)


def _exactly(x: Any) -> Any:
    return x


def _as_program_in(dtype: Any) -> tuple[Any, _Rounding]:
    """Dtype to compute in, and the rounding after each step, of a program that keeps everything in ``dtype``."""
    work = np.float64 if dtype == np.float64 else np.float32  # 16-bit products are summed in float32 everywhere
    return work, lambda x: x.astype(dtype).astype(work)


def _forward(q: Any, k: Any, v: Any, band: Band, scale: float, rounding: _Rounding) -> tuple[Any, Any, Any]:
    """Probabilities (batch, heads, seqlen_q, seqlen_k), out and LSE."""
    xp = _namespace(q)
    k, v = _repeat_heads(k, q), _repeat_heads(v, q)
    visible = _visible(band, q, k)
    with np.errstate(all="ignore"):
        scores = xp.where(visible, rounding(scale * (q @ k.swapaxes(-1, -2))), -np.inf)
        # One more score of -inf, so that the maximum over no keys at all is one, too.
        row_max = xp.concatenate((scores, xp.full((*scores.shape[:-1], 1), -np.inf, scores.dtype)), -1).max(-1)
        row_max = xp.where(row_max == -np.inf, 0, row_max)
        weights = rounding(xp.exp(rounding(scores - row_max[..., None])))
        row_sum = rounding(weights.sum(-1))
        probabilities = rounding(weights / xp.where(row_sum == 0, 1, row_sum)[..., None])
        probabilities = xp.where(visible, probabilities, 0)  # also in a row that is not a number
        out = rounding(_weighted_sum(probabilities, v, visible))
        lse = rounding(row_max + rounding(xp.log(row_sum)))
    return probabilities, out, lse


def _backward(
    d_out: Any, q: Any, k: Any, v: Any, d_lse: Any, band: Band, scale: float, rounding: _Rounding
) -> tuple[Any, Any, Any]:
    xp = _namespace(q)
    probabilities, out, _ = _forward(q, k, v, band, scale, rounding)
    keys, values = _repeat_heads(k, q), _repeat_heads(v, q)
    visible = _visible(band, q, k)
    with np.errstate(all="ignore"):
        delta = rounding((d_out * out).sum(-1))
        if d_lse is not None:
            delta = rounding(delta - d_lse)
        d_probabilities = rounding(d_out @ values.swapaxes(-1, -2))
        d_scores = xp.where(visible, rounding(probabilities * rounding(d_probabilities - delta[..., None])), 0)
        d_q = rounding(scale * _weighted_sum(d_scores, keys, visible))
        d_keys = scale * _weighted_sum(d_scores.swapaxes(-1, -2), q, visible.T)
        d_values = _weighted_sum(probabilities.swapaxes(-1, -2), d_out, visible.T)
    return d_q, rounding(_sum_heads(d_keys, k)), rounding(_sum_heads(d_values, v))


def _namespace(array: Any) -> Any:
    """Module of an array: numpy or cupy, which is loaded where an array of it exists."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def _repeat_heads(x: Any, q: Any) -> Any:
    """Give every query head its own key/value head."""
    return x.repeat(q.shape[1] // max(x.shape[1], 1), axis=1)


def _sum_heads(gradient: Any, x: Any) -> Any:
    """Adjoint of ``_repeat_heads``."""
    batch, heads, seqlen, dim = x.shape
    return gradient.reshape(batch, heads, gradient.shape[1] // max(heads, 1), seqlen, dim).sum(2)


def _visible(band: Band, q: Any, k: Any) -> Any:
    xp = _namespace(q)
    return band.visible(xp.arange(q.shape[2])[:, None], xp.arange(k.shape[2])[None, :])


def _weighted_sum(weights: Any, rows: Any, visible: Any) -> Any:
    """``weights @ rows``, where a row that is not visible counts nothing even if it is not finite (0 * nan is nan)."""
    xp = _namespace(weights)
    finite = xp.isfinite(rows)
    total = weights @ xp.where(finite, rows, 0)
    if finite.all():
        return total
    spoiled = visible.astype(weights.dtype) @ (~finite).astype(weights.dtype)
    return xp.where(spoiled > 0, np.nan, total)
