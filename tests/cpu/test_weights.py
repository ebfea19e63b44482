"""The weights themselves, and their sums over queries, recomputed from the LSE on the CPU."""

from __future__ import annotations

import re
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash import arguments, arrays, cpu, reference
from cuflash.scores import Band, Score
from tests.cpu.expressions import bound_of
from tests.cpu.test_cpu_scores import BANDS, MODS, canonical, forward, make_arrays, make_options, make_problem, problems
from tests.cpu.test_cpu_scores import make_mod as bound_mod
from tests.cpu.test_dlpack import Array
from tests.cpu.test_functional import DeviceArray, DeviceArrays, HostLaunches
from tests.strategies import DTYPES, EXPRESSIONS, Case, cases, make_mod, make_operands
from tests.tolerance import Yardstick, accumulator

SHAPE = (2, 4, 2, 71, 93, 20, 13)


def random(*shape: int, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def computed(problem, lse, rows=None):
    """Weights and what keys receive, in memory that was full of NaN."""
    q, k = problem[:2]
    rows = range(q.shape[2]) if rows is None else rows
    weights = np.full((*q.shape[:2], len(rows), k.shape[2]), np.nan, lse.dtype)
    received = np.full((*q.shape[:2], k.shape[2]), np.nan, lse.dtype)
    options = {"band": problem.band, "scale": problem.scale, "score": canonical(problem)}
    cpu.weights(q, k, lse, weights, rows=rows, **options)
    cpu.received(q, k, lse, received, **options)
    return weights, received


def check(problem, rows=None):
    q, k, v, *_ = problem
    _, lse = forward(problem)
    weights, received = computed(problem, lse, rows)
    yardstick = Yardstick(q, k, v, band=problem.band, scale=problem.scale, score=problem.score)
    yardstick.assert_weights(weights, lse, rows)
    yardstick.assert_received(received, lse)
    return lse, weights, received


def of_every_kind(rng: np.random.Generator, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    """Options of the public functions all at once, among them all that depend on where a query stands."""
    mod = cuflash.score_mod(
        "score * gate[h] + 0.1 * (q_idx % 5) if q_idx % 7 != k_idx % 7 else -inf", gate=rng.random(4)
    )
    return {
        "mask": rng.random((batch, 1, seqlen_q, seqlen_k)) < 0.8,
        "bias": rng.standard_normal((heads, seqlen_q, 1)),
        "alibi_slopes": rng.random(heads),
        "score_mod": mod,
        "softcap": 3.0,
        "is_causal": True,
        "window": (11, None),
        "q_offset": -3,
        "scale": -0.4,
    }


# ------------------------------------------------------------------------------------------- against the reference


@st.composite
def chosen(draw, seqlen):
    """Rows as the CPU path takes them."""
    start = draw(st.integers(0, seqlen - 1))
    return range(start, draw(st.integers(start + 1, seqlen)), draw(st.integers(1, 9)))


@given(data=st.data(), problem=problems())
def test_any_options(data, problem):
    check(problem, data.draw(chosen(problem.q.shape[2])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("name", ["none", "all"])
def test_options_and_bands(name, band, dtype):
    options = make_options(SHAPE, dtype).values() if name == "all" else ()
    score = Score(**{key: value for one in options for key, value in one.items()})
    check(make_problem(SHAPE, dtype, score=score, band=band), range(3, 70, 4))


@pytest.mark.parametrize("name", MODS)
def test_expressions(name):
    mod = bound_mod(make_arrays(SHAPE), *MODS[name])
    check(make_problem(SHAPE, score=Score(mod=mod), band=Band(-60, 30)), range(5, 71, 6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("band", [Band(), Band(None, 100), Band(-400, 90), Band(700, None)])
@pytest.mark.parametrize("rows", [None, range(650, 651), range(1, 1300, 2)], ids=str)
def test_many_tiles(band, rows, dtype):
    if dtype not in DTYPES:
        pytest.skip("needs ml_dtypes")
    shape = (1, 2, 1, 700, 5000, 24, 8) if rows and len(rows) == 1 else (1, 4, 2, 1300, 1100, 24, 8)
    check(make_problem(shape, dtype, band=band), rows)


def test_a_group_that_is_larger_than_a_tile():
    check(make_problem((1, 600, 1, 3, 700, 8, 8), band=Band(None, 500)))


@given(case=cases(max_seqlen=80), with_mod=st.sampled_from([None, *EXPRESSIONS]))
def test_public_functions(case, with_mod):
    q, k, v, _ = make_operands(case)
    # Captured arrays are not empty.
    mod = None if with_mod is None or case.seqlen_k == 0 else make_mod(with_mod, case)
    options = case.options | {"score_mod": mod}
    _, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    weights = cuflash.attention_weights(q, k, lse, **options)
    received = cuflash.attention_received(q, k, lse, **options)
    assert weights.dtype == received.dtype == accumulator(q.dtype)
    assert weights.shape == (case.batch, case.num_heads, case.seqlen_q, case.seqlen_k)
    assert received.shape == (case.batch, case.num_heads, case.seqlen_k)
    if case.layout == "bshd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    score = Score(mod=None if mod is None else bound_of(mod))
    yardstick = Yardstick(q, k, v, band=case.band, scale=case.softmax_scale, score=score)
    yardstick.assert_weights(weights, lse)
    yardstick.assert_received(received, lse)


# ------------------------------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_they_are_the_weights_of_the_values(layout):
    q, k, v = random(2, 4, 31, 8), random(2, 2, 43, 8, seed=1), random(2, 2, 43, 5, seed=2)
    options = of_every_kind(np.random.default_rng(3), 2, 4, 31, 43) | {"layout": layout}
    if layout == "bshd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    weights = cuflash.attention_weights(q, k, lse, **options)
    if layout == "bshd":
        out, v = out.swapaxes(1, 2), v.swapaxes(1, 2)
    np.testing.assert_allclose(weights @ v.repeat(2, axis=1), out, rtol=1e-12, atol=1e-12)
    sees_something = np.isfinite(lse)
    assert 0 < sees_something.mean() < 1
    np.testing.assert_allclose(weights.sum(-1), sees_something, rtol=1e-12)
    np.testing.assert_allclose(
        cuflash.attention_received(q, k, lse, **options), weights.sum(-2), rtol=1e-12, atol=1e-15
    )


def test_sinks_take_their_share():
    q, k, v = random(3, 4, 9, 8)
    sinks = np.array([0.0, 2.0, -1.0, 5.0])
    out, lse = cuflash.attention(q, k, v, sinks=sinks, return_lse=True)
    weights = cuflash.attention_weights(q, k, lse)
    np.testing.assert_allclose(weights.sum(-1), 1 - np.exp(sinks[:, None] - lse), rtol=1e-12)
    np.testing.assert_allclose(weights @ v, out, rtol=1e-12)


def test_dropout_comes_later():
    q, k, v = random(3, 4, 9, 8)
    out, lse = cuflash.attention(q, k, v, dropout_p=0.5, seed=3, return_lse=True)
    kept = cuflash.dropout_mask(3, 0.5, (4, 9, 9))
    np.testing.assert_allclose(cuflash.attention_weights(q, k, lse) * kept / 0.5 @ v, out, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        (None, slice(None)),
        (0, slice(0, 1)),
        (-1, slice(30, 31)),
        (np.int64(7), slice(7, 8)),
        (slice(None, None, 6), slice(None, None, 6)),
        (slice(-9, None, 2), slice(-9, None, 2)),
        (slice(25, 99), slice(25, 99)),
        (slice(20, 10), slice(20, 10)),
        (slice(40, None), slice(40, None)),
        (range(3, 29, 5), slice(3, 29, 5)),
        (range(-9, 0, 4), slice(-9, None, 4)),
        (range(30, -31), slice(0, 0)),
        (range(5, 5), slice(0, 0)),
    ],
    ids=str,
)
def test_rows_are_those_of_all(rows, same):
    q, k, v = random(2, 4, 31, 8), random(2, 2, 43, 8, seed=1), random(2, 2, 43, 5, seed=2)
    for options in ({}, {"is_causal": True}, of_every_kind(np.random.default_rng(3), 2, 4, 31, 43)):
        _, lse = cuflash.attention(q, k, v, return_lse=True, **options)
        wanted = cuflash.attention_weights(q, k, lse, **options)[:, :, same]
        found = cuflash.attention_weights(q, k, lse, rows=rows, **options)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (9, IndexError, "rows: got 9, wanted one of the 9 queries"),
        (-10, IndexError, "rows: got -10, wanted one of the 9 queries"),
        (range(3, 10), ValueError, "rows: got range(3, 10), wanted some of the 9 queries"),
        (range(-10, -2), ValueError, "rows: got range(-10, -2), wanted some of the 9 queries"),
        (range(-2, 2), ValueError, "rows: got range(-2, 2), wanted some of the 9 queries"),
        (range(5, 1, -1), TypeError, "rows: got range(5, 1, -1), wanted integers as bounds, and a step above 0"),
        (slice(None, None, -1), TypeError, "rows: got slice(None, None, -1), wanted integers as bounds, and a step"),
        (slice(1, 5, 0), TypeError, "rows: got slice(1, 5, 0), wanted integers as bounds, and a step above 0"),
        (slice(1.5), TypeError, "rows: got slice(None, 1.5, None), wanted integers as bounds, and a step above 0"),
        (1.0, TypeError, "rows: got 1.0, wanted None, an integer, a slice or a range"),
        (True, TypeError, "rows: got True, wanted None, an integer, a slice or a range"),
        ([1, 2], TypeError, "rows: got [1, 2], wanted None, an integer, a slice or a range"),
        (np.arange(3), TypeError, "rows: got array([0, 1, 2]), wanted None, an integer, a slice or a range"),
        ("all", TypeError, "rows: got 'all', wanted None, an integer, a slice or a range"),
    ],
)
def test_what_are_no_rows(rows, error, message):
    q, lse = random(2, 9, 4), random(2, 9)
    cuflash.attention_weights(q, q, lse, rows=1)  # what equals it is no row all the same
    with pytest.raises(error, match=re.escape(message)):
        cuflash.attention_weights(q, q, lse, rows=rows)


# ------------------------------------------------------------------------------------ batch axes, layouts, strides


BATCHES = [
    # of q, k and v
    ((3, 2), (3, 2), (3, 2)),
    ((3, 2), (2,), ()),
    ((), (3, 1), (2,)),
    ((1, 2), (3, 1), (3, 2)),
    ((2,), (2,), (3, 2)),
    ((), (), (2,)),
]


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_batch_axes_broadcast_as_a_loop_would(batches, layout):
    own = (4, 5, 8), (2, 7, 8), (2, 7, 3)
    q, k, v = (random(*batch, *last, seed=seed) for seed, (batch, last) in enumerate(zip(batches, own, strict=True)))
    q, k = q[..., ::-1, :], k[::-1]
    if layout == "bshd":
        q, k, v = (x.swapaxes(-3, -2) for x in (q, k, v))
    batch = np.broadcast_shapes(*batches)
    whole = [np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (q, k)]
    mask = random(*batch[-1:], 1, 5, 7, seed=4) < 0.7
    number = np.arange(max(np.prod(batch, dtype=int), 1)) / 10
    mod = cuflash.score_mod("score + number[b]", number=number)
    options = {"layout": layout, "is_causal": True, "mask": mask, "score_mod": mod}
    _, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    # Of other strides, and finite where nothing is seen, which is all hidden by itself.
    lse = np.asfortranarray(np.where(np.isfinite(lse), lse, 0))
    weights = cuflash.attention_weights(q, k, lse, rows=slice(1, None, 2), **options)
    received = cuflash.attention_received(q, k, lse, **options)
    assert weights.shape == (*batch, 4, 2, 7)
    assert received.shape == (*batch, 4, 7)
    for entry, index in enumerate(np.ndindex(batch)):
        options["mask"] = np.broadcast_to(mask, (*batch, 1, 5, 7))[index]
        options["score_mod"] = cuflash.score_mod("score + number", number=number[entry])
        part = [x[index] for x in (*whole, lse)]
        wanted = cuflash.attention_weights(*part, **options)
        np.testing.assert_allclose(weights[index], wanted[:, 1::2], rtol=1e-12)
        np.testing.assert_allclose(received[index], wanted.sum(-2), rtol=1e-12)
        np.testing.assert_allclose(received[index], cuflash.attention_received(*part, **options), rtol=1e-12)


def test_matrices_are_one_head_without_batch():
    q, k, v = random(5, 4), random(7, 4), random(7, 2)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    weights = cuflash.attention_weights(q, k, lse)
    assert weights.shape == (5, 7)
    np.testing.assert_allclose(weights @ v, out, rtol=1e-12)
    assert cuflash.attention_weights(q, k, lse, rows=2).shape == (1, 7)
    np.testing.assert_allclose(cuflash.attention_received(q, k, lse), weights.sum(0), rtol=1e-12)
    # One head that came with the values, or one of the keys for many.
    assert cuflash.attention_weights(q, k, lse[None]).shape == (1, 5, 7)
    assert cuflash.attention_received(q, k, np.stack([[lse], [lse]])).shape == (2, 1, 7)


def test_the_case_of_every_storage():
    case = Case("float32", 2, 4, 2, 33, 47, 16, 8, is_causal=True)
    wanted = None
    for storage in ("contiguous", "padded", "odd_rows", "offset", "sliced", "transposed"):
        q, k, v, _ = make_operands(Case(**(vars(case) | {"storage": (storage,) * 4})))
        _, lse = cuflash.attention(q, k, v, is_causal=True, return_lse=True)
        found = cuflash.attention_weights(q[..., ::-1, :], k, lse[..., ::-1], rows=slice(3, None, 2))
        wanted = found if wanted is None else wanted
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ((2, 4, 0, 8), (2, 2, 7, 8)), ((2, 4, 5, 8), (2, 2, 0, 8)), ((2, 4, 0, 8), (2, 2, 0, 8)),
        ((0, 4, 5, 8), (0, 2, 7, 8)), ((2, 0, 5, 8), (2, 2, 7, 8)), ((2, 0, 5, 8), (2, 0, 7, 8)),
    ],
    ids=str,
)  # fmt: skip
def test_empty_inputs(q, k):
    q, k = random(*q), random(*k)
    _, lse = cuflash.attention(q, k, k, return_lse=True)
    weights = cuflash.attention_weights(q, k, lse)
    assert weights.shape == (*q.shape[:3], k.shape[2])
    assert cuflash.attention_weights(q, k, lse, rows=slice(1, 3)).shape[2] == len(range(q.shape[2])[1:3])
    received = cuflash.attention_received(q, k, lse)
    assert received.shape == (*q.shape[:2], k.shape[2])
    assert not received.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf])
