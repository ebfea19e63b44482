"""Plans: what is chosen for typical problems, written down, and what holds for every choice."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cuflash import configs, launch
from cuflash import plan as planning
from cuflash.plan import DeviceInfo, Plan, plan_backward, plan_forward
from cuflash.problem import Features, Problem
from cuflash.scores import Band, make_band
from tests.strategies import head_dims, lengths

SNAPSHOT = Path(__file__).with_name("plans.txt")

# Small enough to read, wide enough that a changed table or rule shows.
PROBLEMS = {
    f"{dtype} d{head_dim}" + (f" dv{head_dim_v}" if head_dim_v != head_dim else ""): Problem(
        dtype, 4, 16, 4, 2048, 2048, head_dim, head_dim_v, head_dim**-0.5
    )
    for dtype, dims in {
        "float16": ((64, 64), (128, 128), (192, 128), (256, 256), (40, 40)),
        "bfloat16": ((128, 128),),
        "float32": ((64, 64), (128, 128)),
        "float64": ((64, 64),),
    }.items()
    for head_dim, head_dim_v in dims
}
PROBLEMS["float16 d64 one query"] = replace(PROBLEMS["float16 d64"], seqlen_q=1)
PROBLEMS["float16 d64 unaligned"] = replace(PROBLEMS["float16 d64"], vectorized=False)
PROBLEMS["float16 d64 deterministic"] = replace(PROBLEMS["float16 d64"], deterministic=True)
PROBLEMS["float32 d64 tf32"] = replace(PROBLEMS["float32 d64"], precision="tf32")
FEATURES = {
    "softcap": Features(softcap=2.0),
    "mask": Features(mask=(False, False, True, True)),
    "blocks": Features(mask=(False, True, True, True), mask_block=(128, 128, 0)),
    "everything": Features(2.0, (True, False, True, True), "float32", "float32", 0, "float32", 0.1),
}
for name, features in FEATURES.items():
    PROBLEMS[f"float16 d64 {name}"] = replace(PROBLEMS["float16 d64"], features=features)


def supported(problem: Problem, arch: int) -> bool:
    """Tell whether the architecture computes the problem at all; `arguments.check_device` refuses the others."""
    return not (problem.dtype == "bfloat16" and arch < 80)


def all_plans(problem: Problem, device: DeviceInfo) -> tuple[Plan, ...]:
    plans = plan_forward(problem, device), *plan_backward(problem, device)
    return tuple(step for plan in plans for step in (plan.before, plan) if step is not None)


def snapshot() -> str:
    """One line per launch."""
    lines = []
    for arch in configs.ARCHS:
        device = DeviceInfo.of_arch(arch)
        for name, problem in PROBLEMS.items():
            if not supported(problem, arch):
                continue
            lines.append(f"sm_{arch} {name}")
            lines += [
                f"    {plan.config.name}: {plan.grid} x {plan.block}, smem {plan.smem_bytes}, "
                f"workspace {plan.workspace_bytes}{f', made {plan.made_bytes}' if plan.made_bytes else ''}"
                for plan in all_plans(problem, device)
            ]
    return "\n".join(lines) + "\n"


def test_choices_are_those_written_down() -> None:
    assert snapshot() == SNAPSHOT.read_text(), "if this is meant, python -m tests.cpu.test_plan writes them down anew"


@pytest.mark.parametrize("arch", configs.ARCHS)
def test_described_devices(arch: int) -> None:
    device = DeviceInfo.of_arch(arch)
    assert device.arch == arch
    assert device.num_sms > 0
    assert 48 * 1024 < device.smem_per_block <= device.smem_per_sm


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any problem that the arguments may describe."""
    dtype = draw(st.sampled_from(("float16", "bfloat16", "float32", "float64")))
    num_heads_kv = draw(st.integers(0, 4))
    seqlen_q, seqlen_k = draw(lengths(5000)), draw(lengths(5000))
    head_dim = draw(head_dims())
    band = make_band(draw(st.booleans()), None, draw(st.integers(-9999, 9999)), seqlen_q, seqlen_k)
    return Problem(
        dtype, draw(st.integers(0, 100_000)), num_heads_kv * draw(st.integers(1, 8)), num_heads_kv, seqlen_q, seqlen_k,
        head_dim, draw(st.one_of(st.just(head_dim), head_dims())), 1.0, draw(st.sampled_from((Band(), band))),
        precision=draw(st.sampled_from(("ieee", "tf32"))) if dtype == "float32" else "ieee",
        deterministic=draw(st.booleans()), vectorized=draw(st.booleans()), mappable=draw(st.booleans()),
        features=draw(st.sampled_from((Features(), *FEATURES.values()))),
    )  # fmt: skip


