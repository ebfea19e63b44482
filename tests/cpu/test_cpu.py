"""The NumPy path, called directly, against the float64 reference."""

import os
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cuflash import cpu, reference
from cuflash.scores import Band
from tests.strategies import DTYPES, Case, bands, cases, make_operands, numpy_dtype
from tests.tolerance import Yardstick, accumulator

ALL_STORAGES = ("contiguous", "padded", "odd_rows", "offset", "sliced", "transposed", "broadcast")


def forward(q, k, v, *, band=Band(), scale=None):
    """Out and LSE from memory full of NaN."""
    out = np.full((*q.shape[:3], v.shape[3]), np.nan, q.dtype)
    lse = np.full(q.shape[:3], np.nan, accumulator(q.dtype))
    cpu.forward(q, k, v, out, lse, band=band, scale=q.shape[3] ** -0.5 if scale is None else scale)
    return out, lse


def backward(d_out, q, k, v, out, lse, *, d_lse=None, band=Band(), scale=None):
    """Gradients, from memory full of NaN."""
    gradients = tuple(np.full(x.shape, np.nan, x.dtype) for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    cpu.backward(d_out, q, k, v, out, lse, d_lse, *gradients, band=band, scale=scale)
    return gradients


def check(q, k, v, d_out, *, band=Band(), scale=None, d_lse=None):
    """Forward and backward of one call against the reference; returns all results."""
    yardstick = Yardstick(q, k, v, band=band, scale=scale)
    out, lse = forward(q, k, v, band=band, scale=scale)
    yardstick.assert_forward(out, lse)
    gradients = backward(d_out, q, k, v, out, lse, d_lse=d_lse, band=band, scale=scale)
    yardstick.assert_backward(d_out, gradients, d_lse=d_lse)
    return out, lse, *gradients


def heads_first(case):
    operands = make_operands(case)
    return operands if case.layout == "bhsd" else tuple(x.swapaxes(1, 2) for x in operands)


def random_operands(shape_q, shape_k, dim_v=None, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    dim_v = shape_k[3] if dim_v is None else dim_v
    shapes = shape_q, shape_k, (*shape_k[:3], dim_v), (*shape_q[:3], dim_v)
    return [rng.standard_normal(shape).astype(numpy_dtype(dtype)) for shape in shapes]


# ------------------------------------------------------------------------------------------- against the reference

small_dims = st.integers(1, 80)


@given(case=cases(dims=st.tuples(small_dims, small_dims), storages=ALL_STORAGES, max_seqlen=140, max_batch=2))
def test_any_small_call(case):
    check(*heads_first(case), band=case.band, scale=case.softmax_scale)


@given(
    case=cases(dims=st.tuples(small_dims, small_dims), dtypes=("float32", "float64"), max_seqlen=140, max_batch=2),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_gradient_of_the_lse(case, seed):
    operands = heads_first(case)
    d_lse = np.random.default_rng(seed).standard_normal(operands[0].shape[:3]).astype(case.dtype)
    check(*operands, band=case.band, scale=case.softmax_scale, d_lse=d_lse)


@given(
    seqlens=st.tuples(st.integers(250, 900), st.integers(250, 900)),
    options=bands(900),
    heads=st.sampled_from([(1, 1), (3, 3), (2, 1), (6, 2), (5, 1)]),
    dim=st.sampled_from([16, 64, 72]),
)
@example(seqlens=(768, 1024), options={"is_causal": True, "window": None, "q_offset": 0}, heads=(2, 1), dim=64)
@example(seqlens=(768, 512), options={"is_causal": False, "window": None, "q_offset": None}, heads=(1, 1), dim=64)
@settings(max_examples=8)
def test_many_tiles_and_blocks(seqlens, options, heads, dim):
    case = Case("float32", 1, *heads, *seqlens, dim, dim, **options)
    check(*heads_first(case), band=case.band, scale=case.softmax_scale)


@pytest.mark.parametrize(("heads", "heads_kv"), [(3, 3), (10, 5)])
@pytest.mark.parametrize("dim", [48, 72])
@pytest.mark.parametrize("band", [Band(None, 90), Band(-150, -3)])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_heads_that_share_a_task(monkeypatch, heads, heads_kv, dim, band, factor):
    monkeypatch.setattr(cpu, "MIN_TASKS", 1)
    q, k, v, _ = random_operands((2, heads, 700, dim), (2, heads_kv, 1100, dim))
    expected = forward(factor * q, k, v, band=band)
    Yardstick(factor * q, k, v, band=band).assert_forward(*expected)
    for alone, together in zip(forward(factor * q[1:], k[1:], v[1:], band=band), expected, strict=True):
        np.testing.assert_array_equal(alone[0], together[1])


@pytest.mark.parametrize("num_heads", [3, 500])
def test_group_larger_than_a_tile(num_heads):
    check(*random_operands((1, num_heads, 3, 8), (1, 1, 70, 8)), band=Band(-2, 60))


def test_keys_split_into_parts():
    seqlen_k = 3 * cpu.MIN_PART + 100
    check(*random_operands((1, 2, 200, 16), (1, 1, seqlen_k, 16)), band=Band(None, seqlen_k - 400))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 0), (0, 5), (5, 0), (1, 1), (1, 300), (300, 1)])