def test_rows_without_keys_and_keys_without_rows(poison, dtype):
    shape = (2, 4, 2, 300, 560, 16, 8)
    bias = np.zeros((1, 1, 1, 560), np.float32)
    bias[..., 520:530] = -np.inf
    mask = np.ones((2, 1, 300, 560), bool)
    mask[1, :, 200:], mask[..., 540:] = False, False
    problem = make_problem(shape, dtype, score=Score(mask=mask, bias=bias), band=Band(None, 255 - 20))
    problem.k[:, :, 520:530], problem.k[:, :, 540:], problem.q[1, :, 200:] = poison, poison, poison
    lse, weights, received = check(problem)
    assert (lse[1, :, 200:] == -np.inf).all()
    assert np.isfinite(weights).all()
    assert (weights[1, :, 200:] == 0).all()
    for never in (slice(520, 530), slice(535, 560)):
        assert (weights[..., never] == 0).all()
        assert (received[..., never] == 0).all()


def test_an_lse_of_minus_infinity_is_a_row_without_weights():
    q, lse = random(2, 9, 4), random(2, 9)
    lse[1, 3:5] = -np.inf
    q[1, 4] = np.nan
    weights = cuflash.attention_weights(q, q[:, :4], lse)
    assert (weights[1, 3:5] == 0).all()
    assert (weights > 0).sum() == 2 * 7 * 4 + 2 * 4


