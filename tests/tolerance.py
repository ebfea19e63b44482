"""The one tolerance rule: a result has to be about as accurate as a plain program in the same dtype.

With `reference` the float64 result and `naive` the plain program's (both of `cuflash.reference`), per array:

    max|actual - reference| <= factor * max|naive - reference| + eps(dtype) * max|reference| + slack

The factor is 2 for out and LSE, 3 for gradients; the second term is the rounding of the result itself. The slack
covers what a plain program may miss by luck, above all on small arrays. `Yardstick` computes it as

    4 * eps(accumulator) * (1 + max|score|) * magnitude   [+ eps(dtype) * magnitude for gradients]

(16 for float64, where the reference is no more precise than the result)

for other orders of summation, and scores rounded elsewhere, whose absolute error eps * |score| is a relative error of
the probability; gradients start, on top of that, from an `out` that was rounded. A score counts twice what its terms
are in quadrature where these cancel. `magnitude` is the largest value of the result's formula with the terms of every
sum added in quadrature, so that none of them cancel, or of the result itself where that is larger: equal terms are
rounded alike. Weights are rounded, too, and below the normal numbers of a dtype absolutely. With a bias or slopes, what
they add counts as a score of its own, where weights are not 0 altogether: |score| + |bias| + |slope * distance|; so
does a sink. The error of softcap, or of an expression, is that of its result and, times its derivative, that of the
score it was given. The accumulator of 16-bit inputs being float32, the first part of the slack matters for float32 and
float64 only.

An element of `reference` that is not finite must not be finite in `actual`, and the other way round.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from cuflash import reference as ref
from cuflash.scores import Band, Score

FORWARD_FACTOR = 2
GRADIENT_FACTOR = 3


def eps(dtype: Any) -> float:
    """Distance between 1 and the next larger number of a dtype, bfloat16 included."""
    return 2.0**-7 if np.dtype(dtype).name == "bfloat16" else float(np.finfo(dtype).eps)


def accumulator(dtype: Any) -> np.dtype:
    """Dtype that sums, the softmax and the LSE of inputs of `dtype` are kept in."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def assert_within(
    actual: Any, reference: Any, naive: Any, *, dtype: Any, factor: float, slack: float = 0.0, what: str = "result"
) -> None:
    """Assert the rule for one array; `dtype` is that of the result."""
    actual, reference, naive = (_host(x).astype(np.float64) for x in (actual, reference, naive))
    assert actual.shape == reference.shape, f"{what}: shape {actual.shape}, wanted {reference.shape}"
    finite = np.isfinite(reference)
    wrong = np.argwhere(np.isfinite(actual) != finite)
    assert not len(wrong), (
        f"{what}: {len(wrong)} elements are finite where they should not be or the other way round, first at "
        f"{tuple(wrong[0])}: {actual[tuple(wrong[0])]}, wanted {reference[tuple(wrong[0])]}"
    )
    infinite = np.isinf(reference)
    np.testing.assert_array_equal(actual[infinite], reference[infinite], err_msg=what)
    naive_error = np.max(np.abs(naive[finite] - reference[finite]), initial=0.0)
    assert np.isfinite(naive_error), f"{what}: the plain program overflows here, so it cannot be the yardstick"
    largest = np.max(np.abs(reference[finite]), initial=0.0)
    # Results below the normal numbers of a dtype are rounded, or flushed, absolutely.
    smallest = _smallest(dtype)
    bound = factor * naive_error + eps(dtype) * largest + slack + smallest
    error = np.abs(np.where(finite, actual, 0.0) - np.where(finite, reference, 0.0))
    if error.size and error.max() > bound:
        worst = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{what}: error {error.max():.3e} at {tuple(int(i) for i in worst)} is over the bound {bound:.3e} "
            f"({(error > bound).sum()} of {error.size} elements are; naive error {naive_error:.3e}, largest "
            f"{largest:.3e}): got {actual[worst]!r}, wanted {reference[worst]!r}"
        )


