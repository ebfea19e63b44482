"""User arguments -> Problem and canonical strides; every error a user can make is raised here.

Canonical operands are 4-D: (batch, heads, seqlen, dim) in that order, whatever the layout, with
broadcast axes at stride 0 and dim contiguous. Batch axes that the strides of all operands allow to
be one axis are one; what is left over in front of it is looped over, one launch each.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from numbers import Real
from typing import Any, NamedTuple

import numpy

from .arrays import ALIGNMENT, CPU, ArrayView
from .expression import Expression
from .problem import ITEMSIZE, CapturedArray, Features, Mod, Problem
from .scores import NO_EXTRAS, Band, Extras, make_band
from .tensor_map import STRIDE_LIMIT

#: What to convert other dtypes to; anything not listed goes to float32.
_NEAREST_DTYPE = {
    "float8_e4m3fn": "float16",
    "float8_e5m2": "float16",
    "int64": "float64",
    "uint64": "float64",
    "longdouble": "float64",
    "float128": "float64",
}

LAYOUTS = ("bhsd", "bshd")
PRECISIONS = (None, "ieee", "tf32")


class ScoreModOption(NamedTuple):
    """What of a ``score_mods.ScoreMod`` shapes a call: all but its arrays."""

    expression: Expression
    numbers: tuple[float, ...]


class Options(NamedTuple):
    """The options that shape a call, as the user gave them; hashable, part of the cache key."""

    is_causal: Any = False
    window: Any = None
    q_offset: Any = None
    scale: Any = None
    layout: Any = "bhsd"
    precision: Any = None
    deterministic: Any = False
    softcap: Any = None
    dropout_p: Any = 0.0
    #: An expression, and the numbers that it captures.
    score_mod: ScoreModOption | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One checked call: forward, backward, or for weights.

    ``strides`` holds one tuple per operand, in the order of the kernel's arguments:
    (*loop, batch, head, row), in elements, where ``loop`` are the axes to launch over one by one.
    """

    problem: Problem
    device: int
    loop: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    #: Of every operand the memory it lies in, as bytes [low, high) from its first element.
    spans: tuple[tuple[int, int], ...]
    #: Of the user's shape: leading axes as broadcast, axes in the order of the layout.
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    #: Of d_q, d_k and d_v before they are summed to the shapes of q, k and v; backward only.
    gradient_shapes: tuple[tuple[int, ...], ...] = ()
    #: Strides of the extras, in elements: (*loop, batch, head, query, key), or the first of these that they have.
    extras: Extras = NO_EXTRAS
    #: Their itemsizes, as kernels see them: slopes and sinks come in the dtype that sums have.
    itemsizes: Extras = NO_EXTRAS
    #: The same of the gradients that are asked for, which are arrays in C order with the shapes of the extras; that by
    #: the bias has a shape of its own, and is yet to be summed to that of the bias.
    d_extras: Extras = NO_EXTRAS
    d_bias_shape: tuple[int, ...] = ()
    #: The arrays that an expression captures, in its order; and whether gradients by them are asked for.
    captured: tuple[CapturedArray, ...] = ()
    d_captured: tuple[bool, ...] = ()
    #: The queries whose weights are asked for, by their positions in the whole q, which is what ``problem`` and
    #: ``strides`` are about. None where there is no row of results per query.
    rows: range | None = None

    @property
    def has_rows(self) -> bool:
        """False where there is no query row, so that out and lse have no element."""
        return 0 not in self.lse_shape

    @property
    def has_pairs(self) -> bool:
        """False where there is no (query, key) pair, so that all gradients are zero."""
        return self.has_rows and self.problem.seqlen_k > 0

    def offsets(self) -> Iterator[tuple[int, ...]]:
        """For every launch the offset in bytes of every operand, and last that of the LSE."""
        itemsize = ITEMSIZE[self.problem.dtype]
        depth = len(self.loop)
        lse_bytes = ITEMSIZE[self.problem.lse_dtype] * math.prod(self.lse_shape) // max(math.prod(self.loop), 1)
        for launch, index in enumerate(product(*map(range, self.loop))):
            yield (
                *(itemsize * sum(map(operator.mul, index, strides[:depth])) for strides in self.strides),
                launch * lse_bytes,
            )


# --- the public entry points of this module ---------------------------------------------------------------------


