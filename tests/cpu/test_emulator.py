"""The kernels under the emulator (tests/emulator): every row of the Hopper tables, and one of each portable kernel.

What runs are the planner's configurations with the parameters that the launcher hands over, in random schedules.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuflash import configs, launch, plan
from cuflash.problem import Problem
from tests.emulator.device import Device, KernelError, Programs, compile_emulator, is_available
from tests.strategies import Case, Operands, make_operands, ml_dtypes
from tests.tolerance import Yardstick

pytestmark = pytest.mark.skipif(not is_available(), reason="needs g++ on Linux, x86-64")

Main = configs.ForwardWgmmaConfig | configs.ForwardMmaConfig | configs.BackwardWgmmaConfig | configs.BackwardMmaConfig

#: So few multiprocessors that each block works on several tiles, beside other blocks.
HOPPER = dataclasses.replace(plan.DeviceInfo.of_arch(90), num_sms=3)
DTYPES = {"f16": "float16", "f16_turing": "float16", "bf16": "bfloat16", "tf32x3": "float32"}
#: Lengths that no block divides, with query heads that share keys; a causal mask, on head dims that are padded; scores
#: that grow from block to block, queries that see nothing and keys that nobody sees; several query heads in one tile.
CASES: tuple[dict[str, Any], ...] = (
    {"num_heads": 4, "num_heads_kv": 2, "seqlen_q": 150, "seqlen_k": 300},
    {"batch": 2, "num_heads": 2, "num_heads_kv": 2, "seqlen_q": 260, "seqlen_k": 210, "is_causal": True},
    {"num_heads": 2, "seqlen_q": 250, "seqlen_k": 230, "window": (50, 20), "q_offset": -60, "spread": 4.0},
    {"num_heads": 6, "num_heads_kv": 2, "seqlen_q": 20, "seqlen_k": 290, "is_causal": True},
)


@dataclass(frozen=True)
class Run:
    """A call by one configuration: of the forward, or of the main kernel of the backward."""

    config: Main
    case: Case

    def __str__(self) -> str:
        return f"{self.config.name}-{self.case}"

    @property
    def is_forward(self) -> bool:
        return isinstance(self.config, configs.ForwardWgmmaConfig | configs.ForwardMmaConfig)

    @property
    def configs(self) -> tuple[configs.Config, ...]:
        """All that are launched."""
        config = self.config
        if self.is_forward:
            return (config,)
        gather = [configs.backward_gather_config(config)] if isinstance(config, configs.BackwardWgmmaConfig) else []
        return config, *configs.backward_companions(config), *gather

    @property
    def problem(self) -> Problem:
        c = self.case
        return Problem(
            c.dtype, c.batch, c.num_heads, c.num_heads_kv, c.seqlen_q, c.seqlen_k, c.head_dim, c.head_dim_v,
            c.softmax_scale, c.band, deterministic=getattr(self.config, "deterministic", False),
            vectorized=self.config.copy != "element",
        )  # fmt: skip


def mains() -> Iterator[Main]:
    for dims in configs.HEAD_DIM_PAIRS:
        yield from (config for config, _ in configs.forward_wgmma_configs("f16", *dims, True))
        yield configs.backward_wgmma_config("f16", *dims, False)
    for dims in ((64, 64), (128, 128), (256, 256)):
        yield configs.backward_wgmma_config("f16", *dims, True)
    for dims in ((64, 64), (192, 128)):
        yield configs.forward_wgmma_configs("f16", *dims, False)[0][0]
    if ml_dtypes is not None:
        yield configs.forward_wgmma_configs("bf16", 128, 128, True)[0][0]
        yield configs.backward_wgmma_config("bf16", 128, 128, False)
    for mma, arch in (("f16", 80), ("f16_turing", 75), ("tf32x3", 90)):
        yield configs.forward_mma_config(mma, arch, 64, 64, True)
        yield configs.backward_mma_config(mma, arch, 64, 64, True, mma == "tf32x3")


def runs() -> Iterator[Run]:
    for config in mains():
        for number, options in enumerate(CASES if isinstance(config, configs.ForwardWgmmaConfig) else CASES[:3]):
            padding = 0 if number != 1 else 7 if config.copy == "element" else 8
            dims = {"head_dim": config.head_dim - padding, "head_dim_v": config.head_dim_v - padding}
            yield Run(config, Case(DTYPES[config.mma], **dims, **options))


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return compile_emulator(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def programs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, objects: list[Path]
) -> Iterator[Programs]:
    """All programs that are going to run; they are compiled while the first ones run."""
    made = Programs(tmp_path_factory.mktemp("programs"), objects)
    pool = ThreadPoolExecutor(os.cpu_count())
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_call:
            for config in item.callspec.params["run"].configs:
                pool.submit(made.of, config)
    yield made
    pool.shutdown(cancel_futures=True)


def check(run: Run, device: Device, seeds: range) -> None:
    """Judge a call by the one tolerance rule, in several schedules."""
    case = run.case
    clean = make_operands(case)
    yardstick = Yardstick(clean.q, clean.k, clean.v, band=case.band, scale=case.softmax_scale)
    operands = make_operands(case, device.put)
    # What nobody sees must not matter, nor must, for the gradients, what sees nothing.
    visible = case.band.visible(np.arange(case.seqlen_q)[:, None], np.arange(case.seqlen_k)[None, :])
    for array in (operands.k, operands.v):
        array[:, :, ~visible.any(0)] = np.nan
    if run.is_forward:
        check_forward(run, device, seeds, operands, yardstick)
        return
    for array in (operands.q, operands.d_out):
        array[:, :, ~visible.any(1)] = np.nan
    check_backward(run, device, seeds, operands, yardstick, clean.d_out)


def strides_of(*arrays: np.ndarray) -> list[Any]:
    return [tuple(stride // array.itemsize for stride in array.strides[:3]) for array in arrays]


def check_forward(run: Run, device: Device, seeds: range, operands: Operands, yardstick: Yardstick) -> None:
    q, k, v, _ = operands
    out = device.put(np.full(yardstick.out.shape, np.nan, q.dtype))
    lse = device.put(np.full(yardstick.lse.shape, np.nan, np.float32))
    problem, config = run.problem, run.config
    if isinstance(config, configs.ForwardWgmmaConfig):
        packs = config.copy == "tma" and problem.seqlen_q * problem.group_size <= config.block_m
        chosen = plan.wgmma_plan(config, problem, HOPPER, problem.group_size if packs else 1)
    else:
        grid = configs.ceil_div(problem.seqlen_q, config.block_m) * problem.num_heads * problem.batch
        chosen = plan.Plan(config, grid)
    call = launch.ForwardCall(problem, 0, *strides_of(q, k, v, out), device_info=HOPPER, plan=chosen)
    found = set()
    for seed in seeds:
        out[...] = lse[...] = np.nan
        call(*map(device.address, (q, k, v, out, lse)), seed)
        found.add(out.tobytes() + lse.tobytes())
    yardstick.assert_forward(out, lse)
    assert len(found) == 1, "results depend on the schedule"


def check_backward(
    run: Run, device: Device, seeds: range, operands: Operands, yardstick: Yardstick, clean_d_out: np.ndarray
) -> None:
    q, k, v, d_out = operands
    out = device.put(yardstick.out.astype(q.dtype))
    lse = device.put(yardstick.lse.astype(np.float32))
    d_lse = device.put(np.random.default_rng(1).standard_normal(lse.shape, np.float32))
    gradients = [device.put(np.full(x.shape, np.nan, x.dtype)) for x in (q, k, v)]
    plans = plan.plans_around(run.config, run.problem, HOPPER)
    strides = strides_of(d_out, q, k, v, out, *gradients)
    call = launch.BackwardCall(run.problem, 0, *strides, device_info=HOPPER, plans=plans)
    workspace = device.put(np.full(call.workspace_bytes, 0xFF, np.uint8))
    found: list[list[bytes]] = []
    for seed in seeds:
        for gradient in gradients:
            gradient[...] = np.nan
        call(*map(device.address, (d_out, q, k, v, out, lse, d_lse, *gradients, workspace)), seed)
        bits = [gradient.tobytes() for gradient in gradients]
        if bits not in found:
            yardstick.assert_backward(clean_d_out, gradients, d_lse=d_lse)
        found.append(bits)
    # The order of sums is free for d_q, unless it was asked for.
    fixed = [bits[0 if run.problem.deterministic else 1 :] for bits in found]
    assert all(bits == fixed[0] for bits in fixed), "gradients depend on the schedule"


def tail_in_parts(
    problem: Problem, config: configs.BackwardWgmmaConfig, num_tiles: int, _num_sms: int
) -> plan.TileParts:
    """Two tiles in parts, one of which reaches into both: lengths that the planner divides are too long for here."""
    if not problem.band.is_open:
        return plan.TileParts(num_tiles)
    steps = configs.ceil_div(problem.seqlen_q, config.block_m) * problem.group_size
    return plan.TileParts(num_tiles - 2, steps, 2 * steps, steps // 2 + 1)


@pytest.mark.parametrize("run", list(runs()), ids=str)
def test_call(run: Run, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    monkeypatch.setattr(plan, "_backward_tail", tail_in_parts)
    # The portable kernels leave less to chance: their threads do everything themselves.
    check(run, device, range(3 if run.config.arch_specific else 1))


@dataclass(frozen=True)
class Bug:
    """Something wrong in a kernel, and what the emulator says of it."""

    name: str
    config: Main
    header: str
    old: str
    new: str
    found: str


FORWARD, BY_ELEMENT = (configs.forward_wgmma_configs("f16", 64, 64, aligned)[-2][0] for aligned in (True, False))
BACKWARD, IN_TURN = (configs.backward_wgmma_config("f16", 64, 64, in_turn) for in_turn in (False, True))
WAIT, PIN, RELEASE = (
    f"            {line};\n" for line in ("warpgroup_wait<1>()", "warpgroup_pin(s[0])", "release_k(ring)")
)
OVERWRITTEN = "yet to read|written while a product on them was in flight"

BUGS = (
    Bug("a wait is left out", FORWARD, "forward_wgmma.cuh", WAIT + PIN + RELEASE, PIN + RELEASE, OVERWRITTEN),
    Bug("a place is released early", FORWARD, "forward_wgmma.cuh", WAIT + PIN + RELEASE, RELEASE + WAIT + PIN,
        OVERWRITTEN),
    Bug("values of another place", FORWARD, "forward_wgmma.cuh", "(ring + -1).stage() * TileV", "ring.stage() * TileV",
        f"{OVERWRITTEN}|copy is on its way"),
    Bug("too few bytes are announced", FORWARD, "forward_wgmma.cuh", "(barrier, Tile::kBytes)",
        "(barrier, Tile::kBytes - 128)", "128 more than announced"),
    Bug("too many bytes are announced", FORWARD, "forward_wgmma.cuh", "(barrier, Tile::kBytes)",
        "(barrier, Tile::kBytes + 128)", "(?s)deadlock.* arrivals and 128 bytes"),
    Bug("a fence is left out", BY_ELEMENT, "forward_wgmma.cuh", "row_bytes, thread);\n                proxy_fence();",
        "row_bytes, thread);", "without a proxy_fence since"),
    Bug("dS of others is not awaited", BACKWARD, "backward_wgmma.cuh", "if (!first) steps.await_ds(at + -1);", "",
        f"{OVERWRITTEN}|without a proxy_fence since"),
    Bug("a turn is not passed on", IN_TURN, "attention/backward_steps.cuh",
        "store_release(semaphore, turn_here + 1);", "", "(?s)deadlock.* wait for semaphore"),
    Bug("Q is released before its last product", BACKWARD, "backward_wgmma.cuh",
        "if (!last) release(steps.empty(at));", "release(steps.empty(at));", OVERWRITTEN),
)  # fmt: skip


@pytest.mark.parametrize("config", [BACKWARD, IN_TURN], ids=lambda config: config.name)
def test_keys_that_nobody_sees(
    config: Main, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles without work follow each other so fast that one is claimed while an earlier one is still stored."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    case = Case(batch=3, num_heads=2, seqlen_q=100, seqlen_k=1200, is_causal=True, q_offset=0)
    check(Run(config, case), device, range(6))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_found(bug: Bug, objects: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are right do not show what the emulator would say of others."""
    device = Device(tmp_path, Programs(tmp_path, objects, [(bug.header, bug.old, bug.new)]))
    device.install(monkeypatch)
    case = Case(num_heads=2, num_heads_kv=1, seqlen_q=300, seqlen_k=400)
    with pytest.raises(KernelError, match=bug.found):
        check(Run(bug.config, case), device, range(8))