class Yardstick:
    """What one attention call should give: 4-D operands in (NumPy's, or CuPy's to judge on the GPU), assertions out."""

    def __init__(
        self, q: Any, k: Any, v: Any, *, band: Band = Band(), scale: float | None = None, score: Score = Score()
    ) -> None:
        self.q, self.k, self.v, self.dtype = q, k, v, q.dtype
        self.xp = xp = sys.modules[type(q).__module__.partition(".")[0]]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        self.options = {"band": band, "scale": scale, "score": score}
        self.out, self.lse = ref.attention(q, k, v, **self.options)
        # Scores and probabilities as (batch, heads_kv, group, seqlen_q, seqlen_k), for the magnitudes only.
        scores = self._grouped(self._finite(q)) @ self._finite(k)[:, :, None].swapaxes(-1, -2) * scale
        # Where terms cancel, errors are those of scores as large as such terms make them.
        terms = xp.sqrt(self._grouped(self._finite(q) ** 2) @ self._finite(k)[:, :, None].swapaxes(-1, -2) ** 2)
        sizes = xp.maximum(abs(scores), 2 * abs(scale) * terms)
        if score.softcap is not None:
            tanh = xp.tanh(scores / score.softcap)
            scores = score.softcap * tanh
            sizes = abs(scores) + sizes * (1 - tanh**2)
        self._max_score = _largest(sizes)
        self._modified = None
        if score.mod is not None:
            before = scores.reshape(self._shape)
            self._modified = ref._modified(ref._in(np.float64, score), before, q.shape[1] // max(k.shape[1], 1))
            after, slopes = self._modified.score, self._finite(self._modified.by_score)
            sizes = abs(self._finite(after)) + abs(sizes.reshape(self._shape) * slopes)
            self._max_score = _largest(xp.where(after == -np.inf, 0.0, sizes))
            scores = self._grouped(after)
        visible = self._grouped(self._visible())
        self._distances = ref._distances(score, q.astype(np.float64), k)
        added = self._added()
        with np.errstate(all="ignore"):
            weights = xp.exp(scores + sum(added) - self._grouped(self.lse[..., None]))
        self._squares = xp.where(visible, xp.nan_to_num(weights, nan=1.0, posinf=1.0), 0.0) ** 2
        if added:
            counts = self._squares > eps(np.float64) ** 4
            self._max_score += _largest(xp.where(counts, sum(abs(x) for x in added), 0.0))
        if score.sinks is not None:
            self._max_score = max(self._max_score, _largest(self._finite(score.sinks)))
        # What the squares of weights become by dropout.
        self._dropout = self._grouped(xp.zeros(self._shape) + ref._dropout(score, q, k) ** 2)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:3], self.k.shape[2])

    def _visible(self) -> Any:
        xp, score = self.xp, self.options["score"]
        visible = ref._visible(self.options["band"], self.q, self.k)
        if score.mask is not None:
            visible = visible & ref._mask(score, self.q, self.k)
        if score.bias is not None:
            visible = visible & (score.bias.astype(np.float64) != -np.inf)
        if self._modified is not None:
            visible = visible & (self._modified.score != -np.inf)
        return xp.broadcast_to(visible, self._shape)

    def _added(self) -> list[Any]:
        """What bias and slopes add to scores, grouped like them."""
        xp, score = self.xp, self.options["score"]
        added = []
        if score.bias is not None:
            added.append(self._finite(score.bias))
        if score.alibi_slopes is not None:
            added.append(-self._finite(score.alibi_slopes)[..., None, None] * self._distances)
        return [self._grouped(xp.broadcast_to(x, self._shape)) for x in added]

    def assert_forward(self, out: Any, lse: Any = None) -> None:
        """Assert that `out` (and `lse`) are within the rule."""
        naive_out, _ = ref.naive(self.q, self.k, self.v, **self.options)
        squares = self._squares * self._dropout
        slack = self._slack(squares @ self._finite(self.v)[:, :, None] ** 2, self.out)
        assert_within(out, self.out, naive_out, dtype=self.dtype, factor=FORWARD_FACTOR, slack=slack, what="out")
        if lse is not None:
            # The LSE is kept in the accumulator's dtype, so that is what a plain program is allowed, too.
            precise = accumulator(self.dtype)
            _, naive_lse = ref.naive(*(x.astype(precise) for x in (self.q, self.k, self.v)), **self.options)
            slack = self._slack(self.xp.ones(1), self.xp.ones(1))
            assert_within(lse, self.lse, naive_lse, dtype=precise, factor=FORWARD_FACTOR, slack=slack, what="lse")

    def assert_weights(self, weights: Any, lse: Any, rows: range | None = None) -> None:
        """Assert that the `weights` of these queries that follow from this LSE are within the rule."""
        rows = range(self.q.shape[2]) if rows is None else rows
        wanted, naive = (x[:, :, rows.start : rows.stop : rows.step] for x in self._weights(lse))
        precise = accumulator(self.dtype)
        slack = self._slack(self._squares, wanted)
        assert_within(weights, wanted, naive, dtype=precise, factor=FORWARD_FACTOR, slack=slack, what="weights")
        assert not _host(weights)[_host(wanted) == 0].any(), "weights: pairs that are not visible have some"

    def assert_received(self, received: Any, lse: Any) -> None:
        """Assert that the sums over queries of these weights are within the rule."""
        wanted, naive = (x.sum(axis=2) for x in self._weights(lse))
        precise = accumulator(self.dtype)
        slack = self._slack(self._squares.sum(axis=3), wanted)
        assert_within(received, wanted, naive, dtype=precise, factor=FORWARD_FACTOR, slack=slack, what="received")

    def _weights(self, lse: Any) -> tuple[Any, Any]:
        """Those of the reference, and of a plain program in the dtype of the LSE, which is what they are kept in."""
        precise = accumulator(self.dtype)
        wanted = ref.attention_weights(self.q, self.k, lse, **self.options)
        return wanted, ref.naive_weights(self.q.astype(precise), self.k.astype(precise), lse, **self.options)

    def assert_backward(self, d_out: Any, gradients: Any, *, d_lse: Any = None) -> None:
        """Assert that `gradients`, (d_q, d_k, d_v) or all of `reference.Gradients`, are within the rule.

        None stands for a gradient that was not asked for.
        """
        operands = (d_out, self.q, self.k, self.v)
        wanted = ref.attention_backward(*operands, d_lse=d_lse, **self.options)
        naive = ref.naive_backward(*operands, d_lse=d_lse, **self.options)
        d_out_squares = self._grouped(self._finite(d_out) ** 2)
        delta_squares = (d_out_squares * self._grouped(self._finite(self.out) ** 2)).sum(-1, keepdims=True)
        if d_lse is not None:
            delta_squares += self._grouped(self._finite(d_lse[..., None]) ** 2)
        d_weights = d_out_squares @ self._finite(self.v)[:, :, None].swapaxes(-1, -2) ** 2 * self._dropout
        d_scores = (d_weights + delta_squares) * self._rounded_squares()
        d_products = d_scores * self.options["scale"] ** 2
        if self._modified is not None:
            d_products = d_products * self._grouped(self._finite(self._modified.by_score)) ** 2
        squares = {
            "d_q": d_products @ self._finite(self.k)[:, :, None] ** 2,
            "d_k": (d_products.swapaxes(-1, -2) @ self._grouped(self._finite(self.q) ** 2)).sum(2),
            "d_v": ((self._rounded_squares() * self._dropout).swapaxes(-1, -2) @ d_out_squares).sum(2),
        }
        score = self.options["score"]
        if score.bias is not None:
            squares["d_bias"] = ref._sum_to(d_scores.reshape(self._shape), score.bias.shape)
        if score.alibi_slopes is not None:
            by_head = (d_scores * self._distances**2).sum((-1, -2)).reshape(self.q.shape[:2])
            squares["d_alibi_slopes"] = ref._sum_to(by_head, score.alibi_slopes.shape)
        if score.sinks is not None:
            with np.errstate(all="ignore"):
                weights = self._finite(self.xp.exp(self._finite(score.sinks)[:, None] - self.lse)) ** 2
            squares["d_sinks"] = (weights * delta_squares.reshape(self.q.shape[:3])).sum((0, 2))
        if score.mod is not None and self._modified is not None:
            for name in score.mod.expression.real_arrays:
                squares[name] = self.xp.zeros(score.mod.values[name].shape)
            for name, places, partial in self._modified.reads:
                if name in squares:
                    shares = d_scores.reshape(self._shape) * self._finite(partial) ** 2
                    at = (self.xp.zeros(shares.shape, np.int64), *places)
                    self.xp.add.at(squares[name][None], at, shares)
        gradients, wanted, naive = (_by_name(x) for x in (gradients, wanted, naive))
        for what, gradient in gradients.items():
            arrays = gradient, wanted[what], naive[what]
            slack = self._slack(squares[what], arrays[1], rounding=eps(self.dtype))
            assert_within(*arrays, dtype=self.dtype, factor=GRADIENT_FACTOR, slack=slack, what=what)

    def _rounded_squares(self) -> Any:
        """Squares of the weights, or of what they are rounded like: below a dtype's normal numbers all are alike."""
        squares = self.xp.maximum(self._squares, _smallest(self.dtype) ** 2)
        return self.xp.where(self._grouped(self._visible()), squares, 0.0)

    def _grouped(self, x: np.ndarray) -> np.ndarray:
        batch, heads, *rest = x.shape
        return x.reshape(batch, self.k.shape[1], heads // max(self.k.shape[1], 1), *rest)

    def _finite(self, x: Any) -> Any:
        return self.xp.nan_to_num(x.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)

    def _slack(self, squares: Any, result: Any, rounding: float = 0.0) -> float:
        magnitude = max(math.sqrt(_largest(squares)), _largest(self._finite(result)))
        # In float64 the plain program is the reference itself, and its own roundings are no smaller than ours.
        roundings = 16 if self.dtype == np.float64 else 4
        return (roundings * eps(accumulator(self.dtype)) * (1 + self._max_score) + rounding) * magnitude


def _by_name(gradients: Any) -> dict[str, Any]:
    """What is there of gradients, those by captured arrays by the names of these."""
    named = dict(zip(ref.Gradients._fields, gradients, strict=False))
    named |= named.pop("d_captured", None) or {}
    return {name: gradient for name, gradient in named.items() if gradient is not None}


def _smallest(dtype: Any) -> float:
    """The smallest normal number."""
    return 2.0**-14 if np.dtype(dtype) == np.float16 else 2.0**-126


def _largest(x: Any) -> float:
    return float(abs(x).max()) if x.size else 0.0


def _host(x: Any) -> np.ndarray:
    """Bring an array of NumPy or CuPy to the host."""
    return x.get() if hasattr(x, "get") else np.asarray(x)
