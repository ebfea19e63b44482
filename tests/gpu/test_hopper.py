"""The Hopper forward beside the portable one: every length around its tiles, any grid, and whatever moves its shift."""

from __future__ import annotations

import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import compile as compiler
from cuflash import configs, launch, plan
from cuflash.problem import Problem
from cuflash.scores import Band, make_band
from tests.gpu.harness import assert_same_bits, cupy, judge_forward
from tests.strategies import Case, make_operands
from tests.tolerance import Yardstick

DEVICE = plan.DeviceInfo.of_arch(90)
PORTABLE = plan.DeviceInfo.of_arch(80)


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if plan.DeviceInfo.current(0).arch != 90:
        pytest.skip("wgmma exists on sm_90 alone")


def test_tables_compile_with_the_compiler_at_hand() -> None:
    """Compilers of other CUDA releases allot registers otherwise; all of them have to get by without local memory."""
    tables = [config for config in configs.all_configs(90) if config.arch_specific]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda config: compiler.compile_cubin(config, 90), tables)
        for config, result in zip(tables, results, strict=True):
            assert "C75" not in result.log, f"{config.name}: {result.log}"
            assert result.spill_bytes == 0, config.name


class Operands:
    """Random q, k and v of the largest shape, of which a call takes a corner."""

    def __init__(self, batch: int, heads: int, seqlen: int, dim: int, dtype: str = "float16") -> None:
        self.shape, self.dtype = (batch, heads, seqlen, dim), dtype
        generator = cupy.random.default_rng(0)
        draw = [generator.standard_normal(self.shape, dtype=np.float32).astype(np.float16) for _ in range(3)]
        self.q, self.k, self.v = draw
        self.strides = tuple(stride // 2 for stride in self.q.strides[:3])

    def call(self, problem: Problem, chosen: plan.Plan | None = None) -> tuple[Any, Any]:
        """Output and LSE by a plan, the planner's own where none is given; NaN where nothing was written."""
        chosen = chosen or plan.plan_forward(problem, DEVICE)
        shape = problem.batch, problem.num_heads, problem.seqlen_q
        out = cupy.full((*shape, problem.head_dim_v), cupy.nan, dtype=np.float16)
        lse = cupy.full(shape, cupy.nan, dtype=np.float32)
        strides = [self.strides] * 3 + [tuple(stride // 2 for stride in out.strides[:3])]
        run = launch.ForwardCall(problem, 0, *strides, plan=chosen)
        pointers = (array.data.ptr for array in (self.q, self.k, self.v, out, lse))
        run(*pointers, cupy.cuda.get_current_stream().ptr)
        return out, lse


def problem_of(
    batch: int, heads: int, heads_kv: int, seqlen_q: int, seqlen_k: int, dim: int, band: Band | None = None
) -> Problem:
    return Problem("float16", batch, heads, heads_kv, seqlen_q, seqlen_k, dim, dim, dim**-0.5, band or Band())


def tiles_of(dim: int) -> list[configs.ForwardWgmmaConfig]:
    """Every tile that the planner may choose for a head dim: which one it takes depends on how many there are."""
    return [config for config, _ in configs.forward_wgmma_configs("f16", dim, dim, True)]


def difference(found: tuple[Any, Any], wanted: tuple[Any, Any]) -> Any:
    """Largest difference of output and LSE, on the device; NaN if either is, or an infinity is not matched."""
    out = cupy.abs(found[0].astype(np.float32) - wanted[0].astype(np.float32)).max()
    lse = cupy.where(found[1] == wanted[1], np.float32(0), cupy.abs(found[1] - wanted[1])).max()
    return cupy.maximum(out, lse)


# Two results, each rounded to float16, of values below 4; LSEs below 16.
CLOSE = 6e-3


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("config", [tile for dim in (64, 128, 256) for tile in tiles_of(dim)], ids=lambda c: c.name)
def test_every_length(config: configs.ForwardWgmmaConfig, is_causal: bool) -> None:
    """1 to three blocks of keys and one more, and the same for queries, with every tile."""
    dim = config.head_dim
    operands = Operands(1, 2, 600, dim)
    worst = cupy.zeros((), dtype=np.float32)
    lengths = [(130, n) for n in range(1, 3 * config.block_n + 2)] + [(n, 70) for n in range(1, 3 * config.block_m + 2)]
    for seqlen_q, seqlen_k in lengths:
        problem = problem_of(1, 2, 2, seqlen_q, seqlen_k, dim, make_band(is_causal, None, None, seqlen_q, seqlen_k))
        found = operands.call(problem, plan.wgmma_plan(config, problem, DEVICE))
        worst = cupy.maximum(worst, difference(found, operands.call(problem, plan.plan_forward(problem, PORTABLE))))
    assert float(worst) < CLOSE


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_problems(seed: int) -> None:
    """Nothing hangs, and neither the grid, nor the order of tiles, nor their size changes a bit."""
    draw = random.Random(seed)
    operands = {dim: Operands(2, 12, 700, dim) for dim in (64, 96, 128, 192, 256)}
    worst, same = cupy.zeros((), dtype=np.float32), cupy.ones((), dtype=bool)
    for number in range(1000):
        dim = draw.choice(tuple(operands))
        heads_kv, group = draw.choice(((1, 1), (2, 1), (3, 4), (1, 6), (4, 3), (2, 5)))
        seqlen_q, seqlen_k = (draw.choice((draw.randint(1, 40), draw.randint(1, 700))) for _ in range(2))
        window = draw.choice(
            (None, (draw.choice((None, draw.randint(0, 300))), draw.choice((None, draw.randint(0, 99)))))
        )
        offset = draw.choice((None, 0, draw.randint(-400, 400)))
        band = make_band(draw.random() < 0.5, window, offset, seqlen_q, seqlen_k)
        problem = problem_of(draw.randint(1, 2), heads_kv * group, heads_kv, seqlen_q, seqlen_k, dim, band)
        chosen = plan.plan_forward(problem, DEVICE)
        assert chosen.order is not None
        found = operands[dim].call(problem, chosen)
        # Packed heads keep their tile: there it decides which queries share a warp.
        other = chosen if chosen.order.pack > 1 else plan.wgmma_plan(draw.choice(tiles_of(dim)), problem, DEVICE)
        order = dataclasses.replace(other.order, section=draw.randint(1, 2 * heads_kv * group))
        other = dataclasses.replace(other, grid=draw.randint(1, order.num_tiles), order=order)
        again = operands[dim].call(problem, other)
        same &= (found[0].view(np.uint16) == again[0].view(np.uint16)).all()
        same &= (found[1].view(np.uint32) == again[1].view(np.uint32)).all()
        if number % 10 == 0:
            portable = operands[dim].call(problem, plan.plan_forward(problem, PORTABLE))
            worst = cupy.maximum(worst, difference(found, portable))
    assert bool(same)
    assert float(worst) < CLOSE


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -0.1}, {"window": (150, 20)}], ids=str)
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("steep", [0.02, 0.5])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_that_grow_along_the_keys(dtype: str, dim: int, steep: float, direction: int, options: dict) -> None:
    """Blocks whose scores are far above or below those of the blocks before: the shift has to follow, and O with it."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
        import ml_dtypes

        kind: Any = ml_dtypes.bfloat16
    else:
        kind = np.float16
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, length, dim)) for length in (200, 900, 900))
    slope = steep * direction * np.arange(900) * np.sign(options.get("scale", 1.0))
    q[..., 0] = 8
    k[..., 0] = slope / 8 * dim**0.5
    q, k, v = (cupy.asarray(array.astype(kind)) for array in (q, k, v))
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    case = Case(dtype=dtype, num_heads=2, seqlen_q=200, seqlen_k=900, head_dim=dim, head_dim_v=dim, **options)
    Yardstick(q, k, v, band=case.band, scale=case.softmax_scale).assert_forward(out, lse)


def test_a_value_that_is_not_finite_stays_in_its_column() -> None:
    """And with the rows that see it: the keys that a block of queries does not see are not multiplied by 0."""
    rng = np.random.default_rng(0)
    q, k, v = (cupy.asarray(rng.standard_normal((1, 1, 512, 64)).astype(np.float16)) for _ in range(3))
    v[..., 511, 3] = np.inf
    out = cuflash.attention(q, k, v, is_causal=True)
    finite = cupy.isfinite(out)[0, 0]
    assert bool(finite[:, :3].all())
    assert bool(finite[:, 4:].all())
    assert not bool(finite[511, 3])
    assert bool(finite[:256].all())


@pytest.mark.parametrize("axis", [-3, -2])
def test_strides_that_no_descriptor_holds(axis: int) -> None:
    """Reversed axes have negative strides: the portable kernels take them."""
    rng = np.random.default_rng(0)
    q, k, v = (cupy.asarray(rng.standard_normal((1, 4, 300, 64)).astype(np.float16)) for _ in range(3))
    found = cuflash.attention(q, cupy.flip(k, axis), cupy.flip(v, axis))
    wanted = cuflash.attention(
        q, cupy.ascontiguousarray(cupy.flip(k, axis)), cupy.ascontiguousarray(cupy.flip(v, axis))
    )
    assert float(cupy.abs(found.astype(np.float32) - wanted.astype(np.float32)).max()) < CLOSE


def test_operands_that_move() -> None:
    """A prepared call describes its operands anew wherever they are, however many places that are."""
    operands = [Operands(1, 1, 64, 64) for _ in range(80)]
    for number, each in enumerate(operands):
        each.v[...] = number
    problem = problem_of(1, 1, 1, 64, 64, 64)
    run = launch.ForwardCall(problem, 0, *[operands[0].strides] * 4)
    stream = cupy.cuda.get_current_stream().ptr
    out, lse = cupy.empty((1, 1, 64, 64), np.float16), cupy.empty((1, 1, 64), np.float32)
    for _ in range(2):
        for number, each in enumerate(operands):
            run(each.q.data.ptr, each.k.data.ptr, each.v.data.ptr, out.data.ptr, lse.data.ptr, stream)
            assert_same_bits(out, cupy.full_like(out, number))


@pytest.mark.parametrize("storage", ["contiguous", "offset"])
@pytest.mark.parametrize("dims", [(40, 40), (72, 96), (192, 128), (17, 33), (255, 255)], ids=str)
def test_element_and_descriptor_producers(dims: tuple[int, int], storage: str) -> None:
    """Head dims that fill no slab, aligned and not: the planner leaves the latter to others unless it is asked."""
    case = Case(
        num_heads=3, num_heads_kv=3, seqlen_q=200, seqlen_k=300, head_dim=dims[0], head_dim_v=dims[1], is_causal=True,
        storage=(storage,) * 4,
    )  # fmt: skip
    q, k, v, _ = make_operands(case, cupy.asarray)
    out, lse = cupy.full((1, 3, 200, dims[1]), cupy.nan, np.float16), cupy.full((1, 3, 200), cupy.nan, np.float32)
    is_aligned = storage == "contiguous" and all(dim % 8 == 0 for dim in dims)
    problem = Problem("float16", 1, 3, 3, 200, 300, *dims, case.softmax_scale, case.band, vectorized=is_aligned)
    chosen = plan.plan_forward(problem, DEVICE, "wgmma")
    assert chosen.config.copy == ("tma" if is_aligned else "element")
    strides = [tuple(stride // 2 for stride in array.strides[:3]) for array in (q, k, v, out)]
    run = launch.ForwardCall(problem, 0, *strides, plan=chosen)
    run(*(array.data.ptr for array in (q, k, v, out, lse)), cupy.cuda.get_current_stream().ptr)
    judge_forward(case, q, k, v, out, lse)
