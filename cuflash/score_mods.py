"""Programmable scores: ``score_mod``, which makes them of an expression, and ready-made ones.

Each is a :class:`ScoreMod`, and ``a >> b`` is one that does first `a` and then `b`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy

from .arguments import ScoreModOption
from .expression import Captured, Expression


class ScoreMod:
    """What ``score_mod`` makes: an expression and what it captures. Immutable; arrays are kept, not copied."""

    __slots__ = ("arrays", "expression", "numbers", "option")

    def __init__(self, expression: Expression, arrays: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        self.expression = expression
        #: By the names that the expression has for them.
        self.arrays, self.numbers = dict(arrays), dict(numbers)
        #: What ``attention`` takes it for, beside its arrays.
        self.option = ScoreModOption(expression, tuple(self.numbers.values()))

    def __rshift__(self, other: Any) -> ScoreMod:
        if not isinstance(other, ScoreMod):
            return NotImplemented
        both, names = self.expression.then(other.expression)
        arrays = {**self.arrays, **{names[name]: array for name, array in other.arrays.items()}}
        numbers = {**self.numbers, **{names[name]: number for name, number in other.numbers.items()}}
        return ScoreMod(both, arrays, numbers)

    def __repr__(self) -> str:
        captured = "".join(f", {name}=..." for name in self.arrays)
        captured += "".join(f", {name}={number!r}" for name, number in self.numbers.items())
        return f"score_mod({self.expression.text!r}{captured})"


def score_mod(expression: str, /, **captured: Any) -> ScoreMod:
    """Change scores by an expression, compiled into the kernels, with its derivatives.

    Parameters
    ----------
    expression : str
        The new score of a pair, as Python writes arithmetic: ``+ - * / // % **``, comparisons, ``and or not``,
        ``a if c else b``, the functions exp, log, sqrt, sin, cos, tanh, sigmoid, abs, min and max, and elements of
        captured arrays, ``rel[h, q_idx - k_idx + 128]``. It may use

        * ``score``: ``scale * q . k``, after `softcap` and before everything else that ``attention`` does to scores;
        * ``b``, ``h``, ``h_kv``: numbers of the batch entry (batch axes are counted in C order), the query head and
          the head of keys;
        * ``q_idx``, ``k_idx``, ``seqlen_q``, ``seqlen_k``: where query and key stand, counted from 0, and the lengths;
        * ``inf`` and ``pi``. A score of ``-inf`` hides the pair.

        ``/`` is the quotient of real numbers, ``//`` and ``%`` round down. Indices may read arrays, but not depend on
        the score; those out of bounds are brought to the nearest that are not.
    **captured : number or array
        What other names stand for. Arrays are of the framework and on the device of `q`: float16, bfloat16, float32
        or float64, any integers that 32 bits hold, or bool; any shape without a length of 0, any strides. An array
        without axes is named alone. A number is no part of what is compiled, so another one costs nothing.

    Returns
    -------
    ScoreMod
        For ``attention(..., score_mod=...)``. ``a >> b`` changes scores by `a` and what comes of it by `b`.

    Raises
    ------
    TypeError
        For what is neither a number nor an array, and arrays of other dtypes.
    ValueError
        For what is no such expression; the message shows where.

    See Also
    --------
    cuflash.score_mods : ready-made ones.

    Notes
    -----
    Derivatives by the score and by captured arrays of real numbers come from dual numbers [1]_: nobody writes a
    backward pass. On PyTorch tensors captured arrays are differentiable, too; where gradients by them are asked for, a
    kernel of its own computes them. ``min`` and ``max`` of equal arguments have the derivative of the first.

    A pair that an expression hides is computed all the same: `mask`, `window` and `is_causal` skip what they hide.

    References
    ----------
    .. [1] A. Griewank, A. Walther, "Evaluating Derivatives", 2nd edition, SIAM, 2008, chapter 3.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 8))  # 2 heads of 4 rows of 8 elements
    >>> rel = np.linspace(0, 1, 14).reshape(2, 7)  # by head and distance
    >>> mod = cuflash.score_mod("score + rel[h, q_idx - k_idx + 3]", rel=rel)
    >>> out = cuflash.attention(q, k, v, score_mod=mod)
    >>> bias = rel[:, np.subtract.outer(np.arange(4), np.arange(4)) + 3]
    >>> bool(np.allclose(out, cuflash.attention(q, k, v, bias=bias)))
    True
    >>> cuflash.score_mod("score + rel[h, distance]", rel=rel)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: score_mod: got the name 'distance', wanted one of score, ...
        score + rel[h, distance]
                       ^
    """
    if not isinstance(expression, str):
        raise TypeError(f"score_mod: got {type(expression).__name__} for the expression, wanted a str")
    arrays, numbers = {}, {}
    for name, value in captured.items():
        if isinstance(value, bool | int | float | numpy.bool_ | numpy.integer | numpy.floating):
            numbers[name] = _check_number(name, value)
        else:
            arrays[name] = value
    facts = {
        name: Captured(None, isinstance(numbers[name], float)) if name in numbers else _check_array(name, value)
        for name, value in captured.items()
    }
    return ScoreMod(Expression(expression, facts), arrays, numbers)


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, float | numpy.floating):
        return float(value)
    value = int(value)
    if not -(1 << 31) <= value < 1 << 31:
        raise ValueError(f"score_mod: got {name}={value}, wanted an integer of 32 bits, or a float")
    return value


def _check_array(name: str, value: Any) -> Captured:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"score_mod: got {name}={value!r}, wanted an array or a number")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in (*REAL, *INTEGER):
        raise TypeError(f"score_mod: got {name} of {dtype}, wanted one of {', '.join((*REAL, *INTEGER))}")
    if 0 in value.shape:
        raise ValueError(f"score_mod: got {name} of shape {tuple(value.shape)}, wanted at least one element")
    return Captured(len(value.shape), dtype in REAL)


REAL = ("float16", "bfloat16", "float32", "float64")
INTEGER = ("int8", "int16", "int32", "int64", "uint8", "bool")


# --- ready-made -------------------------------------------------------------------------------------------------------


def alibi(slopes: Any) -> ScoreMod:
    """``score - slopes[h] * distance``, with slopes (heads,); ``attention`` has `alibi_slopes` for the same, faster."""
    return score_mod("score - slopes[h] * abs(q_idx + seqlen_k - seqlen_q - k_idx)", slopes=slopes)


def softcap(cap: float) -> ScoreMod:
    """``cap * tanh(score / cap)``, here at any place; ``attention`` has `softcap` for the same at the first."""
    return score_mod("cap * tanh(score / cap)", cap=float(cap))


def tanh_gate(gates: Any) -> ScoreMod:
    """``score * tanh(gates[h])``, with gates (heads,)."""
    return score_mod("score * tanh(gates[h])", gates=gates)


def sigmoid_gate(gates: Any) -> ScoreMod:
    """``score * sigmoid(gates[h])``, with gates (heads,)."""
    return score_mod("score * sigmoid(gates[h])", gates=gates)


def t5_bias(table: Any, *, max_distance: int = 128, is_bidirectional: bool = True) -> ScoreMod:
    """Relative position bias of T5: ``score + table[bucket of (k_idx - q_idx), h]``, with a table (buckets, heads).

    Half of the buckets of a direction are for a distance each, the others for ranges that grow with its logarithm, up
    to `max_distance`, beyond which all share the last one (Raffel et al. 2020, arXiv:1910.10683, section 2.1). The last
    query stands at the last key. Without `is_bidirectional`, later keys count as distance 0.
    """
    num_buckets = table.shape[0]
    side = num_buckets // 2 if is_bidirectional else num_buckets
    num_exact = side // 2
    if num_exact < 1 or max_distance <= num_exact:
        raise ValueError(
            f"t5_bias: got {num_buckets} buckets and max_distance {max_distance}, wanted at least "
            f"{4 if is_bidirectional else 2} and a distance above {max(num_exact, 1)}"
        )
    # In float32, as those compute it who trained tables: at the ends of ranges its last bit decides.
    distances = numpy.arange(num_exact, max_distance + 1, dtype=numpy.float32)
    logs = numpy.log(distances / numpy.float32(num_exact)) / numpy.float32(math.log(max_distance / num_exact))
    buckets = numpy.minimum(num_exact + (logs * numpy.float32(side - num_exact)).astype(int), side - 1)
    # The farthest range first.
    ends = [int(num_exact + numpy.flatnonzero(buckets >= number)[0]) for number in range(num_exact, side)]
    bucket = "{distance}"
    for number, end in zip(range(num_exact, side), ends, strict=True):
        bucket = f"({number} if {{distance}} >= {end} else {bucket})"
    apart = "(k_idx - q_idx - seqlen_k + seqlen_q)"
    if is_bidirectional:
        place = f"({side} if {apart} > 0 else 0) + {bucket.format(distance=f'abs({apart})')}"
    else:
        place = bucket.format(distance=f"max(-{apart}, 0)")
    return score_mod(f"score + table[{place}, h]", table=table)


def document_mask(documents: Any, k_documents: Any = None) -> ScoreMod:
    """Queries see keys of their own document: documents' numbers (batch, seqlen_q), and (batch, seqlen_k) if other."""
    k_documents = documents if k_documents is None else k_documents
    return score_mod(
        "score if documents[b, q_idx] == k_documents[b, k_idx] else -inf", documents=documents, k_documents=k_documents
    )


def prefix_lm(lengths: Any) -> ScoreMod:
    """Causal attention, but all see the prefix of their batch entry: integers (batch,)."""
    return score_mod("score if k_idx <= q_idx + seqlen_k - seqlen_q or k_idx < lengths[b] else -inf", lengths=lengths)


def dilated_window(size: int, dilation: int) -> ScoreMod:
    """Of the keys up to ``size * dilation`` away, to either side, those at multiples of `dilation`."""
    if size < 0 or dilation < 1:
        raise ValueError(f"dilated_window: got size {size} and dilation {dilation}, wanted at least 0 and 1")
    return score_mod(
        "score if (q_idx + seqlen_k - seqlen_q - k_idx) % dilation == 0 and "
        "abs(q_idx + seqlen_k - seqlen_q - k_idx) <= reach else -inf",
        dilation=dilation, reach=size * dilation,
    )  # fmt: skip
