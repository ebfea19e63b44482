"""Relations that hold for every attention, and need no reference: NumPy arrays through the public functions."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import cuflash
from tests.strategies import STORAGES, Case, cases, make_operands, numpy_dtype, stored

EXACT = ("float64",)
DTYPES_OF_SPEED = ("float32", "float64")


def small_cases(**overrides):
    """Cases that a property can run several times; head dims small, since a relation does not depend on them."""
    dims = st.tuples(st.integers(1, 24), st.integers(1, 24))
    return cases(**{"dims": dims, "dtypes": EXACT, "max_seqlen": 140, "max_batch": 2, **overrides})


def assert_close(actual, wanted, dtype="float64", magnitude=1.0):
    """Equal up to rounding in `dtype`, relative to the largest value or term; infinities must agree exactly."""
    if dtype in ("float32", "float64"):
        eps = float(np.finfo(dtype).eps)
    else:
        eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(actual[~finite], wanted[~finite])
    largest = np.max(np.abs(wanted[finite]), initial=magnitude)
    np.testing.assert_allclose(actual[finite], wanted[finite], rtol=0, atol=64 * eps * largest)


def dense_operands(case):
    """Operands in C order: what NumPy computes from others may lie in memory in any order, the last axis included."""
    return map(np.ascontiguousarray, make_operands(case))


def sequence_axis(case):
    return -2 if case.layout == "bhsd" else -3


def heads_axis(case):
    return -3 if case.layout == "bhsd" else -2


def largest_score(case, q, k):
    """A bound on the absolute value of any score."""
    norms = [np.max(np.linalg.norm(array, axis=-1), initial=0.0) for array in (q, k)]
    return abs(case.softmax_scale) * math.prod(norms)


def gradients(case, q, k, v, d_out, d_lse=None, **options):
    """Gradients d_q, d_k, d_v of one call, forward included."""
    options = {**case.options, **options}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **options)
    return found.d_q, found.d_k, found.d_v


# ------------------------------------------------------------------------------------------------------ forward


@given(case=small_cases(), cuts=st.lists(st.integers(0, 140), max_size=3))
def test_splitting_keys_and_merging_changes_nothing(case, cuts):
    case = replace(case, layout="bhsd")
    q, k, v, _ = make_operands(case)
    # The band is said relative to key 0, so each part shifts the query offset by where it starts.
    offset = case.seqlen_k - case.seqlen_q if case.q_offset is None else case.q_offset
    bounds = [0, *sorted(min(cut, case.seqlen_k) for cut in cuts), case.seqlen_k]
    parts = [
        cuflash.attention(
            q,
            k[..., start:stop, :],
            v[..., start:stop, :],
            return_lse=True,
            **{**case.options, "q_offset": offset - start},
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    out, lse = cuflash.merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    whole_out, whole_lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    assert_close(out, whole_out)
    assert_close(lse, whole_lse)


@example(
    case=Case("float64", num_heads=3, num_heads_kv=1, seqlen_q=63, seqlen_k=63, head_dim=1, head_dim_v=2, spread=3.0),
    seed=0,
)
@given(case=small_cases(), seed=st.integers(0, 99))
def test_order_of_keys_does_not_matter(case, seed):
    case = replace(case, is_causal=False, window=None, q_offset=None)
    q, k, v, d_out = make_operands(case)
    axis = sequence_axis(case)
    order = np.random.default_rng(seed).permutation(case.seqlen_k)
    shuffled_k, shuffled_v = np.take(k, order, axis), np.take(v, order, axis)
    for plain, shuffled in zip(
        cuflash.attention(q, k, v, return_lse=True, **case.options),
        cuflash.attention(q, shuffled_k, shuffled_v, return_lse=True, **case.options),
        strict=True,
    ):
        assert_close(shuffled, plain)
    d_q, d_k, d_v = gradients(case, q, k, v, d_out)
    shuffled_d_q, shuffled_d_k, shuffled_d_v = gradients(case, q, shuffled_k, shuffled_v, d_out)
    # Scores take their places in other products, and what rounding does to a score it does, relatively, to a weight.
    weights = 1 + largest_score(case, q, k)
    assert_close(shuffled_d_q, d_q, magnitude=weights)
    assert_close(shuffled_d_k, np.take(d_k, order, axis), magnitude=weights)
    assert_close(shuffled_d_v, np.take(d_v, order, axis), magnitude=weights)


@given(case=small_cases(dtypes=DTYPES_OF_SPEED))
def test_constant_values_come_out_constant(case):
    """Weights sum to one: where V is constant over keys, so is the output, except in rows that see nothing."""
    q, k, v, _ = make_operands(case)
    value = np.arange(1.0, case.head_dim_v + 1).astype(v.dtype)
    out, lse = cuflash.attention(q, k, np.broadcast_to(value, v.shape), return_lse=True, **case.options)
    sees = np.isfinite(lse) if case.layout == "bhsd" else np.isfinite(lse).swapaxes(1, 2)
    assert_close(out, np.where(sees[..., None], value, 0), case.dtype)


@given(case=small_cases(), shift=st.floats(-10, 10))
def test_shifting_all_scores_moves_only_the_lse(case, shift):
    """An extra coordinate that is constant in K adds the same number to every score of a row."""
    q, k, v, _ = dense_operands(case)
    scale = case.softmax_scale
    assume(scale != 0)
    more_q = np.concatenate([q, np.full_like(q[..., :1], shift / scale)], -1)
    more_k = np.concatenate([k, np.ones_like(k[..., :1])], -1)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    shifted_out, shifted_lse = cuflash.attention(more_q, more_k, v, return_lse=True, **{**case.options, "scale": scale})
    assert_close(shifted_out, out)
    assert_close(shifted_lse, lse + shift)


@given(case=small_cases())
def test_output_is_linear_in_values(case):
    q, k, v, _ = dense_operands(case)
    other = v[..., ::-1, :].copy()
    combined = cuflash.attention(q, k, 2 * v - 3 * other, **case.options)
    assert_close(
        combined, 2 * cuflash.attention(q, k, v, **case.options) - 3 * cuflash.attention(q, k, other, **case.options)
    )


@given(case=small_cases())
def test_scale_is_a_factor_of_queries(case):
    q, k, v, _ = dense_operands(case)
    options = {**case.options, "scale": 1.0}
    assert_close(cuflash.attention(q * case.softmax_scale, k, v, **options), cuflash.attention(q, k, v, **case.options))


@given(case=small_cases())
def test_causal_is_an_open_left_window_that_ends_here(case):
    q, k, v, _ = make_operands(case)
    options = {name: value for name, value in case.options.items() if name not in ("is_causal", "window")}
    causal = cuflash.attention(q, k, v, is_causal=True, **options)
    np.testing.assert_array_equal(causal, cuflash.attention(q, k, v, window=(None, 0), **options))


@given(case=small_cases())
def test_hidden_keys_are_never_read(case):
    """Keys and values that no query sees change nothing, whatever bits they hold."""
    q, k, v, d_out = dense_operands(case)
    seen = np.array([case.band.query_range(j, j + 1, case.seqlen_q)[1] > 0 for j in range(case.seqlen_k)], bool)
    hidden = np.expand_dims(~seen, (1,) if sequence_axis(case) == -2 else (1, 2))
    clean_k, clean_v = np.where(hidden, 0.0, k), np.where(hidden, 0.0, v)
    dirty_k, dirty_v = np.where(hidden, np.nan, k), np.where(hidden, np.inf, v)
    out, lse = cuflash.attention(q, dirty_k, dirty_v, return_lse=True, **case.options)
    clean_out, clean_lse = cuflash.attention(q, clean_k, clean_v, return_lse=True, **case.options)
    assert_close(out, clean_out)
    assert_close(lse, clean_lse)
    for dirty, clean in zip(
        gradients(case, q, dirty_k, dirty_v, d_out), gradients(case, q, clean_k, clean_v, d_out), strict=True
    ):
        assert_close(dirty, clean)


# ------------------------------------------------------------------------------------------- memory and shapes


@given(case=small_cases(dtypes=DTYPES_OF_SPEED, storages=("contiguous",)), storage=st.sampled_from(STORAGES[1:]))
def test_strides_do_not_change_a_bit(case, storage):
    """The operands' place in memory is not part of the problem; only a stride of 0 changes what they hold."""
    operands = make_operands(case)
    if storage == "broadcast":
        operands = [np.broadcast_to(array[:1], array.shape).copy() for array in operands]
    moved = [stored(array, storage) for array in operands]
    q, k, v, d_out = operands
    for plain, strided in zip(
        (*cuflash.attention(q, k, v, return_lse=True, **case.options), *gradients(case, q, k, v, d_out)),
        (*cuflash.attention(*moved[:3], return_lse=True, **case.options), *gradients(case, *moved)),
        strict=True,
    ):
        assert_close(strided, plain, case.dtype)