def test_edge_lengths(dtype, seqlen_q, seqlen_k):
    for band in (Band(), Band(None, seqlen_k - seqlen_q), Band(0, 0)):
        check(*random_operands((2, 4, seqlen_q, 7), (2, 2, seqlen_k, 7), 5, dtype), band=band)


@pytest.mark.parametrize(("batch", "heads", "heads_kv"), [(0, 2, 2), (2, 0, 0), (0, 0, 0)])
def test_no_batch_or_no_heads(batch, heads, heads_kv):
    q, k, v, d_out = random_operands((batch, heads, 4, 3), (batch, heads_kv, 5, 3))
    out, lse = forward(q, k, v)
    assert out.shape == q.shape
    assert [g.shape for g in backward(d_out, q, k, v, out, lse)] == [q.shape, k.shape, v.shape]


def test_negative_strides_and_strided_results():
    q, k, v, d_out = (x[:, ::-1, ::-1, ::-1] for x in random_operands((2, 4, 90, 9), (2, 2, 70, 9)))
    yardstick = Yardstick(q, k, v, band=Band(-9, 9))
    memory = np.full((2, 90, 4, 20), np.nan, np.float32)
    out = memory[..., 3:12].swapaxes(1, 2)
    lse = np.full((2, 90, 4), np.nan, np.float32).swapaxes(1, 2)
    cpu.forward(q, k, v, out, lse, band=Band(-9, 9), scale=9**-0.5)
    yardstick.assert_forward(out, lse)
    gradients = [
        np.full((2, x.shape[2], x.shape[1], 11), np.nan, np.float32)[..., 1:10].swapaxes(1, 2) for x in (q, k, v)
    ]
    cpu.backward(d_out, q, k, v, out, lse, None, *gradients, band=Band(-9, 9), scale=9**-0.5)
    yardstick.assert_backward(d_out, gradients)
    assert np.isnan(np.delete(memory, slice(3, 12), axis=3)).all()  # nothing beside the result was touched


def test_lse_is_optional():
    q, k, v, _ = random_operands((1, 2, 50, 8), (1, 2, 60, 8))
    out = np.empty_like(q)
    cpu.forward(q, k, v, out, None, band=Band(), scale=0.3)
    np.testing.assert_array_equal(out, forward(q, k, v, scale=0.3)[0])


# ----------------------------------------------------------------------------------------------- hard numbers

SHAPES = {"small": ((1, 2, 40, 32), (1, 2, 50, 32)), "blocks": ((1, 2, 400, 64), (1, 1, 600, 64))}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [3.0, 8.0, 40.0])
def test_large_scores(shape, factor):
    q, k, v, d_out = random_operands(*SHAPES[shape])
    check(factor * q, k, v, d_out, band=Band(None, 40))
    check(factor * q, factor * k, v, d_out, band=Band(-30, 300))


def test_scores_that_grow_along_the_keys():
    q, k, v, d_out = random_operands((1, 1, 70, 16), (1, 1, 700, 16))
    k += np.linspace(-20, 20, 700, dtype=np.float32)[:, None] * q[:, :, :1]
    for order in (slice(None), slice(None, None, -1)):
        check(q, k[:, :, order], v[:, :, order], d_out)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_scores_that_are_all_far_from_zero(offset):
    q, k, v, d_out = random_operands((1, 2, 80, 17), (1, 2, 300, 17))
    q[..., 0], k[..., 0] = 1, offset
    out, *_ = check(q, k, v, d_out, scale=1.0)
    near, _ = forward(q[..., 1:], k[..., 1:], v, scale=1.0)
    np.testing.assert_allclose(out, near, atol=1e-4)


