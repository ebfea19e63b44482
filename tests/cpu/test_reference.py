"""The reference itself: against finite differences, and on cases whose answer is known."""

import functools

import numpy as np
import pytest

from cuflash import reference
from cuflash.expression import Bound, Captured, Expression
from cuflash.scores import Band, Score
from tests.cpu import expressions

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
    gradients = reference.attention_backward(d_out, *inputs, band=band, scale=0.7, d_lse=d_lse)[:3]

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
    gradients = reference.attention_backward(d_out, *inputs, band=band, scale=0.7)[:3]
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
    d_q, *_ = reference.attention_backward(np.ones_like(out), q, k, v, band=band, scale=1.0)
    assert (d_q[:, :, :3] == 0).all()


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 4), (4, 0), (0, 0)])
def test_no_queries_or_no_keys(seqlen_q, seqlen_k):
    q, k, v = operands(np.random.default_rng(4), seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    out, lse = reference.attention(q, k, v, scale=1.0)
    assert out.shape == (2, 4, seqlen_q, 4)
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    gradients = reference.attention_backward(np.ones_like(out), q, k, v, scale=1.0)[:3]
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
            reference.naive_backward(d_out, *inputs, scale=0.5)[:3],
            reference.attention_backward(d_out, *inputs, scale=0.5)[:3],
            strict=True,
        ),
    ]
    for rounded, exact in pairs:
        assert rounded.dtype == dtype
        assert exact.dtype == np.float64
        error = np.abs(rounded - exact).max()
        assert error <= 30 * np.finfo(dtype).eps
        assert (error > 0) == (dtype != "float64")


RNG = np.random.default_rng(7)
SCORES = {
    "softcap": Score(softcap=1.5),
    "bias": Score(bias=RNG.standard_normal((2, 4, 5, 6))),
    "bias over heads and queries": Score(bias=RNG.standard_normal((2, 1, 1, 6))),
    "bias over the batch": Score(bias=RNG.standard_normal((4, 5, 1))),
    "mask": Score(mask=RNG.random((2, 1, 5, 6)) < 0.6),
    "alibi": Score(alibi_slopes=RNG.random((1, 4)), q_offset=1),
    "alibi per batch entry": Score(alibi_slopes=RNG.random((2, 4)), q_offset=-3),
    "sinks": Score(sinks=RNG.standard_normal(4)),
    "dropout": Score(dropout_p=0.4, seed=1 << 40),
    "all": Score(2.0, RNG.standard_normal((4, 1, 6)), RNG.random((5, 6)) < 0.7, RNG.random((1, 4)), 1,
                 RNG.standard_normal(4), 0.2, 3),
}  # fmt: skip


ARRAYS = {
    "rel": RNG.standard_normal((4, 9)),
    "gate": 1 + 0.2 * RNG.standard_normal(4),
    "shift": RNG.standard_normal(()),
    "doc": np.array([0, 0, 1, 1, 2, 2]),
    "factor": 0.7,
}
CAPTURED = {
    "rel": Captured(2, True), "gate": Captured(1, True), "shift": Captured(0, True), "doc": Captured(1, False),
    "factor": Captured(None, True),
}  # fmt: skip


bound = functools.partial(expressions.bound, ARRAYS, CAPTURED)

