"""What users get wrong: every error says which argument, what it was and what was wanted. And canonical strides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import arguments
from cuflash.arguments import Options
from cuflash.arrays import CPU, ArrayView
from cuflash.problem import Problem
from cuflash.scores import Band


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


Q, K, V = zeros(2, 4, 5, 8), zeros(2, 2, 6, 8), zeros(2, 2, 6, 3)
OUT, LSE = zeros(2, 4, 5, 3), zeros(2, 4, 5)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def field_of_records() -> np.ndarray:
    """Strides of 13 bytes: not a multiple of the itemsize."""
    return np.zeros((2, 4, 5), np.dtype([("a", np.float32, 8), ("b", np.int8)]))["a"]


FORWARD_ERRORS = [
    # (replaced arguments, error, words of the message)
    ({"q": [[1.0]]}, TypeError, "q: got list, wanted an array"),
    ({"k": 3}, TypeError, "k: got int, wanted an array"),
    ({"v": None}, TypeError, "v: got NoneType, wanted an array"),
    ({"q": np.ma.masked_array(Q)}, TypeError, "q: got a numpy.ma.MaskedArray"),
    (
        {"q": Q.astype(int), "k": K.astype(int), "v": V.astype(int)},
        TypeError,
        "dtype int64.*nearest supported: float64",
    ),
    ({"q": Q.astype(bool)}, TypeError, "q: got dtype bool.*nearest supported: float32"),
    ({"q": Q.astype(complex)}, TypeError, "q: got dtype complex128, wanted float16, bfloat16, float32 or float64"),
    ({"q": Q.astype(">f4")}, TypeError, "q: got byte-swapped float32"),
    ({"k": K.astype(np.float16)}, TypeError, "k: got dtype float16, wanted float32 as q has"),
    ({"v": V.astype(np.float64)}, TypeError, "v: got dtype float64, wanted float32 as q has"),
    ({"q": zeros(8)}, ValueError, r"q: got shape \(8,\), wanted at least 2 axes"),
    ({"v": zeros()}, ValueError, r"v: got shape \(\), wanted at least 2 axes"),
    ({"k": zeros(6, 8), "layout": "bshd"}, ValueError, r"k: got shape \(6, 8\), wanted at least 3 axes"),
    (
        {"q": zeros(2, 4, 5, 0), "k": zeros(2, 2, 6, 0)},
        ValueError,
        "q: got shape .* at least 1 element on the last axis",
    ),
    ({"v": zeros(2, 2, 6, 0)}, ValueError, "v: got shape .* at least 1 element on the last axis"),
    ({"q": zeros(2, 4, 8, 5).swapaxes(-1, -2)}, ValueError, "q: got a stride of 5 elements on the last axis"),
    ({"k": K[..., ::-1]}, ValueError, "k: got a stride of -1 elements on the last axis"),
    ({"v": np.broadcast_to(V[..., :1], V.shape)}, ValueError, "v: got a stride of 0 elements on the last axis"),
    ({"q": field_of_records()}, ValueError, "q: got strides .* bytes, wanted multiples of the itemsize 4"),
    ({"k": zeros(2, 2, 6, 7)}, ValueError, "k: got shape .* wanted 8 elements on the last axis as q has"),
    ({"v": zeros(2, 2, 5, 8)}, ValueError, "v: got shape .* wanted 6 rows as k has"),
    ({"v": zeros(2, 4, 6, 8)}, ValueError, "v: got shape .* wanted 2 heads as k has"),
    (
        {"k": zeros(2, 3, 6, 8), "v": zeros(2, 3, 6, 3)},
        ValueError,
        "k: got .* 3 heads, wanted a divisor of the 4 heads",
    ),
    (
        {"k": zeros(2, 0, 6, 8), "v": zeros(2, 0, 6, 3)},
        ValueError,
        "k: got .* 0 heads, wanted a divisor of the 4 heads",
    ),
    (
        {"q": zeros(3, 4, 5, 8)},
        ValueError,
        r"q, k, v: got batch axes \(3,\), \(2,\) and \(2,\), wanted axes that broad",
    ),
    ({"layout": "sbhd"}, ValueError, "layout: got 'sbhd', wanted 'bhsd' or 'bshd'"),
    ({"precision": "half"}, ValueError, "precision: got 'half', wanted None, 'ieee' or 'tf32'"),
    (
        {"precision": "tf32", "q": Q.astype(float), "k": K.astype(float), "v": V.astype(float)},
        ValueError,
        "precision: got 'tf32' for float64 inputs",
    ),
    ({"scale": math.nan}, ValueError, "scale: got nan, wanted a finite number"),
    ({"scale": -math.inf}, ValueError, "scale: got -inf, wanted a finite number"),
    ({"scale": "1"}, TypeError, "scale: got str, wanted a real number"),
    ({"scale": True}, TypeError, "scale: got bool, wanted a real number"),
    ({"scale": np.ones(3)}, TypeError, "scale: got ndarray, wanted a real number"),
    ({"is_causal": "yes"}, TypeError, "is_causal: got 'yes', wanted True or False"),
    ({"is_causal": None}, TypeError, "is_causal: got None, wanted True or False"),
    ({"deterministic": 2}, TypeError, "deterministic: got 2, wanted True or False"),
    ({"window": 5}, TypeError, r"window: got 5, wanted a tuple \(left, right\) or None"),
    ({"window": [1, 2]}, TypeError, r"window: got \[1, 2\], wanted a tuple"),
    ({"window": (1, 2, 3)}, TypeError, "window: got .* wanted a tuple"),
    ({"window": (1, 0.5)}, TypeError, "window: got 0.5, wanted integers"),
    ({"window": (-1, 0)}, ValueError, r"window: got \(-1, 0\), wanted numbers of keys >= 0, None for a side"),
    ({"q_offset": 0.5}, TypeError, "q_offset: got 0.5, wanted integers"),
    ({"mask": [[True]]}, TypeError, "mask: got list, wanted an array"),
    ({"mask": zeros(5, 6)}, TypeError, "mask: got dtype float32, wanted bool"),
    (
        {"mask": np.ones((5, 7), bool)},
        ValueError,
        r"mask: got shape \(5, 7\), wanted a shape that broadcasts to \(2, 4, 5, 6\)",
    ),
    ({"mask": np.ones((1, 2, 4, 5, 6), bool)}, ValueError, r"mask: got shape \(1, 2, 4, 5, 6\), wanted a shape"),
    ({"bias": 1.0}, TypeError, "bias: got float, wanted an array"),
    ({"bias": np.zeros((5, 6), int)}, TypeError, "bias: got dtype int64, wanted float16, bfloat16, float32 or float64"),
    ({"bias": zeros(2, 5, 6)}, ValueError, r"bias: got shape \(2, 5, 6\), wanted a shape that broadcasts to"),
    ({"softcap": "30"}, TypeError, "softcap: got str, wanted a real number or None"),
    ({"softcap": True}, TypeError, "softcap: got bool"),
    ({"softcap": 0}, ValueError, "softcap: got 0.0, wanted a finite number above 0"),
    ({"softcap": math.nan}, ValueError, "softcap: got nan, wanted"),
    ({"alibi_slopes": zeros(3)}, ValueError, r"alibi_slopes: got shape \(3,\), wanted .* \(2, 4\), \(..., heads\)"),
    ({"alibi_slopes": np.zeros(4, bool)}, TypeError, "alibi_slopes: got dtype bool, wanted float16"),
    ({"sinks": zeros(1)}, ValueError, r"sinks: got shape \(1,\), wanted \(4,\), \(heads,\)"),
    ({"sinks": zeros(2, 4)}, ValueError, r"sinks: got shape \(2, 4\), wanted \(4,\)"),
    ({"score_mod": abs}, TypeError, "^score_mod: got builtin_function_or_method, wanted None or what"),
    ({"dropout_p": 0.1}, ValueError, "seed: got None, wanted an integer, as dropout_p is not 0"),
    ({"dropout_p": None, "seed": 1}, TypeError, "dropout_p: got NoneType, wanted a real number"),
    ({"dropout_p": 1.0, "seed": 1}, ValueError, r"dropout_p: got 1.0, wanted a probability in \[0, 1\)"),
    ({"dropout_p": -0.1, "seed": 1}, ValueError, "dropout_p: got -0.1"),
    ({"dropout_p": math.nan, "seed": 1}, ValueError, "dropout_p: got nan"),
    ({"seed": 0.5}, TypeError, "seed: got 0.5, wanted an integer"),
    ({"window_size": (3, 3)}, TypeError, "window_size"),
]

OUT_ERRORS = [
    ({"out": [0.0]}, TypeError, "out: got list, wanted an array"),
    ({"out": OUT.astype(np.float64)}, TypeError, "out: got dtype float64, wanted float32 as q has"),
    ({"out": zeros(2, 4, 5, 4)}, ValueError, r"out: got shape \(2, 4, 5, 4\), wanted \(2, 4, 5, 3\)"),
    ({"out": zeros(1, 2, 4, 5, 3)}, ValueError, "out: got shape"),
    ({"out": read_only(OUT)}, ValueError, "out: got a read-only array"),
    ({"out": zeros(2, 4, 3, 5).swapaxes(-1, -2)}, ValueError, "out: got a stride of 5 elements on the last axis"),
    (
        {"out": np.lib.stride_tricks.as_strided(zeros(2, 1, 5, 3), (2, 4, 5, 3), (60, 0, 12, 4))},
        ValueError,
        "out: got strides .* wanted elements that do not overlap",
    ),
    (
        {"out": np.lib.stride_tricks.as_strided(zeros(2, 4, 50), (2, 4, 5, 3), (800, 200, 8, 4))},
        ValueError,
        "out: got strides .* wanted elements that do not overlap",
    ),
]

BACKWARD_ERRORS = [
    ({"d_out": zeros(2, 4, 5, 4)}, ValueError, r"d_out: got shape \(2, 4, 5, 4\), wanted \(2, 4, 5, 3\)"),
    ({"d_out": OUT.astype(np.float64)}, TypeError, "d_out: got dtype float64, wanted float32 as q has"),
    ({"d_out": np.broadcast_to(np.float32(1), OUT.shape)}, ValueError, "d_out: got a stride of 0 elements on the last"),
    ({"d_out": 1.0}, TypeError, "d_out: got float, wanted an array"),
    ({"out": zeros(4, 5, 3)}, ValueError, "out: got shape"),
    ({"lse": LSE[..., None]}, ValueError, r"lse: got shape \(2, 4, 5, 1\), wanted \(2, 4, 5\)"),
    ({"lse": LSE.astype(np.float64)}, TypeError, "lse: got dtype float64, wanted float32 for float32 inputs"),
    ({"lse": None}, TypeError, "lse: got NoneType, wanted an array"),
    ({"d_lse": zeros(2, 5, 4)}, ValueError, r"d_lse: got shape \(2, 5, 4\), wanted \(2, 4, 5\)"),
    ({"d_lse": LSE.astype(np.float16)}, TypeError, "d_lse: got dtype float16, wanted float32"),
    ({"k": zeros(2, 2, 6, 7)}, ValueError, "k: got shape"),
    ({"window": (-1, 0)}, ValueError, "window: got"),
    ({"sinks": zeros(3)}, ValueError, "sinks: got shape"),
    ({"bias": zeros(7)}, ValueError, "bias: got shape"),
    ({"dropout_p": 0.5}, ValueError, "seed: got None"),
    ({"return_lse": True}, TypeError, "return_lse"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), FORWARD_ERRORS + OUT_ERRORS)
def test_forward_errors(wrong, error, message):
    call = {"q": Q, "k": K, "v": V} | wrong
    operands = [call.pop(name) for name in ("q", "k", "v")]
    with pytest.raises(error, match=message):
        cuflash.attention(*operands, **call)


@pytest.mark.parametrize(("wrong", "error", "message"), BACKWARD_ERRORS)
def test_backward_errors(wrong, error, message):
    call = {"d_out": OUT, "q": Q, "k": K, "v": V, "out": OUT, "lse": LSE} | wrong
    operands = [call.pop(name) for name in ("d_out", "q", "k", "v", "out", "lse")]
    with pytest.raises(error, match=message):
        cuflash.attention_backward(*operands, **call)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "outs: got no partial results"),
        ([OUT, OUT], [LSE], ValueError, "lses: got 1 of them, wanted 2"),
        ([OUT, OUT[:1]], [LSE, LSE[:1]], ValueError, r"outs\[1\]: got shape \(1, 4, 5, 3\), wanted \(2, 4, 5, 3\)"),
        ([OUT], [LSE.swapaxes(1, 2)], ValueError, r"lses\[0\]: got shape \(2, 5, 4\).*swapaxes"),
        ([OUT, [1.0]], [LSE, LSE], TypeError, r"outs\[1\]: got list, wanted an array"),
        ([OUT], [0.0], TypeError, r"lses\[0\]: got float, wanted an array"),
    ],
)
def test_merge_errors(outs, lses, error, message):
    with pytest.raises(error, match=message):
        cuflash.merge_attention(outs, lses)


def test_a_later_error_is_not_hidden_by_an_earlier_call():
    """Calls are remembered by what they depend on, and that includes whether `out` can be written to."""
    out = OUT.copy()
    cuflash.attention(Q, K, V, out=out)
    with pytest.raises(ValueError, match="out: got a read-only array"):
        cuflash.attention(Q, K, V, out=read_only(out))
    assert cuflash.attention(Q, K, V, out=out) is out


# ---------------------------------------------------------------------------------------------- what GPUs can do

PROBLEM = Problem("float16", 1, 1, 1, 64, 64, 64, 64, 0.125)


def test_devices():
    arguments.check_device(PROBLEM, 75, 0)
    arguments.check_device(replace(PROBLEM, dtype="bfloat16"), 80, 0)
    with pytest.raises(
        TypeError, match=r"bfloat16 on cuda:1, whose compute capability 7.5 .* wanted float16 or float32"
    ):
        arguments.check_device(replace(PROBLEM, dtype="bfloat16"), 75, 1)
    with pytest.raises(RuntimeError, match=r"cuda:0 has compute capability 7.0, wanted 7.5"):
        arguments.check_device(PROBLEM, 70, 0)


def view(name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, **facts: Any) -> ArrayView:
    if strides is None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    values: dict[str, Any] = {"pointer": 4096, "dtype": "float16", "itemsize": 2, "device": 0, **facts}
    return ArrayView(name=name, shape=shape, strides=strides, **values)


def forward(q: ArrayView, k: ArrayView, v: ArrayView, out: ArrayView | None = None, **options: Any) -> arguments.Call:
    return arguments.forward(q, k, v, out, Options(**options))


def test_mixed_devices():
    q = view("q", (4, 64, 64))
    with pytest.raises(ValueError, match="v: got an array on cuda:1, wanted it on cuda:0 as q is"):
        forward(q, q, replace(q, name="v", device=1))
    with pytest.raises(ValueError, match="k: got an array on the CPU, wanted it on cuda:0 as q is"):
        forward(q, replace(q, name="k", device=CPU), q)


# --------------------------------------------------------------------------------------------- canonical strides


def test_problem_of_a_call():
    call = forward(
        view("q", (3, 8, 100, 64)), view("k", (3, 2, 90, 64)), view("v", (3, 2, 90, 32)), is_causal=True, scale=2
    )
    assert call.problem == Problem("float16", 3, 8, 2, 100, 90, 64, 32, scale=2.0, band=Band(None, -10))
    assert call.loop == ()
    assert call.strides == ((51200, 6400, 64), (11520, 5760, 64), (5760, 2880, 32), (25600, 3200, 32))
    assert call.out_shape == (3, 8, 100, 32)
    assert call.lse_shape == (3, 8, 100)
    assert list(call.offsets()) == [(0, 0, 0, 0, 0)]


def test_precision():
    q = view("q", (4, 64, 64), dtype="float32", itemsize=4)
    assert forward(q, q, q).problem.precision == "ieee"
    assert forward(q, q, q, precision="tf32").problem.precision == "tf32"
    host = replace(q, device=CPU)
    assert forward(host, host, host, precision="tf32").problem.precision == "ieee"


def test_layouts_differ_in_strides_only():
    bhsd = forward(view("q", (2, 4, 5, 8)), view("k", (2, 4, 6, 8)), view("v", (2, 4, 6, 8)))
    bshd = forward(view("q", (2, 5, 4, 8)), view("k", (2, 6, 4, 8)), view("v", (2, 6, 4, 8)), layout="bshd")
    assert bshd.problem == bhsd.problem
    assert bshd.strides[0] == (160, 8, 32)
    assert bshd.out_shape == (2, 5, 4, 8)
    assert bshd.lse_shape == bhsd.lse_shape == (2, 4, 5)


def test_batch_axes_become_one_where_strides_allow():
    shape, once = (3, 5, 4, 7, 8), (4, 7, 8)
    whole = view("q", shape)
    assert forward(whole, whole, whole).loop == ()
    assert forward(whole, whole, whole).problem.batch == 15
    # Broadcast over both axes is stride 0 over their product.
    call = forward(whole, view("k", once), view("v", (1, 1, *once)))
    assert (call.loop, call.problem.batch) == ((), 15)
    assert call.strides[1] == (0, 56, 8)
    # Broadcast over one of them is two axes: one to loop over, one for the launch.
    call = forward(whole, view("k", (5, *once)), view("v", (3, 1, *once)))
    assert (call.loop, call.problem.batch) == ((3,), 5)
    assert call.strides == ((1120, 224, 56, 8), (0, 224, 56, 8), (224, 0, 56, 8), (1120, 224, 56, 8))
    assert list(call.offsets()) == [(2 * 1120 * i, 0, 2 * 224 * i, 2 * 1120 * i, 4 * 5 * 4 * 7 * i) for i in range(3)]
    # Axes of one element separate nothing.
    call = forward(view("q", (3, 1, 5, *once)), view("k", (3, 1, 5, *once)), view("v", (1, 1, 1, *once)))
    assert (call.loop, call.problem.batch) == ((), 15)


@given(
    shape=st.lists(st.integers(0, 3), max_size=4).map(tuple),
    operands=st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=3),
)
def test_collapsed_axes_visit_the_same_elements(shape, operands):
    strides = [tuple(operand[: len(shape)]) for operand in operands]
    loop, batch, collapsed = arguments._collapse(shape, strides)

    def offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
        return [sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(shape)]

    for before, after in zip(strides, collapsed, strict=True):
        assert offsets((*loop, batch), after) == offsets(shape, before)


def test_strides_that_do_not_matter_are_normal():
    """Axes with at most one element, so that equal problems are equal."""
    usual = forward(view("q", (1, 4, 1, 64)), view("k", (1, 4, 9, 64)), view("v", (1, 4, 9, 64)))
    odd = forward(view("q", (1, 4, 1, 64), (7, 64, 3, 1)), view("k", (1, 4, 9, 64)), view("v", (1, 4, 9, 64)))
    assert odd == usual
    assert odd.problem.vectorized
    # The last axis, too: a single column may have any stride.
    column = view("v", (1, 4, 9, 1), (900, 100, 10, 10))
    forward(view("q", (1, 4, 1, 64)), view("k", (1, 4, 9, 64)), column)


@pytest.mark.parametrize(
    ("change", "vectorized"),
    [
        ({}, True),
        ({"k": view("k", (2, 4, 9, 64), pointer=4096 + 8)}, False),
        ({"k": view("k", (2, 4, 9, 64), (2312, 580, 64, 1))}, False),
        ({"k": view("k", (2, 4, 9, 64), (2304, 576, -64, 1))}, True),
        ({"k": view("k", (2, 4, 9, 64), (0, 0, 0, 1))}, True),
        ({"q": view("q", (2, 4, 5, 60)), "k": view("k", (2, 4, 9, 60))}, False),
        ({"v": view("v", (2, 4, 9, 33))}, False),
        ({"out": view("out", (2, 4, 5, 64), pointer=4096 + 2)}, False),
        ({"out": view("out", (2, 4, 5, 64), (1440, 360, 72, 1))}, True),
        ({"out": view("out", (2, 4, 5, 64), (1440, 360, 66, 1))}, False),
        ({"k": view("k", (2, 4, 0, 64), pointer=1), "v": view("v", (2, 4, 0, 64), pointer=1)}, True),
    ],
)
def test_vectorized(change, vectorized):
    call = {"q": view("q", (2, 4, 5, 64)), "k": view("k", (2, 4, 9, 64)), "v": view("v", (2, 4, 9, 64)), **change}
    assert forward(**call).problem.vectorized is vectorized


def test_backward_call():
    q, k, v = view("q", (3, 8, 10, 64)), view("k", (2, 20, 64)), view("v", (3, 2, 20, 32))
    out = view("out", (3, 8, 10, 32), (32, 96, 768, 1))
    lse = view("lse", (3, 8, 10), dtype="float32", itemsize=4)
    call = arguments.backward(view("d_out", (3, 8, 10, 32)), q, k, v, out, lse, None, Options())
    assert call.gradient_shapes == ((3, 8, 10, 64), (3, 2, 20, 64), (3, 2, 20, 32))
    assert call.strides == (
        (2560, 320, 32),
        (5120, 640, 64),
        (0, 1280, 64),
        (1280, 640, 32),
        (32, 96, 768),
        (5120, 640, 64),
        (2560, 1280, 64),
        (1280, 640, 32),
    )
    assert call.problem == forward(q, k, v).problem
    unaligned = arguments.backward(view("d_out", (3, 8, 10, 32), pointer=8), q, k, v, out, lse, None, Options())
    assert not unaligned.problem.vectorized
