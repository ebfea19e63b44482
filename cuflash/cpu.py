"""Attention on the CPU in NumPy: tiled, threaded, forward, backward and weights, with memory linear in the lengths.

The method is that of the kernels: a tile of queries meets one block of keys after the other; the scores
of a block become weights ``2 ** (score * log2(e) - shift)``, and what was summed so far is rescaled
whenever the shift grows. Blocks that the band hides are skipped, and only blocks on its edge are masked.

What makes it fast here:

* Every product is a BLAS call on tiles that stay in the level-2 cache. One Python thread per core works
  on tiles of its own, with BLAS itself held to one thread.
* Where the norms of queries and keys bound the scores of a tile (Cauchy-Schwarz) so tightly that
  ``2 ** score`` neither overflows nor vanishes, there is no shift: no maximum, no rescaling.
* The forward keeps scores as (keys, queries), so that its reductions over keys run along memory rows, and these in
  panels as wide as a product, so that a product reads and writes without gaps.
* The backward recomputes weights from the LSE. The LSE, and ``delta = sum(d_out * out)``, ride along as one
  more column of the products instead of taking a pass over the tile each.

What a call does to scores beyond the band (``Score``) is done to one tile at a time, by ``_ScoreTile`` for the
forward, the backward and the weights alike. Such calls always shift, and nothing rides along.

One thread computes an element of a result, or several in a fixed order, which depends on shapes alone: results are
bitwise the same for any number of threads, and those of the forward for any batch.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.linalg._umath_linalg

from . import environment, rng
from .expression import Evaluated, evaluate, flat_index
from .scores import Band, Score, mask_of_pairs

Array = np.ndarray

#: Rows (queries times the query heads that share a key head) and keys of a block of scores: 1 MiB of a level-2 cache,
#: and enough work in every NumPy call that threads seldom wait for the interpreter's lock.
FORWARD_M, FORWARD_N = 512, 512
#: The same for the backward, which has two arrays of scores.
BACKWARD_M, BACKWARD_N = 512, 256
#: Keys (forward) or rows (backward) of a block on the edge of the band. Half of it is wasted, but a smaller one costs
#: more in NumPy calls; the forward, whose calls there take several heads, can afford it.
FORWARD_EDGE, BACKWARD_EDGE = 128, 256
#: Key heads share a task until it has this many scores, so that short sequences need fewer NumPy calls.
SMALL_TASK = 1 << 16
#: Products are cut into so many rows and columns where the head dim, with a column of ones, is at most the third
#: number: OpenBLAS multiplies matrices with less than a million multiply-adds where they lie, and copies larger ones
#: first. For wider heads the copy pays. Scores of the forward lie in memory as panels of ``CUT_M`` rows.
CUT_M, CUT_N, CUT_DIM = 64, 128, 65
#: Largest |score|, in base 2, for which weights need no shift: sums of what is 2 ** -50 to 2 ** 50 times as large as
#: the values are still normal float32 numbers, unless the values are extreme.
MAX_UNSHIFTED = 50.0
#: Keys whose norms are computed in one call; those of 16 bits are converted first, into as much memory.
KEYS_AT_ONCE = 4096
#: Rows per key head from which on reading all keys once more, to bound the scores, is cheap.
MIN_ROWS_TO_BOUND = 64
#: Tasks that there should be at least, of the forward per batch entry (which its results do not depend on).
MIN_TASKS = 16
#: As long as there are, so many key heads share a task of a masked forward, whose small blocks on the edge of the band
#: then take several heads at once: there, threads would wait for the interpreter's lock most of all.
MAX_HEADS = 4
#: The backward splits the keys of a head until there are enough tasks, or so many parts, or they get so short.
MAX_PARTS, MIN_PART = 8, 1024
#: Queries whose part of a tile of bias or mask is transposed at a time.
STRIP = 64
#: Keys of a tile of the forward for which an expression is evaluated at a time.
EVALUATED = 128
#: Order of (heads_kv, member of the group, query, key) in the tiles of scores of the forward and of the backward, which
#: that of the weights is, too.
FORWARD_AXES, BACKWARD_AXES = (0, 3, 2, 1), (0, 2, 1, 3)
#: Bytes of a cache line, and of the widest vector register.
ALIGNMENT = 64


class _Base(NamedTuple):
    """The number whose powers weights are."""

    exp: np.ufunc
    log: np.ufunc
    #: Its natural logarithm.
    ln: float

    def smallest_exponent(self, dtype: np.dtype) -> float:
        """Exponent of weights that make no difference any more, but whose products are still normal numbers.

        Subnormal numbers make powers and products many times slower.
        """
        return (float(np.finfo(dtype).minexp) + 26) * _TWO.ln / self.ln


#: Powers of two are the fastest; the logarithm of e becomes part of the scale.
_TWO = _Base(np.exp2, np.log2, math.log(2.0))
#: Where something is added to scores: however large it is, it need not be multiplied, so it does not overflow.
_E = _Base(np.exp, np.log, 1.0)


def forward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    *,
    band: Band,
    scale: float,
    score: Score = Score(),
) -> None:
    """Write ``softmax(scale * q @ k.T, over visible keys) @ v`` to ``out`` and its natural-log LSE to ``lse``.

    Parameters
    ----------
    q, k, v : arrays (batch, heads, seqlen, dim)
        float16, bfloat16, float32 or float64, with any strides. ``k`` and ``v`` may have fewer heads (GQA).
    out : array (batch, num_heads, seqlen_q, head_dim_v), written
    lse : array (batch, num_heads, seqlen_q) or None, written
    band : Band
        The visible pairs. A query that sees no key has out 0 and LSE -inf.
    scale : float
        Factor of the scores.
    score : Score
        What else is done to scores and weights. Its bias and mask are views (batch, num_heads, seqlen_q, seqlen_k), a
        mask by blocks one of these, with any strides, 0 where they are broadcast; its slopes (batch, num_heads), its
        sinks (num_heads,). The bias may be -inf, which hides a pair like the mask. What its expression captures are
        arrays of any strides, and numbers.
    """
    batch, num_heads, seqlen_q, _ = out.shape
    heads_kv, seqlen_k = k.shape[1:3]
    if batch * num_heads * seqlen_q == 0:
        return
    lse = np.empty(out.shape[:3], np.float32) if lse is None else lse
    q, out, lse = (_grouped(x, heads_kv) for x in (q, out, lse))
    group = q.shape[2]
    group_step = min(group, FORWARD_M)
    q_step = min(FORWARD_M // group_step, seqlen_q)
    heads_step = _heads_per_task(q_step * group_step, seqlen_k)
    if not band.is_open:
        num_tiles = heads_kv * _ceil_div(group, group_step) * _ceil_div(seqlen_q, q_step)
        heads_step = max(heads_step, min(num_tiles // MIN_TASKS, MAX_HEADS))
    lengths = seqlen_q, seqlen_k
    is_bounded = score.is_plain and seqlen_q * group >= MIN_ROWS_TO_BOUND
    norms = _key_norms(k) if is_bounded else np.full((batch, heads_kv), np.inf)

    # Scratch is each thread's own, and there are few shapes: full tiles, and what is left over at the ends.
    scratch = threading.local()
    dtype = _compute_dtype(q)
    options = _grouped_score(score, heads_kv, dtype)

    def task(b: int, heads: slice, members: slice, tile: slice) -> None:
        tile_q, tile_out = q[b, heads, members, tile], out[b, heads, members, tile]
        if not hasattr(scratch, "tiles"):
            scratch.tiles = {}
        shape = tile_q.shape
        if shape not in scratch.tiles:
            scratch.tiles[shape] = _ForwardTile(shape, seqlen_k, out.shape[4], dtype, score.is_plain)
        place = _Place(b, heads, members, tile, slice(0, seqlen_k))
        scratch.tiles[shape].run(
            tile_q,
            k[b, heads],
            v[b, heads],
            tile_out,
            lse[b, heads, members, tile],
            _moved(band, tile.start),
            scale,
            float(norms[b, heads].max()),
            None if score.is_plain else _Scores(options, place, lengths, group, FORWARD_AXES, dtype),
        )

    # Tiles of the same heads follow one another, since they read the same keys. Those with the most keys come first,
    # so that no long one is left for the end.
    tiles = [slice(start, min(start + q_step, seqlen_q)) for start in range(0, seqlen_q, q_step)]
    tiles.sort(key=lambda tile: np.subtract(*band.key_range(tile.start, tile.stop, seqlen_k)))
    _run(
        [
            functools.partial(task, b, heads, members, tile)
            for b in range(batch)
            for heads in _slices(heads_kv, heads_step)
            for members in _slices(group, group_step)
            for tile in tiles
        ]
    )


def backward(
    d_out: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    d_lse: Array | None,
    d_q: Array,
    d_k: Array,
    d_v: Array,
    *,
    band: Band,
    scale: float,
    score: Score = Score(),
    d_bias: Array | None = None,
    d_alibi_slopes: Array | None = None,
    d_sinks: Array | None = None,
    d_captured: Mapping[str, Array] | None = None,
) -> None:
    """Write the gradients of ``forward`` to ``d_q``, ``d_k`` and ``d_v``, all elements of them.

    Parameters
    ----------
    d_out : array like ``out``
        Gradient of the loss by ``out``.
    q, k, v, out, lse : arrays
        Inputs and results of ``forward``.
    d_lse : array like ``lse``, or None for zeros
        Gradient of the loss by ``lse``.
    d_q, d_k, d_v : arrays with the shapes of ``q``, ``k``, ``v``, written
        ``d_k`` and ``d_v`` are sums over the query heads that share a key head.
    band, scale, score
        As in ``forward``.
    d_bias : array (batch or 1, num_heads or 1, seqlen_q or 1, seqlen_k or 1), or None, added to
        An axis of size 1 receives the sum over that axis. float64 for inputs of float64, else float32, as are the next.
    d_alibi_slopes : array (batch or 1, num_heads), or None, added to
    d_sinks : array (num_heads,), or None, added to
    d_captured : arrays like those that the expression captures, by their names, or None, added to
        Real arrays that are not named have no gradient.
    """
    batch, heads_kv, seqlen_k, _ = k.shape
    if d_sinks is not None:
        _add_sink_gradients(d_out, out, lse, d_lse, score.sinks, d_sinks)
    if q.size == 0 or k.size == 0:
        for gradient in (d_q, d_k, d_v):
            gradient[...] = 0
        return
    d_out, q, out, lse, d_q = (_grouped(x, heads_kv) for x in (d_out, q, out, lse, d_q))
    d_lse = None if d_lse is None else _grouped(d_lse, heads_kv)
    dtype = _compute_dtype(q)
    options = _grouped_score(score, heads_kv, dtype)
    d_bias, d_slopes = (None if x is None else _grouped_or_one(x, heads_kv) for x in (d_bias, d_alibi_slopes))
    group, seqlen_q = q.shape[2:4]
    num_parts = min(_ceil_div(MIN_TASKS, batch * heads_kv), MAX_PARTS, max(seqlen_k // MIN_PART, 1))
    parts = _key_parts(band, seqlen_q, seqlen_k, num_parts)

    every_member = slice(0, group)
    lines: dict[tuple[Any, ...], _Turn] = {}

    def share(name: str, gradient: Array | None, place: _Place) -> _Share | None:
        if gradient is None:
            return None
        b, *where = place
        # Tasks add to the same elements where they differ in axes that the gradient does not have.
        starts = zip((b, place.heads.start, 0, 0, place.keys.start), gradient.shape, strict=False)
        line = name, *(start if size > 1 else 0 for start, size in starts)
        lines[line] = turn = _Turn(lines.get(line))
        return _Share(_piece(gradient, slice(b, b + 1), *where)[0], turn, dtype)

    def captured_shares() -> dict[str, _CapturedShare]:
        # Who reads which elements is not known before, so all tasks are in one line.
        shares = {}
        for name, gradient in (d_captured or {}).items():
            lines["captured", name] = turn = _Turn(lines.get(("captured", name)))
            shares[name] = _CapturedShare(gradient, turn)
        return shares

    def task(
        place: _Place,
        d_q_sum: _SumInOrder,
        d_bias: _Share | None,
        d_slopes: _Share | None,
        d_captured: dict[str, _CapturedShare],
    ) -> None:
        b, heads, _, queries, part = place
        d_out_part, q_part, out_part, lse_part = (x[b, heads, :, queries] for x in (d_out, q, out, lse))
        d_lse_part = None if d_lse is None else d_lse[b, heads, :, queries]
        num_keys = part.stop - part.start
        with ExitStack() as shares:
            for one in (d_bias, d_slopes, *d_captured.values()):
                if one is not None:
                    shares.enter_context(one)
            scores = None
            if not score.is_plain:
                gradients = d_bias, d_slopes, d_captured
                scores = _Scores(
                    options, place, (seqlen_q, seqlen_k), group, BACKWARD_AXES, dtype, *gradients,
                    is_differentiated=True,
                )  # fmt: skip
            scratch = _BackwardPart(d_out_part, q_part, out_part, lse_part, d_lse_part, scale, num_keys, scores)
            for keys in _slices(num_keys, BACKWARD_N):
                start = part.start + keys.start
                here = b, heads, slice(start, part.start + keys.stop)
                scratch.run(k[here], v[here], d_k[here], d_v[here], _moved(band, queries.start - start), keys.start)
        d_q_part = (scratch.d_q * scale).reshape(scratch.d_q.shape[0], -1, group, q.shape[4])
        d_q_sum.add(part.start, queries, d_q_part)

    tasks = []
    for b in range(batch):
        for heads in _slices(heads_kv, _heads_per_task(group * seqlen_q, seqlen_k)):
            d_q_sum = _SumInOrder(d_q[b, heads], len(parts))
            for part in parts:
                queries = slice(*band.query_range(part.start, part.stop, seqlen_q))
                place = _Place(b, heads, every_member, queries, part)
                shares = share("bias", d_bias, place), share("slopes", d_slopes, place), captured_shares()
                tasks.append(functools.partial(task, place, d_q_sum, *shares))
    _run(tasks)


def weights(
    q: Array,
    k: Array,
    lse: Array,
    out: Array,
    *,
    rows: range,
    band: Band,
    scale: float,
    score: Score = Score(),
) -> None:
    """Write the weights ``exp(scores - lse)`` of some queries to ``out``, 0 where a query does not see a key.

    Parameters
    ----------
    q, k : arrays (batch, heads, seqlen, dim)
        As in ``forward``: all queries, whichever are chosen.
    lse : array (batch, num_heads, seqlen_q)
        That of ``forward``, sinks included. A row of LSE -inf has weights 0.
    out : array (batch, num_heads, len(rows), seqlen_k), written
        float64 for inputs of float64, else float32, as the LSE.
    rows : range
        Which queries, with a step above 0.
    band, scale, score
        As in ``forward``; dropout and sinks make no difference.
    """
    if out.size == 0:
        return
    tiles = _Weights(q, k, lse, rows, band, scale, score)
    out = _grouped(out, k.shape[1])

    def task(b: int, heads: slice, queries: slice, keys: slice) -> None:
        block = out[b, heads, :, queries]
        start, stop, found = tiles.tile(b, heads, queries, keys)
        block[..., keys.start : start] = 0
        if found is not None:
            block[..., start:stop] = found.swapaxes(1, 2)
        block[..., stop : keys.stop] = 0

    _run(
        [
            functools.partial(task, b, heads, queries, keys)
            for b in range(len(q))
            for heads in _slices(k.shape[1], tiles.heads_step)
            for queries in _slices(len(rows), tiles.q_step)
            for keys in _slices(k.shape[2], tiles.keys_step)
        ]
    )


def received(q: Array, k: Array, lse: Array, out: Array, *, band: Band, scale: float, score: Score = Score()) -> None:
    """Write the sums of ``weights`` over all queries to ``out``, (batch, num_heads, seqlen_k)."""
    if out.size == 0:
        return
    seqlen_q = q.shape[2]
    tiles = _Weights(q, k, lse, range(seqlen_q), band, scale, score)
    out = _grouped(out, k.shape[1])

    def task(b: int, heads: slice, keys: slice) -> None:
        # As there may be many tiles, float32 would lose digits.
        total = np.zeros((heads.stop - heads.start, tiles.group, keys.stop - keys.start))
        first, last = band.query_range(keys.start, keys.stop, seqlen_q)
        for queries in _slices(last - first, tiles.q_step):
            start, stop, found = tiles.tile(b, heads, slice(first + queries.start, first + queries.stop), keys)
            if found is not None:
                by_query = found.reshape(*found.shape[:2], -1)
                sums = np.ones((1, by_query.shape[1]), by_query.dtype) @ by_query
                total[..., start - keys.start : stop - keys.start] += sums.reshape(len(total), tiles.group, -1)
        out[b, heads, :, keys] = total

    _run(
        [
            functools.partial(task, b, heads, keys)
            for b in range(len(q))
            for heads in _slices(k.shape[1], tiles.heads_step)
            for keys in _slices(k.shape[2], tiles.keys_step)
        ]
    )


def _add_sink_gradients(
    d_out: Array, out: Array, lse: Array, d_lse: Array | None, sinks: Array, d_sinks: Array
) -> None:
    """Add to ``d_sinks``; a sink is a key whose value is 0, so its scores' gradients need no product."""
    batch, num_heads, seqlen_q, _ = out.shape
    dtype = _compute_dtype(out)
    shares = np.zeros((batch, num_heads), dtype)

    def task(b: int, heads: slice) -> None:
        here = b, heads
        delta = np.einsum("hid,hid->hi", d_out[here].astype(dtype), out[here].astype(dtype))
        if d_lse is not None:
            delta -= d_lse[here]
        weights = np.exp(sinks[heads, None].astype(dtype) - lse[here])
        shares[here] = -np.where(lse[here] == -np.inf, 0, weights * delta).sum(axis=1)

    head_slices = list(_slices(num_heads, _heads_per_task(1, seqlen_q)))
    _run([functools.partial(task, b, heads) for b in range(batch) for heads in head_slices])
    d_sinks += shares.sum(axis=0)