@given(case=small_cases(dtypes=DTYPES_OF_SPEED))
def test_layouts_agree(case):
    case = replace(case, layout="bhsd")
    q, k, v, d_out = make_operands(case)
    swapped = [array.swapaxes(1, 2) for array in (q, k, v, d_out)]
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    swapped_out, swapped_lse = cuflash.attention(*swapped[:3], layout="bshd", return_lse=True, **case.options)
    np.testing.assert_array_equal(swapped_out.swapaxes(1, 2), out)
    np.testing.assert_array_equal(swapped_lse, lse)
    for plain, other in zip(
        gradients(case, q, k, v, d_out), gradients(case, *swapped, layout="bshd"), strict=True
    ):  # fmt: skip
        np.testing.assert_array_equal(other.swapaxes(1, 2), plain)


@given(case=small_cases())
def test_grouped_heads_equal_repeated_heads(case):
    q, k, v, d_out = make_operands(case)
    group, axis = case.num_heads // case.num_heads_kv, heads_axis(case)
    many_k, many_v = np.repeat(k, group, axis), np.repeat(v, group, axis)
    for grouped, repeated in zip(
        cuflash.attention(q, k, v, return_lse=True, **case.options),
        cuflash.attention(q, many_k, many_v, return_lse=True, **case.options),
        strict=True,
    ):
        assert_close(grouped, repeated)
    d_q, d_k, d_v = gradients(case, q, k, v, d_out)
    many_d_q, many_d_k, many_d_v = gradients(case, q, many_k, many_v, d_out)
    assert_close(d_q, many_d_q)
    for grouped, repeated in ((d_k, many_d_k), (d_v, many_d_v)):
        shape = list(grouped.shape)
        shape.insert(axis + 5, group)
        assert_close(grouped, repeated.reshape(shape).sum(axis + 5))


