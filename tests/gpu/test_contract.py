"""The numerical and stream contract: each test is one line of it."""

import gc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import cuflash
from tests.gpu.harness import assert_same_bits, cupy
from tests.strategies import Case, make_operands

LARGE = Case(batch=2, num_heads=8, num_heads_kv=2, seqlen_q=700, seqlen_k=900, is_causal=True)


def forward_and_gradients(case: Case, **options: object) -> list[object]:
    """Output, LSE and gradients of a case."""
    q, k, v, d_out = make_operands(case, cupy.asarray)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, **case.options, **options)
    return [out, lse, found.d_q, found.d_k, found.d_v]


# ------------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("case", [LARGE, replace(LARGE, dtype="float32", head_dim=128, head_dim_v=128)], ids=str)
def test_forward_is_bitwise_reproducible(case: Case) -> None:
    q, k, v, _ = make_operands(case, cupy.asarray)
    first = cuflash.attention(q, k, v, return_lse=True, **case.options)
    for _ in range(100):
        assert_same_bits(cuflash.attention(q, k, v, return_lse=True, **case.options), first)


@pytest.mark.parametrize("case", [LARGE, replace(LARGE, dtype="float32", head_dim=128, head_dim_v=128)], ids=str)
def test_deterministic_backward_is_bitwise_reproducible(case: Case) -> None:
    q, k, v, d_out = make_operands(case, cupy.asarray)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)

    def gradients() -> tuple[object, ...]:
        return cuflash.attention_backward(d_out, q, k, v, out, lse, deterministic=True, **case.options)[:3]

    first = gradients()
    for _ in range(100):
        assert_same_bits(gradients(), first)


@pytest.mark.parametrize(
    "case",
    [LARGE, replace(LARGE, batch=12, num_heads_kv=8), replace(LARGE, seqlen_q=3, batch=40),
     replace(LARGE, batch=40, head_dim=128, head_dim_v=128, spread=20.0)],
    ids=str,
)  # fmt: skip
def test_result_does_not_depend_on_the_rest_of_the_batch(case: Case) -> None:
    q, k, v, _ = make_operands(case, cupy.asarray)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    for entry in range(case.batch):
        one = slice(entry, entry + 1)
        alone = cuflash.attention(q[one], k[one], v[one], return_lse=True, **case.options)
        assert_same_bits(alone, (out[one], lse[one]))


# -------------------------------------------------------------------------------- what must never be read or leak


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("head_dim", [64, 40])
def test_rows_that_see_nothing_are_empty(dtype: str, head_dim: int) -> None:
    """Output 0, LSE -inf, zero gradients; also where only some rows of a tile see nothing."""
    case = Case(
        dtype=dtype, num_heads=2, seqlen_q=150, seqlen_k=100, head_dim=head_dim, head_dim_v=head_dim,
        is_causal=True, q_offset=-70,
    )  # fmt: skip
    out, lse, d_q, d_k, d_v = forward_and_gradients(case)
    assert not bool(out[..., :70, :].any())
    assert bool(cupy.isneginf(lse[..., :70]).all())
    assert not bool(d_q[..., :70, :].any())
    # Keys from 80 on are seen by nobody.
    assert not bool(d_k[..., 80:, :].any())
    assert not bool(d_v[..., 80:, :].any())
    for array in (out[..., 70:, :], lse[..., 70:], d_q, d_k, d_v):
        assert bool(cupy.isfinite(array).all())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "options", [{"is_causal": True, "q_offset": -33}, {"window": (9, 20), "q_offset": 15}], ids=str
)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_keys_that_nobody_sees_do_not_leak(dtype: str, options: dict, poison: float) -> None:
    case = Case(dtype=dtype, num_heads=2, seqlen_q=150, seqlen_k=200, **options)
    q, k, v, d_out = make_operands(case)
    seen = [case.band.query_range(j, j + 1, case.seqlen_q)[1] > 0 for j in range(case.seqlen_k)]
    hidden = ~np.array(seen)
    assert hidden.any()
    assert not hidden.all()

    def call(key: float, value: float) -> list[object]:
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[..., hidden, :] = key
        dirty_v[..., hidden, :] = value
        arrays = [cupy.asarray(array) for array in (q, dirty_k, dirty_v)]
        out, lse = cuflash.attention(*arrays, return_lse=True, **options)
        found = cuflash.attention_backward(cupy.asarray(d_out), *arrays, out, lse, deterministic=True, **options)
        assert not cupy.asnumpy(found.d_k)[..., hidden, :].any()
        assert not cupy.asnumpy(found.d_v)[..., hidden, :].any()
        return [out, lse, *found[:3]]

    assert_same_bits(call(poison, poison), call(0.0, 0.0))


