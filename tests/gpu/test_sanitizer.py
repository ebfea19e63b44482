"""A small set of calls that reaches every kernel, for slow tools and short tests of a change.

    python -m pytest -m fast tests/gpu
    compute-sanitizer --tool memcheck python -m pytest -m fast tests/gpu    (also racecheck, initcheck, synccheck)

racecheck takes copies of log-sum-exps and deltas in the Hopper backward for races with what was read at their place
before. It does not follow one lane that arrives at a barrier for its warp: a ring of two places, of a few lines, is
reported as well where one lane arrives behind `__syncwarp`, and not where all do; nor is this kernel if all arrive.

References are computed on the host, and every array is an allocation of its own, without CuPy's memory pool, so
that a tool sees our kernels alone and notices an access one element out of place.
"""

from collections.abc import Iterator

import numpy as np
import pytest

import cuflash
from tests.gpu.harness import cupy
from tests.strategies import DTYPES, Case, make_operands
from tests.tolerance import Yardstick

pytestmark = pytest.mark.fast

CASES = [
    *(
        Case(dtype=dtype, num_heads=2, seqlen_q=37, seqlen_k=75, head_dim=dim, head_dim_v=dim_v, is_causal=True)
        for dtype in DTYPES
        for dim, dim_v in ((64, 64), (33, 17), (128, 128))
    ),
    Case(dtype="float16", seqlen_q=37, seqlen_k=75, head_dim=256, head_dim_v=256),
    Case(dtype="float32", seqlen_q=37, seqlen_k=75, head_dim=256, head_dim_v=256),
    Case(dtype="float16", seqlen_q=37, seqlen_k=75, head_dim=192, head_dim_v=128),
    Case(dtype="float16", seqlen_q=37, seqlen_k=75, head_dim=270, head_dim_v=300),
    Case(batch=2, num_heads=6, num_heads_kv=2, seqlen_q=130, seqlen_k=65, window=(20, 7), q_offset=-30),
    Case(num_heads=6, num_heads_kv=1, seqlen_q=300, seqlen_k=200, head_dim=128, head_dim_v=128),  # tiles in parts
    Case(batch=300, seqlen_q=5, seqlen_k=3),  # a workspace that the main kernel fills with zeros
    Case(seqlen_q=1, seqlen_k=1),
    Case(seqlen_q=65, seqlen_k=0),
    Case(seqlen_q=64, seqlen_k=64, is_causal=True, q_offset=-100),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_allocations() -> Iterator[None]:
    pool = cupy.get_default_memory_pool()
    cupy.cuda.set_allocator(None)
    yield
    cupy.cuda.set_allocator(pool.malloc)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_forward_and_backward(case: Case, deterministic: bool) -> None:
    operands = [np.ascontiguousarray(array) for array in make_operands(case)]
    q, k, v, d_out = map(cupy.asarray, operands)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, deterministic=deterministic, **case.options)
    yardstick = Yardstick(*operands[:3], band=case.band, scale=case.softmax_scale)
    yardstick.assert_forward(cupy.asnumpy(out), cupy.asnumpy(lse))
    yardstick.assert_backward(operands[3], [cupy.asnumpy(array) for array in found[:3]])