@given(case=small_cases(storages=("contiguous",)))
def test_batch_axes_broadcast(case):
    """An operand of batch size 1, or without batch axes, is used by every entry, and its gradient is their sum."""
    q, k, v, d_out = make_operands(case)
    k, v = k[:1], v[:1]
    full_k, full_v = (np.broadcast_to(array, (case.batch, *array.shape[1:])) for array in (k, v))
    full = gradients(case, q, full_k, full_v, d_out)
    for narrow_k, narrow_v in ((k, v), (k[0], v[0])):
        np.testing.assert_array_equal(
            cuflash.attention(q, narrow_k, narrow_v, **case.options),
            cuflash.attention(q, full_k, full_v, **case.options),
        )
        d_q, d_k, d_v = gradients(case, q, narrow_k, narrow_v, d_out)
        assert_close(d_q, full[0])
        assert_close(d_k, full[1].sum(0).reshape(narrow_k.shape))
        assert_close(d_v, full[2].sum(0).reshape(narrow_v.shape))


@pytest.mark.parametrize("dtype", DTYPES_OF_SPEED)
def test_any_number_of_batch_axes(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((2, 1, 3, 4, 9, 8), (5, 1, 2, 7, 8), (2, 7, 6)))
    out, lse = cuflash.attention(q, k, v, is_causal=True, return_lse=True)
    assert out.shape == (2, 5, 3, 4, 9, 6)
    assert lse.shape == (2, 5, 3, 4, 9)
    for index in np.ndindex(2, 5, 3):
        one_out, one_lse = cuflash.attention(
            q[index[0], 0, index[2]], k[index[1], 0], v, is_causal=True, return_lse=True
        )  # fmt: skip
        assert_close(out[index], one_out, dtype)
        assert_close(lse[index], one_lse, dtype)


def test_two_axes_are_one_head():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((5, 8)), rng.standard_normal((7, 8)), rng.standard_normal((7, 3))
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    whole_out, whole_lse = cuflash.attention(q[None, None], k[None, None], v[None, None], return_lse=True)
    np.testing.assert_array_equal(out, whole_out[0, 0])
    np.testing.assert_array_equal(lse, whole_lse[0, 0])
    weights = np.exp(q @ k.T * 8**-0.5)
    assert_close(out, weights / weights.sum(-1, keepdims=True) @ v)
    assert_close(lse, np.log(weights.sum(-1)))


@given(case=small_cases(), data=st.data())
def test_parts_of_a_batch_are_independent(case, data):
    q, k, v, _ = make_operands(case)
    entry = data.draw(st.integers(0, case.batch - 1))
    whole = cuflash.attention(q, k, v, return_lse=True, **case.options)
    one = slice(entry, entry + 1)
    part = cuflash.attention(q[one], k[one], v[one], return_lse=True, **case.options)
    for array, expected in zip(part, whole, strict=True):
        np.testing.assert_array_equal(array, expected[one])