@given(problem=problems(), arch=st.sampled_from(configs.ARCHS))
def test_every_problem_has_plans_that_fit(problem: Problem, arch: int) -> None:
    if not supported(problem, arch):
        return
    device = DeviceInfo.of_arch(arch)
    for plan in all_plans(problem, device):
        assert plan.smem_bytes <= device.smem_per_block
        assert plan.block <= 1024
        assert 0 <= plan.grid < 2**31
        assert configs.feasible(plan.config, arch)
        assert plan.config.name in str(plan)
    forward = plan_forward(problem, device)
    assert (forward.made_bytes > 0) == (forward.before is not None and forward.before.grid > 0)
    assert forward.before is None or problem.features.mask is not None


@example(problem=Problem("float16", 0, 3, 1, 257, 1, 32, 32, 1.0), arch=90)
@example(problem=Problem("float16", 0, 3, 1, 1, 0, 32, 32, 1.0, features=FEATURES["mask"]), arch=90)
@given(problem=problems(), arch=st.sampled_from(configs.ARCHS))
def test_choice_does_not_depend_on_the_batch(problem: Problem, arch: int) -> None:
    """A sequence gets the same bits alone and in company."""
    if not supported(problem, arch):
        return
    device = DeviceInfo.of_arch(arch)
    # Which tiles of the backward are cut into parts is the exception, and with it whether there are any to sum up.
    company, alone = (
        [plan for plan in all_plans(p, device) if not isinstance(plan.config, configs.BackwardGatherConfig)]
        for p in (problem, replace(problem, batch=1))
    )
    for plan, other in zip(company, alone, strict=True):
        assert plan.config.rounding == other.config.rounding