class _ForwardTile:
    """One thread's scratch for tiles of one shape, prepared once for many of them."""

    def __init__(self, shape: tuple[int, ...], num_keys: int, head_dim_v: int, dtype: np.dtype, is_plain: bool) -> None:
        """Take the shape (heads_kv, group, queries, head_dim) of the tile of q, and whether scores are left alone."""
        heads, group, num_queries, head_dim = shape
        # Rows are (query, member of the group), so that a range of queries is a range of rows.
        rows = num_queries * group
        self.is_cut = is_plain and max(head_dim, head_dim_v) <= CUT_DIM and rows % CUT_M == 0
        self.base = _TWO if is_plain else _E
        panel = CUT_M if self.is_cut else rows
        block = rows * min(FORWARD_N, num_keys)
        num_scores = max(min(heads * block, FORWARD_M * FORWARD_N), block)
        self.q = _aligned((heads, num_queries, group, head_dim), dtype)
        self.q_t = _aligned((heads, rows // panel, head_dim, panel), dtype)
        self.scores = _aligned((num_scores,), dtype)
        self.products = _aligned((max(num_scores // CUT_N, heads * rows) * head_dim_v,), dtype)
        self.acc = _aligned((heads, rows, head_dim_v), dtype)
        self.row_max, self.row_sum, self.block_sum = (np.empty((heads, rows), dtype) for _ in range(3))
        self.blocks: dict[tuple[int, int, int], list[tuple[Any, ...]]] = {}

    def _blocks(self, num_keys: int, start: int, stop: int) -> list[tuple[Any, ...]]:
        """Views and products for some keys and a range of rows, of as many heads at once as there is memory for.

        Making them takes as long as some products.
        """
        key = num_keys, start, stop
        if key not in self.blocks:
            heads_step = max(self.scores.size // (num_keys * (stop - start)), 1)
            self.blocks[key] = [
                self._block(heads, num_keys, start, stop) for heads in _slices(len(self.acc), heads_step)
            ]
        return self.blocks[key]

    def _block(self, heads: slice, num_keys: int, start: int, stop: int) -> tuple[Any, ...]:
        head_dim_v = self.acc.shape[2]
        panels = _panels(start, stop, self.is_cut)
        panel = (stop - start) // panels
        q_t = self.q_t[heads, start // panel :][:, :panels] if self.is_cut else self.q_t[heads, :, :, start:stop]
        shape = (heads.stop - heads.start, panels, num_keys, panel)
        weights = self.scores[: math.prod(shape)].reshape(shape)
        cut_m, cut_n = (cut if self.is_cut and num_keys % cut == 0 else num_keys for cut in (CUT_M, CUT_N))
        by_cut_m, by_cut_n = (weights.reshape(*shape[:2], -1, cut, panel) for cut in (cut_m, cut_n))
        by_row = [
            x[heads, start:stop].reshape(-1, panels, 1, panel) for x in (self.block_sum, self.row_max, self.row_sum)
        ]
        return (
            heads,
            weights,
            _ScoreProduct(q_t[:, None], by_cut_m.swapaxes(1, 2)),
            _WeightedSum(by_cut_n.swapaxes(3, 4), head_dim_v, self.products),
            np.ones((1, num_keys), weights.dtype),
            *by_row,
            self.acc[heads, start:stop],
        )

    def run(
        self,
        q: Array,
        k: Array,
        v: Array,
        out: Array,
        lse: Array,
        band: Band,
        scale: float,
        key_norm: float,
        scores: _Scores | None,
    ) -> None:
        """Forward of one tile: q and out (heads_kv, group, queries, dim), k and v (heads_kv, keys, dim)."""
        heads, group, num_queries, head_dim = q.shape
        np.multiply(q.swapaxes(1, 2), scale / self.base.ln, out=self.q, dtype=self.q.dtype)
        self.q_t[...] = self.q.reshape(*self.q_t.shape[:2], -1, head_dim).swapaxes(2, 3)

        max_score = key_norm * _largest_norm(self.q)  # nan where an input is
        blocks = _key_blocks(band, num_queries, group, k.shape[1], self.is_cut)
        bounded = max_score <= MAX_UNSHIFTED
        if bounded:
            self._attend(k, v, blocks)
        # Values may be so large that their sum overflows, or not finite.
        if not bounded or not np.isfinite(self.acc).all():
            self._attend_shifted(k, v, blocks, max_score, scores)

        acc, row_max, row_sum = (
            x.reshape(heads, num_queries, group, -1) for x in (self.acc, self.row_max, self.row_sum)
        )
        divisor = np.where(row_sum == 0, 1, row_sum)
        acc /= divisor if scores is None else divisor * scores.kept_share
        out[...] = acc.swapaxes(1, 2)
        lse[...] = (self.base.ln * (row_max + self.base.log(row_sum)))[..., 0].swapaxes(1, 2)

    def _attend(self, k: Array, v: Array, blocks: list[_KeyBlock]) -> None:
        """Sum over all keys with weights ``2 ** score``."""
        dtype = self.acc.dtype
        self.acc.fill(0)
        self.row_sum.fill(0)
        self.row_max.fill(0)
        for keys, start, stop, edge in blocks:
            for heads, weights, set_scores, add_values, ones, block_sum, _, row_sum, acc in self._blocks(
                keys.stop - keys.start, start, stop
            ):
                set_scores(_operand(k[heads, keys], dtype))
                np.exp2(weights, out=weights)
                if edge is not None:
                    np.multiply(weights, edge.visible, out=weights)  # all finite; five times as fast as copyto(where=)
                np.matmul(ones, weights, out=block_sum)  # twice as fast as a sum along the first axis
                row_sum += block_sum
                add_values(_operand(v[heads, keys], dtype), acc, None)

    def _attend_shifted(
        self, k: Array, v: Array, blocks: list[_KeyBlock], max_score: float, scores: _Scores | None
    ) -> None:
        """Sum over all keys with weights ``base ** (score - largest score so far)``."""
        dtype = self.acc.dtype
        exp = self.base.exp
        smallest = self.base.smallest_exponent(dtype)
        self.acc.fill(0)
        self.row_sum.fill(0)
        self.row_max.fill(-np.inf)
        if scores is not None and scores.sinks is not None:
            self._begin_with(scores.sinks)
        for keys, start, stop, edge in blocks:
            for heads, weights, set_scores, add_values, ones, block_sum, row_max, row_sum, acc in self._blocks(
                keys.stop - keys.start, start, stop
            ):
                hidden = None if edge is None else edge.hidden
                tile = None
                if scores is not None:
                    group = scores.group_here
                    tile = scores.tile(heads, slice(start // group, stop // group), keys, hidden)
                    if tile is None:
                        continue
                set_scores(_operand(k[heads, keys], dtype))
                if tile is not None:
                    tile.change(weights)
                    tile.hide(weights)
                    hidden = tile.hidden
                elif edge is not None:
                    np.copyto(weights, -np.inf, where=edge.in_panels)
                new_max = np.maximum(row_max, weights.max(axis=2, keepdims=True))
                shift = np.where(new_max == -np.inf, 0, new_max)
                rescale = exp(row_max - shift)
                row_max[...] = new_max
                row_sum *= rescale
                acc *= rescale.reshape(*acc.shape[:2], 1)
                weights -= shift
                if not 2 * max_score < -smallest:
                    np.maximum(weights, smallest, out=weights)
                exp(weights, out=weights)
                if tile is not None:
                    tile.clear(weights)
                elif edge is not None:
                    np.copyto(weights, 0, where=edge.in_panels)
                np.matmul(ones, weights, out=block_sum)
                row_sum += block_sum
                if tile is not None:
                    tile.drop(weights)
                add_values(_operand(v[heads, keys], dtype), acc, hidden)

    def _begin_with(self, sinks: Array) -> None:
        """Take the sinks, (heads_kv, group), for what was summed before the first key."""
        row_max, row_sum = (x.reshape(len(sinks), -1, sinks.shape[1]) for x in (self.row_max, self.row_sum))
        row_max[...] = sinks[:, None]
        # The power of 0, unless a sink is infinite: -inf is as good as none, of inf nothing is a number.
        row_sum[...] = np.where(sinks == -np.inf, 0, np.exp(sinks - sinks))[:, None]


class _BackwardPart:
    """The queries of some heads, staged for the backward, and scratch for one block of keys after the other.

    Weights and gradients of scores come from products of the same shape, and so do d_v and d_k. Each pair is computed
    in one call, along an axis of two in front: fewer calls are fewer waits for the interpreter's lock. Where head
    dims differ, zeros fill the narrower one.
    """

    def __init__(
        self,
        d_out: Array,
        q: Array,
        out: Array,
        lse: Array,
        d_lse: Array | None,
        scale: float,
        num_keys: int,
        scores: _Scores | None,
    ) -> None:
        """Take what belongs to queries as (heads_kv, group, queries, ...)."""
        heads, self.group, self.num_queries, head_dim = q.shape
        head_dim_v = d_out.shape[3]
        dim = max(head_dim, head_dim_v)
        dtype = _compute_dtype(q)
        self.changes = scores
        self.base = _TWO if scores is None else _E
        log_e = 1 / self.base.ln
        # Rows are (query, member of the group), so that a range of queries is a range of rows.
        rows = self.num_queries * self.group
        by_query = (2, heads, self.num_queries, self.group)
        staged = _aligned((*by_query, _aligned_length(dim + 1)), dtype)[..., : dim + 1]

        # [q * scale * log(e) | -lse * log(e)], whose product with [k | 1] is the exponent of the weights.
        np.multiply(q.swapaxes(1, 2), scale * log_e, out=staged[0, ..., :head_dim], dtype=dtype)
        staged[0, ..., head_dim:dim] = 0
        # The weights of a row that sees nothing are all hidden, but its exponents shall be numbers.
        staged[0, ..., -1] = np.where(lse == -np.inf, 0, lse * -log_e).swapaxes(1, 2)
        self.q_norm, self.min_lse = _largest_norm(staged[0, ..., :-1]), float(staged[0, ..., -1].min(initial=0))

        # [d_out | d_lse - delta], whose product with [v | 1], times the weights, is the gradient of the scores.
        # What dropout multiplies kept weights by is taken on by d_out, for its products with v and with the weights.
        kept_share = 1.0 if scores is None else scores.kept_share
        staged[1, ..., :head_dim_v] = d_out.swapaxes(1, 2)
        staged[1, ..., head_dim_v:dim] = 0
        delta = np.einsum("...d,...d->...", staged[1, ..., :head_dim_v], out.swapaxes(1, 2).astype(dtype))
        staged[1, ..., -1] = -delta if d_lse is None else d_lse.swapaxes(1, 2) - delta
        if kept_share != 1:
            staged[1, ..., :head_dim_v] /= kept_share
        self.d_out_norm = _largest_norm(staged[1])
        self.staged = staged.reshape(2, heads, rows, dim + 1)
        if scores is not None:
            # What is done to the products comes before these are added.
            self.addends = self.staged[..., -1:].copy()
            self.staged[..., -1] = 0

        #: Sum over all keys so far.
        self.d_q = np.zeros((heads, rows, head_dim), dtype)

        block_m, block_n = max(min(BACKWARD_M, rows), self.group), min(BACKWARD_N, num_keys)
        self.scores = _aligned((2, _aligned_length(heads * block_m * block_n)), dtype)
        products_size = max(block_m, 2 * block_n, 2 * block_m * block_n // CUT_N) * dim
        self.products = _aligned((heads * products_size,), dtype)
        self.k = _aligned((heads, block_n, head_dim), dtype)
        #: Sums over queries so far: d_v, then d_k.
        self.sums = _aligned((2, heads, block_n, dim), dtype)
        # The length of their rows is no power of two, so that these do not compete for the same cache lines.
        self.keys_t = _aligned((2, heads, dim + 1, _aligned_length(block_n + 1)), dtype)
        self.keys_t[0, :, head_dim:] = self.keys_t[1, :, head_dim_v:] = 0
        self.keys_t[:, :, -1] = 1
        self.blocks: dict[tuple[int, int, int], tuple[Any, ...]] = {}

    def _block(self, num_rows: int, start: int, stop: int) -> tuple[Any, ...]:
        """Views and products for a number of rows and a range of keys; making them takes as long as some products."""
        key = num_rows, start, stop
        if key not in self.blocks:
            heads, _, head_dim = self.k.shape
            dim = self.sums.shape[3]
            shape = (heads, num_rows, stop - start)
            scores = self.scores[:, : math.prod(shape)].reshape(2, *shape)
            self.blocks[key] = (
                *scores,
                _ScoreProduct(*_cut_product(self.keys_t[..., start:stop], scores)),
                _WeightedSum(_cut(scores.swapaxes(2, 3), dim), dim, self.products),
                _WeightedSum(_cut(scores[1], head_dim), head_dim, self.products),
                self.k[:, start:stop],
                self.sums[:, :, start:stop],
            )
        return self.blocks[key]

    def run(self, k: Array, v: Array, d_k: Array, d_v: Array, band: Band, first_key: int) -> None:
        """Write d_k and d_v of a block of keys, (heads_kv, keys, dim), and add its share to d_q."""
        num_keys, head_dim = k.shape[1:]
        head_dim_v = v.shape[2]
        self.k[:, :num_keys] = k
        self.keys_t[0, :, :head_dim, :num_keys] = k.swapaxes(1, 2)
        self.keys_t[1, :, :head_dim_v, :num_keys] = v.swapaxes(1, 2)
        self.sums.fill(0)
        exp = self.base.exp
        smallest = self.base.smallest_exponent(self.k.dtype)
        min_exponent = self.min_lse - self.q_norm * _largest_norm(self.k[:, :num_keys])
        v_norm = _largest_norm(self.keys_t[1, :, :, :num_keys].swapaxes(1, 2))
        # Where nothing can be infinite or not a number, a hidden weight of 0 is enough to make all of its products 0.
        tame = min_exponent > -np.inf and self.d_out_norm * v_norm < np.inf

        for rows, start, stop, hidden in _query_blocks(band, self.num_queries, self.group, num_keys):
            weights, d_scores, set_scores, add_rows, add_keys, keys, sums = self._block(
                rows.stop - rows.start, start, stop
            )
            tile = None
            if self.changes is not None:
                queries = slice(rows.start // self.group, rows.stop // self.group)
                tile = self.changes.tile(
                    slice(0, len(self.k)), queries, slice(first_key + start, first_key + stop), hidden
                )
                if tile is None:
                    continue
            staged = self.staged[:, :, rows]
            set_scores(staged)
            if tile is not None:
                tile.change(weights)
                weights += self.addends[0, :, rows]
                tile.hide(weights)
                hidden = tile.hidden
            if tile is not None or not min_exponent > smallest:
                np.maximum(weights, smallest, out=weights)
            exp(weights, out=weights)
            if tile is not None:
                tile.clear(weights)
                tile.drop(d_scores)
                d_scores += self.addends[1, :, rows]
            elif hidden is not None:
                np.copyto(weights, 0, where=hidden)
            d_scores *= weights
            if tame:
                hidden = None
            if hidden is not None:
                np.copyto(d_scores, 0, where=hidden)
            if tile is not None:
                tile.drop(weights)
                tile.change_back(d_scores)
            add_rows(staged[::-1, ..., :-1], sums, hidden)
            add_keys(keys, self.d_q[:, rows], None if hidden is None else hidden.swapaxes(-1, -2))

        d_v[...] = self.sums[0, :, :num_keys, :head_dim_v]
        # q came with scale * log(e), of which only the scale belongs here.
        d_k[...] = self.sums[1, :, :num_keys, :head_dim] * self.base.ln


class _Weights:
    """Weights of some queries, recomputed from the LSE tile by tile."""

    def __init__(self, q: Array, k: Array, lse: Array, rows: range, band: Band, scale: float, score: Score) -> None:
        heads_kv, seqlen_k = k.shape[1:3]
        chosen = slice(rows.start, rows.stop, rows.step)
        self.q, self.lse = (_grouped(x, heads_kv)[:, :, :, chosen] for x in (q, lse))
        self.k, self.rows, self.band, self.scale = k, rows, band, scale
        self.group = self.q.shape[2]
        self.lengths = q.shape[2], seqlen_k
        self.dtype = _compute_dtype(q)
        # Weights are those before dropout, and the LSE knows of the sinks.
        score = score._replace(sinks=None, dropout_p=0.0)
        self.options = None if score.is_plain else _grouped_score(score, heads_kv, self.dtype)
        self.q_step = max(min(FORWARD_M // self.group, len(rows)), 1)
        num_rows = self.q_step * self.group
        # Few rows take more keys at once.
        self.keys_step = min(max(FORWARD_M * FORWARD_N // num_rows, FORWARD_N), KEYS_AT_ONCE, max(seqlen_k, 1))
        self.heads_step = min(_heads_per_task(num_rows, seqlen_k), heads_kv)
        self.num_weights = self.heads_step * num_rows * self.keys_step
        #: Each thread's own memory for a tile.
        self.scratch = threading.local()

    def tile(self, b: int, heads: slice, queries: slice, keys: slice) -> tuple[int, int, Array | None]:
        """Keys [start, stop) that some of the queries see, and weights (heads_kv, queries, members, these keys).

        There are no weights where nobody sees anything. The thread's next tile overwrites them.
        """
        first, last = self.rows[queries.start], self.rows[queries.stop - 1] + 1
        start, stop = self.band.key_range(first, last, keys.stop)
        start = max(start, keys.start)
        if start >= stop:
            return keys.start, keys.start, None
        step, num_queries, num_keys = self.rows.step, queries.stop - queries.start, stop - start
        hidden = None
        if not self.band.is_full(first, last, start, stop):
            hidden = _hidden(_moved(self.band, first - start), num_queries, self.group, num_keys, step)
        tile = None
        if self.options is not None:
            place = _Place(b, heads, slice(0, self.group), slice(first, last, step), slice(start, stop))
            scores = _Scores(self.options, place, self.lengths, self.group, BACKWARD_AXES, self.dtype)
            tile = scores.tile(slice(0, heads.stop - heads.start), slice(0, num_queries), slice(0, num_keys), hidden)
            if tile is None:
                return keys.start, keys.start, None

        q, lse = (x[b, heads, :, queries].swapaxes(1, 2) for x in (self.q, self.lse))
        num_heads, _, _, head_dim = q.shape
        rows = np.multiply(q, self.scale, out=np.empty(q.shape, self.dtype), dtype=self.dtype)
        lse = lse.reshape(num_heads, -1, 1)
        if not hasattr(self.scratch, "weights"):
            self.scratch.weights = _aligned((self.num_weights,), self.dtype)
        shape = num_heads, num_queries * self.group, num_keys
        weights = self.scratch.weights[: math.prod(shape)].reshape(shape)
        block = _operand(self.k[b, heads, start:stop], self.dtype)
        np.matmul(rows.reshape(num_heads, -1, head_dim), block.swapaxes(1, 2), out=weights)
        if tile is not None:
            tile.change(weights)
            hidden = tile.hidden
        sees_nothing = lse == -np.inf
        weights -= np.where(sees_nothing, np.inf, lse)
        np.exp(weights, out=weights)
        if hidden is not None:
            # Their bits are cleared: as fast as a product, which would leave what is not a number.
            bits = weights.view(f"i{self.dtype.itemsize}")
            bits &= np.subtract(hidden, 1, dtype=bits.dtype)
        if sees_nothing.any():
            weights[sees_nothing[..., 0]] = 0
        return start, stop, weights.reshape(num_heads, num_queries, self.group, num_keys)


class _Place(NamedTuple):
    """Scores that one task is about; of the queries, which may have a step, by their positions."""

    b: int
    heads: slice  # of keys and values
    members: slice  # of the group of query heads that share one of them
    queries: slice
    keys: slice


class _Scores:
    """What one call does to scores beyond the band, for the tiles of one task: where they are counted from 0 again."""

    def __init__(
        self,
        options: Score,
        place: _Place,
        lengths: tuple[int, int],
        group: int,
        axes: tuple[int, ...],
        dtype: np.dtype,
        d_bias: _Share | None = None,
        d_slopes: _Share | None = None,
        d_captured: Mapping[str, _CapturedShare] | None = None,
        *,
        is_differentiated: bool = False,
    ) -> None:
        """Take the options from ``_grouped_score``, and the order of (heads_kv, member, query, key) in tiles.

        Derivatives of the scores are there only if they are asked for, by ``is_differentiated``.
        """
        b, *where = place
        self.lengths = lengths
        self.options, self.place, self.group, self.axes, self.dtype = options, place, group, axes, dtype
        self.is_forward = axes == FORWARD_AXES
        self.is_differentiated = is_differentiated
        self.step = place.queries.step or 1
        self.group_here = place.members.stop - place.members.start
        self.bias, self.slopes = (
            None if x is None else _piece(x, slice(b, b + 1), *where)[0] for x in (options.bias, options.alibi_slopes)
        )
        self.mask = None
        if options.mask is not None:
            # By blocks its queries and keys are counted from the first ones of all.
            here = where if options.mask_block == (1, 1) else where[:2]
            self.mask = _piece(options.mask, slice(b, b + 1), *here)[0]
        self.sinks = None if options.sinks is None else options.sinks[place.heads, place.members].astype(dtype)
        #: What dropout divides the weights that it keeps by.
        self.kept_share = 1 - options.dropout_p
        self.d_bias, self.d_slopes, self.d_captured = d_bias, d_slopes, d_captured or {}

    def tile(self, heads: slice, queries: slice, keys: slice, hidden: Array | None) -> _ScoreTile | None:
        """What is done to a tile of whose pairs the band hides some; None where nothing of it is visible.

        ``hidden`` is without heads, and its queries and members are one axis, as they are in ``_ScoreTile.hidden``.
        """
        where = heads, slice(0, self.group_here), queries, keys
        sizes = [at.stop - at.start for at in where]
        shape = tuple(sizes[axis] for axis in self.axes)
        mask = self.mask_of_tile(where)
        bias = None if self.bias is None else _piece(self.bias, *where)
        reasons = []
        is_empty = mask is not None and not mask.any()
        if mask is not None and not is_empty and not mask.all():
            reasons.append(~mask)
        if bias is not None and not is_empty:
            bias = bias.astype(self.dtype, copy=False)
            lowest = bias == -np.inf
            if lowest.any():
                reasons.append(lowest)
        if reasons:
            every = np.zeros(shape, bool) if hidden is None else np.empty(shape, bool)
            if hidden is not None:
                every[...] = hidden.reshape(shape[1:])
            for reason in reasons:
                every |= self.laid_out(reason)
            is_empty = bool(every.all())
            rows = sizes[1] * sizes[2]
            hidden = every.reshape(sizes[0], *((sizes[3], rows) if self.is_forward else (rows, sizes[3])))
        if is_empty:
            if self.d_bias is not None:
                self.d_bias.add(where, None)
            return None
        return _ScoreTile(self, where, shape, hidden, bias)

    def mask_of_tile(self, where: tuple[slice, ...]) -> Array | None:
        """The mask of a tile; of one by blocks these blocks, where all or none of them are visible."""
        block = self.options.mask_block
        if self.mask is None or block == (1, 1):
            return None if self.mask is None else _piece(self.mask, *where)
        *outer, queries, keys = where
        q_idx = self.place.queries.start + self.step * np.arange(queries.start, queries.stop)
        k_idx = self.place.keys.start + np.arange(keys.start, keys.stop)
        pairs = zip((q_idx, k_idx), block, strict=True)
        touched = (slice(index[0] // size, index[-1] // size + 1) for index, size in pairs)
        blocks = _piece(self.mask, *outer, *touched)
        if blocks.any() == blocks.all():
            return blocks
        return mask_of_pairs(_piece(self.mask, *outer), block, q_idx, k_idx)

    def laid_out(self, x: Array) -> Array:
        """An array (heads_kv, members, queries, keys), or 1 instead of any of these, in the order of the tile."""
        x_t = x.transpose(self.axes)
        if not self.is_forward or 1 in x.shape[2:]:
            return x_t
        # A copy strip by strip: what is read across the memory's rows stays in the cache meanwhile.
        result = np.empty(x_t.shape, x.dtype)
        for strip in _slices(x.shape[2], STRIP):
            result[:, :, strip] = x_t[:, :, strip]
        return result

    def distances(self, queries: slice, keys: slice) -> Array:
        """How far apart queries and keys of a tile stand, (queries, keys): a view, since diagonals are constant."""
        last = self.place.queries.start + (queries.stop - 1) * self.step + self.options.q_offset
        first_key, num_keys = self.place.keys.start + keys.start, keys.stop - keys.start
        span = (queries.stop - queries.start - 1) * self.step
        diagonals = np.abs(np.arange(first_key - last, first_key - last + span + num_keys)).astype(self.dtype)
        return np.lib.stride_tricks.sliding_window_view(diagonals, num_keys)[:: -self.step]

    def modified(self, scores: Array, heads: slice, queries: slice, keys: slice) -> Evaluated:
        """What the expression makes of a tile of scores."""
        mod = self.options.mod
        assert mod is not None
        starts = self.place.heads.start, self.place.members.start, self.place.queries.start, self.place.keys.start
        steps = 1, 1, self.step, 1
        where = heads, slice(0, self.group_here), queries, keys
        h_kv, member, q_idx, k_idx = (
            (start + step * np.arange(at.start, at.stop)).reshape(np.where(np.equal(self.axes, axis), -1, 1))
            for axis, (at, start, step) in enumerate(zip(where, starts, steps, strict=True))
        )
        indices = {
            "b": self.options.first_batch + self.place.b, "h": h_kv * self.group + member, "h_kv": h_kv,
            "q_idx": q_idx, "k_idx": k_idx, "seqlen_q": self.lengths[0], "seqlen_k": self.lengths[1],
        }  # fmt: skip
        return evaluate(mod.expression, scores, indices, mod.values, derivatives=self.is_differentiated)

    def kept(self, heads: slice, queries: slice, keys: slice) -> Array:
        """Which weights of a tile dropout keeps, (heads_kv, member, queries, keys)."""
        first = [at.start for at in self.place[1:]]
        heads, queries, keys = (
            slice((at.start + start) * step, (at.stop + start) * step)
            for at, start, step in ((heads, first[0], self.group), (queries, first[2], 1), (keys, first[3], 1))
        )
        options = self.options
        kept = rng.keep(options.seed, options.dropout_p, options.first_batch + self.place.b, heads, queries, keys)
        return kept.reshape(-1, self.group, *kept.shape[1:])[:, self.place.members]


class _ScoreTile:
    """What is done to one tile of scores and weights, all in place, and what follows for gradients."""

    def __init__(
        self,
        scores: _Scores,
        where: tuple[slice, ...],
        shape: tuple[int, ...],
        hidden: Array | None,
        bias: Array | None,
    ) -> None:
        self.scores, self.where, self.shape, self.bias = scores, where, shape, bias
        #: Pairs that nobody sees, with or without an axis of heads in front; complete after ``change``.
        self.hidden = hidden
        self.modified: Evaluated | None = None
        self.softcap = scores.options.softcap
        self.slopes = self.distances = None
        self.tanh: Array | None = None
        heads, _, queries, keys = where
        if scores.slopes is not None:
            self.slopes = scores.slopes[heads].astype(scores.dtype)[..., None, None]
            self.distances = scores.distances(queries, keys)
        self.kept = scores.laid_out(scores.kept(heads, queries, keys)) if scores.options.dropout_p else None

    def change(self, scores: Array) -> None:
        """Make scores of products."""
        scores = scores.reshape(self.shape)
        if self.softcap is not None:
            scores /= self.softcap
            np.tanh(scores, out=scores)
            if self.scores.is_differentiated:
                self.tanh = scores.copy()
            scores *= self.softcap
        if self.scores.options.mod is not None:
            heads, _, queries, keys = self.where
            if self.scores.is_forward:
                # Strip by strip: what is computed on the way stays in the cache.
                for strip in _slices(scores.shape[1], EVALUATED):
                    here = slice(keys.start + strip.start, keys.start + strip.stop)
                    scores[:, strip] = self.scores.modified(scores[:, strip], heads, queries, here).score
            else:
                self.modified = self.scores.modified(scores, heads, queries, keys)
                scores[...] = self.modified.score
            lowest = scores == -np.inf
            if lowest.any():
                sizes = lowest.shape
                rows_and_keys = (sizes[1], -1) if self.scores.is_forward else (-1, sizes[3])
                lowest = lowest.reshape(sizes[0], *rows_and_keys)
                self.hidden = lowest if self.hidden is None else lowest | self.hidden
        if self.bias is not None:
            scores += self.scores.laid_out(self.bias)
        if self.slopes is not None and self.distances is not None:
            slopes, distances = (x.transpose(self.scores.axes) for x in (self.slopes, self.distances[None, None]))
            scores -= np.multiply(slopes, distances, out=np.empty_like(scores))

    def hide(self, scores: Array) -> None:
        """Make the scores of hidden pairs -inf, whatever they are."""
        if self.hidden is not None:
            # Several times as fast as copyto(where=), which jumps at every pair. What is not a number and visible
            # becomes infinite, which is as good: its row will be no number.
            ceiling = np.subtract(0.5, self.hidden, dtype=scores.dtype)
            ceiling *= np.inf
            scores = scores.reshape(-1, *ceiling.shape[-2:])
            np.fmin(scores, ceiling, out=scores)

    def clear(self, weights: Array) -> None:
        """Make weights of the smallest exponent, which those of hidden pairs are since ``hide``, 0."""
        smallest = _E.smallest_exponent(weights.dtype)
        weights *= weights > math.exp(smallest) * 2

    def drop(self, weights: Array) -> None:
        """Make zeros of what dropout drops."""
        if self.kept is not None:
            weights = weights.reshape(self.shape)
            weights *= self.kept

    def change_back(self, d_scores: Array) -> None:
        """Make gradients of products of those of scores, which the bias and the slopes receive, too."""
        d_scores = d_scores.reshape(self.shape)
        by_head = d_scores.transpose(0, 2, 1, 3)  # from the order of the backward
        if self.scores.d_bias is not None:
            self.scores.d_bias.add(self.where, by_head)
        if self.scores.d_slopes is not None and self.distances is not None:
            self.scores.d_slopes.add(self.where, -(by_head * self.distances).sum(axis=(2, 3)))
        if self.modified is not None:
            for name, places, partial in self.modified.reads:
                if name in self.scores.d_captured:
                    product = np.multiply(d_scores, partial, out=np.empty_like(d_scores))
                    self.scores.d_captured[name].add_at(places, self._cleared(product))
            d_scores *= self.modified.by_score
        if self.tanh is not None:
            self.tanh *= self.tanh
            d_scores *= np.subtract(1, self.tanh, out=self.tanh)
        if self.modified is not None or self.tanh is not None:
            self._cleared(d_scores)

    def _cleared(self, d_scores: Array) -> Array:
        """The gradients with 0 for what nobody sees: neither scores nor derivatives need be numbers there."""
        if self.hidden is not None:
            np.copyto(d_scores.reshape(-1, *self.hidden.shape[-2:]), 0, where=self.hidden)
        return d_scores


class _Turn:
    """The place of a task in a line of those that add to the same elements, each step by step after the one before.

    Who comes before was started before, so someone can always go on.
    """

    def __init__(self, before: _Turn | None) -> None:
        self.before = before
        self.steps = 0.0
        self.moved = threading.Condition()

    def __enter__(self) -> None:
        if (before := self.before) is not None:
            with before.moved:
                before.moved.wait_for(lambda: before.steps > self.steps)

    def __exit__(self, *_: object) -> None:
        self._move(self.steps + 1)

    def end(self) -> None:
        """Let the next one take all further steps."""
        self.before = None
        self._move(math.inf)

    def _move(self, steps: float) -> None:
        with self.moved:
            self.steps = steps
            self.moved.notify_all()


class _Share:
    """What one task adds to its piece of a gradient that other tasks may add to as well.

    Where the piece is no longer than the sequences, the task sums its own first, and adds once; else tile by tile.
    """

    def __init__(self, target: Array, turn: _Turn, dtype: np.dtype) -> None:
        """Take the piece (heads_kv or 1, members or 1, queries or 1, keys or 1), or without the last two axes."""
        self.target, self.turn, self.dtype = target, turn, dtype
        self.adds_once = target.ndim == 2 or 1 in target.shape[2:]
        self.own: Array | None = None

    def add(self, where: tuple[slice, ...], summand: Array | None) -> None:
        """Take the summand of a tile, (heads_kv, members, queries, keys), before it is summed up, or nothing."""
        if summand is not None:
            broadcast = [axis for axis, size in enumerate(self.target.shape) if size == 1 != summand.shape[axis]]
            summand = summand.sum(axis=tuple(broadcast), keepdims=True) if broadcast else summand
        if not self.adds_once:
            with self.turn:
                if summand is not None:
                    _piece(self.target, *where)[...] += summand
        elif summand is not None:
            assert self.own is not None
            _piece(self.own, *where)[...] += summand

    def __enter__(self) -> None:
        if self.adds_once:
            self.own = np.zeros(self.target.shape, self.dtype)

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None and self.own is not None:
                with self.turn:
                    self._add_own(self.own)
        finally:
            self.turn.end()

    def _add_own(self, own: Array) -> None:
        self.target += own


class _CapturedShare(_Share):
    """What one task adds to the gradient of a captured array; which elements these are, the expression says."""

    def __init__(self, target: Array, turn: _Turn) -> None:
        # One element may be a sum over all pairs, which float32 would lose.
        super().__init__(target, turn, np.dtype(np.float64))
        self.adds_once = True
        #: Holds all elements that are not 0: memory of zeros that nobody touches costs nothing.
        self.box: list[slice] | None = None

    def add_at(self, places: tuple[Array, ...], summand: Array) -> None:
        """Take the summand of a tile, for the element that each place of it has read."""
        assert self.own is not None
        box = [slice(int(place.min()), int(place.max()) + 1) for place in places]
        pairs = zip(box, self.box or box, strict=True)
        self.box = [slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in pairs]
        number = np.zeros((1,) * summand.ndim, np.int64) + flat_index(places, self.target.shape)
        # Those who read the same element by the same index are summed up first, which is many times faster.
        together = tuple(axis for axis, size in enumerate(number.shape) if size == 1)
        summand = summand.sum(axis=together, keepdims=True)
        # Flat, as this is many times faster, too.
        np.add.at(self.own.reshape(-1), number.reshape(-1), summand.reshape(-1).astype(self.dtype))

    def _add_own(self, own: Array) -> None:
        if self.box is not None:
            self.target[*self.box] += own[*self.box]


class _SumInOrder:
    """Sum of parts that come in any order: the last one to arrive adds them up in the order of their keys."""

    def __init__(self, target: Array, num_parts: int) -> None:
        self.target = target
        self.missing = num_parts
        self.parts: dict[int, tuple[slice, Array]] = {}
        self.lock = threading.Lock()

    def add(self, key: int, queries: slice, part: Array) -> None:
        """Take the part of some ``queries``, (heads_kv, queries, group, dim)."""
        with self.lock:
            self.parts[key] = queries, part
            self.missing -= 1
            if self.missing:
                return
        heads, group, num_queries, dim = self.target.shape
        total = np.zeros((heads, num_queries, group, dim), part.dtype)
        for _, (where, summand) in sorted(self.parts.items()):
            total[:, where] += summand
        self.target[...] = total.swapaxes(1, 2)


class _Edge(NamedTuple):
    """Which pairs of a block of the forward are hidden, if some are."""

    hidden: Array  # (keys, rows)
    in_panels: Array  # (panels, keys, rows of a panel)
    visible: Array  # the opposite as factors 0 and 1


#: Keys, the range of rows that see some of them, and what is hidden, if anything.
_KeyBlock = tuple[slice, int, int, _Edge | None]
#: Rows, the range of keys that some of them see, and what is hidden, (rows, keys), if anything.
_QueryBlock = tuple[slice, int, int, Array | None]


@functools.lru_cache(maxsize=16)
def _key_blocks(band: Band, num_queries: int, group: int, num_keys: int, is_cut: bool) -> list[_KeyBlock]:
    """Blocks of visible keys; where products are cut, their rows are whole panels."""
    blocks: list[_KeyBlock] = []
    start, stop = band.key_range(0, num_queries, num_keys)
    while start < stop:
        for width in _widths(FORWARD_N, FORWARD_EDGE):
            end = min(start + width, stop)
            if band.is_full(0, num_queries, start, end):
                blocks.append((slice(start, end), 0, num_queries * group, None))
                break
        else:
            first, last = (query * group for query in band.query_range(start, end, num_queries))
            if is_cut:
                first, last = first // CUT_M * CUT_M, _ceil_div(last, CUT_M) * CUT_M
            if first < last:
                edge = _edge(_moved(band, -start), num_queries, group, end - start, first, last, is_cut)
                blocks.append((slice(start, end), first, last, edge))
        start = end
    return blocks


@functools.lru_cache(maxsize=32)
def _query_blocks(band: Band, num_queries: int, group: int, num_keys: int) -> list[_QueryBlock]:
    """Blocks of rows that see some keys."""
    blocks: list[_QueryBlock] = []
    start, stop = band.query_range(0, num_keys, num_queries)
    while start < stop:
        for height in _widths(BACKWARD_M, BACKWARD_EDGE):
            end = min(start + max(height // group, 1), stop)
            if band.is_full(start, end, 0, num_keys):
                blocks.append((slice(start * group, end * group), 0, num_keys, None))
                break
        else:
            first, last = band.key_range(start, end, num_keys)
            if first < last:
                hidden = _hidden(_moved(band, start - first), end - start, group, last - first)
                blocks.append((slice(start * group, end * group), first, last, hidden))
        start = end
    return blocks


def _key_parts(band: Band, num_queries: int, num_keys: int, num_parts: int) -> list[slice]:
    """Whole blocks of keys in so many parts, each seen by about as many queries: threads are to finish together."""
    blocks = list(_slices(num_keys, BACKWARD_N))
    ranges = (band.query_range(keys.start, keys.stop, num_queries) for keys in blocks)
    seen = np.cumsum([stop - start + 1 for start, stop in ranges])  # one more, so that no part is empty of work
    ends = np.searchsorted(seen, seen[-1] * np.arange(1, num_parts + 1) / num_parts) + 1
    edges = sorted({0, *ends.tolist()})
    return [slice(blocks[i].start, blocks[j - 1].stop) for i, j in itertools.pairwise(edges)]


def _panels(start: int, stop: int, is_cut: bool) -> int:
    """Panels of a range of rows."""
    return (stop - start) // CUT_M if is_cut else 1


def _widths(largest: int, edge: int) -> Iterator[int]:
    """Widths of blocks to try, one after the other; the last is that of a block on the ``edge`` of the band."""
    while largest >= edge:
        yield largest
        largest //= 2


# Few different blocks lie along a diagonal, so what is hidden there is kept.


@functools.lru_cache(maxsize=16)
def _edge(band: Band, num_queries: int, group: int, num_keys: int, start: int, stop: int, is_cut: bool) -> _Edge:
    hidden = np.ascontiguousarray(_hidden(band, num_queries, group, num_keys)[start:stop].T)
    in_panels = np.ascontiguousarray(hidden.reshape(num_keys, _panels(start, stop, is_cut), -1).swapaxes(0, 1))
    return _Edge(hidden, in_panels, (~in_panels).astype(np.float32))


@functools.lru_cache(maxsize=16)
def _hidden(band: Band, num_queries: int, group: int, num_keys: int, step: int = 1) -> Array:
    """Which pairs of a block on the edge of the band are hidden, as (rows, keys); only every so many queries count."""
    q_idx = np.repeat(step * np.arange(num_queries), group)
    return ~band.visible(q_idx[:, None], np.arange(num_keys)[None, :])


def _cut(x: Array, dim: int) -> Array:
    """View (..., rows, columns) as (..., cuts, cuts, rows of a cut, columns of a cut), for sums over columns."""
    *outer, m, n = x.shape
    cut_m, cut_n = (CUT_M, CUT_N) if dim <= CUT_DIM and m % CUT_M == 0 and n % CUT_N == 0 else (m, n)
    return x.reshape(*outer, m // cut_m, cut_m, n // cut_n, cut_n).swapaxes(-3, -2)


def _cut_product(b: Array, out: Array) -> tuple[Array, Array]:
    """Cut ``out`` of a product and its operand ``b``, whose columns are those of ``out``."""
    *outer, dim, _ = b.shape
    out = _cut(out, dim)
    return b.reshape(*outer, 1, dim, -1, out.shape[-1]).swapaxes(-3, -2), out


class _ScoreProduct:
    """``out = a @ b`` per head, with sums over a head dim; prepared for many ``a``."""

    def __init__(self, b: Array, out: Array) -> None:
        """Take b (..., 1, cuts, dim, columns) and out (..., cuts, cuts, rows, columns)."""
        *outer, cuts, _, rows, _ = out.shape
        self.a_shape = *outer, cuts, 1, rows, b.shape[-2]
        self.b = b
        self.out = out

    def __call__(self, a: Array) -> None:
        np.matmul(a.reshape(self.a_shape), self.b, out=self.out)


class _WeightedSum:
    """``total += weights @ rows`` per head, with sums over a block of keys or of rows; prepared for many ``rows``."""

    def __init__(self, weights: Array, dim: int, memory: Array) -> None:
        """Take weights (..., cuts, cuts, rows, columns)."""
        self.weights = weights.swapaxes(-4, -3)
        *outer, parts, cuts, m, n = self.weights.shape
        self.rows_shape = *outer, parts, 1, n, dim
        shape = (*outer, parts, cuts, m, dim)
        self.products = memory[: math.prod(shape)].reshape(shape)
        self.summands = list(np.moveaxis(self.products.reshape(*outer, parts, cuts * m, dim), -3, 0))

    def __call__(self, rows: Array, total: Array, hidden: Array | None) -> None:
        """Add to ``total``; hidden rows do not count, even if they are not finite (0 * nan is nan).

        ``hidden`` is (rows, rows of total), with or without axes in front.
        """
        if hidden is not None and not (finite := np.isfinite(rows).all(axis=-1)).all():
            n = self.weights.shape[-1]
            hidden = np.broadcast_to(hidden, (*rows.shape[:-1], hidden.shape[-1]))
            for *head, i in np.argwhere(~finite):
                seen = ~hidden[*head, i]
                weights = self.weights[*head, i // n, :, :, i % n].reshape(-1)
                total[*head, seen] += weights[seen, None] * rows[*head, i]
            rows = np.where(finite[..., None], rows, 0)
        np.matmul(self.weights, rows.reshape(self.rows_shape), out=self.products)
        for summand in self.summands:
            total += summand


def _largest_norm(x: Array) -> float:
    """Largest Euclidean norm along the last axis; nan if there is one."""
    return math.sqrt(np.einsum("...d,...d->...", x, x).max(initial=0))


def _key_norms(k: Array) -> Array:
    """Largest norm of a key, per (batch, head)."""
    batch, heads, seqlen, _ = k.shape
    norms = np.zeros((batch, heads))

    def task(b: int, chosen: slice) -> None:
        for keys in _slices(seqlen, KEYS_AT_ONCE):
            block = k[b, chosen, keys].astype(_compute_dtype(k), copy=False)
            squares = np.einsum("hjd,hjd->hj", block, block).max(axis=1)
            norms[b, chosen] = np.maximum(norms[b, chosen], np.sqrt(squares))

    head_slices = list(_slices(heads, _heads_per_task(1, seqlen)))
    _run([functools.partial(task, b, chosen) for b in range(batch) for chosen in head_slices])
    return norms


def _compute_dtype(x: Array) -> np.dtype:
    """Dtype of products, sums and softmax."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def _operand(x: Array, dtype: np.dtype) -> Array:
    """``x`` for a product: itself if BLAS can read its rows, else a copy."""
    itemsize = dtype.itemsize
    _, stride, step = x.strides
    if x.dtype == dtype and step == itemsize and stride >= x.shape[2] * itemsize and stride % itemsize == 0:
        return x
    return np.ascontiguousarray(x, dtype)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Uninitialised array on a cache line: NumPy's own start anywhere, and wide loads that cross lines are slow."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _aligned_length(length: int) -> int:
    """Next length of a row after which the next row is aligned, too."""
    return _ceil_div(length, 16) * 16


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _grouped(x: Array, heads_kv: int) -> Array:
    """View (batch, heads, ...) as (batch, heads_kv, group, ...); splitting an axis never copies."""
    batch, heads, *rest = x.shape
    return x.reshape(batch, heads_kv, heads // heads_kv, *rest)


def _grouped_or_one(x: Array, heads_kv: int) -> Array:
    """The same, where there may be one for all heads: view (batch, 1, 1, ...)."""
    return x[:, :, None] if x.shape[1] == 1 else _grouped(x, heads_kv)


def _grouped_score(score: Score, heads_kv: int, dtype: np.dtype) -> Score:
    """Views of the arrays of a score as (batch, heads_kv, group, ...), of length 1 where they are broadcast.

    What the expression captures is in the dtype of scores then.
    """
    arrays: dict[str, Any] = {}
    for name in ("bias", "mask", "alibi_slopes"):
        if (x := getattr(score, name)) is not None:
            x = _grouped(x, heads_kv)
            arrays[name] = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]
    if score.sinks is not None:
        arrays["sinks"] = score.sinks.reshape(heads_kv, -1)
    if score.mod is not None:
        arrays["mod"] = score.mod.with_reals_in(dtype)
    return score._replace(**arrays)


def _piece(x: Array, *where: slice) -> Array:
    """View of a piece of an array, all of it along axes of length 1: there, it is broadcast."""
    pairs = zip(where, x.shape, strict=False)
    return x[tuple(at if size > 1 else slice(None) for at, size in pairs)]


def _moved(band: Band, by: int) -> Band:
    """The band as seen from query ``i`` and key ``j`` with ``i - j == by``, counted from 0 again."""
    lower, upper = (None if bound is None else bound + by for bound in (band.lower, band.upper))
    return Band(lower, upper)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _heads_per_task(rows: int, seqlen_k: int) -> int:
    return max(SMALL_TASK // (max(min(rows, FORWARD_M), 8) * max(seqlen_k, 1)), 1)


def _run(tasks: Sequence[Callable[[], None]]) -> None:
    """Run independent tasks, on as many threads as there are cores to use."""
    num_threads = environment.num_threads() or _usable_cores()
    queue = collections.deque(tasks)

    def work() -> None:
        # Scores that overflow, and what is computed of hidden pairs, are no news. The setting is each thread's own.
        with np.errstate(all="ignore"):
            while True:
                try:
                    task = queue.popleft()
                except IndexError:
                    return
                try:
                    task()
                except BaseException:
                    queue.clear()
                    raise

    with _single_threaded_blas():
        helpers = [_executor(num_threads).submit(work) for _ in range(min(num_threads, len(tasks)) - 1)]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.lru_cache(maxsize=1)
def _executor(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="cuflash")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_executor.cache_clear)  # threads do not survive a fork


class _BlasLimit:
    """Holds BLAS to the calling thread while anyone is inside: on products this small its own threads only wait."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.undo: Callable[[], object]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.users == 0:
                self.undo = _limit_blas()
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self.undo()


_single_threaded_blas = _BlasLimit()


def _limit_blas() -> Callable[[], object]:
    """Set BLAS to one thread; return what undoes that."""
    if functions := _openblas_functions():
        get_num_threads, set_num_threads = functions
        before = get_num_threads()
        set_num_threads(1)
        return functools.partial(set_num_threads, before)
    if controller := _threadpool_controller():
        undo: Callable[[], object] = controller.limit(limits=1, user_api="blas").restore_original_limits
        return undo
    return lambda: None


@functools.lru_cache(maxsize=1)
def _openblas_functions() -> tuple[Any, Any] | None:
    """Functions ``get_num_threads`` and ``set_num_threads`` of the OpenBLAS that NumPy is linked with, if it is."""
    library = ctypes.CDLL(numpy.linalg._umath_linalg.__file__)  # symbols are looked up in its dependencies, too
    for name in (
        "scipy_openblas_{}_num_threads64_",
        "scipy_openblas_{}_num_threads",
        "openblas_{}_num_threads64_",
        "openblas_{}_num_threads",
    ):
        if hasattr(library, name.format("set")):
            return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None


@functools.lru_cache(maxsize=1)
def _threadpool_controller() -> Any:
    """Controller of threadpoolctl, for other libraries than OpenBLAS, if it is installed."""
    try:
        return importlib.import_module("threadpoolctl").ThreadpoolController()
    except ImportError:
        return None