def test_what_is_no_number_reaches_the_weights_of_its_pairs_only():
    q, k = random(2, 9, 4), random(2, 9, 4, seed=1)
    _, lse = cuflash.attention(q, k, k, is_causal=True, return_lse=True)
    k[1, 6] = np.nan
    weights = cuflash.attention_weights(q, k, lse, is_causal=True)
    spoiled = np.zeros(weights.shape, bool)
    spoiled[1, 6:, 6] = True
    np.testing.assert_array_equal(np.isnan(weights), spoiled)
    received = cuflash.attention_received(q, k, lse, is_causal=True)
    np.testing.assert_array_equal(np.isnan(received), spoiled.any(axis=1))


# ---------------------------------------------------------------------------------------------- threads and memory


@given(problem=problems(dtypes=("float32",)), data=st.data())
@settings(max_examples=15)
def test_bits_do_not_depend_on_threads_or_batch(data, problem):
    rows = data.draw(chosen(problem.q.shape[2]))
    _, lse = forward(problem)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for threads in ("1", "4"):
            patch.setenv("CUFLASH_NUM_THREADS", threads)
            found.append(computed(problem, lse, rows))
    for actual, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("threads", ["1", "4"])
def test_bits_of_many_tiles(threads, monkeypatch):
    problem = make_problem((2, 4, 2, 1200, 1300, 16, 8), band=Band(-900, 200))
    _, lse = forward(problem)
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "2")
    wanted = computed(problem, lse)
    monkeypatch.setenv("CUFLASH_NUM_THREADS", threads)
    for actual, desired in zip(computed(problem, lse), wanted, strict=True):
        np.testing.assert_array_equal(actual, desired)


