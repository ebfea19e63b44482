"""What the GPU tests share: lists of cases, and one judge for the forward pass and one for the gradients.

References run on the GPU too (through CuPy, which needs cuBLAS for that), so that thousands of calls take seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import compile as compiler
from cuflash import plan
from cuflash.problem import Features, Mod, Problem
from tests.strategies import DTYPES, EXPRESSIONS, STORAGES, Case, make_mod, make_operands
from tests.tolerance import Yardstick

cupy = pytest.importorskip("cupy")

# One case per kernel: tuned head dims, dims between them, odd ones, d_v != d, and one beyond the largest tile.
_DIMS = {
    "float16": (
        (64, 64), (128, 128), (32, 32), (96, 96), (256, 256), (192, 128), (40, 72), (17, 33), (1, 1), (300, 270)
    ),
    "bfloat16": ((64, 64), (128, 128), (80, 80)),
    "float32": ((64, 64), (128, 128), (256, 256), (33, 17), (300, 270)),
    "float64": ((64, 64), (128, 128), (33, 17), (256, 256)),
}  # fmt: skip

KERNELS = [
    Case(dtype=dtype, batch=2, num_heads=4, num_heads_kv=2, seqlen_q=113, seqlen_k=203,
         head_dim=head_dim, head_dim_v=head_dim_v, is_causal=is_causal)
    for dtype in DTYPES
    for head_dim, head_dim_v in _DIMS[dtype]
    for is_causal in (False, True)
]  # fmt: skip

HEAD_DIMS = [
    Case(dtype=dtype, num_heads=2, seqlen_q=65, seqlen_k=130, head_dim=head_dim, head_dim_v=head_dim)
    for dtype in ("float16", "float32")
    for head_dim in (8, 24, 48, 56, 72, 80, 104, 112, 136, 160, 176, 192, 208, 224, 240, 255)
]

_EDGES = (0, 1, 15, 33, 63, 64, 65, 128, 129, 255, 400)
LENGTHS = (
    [
        Case(batch=2, num_heads=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, is_causal=is_causal)
        for seqlen_q in _EDGES
        for seqlen_k in _EDGES
        for is_causal in (False, True)
    ]
    + [
        Case(dtype="float32", num_heads=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, is_causal=is_causal)
        for seqlen_q, seqlen_k in (
            (0, 5),
            (5, 0),
            (1, 1),
            (31, 33),
            (65, 63),
            (129, 300),
            (300, 129),
            (1, 1000),
            (1000, 1),
        )
        for is_causal in (False, True)
    ]
    + [
        # Two scores, which a plain program happens to get to the last bit from terms many times as large.
        Case(
            dtype="float32",
            num_heads=2,
            num_heads_kv=1,
            seqlen_q=1,
            seqlen_k=1,
            head_dim=256,
            head_dim_v=256,
            spread=3.0,
        )
    ]
)

_BANDS: tuple[dict[str, Any], ...] = (
    {"window": (0, 0)},
    {"window": (7, 3)},
    {"window": (64, 64)},
    {"window": (100, None)},
    {"window": (None, 20)},
    {"window": (None, None)},
    {"is_causal": True, "window": (50, 10)},
    {"is_causal": True, "q_offset": 0},
    {"is_causal": True, "q_offset": 37},
    {"is_causal": True, "q_offset": -60},  # the first 60 queries see nothing
    {"is_causal": True, "q_offset": -1000},  # none sees anything
    {"window": (10, 10), "q_offset": 500},  # neither
    {"window": (30, 5), "q_offset": -20},
    {"is_causal": True, "q_offset": 10**12},  # positions beyond 32 bits
)
BANDS = [
    Case(dtype=dtype, num_heads=2, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **band)
    for dtype in ("float16", "float32")
    for seqlen_q, seqlen_k in ((150, 333), (333, 150))
    for band in _BANDS
]

HEADS = [
    Case(batch=3, num_heads=num_heads, num_heads_kv=num_heads_kv, seqlen_q=70, seqlen_k=90, is_causal=True)
    for num_heads, num_heads_kv in ((1, 1), (8, 1), (6, 2), (6, 3), (12, 4), (5, 5))
]

MEMORY = [
    Case(dtype=dtype, batch=3, num_heads=4, num_heads_kv=2, seqlen_q=97, seqlen_k=129, layout=layout, storage=storage)
    for dtype in ("float16", "float32")
    for layout in ("bhsd", "bshd")
    for storage in [(name,) * 4 for name in STORAGES]
    + [("contiguous", "padded", "transposed", "sliced"), ("broadcast", "offset", "contiguous", "odd_rows")]
]

SCALES = [
    Case(num_heads=2, seqlen_q=100, seqlen_k=140, scale=scale, spread=spread, is_causal=True)
    for scale, spread in ((0.0, 1.0), (1.0, 1.0), (-0.3, 1.0), (1e-3, 1.0), (None, 5.0), (None, 20.0))
]

BATCHES = [
    Case(batch=0),
    Case(num_heads=0, num_heads_kv=0),
    Case(batch=70_000, seqlen_q=1, seqlen_k=2),  # more than 65535, the largest y and z extent of a grid
    Case(num_heads=70_000, num_heads_kv=70_000, seqlen_q=2, seqlen_k=1),
]

CASES = {
    "kernels": KERNELS, "head_dims": HEAD_DIMS, "lengths": LENGTHS, "bands": BANDS, "heads": HEADS, "memory": MEMORY,
    "scales": SCALES, "batches": BATCHES,
}  # fmt: skip


def every_case() -> list[Any]:
    """Every case above, as a pytest parameter with a readable id."""
    return [pytest.param(case, id=f"{name}-{case}") for name, group in CASES.items() for case in group]


@dataclass(frozen=True)
class ScoreFamily:
    """Calls that may share kernels: a dtype, a path (`CUFLASH_KERNEL`), a head_dim, and names of options of scores."""

    dtype: str
    path: str
    head_dim: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}-{self.path}-{self.head_dim}-{'+'.join(self.names)}"

    @property
    def bias_dtype(self) -> str:
        """A kernel knows the bias by its dtype: that of the operands, or float32."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    @property
    def sum_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def mod(self) -> Mod | None:
        name = next((name for name in self.names if name in EXPRESSIONS), None)
        if name is None:
            return None
        made = make_mod(name, Case(self.dtype))
        return Mod(made.expression, tuple((key, str(array.dtype)) for key, array in made.arrays.items()))

    @property
    def has_order(self) -> bool:
        """Whether there is a gradient that another kernel computes where sums have a fixed order."""
        return "bias" in self.names and not any(name in EXPRESSIONS for name in self.names)

    def problems(self) -> Iterator[Problem]:
        """Few and many queries, in rows that are copied by vectors or by elements."""
        has = self.names.__contains__
        features = Features(
            2.0 if has("softcap") else None, (True, True, True, True) if has("mask") else None,
            self.bias_dtype if has("bias") else None, self.sum_dtype if has("alibi_slopes") else None, 0,
            self.sum_dtype if has("sinks") else None, 0.1 if has("dropout") else 0.0, self.mod,
        )  # fmt: skip
        by_tiles = (False, True) if features.bias == "float16" else (False,)
        for seqlen, is_vectorized, bias_tiles in itertools.product((20, 200), (True, False), by_tiles):
            yield Problem(
                self.dtype, 2, 4, 2, seqlen, seqlen, self.head_dim, self.head_dim, 1.0,
                features=dataclasses.replace(features, bias_tiles=bias_tiles), vectorized=is_vectorized,
            )  # fmt: skip

    def plans(self) -> Iterator[plan.Plan]:
        device = plan.DeviceInfo.current(0)
        for problem in self.problems():
            yield plan.plan_forward(problem, device, self.path)
            backward = plan.plan_backward(problem, device, self.path)
            yield from backward
            if problem.features.mod is not None:
                yield plan.plan_captured(backward[1], problem, device)
            if self.has_order:
                problem = dataclasses.replace(problem, deterministic=True)
                backward = plan.plan_backward(problem, device, self.path)
                of_bias = plan.plan_bias(backward[1], problem, device, (0, 0, 0, 0))
                assert of_bias is not None
                yield from (*backward, of_bias)