def test_large_values_do_not_overflow_what_is_summed():
    q, k, v, d_out = random_operands((1, 1, 80, 32), (1, 1, 300, 32))
    q[...] = k[:, :, :80]  # scores near the largest that are not shifted
    check(1.5 * q, 1.5 * k, v * np.float32(1e36), d_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_sees_one_key_is_that_value(dtype):
    _, _, v, d_out = operands = random_operands((1, 2, 150, 16), (1, 2, 150, 16), dtype=dtype)
    out, _, d_q, _, d_v = check(*operands, band=Band(0, 0))
    eps = 2 * np.finfo(np.float32).eps
    np.testing.assert_allclose(out.astype(np.float64), v.astype(np.float64), rtol=eps)
    np.testing.assert_allclose(d_v.astype(np.float64), d_out.astype(np.float64), rtol=eps)
    assert np.abs(d_q.astype(np.float64)).max() < 1e-4


@given(case=cases(dims=st.tuples(small_dims, small_dims), dtypes=("float32",), max_seqlen=140, max_batch=2))
@settings(max_examples=20)
def test_constant_values_give_constant_results(case):
    q, k, v, _ = heads_first(case)
    v = np.broadcast_to(np.arange(v.shape[3], dtype=np.float32), v.shape)
    out, lse = forward(q, k, v, band=case.band, scale=case.softmax_scale)
    expected = np.where(np.isneginf(lse)[..., None], 0, np.arange(v.shape[3]))
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@given(case=cases(dims=st.tuples(small_dims, small_dims), dtypes=("float64",), max_seqlen=140, max_batch=2))
@settings(max_examples=20)
def test_the_order_of_keys_does_not_matter(case):
    q, k, v, d_out = heads_first(replace(case, is_causal=False, window=None, q_offset=None))
    order = np.random.default_rng(case.seed).permutation(k.shape[2])
    out, lse = forward(q, k, v)
    permuted = forward(q, k[:, :, order], v[:, :, order])
    np.testing.assert_allclose(permuted[0], out, atol=1e-13)
    np.testing.assert_allclose(permuted[1], lse, atol=1e-13)
    d_q, d_k, d_v = backward(d_out, q, k, v, out, lse)
    permuted = backward(d_out, q, k[:, :, order], v[:, :, order], out, lse)
    np.testing.assert_allclose(permuted[0], d_q, atol=1e-12)
    np.testing.assert_allclose(permuted[1], d_k[:, :, order], atol=1e-12)
    np.testing.assert_allclose(permuted[2], d_v[:, :, order], atol=1e-12)


# --------------------------------------------------------------------------------- what nobody sees has no effect


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_keys_and_queries_that_nobody_sees_do_not_leak(poison):
    q, k, v, d_out = random_operands((1, 2, 150, 16), (1, 2, 300, 16))
    band = Band(5, 100)  # keys 0-4 and 250-299 are hidden from everyone
    expected = check(q, k, v, d_out, band=band)
    k[:, :, :5], v[:, :, 250:], k[:, :, 260:] = poison, poison, poison
    for actual, wanted in zip(check(q, k, v, d_out, band=band), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
    q, k, v, d_out = random_operands((1, 2, 150, 16), (1, 2, 300, 16))
    band = Band(None, -20)  # queries 0-19 see nothing
    q[:, :, :20], d_out[:, :, :20] = poison, poison
    _, _, d_q, _, _ = check(q, k, v, d_out, band=band)
    assert (d_q[:, :, :20] == 0).all()


@given(
    options=bands(300),
    seqlens=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    poisoned=st.lists(st.tuples(st.sampled_from("kv"), st.integers(0, 299)), max_size=4),
    value=st.sampled_from([np.nan, np.inf]),
)
@settings(max_examples=25)
def test_what_is_not_finite_reaches_only_those_who_see_it(options, seqlens, poisoned, value):
    case = Case("float32", 1, 2, 1, *seqlens, 8, 8, **options)
    q, k, v, _ = heads_first(case)
    for name, key in poisoned:  # an infinite key may well have weight 0
        {"k": k, "v": v}[name][:, :, key % case.seqlen_k] = value if name == "v" else np.nan
    seen = case.band.visible(np.arange(case.seqlen_q)[:, None], np.arange(case.seqlen_k)[None, :])
    touched = seen @ ~np.isfinite(k[0, 0] + v[0, 0]).all(-1)
    out, _ = forward(q, k, v, band=case.band)
    expected, _ = reference.attention(q, k, v, band=case.band, scale=case.softmax_scale)
    assert not np.isfinite(out[:, :, touched]).all(-1).any()
    np.testing.assert_allclose(out[:, :, ~touched], expected[:, :, ~touched], atol=1e-5)


@given(
    options=bands(300),
    seqlens=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    poisoned=st.lists(
        st.tuples(st.sampled_from(["q", "k", "v", "d_out"]), st.integers(0, 299)), min_size=1, max_size=4
    ),
)
@example(options={"is_causal": True, "window": None, "q_offset": 0}, seqlens=(300, 300), poisoned=[("v", 150)])
@example(options={"is_causal": True, "window": None, "q_offset": 0}, seqlens=(300, 300), poisoned=[("k", 150)])
@example(options={"is_causal": True, "window": None, "q_offset": 0}, seqlens=(300, 300), poisoned=[("q", 150)])
@example(options={"is_causal": True, "window": None, "q_offset": 0}, seqlens=(300, 300), poisoned=[("d_out", 150)])
@settings(max_examples=25)
def test_gradients_of_what_is_not_a_number_reach_only_what_they_depend_on(options, seqlens, poisoned):
    case = Case("float32", 1, 2, 1, *seqlens, 8, 8, **options)
    operands = dict(zip(("q", "k", "v", "d_out"), heads_first(case), strict=True))
    for name, position in poisoned:
        operands[name][:, :, position % operands[name].shape[2]] = np.nan
    check(*operands.values(), band=case.band, scale=case.softmax_scale)


# ------------------------------------------------------------------------------- memory, bits, threads, BLAS


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_is_linear_in_the_lengths(dtype, monkeypatch):
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "2")

    def peak(seqlen):
        operands = random_operands((1, 2, seqlen, 8), (1, 1, seqlen, 8), dtype=dtype)
        tracemalloc.start()
        results(*operands, Band(None, 0))
        _, largest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return largest

    peak(2000)  # masks of the edge are made once and kept
    growth = peak(4000) - peak(2000)
    assert growth < 2000 * 2000  # bytes; the scores alone would be 2 * 4 * (4000**2 - 2000**2)


def results(q, k, v, d_out, band):
    out, lse = forward(q, k, v, band=band)
    return out, lse, *backward(d_out, q, k, v, out, lse, band=band)


def test_bits_do_not_depend_on_threads_or_batch(monkeypatch):
    operands = random_operands((2, 4, 450, 24), (2, 2, 1100, 24))
    band = Band(None, 600)
    expected = results(*operands, band)
    for threads in ("1", "3"):
        monkeypatch.setenv("CUFLASH_NUM_THREADS", threads)
        for actual, wanted in zip(results(*operands, band), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)
    alone = forward(*(x[1:] for x in operands[:3]), band=band)
    for actual, wanted in zip(alone, expected, strict=False):
        np.testing.assert_array_equal(actual[0], wanted[1])


def test_calls_from_several_threads():
    operands = random_operands((1, 4, 200, 16), (1, 4, 200, 16))
    expected = results(*operands, Band())
    found = []
    threads = [threading.Thread(target=lambda: found.append(results(*operands, Band()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for result in found:
        for actual, wanted in zip(result, expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)


def test_blas_threads_are_restored_even_after_an_error():
    functions = cpu._openblas_functions()
    if functions is None:
        pytest.skip("NumPy is linked with another BLAS than OpenBLAS")
    get_num_threads, set_num_threads = functions
    before = get_num_threads()
    try:
        set_num_threads(2)
        inside = []
        cpu._run([lambda: inside.append(get_num_threads())] * 2)
        assert inside == [1, 1]
        assert get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            cpu._run([lambda: 1 // 0] * 2)
        assert get_num_threads() == 2
    finally:
        set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_works_after_a_fork():
    code = (
        "import os, signal, numpy as np; from cuflash import cpu; from cuflash.scores import Band\n"
        "x = np.ones((1, 4, 300, 8), np.float32); out = np.empty_like(x)\n"
        "cpu.forward(x, x, x, out, None, band=Band(), scale=1.0)\n"
        "pid = os.fork()\n"
        "if pid == 0: signal.alarm(20)\n"  # a child that waits for threads it does not have ends by itself
        "cpu.forward(x, x, x, out, None, band=Band(), scale=1.0)\n"
        "if pid == 0: os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, "CUFLASH_NUM_THREADS": "2"})


def test_nothing_is_said_about_scores_that_overflow():
    q, k, v, d_out = random_operands((1, 1, 20, 8), (1, 1, 20, 8))
    with np.errstate(all="raise"):
        results(np.float32(1e25) * q, np.float32(1e25) * k, v, d_out, Band(None, 0))