SCORES |= {
    "relative bias": Score(mod=bound("score + rel[h, q_idx - k_idx + 4]")),
    "gate and shift": Score(mod=bound("score * gate[h] + factor * shift")),
    "documents": Score(mod=bound("score if doc[q_idx] == doc[k_idx] else -inf")),
    "hidden with no derivative": Score(mod=bound("score + log(gate[h] * (q_idx != k_idx) * (b + 1))")),
    "two steps": Score(mod=bound("score * gate[h]", "tanh(score * gate[h_kv]) + rel[b, k_idx]"), first_batch=1),
    "all and an expression": SCORES["all"]._replace(mod=bound("score ** 2 / seqlen_k if q_idx != 2 * b else -inf")),
}


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_gradients_of_options_are_finite_differences(score, band):
    rng = np.random.default_rng(2)
    inputs = operands(rng)
    names = [name for name in ("bias", "alibi_slopes", "sinks") if getattr(score, name) is not None]
    captured = () if score.mod is None else score.mod.expression.real_arrays
    leaves = [*inputs, *(getattr(score, name) for name in names), *(score.mod.values[name] for name in captured)]

    def results(q, k, v, *others):
        here = score._replace(**dict(zip(names, others, strict=False)))
        if score.mod is not None:
            values = zip(captured, others[len(names) :], strict=True)
            here = here._replace(mod=score.mod._replace(values={**score.mod.values, **dict(values)}))
        return reference.attention(q, k, v, band=band, scale=0.7, score=here)

    out, lse = results(*leaves)
    d_out, d_lse = rng.standard_normal(out.shape), np.where(np.isfinite(lse), rng.standard_normal(lse.shape), 0)
    found = reference.attention_backward(d_out, *inputs, band=band, scale=0.7, score=score, d_lse=d_lse)
    gradients = [*found[:3], *(getattr(found, f"d_{name}") for name in names)]
    assert sum(gradient is not None for gradient in found[:-1]) == len(gradients)
    assert (found.d_captured is None) == (score.mod is None)
    assert tuple(found.d_captured or ()) == captured
    gradients += [found.d_captured[name] for name in captured]
    for which, gradient in enumerate(gradients):
        assert gradient.shape == leaves[which].shape
        direction, step = rng.standard_normal(gradient.shape), 1e-5
        losses = []
        for sign in (1, -1):
            moved = [x + sign * step * direction if i == which else x for i, x in enumerate(leaves)]
            out, lse = results(*moved)
            losses.append((out * d_out).sum() + (np.where(np.isfinite(lse), lse, 0) * d_lse).sum())
        np.testing.assert_allclose(
            (gradient * direction).sum(), (losses[0] - losses[1]) / (2 * step), rtol=1e-6, atol=1e-8
        )


def test_options_by_hand():
    """One query, two keys of score 1 and 2: order and meaning of what is done to them."""
    q, k, v = (
        np.ones((1, 1, 1, 1)),
        np.array([1.0, 2.0]).reshape(1, 1, 2, 1),
        np.array([10.0, 20.0]).reshape(1, 1, 2, 1),
    )
    score = Score(
        softcap=3.0, bias=np.array([0.5, -0.25]), alibi_slopes=np.array([[0.125]]), q_offset=1, sinks=np.array([0.75])
    )
    out, lse = reference.attention(q, k, v, scale=1.0, score=score)
    scores = 3 * np.tanh(np.array([1, 2]) / 3) + [0.5, -0.25] - 0.125 * np.array([1, 0])
    total = np.exp(scores).sum() + np.exp(0.75)
    np.testing.assert_allclose(lse.item(), np.log(total), rtol=1e-14)
    np.testing.assert_allclose(out.item(), np.exp(scores) @ [10, 20] / total, rtol=1e-14)
    out, lse = reference.attention(q, k, v, scale=1.0, score=Score(mask=np.array([False, True])))
    assert (out.item(), lse.item()) == (20, 2)


def test_a_sink_is_a_key_whose_value_is_zero():
    q, k, v = operands(np.random.default_rng(3))
    sinks = np.array([0.3, -1.0, 2.0, 0.0])
    out, lse = reference.attention(q, k, v, scale=0.7, score=Score(sinks=sinks), band=BANDS["some rows empty"])
    # The same by a key more, whose product with every query is the sink.
    more_k = np.concatenate((np.repeat(k, 2, 1), np.zeros((2, 4, 1, 3))), 2)
    bias = np.zeros((4, 1, 7))
    bias[:, 0, 6] = sinks
    more_v = np.concatenate((np.repeat(v, 2, 1), np.zeros((2, 4, 1, 4))), 2)
    mask = np.concatenate(
        (BANDS["some rows empty"].visible(np.arange(5)[:, None], np.arange(6)), np.ones((5, 1), bool)), 1
    )
    wanted = reference.attention(q, more_k, more_v, scale=0.7, score=Score(bias=bias, mask=mask))
    np.testing.assert_allclose(out, wanted[0], atol=1e-14)
    np.testing.assert_allclose(lse, wanted[1], atol=1e-14)