class WeightsFamily(ScoreFamily):
    """Calls that ask for weights."""

    def plans(self) -> Iterator[plan.Plan]:
        for problem, num_rows in itertools.product(self.problems(), (20, None)):
            features = dataclasses.replace(problem.features, sinks=None, dropout_p=0.0)
            problem = dataclasses.replace(problem, features=features)
            yield plan.plan_weights(problem, num_rows, plan.DeviceInfo.current(0), self.path)


def warm(case: Case | ScoreFamily) -> None:
    """Compile the kernels of a case. What goes wrong here, the test itself reports."""
    with contextlib.suppress(Exception):
        if isinstance(case, ScoreFamily):
            for each in case.plans():
                compiler.load(each.config, 0)
            return
        q, k, v, d_out = make_operands(case, cupy.asarray)
        out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
        cuflash.attention_backward(d_out, q, k, v, out, lse, **case.options)


def assert_same_bits(found: Any, wanted: Any) -> None:
    """Compare two arrays, or lists of them, bit by bit: equal numbers would not tell -0.0 from 0.0, or see NaN."""
    if not isinstance(wanted, cupy.ndarray):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same_bits(one, other)
        return
    found, wanted = (np.ascontiguousarray(cupy.asnumpy(array)) for array in (found, wanted))
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    words = np.dtype(f"u{found.itemsize}")
    different = np.argwhere(found.view(words) != wanted.view(words))
    if len(different):
        first = tuple(different[0].tolist())
        raise AssertionError(
            f"{len(different)} of {found.size} elements differ, first at {first}: {found[first]!r}, {wanted[first]!r}"
        )


