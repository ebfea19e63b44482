"""The gradients on a GPU, against the float64 reference."""

from dataclasses import replace

import pytest

import cuflash
from tests.gpu.harness import CASES, assert_same_bits, check_backward, cupy, every_case
from tests.strategies import Case, make_operands


@pytest.mark.parametrize("case", every_case())
def test_backward(case: Case) -> None:
    check_backward(case)


@pytest.mark.parametrize("case", [*CASES["kernels"], *CASES["bands"]], ids=str)
def test_gradient_through_the_lse(case: Case) -> None:
    check_backward(case, with_d_lse=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_many_keys(dtype: str) -> None:
    """Long sums: what is accumulated over thousands of keys or queries must not be rounded on the way."""
    case = Case(dtype=dtype, num_heads=4, num_heads_kv=1, seqlen_q=1500, seqlen_k=2500)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    check_backward(case)
    check_backward(replace(case, is_causal=True))


def test_batch_axes_broadcast() -> None:
    """The gradient of an operand that is broadcast is the sum over the entries that use it."""
    case = Case(dtype="float32", batch=3, num_heads=4, num_heads_kv=2, seqlen_q=50, seqlen_k=60)
    q, k, v, d_out = make_operands(case, cupy.asarray)
    k, v = k[:1], v[:1]
    full_k, full_v = (cupy.broadcast_to(array, (3, *array.shape[1:])) for array in (k, v))
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    full = cuflash.attention_backward(d_out, q, full_k, full_v, out, lse, deterministic=True)
    narrow = cuflash.attention_backward(d_out, q, k, v, out, lse, deterministic=True)
    assert_same_bits(narrow.d_q, full.d_q)
    for name in ("d_k", "d_v"):
        cupy.testing.assert_allclose(getattr(narrow, name), getattr(full, name).sum(0, keepdims=True), atol=1e-5)
