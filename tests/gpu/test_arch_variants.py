"""Configurations of other architectures, forced onto the present GPU: each computes the same function.

A kernel that an older architecture uses runs on a newer one, so that one GPU checks the tables of all before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cuflash import launch
from cuflash.plan import DeviceInfo
from cuflash.problem import Problem
from tests.gpu.harness import cupy, judge_backward, judge_forward
from tests.strategies import Case, make_operands

ARCHS = (75, 80, 86, 89, 90, 100, 120)
CASES = [
    Case(dtype=dtype, batch=2, num_heads=4, num_heads_kv=2, seqlen_q=113, seqlen_k=203,
         head_dim=head_dim, head_dim_v=head_dim_v, is_causal=True)
    for dtype, dims in {
        "float16": ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (40, 72), (33, 17)),
        "bfloat16": ((64, 64), (128, 128)),
        "float32": ((64, 64), (128, 128), (256, 256), (33, 17)),
        "float64": ((64, 64), (128, 128)),
    }.items()
    for head_dim, head_dim_v in dims
]  # fmt: skip

every_variant = pytest.mark.parametrize(
    ("arch", "case"),
    [pytest.param(arch, case, id=f"sm_{arch}-{case}") for arch in ARCHS for case in CASES
     if (arch, case.dtype) != (75, "bfloat16")],
)  # fmt: skip


def problem_of(case: Case, *, deterministic: bool = False) -> Problem:
    """The problem of a case whose operands are contiguous."""
    itemsize = {"float64": 8, "float32": 4}.get(case.dtype, 2)
    return Problem(
        case.dtype, case.batch, case.num_heads, case.num_heads_kv, case.seqlen_q, case.seqlen_k,
        case.head_dim, case.head_dim_v, case.softmax_scale, case.band, deterministic=deterministic,
        vectorized=not any(dim * itemsize % 16 for dim in (case.head_dim, case.head_dim_v)),
    )  # fmt: skip


def strides_of(heads: int, seqlen: int, dim: int) -> tuple[int, int, int]:
    """Batch, head and row strides of a contiguous operand, in elements."""
    return heads * seqlen * dim, seqlen * dim, dim


def forward_call(arch: int, case: Case) -> launch.ForwardCall:
    """The launch of the forward kernel of an architecture."""
    q = strides_of(case.num_heads, case.seqlen_q, case.head_dim)
    k = strides_of(case.num_heads_kv, case.seqlen_k, case.head_dim)
    v = strides_of(case.num_heads_kv, case.seqlen_k, case.head_dim_v)
    out = strides_of(case.num_heads, case.seqlen_q, case.head_dim_v)
    return launch.ForwardCall(problem_of(case), 0, q, k, v, out, device_info=DeviceInfo.of_arch(arch))


def backward_call(arch: int, case: Case, *, deterministic: bool = False) -> launch.BackwardCall:
    """The launches of the backward kernels of an architecture."""
    q = strides_of(case.num_heads, case.seqlen_q, case.head_dim)
    k = strides_of(case.num_heads_kv, case.seqlen_k, case.head_dim)
    v = strides_of(case.num_heads_kv, case.seqlen_k, case.head_dim_v)
    out = strides_of(case.num_heads, case.seqlen_q, case.head_dim_v)
    problem = problem_of(case, deterministic=deterministic)
    return launch.BackwardCall(problem, 0, out, q, k, v, out, q, k, v, device_info=DeviceInfo.of_arch(arch))


@pytest.fixture(scope="module", autouse=True)
def _compile_in_parallel(request: pytest.FixtureRequest) -> None:
    """Compile what the collected tests of this module need; what fails to compile, its test reports."""
    variants = {
        (item.callspec.params["arch"], item.callspec.params["case"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec")
    }
    with ThreadPoolExecutor() as pool:
        for build in (forward_call, backward_call):
            for arch, case in variants:
                if runs_here(arch):
                    pool.submit(build, arch, case)


def runs_here(arch: int) -> bool:
    """Tell whether the present GPU can run kernels written for `arch`."""
    return arch <= DeviceInfo.current(0).arch


def operands_and_stream(arch: int, case: Case) -> Iterator[Any]:
    """Operands of the case, and the current stream."""
    if not runs_here(arch):
        pytest.skip(f"kernels of sm_{arch} do not run on sm_{DeviceInfo.current(0).arch}")
    yield from make_operands(case, cupy.asarray)
    yield cupy.cuda.get_current_stream().ptr


def run_forward(arch: int, case: Case, q: Any, k: Any, v: Any, stream: int) -> tuple[Any, Any]:
    """Output and LSE by the kernel of `arch`."""
    out = cupy.full((*q.shape[:3], case.head_dim_v), cupy.nan, dtype=q.dtype)
    lse = cupy.full(q.shape[:3], cupy.nan, dtype=np.float64 if case.dtype == "float64" else np.float32)
    forward_call(arch, case)(q.data.ptr, k.data.ptr, v.data.ptr, out.data.ptr, lse.data.ptr, stream)
    return out, lse


@every_variant
def test_forward(arch: int, case: Case) -> None:
    q, k, v, _, stream = operands_and_stream(arch, case)
    judge_forward(case, q, k, v, *run_forward(arch, case, q, k, v, stream))


@every_variant
def test_backward(arch: int, case: Case) -> None:
    q, k, v, d_out, stream = operands_and_stream(arch, case)
    out, lse = run_forward(arch, case, q, k, v, stream)
    call = backward_call(arch, case)
    gradients = [cupy.full_like(array, cupy.nan) for array in (q, k, v)]
    workspace = cupy.full(call.workspace_bytes, 255, dtype=np.uint8)  # NaN in every dtype
    call(
        *(array.data.ptr for array in (d_out, q, k, v, out, lse)), 0,
        *(array.data.ptr for array in gradients), workspace.data.ptr, stream,
    )  # fmt: skip
    judge_backward(case, d_out, q, k, v, None, gradients)