def test_memory_beyond_the_result_is_linear(monkeypatch):
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "2")
    q = random(1, 8192, 8, dtype=np.float32)
    mask = np.ones((8192, 1), bool)
    lse = np.full((1, 8192), 9, np.float32)
    tracemalloc.start()
    try:
        cuflash.attention_received(q, q, lse, is_causal=True, mask=mask)
        cuflash.attention_weights(q, q, lse, rows=slice(-4, None), is_causal=True, mask=mask)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24e6  # the weights take 256 MiB


# ---------------------------------------------------------------------------------------------------------- errors


FUNCTIONS = [cuflash.attention_weights, cuflash.attention_received]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: got list, wanted an array"),
        ({"lse": None}, TypeError, "lse: got NoneType, wanted an array"),
        ({"q": np.ones((2, 4, 5, 8), int)}, TypeError, "q: got dtype int64"),
        ({"k": random(2, 2, 7, 8, dtype=np.float32)}, TypeError, "k: got dtype float32, wanted float64 as q has"),
        ({"k": random(2, 2, 7, 9)}, ValueError, "k: got shape (2, 2, 7, 9), wanted 8 elements on the last axis"),
        ({"k": random(2, 3, 7, 8)}, ValueError, "wanted a divisor of the 4 heads of q"),
        ({"k": random(3, 2, 7, 8)}, ValueError, "q, k: got batch axes (2,) and (3,), wanted axes that broadcast"),
        ({"k": random(2, 2, 8, 7).swapaxes(2, 3)}, ValueError, "k: got a stride of 7 elements on the last axis"),
        ({"lse": random(2, 4, 6)}, ValueError, "lse: got shape (2, 4, 6), wanted (2, 4, 5), (..., heads, seqlen_q)"),
        ({"lse": random(4, 5)}, ValueError, "lse: got shape (4, 5), wanted (2, 4, 5)"),
        ({"lse": random(1, 4, 5)}, ValueError, "lse: got shape (1, 4, 5), wanted (2, 4, 5)"),
        ({"lse": random(3, 4, 5)}, ValueError, "lse: got shape (3, 4, 5), wanted (2, 4, 5)"),
        ({"lse": random(2, 5, 4)}, ValueError, "lse: got shape (2, 5, 4), wanted (2, 4, 5)"),
        ({"lse": random()}, ValueError, "lse: got shape (), wanted (2, 4, 5)"),
        ({"lse": random(2, 4, 5, dtype=np.float32)}, TypeError, "lse: got dtype float32, wanted float64 for float64"),
        ({"mask": np.ones(7)}, TypeError, "mask: got dtype float64, wanted bool"),
        ({"bias": np.ones((4, 5, 6))}, ValueError, "bias: got shape (4, 5, 6), wanted a shape that broadcasts to"),
        ({"alibi_slopes": np.ones(3)}, ValueError, "alibi_slopes: got shape (3,)"),
        ({"is_causal": 1}, TypeError, "is_causal: got 1, wanted True or False"),
        ({"window": 3}, TypeError, "window: got 3, wanted a tuple"),
        ({"q_offset": 0.5}, TypeError, "q_offset: got 0.5"),
        ({"scale": np.inf}, ValueError, "scale: got inf"),
        ({"softcap": 0}, ValueError, "softcap: got 0.0"),
        ({"score_mod": "score"}, TypeError, "score_mod: got str"),
        ({"layout": "sbhd"}, ValueError, "layout: got 'sbhd'"),
        ({"precision": "half"}, ValueError, "precision: got 'half'"),
        ({"precision": "tf32"}, ValueError, "precision: got 'tf32' for float64 inputs"),
    ],
    ids=str,
)
def test_errors(function, change, error, message):
    arguments = {"q": random(2, 4, 5, 8), "k": random(2, 2, 7, 8), "lse": random(2, 4, 5)} | change
    with pytest.raises(error, match=re.escape(message)):
        function(arguments.pop("q"), arguments.pop("k"), arguments.pop("lse"), **arguments)


