"""Which keys a query may see, and what is done to a score: one definition for every path.

The CPU path, the planner, the FLOP counts and the tests all ask this module; the kernels mirror
it in ``kernels_cu/attention/mask.cuh`` and ``block_range.cuh``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .expression import Bound


class Extras(NamedTuple):
    """The arrays beside q, k and v, or what is known of each; None for what the call does not have."""

    mask: Any = None
    bias: Any = None
    alibi_slopes: Any = None
    sinks: Any = None

    def map(self, function: Callable[..., Any], *others: Iterable[Any]) -> Extras:
        """What the function makes of each that is there, and of what the others have in its place."""
        values = zip(self, *others, strict=True)
        return Extras(*(None if value[0] is None else function(*value) for value in values))


#: A call with none of them.
NO_EXTRAS = Extras()


class Score(NamedTuple):
    """What becomes of the scores ``scale * q.k`` of one call before, and of weights after, the softmax.

    In this order: ``softcap * tanh(s / softcap)``; the expression; ``+ bias``; ``- slope * |i + q_offset - j|``
    (ALiBi); hidden where the mask is False; softmax over keys and the sink; weights that dropout keeps times
    ``1 / (1 - dropout_p)``, the others 0.
    Arrays are those of one framework; None stands for what the call does not have.
    """

    softcap: float | None = None
    #: Broadcast to (batch, num_heads, seqlen_q, seqlen_k). -inf hides a pair like the mask.
    bias: Any = None
    #: Boolean, True where a query sees a key; broadcasts like the bias.
    mask: Any = None
    #: (batch or 1, num_heads), and where query 0 stands among the keys.
    alibi_slopes: Any = None
    q_offset: int = 0
    #: (num_heads,): one more logit per row, of a key whose value is 0.
    sinks: Any = None
    dropout_p: float = 0.0
    seed: int = 0
    #: Number of the first batch entry here, as the generator counts them.
    first_batch: int = 0
    #: An expression of the user's. A score that it makes -inf is hidden like one by the mask. Its ``b`` is the batch
    #: entry, counted from `first_batch` on.
    mod: Bound | None = None
    #: The queries and keys that an element of the mask stands for.
    mask_block: tuple[int, int] = (1, 1)

    @property
    def is_plain(self) -> bool:
        """Whether nothing at all is done."""
        arrays = (self.mod, self.bias, self.mask, self.alibi_slopes, self.sinks)
        return self.softcap is None and self.dropout_p == 0 and all(array is None for array in arrays)


def mask_of_pairs(mask: Any, block: tuple[int, int], q_idx: Any, k_idx: Any) -> Any:
    """Of a mask by blocks the elements of these queries and keys, (..., queries, keys); 1 where it is broadcast."""
    for axis, index, size in ((-2, q_idx, block[0]), (-1, k_idx, block[1])):
        if mask.shape[axis] > 1:
            mask = mask.take(index // size, axis)
    return mask


@dataclass(frozen=True, slots=True)
class Band:
    """The diagonal band of visible (query, key) pairs: ``i + lower <= j <= i + upper``.

    Causal attention and sliding windows are both bands; ``None`` leaves a side open. Both bounds
    are inclusive and already contain the query offset, so that nothing after argument checking
    needs to know whether a bound came from ``is_causal`` or from ``window``.
    """

    lower: int | None = None
    upper: int | None = None

    @property
    def is_open(self) -> bool:
        """True where every pair is visible."""
        return self.lower is None and self.upper is None

    def visible(self, q_idx: Any, k_idx: Any) -> Any:
        """Boolean visibility of the pairs (q_idx, k_idx); broadcasts like the operators it uses."""
        result: Any = (q_idx == q_idx) & (k_idx == k_idx)
        if self.lower is not None:
            result = result & (k_idx >= q_idx + self.lower)
        if self.upper is not None:
            result = result & (k_idx <= q_idx + self.upper)
        return result

    def key_range(self, q_start: int, q_stop: int, seqlen_k: int) -> tuple[int, int]:
        """Smallest ``[start, stop)`` holding every key that a query of ``[q_start, q_stop)`` sees."""
        start = 0 if self.lower is None else max(0, q_start + self.lower)
        stop = seqlen_k if self.upper is None else min(seqlen_k, q_stop + self.upper)
        return (start, stop) if q_start < q_stop and start < stop else (0, 0)

    def query_range(self, k_start: int, k_stop: int, seqlen_q: int) -> tuple[int, int]:
        """Smallest ``[start, stop)`` holding every query that sees a key of ``[k_start, k_stop)``."""
        start = 0 if self.upper is None else max(0, k_start - self.upper)
        stop = seqlen_q if self.lower is None else min(seqlen_q, k_stop - self.lower)
        return (start, stop) if k_start < k_stop and start < stop else (0, 0)

    def is_full(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> bool:
        """True where every query of the block sees every key of the block (no mask needed)."""
        return (self.lower is None or k_start >= q_stop - 1 + self.lower) and (
            self.upper is None or k_stop - 1 <= q_start + self.upper
        )

    def num_visible(self, seqlen_q: int, seqlen_k: int) -> int:
        """Number of visible pairs, in O(1); what FLOP counts are made of."""
        hidden_right = 0
        if self.upper is not None:
            hidden_right = _staircase(seqlen_q, seqlen_k, self.upper + 1)
        hidden_left = 0
        if self.lower is not None:
            # Mirror both axes: keys left of the band become keys right of the mirrored band.
            hidden_left = _staircase(seqlen_q, seqlen_k, seqlen_k - seqlen_q - self.lower + 1)
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            return 0
        return seqlen_q * seqlen_k - hidden_right - hidden_left


def _staircase(rows: int, columns: int, first: int) -> int:
    """Sum over i in [0, rows) of the number of columns j with ``first + i <= j < columns``."""
    # Row i hides columns - clip(first + i, 0, columns) of them.
    full_rows = min(max(-first, 0), rows)  # rows where everything is hidden
    last = min(rows, columns - first)  # rows from here on hide nothing
    steps = max(last - full_rows, 0)
    top = columns - (first + full_rows)  # hidden in the first partial row
    return full_rows * columns + steps * top - steps * (steps - 1) // 2


def make_band(
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    q_offset: int | None,
    seqlen_q: int,
    seqlen_k: int,
) -> Band:
    """Band of a call: bottom-right aligned unless ``q_offset`` says where query 0 stands.

    Bounds that hide nothing for these lengths are dropped, so that equal problems compare equal
    and use the same kernel.
    """
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    left, right = window if window is not None else (None, None)
    if is_causal:
        right = 0 if right is None else min(right, 0)
    lower = None if left is None else offset - left
    upper = None if right is None else offset + right
    if lower is not None and lower <= -(seqlen_q - 1):
        lower = None
    if upper is not None and upper >= seqlen_k - 1:
        upper = None
    return Band(lower, upper)
