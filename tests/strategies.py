"""Attention calls for tests: one `Case` says everything about a call, `cases()` draws them.

A case is plain data, so that a failing one can be pasted into a test. Its arrays are made on the host and
handed to `to_device` (`cupy.asarray`, say), in memory that is NaN wherever the operands themselves are not:
whatever reads beyond an operand shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

import cuflash
from cuflash.scores import Band, make_band

try:
    import ml_dtypes
except ImportError:  # an optional dependency: bfloat16 is then not tested
    ml_dtypes = None

DTYPES = ("float16", "float32", "float64") + (("bfloat16",) if ml_dtypes is not None else ())

#: Tile sizes that configurations are made of; lengths at their multiples, plus and minus one, are where kernels break.
TILES = (16, 32, 48, 64, 80, 96, 112, 128)
#: Head dims with a table row of their own.
TUNED_HEAD_DIMS = (32, 64, 96, 128, 192, 256)

#: How an operand lies in memory; see `stored`.
STORAGES = ("contiguous", "padded", "odd_rows", "offset", "sliced", "transposed", "broadcast")


def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of a dtype name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@dataclass(frozen=True)
class Case:
    """One attention call with its inputs: everything that a test needs to make and judge it."""

    dtype: str = "float16"
    batch: int = 1
    num_heads: int = 1
    num_heads_kv: int = 1
    seqlen_q: int = 64
    seqlen_k: int = 64
    head_dim: int = 64
    head_dim_v: int = 64
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int | None = None
    scale: float | None = None
    layout: str = "bhsd"
    #: Storage of q, k, v and d_out.
    storage: tuple[str, str, str, str] = ("contiguous",) * 4
    #: Standard deviation of q and k: large values give peaked, nearly one-hot rows.
    spread: float = 1.0
    seed: int = 0

    @property
    def band(self) -> Band:
        """The visible pairs."""
        return make_band(self.is_causal, self.window, self.q_offset, self.seqlen_q, self.seqlen_k)

    @property
    def softmax_scale(self) -> float:
        """The scale, or what it defaults to."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public functions, without those that are at their default."""
        given = {
            "is_causal": (self.is_causal, False),
            "window": (self.window, None),
            "q_offset": (self.q_offset, None),
            "scale": (self.scale, None),
            "layout": (self.layout, "bhsd"),
        }
        return {name: value for name, (value, default) in given.items() if value != default}

    def __str__(self) -> str:
        """Return a test id that says how this case differs from the default one."""
        parts = [
            f"{self.dtype}-b{self.batch}-h{self.num_heads}.{self.num_heads_kv}",
            f"s{self.seqlen_q}.{self.seqlen_k}-d{self.head_dim}.{self.head_dim_v}",
        ]
        parts += [f"{name}={value}" for name, value in self.options.items()]
        if set(self.storage) != {"contiguous"}:
            parts.append(self.storage[0] if len(set(self.storage)) == 1 else ".".join(self.storage))
        return "-".join(parts).replace(" ", "")


class Operands(NamedTuple):
    """The arrays of one case, in its layout."""

    q: Any
    k: Any
    v: Any
    d_out: Any


def make_operands(case: Case, to_device: Callable[[np.ndarray], Any] = np.asarray) -> Operands:
    """Random operands of a case, stored as it says."""
    rng = np.random.default_rng(case.seed)
    lengths = (case.seqlen_q, case.seqlen_k, case.seqlen_k, case.seqlen_q)
    heads = (case.num_heads, case.num_heads_kv, case.num_heads_kv, case.num_heads)
    dims = (case.head_dim, case.head_dim, case.head_dim_v, case.head_dim_v)
    spreads = (case.spread, case.spread, 1.0, 1.0)
    arrays = []
    for length, num_heads, dim, spread, storage in zip(lengths, heads, dims, spreads, case.storage, strict=True):
        values = spread * rng.standard_normal((case.batch, num_heads, length, dim))
        if case.layout == "bshd":
            values = values.swapaxes(1, 2)
        arrays.append(stored(values.astype(numpy_dtype(case.dtype)), storage, to_device))
    return Operands(*arrays)


#: Elements of NaN before and after every operand; a multiple of every alignment that a kernel asks for.
_GUARD = 256


def stored(values: np.ndarray, storage: str, to_device: Callable[[np.ndarray], Any] = np.asarray) -> Any:
    """Put the 4-D `values` into a larger buffer of NaN, as a view with the strides that `storage` names.

    contiguous: C order. padded: a gap after each row, which keeps rows aligned. odd_rows: a gap of one element
    after each row. offset: C order, starting one element off alignment. sliced: the middle of a larger array.
    transposed: the leading three axes lie in memory in reverse order. broadcast: the first batch entry, repeated
    by a stride of 0.
    """
    if storage == "broadcast":
        one = stored(values[:1], "contiguous", to_device)
        shape = values.shape
        return one if shape[0] < 2 else _repeat(one, shape[0])
    order, offset = (0, 1, 2, 3), 0
    pads = [(0, 0), (0, 0), (0, 0), (0, 0)]
    if storage == "padded":
        pads[3] = (0, 16 - values.shape[3] % 16)
    elif storage == "odd_rows":
        pads[3] = (0, 1 + values.shape[3] % 2)
    elif storage == "offset":
        offset = 1
    elif storage == "sliced":
        pads = [(1, 1), (2, 1), (3, 2), (8, 24)]
    elif storage == "transposed":
        order = (2, 1, 0, 3)
    elif storage != "contiguous":
        raise ValueError(f"unknown storage {storage!r}, wanted one of {STORAGES}")

    padded_shape = [length + before + after for length, (before, after) in zip(values.shape, pads, strict=True)]
    memory_shape = [padded_shape[axis] for axis in order]
    inside = tuple(slice(before, before + length) for length, (before, _) in zip(values.shape, pads, strict=True))
    size = math.prod(memory_shape)

    def view(flat: Any) -> Any:
        memory = flat[_GUARD + offset : _GUARD + offset + size].reshape(memory_shape)
        return memory.transpose([order.index(axis) for axis in range(4)])[inside]

    flat = np.full(size + offset + 2 * _GUARD, np.nan, dtype=values.dtype)
    view(flat)[...] = values
    return view(to_device(flat))