def test_precision_is_a_permission():
    q, lse = random(2, 9, 4, dtype=np.float32), random(2, 9, dtype=np.float32)
    wanted = cuflash.attention_weights(q, q, lse)
    np.testing.assert_array_equal(cuflash.attention_weights(q, q, lse, precision="tf32"), wanted)


def test_a_call_is_prepared_once():
    q, lse = random(2, 9, 4), random(2, 9)
    prepared = arrays.frameworks[np.ndarray].prepared
    for rows in (None, 3, slice(1, 5, 2), range(1, 5)):
        prepared.clear()
        for _ in range(2):
            cuflash.attention_weights(q, q, lse, rows=rows, is_causal=True)
            assert len(prepared) == 1
    cuflash.attention_received(q, q, lse, is_causal=True)
    assert len(prepared) == 2


def test_what_a_launch_is_told():
    """The result and the LSE of one launch lie behind those of the launch before, in C order."""
    framework = arrays.frameworks[np.ndarray]
    q, k, lse = random(3, 2, 4, 5, 8), random(2, 2, 7, 8), random(3, 2, 4, 5)
    named = {"q": q.swapaxes(0, 1), "k": k[:, None], "lse": lse.swapaxes(0, 1)}
    views = [framework.view(array, name) for name, array in named.items()]
    call = arguments.weights(*views, slice(1, None, 2), arguments.Options())
    assert call.loop == (2,)
    assert call.rows == range(1, 5, 2)
    assert call.out_shape == (2, 3, 4, 2, 7)
    assert call.problem.seqlen_q == 5
    assert call.strides == ((160, 320, 40, 8), (112, 0, 56, 8))
    assert list(call.offsets()) == [(0, 0, 0), (160 * 8, 112 * 8, 60 * 8)]
    call = arguments.received(*views, arguments.Options())
    assert call.rows is None
    assert call.out_shape == (2, 3, 4, 7)


