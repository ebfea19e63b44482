"""The reference itself: against finite differences, and on cases whose answer is known."""

import numpy as np
import pytest

from cuflash import reference
from cuflash.scores import Band

BANDS = {
    "open": Band(),
    "causal": Band(None, 2),
    "window": Band(-1, 2),
    "some rows empty": Band(None, -2),
    "all rows empty": Band(9, 9),
}


def operands(rng, heads=4, heads_kv=2, seqlen_q=5, seqlen_k=6, dim=3, dim_v=4):
    q = rng.standard_normal((2, heads, seqlen_q, dim))
    k = rng.standard_normal((2, heads_kv, seqlen_k, dim))
    v = rng.standard_normal((2, heads_kv, seqlen_k, dim_v))
    return q, k, v


def test_one_query_and_two_keys_by_hand():
    q, k = np.full((1, 1, 1, 1), 2.0), np.array([1.0, -1.0]).reshape(1, 1, 2, 1)
    v = np.array([10.0, 20.0]).reshape(1, 1, 2, 1)
    out, lse = reference.attention(q, k, v, scale=0.5)
    weights = np.exp([1.0, -1.0]) / (np.exp(1.0) + np.exp(-1.0))
    np.testing.assert_allclose(out.item(), 10 * weights[0] + 20 * weights[1], rtol=1e-14)
    np.testing.assert_allclose(lse.item(), np.log(np.exp(1.0) + np.exp(-1.0)), rtol=1e-14)


def test_query_heads_share_key_heads_in_order():
    q, k, v = operands(np.random.default_rng(0))
    out, lse = reference.attention(q, k, v, scale=0.7)
    for head in range(4):
        one = slice(head // 2, head // 2 + 1)
        expected, expected_lse = reference.attention(q[:, head : head + 1], k[:, one], v[:, one], scale=0.7)
        np.testing.assert_allclose(out[:, head], expected[:, 0], rtol=1e-13)
        np.testing.assert_allclose(lse[:, head], expected_lse[:, 0], rtol=1e-13)


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
def test_gradients_are_finite_differences(band):
    rng = np.random.default_rng(1)
    inputs = operands(rng)
    out, lse = reference.attention(*inputs, band=band, scale=0.7)
    empty = np.isneginf(lse)
    d_out, d_lse = rng.standard_normal(out.shape), np.where(empty, 5.0, rng.standard_normal(lse.shape))
    gradients = reference.attention_backward(d_out, *inputs, band=band, scale=0.7, d_lse=d_lse)

    def loss(*arrays):
        out, lse = reference.attention(*arrays, band=band, scale=0.7)
        return (out * d_out).sum() + (np.where(empty, 0, lse) * np.where(empty, 0, d_lse)).sum()

    for which, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        step = 1e-5
        plus, minus = (
            loss(*(x + sign * step * direction if i == which else x for i, x in enumerate(inputs))) for sign in (1, -1)
        )
        np.testing.assert_allclose((gradient * direction).sum(), (plus - minus) / (2 * step), rtol=1e-8, atol=1e-9)


def test_gradient_of_every_element_is_a_finite_difference():
    rng = np.random.default_rng(2)
    inputs = operands(rng, heads=2, heads_kv=1, seqlen_q=3, seqlen_k=3, dim=2, dim_v=2)
    band = Band(-1, 1)
    d_out = rng.standard_normal((2, 2, 3, 2))
    gradients = reference.attention_backward(d_out, *inputs, band=band, scale=0.7)
    for which, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in inputs]
                moved[which][index] += step
                values.append((reference.attention(*moved, band=band, scale=0.7)[0] * d_out).sum())
            np.testing.assert_allclose(gradient[index], (values[0] - values[1]) / 2e-5, atol=1e-9)


def test_rows_that_see_nothing():
    q, k, v = operands(np.random.default_rng(3))
    band = Band(None, -3)  # queries 0, 1 and 2 see nothing
    out, lse = reference.attention(q, k, v, band=band, scale=1.0)
    assert (out[:, :, :3] == 0).all()
    assert np.isneginf(lse[:, :, :3]).all()
    assert np.isfinite(lse[:, :, 3:]).all()
    d_q, _, _ = reference.attention_backward(np.ones_like(out), q, k, v, band=band, scale=1.0)
    assert (d_q[:, :, :3] == 0).all()


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 4), (4, 0), (0, 0)])
def test_no_queries_or_no_keys(seqlen_q, seqlen_k):
    q, k, v = operands(np.random.default_rng(4), seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    out, lse = reference.attention(q, k, v, scale=1.0)
    assert out.shape == (2, 4, seqlen_q, 4)
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    gradients = reference.attention_backward(np.ones_like(out), q, k, v, scale=1.0)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert all((g == 0).all() for g in gradients)


def test_what_is_not_finite_reaches_exactly_those_who_see_it():
    q, k, v = operands(np.random.default_rng(5), heads_kv=4, seqlen_q=6)
    k[0, 1, 4], v[1, 2, 3] = np.nan, np.inf
    out, lse = reference.attention(q, k, v, band=Band(None, 0), scale=1.0)
    spoiled = np.zeros((2, 4, 6), bool)
    spoiled[0, 1, 4:] = True
    np.testing.assert_array_equal(np.isnan(lse), spoiled)
    spoiled[1, 2, 3:] = True
    np.testing.assert_array_equal(~np.isfinite(out).all(-1), spoiled)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_naive_is_the_reference_up_to_its_dtype(dtype):
    rng = np.random.default_rng(6)
    inputs = [x.astype(dtype) for x in operands(rng)]
    d_out = rng.standard_normal((2, 4, 5, 4)).astype(dtype)
    pairs = [
        *zip(reference.naive(*inputs, scale=0.5), reference.attention(*inputs, scale=0.5), strict=True),
        *zip(
            reference.naive_backward(d_out, *inputs, scale=0.5),
            reference.attention_backward(d_out, *inputs, scale=0.5),
            strict=True,
        ),
    ]
    for rounded, exact in pairs:
        assert rounded.dtype == dtype
        assert exact.dtype == np.float64
        error = np.abs(rounded - exact).max()
        assert error <= 30 * np.finfo(dtype).eps
        assert (error > 0) == (dtype != "float64")
