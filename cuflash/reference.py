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
from typing import Any, NamedTuple

import numpy as np

from . import rng
from .expression import Evaluated, evaluate
from .scores import Band, Score, mask_of_pairs

_Rounding = Callable[[Any], Any]


class Gradients(NamedTuple):
    """By the operands of attention, and by the arrays of ``Score`` (None for those that are None).

    ``d_captured`` is a dict of gradients by the real arrays that the expression captures, by their names.
    """

    d_q: Any
    d_k: Any
    d_v: Any
    d_bias: Any = None
    d_alibi_slopes: Any = None
    d_sinks: Any = None
    d_captured: Any = None


def attention(q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float, score: Score = Score()) -> tuple[Any, Any]:
    """Out (batch, heads, seqlen_q, head_dim_v) and natural-log LSE (batch, heads, seqlen_q), in float64.

    ``out = softmax(scale * q @ k.T, over visible keys) @ v``; a query that sees no key has out 0 and LSE -inf.
    ``score`` says what else is done to scores and weights.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    result = _forward(q, k, v, band, scale, _in(np.float64, score), _exactly)
    return result.out, result.lse


def attention_backward(
    d_out: Any, q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float, score: Score = Score(), d_lse: Any = None
) -> Gradients:
    """Gradients in float64 of a loss whose gradients by out and LSE are ``d_out`` and ``d_lse``."""
    d_out, q, k, v = (x.astype(np.float64) for x in (d_out, q, k, v))
    d_lse = None if d_lse is None else d_lse.astype(np.float64)
    return _backward(d_out, q, k, v, d_lse, band, scale, _in(np.float64, score), _exactly)


def attention_weights(q: Any, k: Any, lse: Any, *, band: Band = Band(), scale: float, score: Score = Score()) -> Any:
    """Weights (batch, heads, seqlen_q, seqlen_k) in float64, before dropout, of an LSE that contains the sinks."""
    q, k, lse = (x.astype(np.float64) for x in (q, k, lse))
    return _weights(q, k, lse, band, scale, _in(np.float64, score), _exactly)


def naive(q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float, score: Score = Score()) -> tuple[Any, Any]:
    """``attention`` with scores, probabilities, out and LSE rounded to the dtype of ``q`` as they are computed."""
    work, rounding = _as_program_in(q.dtype)
    dtype = q.dtype
    q, k, v = (x.astype(work) for x in (q, k, v))
    result = _forward(q, k, v, band, scale, _in(work, score), rounding)
    return result.out.astype(dtype), result.lse.astype(dtype)


def naive_backward(
    d_out: Any, q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float, score: Score = Score(), d_lse: Any = None
) -> Gradients:
    """``attention_backward`` with every intermediate rounded to the dtype of ``q``."""
    work, rounding = _as_program_in(q.dtype)
    dtype = q.dtype
    d_out, q, k, v = (x.astype(work) for x in (d_out, q, k, v))
    d_lse = None if d_lse is None else d_lse.astype(work)
    *gradients, captured = _backward(d_out, q, k, v, d_lse, band, scale, _in(work, score), rounding)
    d_captured = None if captured is None else {name: gradient.astype(dtype) for name, gradient in captured.items()}
    return Gradients(*(None if x is None else x.astype(dtype) for x in gradients))._replace(d_captured=d_captured)


def naive_weights(q: Any, k: Any, lse: Any, *, band: Band = Band(), scale: float, score: Score = Score()) -> Any:
    """``attention_weights`` with every intermediate rounded to the dtype of ``q``."""
    work, rounding = _as_program_in(q.dtype)
    dtype = q.dtype
    q, k, lse = (x.astype(work) for x in (q, k, lse))
    return _weights(q, k, lse, band, scale, _in(work, score), rounding).astype(dtype)


def _exactly(x: Any) -> Any:
    return x


def _as_program_in(dtype: Any) -> tuple[Any, _Rounding]:
    """Dtype to compute in, and the rounding after each step, of a program that keeps everything in ``dtype``."""
    work = np.float64 if dtype == np.float64 else np.float32  # 16-bit products are summed in float32 everywhere
    return work, lambda x: x.astype(dtype).astype(work)


def _in(dtype: Any, score: Score) -> Score:
    """The score with its numbers in ``dtype``."""
    numbers: dict[str, Any] = {
        name: array.astype(dtype)
        for name in ("bias", "alibi_slopes", "sinks")
        if (array := getattr(score, name)) is not None
    }
    if score.mod is not None:
        numbers["mod"] = score.mod.with_reals_in(dtype)
    return score._replace(**numbers)


class _Changed(NamedTuple):
    #: (batch, heads, seqlen_q, seqlen_k), -inf where not visible.
    scores: Any
    visible: Any
    #: Derivative of the scores by what they are before the softcap.
    slope: Any
    #: What the expression makes of scores.
    modified: Evaluated | None


class _Forward(NamedTuple):
    #: (batch, heads, seqlen_q, seqlen_k), before dropout; and what dropout multiplies them by.
    probabilities: Any
    dropout: Any
    visible: Any
    #: Derivative of the scores by what they are before the softcap.
    slope: Any
    #: What the expression makes of scores.
    modified: Evaluated | None
    out: Any
    lse: Any


def _changed(q: Any, k: Any, band: Band, scale: float, score: Score, rounding: _Rounding) -> _Changed:
    """Scores as the softmax takes them."""
    xp = _namespace(q)
    group = q.shape[1] // max(k.shape[1], 1)
    k = _repeat_heads(k, q)
    visible = _visible(band, q, k)
    if score.mask is not None:
        visible = visible & _mask(score, q, k)
    if score.bias is not None:
        visible = visible & (score.bias != -np.inf)  # such a bias is a mask
    visible = xp.broadcast_to(visible, (*q.shape[:3], k.shape[2]))
    slope: Any = 1
    modified = None
    with np.errstate(all="ignore"):
        scores = rounding(scale * (q @ k.swapaxes(-1, -2)))
        if score.softcap is not None:
            tanh = rounding(xp.tanh(rounding(scores / score.softcap)))
            slope = rounding(1 - tanh * tanh)
            scores = rounding(score.softcap * tanh)
        if score.mod is not None:
            modified = _modified(score, scores, group)
            visible = visible & (modified.score != -np.inf)
            scores = rounding(modified.score)
        if score.softcap is not None:
            slope = xp.where(visible, slope, 0)
        if score.bias is not None:
            scores = rounding(scores + score.bias)
        if score.alibi_slopes is not None:
            scores = rounding(scores - rounding(score.alibi_slopes[..., None, None] * _distances(score, q, k)))
        scores = xp.where(visible, scores, -np.inf)
    return _Changed(scores, visible, slope, modified)


def _weights(q: Any, k: Any, lse: Any, band: Band, scale: float, score: Score, rounding: _Rounding) -> Any:
    xp = _namespace(q)
    scores, visible, *_ = _changed(q, k, band, scale, score, rounding)
    with np.errstate(all="ignore"):
        weights = rounding(xp.exp(rounding(scores - lse[..., None])))
    return xp.where(visible & (lse[..., None] != -np.inf), weights, 0)


def _forward(q: Any, k: Any, v: Any, band: Band, scale: float, score: Score, rounding: _Rounding) -> _Forward:
    xp = _namespace(q)
    v = _repeat_heads(v, q)
    scores, visible, slope, modified = _changed(q, k, band, scale, score, rounding)
    with np.errstate(all="ignore"):
        # One more score: that of the sink, or -inf, so that the maximum over no keys at all is one, too.
        sink = xp.full((*scores.shape[:-1], 1), -np.inf, scores.dtype)
        if score.sinks is not None:
            sink[...] = score.sinks[:, None, None]
        row_max = xp.concatenate((scores, sink), -1).max(-1, keepdims=True)
        row_max = xp.where(row_max == -np.inf, 0, row_max)
        weights = rounding(xp.exp(rounding(scores - row_max)))
        row_sum = rounding(weights.sum(-1, keepdims=True) + rounding(xp.exp(rounding(sink - row_max))))
        probabilities = rounding(weights / xp.where(row_sum == 0, 1, row_sum))
        probabilities = xp.where(visible, probabilities, 0)  # also in a row that is not a number
        dropout = _dropout(score, q, k)
        out = rounding(_weighted_sum(rounding(probabilities * dropout), v, visible))
        lse = rounding(row_max + rounding(xp.log(row_sum)))[..., 0]
    return _Forward(probabilities, dropout, visible, slope, modified, out, lse)


def _backward(
    d_out: Any, q: Any, k: Any, v: Any, d_lse: Any, band: Band, scale: float, score: Score, rounding: _Rounding
) -> Gradients:
    xp = _namespace(q)
    probabilities, dropout, visible, slope, modified, out, lse = _forward(q, k, v, band, scale, score, rounding)
    keys, values = _repeat_heads(k, q), _repeat_heads(v, q)
    d_bias = d_slopes = d_sinks = d_captured = None
    with np.errstate(all="ignore"):
        delta = rounding((d_out * out).sum(-1))
        if d_lse is not None:
            delta = rounding(delta - d_lse)
        d_probabilities = rounding(rounding(d_out @ values.swapaxes(-1, -2)) * dropout)
        d_scores = xp.where(visible, rounding(probabilities * rounding(d_probabilities - delta[..., None])), 0)
        if score.bias is not None:
            d_bias = rounding(_sum_to(d_scores, score.bias.shape))
        if score.alibi_slopes is not None:
            d_slopes = -(d_scores * _distances(score, q, k)).sum((-1, -2))
            d_slopes = rounding(_sum_to(d_slopes, score.alibi_slopes.shape))
        if score.sinks is not None:
            weights = rounding(xp.exp(rounding(score.sinks[:, None] - lse)))
            d_sinks = rounding(-xp.where(lse == -np.inf, 0, weights * delta).sum((0, 2)))
        if score.mod is not None and modified is not None:
            captured = score.mod.values
            d_captured = {name: xp.zeros_like(captured[name]) for name in score.mod.expression.real_arrays}
            for name, places, partial in modified.reads:
                if name in d_captured:
                    shares = xp.where(visible, d_scores * rounding(partial), 0)
                    # One more axis in front, as there may be none, whose index has the shape of the scores.
                    xp.add.at(d_captured[name][None], (xp.zeros(shares.shape, np.int64), *places), shares)
            d_captured = {name: rounding(total) for name, total in d_captured.items()}
            d_scores = rounding(xp.where(visible, d_scores * rounding(modified.by_score), 0))
        d_scores = rounding(d_scores * slope)
        d_q = rounding(scale * _weighted_sum(d_scores, keys, visible))
        d_keys = scale * _weighted_sum(d_scores.swapaxes(-1, -2), q, visible.swapaxes(-1, -2))
        weights = rounding(probabilities * dropout)
        d_values = _weighted_sum(weights.swapaxes(-1, -2), d_out, visible.swapaxes(-1, -2))
    d_k, d_v = rounding(_sum_heads(d_keys, k)), rounding(_sum_heads(d_values, v))
    return Gradients(d_q, d_k, d_v, d_bias, d_slopes, d_sinks, d_captured)


def _modified(score: Score, scores: Any, group: int) -> Evaluated:
    """What the expression makes of all scores; NumPy computes it for others, too."""
    assert score.mod is not None
    xp = _namespace(scores)
    batch, heads, seqlen_q, seqlen_k = scores.shape
    h = np.arange(heads)[:, None, None]
    indices = {
        "b": score.first_batch + np.arange(batch)[:, None, None, None], "h": h, "h_kv": h // group,
        "q_idx": np.arange(seqlen_q)[:, None], "k_idx": np.arange(seqlen_k),
        "seqlen_q": seqlen_q, "seqlen_k": seqlen_k,
    }  # fmt: skip
    if xp is np:
        return evaluate(score.mod.expression, scores, indices, score.mod.values)
    captured = {name: x.get() if hasattr(x, "get") else x for name, x in score.mod.values.items()}
    found = evaluate(score.mod.expression, scores.get(), indices, captured)
    reads = ((name, tuple(map(xp.asarray, places)), xp.asarray(partial)) for name, places, partial in found.reads)
    return Evaluated(xp.asarray(found.score), xp.asarray(found.by_score), tuple(reads))


def _distances(score: Score, q: Any, k: Any) -> Any:
    """How far apart queries and keys stand: (seqlen_q, seqlen_k)."""
    xp = _namespace(q)
    return abs(xp.arange(q.shape[2])[:, None] + score.q_offset - xp.arange(k.shape[2])).astype(q.dtype)


def _dropout(score: Score, q: Any, k: Any) -> Any:
    """Factors of the probabilities: 0 or 1 / (1 - dropout_p)."""
    if score.dropout_p == 0:
        return 1
    xp = _namespace(q)
    batch, heads, seqlen_q, _ = q.shape
    kept = rng.dropout_mask(score.seed, score.dropout_p, (batch, heads, seqlen_q, k.shape[2]), score.first_batch)
    return xp.asarray(kept).astype(q.dtype) / (1 - score.dropout_p)


def _sum_to(x: Any, shape: tuple[int, ...]) -> Any:
    """Adjoint of broadcasting from ``shape``."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis]), keepdims=True)


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


def _mask(score: Score, q: Any, k: Any) -> Any:
    """The mask by pairs."""
    if score.mask_block == (1, 1):
        return score.mask
    xp = _namespace(q)
    return mask_of_pairs(score.mask, score.mask_block, xp.arange(q.shape[2]), xp.arange(k.shape[2]))


def _weighted_sum(weights: Any, rows: Any, visible: Any) -> Any:
    """``weights @ rows``, where a row that is not visible counts nothing even if it is not finite (0 * nan is nan)."""
    xp = _namespace(weights)
    finite = xp.isfinite(rows)
    total = weights @ xp.where(finite, rows, 0)
    if finite.all():
        return total
    spoiled = visible.astype(weights.dtype) @ (~finite).astype(weights.dtype)
    return xp.where(spoiled > 0, np.nan, total)
