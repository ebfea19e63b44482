"""The forward pass on a GPU, against the float64 reference."""

import numpy as np
import pytest

import cuflash
from tests.gpu.harness import assert_same_bits, check_forward, cupy, every_case, judge_forward
from tests.strategies import STORAGES, Case, make_operands, numpy_dtype, stored


@pytest.mark.parametrize("case", every_case())
def test_forward(case: Case) -> None:
    check_forward(case)


def test_lse_is_optional() -> None:
    q, k, v, _ = make_operands(Case(num_heads=3, seqlen_q=77), cupy.asarray)
    out = cuflash.attention(q, k, v)
    assert isinstance(out, cupy.ndarray)
    assert_same_bits(out, cuflash.attention(q, k, v, return_lse=True)[0])


@pytest.mark.parametrize("storage", [name for name in STORAGES if name != "broadcast"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_result_can_be_written_into_a_given_array(storage: str, layout: str) -> None:
    case = Case(batch=2, num_heads=3, num_heads_kv=3, seqlen_q=70, seqlen_k=50, head_dim_v=48, layout=layout)
    q, k, v, d_out = make_operands(case, cupy.asarray)
    given = stored(np.zeros(d_out.shape, numpy_dtype(case.dtype)), storage, cupy.asarray)
    memory = given
    while memory.base is not None:
        memory = memory.base
    around = int(cupy.isnan(memory).sum())
    out, lse = cuflash.attention(q, k, v, out=given, return_lse=True, layout=layout)
    assert out is given
    judge_forward(case, q, k, v, out, lse)
    assert int(cupy.isnan(memory).sum()) == around, "wrote outside the given array"


def test_batch_axes_broadcast() -> None:
    case = Case(batch=3, num_heads=4, num_heads_kv=2, seqlen_q=50, seqlen_k=60)
    q, k, v, _ = make_operands(case, cupy.asarray)
    full = [cupy.broadcast_to(array[:1], array.shape) for array in (k, v)]
    wanted = cuflash.attention(q, *full)
    assert_same_bits(cuflash.attention(q, k[:1], v[:1]), wanted)
    assert_same_bits(cuflash.attention(q, k[0], v[0]), wanted)
    # (3, 1, heads, ...) with (heads, ...) and (2, heads, ...): every pair of leading entries
    q, k, v = q[:, None], k[0], v[:2]
    out = cuflash.attention(q, k, v)
    assert out.shape == (3, 2, *q.shape[2:])
    assert_same_bits(out[2, 1], cuflash.attention(q[2, 0], k, v[1]))


def test_two_axes_are_one_head() -> None:
    q, k, v, _ = make_operands(Case(seqlen_q=50, seqlen_k=60), cupy.asarray)
    assert_same_bits(cuflash.attention(q[0, 0], k[0, 0], v[0, 0]), cuflash.attention(q, k, v)[0, 0])


def test_agrees_with_the_cpu_path() -> None:
    """The same call on host arrays gives the same numbers, to rounding, and the same rows without any key."""
    case = Case(dtype="float32", batch=2, num_heads=4, num_heads_kv=2, seqlen_q=90, seqlen_k=70, is_causal=True)
    on_host = cuflash.attention(*make_operands(case)[:3], return_lse=True, **case.options)
    on_gpu = cuflash.attention(*make_operands(case, cupy.asarray)[:3], return_lse=True, **case.options)
    for host, gpu in zip(on_host, on_gpu, strict=True):
        np.testing.assert_allclose(cupy.asnumpy(gpu), host, rtol=1e-5, atol=1e-5)