def check_seed(seed: Any, dropout_p: Any) -> int:
    """The seed as 64 bits; 0 where there is none and none is needed."""
    if seed is None:
        if isinstance(dropout_p, Real) and dropout_p == 0:
            return 0
        raise ValueError("seed: got None, wanted an integer, as dropout_p is not 0 (PyTorch tensors have a generator)")
    try:
        return operator.index(seed) & 0xFFFFFFFFFFFFFFFF
    except TypeError:
        raise TypeError(f"seed: got {seed!r}, wanted an integer") from None


def check_seed_array(view: ArrayView) -> None:
    """Raise for an array on a GPU that holds no seed."""
    if view.dtype not in ("int64", "uint64") or math.prod(view.shape) != 1:
        raise TypeError(f"seed: got an array of {view.dtype} {view.shape}, wanted one int64 or uint64")


def check_dropout_p(dropout_p: Any) -> float:
    """The probability of dropping a weight."""
    if not isinstance(dropout_p, Real) or isinstance(dropout_p, bool):
        raise TypeError(f"dropout_p: got {type(dropout_p).__name__}, wanted a real number")
    dropout_p = float(dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: got {dropout_p}, wanted a probability in [0, 1)")
    return dropout_p


def check_weights_shape(shape: Any) -> tuple[int, ...]:
    """(..., heads, seqlen_q, seqlen_k)."""
    try:
        lengths = tuple(map(operator.index, shape))
    except TypeError:
        raise TypeError(f"shape: got {shape!r}, wanted integers, (..., heads, seqlen_q, seqlen_k)") from None
    if len(lengths) < 3 or min(lengths) < 0:
        raise ValueError(f"shape: got {lengths}, wanted (..., heads, seqlen_q, seqlen_k), none of them negative")
    return lengths


def forward(
    q: ArrayView,
    k: ArrayView,
    v: ArrayView,
    out: ArrayView | None,
    options: Options,
    extras: Extras = NO_EXTRAS,
    captured: Sequence[ArrayView] = (),
) -> Call:
    """Check a forward call. Operands: q, k, v, out; the extras, and what an expression captures, are views, too."""
    shapes = _check_inputs(q, k, v, options)
    out_axes = _allocated(shapes.out_shape, shapes) if out is None else _check_out(out, q, shapes)
    return _call(shapes, [shapes.q, shapes.k, shapes.v, out_axes], options, q, extras, captured)


def backward(
    d_out: ArrayView,
    q: ArrayView,
    k: ArrayView,
    v: ArrayView,
    out: ArrayView,
    lse: ArrayView,
    d_lse: ArrayView | None,
    options: Options,
    extras: Extras = NO_EXTRAS,
    captured: Sequence[ArrayView] = (),
    wanted: Extras = NO_EXTRAS,
    wanted_captured: Sequence[bool] = (),
) -> Call:
    """Check a backward call. Operands: d_out, q, k, v, out, d_q, d_k, d_v; other gradients if ``wanted``."""
    shapes = _check_inputs(q, k, v, options)
    for view in (d_out, out):
        _check_like_q(view, q)
        _check_shape(view, shapes.out_shape, "the shape of the forward result")
        _check_last_axis(view)
    for statistic in (lse,) if d_lse is None else (lse, d_lse):
        _check_statistic(statistic, q, shapes)
    gradient_shapes = (
        shapes.user_shape(shapes.num_heads, shapes.seqlen_q, shapes.head_dim),
        shapes.user_shape(shapes.num_heads_kv, shapes.seqlen_k, shapes.head_dim),
        shapes.user_shape(shapes.num_heads_kv, shapes.seqlen_k, shapes.head_dim_v),
    )
    operands = [
        _axes(d_out, shapes.layout),
        shapes.q,
        shapes.k,
        shapes.v,
        _axes(out, shapes.layout),
        *(_allocated(shape, shapes) for shape in gradient_shapes),
    ]
    call = _call(shapes, operands, options, q, extras, captured, wanted, gradient_shapes)
    if call.problem.deterministic and call.device != CPU and any(wanted_captured):
        raise NotImplementedError(
            "deterministic: got True for the gradient by an array that score_mod captures, which a GPU sums in no "
            "fixed order; wanted False, or arrays on the CPU"
        )
    return replace(call, d_captured=tuple(wanted_captured))


def weights(
    q: ArrayView,
    k: ArrayView,
    lse: ArrayView,
    rows: Any,
    options: Options,
    extras: Extras = NO_EXTRAS,
    captured: Sequence[ArrayView] = (),
) -> Call:
    """Check a call for the weights of some queries. Operands: q, k; the result lies in C order, as the LSE does."""
    call = received(q, k, lse, options, extras, captured)
    chosen = _check_rows(rows, call.problem.seqlen_q)
    return replace(call, out_shape=(*call.lse_shape[:-1], len(chosen), call.problem.seqlen_k), rows=chosen)


def received(
    q: ArrayView,
    k: ArrayView,
    lse: ArrayView,
    options: Options,
    extras: Extras = NO_EXTRAS,
    captured: Sequence[ArrayView] = (),
) -> Call:
    """Check a call for the sums of weights over all queries. Operands and result are like those of ``weights``."""
    shapes = _check_inputs(q, k, None, options)
    try:
        is_whole = numpy.broadcast_shapes(shapes.batch_shape, lse.shape[:-2]) == lse.shape[:-2]
    except ValueError:
        is_whole = False
    if is_whole:
        # Some of its axes may be those of values that had more of them than q and k.
        shapes = replace(shapes, batch_shape=lse.shape[:-2], has_heads=shapes.has_heads or lse.ndim > 1)
    _check_statistic(lse, q, shapes)
    call = _call(shapes, [shapes.q, shapes.k], options, q, extras, captured)
    return replace(call, out_shape=(*call.lse_shape[:-1], call.problem.seqlen_k))


def check_device(problem: Problem, compute_capability: int, device: int) -> None:
    """Raise where the GPU cannot compute the problem."""
    version = f"{compute_capability // 10}.{compute_capability % 10}"
    if compute_capability < 75:
        raise RuntimeError(
            f"cuda:{device} has compute capability {version}, wanted 7.5 (Turing) or newer; compute on the CPU instead"
        )
    if problem.dtype == "bfloat16" and compute_capability < 80:
        raise TypeError(
            f"q: got bfloat16 on cuda:{device}, whose compute capability {version} has no bfloat16 (8.0 has); "
            "wanted float16 or float32"
        )


def check_disjoint(out: ArrayView, view: ArrayView) -> None:
    """Raise ValueError where ``out`` shares an element with an input. Exact, and reads no memory."""
    if view.is_empty or out.is_empty:
        return

    def stand_in(view: ArrayView) -> numpy.ndarray:
        # The memory may be on a GPU: only its addresses are compared.
        interface = {
            "version": 3,
            "data": (view.pointer, True),
            "shape": view.shape,
            "strides": tuple(stride * view.itemsize for stride in view.strides),
            "typestr": f"|V{view.itemsize}",
        }
        return numpy.asarray(type("StandIn", (), {"__array_interface__": interface})())

    try:
        overlap = numpy.shares_memory(stand_in(out), stand_in(view), max_work=10_000)  # type: ignore[arg-type]
    except numpy.exceptions.TooHardError:
        overlap = True
    if overlap:
        raise ValueError(f"out: overlaps {view.name} in memory, wanted an array of its own")


def check_parts(outs: Sequence[Any], lses: Sequence[Any]) -> None:
    """Check the lengths and shapes of partial results that are to be merged."""
    if len(outs) != len(lses):
        raise ValueError(f"lses: got {len(lses)} of them, wanted {len(outs)}, one for each of outs")
    if not outs:
        raise ValueError("outs: got no partial results, wanted at least one")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if not hasattr(out, "shape") or not hasattr(lse, "shape"):
            continue  # not an array, which is another function's to say
        if tuple(out.shape) != tuple(outs[0].shape):
            raise ValueError(f"outs[{i}]: got shape {tuple(out.shape)}, wanted {tuple(outs[0].shape)} as outs[0] has")
        if tuple(lse.shape) != tuple(out.shape[:-1]):
            raise ValueError(
                f"lses[{i}]: got shape {tuple(lse.shape)}, wanted {tuple(out.shape[:-1])} for outs[{i}] of shape "
                f"{tuple(out.shape)}; results of layout 'bshd' go in as out.swapaxes(-3, -2)"
            )


# --- shapes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Axes:
    """An operand with its axes told apart; strides in elements, 0 where an axis has no second element."""

    batch_shape: tuple[int, ...]
    batch_strides: tuple[int, ...]
    heads: int
    head_stride: int
    seqlen: int
    row_stride: int
    dim: int
    #: First element on a multiple of ALIGNMENT bytes.
    is_aligned: bool
    #: Bytes [low, high) from the first element.
    span: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Shapes:
    """q, k and v, checked against each other; in a call that takes no values, the keys stand in for them."""

    q: _Axes
    k: _Axes
    v: _Axes
    dtype: str
    device: int
    layout: str
    batch_shape: tuple[int, ...]
    #: False where all of q, k and v are matrices.
    has_heads: bool

    @property
    def num_heads(self) -> int:
        return self.q.heads

    @property
    def num_heads_kv(self) -> int:
        return self.k.heads

    @property
    def seqlen_q(self) -> int:
        return self.q.seqlen

    @property
    def seqlen_k(self) -> int:
        return self.k.seqlen

    @property
    def head_dim(self) -> int:
        return self.q.dim

    @property
    def head_dim_v(self) -> int:
        return self.v.dim

    def user_shape(self, heads: int, seqlen: int, dim: int) -> tuple[int, ...]:
        """Shape of a result with these sizes, in the user's layout."""
        if not self.has_heads:
            return (seqlen, dim)
        middle = (heads, seqlen) if self.layout == "bhsd" else (seqlen, heads)
        return (*self.batch_shape, *middle, dim)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.user_shape(self.num_heads, self.seqlen_q, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        heads = (self.num_heads,) if self.has_heads else ()
        return (*self.batch_shape, *heads, self.seqlen_q)


def _axes(view: ArrayView, layout: str) -> _Axes:
    shape, strides = view.shape, view.strides
    if view.is_empty:
        strides = (0,) * len(shape)
    strides = tuple(0 if size <= 1 else stride for size, stride in zip(shape, strides, strict=True))
    reaches = [(size - 1) * stride * view.itemsize for size, stride in zip(shape, strides, strict=True)]
    span = (sum(min(reach, 0) for reach in reaches), sum(max(reach, 0) for reach in reaches) + view.itemsize)
    if len(shape) == 2:
        shape, strides = (1, *shape), (0, *strides)
    head, row = (-3, -2) if layout == "bhsd" else (-2, -3)
    return _Axes(
        batch_shape=shape[:-3],
        batch_strides=strides[:-3],
        heads=shape[head],
        head_stride=strides[head],
        seqlen=shape[row],
        row_stride=strides[row],
        dim=shape[-1],
        is_aligned=view.is_empty or view.pointer % ALIGNMENT == 0,
        span=(0, 0) if view.is_empty else span,
    )


def _allocated(shape: tuple[int, ...], shapes: _Shapes) -> _Axes:
    """Axes of a result that the framework allocates: C order, aligned."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return _axes(
        ArrayView("", 0, shape, tuple(strides), shapes.dtype, ITEMSIZE[shapes.dtype], shapes.device), shapes.layout
    )


def _check_inputs(q: ArrayView, k: ArrayView, v: ArrayView | None, options: Options) -> _Shapes:
    layout = options.layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, wanted 'bhsd' or 'bshd'")
    if q.dtype not in ITEMSIZE:
        nearest = _NEAREST_DTYPE.get(q.dtype, "float32")
        raise TypeError(
            f"q: got dtype {q.dtype}, wanted float16, bfloat16, float32 or float64 (nearest supported: {nearest})"
        )
    least = 2 if layout == "bhsd" else 3
    views = (q, k) if v is None else (q, k, v)
    for view in views:
        _check_like_q(view, q)
        if view.ndim < least:
            axes = "(..., seqlen, dim)" if layout == "bhsd" else "(..., seqlen, heads, dim)"
            raise ValueError(f"{view.name}: got shape {view.shape}, wanted at least {least} axes, {axes}")
        if view.shape[-1] == 0:
            raise ValueError(f"{view.name}: got shape {view.shape}, wanted at least 1 element on the last axis")
        _check_last_axis(view)
    q_axes, k_axes, v_axes = (_axes(view, layout) for view in (q, k, k if v is None else v))
    if k_axes.dim != q_axes.dim:
        raise ValueError(
            f"k: got shape {k.shape}, wanted {q_axes.dim} elements on the last axis as q has (shape {q.shape})"
        )
    if v is not None and v_axes.seqlen != k_axes.seqlen:
        raise ValueError(f"v: got shape {v.shape}, wanted {k_axes.seqlen} rows as k has (shape {k.shape})")
    if v is not None and v_axes.heads != k_axes.heads:
        raise ValueError(f"v: got shape {v.shape}, wanted {k_axes.heads} heads as k has (shape {k.shape})")
    if q_axes.heads % k_axes.heads if k_axes.heads else q_axes.heads:
        raise ValueError(
            f"k: got shape {k.shape} with {k_axes.heads} heads, wanted a divisor of the {q_axes.heads} heads of q "
            f"(shape {q.shape})"
        )
    try:
        batch_shape = numpy.broadcast_shapes(q_axes.batch_shape, k_axes.batch_shape, v_axes.batch_shape)
    except ValueError:
        *first, last = (str(_axes(view, layout).batch_shape) for view in views)
        raise ValueError(
            f"{', '.join(view.name for view in views)}: got batch axes {', '.join(first)} and {last}, wanted axes that "
            "broadcast"
        ) from None
    has_heads = max(view.ndim for view in views) > 2
    return _Shapes(q_axes, k_axes, v_axes, q.dtype, q.device, layout, batch_shape, has_heads)


def _check_like_q(view: ArrayView, q: ArrayView) -> None:
    if view.dtype != q.dtype:
        raise TypeError(f"{view.name}: got dtype {view.dtype}, wanted {q.dtype} as q has")
    _check_device(view, q)


def _check_device(view: ArrayView, q: ArrayView) -> None:
    if view.device != q.device:
        raise ValueError(f"{view.name}: got an array on {view.place}, wanted it on {q.place} as q is")


def _check_statistic(view: ArrayView, q: ArrayView, shapes: _Shapes) -> None:
    """Check an LSE, or what has its shape and dtype."""
    _check_shape(view, shapes.lse_shape, "(..., heads, seqlen_q) in either layout")
    dtype = "float64" if q.dtype == "float64" else "float32"
    if view.dtype != dtype:
        raise TypeError(f"{view.name}: got dtype {view.dtype}, wanted {dtype} for {q.dtype} inputs")
    _check_device(view, q)


def _check_shape(view: ArrayView, shape: tuple[int, ...], meaning: str) -> None:
    if view.shape != shape:
        raise ValueError(f"{view.name}: got shape {view.shape}, wanted {shape}, {meaning}")


def _check_last_axis(view: ArrayView) -> None:
    if view.shape[-1] > 1 and view.strides[-1] != 1 and not view.is_empty:
        raise ValueError(
            f"{view.name}: got a stride of {view.strides[-1]} elements on the last axis, wanted it contiguous; "
            "any other axis may have any stride"
        )


def _check_out(out: ArrayView, q: ArrayView, shapes: _Shapes) -> _Axes:
    _check_like_q(out, q)
    _check_shape(out, shapes.out_shape, "the shape of the result")
    _check_last_axis(out)
    if not out.writable:
        raise ValueError("out: got a read-only array, wanted a writable one")
    if not out.is_empty:
        # Walk the axes from the smallest stride on: each must step over all that is below it.
        reach = 0
        for stride, size in sorted((abs(stride), size) for stride, size in zip(out.strides, out.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise ValueError(
                    f"out: got strides {out.strides} for shape {out.shape}, wanted elements that do not overlap"
                )
            reach += stride * (size - 1)
    return _axes(out, shapes.layout)


# --- canonical form ---------------------------------------------------------------------------------------------


def _call(
    shapes: _Shapes,
    operands: Sequence[_Axes],
    options: Options,
    q: ArrayView,
    extras: Extras,
    captured: Sequence[ArrayView] = (),
    wanted: Extras = NO_EXTRAS,
    gradient_shapes: tuple[tuple[int, ...], ...] = (),
) -> Call:
    given = _check_extras(extras, q, shapes)
    # Slopes and sinks are converted before they are used, if need be, and then lie in C order.
    if extras.alibi_slopes is not None:
        given = given._replace(alibi_slopes=_in_c_order(extras.alibi_slopes.shape, given.alibi_slopes))
    if extras.sinks is not None:
        given = given._replace(sinks=(1,))
    number = ITEMSIZE["float64" if shapes.dtype == "float64" else "float32"]
    itemsizes = extras.map(lambda view: view.itemsize if view.name in ("mask", "bias") else number)
    deterministic = _check_bool(options.deterministic, "deterministic")
    d_shapes = wanted.map(lambda _, view: tuple(view.shape), extras)
    if d_shapes.bias is not None and deterministic and shapes.device != CPU:
        d_shapes = d_shapes._replace(bias=_sums_in_order(d_shapes.bias, shapes))
    gradients = d_shapes.map(_in_c_order, given)
    num_axes = len(shapes.batch_shape)
    others = [strides for strides in (given.mask, given.bias, given.alibi_slopes) if strides is not None]
    others += [strides for strides in (gradients.bias, gradients.alibi_slopes) if strides is not None]
    loop, batch, batch_strides = _collapse(
        shapes.batch_shape,
        [
            *(_broadcast_strides(operand.batch_strides, num_axes) for operand in operands),
            *(strides[:num_axes] for strides in others),
        ],
    )
    strides = tuple(
        (*outer, operand.head_stride, operand.row_stride)
        for outer, operand in zip(batch_strides, operands, strict=False)
    )
    collapsed = iter(batch_strides[len(operands) :])
    given, gradients = (
        Extras(
            *(
                own if own is None or name == "sinks" else (*next(collapsed), *own[num_axes:])
                for name, own in zip(Extras._fields, each, strict=True)
            )
        )
        for each in (given, gradients)
    )
    itemsize = ITEMSIZE[shapes.dtype]
    is_vectorized = all(operand.is_aligned for operand in operands) and not any(
        stride * itemsize % ALIGNMENT for stride in (shapes.head_dim, shapes.head_dim_v, *sum(strides, ()))
    )
    problem = Problem(
        dtype=shapes.dtype,
        batch=batch,
        num_heads=shapes.num_heads,
        num_heads_kv=shapes.num_heads_kv,
        seqlen_q=shapes.seqlen_q,
        seqlen_k=shapes.seqlen_k,
        head_dim=shapes.head_dim,
        head_dim_v=shapes.head_dim_v,
        scale=_check_scale(options.scale, shapes.head_dim),
        band=_check_band(options, shapes.seqlen_q, shapes.seqlen_k),
        features=_check_features(options, extras, shapes, given, len(loop), captured, q),
        precision=_check_precision(options.precision, shapes.dtype, shapes.device),
        deterministic=deterministic,
        vectorized=is_vectorized,
        mappable=all(0 <= stride * itemsize < STRIDE_LIMIT for stride in sum(strides, ())),
    )
    spans = tuple(operand.span for operand in operands)
    return Call(
        problem,
        shapes.device,
        loop,
        strides,
        spans,
        shapes.out_shape,
        shapes.lse_shape,
        gradient_shapes,
        extras=given,
        itemsizes=itemsizes,
        d_extras=gradients,
        d_bias_shape=d_shapes.bias or (),
        captured=tuple(CapturedArray(view.shape, view.strides, view.itemsize) for view in captured),
    )


def _sums_in_order(shape: tuple[int, ...], shapes: _Shapes) -> tuple[int, ...]:
    """Shape in which a GPU sums up the gradient by a bias of this shape in a fixed order.

    It is that of the bias where this has queries and keys. Otherwise every head of every batch entry has sums of its
    own, by queries or by keys, to be summed afterwards: few, and so there is work for many thread blocks.
    """
    by_query, by_key = (size > 1 for size in (1, 1, *shape)[-2:])
    if (by_query or shapes.seqlen_q == 1) and (by_key or shapes.seqlen_k == 1):
        return shape
    rows, columns = (1, shapes.seqlen_k) if by_key else (shapes.seqlen_q, 1)
    return (*shapes.batch_shape, shapes.num_heads, rows, columns) if shapes.has_heads else (rows, columns)


def _check_extras(extras: Extras, q: ArrayView, shapes: _Shapes) -> Extras:
    """Strides of the extras, in elements, 0 where they are broadcast.

    They are those of all batch axes, then of (head, query, key) or the first of these; for the sinks that of the head.
    """
    heads = (shapes.num_heads,) if shapes.has_heads else ()
    pairs = (*shapes.batch_shape, *heads, shapes.seqlen_q, shapes.seqlen_k)
    wanted = Extras(
        _wanted_of_mask(extras.mask, pairs),
        (pairs, "(..., heads, seqlen_q, seqlen_k)"),
        ((*shapes.batch_shape, shapes.num_heads), "(..., heads)"),
        ((shapes.num_heads,), "(heads,)"),
    )

    def check(view: ArrayView, target: tuple[tuple[int, ...], str]) -> tuple[int, ...]:
        shape, meaning = target
        if view.name == "mask":
            if view.dtype != "bool":
                raise TypeError(f"mask: got dtype {view.dtype}, wanted bool, True where a query sees a key (mask != 0)")
        elif view.dtype not in ITEMSIZE:
            raise TypeError(f"{view.name}: got dtype {view.dtype}, wanted float16, bfloat16, float32 or float64")
        _check_device(view, q)
        missing = len(shape) - view.ndim
        fits = missing >= 0 and all(
            own in (1, size) for own, size in zip(view.shape, shape[max(missing, 0) :], strict=False)
        )
        if not fits or (view.name == "sinks" and view.shape != shape):
            what = "wanted" if view.name == "sinks" else "wanted a shape that broadcasts to"
            raise ValueError(f"{view.name}: got shape {view.shape}, {what} {shape}, {meaning}")
        strides = (0,) * missing + tuple(
            0 if size == 1 else stride for size, stride in zip(view.shape, view.strides, strict=True)
        )
        return strides if shapes.has_heads or len(shape) != len(pairs) else (*strides[:-2], 0, *strides[-2:])

    return extras.map(check, wanted)


def _wanted_of_mask(mask: ArrayView | None, pairs: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """Shape of a mask, which may be one by blocks, and what its axes are."""
    if mask is None or mask.block == (1, 1):
        return pairs, "(..., heads, seqlen_q, seqlen_k)"
    query, key = mask.block
    shape = (*pairs[:-2], -(-pairs[-2] // query), -(-pairs[-1] // key))
    return shape, f"(..., heads, ceil(seqlen_q / {query}), ceil(seqlen_k / {key}))"


def _in_c_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a new array of this shape, 0 where ``strides``, which may have more axes in front, are."""
    own: list[int] = []
    step = 1
    for size in reversed(shape):
        own.insert(0, step if size > 1 else 0)
        step *= size
    return (*(0,) * (len(strides) - len(own)), *own)


def _broadcast_strides(strides: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (0,) * (ndim - len(strides)) + strides


def _collapse(
    shape: tuple[int, ...], strides: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], int, list[tuple[int, ...]]]:
    """Merge batch axes into as few as the strides allow: (axes to loop over, batch, strides of each operand).

    The batch of a launch is the innermost axis that is left, because the LSE of a launch is contiguous.
    """
    merged_shape: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for axis in reversed(range(len(shape))):
        if shape[axis] == 1:
            continue
        if merged_shape and all(
            own[axis] == inner[0] * merged_shape[0] for own, inner in zip(strides, merged, strict=True)
        ):
            merged_shape[0] *= shape[axis]
            continue
        merged_shape.insert(0, shape[axis])
        for own, inner in zip(strides, merged, strict=True):
            inner.insert(0, own[axis])
    if not merged_shape:
        return (), 1, [(0,) for _ in strides]
    return tuple(merged_shape[:-1]), merged_shape[-1], [tuple(inner) for inner in merged]


# --- options ----------------------------------------------------------------------------------------------------


def _check_features(
    options: Options,
    extras: Extras,
    shapes: _Shapes,
    strides: Extras,
    depth: int,
    captured: Sequence[ArrayView],
    q: ArrayView,
) -> Features:
    """What the call does to its scores; of the strides of the extras the first `depth` are looped over."""
    mod = None
    if options.score_mod is not None:
        for view in captured:
            _check_device(view, q)
        names = (name for name, found in options.score_mod.expression.captures.items() if found.num_axes is not None)
        dtypes = tuple((name, view.dtype) for name, view in zip(names, captured, strict=True))
        mod = Mod(options.score_mod.expression, dtypes)
    dtypes = extras.map(lambda view: view.dtype)
    q_offset = 0
    if extras.alibi_slopes is not None:
        q_offset = (
            shapes.seqlen_k - shapes.seqlen_q if options.q_offset is None else _check_int(options.q_offset, "q_offset")
        )
    mask = None if strides.mask is None else strides.mask[depth:]
    return Features(
        softcap=_check_softcap(options.softcap),
        mod=mod,
        mod_numbers=() if options.score_mod is None else options.score_mod.numbers,
        mask=None if mask is None else (mask[0] != 0, mask[1] != 0, mask[2] != 0, mask[3] != 0),
        mask_block=(1, 1, 0) if extras.mask is None else (*extras.mask.block, 0),
        bias=dtypes.bias,
        bias_tiles=strides.bias is not None and _has_tiles(extras.bias, strides.bias),
        alibi_slopes=dtypes.alibi_slopes,
        q_offset=q_offset,
        sinks=dtypes.sinks,
        dropout_p=check_dropout_p(options.dropout_p),
    )


def _has_tiles(view: ArrayView, strides: tuple[int, ...]) -> bool:
    """Whether a TMA descriptor can describe an array by pairs, and tiles of it are worth loading."""
    *outer, key = strides
    in_bytes = [stride * view.itemsize for stride in outer]
    is_aligned = view.pointer % ALIGNMENT == 0 and all(stride % ALIGNMENT == 0 for stride in in_bytes)
    is_described = key == 1 and outer[-1] != 0 and all(0 <= stride < STRIDE_LIMIT for stride in in_bytes)
    return view.itemsize == 2 and is_aligned and is_described


def _check_softcap(softcap: Any) -> float | None:
    if softcap is None:
        return None
    if not isinstance(softcap, Real) or isinstance(softcap, bool):
        raise TypeError(f"softcap: got {type(softcap).__name__}, wanted a real number or None")
    softcap = float(softcap)
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap: got {softcap}, wanted a finite number above 0, or None for no cap")
    return softcap


def _check_scale(scale: Any, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale: got {type(scale).__name__}, wanted a real number or None (head_dim ** -0.5)")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, wanted a finite number or None (head_dim ** -0.5)")
    return float(scale)


def _check_band(options: Options, seqlen_q: int, seqlen_k: int) -> Band:
    is_causal = _check_bool(options.is_causal, "is_causal")
    window = options.window
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise TypeError(f"window: got {window!r}, wanted a tuple (left, right) or None")
        window = tuple(None if side is None else _check_int(side, "window") for side in window)
        if any(side is not None and side < 0 for side in window):
            raise ValueError(
                f"window: got {options.window!r}, wanted numbers of keys >= 0, None for a side without limit"
            )
    q_offset = None if options.q_offset is None else _check_int(options.q_offset, "q_offset")
    return make_band(is_causal, window, q_offset, seqlen_q, seqlen_k)


def _check_rows(rows: Any, seqlen_q: int) -> range:
    """The chosen queries by their positions, in ascending order."""
    if rows is None:
        return range(seqlen_q)
    if isinstance(rows, slice):
        try:
            chosen = range(*rows.indices(seqlen_q))
        except (TypeError, ValueError):
            chosen = range(0, 0, -1)
    elif isinstance(rows, range):
        chosen = rows
    else:
        try:
            row = operator.index(rows)
        except TypeError:
            row = None
        if row is None or isinstance(rows, bool):
            raise TypeError(f"rows: got {rows!r}, wanted None, an integer, a slice or a range")
        if not -seqlen_q <= row < seqlen_q:
            raise IndexError(f"rows: got {row}, wanted one of the {seqlen_q} queries")
        chosen = range(row, row + 1)
    if chosen.step <= 0:
        raise TypeError(f"rows: got {rows!r}, wanted integers as bounds, and a step above 0")
    if chosen and chosen[-1] < 0:
        # All of them are counted from the end.
        chosen = range(chosen[0] + seqlen_q, chosen[-1] + seqlen_q + 1, chosen.step)
    if chosen and not (chosen[0] >= 0 and chosen[-1] < seqlen_q):
        raise ValueError(f"rows: got {rows!r}, wanted some of the {seqlen_q} queries")
    return chosen if chosen else range(0)


def _check_bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool | numpy.bool_):
        raise TypeError(f"{name}: got {value!r}, wanted True or False")
    return bool(value)


def _check_int(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, wanted integers") from None


def _check_precision(precision: Any, dtype: str, device: int) -> str:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted None, 'ieee' or 'tf32'")
    if precision != "tf32":
        return "ieee"
    if dtype != "float32":
        raise ValueError(f"precision: got 'tf32' for {dtype} inputs, wanted None (TF32 is a way to multiply float32)")
    # A permission, not a demand: the CPU multiplies float32 exactly as well.
    return "ieee" if device == CPU else "tf32"