# ------------------------------------------------------------------------------------------------------ frameworks


def test_arrays_of_other_libraries():
    q, k = random(2, 4, 5, 6), random(2, 2, 7, 6, seed=1)
    _, lse = cuflash.attention(q, k, k, return_lse=True)
    options = {"mask": random(5, 7) < 0.8, "bias": random(4, 1, 7), "alibi_slopes": random(4)}
    foreign = {name: Array(x) for name, x in options.items()}
    gate = random(4)
    foreign_gate = Array(gate)
    foreign_gate.dtype = gate.dtype
    options["score_mod"] = cuflash.score_mod("score * gate[h]", gate=gate)
    foreign["score_mod"] = cuflash.score_mod("score * gate[h]", gate=foreign_gate)
    for function, rows in zip(FUNCTIONS, ({"rows": slice(1, 4)}, {}), strict=True):
        wanted = function(q, k, lse, **rows, **options)
        found = function(Array(q), Array(k), Array(lse), **rows, **foreign)
        assert type(found) is Array
        np.testing.assert_array_equal(found.array, wanted)
    with pytest.raises(TypeError, match="lse: got an array of NumPy, wanted one of"):
        cuflash.attention_weights(Array(q), Array(k), lse)
    with pytest.raises(TypeError, match="mask: got an array of NumPy, wanted one of"):
        cuflash.attention_received(Array(q), Array(k), Array(lse), mask=options["mask"])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batches", BATCHES[1:4], ids=str)