@pytest.mark.parametrize("arch", configs.ARCHS)
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_bias_that_is_broadcast_has_a_launch_in_a_fixed_order(dtype: str, arch: int) -> None:
    """As many blocks as there are tiles of its gradient; none where the main kernel adds to each element once."""
    features = Features(bias="float16")
    problem = Problem(dtype, 3, 4, 2, 200, 300, 64, 64, 1.0, features=features, deterministic=True)
    device = DeviceInfo.of_arch(arch)
    main = plan_backward(problem, device)[1]

    def grid(strides: tuple[int, ...], **changes: object) -> int | None:
        plan = planning.plan_bias(main, replace(problem, **changes), device, strides)
        return None if plan is None else plan.grid

    one = planning.plan_bias(main, problem, device, (0, 0, 0, 0))
    assert one is not None
    assert one.grid == 1
    m_blocks, n_blocks = -(-200 // one.config.block_m), -(-300 // one.config.block_n)
    assert grid((9, 9, 9, 9)) is None
    assert grid((0, 0, 300, 1)) == m_blocks * n_blocks
    assert grid((0, 9, 300, 1)) == 4 * m_blocks * n_blocks
    assert grid((9, 0, 300, 1)) == 3 * m_blocks * n_blocks
    assert grid((9, 9, 0, 1)) == 12 * n_blocks
    assert grid((9, 9, 1, 0)) == 12 * m_blocks
    assert grid((0, 0, 300, 1), deterministic=False) is None
    assert grid((0, 9, 300, 1), batch=1) is None
    assert grid((0, 9, 0, 1), batch=1, seqlen_q=1) is None


@given(problem=problems(), arch=st.sampled_from(configs.ARCHS))
def test_tables_list_every_choice(problem: Problem, arch: int) -> None:
    """`all_configs` is what the tests compile, so nothing may be planned that it leaves out."""
    listed = set(configs.all_configs(arch))
    if supported(problem, arch) and problem.features == Features():
        for plan in all_plans(problem, DeviceInfo.of_arch(arch)):
            assert plan.config in listed


@pytest.mark.parametrize("arch", configs.ARCHS)
def test_a_kernel_family_can_be_asked_for(arch: int) -> None:
    device, problem = DeviceInfo.of_arch(arch), PROBLEMS["float16 d64"]
    for plan in (plan_forward(problem, device, "simt"), *plan_backward(problem, device, "simt")):
        assert plan.config.is_simt
    assert plan_forward(problem, device, "mma").kernel == "forward_mma"
    assert plan_backward(problem, device, "mma")[1].kernel == "backward_mma"
    if arch == 90:
        assert plan_forward(problem, device, "wgmma") == plan_forward(problem, device)
        assert plan_forward(problem, device).kernel == "forward_wgmma"
        assert plan_backward(problem, device, "wgmma") == plan_backward(problem, device)
        assert plan_backward(problem, device)[1].kernel == "backward_wgmma"
        # Strides that no TMA descriptor holds are left to the portable kernels; in the backward unaligned rows, too.
        beyond = replace(problem, mappable=False), replace(problem, vectorized=False)
        assert plan_forward(beyond[0], device).kernel == "forward_mma"
        assert all(plan_backward(other, device)[1].kernel == "backward_mma" for other in beyond)
        for other, why in zip(beyond, ("strides that no TMA descriptor", "rows that do not start"), strict=True):
            with pytest.raises(ValueError, match=f"CUFLASH_KERNEL: got wgmma for float16 on {why}"):
                plan_backward(other, device, "wgmma")
    else:
        assert plan_forward(problem, device, "mma") == plan_forward(problem, device)
        assert plan_backward(problem, device, "mma") == plan_backward(problem, device)
        for plan_any in (plan_forward, plan_backward):
            with pytest.raises(ValueError, match=f"CUFLASH_KERNEL: got wgmma for float16 on sm_{arch}"):
                plan_any(problem, device, "wgmma")
    for other in (PROBLEMS["float64 d64"], replace(problem, head_dim=257), replace(problem, head_dim_v=257)):
        assert plan_forward(other, device).config.is_simt
        for plan_any in (plan_forward, plan_backward):
            with pytest.raises(ValueError, match="CUFLASH_KERNEL: got mma for float"):
                plan_any(other, device, "mma")


@pytest.mark.parametrize(
    ("changes", "arch", "why"),
    [
        ({"head_dim": 257}, 90, "head_dim 257, beyond 256,"),
        ({"dtype": "float32"}, 75, "float32 here"),
    ],
)
def test_slow_plans_warn(changes: dict[str, object], arch: int, why: str) -> None:
    problem = replace(PROBLEMS["float16 d64"], **changes)
    with pytest.warns(UserWarning, match=f"{why} is computed without tensor cores"):
        launch._announce(problem, plan_backward(problem, DeviceInfo.of_arch(arch)))


@pytest.mark.parametrize("name", ["float16 d64", "float64 d64"])
def test_plans_as_fast_as_expected_do_not_warn(name: str, recwarn: pytest.WarningsRecorder) -> None:
    launch._announce(PROBLEMS[name], (plan_forward(PROBLEMS[name], DeviceInfo.of_arch(90)),))
    assert not recwarn.list


def test_planning_needs_no_gpu_library() -> None:
    code = (
        "import sys; from cuflash.plan import *; from cuflash.problem import Problem; "
        "p = Problem('float16', 1, 1, 1, 64, 64, 64, 64, 1.0); d = DeviceInfo.of_arch(80); "
        "plan_forward(p, d); plan_backward(p, d); print('cupy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@given(lengths(5000), lengths(5000), st.integers(1, 40), st.sampled_from((1, 3, 8)), st.sampled_from((64, 128, 256)))
def test_last_tiles_end_together(seqlen_q: int, seqlen_k: int, heads: int, group: int, dim: int) -> None:
    """In parts, the tiles that are left over take no more than what all blocks together do in that time."""
    device = DeviceInfo.of_arch(90)
    problem = Problem("float16", 2, heads * group, heads, seqlen_q, seqlen_k, dim, dim, 1.0)
    _, main, *others = plan_backward(problem, device)
    assert main.order is not None
    assert main.tail is not None
    order, tail = main.order, main.tail
    in_parts = order.num_tiles - tail.first_tile
    assert tail.num_steps == in_parts * tail.tile_steps * bool(in_parts)
    if in_parts:
        assert tail.first_tile % device.num_sms == 0
        assert in_parts < device.num_sms == main.grid
        assert tail.part_steps * device.num_sms >= tail.num_steps
        assert tail.part_steps < tail.tile_steps
        # Tiles take as many places as parts reach into each.
        places = sum(
            ((n + 1) * tail.tile_steps - 1) // tail.part_steps - n * tail.tile_steps // tail.part_steps + 1
            for n in range(in_parts)
        )
        assert places <= tail.places
        # The last part of the last tile has the last place.
        assert (tail.num_steps - 1) // tail.part_steps + in_parts == tail.places
        gather = others[0].config
        assert isinstance(gather, configs.BackwardGatherConfig)
        assert others[0].grid == in_parts * gather.main_warps
        assert main.workspace_bytes >= tail.places * gather.place_elems * 4
    for other in (
        replace(problem, deterministic=True),
        replace(problem, band=make_band(True, None, None, seqlen_q, seqlen_k)),
    ):
        tail = plan_backward(other, device)[1].tail
        assert tail is not None
        assert tail.num_steps == 0


@example(seqlen_q=1000, seqlen_k=1000, heads=30, group=2, batch=30, is_causal=False, deterministic=False, dim=64)
@example(seqlen_q=4096, seqlen_k=4096, heads=16, group=1, batch=4, is_causal=True, deterministic=True, dim=128)
@example(seqlen_q=0, seqlen_k=1, heads=16, group=1, batch=16, is_causal=False, deterministic=False, dim=64)
@example(seqlen_q=5, seqlen_k=0, heads=2, group=1, batch=2, is_causal=False, deterministic=False, dim=64)
@given(
    seqlen_q=lengths(5000), seqlen_k=lengths(5000), heads=st.integers(1, 40), group=st.sampled_from((1, 3)),
    batch=st.integers(1, 30), is_causal=st.booleans(), deterministic=st.booleans(), dim=st.sampled_from((64, 128, 256)),
)  # fmt: skip
def test_all_of_the_workspace_is_emptied_once_and_in_time(
    seqlen_q: int, seqlen_k: int, heads: int, group: int, batch: int, is_causal: bool, deterministic: bool, dim: int
) -> None:
    """By the first launch, or by whole tiles of keys that every block has left behind when it comes there."""
    device = DeviceInfo.of_arch(90)
    band = make_band(is_causal, None, None, seqlen_q, seqlen_k)
    problem = Problem(
        "float16", batch, heads * group, heads, seqlen_q, seqlen_k, dim, dim, 0.1, band, deterministic=deterministic
    )
    preprocess, main, *_ = plan_backward(problem, device)
    order, tail, ahead, workspace = main.order, main.tail, main.sections_ahead, main.workspace
    assert order is not None
    assert tail is not None
    assert workspace is not None
    assert workspace.num_counters == 1 + order.num_sections
    # Each thread of the first launch sets one counter to 0; without queries there is no launch.
    assert workspace.num_counters <= preprocess.grid * preprocess.block or seqlen_q == 0
    per_head = preprocess.grid // (batch * heads)
    emptied = np.zeros(preprocess.grid, int)
    emptied[: workspace.num_emptied] += 1
    per_section = order.section * order.num_blocks
    for section in range(order.num_sections - ahead):
        tiles = np.arange(section * per_section, (section + 1) * per_section)
        assert tiles[-1] < tail.first_tile
        first_head = (section + ahead) * order.section
        target = emptied[first_head * per_head : min(first_head + order.section, batch * heads) * per_head]
        for share in range(per_section):
            target[share::per_section] += 1
    assert (emptied == 1).all()
    assert ahead == order.num_sections or ahead * per_section >= planning._WAVES_AHEAD * main.grid


@given(
    seqlen_q=st.integers(1, 3000), seqlen_k=st.integers(1, 3000), heads=st.integers(1, 40), batch=st.integers(1, 9),
    is_causal=st.booleans(), window=st.one_of(st.none(), st.tuples(st.integers(0, 500), st.integers(0, 500))),
    dim=st.sampled_from((64, 128, 256)),
)  # fmt: skip
def test_blocks_get_equal_work(
    seqlen_q: int, seqlen_k: int, heads: int, batch: int, is_causal: bool, window: tuple[int, int] | None, dim: int
) -> None:
    """The chosen order is not far worse than an ideal one, wherever there are enough tiles for that."""
    band = make_band(is_causal, window, None, seqlen_q, seqlen_k)
    problem = Problem("float16", batch, heads, heads, seqlen_q, seqlen_k, dim, dim, 0.1, band)
    plan = plan_forward(problem, DeviceInfo.of_arch(90))
    assert plan.order is not None
    config, order = plan.config, plan.order
    assert isinstance(config, configs.ForwardWgmmaConfig)
    assert order.num_tiles == order.num_blocks * order.num_heads * batch
    ranges = [
        band.key_range(m_block * config.block_m, min((m_block + 1) * config.block_m, seqlen_q), seqlen_k)
        for m_block in range(order.num_blocks)
    ]
    blocks = planning._blocks(ranges, config.block_n)
    for visited, (first, end) in zip(blocks, ranges, strict=True):
        assert visited == (-(-end // config.block_n) - first // config.block_n if first < end else 0)
    work = blocks + planning._TILE_COST
    makespan = planning._makespan(work, batch * heads, order.section, plan.grid)
    ideal = work.sum() * batch * heads / plan.grid
    assert makespan <= 1.1 * ideal + 2 * work.max()


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
