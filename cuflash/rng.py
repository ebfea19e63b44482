"""Random bits of dropout: a counter-based generator, the same on the CPU and in every kernel.

Whether a weight is kept is a pure function of the seed and of where the weight stands: (batch, head, query, key). No
path, tile size or order of work changes it. One call of the generator, Philox4x32 with seven rounds [1]_, serves the
eight weights of a block of 16 x 16 that one lane of a tensor-core fragment holds: rows g and g + 8, columns 2t, 2t + 1,
2t + 8 and 2t + 9 belong to lane 4 g + t. Each takes 16 bits, so the probability of keeping is a multiple of 2 ** -16.

.. [1] J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray

#: Side of the blocks of weights, and numbers that 16 bits can be.
BLOCK = 16
LEVELS = 1 << 16

_ROUNDS = 7
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: tuple[Array, Array, Array, Array], seed: int, rounds: int = _ROUNDS) -> Array:
    """Four 32-bit words for each 128-bit counter, given as four arrays that broadcast: shape (4, ...), uint32."""
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    words = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    shape = words[0].shape
    # Copies, which take turns with two more arrays.
    c0, c1, c2, c3 = (word.flatten() for word in words)
    product0, product1 = np.empty_like(c0), np.empty_like(c2)
    for _ in range(rounds):
        np.multiply(c0, _MULTIPLIERS[0], out=product0)
        np.multiply(c2, _MULTIPLIERS[1], out=product1)
        for c, product, other, key in ((c0, product1, c1, key0), (c2, product0, c3, key1)):
            np.right_shift(product, _HALF, out=c)
            c ^= other
            c ^= np.uint64(key)
            np.bitwise_and(product, _WORD, out=other)
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF
    result = np.empty((4, c0.size), np.uint32)
    for word, c in zip(result, (c0, c1, c2, c3), strict=True):
        word[...] = c
    return result.reshape(4, *shape)


def threshold(dropout_p: float) -> int:
    """How many of the numbers of 16 bits drop a weight."""
    return round(dropout_p * LEVELS)


def keep(seed: int, dropout_p: float, batch: int, heads: slice, queries: slice, keys: slice) -> Array:
    """Which weights of some heads are kept, as booleans (heads, queries, keys)."""
    first_q, first_k = queries.start // BLOCK, keys.start // BLOCK
    num_q, num_k = (-(-end // BLOCK) - first for end, first in ((queries.stop, first_q), (keys.stop, first_k)))
    # Axes: head, block of queries, g, and (block of keys, t) in one.
    head = np.arange(heads.start, heads.stop)[:, None, None, None]
    block_q = np.arange(first_q, first_q + num_q)[:, None, None]
    g = np.arange(8)[:, None]
    block_k = np.repeat(np.arange(first_k, first_k + num_k), 4)
    t = np.tile(np.arange(4), num_k)
    words = philox((block_k, block_q, np.array(batch), head * 32 + g * 4 + t), seed)
    # Word 2 j + n is that of columns 2t + j + 8n; its low half is of row g, its high half of row g + 8.
    kept = words.astype("<u4", copy=False).view("<u2") >= threshold(dropout_p)
    # The two of j stand side by side, and move as one.
    pairs = np.stack((kept[:2], kept[2:]), axis=-1).view(np.uint16)
    pairs = pairs.reshape(2, *words.shape[1:-1], num_k, 4, 2)  # n, head, block of queries, g, block of keys, t, half
    pairs = pairs.transpose(1, 2, 6, 3, 4, 0, 5)  # head; block, half, g; block, n, t
    kept = np.ascontiguousarray(pairs).view(bool).reshape(len(head), num_q * BLOCK, num_k * BLOCK)
    rows = slice(queries.start - first_q * BLOCK, queries.stop - first_q * BLOCK)
    columns = slice(keys.start - first_k * BLOCK, keys.stop - first_k * BLOCK)
    return kept[:, rows, columns]


def dropout_mask(seed: int, dropout_p: float, shape: tuple[int, ...], first_batch: int = 0) -> Array:
    """Which weights are kept, for all of (..., heads, seqlen_q, seqlen_k); batch axes are counted in C order."""
    *batch, heads, seqlen_q, seqlen_k = shape
    every = slice(0, heads), slice(0, seqlen_q), slice(0, seqlen_k)
    masks = [keep(seed, dropout_p, first_batch + index, *every) for index in range(math.prod(batch))]
    return np.array(masks, dtype=bool).reshape(shape)
