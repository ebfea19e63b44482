"""What a call costs the host: which calls compile a kernel, and that the others do not."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import cuflash
from cuflash import compile as compiler
from tests.gpu.harness import assert_same_bits, cupy
from tests.strategies import Case, make_operands

BASE = Case(batch=2, num_heads=4, num_heads_kv=2, seqlen_q=100, seqlen_k=150, is_causal=True)
# Everything that is a run-time parameter.
CHANGES = (
    {"batch": 5}, {"num_heads": 8}, {"num_heads_kv": 4}, {"seqlen_q": 1}, {"seqlen_q": 777}, {"seqlen_k": 3},
    {"seqlen_k": 1024}, {"scale": 0.5}, {"scale": -1.0}, {"scale": 0.0}, {"q_offset": 7}, {"q_offset": -7},
    {"is_causal": False, "window": (3, 9)}, {"window": (100, None)}, {"layout": "bshd"},
    {"storage": ("padded",) * 4}, {"storage": ("transposed",) * 4}, {"storage": ("broadcast",) * 4},
)  # fmt: skip


def call(case: Case) -> list[object]:
    """Forward and backward of a case."""
    q, k, v, d_out = make_operands(case, cupy.asarray)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    return [out, lse, *cuflash.attention_backward(d_out, q, k, v, out, lse, deterministic=True, **case.options)[:3]]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_new_values_compile_nothing(change: dict) -> None:
    call(BASE)
    before = compiler.loaded_kernels()
    call(replace(BASE, **change))
    assert compiler.loaded_kernels() == before


def test_threads_that_meet_at_a_new_kernel_get_the_same_one() -> None:
    """The first calls of a kernel, at once from many threads, compile it once and agree."""
    case = replace(BASE, head_dim=90, head_dim_v=90, dtype="float32")
    with ThreadPoolExecutor(8) as pool:
        results = [future.result() for future in [pool.submit(call, case) for _ in range(16)]]
    before = compiler.loaded_kernels()
    wanted = call(case)
    assert compiler.loaded_kernels() == before
    for arrays in results:
        assert_same_bits(arrays, wanted)