def test_a_bias_of_minus_infinity_is_a_mask():
    rng = np.random.default_rng(8)
    q, k, v = operands(rng)
    d_out = rng.standard_normal((2, 4, 5, 4))
    seen = rng.random((2, 1, 5, 6)) < 0.6
    seen[0, :, 2], seen[..., 4] = False, False
    k[:, :, 4], v[:, :, 4] = np.nan, np.inf  # which nobody sees
    sinks = np.array([0.5, -np.inf, 1.0, -np.inf])
    results = []
    for score in (Score(mask=seen), Score(bias=np.where(seen, 0.0, -np.inf))):
        score = score._replace(softcap=2.0, sinks=sinks)
        gradients = reference.attention_backward(d_out, q, k, v, scale=1.0, score=score)
        results.append((*reference.attention(q, k, v, scale=1.0, score=score), *gradients[:3], gradients.d_sinks))
        assert gradients.d_bias is None or (gradients.d_bias[~seen] == 0).all()
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.isnan(one).any()


def test_an_expression_by_hand():
    """Where it comes among the others, and what numbers it sees."""
    q, v = np.ones((2, 2, 1, 1)), np.ones((2, 1, 2, 1))
    k = np.array([1.0, 2.0] * 2).reshape(2, 1, 2, 1)
    mod = bound("1000 * b + 100 * h + 10 * h_kv + k_idx + 7 * q_idx + score * seqlen_k * seqlen_q")
    score = Score(softcap=3.0, bias=np.array([0.5, -0.25]), mod=mod, first_batch=5)
    _, lse = reference.attention(q, k, v, scale=1.0, score=score)
    b, h = np.arange(2)[:, None, None, None], np.arange(2)[:, None, None]
    scores = 1000 * (5 + b) + 100 * h + np.arange(2) + 2 * 3 * np.tanh(np.array([1, 2]) / 3) + [0.5, -0.25]
    np.testing.assert_allclose(lse, np.logaddexp(scores[..., 0], scores[..., 1]), rtol=1e-14)


def test_an_expression_that_is_minus_infinity_is_a_mask():
    rng = np.random.default_rng(8)
    q, k, v = operands(rng)
    d_out = rng.standard_normal((2, 4, 5, 4))
    seen = rng.random((4, 5, 6)) < 0.6
    seen[:, 2], seen[..., 4] = False, False
    k[:, :, 4], v[:, :, 4] = np.nan, np.inf  # which nobody sees
    bias = np.where(seen, 0.0, np.inf)  # nor is this: -inf + inf is no number
    captured = {"seen": Captured(3, False), "one": Captured(3, True)}
    # The derivative by hidden elements is not finite, either.
    mod = Bound(
        Expression("score * one[h, q_idx, k_idx] if seen[h, q_idx, k_idx] else log(one[0, 0, 0] * 0)", captured),
        {"seen": seen, "one": np.ones((4, 5, 6))},
    )
    results = []
    for score in (Score(mask=seen), Score(mod=mod, bias=bias)):
        score = score._replace(softcap=2.0, sinks=np.array([0.5, -np.inf, 1.0, -np.inf]))
        gradients = reference.attention_backward(d_out, q, k, v, scale=1.0, score=score)
        results.append((*reference.attention(q, k, v, scale=1.0, score=score), *gradients[:3], gradients.d_sinks))
    assert (gradients.d_captured["one"][~seen] == 0).all()
    assert (gradients.d_bias[~seen] == 0).all()
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.isnan(one).any()