# ---------------------------------------------------------------------------------------------------- gradients


@given(case=small_cases(dtypes=("float64",)))
def test_gradients_are_linear_in_what_flows_back(case):
    q, k, v, d_out = dense_operands(case)
    d_lse = np.random.default_rng(case.seed).standard_normal((case.batch, case.num_heads, case.seqlen_q))
    both = gradients(case, q, k, v, 2 * d_out, d_lse=-3 * d_lse)
    through_out = gradients(case, q, k, v, d_out)
    through_lse = gradients(case, q, k, v, np.zeros_like(d_out), d_lse=d_lse)
    for sum_, out_part, lse_part in zip(both, through_out, through_lse, strict=True):
        assert_close(sum_, 2 * out_part - 3 * lse_part)


@given(case=small_cases(dtypes=("float64",)))
def test_queries_and_keys_share_the_gradient_of_their_product(case):
    """Scores depend on the products only, so scaling Q up and K down changes nothing: <q, dq> = <k, dk>."""
    q, k, v, d_out = make_operands(case)
    d_q, d_k, _ = gradients(case, q, k, v, d_out)
    assert_close(np.sum(q * d_q), np.sum(k * d_k), magnitude=np.sum(np.abs(q * d_q)) + np.sum(np.abs(k * d_k)))


@given(case=small_cases(dtypes=("float64",)))
def test_value_gradient_pairs_with_the_output(case):
    """The output is linear in V: <v, dv> = <out, d_out>."""
    q, k, v, d_out = make_operands(case)
    out = cuflash.attention(q, k, v, **case.options)
    terms = v * gradients(case, q, k, v, d_out)[2]
    assert_close(np.sum(terms), np.sum(out * d_out), magnitude=np.sum(np.abs(terms)) + np.sum(np.abs(out * d_out)))


@given(case=small_cases(dtypes=("float64",)))
def test_gradients_do_not_depend_on_a_shift_of_all_scores(case):
    """Adding a constant to every key shifts each row's scores by one number, so K's gradient sums to zero."""
    q, k, v, d_out = make_operands(case)
    _, d_k, _ = gradients(case, q, k, v, d_out)
    total = d_k.sum(sequence_axis(case))
    # Where d_k is small, it is the difference of terms of the size of their factors.
    largest = [np.max(np.abs(array), initial=0.0) for array in (q, v, d_out)]
    terms = case.seqlen_q * case.num_heads * abs(case.softmax_scale) * math.prod(largest) * case.head_dim_v
    assert_close(total, np.zeros_like(total), magnitude=1 + terms)


# --------------------------------------------------------------------------------------------------- merging


@given(
    parts=st.integers(1, 4),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 5)),
    dim=st.integers(1, 5),
    empty=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_merging_is_associative_and_skips_empty_parts(parts, shape, dim, empty, seed):
    rng = np.random.default_rng(seed)
    outs = [rng.standard_normal((*shape, dim)) for _ in range(parts)]
    lses = [30 * rng.standard_normal(shape) for _ in range(parts)]
    out, lse = cuflash.merge_attention(outs, lses)
    head = cuflash.merge_attention(outs[:1], lses[:1])
    tail = (
        cuflash.merge_attention(outs[1:], lses[1:]) if parts > 1 else (np.zeros_like(out), np.full_like(lse, -np.inf))
    )
    again_out, again_lse = cuflash.merge_attention([tail[0], head[0]], [tail[1], head[1]])
    assert_close(again_out, out)
    assert_close(again_lse, lse)
    # A part that saw no key has LSE -inf, and its output, whatever it holds, does not count.
    outs.insert(min(empty, parts), np.full((*shape, dim), np.nan))
    lses.insert(min(empty, parts), np.full(shape, -np.inf))
    with_empty_out, with_empty_lse = cuflash.merge_attention(outs, lses)
    assert_close(with_empty_out, out)
    assert_close(with_empty_lse, lse)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_merging_nothing_but_empty_parts_is_empty(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    out = np.zeros((2, 3, 4), numpy_dtype(dtype))
    lse = np.full((2, 3), -np.inf, np.float64 if dtype == "float64" else np.float32)
    merged_out, merged_lse = cuflash.merge_attention([out, out], [lse, lse])
    np.testing.assert_array_equal(merged_out.astype(np.float64), 0)
    np.testing.assert_array_equal(merged_lse, -np.inf)
    assert merged_out.dtype == out.dtype
    assert merged_lse.dtype == lse.dtype