def test_launches_on_a_gpu(batches, function, monkeypatch):
    """What is launched, by NumPy on the addresses and strides that a kernel would get."""
    device = HostLaunches()
    monkeypatch.setattr(cuflash, "launch", device, raising=False)
    monkeypatch.setitem(sys.modules, "cuflash.launch", device)
    monkeypatch.setitem(arrays.frameworks, DeviceArray, DeviceArrays())
    q, k = random(*batches[0], 4, 5, 8), random(*batches[1], 2, 7, 8, seed=1)
    lse = np.asfortranarray(random(*np.broadcast_shapes(*batches), 4, 5, seed=2))
    options = {"alibi_slopes": random(4), "mask": random(*batches[0], 1, 5, 1) < 0.8, "bias": random(4, 1, 7)}
    gate = random(4)
    options["score_mod"] = cuflash.score_mod("score * gate[h] + b", gate=gate)
    there = {name: x.view(DeviceArray) for name, x in options.items() if name != "score_mod"}
    there["score_mod"] = cuflash.score_mod("score * gate[h] + b", gate=gate.view(DeviceArray))
    chosen = {"rows": slice(1, None, 2)} if function is cuflash.attention_weights else {}
    for on_host, on_device in (({}, {}), (options, there)):
        wanted = function(q, k, lse, **chosen, **on_host)
        found = function(*(x.view(DeviceArray) for x in (q, k, lse)), **chosen, **on_device)
        assert type(found) is DeviceArray
        np.testing.assert_array_equal(found, wanted)
    assert device.log
    assert set(device.log) == {("weights", 1, 7)}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch(torch, dtype):
    q = torch.from_numpy(random(2, 4, 5, 8)).to(getattr(torch, dtype))
    k = torch.from_numpy(random(2, 2, 7, 8, seed=1)).to(getattr(torch, dtype))
    mask = torch.from_numpy(random(5, 7) < 0.8)
    _, lse = cuflash.attention(q, k, k, mask=mask, return_lse=True)
    weights = cuflash.attention_weights(q, k, lse, rows=slice(None, None, 2), mask=mask)
    received = cuflash.attention_received(q, k, lse, mask=mask)
    assert weights.dtype == received.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    exact = [x.double().numpy() for x in (q, k, lse)]
    wanted = reference.attention_weights(*exact, scale=8**-0.5, score=Score(mask=mask.numpy()))
    np.testing.assert_allclose(weights.numpy(), wanted[:, :, ::2], rtol=2e-5)
    np.testing.assert_allclose(received.numpy(), wanted.sum(2), rtol=2e-5)


def test_lazily_negated_tensors(torch):
    def negated(x):
        lazy = torch._neg_view(x)
        assert lazy.is_neg()
        return lazy

    q, lse, bias = (torch.from_numpy(random(*shape)) for shape in ((2, 9, 4), (2, 9), (9, 9)))
    for function in FUNCTIONS:
        wanted = function(-q, -q, -lse, bias=-bias)
        torch.testing.assert_close(function(negated(q), negated(q), negated(lse), bias=negated(bias)), wanted)
        torch.testing.assert_close(function(-q, -q, negated(lse), bias=-bias), wanted)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_they_are_not_differentiable(torch, function):
    q, lse, bias, gate = (torch.from_numpy(random(*shape)) for shape in ((2, 9, 4), (2, 9), (9, 9), (2,)))
    wanted = function(q, q, lse, bias=bias)
    message = rf"{function.__name__}: got arrays that record .*: detach\(\) them, or call under torch\.no_grad\(\)"
    for own in (q, lse, bias):
        own.requires_grad_()
        with pytest.raises(NotImplementedError, match=message):
            function(q, q, lse, bias=bias)
        with torch.no_grad():
            torch.testing.assert_close(function(q, q, lse, bias=bias), wanted)
        own.requires_grad_(False)
    gate.requires_grad_()
    with pytest.raises(NotImplementedError, match=message):
        function(q, q, lse, score_mod=cuflash.score_mod("score * gate[h]", gate=gate))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vmap(function)(q[None], q[None], lse[None])
