"""What the NumPy path does to scores and weights beyond the band, against the float64 reference."""

import itertools
import time
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuflash import cpu, reference
from cuflash.expression import Captured
from cuflash.scores import Band, Score
from tests.cpu.expressions import bound
from tests.strategies import DTYPES, STORAGES, bands, make_band, numpy_dtype, stored
from tests.tolerance import Yardstick, accumulator

ARRAYS = ("bias", "alibi_slopes", "sinks")


class Problem(NamedTuple):
    """Operands, and a score whose arrays have the shapes of their gradients."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    d_out: np.ndarray
    d_lse: np.ndarray
    score: Score = Score()
    band: Band = Band()
    scale: float = 0.4


def canonical(problem):
    """The score with its arrays as the path takes them: broadcast by strides of 0."""
    batch, num_heads, seqlen_q, _ = problem.q.shape
    whole = batch, num_heads, seqlen_q, problem.k.shape[2]
    score = problem.score
    views = {name: np.broadcast_to(x, whole) for name in ("bias", "mask") if (x := getattr(score, name)) is not None}
    if score.alibi_slopes is not None:
        views["alibi_slopes"] = np.broadcast_to(score.alibi_slopes, whole[:2])
    return score._replace(**views)


def forward(problem):
    """Out and LSE from memory full of NaN."""
    q, k, v = problem[:3]
    out = np.full((*q.shape[:3], v.shape[3]), np.nan, q.dtype)
    lse = np.full(q.shape[:3], np.nan, accumulator(q.dtype))
    cpu.forward(q, k, v, out, lse, band=problem.band, scale=problem.scale, score=canonical(problem))
    return out, lse


def backward(problem, out, lse, start=0.0, names=ARRAYS):
    """All gradients; what the arrays of the score are given is added to ``start``."""
    q, k, v, d_out, d_lse = problem[:5]
    gradients = [np.full(x.shape, np.nan, x.dtype) for x in (q, k, v)]
    dtype = accumulator(q.dtype)
    others = {
        f"d_{name}": np.full(x.shape, start, dtype) for name in names if (x := getattr(problem.score, name)) is not None
    }
    if (mod := problem.score.mod) is not None:
        others["d_captured"] = {
            name: np.full(mod.values[name].shape, start, dtype) for name in mod.expression.real_arrays
        }
    cpu.backward(
        d_out, q, k, v, out, lse, d_lse, *gradients,
        band=problem.band, scale=problem.scale, score=canonical(problem), **others,
    )  # fmt: skip
    return reference.Gradients(*gradients, **others)


def results(problem):
    out, lse = forward(problem)
    *gradients, captured = backward(problem, out, lse)
    return out, lse, *(x for x in gradients if x is not None), *(captured or {}).values()


def check(problem):
    """Forward and backward against the reference."""
    q, k, v, d_out, d_lse, score, band, scale = problem
    yardstick = Yardstick(q, k, v, band=band, scale=scale, score=score)
    out, lse = forward(problem)
    yardstick.assert_forward(out, lse)
    gradients = backward(problem, out, lse)
    yardstick.assert_backward(d_out, gradients, d_lse=d_lse)
    return out, lse, gradients


def make_problem(shape, dtype="float32", seed=0, **options):
    """Random operands of (batch, heads, heads_kv, seqlen_q, seqlen_k, dim, dim_v)."""
    rng = np.random.default_rng(seed)
    batch, heads, heads_kv, seqlen_q, seqlen_k, dim, dim_v = shape
    shapes = [(heads, seqlen_q, dim), (heads_kv, seqlen_k, dim), (heads_kv, seqlen_k, dim_v), (heads, seqlen_q, dim_v)]
    operands = [rng.standard_normal((batch, *shape)).astype(numpy_dtype(dtype)) for shape in shapes]
    d_lse = rng.standard_normal((batch, heads, seqlen_q)).astype(accumulator(operands[0].dtype))
    return Problem(*operands, d_lse, **options)


def make_options(shape, dtype="float32", seed=1):
    """Every option, by name."""
    rng = np.random.default_rng(seed)
    batch, heads, _, seqlen_q, seqlen_k, *_ = shape
    bias = rng.standard_normal((batch, heads, seqlen_q, seqlen_k))
    bias[rng.random(bias.shape) < 0.1] = -np.inf
    return {
        "softcap": {"softcap": 1.5},
        "bias": {"bias": bias.astype(numpy_dtype(dtype))},
        "mask": {"mask": rng.random((batch, heads, seqlen_q, seqlen_k)) < 0.7},
        "alibi": {"alibi_slopes": rng.random((batch, heads)).astype(np.float32), "q_offset": seqlen_k - seqlen_q},
        "sinks": {"sinks": rng.standard_normal(heads).astype(numpy_dtype(dtype))},
        "dropout": {"dropout_p": 0.3, "seed": 1 << 40, "first_batch": 0},
    }


NAMES = tuple(make_options((1, 1, 1, 1, 1)))
SHAPE = (2, 4, 2, 71, 93, 20, 13)
BANDS = {"open": Band(), "causal": Band(None, 22), "window": Band(-7, 30), "some rows see nothing": Band(-90, -10)}


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_every_option_alone_and_all_together(name, band, dtype):
    options = make_options(SHAPE, dtype)
    chosen = NAMES if name == "all" else [name]
    score = Score(**{key: value for one in chosen for key, value in options[one].items()})
    check(make_problem(SHAPE, dtype, score=score, band=band))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("band", [Band(), Band(None, 100), Band(-400, 90)])
def test_many_tiles_and_blocks(band, dtype):
    shape = (1, 4, 2, 700, 1100, 40, 24)
    score = Score(**{key: value for one in make_options(shape).values() for key, value in one.items()})
    check(make_problem(shape, dtype, score=score, band=band))


@pytest.mark.parametrize("pattern", list(itertools.product((False, True), repeat=4)))
def test_every_way_to_broadcast_a_bias(pattern, monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PART", 256)
    shape = (2, 4, 2, 300, 600, 8, 8)  # several parts of keys, and blocks of queries
    rng = np.random.default_rng(3)
    sizes = [1 if narrow else size for narrow, size in zip(pattern, (2, 4, 300, 600), strict=True)]
    score = Score(bias=rng.standard_normal(sizes).astype(np.float32), mask=rng.random(sizes) < 0.6)
    check(make_problem(shape, score=score, band=Band(None, 400)))


@st.composite
def problems(draw, dtypes=DTYPES):
    """Any options, shapes, broadcast patterns, strides and dtypes; some operands are not numbers."""
    heads_kv = draw(st.integers(1, 3))
    heads = heads_kv * draw(st.sampled_from((1, 2, 3)))
    batch, seqlen_q, seqlen_k = draw(st.integers(1, 3)), draw(st.integers(1, 150)), draw(st.integers(1, 150))
    dims = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 999)))

    def array(values):
        values = stored(values, draw(st.sampled_from(STORAGES[:-1])))
        flipped = draw(st.sampled_from((1, -1)))
        return values[..., ::flipped]

    def shape():
        whole = batch, heads, seqlen_q, seqlen_k
        return tuple(size if draw(st.booleans()) else 1 for size in whole)

    score = Score(q_offset=draw(st.integers(-100, 100)))
    if draw(st.booleans()):
        score = score._replace(softcap=draw(st.sampled_from((0.3, 2.0, 40.0))))
    if draw(st.booleans()):
        bias = draw(st.sampled_from((0.5, 4.0))) * rng.standard_normal(shape())
        bias[rng.random(bias.shape) < draw(st.sampled_from((0.0, 0.2, 1.0)))] = -np.inf
        score = score._replace(bias=array(bias.astype(numpy_dtype(draw(st.sampled_from(DTYPES))))))
    if draw(st.booleans()):
        mask = rng.random(shape()) < draw(st.sampled_from((0.0, 0.1, 0.6, 0.95, 1.0)))
        score = score._replace(mask=mask[..., :: draw(st.sampled_from((1, -1)))])
    if draw(st.booleans()):
        slopes = draw(st.sampled_from((0.05, 1.0))) * rng.standard_normal((draw(st.sampled_from((1, batch))), heads))
        score = score._replace(alibi_slopes=slopes.astype(numpy_dtype(draw(st.sampled_from(DTYPES)))))
    if draw(st.booleans()):
        sinks = 3 * rng.standard_normal(heads)
        sinks[rng.random(heads) < 0.2] = -np.inf
        score = score._replace(sinks=sinks.astype(numpy_dtype(draw(st.sampled_from(DTYPES)))))
    if draw(st.booleans()):
        score = score._replace(dropout_p=draw(st.sampled_from((0.1, 0.5, 0.9))), seed=draw(st.integers(0, 2**64 - 1)))
    if draw(st.booleans()):
        shape = batch, heads, heads_kv, seqlen_q, seqlen_k
        arrays = make_arrays(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
        score = score._replace(mod=make_mod(arrays, *MODS[draw(st.sampled_from(sorted(MODS)))]))
    options = draw(bands(150))
    band = make_band(options["is_causal"], options["window"], options["q_offset"], seqlen_q, seqlen_k)
    problem = make_problem(
        (batch, heads, heads_kv, seqlen_q, seqlen_k, *dims), dtype, draw(st.integers(0, 99)), score=score, band=band
    )
    for name in draw(st.lists(st.sampled_from(("q", "k", "v", "d_out")), max_size=2)):
        operand = getattr(problem, name)
        operand[:, :, draw(st.integers(0, operand.shape[2] - 1))] = np.nan
    return problem


@given(problem=problems())
def test_any_options(problem):
    check(problem)


@given(problem=problems(dtypes=("float32",)), threads=st.sampled_from(["1", "4"]))
@settings(max_examples=15)
def test_bits_do_not_depend_on_threads_or_batch(problem, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUFLASH_NUM_THREADS", "2")
        expected = results(problem)
        patch.setenv("CUFLASH_NUM_THREADS", threads)
        for actual, wanted in zip(results(problem), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)
    last = slice(len(problem.q) - 1, len(problem.q))
    score = {
        name: x[last] if len(x) > 1 else x
        for name in ("bias", "mask", "alibi_slopes")
        if (x := getattr(problem.score, name)) is not None
    }
    alone = problem._replace(score=problem.score._replace(first_batch=last.start, **score))
    alone = alone._replace(**{name: getattr(problem, name)[last] for name in ("q", "k", "v", "d_out", "d_lse")})
    for actual, wanted in zip(forward(alone), expected, strict=False):
        np.testing.assert_array_equal(actual, wanted[last])


@pytest.mark.parametrize("sizes", [(1, 1, 300, 2100), (1, 6, 300, 2100), (2, 1, 1, 2100), (1, 1, 300, 1), (1, 1, 1, 1)])
def test_gradients_that_tasks_share_are_the_same_bits(sizes, monkeypatch):
    shape = (2, 6, 3, 300, 2100, 8, 8)
    rng = np.random.default_rng(4)
    mask = np.repeat(rng.random((2, 6, 3, 21)) < 0.5, 100, axis=2).repeat(100, axis=3)
    score = Score(
        bias=rng.standard_normal(sizes).astype(np.float32), mask=mask, alibi_slopes=np.full((1, 6), 0.1, np.float32)
    )
    problem = make_problem(shape, score=score)
    found = []
    for threads in ("1", "4", "4"):
        monkeypatch.setenv("CUFLASH_NUM_THREADS", threads)
        found.append(results(problem))
    for actual in found[1:]:
        for one, other in zip(actual, found[0], strict=True):
            np.testing.assert_array_equal(one, other)


def test_tiles_that_are_skipped_take_their_turns(monkeypatch):
    mask = np.zeros((3, 2, 600, 900), bool)
    mask[0, :, :100], mask[1, 1, 300:, 700:], mask[2, 0] = True, True, True
    problem = make_problem((3, 2, 2, 600, 900, 8, 8), score=Score(mask=mask, bias=np.ones((600, 900), np.float32)))
    problem = problem._replace(score=problem.score._replace(bias=problem.score.bias[None, None]))
    steps = []
    end = cpu._Turn.end
    monkeypatch.setattr(cpu._Turn, "end", lambda turn: (steps.append(turn.steps), end(turn)))
    check(problem)
    assert steps == [steps[0]] * 6
    assert steps[0] > 4


# --------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_gradients_are_finite_differences(band):
    shape = (2, 4, 2, 13, 17, 5, 3)
    options = {key: value for one in make_options(shape, "float64").values() for key, value in one.items()}
    options["alibi_slopes"] = options["alibi_slopes"][:1].astype(np.float64)
    options["bias"] = np.where(np.isfinite(options["bias"]), options["bias"], 0)[:, :1]
    problem = make_problem(shape, "float64", score=Score(**options), band=band)
    out, lse = forward(problem)
    gradients = backward(problem, out, lse)
    rng = np.random.default_rng(0)

    def loss(problem):
        out, lse = forward(problem)
        return (out * problem.d_out).sum() + (lse * problem.d_lse).sum()

    def moved(name, by):
        if name in ARRAYS:
            return problem._replace(score=problem.score._replace(**{name: getattr(problem.score, name) + by}))
        return problem._replace(**{name: getattr(problem, name) + by})

    for name in ("q", "k", "v", *ARRAYS):
        gradient = getattr(gradients, f"d_{name}")
        direction = rng.standard_normal(gradient.shape)
        plus, minus = (loss(moved(name, sign * 1e-5 * direction)) for sign in (1, -1))
        np.testing.assert_allclose((gradient * direction).sum(), (plus - minus) / 2e-5, rtol=1e-7, atol=1e-8)


def test_gradients_of_options_are_added_and_may_be_left_out():
    options = make_options(SHAPE, "float64")
    score = Score(**{key: value for one in options.values() for key, value in one.items()})
    problem = make_problem(SHAPE, "float64", score=score)
    out, lse = forward(problem)
    expected = backward(problem, out, lse)
    moved = backward(problem, out, lse, start=3.0)
    for name in ARRAYS:
        np.testing.assert_allclose(
            getattr(moved, f"d_{name}"), getattr(expected, f"d_{name}") + 3, rtol=1e-12, atol=1e-12
        )
        alone = backward(problem, out, lse, names=(name,))
        assert [x is None for x in alone[3:6]] == [other != name for other in ARRAYS]
        for actual, wanted in zip(alone, expected, strict=True):
            if actual is not None:
                np.testing.assert_array_equal(actual, wanted)


# ------------------------------------------------------------------------------------------------- expressions


def make_arrays(shape, dtype="float32", seed=2):
    """What expressions here capture, some of it with strides of its own."""
    rng = np.random.default_rng(seed)
    batch, heads, heads_kv, seqlen_q, seqlen_k, *_ = shape
    longest = max(seqlen_q, seqlen_k)
    reals = {
        "rel": rng.standard_normal((9, heads)).T,
        "gate": 1 + 0.3 * rng.standard_normal(2 * heads)[::-2],
        "table": rng.standard_normal((batch, heads_kv, longest))[..., ::-1],
        "shift": rng.standard_normal(()),
    }
    return {name: x.astype(numpy_dtype(dtype), order="K") for name, x in reals.items()} | {
        "doc": np.sort(rng.integers(0, 200, longest)).astype(np.uint8),
        "seen": rng.random((batch, seqlen_q, seqlen_k)) < 0.7,
        "factor": 0.6,
        "count": 3,
    }


def make_mod(arrays, *texts):
    """Expressions one after the other, and those of the arrays that they name."""
    kinds = {
        name: Captured(getattr(x, "ndim", None), isinstance(x, float) or name in ("rel", "gate", "table", "shift"))
        for name, x in arrays.items()
    }
    return bound(arrays, kinds, *texts)


MODS = {
    "relative bias": ["score + rel[h, q_idx - k_idx + 4]"],
    "gate": ["score * gate[h]"],
    "soft cap": ["count * tanh(score / count) - factor * abs(q_idx - k_idx) / seqlen_k"],
    "documents": ["score if doc[q_idx] == doc[k_idx] else -inf"],
    "a mask and what only its pairs read": ["score + table[b, h_kv, k_idx] if seen[b, q_idx, k_idx] else -inf"],
    "a mask without a derivative": ["score + log(gate[h] * (q_idx % 3 != k_idx % 2) + 0 * score)"],
    "two steps": ["score * gate[h]", "tanh(score * gate[h_kv]) + shift * rel[b, k_idx]"],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("name", MODS)
def test_expressions(name, band, dtype):
    mod = make_mod(make_arrays(SHAPE, dtype), *MODS[name])
    check(make_problem(SHAPE, dtype, score=Score(mod=mod, first_batch=0), band=band))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", MODS)
def test_expressions_with_every_option(name, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PART", 256)
    shape = (2, 4, 2, 300, 600, 8, 12)  # several parts of keys, and blocks of queries
    score = Score(**{key: value for one in make_options(shape, dtype).values() for key, value in one.items()})
    # Slopes so small that distant keys count, too.
    mod, slopes = make_mod(make_arrays(shape, dtype), *MODS[name]), score.alibi_slopes / 100
    score = score._replace(mod=mod, alibi_slopes=slopes)
    check(make_problem(shape, dtype, score=score, band=Band(-250, 400)))


def test_first_batch_is_the_number_of_an_entry():
    shape = (3, 2, 1, 20, 30, 8, 8)
    arrays = make_arrays(shape)
    problem = make_problem(shape, score=Score(mod=make_mod(arrays, "score * (1 + b) + table[b, h_kv, k_idx % 7]")))
    out, lse, gradients = check(problem)
    last = slice(2, 3)
    alone = problem._replace(score=problem.score._replace(first_batch=2))
    alone = alone._replace(**{name: getattr(problem, name)[last] for name in ("q", "k", "v", "d_out", "d_lse")})
    found = check(alone)
    np.testing.assert_array_equal(found[0], out[last])
    np.testing.assert_array_equal(found[1], lse[last])
    captured = found[2].d_captured["table"]
    assert not captured[:2].any()
    np.testing.assert_allclose(captured[2], gradients.d_captured["table"][2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf])
def test_rows_that_see_nothing_by_an_expression(poison, with_sinks, dtype):
    shape = (2, 4, 2, 300, 560, 16, 8)
    text = "score * gate[h] + rel[h, k_idx % 9] if q_idx < 40 and b == 0 and k_idx < 520 else log(gate[h] * 0)"
    sinks = np.array([1.0, -2.0, 0.5, 3.0])
    arrays = make_arrays(shape)
    arrays["gate"] = abs(arrays["gate"])
    # -inf + inf is no number
    bias = np.where(np.arange(560) < 520, 0, np.float32(np.inf))[None, None, None]
    score = Score(mod=make_mod(arrays, text), bias=bias, sinks=sinks if with_sinks else None, softcap=2.0)
    problem = make_problem(shape, dtype, score=score)
    problem.k[:, :, 520:530], problem.v[:, :, 540:], problem.q[:, :, 200:] = poison, poison, poison
    out, lse, gradients = check(problem)
    for rows in (np.s_[0, :, 40:], np.s_[1]):
        assert (out[rows] == 0).all()
        assert (gradients.d_q[rows] == 0).all()
        wanted = sinks[:, None] if with_sinks else -np.inf
        np.testing.assert_allclose(lse[rows], np.broadcast_to(wanted, lse[rows].shape), rtol=1e-6)
    for x in (*gradients[:4], *gradients.d_captured.values()):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", MODS)
def test_gradients_of_what_is_captured_are_the_same_bits(name, monkeypatch):
    shape = (2, 6, 3, 300, 2100, 8, 8)
    problem = make_problem(shape, score=Score(mod=make_mod(make_arrays(shape), *MODS[name])), band=Band(None, 1800))
    found = []
    for threads in ("1", "4", "3"):
        monkeypatch.setenv("CUFLASH_NUM_THREADS", threads)
        found.append(results(problem))
    for actual in found[1:]:
        for one, other in zip(actual, found[0], strict=True):
            np.testing.assert_array_equal(one, other)


def test_gradients_of_what_is_captured_are_added_and_may_be_left_out():
    mod = make_mod(make_arrays(SHAPE, "float64"), "score * gate[h] + shift", "score + rel[h, k_idx - q_idx]")
    problem = make_problem(SHAPE, "float64", score=Score(mod=mod))
    out, lse = forward(problem)
    expected, moved = (backward(problem, out, lse, start).d_captured for start in (0.0, 3.0))
    assert tuple(expected) == ("gate", "shift", "rel")
    for name, gradient in expected.items():
        np.testing.assert_allclose(moved[name], gradient + 3, rtol=1e-12, atol=1e-12)
    alone = {"rel": np.zeros((9, 4)).T}
    others = [np.empty_like(x) for x in problem[:3]]
    cpu.backward(
        problem.d_out, *problem[:3], out, lse, problem.d_lse, *others,
        band=problem.band, scale=problem.scale, score=problem.score, d_captured=alone,
    )  # fmt: skip
    np.testing.assert_array_equal(alone["rel"], expected["rel"])


# ----------------------------------------------------------------------------------------------- hard numbers


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_large_biases_and_slopes_do_not_overflow(size):
    shape = (1, 2, 1, 60, 700, 16, 16)
    rng = np.random.default_rng(5)
    bias = np.where(rng.random((1, 2, 60, 700)) < 0.5, -size, 0).astype(np.float32)
    bias[:, :, 7] = -size  # the same as a bias of 0, up to a shift
    bias[:, :, 8] = size
    slopes = np.array([[size / 1000, -size / 1000]], np.float32)
    for score in (Score(bias=bias), Score(alibi_slopes=slopes, q_offset=640), Score(sinks=np.float32([size, -size]))):
        problem = make_problem(shape, score=score)
        problem.d_lse[...] = 0
        out, lse, gradients = check(problem)
        for x in (out, lse, *gradients):
            assert x is None or np.isfinite(x).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mask", "bias"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_see_nothing(how, dtype, with_sinks):
    shape = (2, 4, 2, 300, 260, 16, 8)
    seen = np.ones((2, 1, 300, 260), bool)
    seen[:, :, 40:], seen[1] = False, False
    sinks = np.array([1.0, -2.0, 0.5, 3.0])
    score = Score(mask=seen) if how == "mask" else Score(bias=np.where(seen, np.float32(0.5), -np.inf))
    score = score._replace(sinks=sinks if with_sinks else None, softcap=2.0)
    out, lse, gradients = check(make_problem(shape, dtype, score=score))
    blind = np.s_[0, :, 40:], np.s_[1]
    for rows in blind:
        assert (out[rows] == 0).all()
        assert (gradients.d_q[rows] == 0).all()
        wanted = sinks[:, None] if with_sinks else -np.inf
        np.testing.assert_allclose(lse[rows], np.broadcast_to(wanted, lse[rows].shape), rtol=1e-6)
        if how == "bias":
            assert (gradients.d_bias[rows] == 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["mask", "bias"])
def test_what_nobody_sees_does_not_leak(how, poison):
    shape = (2, 4, 2, 70, 600, 16, 16)
    seen = np.random.default_rng(6).random((2, 1, 70, 600)) < 0.8
    seen[..., 50:60] = seen[0, :, 20:30] = seen[..., 520:600] = False
    score = Score(mask=seen) if how == "mask" else Score(bias=np.where(seen, 0, -np.inf).astype(np.float32))
    score = score._replace(softcap=5.0, dropout_p=0.2)
    expected = check(make_problem(shape, score=score))
    problem = make_problem(shape, score=score)
    problem.k[:, :, 50:60], problem.v[:, :, 52:60], problem.v[:, :, 550:] = poison, poison, poison
    problem.q[0, :, 20:30] = poison
    out, lse, gradients = check(problem)
    for actual, wanted in zip((out, lse, *gradients), (*expected[:2], *expected[2]), strict=True):
        if actual is not None:
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 0), (0, 5), (5, 0), (1, 1), (1, 600), (600, 1)])
def test_edge_lengths(seqlen_q, seqlen_k):
    shape = (2, 4, 2, seqlen_q, seqlen_k, 7, 5)
    score = Score(**{key: value for one in make_options(shape).values() for key, value in one.items()})
    check(make_problem(shape, score=score))


@pytest.mark.parametrize("num_heads", [3, 600])
def test_group_larger_than_a_tile(num_heads):
    shape = (1, num_heads, 1, 3, 70, 8, 8)
    score = Score(**{key: value for one in make_options(shape).values() for key, value in one.items()})
    check(make_problem(shape, score=score, band=Band(-2, 60)))


def test_a_dropped_weight_counts_in_the_sum():
    """The LSE does not know of dropout, and the mean over seeds of what comes out is what comes out without."""
    problem = make_problem((1, 2, 1, 40, 50, 8, 8))
    out, lse = forward(problem)
    samples = []
    for seed in range(100):
        dropped, same_lse = forward(problem._replace(score=Score(dropout_p=0.25, seed=seed)))
        np.testing.assert_allclose(same_lse, lse, atol=1e-5)
        samples.append(dropped)
    error = np.abs(np.mean(samples, 0) - out)
    assert error.max() < 6 * np.std(samples, 0).max() / 10


# --------------------------------------------------------------------------------------------- what it costs


def test_a_failure_leaves_nobody_waiting_for_a_turn(monkeypatch):
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "3")
    problem = make_problem((4, 2, 2, 600, 900, 8, 8), score=Score(bias=np.ones((1, 1, 600, 900), np.float32)))
    out, lse = forward(problem)
    change_back = cpu._ScoreTile.change_back

    def failing(tile, d_scores):
        if tile.scores.place.b == 1:
            time.sleep(0.2)  # until others wait for this task
            raise ZeroDivisionError
        change_back(tile, d_scores)

    monkeypatch.setattr(cpu._ScoreTile, "change_back", failing)
    with pytest.raises(ZeroDivisionError):
        backward(problem, out, lse)


@pytest.mark.parametrize("name", ["plain bias", "alibi", "sinks", "dropout", "mask", "softcap", "mod"])
def test_memory_is_linear_in_the_lengths(name, monkeypatch):
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "2")

    def peak(seqlen):
        bias = np.zeros((1, 1, seqlen, seqlen), np.float32)
        options = {
            "plain bias": {"bias": bias},
            "alibi": {"alibi_slopes": np.ones((1, 2), np.float32)},
            "sinks": {"sinks": np.ones(2, np.float32)},
            "dropout": {"dropout_p": 0.5},
            "mask": {"mask": bias == 0},
            "softcap": {"softcap": 1.0},
            "mod": {"mod": make_mod({"rel": np.zeros((2, 9))}, "tanh(score) + rel[h, q_idx - k_idx]")},
        }
        problem = make_problem((1, 2, 1, seqlen, seqlen, 8, 8), score=Score(**options[name]), band=Band(None, 0))
        tracemalloc.start()
        results(problem)
        _, largest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return largest - (bias.nbytes if name == "plain bias" else 0)  # its gradient

    peak(2200)
    assert peak(4400) - peak(2200) < 2200 * 2200


def test_blocks_that_a_mask_hides_are_not_computed(monkeypatch):
    shape = (1, 2, 2, 4096, 4096, 16, 16)
    blocks = np.zeros((1, 1, 8, 8), bool)
    blocks[..., np.arange(8), (3 * np.arange(8)) % 8] = True
    mask = blocks.repeat(512, axis=2).repeat(512, axis=3)
    computed = []
    product = cpu._ScoreProduct.__call__
    monkeypatch.setattr(cpu._ScoreProduct, "__call__", lambda *args: (computed.append(0), product(*args))[1])
    counts = []
    for score in (Score(mask=mask), Score(mask=np.ones_like(mask))):
        computed.clear()
        results(make_problem(shape, score=score))
        counts.append(len(computed))
    assert counts[0] * 8 == counts[1]
    check(make_problem((1, 1, 1, 1024, 1024, 16, 16), score=Score(mask=mask[:, :, :1024, :1024])))