def test_nan_and_inf_that_are_seen_come_out() -> None:
    """Hiding what a row does see would be as wrong: a NaN shows in the rows that see it."""
    q, k, v, _ = make_operands(Case(seqlen_q=100, seqlen_k=100), cupy.asarray)
    v = v.copy()
    v[0, 0, 40, 3] = cupy.nan
    out = cuflash.attention(q, k, v, is_causal=True)
    assert bool(cupy.isnan(out[0, 0, 40:, 3]).all())
    assert bool(cupy.isfinite(out[..., :3]).all())
    k = k.copy()
    k[0, 0, 99] = cupy.nan
    out, lse = cuflash.attention(q, k, v, is_causal=True, return_lse=True)
    assert bool(cupy.isnan(out[0, 0, 99]).all())
    assert bool(cupy.isnan(lse[0, 0, 99]))


# -------------------------------------------------------------------------------------------- streams and graphs


def start_spinning() -> None:
    """Keep the current stream busy for a tenth of a second or more."""
    code = 'extern "C" __global__ void spin(long long n) { long long t = clock64(); while (clock64() - t < n) {} }'
    cupy.RawKernel(code, "spin")((1,), (1,), (np.int64(300_000_000),))


@pytest.fixture
def stream() -> Iterator[object]:
    """A current stream that does not wait for the default one."""
    with cupy.cuda.Stream(non_blocking=True) as current:
        yield current
        current.synchronize()


def test_work_goes_to_the_current_stream_and_the_host_does_not_wait(stream: object) -> None:
    operands = make_operands(LARGE, cupy.asarray)
    later = make_operands(replace(LARGE, seed=1), cupy.asarray)

    def call() -> list[object]:
        out, lse = cuflash.attention(*operands[:3], return_lse=True, is_causal=True)
        options = {"is_causal": True, "deterministic": True}
        return [out, lse, *cuflash.attention_backward(operands.d_out, *operands[:3], out, lse, **options)[:3]]

    call()  # compiles, and fills this stream's memory pool
    start_spinning()
    stream.synchronize()
    start_spinning()
    for array, values in zip(operands, later, strict=True):
        array[...] = values  # waits in the stream, and so must the call
    results = call()
    assert not stream.done, "the host waited for the GPU"
    stream.synchronize()
    assert_same_bits(results, call())
    wanted = forward_and_gradients(replace(LARGE, seed=1), deterministic=True)
    assert_same_bits(results, wanted)


def test_calls_can_be_captured_into_a_graph(stream: object) -> None:
    operands = make_operands(LARGE, cupy.asarray)
    options = {"is_causal": True, "deterministic": True}

    def call() -> list[object]:
        out, lse = cuflash.attention(*operands[:3], return_lse=True, **options)
        return [out, lse, *cuflash.attention_backward(operands.d_out, *operands[:3], out, lse, **options)[:3]]

    call()
    stream.begin_capture()
    results = call()
    graph = stream.end_capture()
    later = make_operands(replace(LARGE, seed=1), cupy.asarray)
    for array, values in zip(operands, later, strict=True):
        array[...] = values
    graph.launch(stream)
    stream.synchronize()
    assert_same_bits(results, call())