def check_forward(case: Case, **options: Any) -> None:
    """Judge output and LSE of a call by the one tolerance rule."""
    q, k, v, _ = make_operands(case, cupy.asarray)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options, **options)
    judge_forward(case, q, k, v, out, lse)


def judge_forward(case: Case, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
    """Judge a given output and LSE (q, k, v, out in the layout of the case)."""
    assert isinstance(out, cupy.ndarray)
    assert out.dtype == q.dtype
    assert lse.dtype == (np.float64 if case.dtype == "float64" else np.float32)
    yardstick, out = _yardstick(case, q, k, v, out)
    yardstick.assert_forward(out, lse)
    sees_nothing = cupy.asnumpy(yardstick.lse) == -np.inf
    assert not cupy.asnumpy(out)[sees_nothing].any(), "out is not 0 in rows that see nothing"


def check_backward(case: Case, *, with_d_lse: bool = False, **options: Any) -> None:
    """Judge the three gradients of a call by the one tolerance rule."""
    q, k, v, d_out = make_operands(case, cupy.asarray)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    d_lse = None
    if with_d_lse:
        d_lse = cupy.asarray(np.random.default_rng(case.seed).standard_normal(lse.shape), dtype=lse.dtype)
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **case.options, **options)
    judge_backward(case, d_out, q, k, v, d_lse, found[:3])


def judge_backward(case: Case, d_out: Any, q: Any, k: Any, v: Any, d_lse: Any, gradients: Sequence[Any]) -> None:
    """Judge given gradients (all in the layout of the case)."""
    for gradient, operand in zip(gradients, (q, k, v), strict=True):
        assert isinstance(gradient, cupy.ndarray)
        assert gradient.dtype == operand.dtype
    yardstick, d_out, *gradients = _yardstick(case, q, k, v, d_out, *gradients)
    if d_lse is not None and isinstance(d_out, np.ndarray):
        d_lse = cupy.asnumpy(d_lse)
    yardstick.assert_backward(d_out, gradients, d_lse=d_lse)


def _yardstick(case: Case, q: Any, k: Any, v: Any, *others: Any) -> tuple[Any, ...]:
    """The yardstick of a call, and the other arrays as it wants them: (batch, heads, seqlen, dim)."""
    arrays = [q, k, v, *others]
    if case.layout == "bshd":
        arrays = [array.swapaxes(1, 2) for array in arrays]
    if not all((case.batch, case.num_heads, case.seqlen_q, case.seqlen_k)):
        arrays = [cupy.asnumpy(array) for array in arrays]  # CuPy reduces no empty arrays
    return Yardstick(*arrays[:3], band=case.band, scale=case.softmax_scale), *arrays[3:]