def _repeat(array: Any, batch: int) -> Any:
    """`array` repeated along its leading axis of size 1 with stride 0, in its own framework."""
    if isinstance(array, np.ndarray):
        return np.broadcast_to(array, (batch, *array.shape[1:]))
    import cupy  # every array of these tests that is not NumPy's is CuPy's

    return cupy.broadcast_to(array, (batch, *array.shape[1:]))


def lengths(max_value: int) -> st.SearchStrategy[int]:
    """Sequence lengths: 0, 1, multiples of the tile sizes and their neighbours, and any other."""
    edges = {0, 1} | {n + step for tile in TILES for n in range(tile, max_value + 1, tile) for step in (-1, 0, 1)}
    return st.one_of(st.sampled_from(sorted(n for n in edges if n <= max_value)), st.integers(0, max_value))


def head_dims() -> st.SearchStrategy[int]:
    """Head dims: half of them tuned ones, any up to 256, and one in sixteen above."""

    def of_kind(kind: int) -> st.SearchStrategy[int]:
        if kind < 8:
            return st.sampled_from(TUNED_HEAD_DIMS)
        return st.integers(1, 256) if kind < 15 else st.integers(257, 320)

    return st.integers(0, 15).flatmap(of_kind)


@st.composite
def bands(draw: st.DrawFn, max_distance: int) -> dict[str, Any]:
    """`is_causal`, `window` and `q_offset`; offsets may be negative, and may hide everything."""
    bound = st.one_of(st.none(), st.integers(0, max_distance))
    return {
        "is_causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(bound, bound))),
        "q_offset": draw(st.one_of(st.none(), st.integers(-2 * max_distance, 2 * max_distance))),
    }


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = DTYPES,
    dims: st.SearchStrategy[tuple[int, int]] | None = None,
    storages: Sequence[str] = STORAGES,
    max_seqlen: int = 300,
    max_batch: int = 3,
) -> Case:
    """Any call of the public functions on 4-D operands; `dims` draws (head_dim, head_dim_v)."""
    if dims is None:
        dims = head_dims().flatmap(lambda dim: st.tuples(st.just(dim), st.one_of(st.just(dim), head_dims())))
    head_dim, head_dim_v = draw(dims)
    num_heads_kv = draw(st.integers(1, 3))
    storage = st.sampled_from(tuple(storages))
    return Case(
        dtype=draw(st.sampled_from(tuple(dtypes))),
        batch=draw(st.integers(1, max_batch)),
        num_heads=num_heads_kv * draw(st.sampled_from((1, 2, 3, 4, 8))),
        num_heads_kv=num_heads_kv,
        seqlen_q=draw(lengths(max_seqlen)),
        seqlen_k=draw(lengths(max_seqlen)),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        **draw(bands(max_seqlen)),
        scale=draw(st.one_of(st.none(), st.sampled_from((0.0, 0.3, -0.2)))),
        layout=draw(st.sampled_from(("bhsd", "bshd"))),
        storage=(draw(storage), draw(storage), draw(storage), draw(storage)),
        spread=draw(st.sampled_from((1.0, 3.0))),
        seed=draw(st.integers(0, 999)),
    )


#: Expressions that change scores, of each a compiled one: a product and a sum, with pairs that it hides; and one that
#: leaves scores in sight, whatever else is done to them.
EXPRESSIONS = {
    "expression": "score * gate[h] + rel[h_kv, q_idx - k_idx + 8] if seen[b, k_idx] or k_idx < 2 else -inf",
    "curve": "score + temperature * tanh(0.5 * score) - slope * (k_idx % 3) / seqlen_k",
}


def make_mod(name: str, case: Case, put: Callable[[np.ndarray], Any] = np.asarray) -> cuflash.ScoreMod:
    """The expression of that name, with arrays that fit the case."""
    draw = np.random.default_rng(case.seed)
    if name == "curve":
        return cuflash.score_mod(EXPRESSIONS[name], temperature=put(np.array(0.7)), slope=0.25)
    dtype = np.float32 if case.dtype == "bfloat16" else np.dtype(case.dtype)
    return cuflash.score_mod(
        EXPRESSIONS[name],
        gate=put(
            (1 + 0.3 * draw.standard_normal(case.num_heads)).astype(
                np.float64 if case.dtype == "float64" else np.float32
            )
        ),
        rel=put(draw.standard_normal((case.num_heads_kv, 17)).astype(dtype)),
        seen=put(draw.random((case.batch, case.seqlen_k)) < 0.8),
    )