# ----------------------------------------------------------------------------------------------- large tensors


def _need(gigabytes: float) -> None:
    cupy.get_default_memory_pool().free_all_blocks()
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


@pytest.fixture
def _release() -> Iterator[None]:
    """Hand gigabytes back, so that other libraries in this process can have them."""
    yield
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.usefixtures("_release")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
def test_strides_beyond_31_bits(axis: int) -> None:
    """Every operand, the output included, with its second entry along one axis over 2**31 elements away."""
    case = Case(batch=2, num_heads=2, num_heads_kv=2, seqlen_q=2, seqlen_k=2, is_causal=True)
    distance = 2**31 + 64
    _need(6)
    memory = cupy.empty(distance + 2**16, cupy.float16)
    strides = [512, 256, 128, 2]
    strides[axis] = 2 * distance

    def far(array: object, place: int) -> object:
        """Copy `array` to element `place` of the memory, with the strides above."""
        view = cupy.ndarray(array.shape, array.dtype, memory[place * 2**12 :].data, strides=tuple(strides))
        view[...] = array
        return view

    q, k, v, d_out = make_operands(case, cupy.asarray)
    out, lse, *gradients = forward_and_gradients(case, deterministic=True)
    q, k, v, d_out, far_out = (far(array, place) for place, array in enumerate((q, k, v, d_out, cupy.zeros_like(out))))
    _, far_lse = cuflash.attention(q, k, v, out=far_out, return_lse=True, is_causal=True)
    found = cuflash.attention_backward(d_out, q, k, v, far_out, far_lse, is_causal=True, deterministic=True)
    assert_same_bits((far_out, far_lse, *found[:3]), (out, lse, *gradients))


@pytest.mark.usefixtures("_release")
@pytest.mark.parametrize("batch_axis", ["batch", "heads"])
def test_more_than_2_31_elements(batch_axis: str) -> None:
    """Every query sees one key, so the output is that key's value, and its gradient what flows back. 2**31 of each."""
    _need(60)
    seqlen, head_dim = 64, 128
    batch, num_heads = (2**15 + 1, 8) if batch_axis == "batch" else (1, 2**18 + 1)
    shape = (batch, num_heads, seqlen, head_dim)
    num_rows = batch * num_heads * seqlen

    def pattern(shift: int) -> object:
        # A row is a window into one small random table: cheap to make, and different from its neighbours.
        table = cupy.asarray(np.random.default_rng(shift).standard_normal(1009 + head_dim).astype(np.float16))
        rows = cupy.lib.stride_tricks.as_strided(table, (1009, head_dim), (2, 2))
        result = cupy.empty((num_rows, head_dim), cupy.float16)
        for start in range(0, num_rows, 1 << 20):
            stop = min(start + (1 << 20), num_rows)
            result[start:stop] = rows[cupy.arange(start, stop) % 1009]
        return result.reshape(shape)

    q, v, d_out = pattern(0), pattern(1), pattern(2)
    k = cupy.broadcast_to(q[:1], shape)
    assert v.size > 2**31
    out, lse = cuflash.attention(q, k, v, window=(0, 0), return_lse=True)
    assert bool((out == v).all())
    ends = cupy.asarray([0, num_heads // 2, num_heads - 1])
    scores = (q[-1, ends].astype(cupy.float32) * k[-1, ends].astype(cupy.float32)).sum(-1) * head_dim**-0.5
    cupy.testing.assert_allclose(lse[-1, ends], scores, rtol=1e-3, atol=1e-4)
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, window=(0, 0))
    assert bool((found.d_v == d_out).all())
    # One key has weight 1 whatever q and k are, so their gradients vanish, up to the rounding of dP - delta.
    for gradient in (found.d_q, found.d_k):
        assert float(cupy.abs(gradient).max()) < 1e-2
