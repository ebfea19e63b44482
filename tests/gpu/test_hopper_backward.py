"""The Hopper backward beside the portable one: every length around its tiles, any grid, and sums in a fixed order."""

from __future__ import annotations

import dataclasses
import random
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cuflash import configs, launch, plan
from cuflash.problem import Problem
from cuflash.scores import make_band
from tests.gpu.harness import assert_same_bits, check_backward, cupy
from tests.gpu.test_hopper import DEVICE, PORTABLE, Operands, problem_of
from tests.strategies import Case


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if plan.DeviceInfo.current(0).arch != 90:
        pytest.skip("wgmma exists on sm_90 alone")


class BackwardOperands(Operands):
    """Also d_out and d_lse of the largest shape."""

    def __init__(self, batch: int, heads: int, seqlen: int, dim: int) -> None:
        super().__init__(batch, heads, seqlen, dim)
        generator = cupy.random.default_rng(1)
        self.d_out = generator.standard_normal(self.shape, dtype=np.float32).astype(np.float16)
        self.d_lse = generator.standard_normal(self.shape[:3], dtype=np.float32)

    def gradients(
        self, problem: Problem, forward: tuple[Any, Any], chosen: tuple[plan.Plan, ...]
    ) -> tuple[Any, Any, Any]:
        """Gradients by given plans, NaN where nothing was written; `forward` are output and LSE."""
        p = problem
        shapes = [(p.batch, heads, rows, p.head_dim) for heads, rows in
                  ((p.num_heads, p.seqlen_q), (p.num_heads_kv, p.seqlen_k), (p.num_heads_kv, p.seqlen_k))]  # fmt: skip
        found = [cupy.full(shape, cupy.nan, dtype=np.float16) for shape in shapes]
        strides = [tuple(stride // 2 for stride in array.strides[:3]) for array in (forward[0], *found)]
        run = launch.BackwardCall(p, 0, *[self.strides] * 4, *strides, plans=chosen)
        workspace = cupy.full(run.workspace_bytes, 0xFF, dtype=np.uint8)
        d_lse = cupy.ascontiguousarray(self.d_lse[: p.batch, : p.num_heads, : p.seqlen_q])
        arrays = (self.d_out, self.q, self.k, self.v, *forward, d_lse, *found, workspace)
        run(*(array.data.ptr for array in arrays), cupy.cuda.get_current_stream().ptr)
        return tuple(found)


def with_order(plans: tuple[plan.Plan, ...], problem: Problem, draw: random.Random) -> tuple[plan.Plan, ...]:
    """The same tiles by another grid in another order, unless that would be others that are cut into parts.

    Sections of any length, which empty the workspace of any later one.
    """
    config, order, tail = plans[1].config, plans[1].order, plans[1].tail
    assert isinstance(config, configs.BackwardWgmmaConfig)
    assert order is not None
    assert tail is not None
    if tail.num_steps == 0:
        order = dataclasses.replace(order, section=draw.randint(1, 2 * order.num_heads))
        ahead = draw.randint(1, order.num_sections)
        with (
            mock.patch.object(plan, "_backward_order", return_value=order),
            mock.patch.object(plan, "_sections_ahead", return_value=ahead),
        ):
            plans = plan.plans_around(config, problem, DEVICE)
    return plans[0], dataclasses.replace(plans[1], grid=draw.randint(1, order.num_tiles)), *plans[2:]


def differences(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> Any:
    """Largest difference relative to the largest element, on the device; NaN if there is one."""
    worst = cupy.zeros((), dtype=np.float32)
    for one, other in zip(found, wanted, strict=True):
        one, other = one.astype(np.float32), other.astype(np.float32)
        worst = cupy.maximum(worst, cupy.abs(one - other).max() / cupy.maximum(cupy.abs(other).max(), 0.1))
    return worst


#: Both round P and dS to float16, whose spacing is 2**-11 of a number, and sum in different orders.
CLOSE = 6e-3
DIMS = (64, 96, 128, 192, 256)


def main_config(dim: int, deterministic: bool = False) -> configs.BackwardWgmmaConfig:
    return configs.backward_wgmma_config("f16", dim, dim, deterministic)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_every_length(dim: int, is_causal: bool) -> None:
    """1 to two tiles of keys and one more, and 1 to three of queries."""
    config = main_config(dim)
    operands = BackwardOperands(1, 2, 400, dim)
    worst = cupy.zeros((), dtype=np.float32)
    lengths = [(130, n) for n in range(1, 2 * config.block_n + 2)]
    lengths += [(n, 150) for n in range(1, 3 * config.block_m + 2)]
    for seqlen_q, seqlen_k in lengths:
        problem = problem_of(1, 2, 1, seqlen_q, seqlen_k, dim, make_band(is_causal, None, None, seqlen_q, seqlen_k))
        forward = operands.call(problem)
        found = operands.gradients(problem, forward, plan.plans_around(config, problem, DEVICE))
        portable = operands.gradients(problem, forward, plan.plan_backward(problem, PORTABLE))
        worst = cupy.maximum(worst, differences(found, portable))
    assert float(worst) < CLOSE


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_problems(seed: int) -> None:
    """Nothing hangs, and neither grid nor order of tiles changes a bit of d_k and d_v; a fixed order none of d_q."""
    draw = random.Random(seed)
    operands = {dim: BackwardOperands(2, 12, 700, dim) for dim in DIMS}
    worst, same = cupy.zeros((), dtype=np.float32), cupy.ones((), dtype=bool)
    for number in range(1000):
        dim = draw.choice(DIMS)
        deterministic = draw.random() < 0.3
        group = draw.choice((1, 1, 2, 4, 6))
        heads_kv = draw.randint(1, 12 // group)
        longest = 700 if draw.random() < 0.2 else 200
        seqlen_q, seqlen_k = draw.randint(1, longest), draw.randint(1, longest)
        window = draw.choice((None, None, (draw.randint(0, 300), draw.randint(0, 300)), (draw.randint(0, 90), None)))
        offset = draw.choice((None, 0, draw.randint(-400, 400)))
        band = make_band(draw.random() < 0.5, window, offset, seqlen_q, seqlen_k)
        problem = problem_of(draw.randint(1, 2), heads_kv * group, heads_kv, seqlen_q, seqlen_k, dim, band)
        forward = operands[dim].call(problem)
        plans = plan.plans_around(main_config(dim, deterministic), problem, DEVICE)
        found = operands[dim].gradients(problem, forward, plans)
        again = operands[dim].gradients(problem, forward, with_order(plans, problem, draw))
        for one, two in list(zip(found, again, strict=True))[0 if deterministic else 1 :]:
            same &= (one.view(np.uint16) == two.view(np.uint16)).all()
        if number % 10 == 0:
            portable = operands[dim].gradients(problem, forward, plan.plan_backward(problem, PORTABLE))
            worst = cupy.maximum(worst, differences(found, portable))
    assert bool(same)
    assert float(worst) < CLOSE


@pytest.mark.parametrize("dim", DIMS)
def test_tiles_in_parts(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of tiles in parts of any length; neither the grid nor who comes last changes a bit of d_k and d_v."""
    draw = random.Random(dim)
    operands = BackwardOperands(2, 12, 700, dim)
    worst, same = cupy.zeros((), dtype=np.float32), cupy.ones((), dtype=bool)

    def tail(problem: Problem, config: configs.BackwardWgmmaConfig, num_tiles: int, num_sms: int) -> plan.TileParts:
        tiles = draw.randint(1, num_tiles)
        steps = configs.ceil_div(problem.seqlen_q, config.block_m) * problem.group_size
        return plan.TileParts(num_tiles - tiles, steps, tiles * steps, draw.randint(1, 2 * steps))

    monkeypatch.setattr(plan, "_backward_tail", tail)
    for _ in range(100):
        group = draw.choice((1, 2, 6))
        heads_kv = draw.randint(1, 12 // group)
        lengths = draw.randint(1, 700), draw.randint(1, 700)
        problem = problem_of(2, heads_kv * group, heads_kv, *lengths, dim, make_band(False, None, None, *lengths))
        forward = operands.call(problem)
        plans = plan.plans_around(main_config(dim, draw.random() < 0.3), problem, DEVICE)
        found = operands.gradients(problem, forward, plans)
        again = operands.gradients(problem, forward, with_order(plans, problem, draw))
        for one, two in list(zip(found, again, strict=True))[1:]:
            same &= (one.view(np.uint16) == two.view(np.uint16)).all()
        portable = operands.gradients(problem, forward, plan.plan_backward(problem, PORTABLE))
        worst = cupy.maximum(worst, differences(found, portable))
    assert bool(same)
    assert float(worst) < CLOSE


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_fixed_order_repeats_bit_for_bit(dim: int, is_causal: bool) -> None:
    """Many more blocks than multiprocessors, 50 times; without the fixed order d_k and d_v still repeat."""
    operands = BackwardOperands(2, 8, 1500, dim)
    problem = problem_of(2, 8, 4, 1500, 1300, dim, make_band(is_causal, None, None, 1500, 1300))
    forward = operands.call(problem)
    for deterministic in (True, False):
        plans = plan.plans_around(main_config(dim, deterministic), problem, DEVICE)
        first = operands.gradients(problem, forward, plans)
        for _ in range(50):
            again = operands.gradients(problem, forward, plans)
            assert_same_bits(list(again[0 if deterministic else 1 :]), list(first[0 if deterministic else 1 :]))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    "options",
    [{"spread": 40.0}, {"spread": 40.0, "is_causal": True}, {"window": (0, 0)}, {"is_causal": True, "q_offset": -129}],
    ids=str,
)
def test_hard_rows(dim: int, options: dict[str, Any]) -> None:
    """Logits 40 times as large, rows that see one key, and rows that see none."""
    check_backward(
        Case(num_heads=4, num_heads_kv=2, seqlen_q=300, seqlen_k=280, head_dim=dim, head_dim_v=dim, **options)
    )


@pytest.mark.parametrize("storage", ["padded", "transposed", "broadcast", "sliced"])
@pytest.mark.parametrize("dims", [(40, 40), (72, 96), (192, 128), (160, 136), (256, 200)], ids=str)
def test_strides_and_padded_head_dims(dims: tuple[int, int], storage: str) -> None:
    """Head dims that fill no slab, in operands that are parts of others."""
    check_backward(
        Case(batch=2, num_heads=3, seqlen_q=200, seqlen_k=300, head_dim=dims[0], head_dim_v=dims[1], is_causal=True,
             storage=(storage,) * 4),
        with_d_lse=True,
    )  # fmt: skip
