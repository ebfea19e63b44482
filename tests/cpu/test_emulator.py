"""The kernels under the emulator (tests/emulator): every row of the Hopper tables, and one of each portable kernel.

What runs are the planner's configurations with the parameters that the launcher hands over, in random schedules.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import arguments, configs, launch, plan, reference
from cuflash.arguments import Options
from cuflash.arrays import ArrayView, NumPyArrays, sum_to
from cuflash.problem import Problem
from cuflash.score_mods import ScoreMod
from cuflash.scores import Extras, Score
from tests.cpu.expressions import bound_of
from tests.emulator.device import Device, KernelError, Programs, compile_emulator, is_available
from tests.strategies import EXPRESSIONS, Case, Operands, make_mod, make_operands, ml_dtypes, numpy_dtype
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
    if not problem.band.is_open or config.score.alibi or config.listed:
        return plan.TileParts(num_tiles)
    steps = configs.ceil_div(problem.seqlen_q, config.block_m) * problem.group_size
    return plan.TileParts(num_tiles - 2, steps, 2 * steps, steps // 2 + 1)


def plan_in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails in parts, and a section for each head, which empties the workspace of the next one."""
    monkeypatch.setattr(plan, "_backward_tail", tail_in_parts)
    monkeypatch.setattr(plan, "_SECTION_BYTES", 1)
    monkeypatch.setattr(plan, "_SECTION_BYTES_IN_ORDER", 1)
    monkeypatch.setattr(plan, "_sections_ahead", lambda order, _grid: min(1, order.num_sections))


@pytest.mark.parametrize("run", list(runs()), ids=str)
def test_call(run: Run, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    plan_in_small(monkeypatch)
    # The portable kernels leave less to chance: their threads do everything themselves.
    check(run, device, range(3 if run.config.arch_specific else 1))


#: What calls do to their scores: names of the arrays of ``Extras``, softcap and dropout.
SCORES = {
    "softcap and dropout": (),
    "softcap and dropout in a fixed order": (),
    "bias, slopes and sinks": ("bias", "alibi_slopes", "sinks"),
    "mask": ("mask",),
    "expression": ("expression",),
    "everything": ("curve", "mask", "bias", "alibi_slopes", "sinks"),
}
SCORE_RUNS = [
    *(("float16", arch, name) for arch in (80, 90) for name in SCORES),
    ("float16", 75, "everything"),
    ("float32", 90, "everything"),
]


def block_mask(draw: np.random.Generator, case: Case) -> np.ndarray:
    """A mask that hides some tiles wholly, shows some wholly, and leaves queries without any key."""
    mask = draw.random((case.batch, 1, case.seqlen_q, case.seqlen_k)) < 0.7
    mask[0, :, :, :64] = True
    mask[0, :, :16, 64:] = False
    mask[1, :, :, 64:] = False
    mask[1, :, 32:] = False
    return mask


def make_extras(case: Case, names: tuple[str, ...], put: Callable[[np.ndarray], np.ndarray]) -> Extras:
    """Extras that are broadcast over an axis each, in the dtypes that kernels take."""
    draw = np.random.default_rng(5)
    lengths = case.num_heads, case.seqlen_q, case.seqlen_k
    made = Extras(
        block_mask(draw, case),
        draw.standard_normal((*lengths[:2], 1)).astype(np.float16),
        draw.random((case.batch, case.num_heads), np.float32) / 4,
        draw.standard_normal(case.num_heads).astype(np.float32),
    )
    return Extras(*(put(x) if name in names else None for name, x in zip(Extras._fields, made, strict=True)))


@pytest.mark.parametrize(("dtype", "arch", "name"), SCORE_RUNS)
def test_scores(
    dtype: str, arch: int, name: str, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels with what is done to scores and weights, forward and backward.

    With slopes the first 16 keys are cut off, without them tiles of keys are in parts: either excludes the other.
    """
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    plan_in_small(monkeypatch)
    case = Case(
        dtype, batch=2, num_heads=4, num_heads_kv=2, seqlen_q=45, seqlen_k=77, head_dim=24, head_dim_v=32,
        window=(16, 3) if "alibi_slopes" in SCORES[name] else None,
    )  # fmt: skip
    softened = "softcap" in name or name == "everything"
    options = Options(
        window=case.window, softcap=2.0 if softened else None, dropout_p=0.25 if softened else 0.0,
        deterministic="order" in name,
    )  # fmt: skip
    mods = [make_mod(mod, case, device.put) for mod in SCORES[name] if mod in EXPRESSIONS]
    check_scores(case, arch, options, make_extras(case, SCORES[name], device.put), device, *mods)


#: Whether a bias loaded by tiles differs among batch entries and heads, its dtype, keys that nobody sees, head_dim.
BIASES = [
    (True, True, "float16", 0, 64),
    (False, True, "bfloat16", 0, 64),
    (True, False, "float16", 24, 32),  # keys that are cut off: a multiple of 16 bytes
    (False, False, "float16", 21, 64),  # and not, where nothing is loaded by tiles
    (False, True, "float16", 0, 128),
]


@pytest.mark.parametrize(("by_batch", "by_head", "dtype", "unseen", "head_dim"), BIASES)
def test_bias_tiles(
    by_batch: bool, by_head: bool, dtype: str, unseen: int, head_dim: int, programs: Programs, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The forward on Hopper loads tiles of a bias with several blocks of queries and of keys, none of them whole."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    plan_in_small(monkeypatch)
    case = Case(
        "float16", batch=2, num_heads=2, num_heads_kv=1, seqlen_q=203, seqlen_k=293, head_dim=head_dim,
        head_dim_v=head_dim, window=(90 - unseen, 300) if unseen else None, is_causal=unseen == 24,
    )  # fmt: skip
    draw = np.random.default_rng(7)
    shape = case.batch if by_batch else 1, case.num_heads if by_head else 1, case.seqlen_q, case.seqlen_k
    room = device.put(np.zeros((*shape[:3], 296), numpy_dtype(dtype)))  # rows begin on 16 bytes
    bias = room[..., : case.seqlen_k]
    bias[...] = 4 * draw.standard_normal(shape)
    first, _ = case.band.key_range(0, case.seqlen_q, case.seqlen_k)
    assert first == unseen
    chosen: list[configs.Config] = []
    prepare = launch.ForwardCall.__init__

    def note(self: launch.ForwardCall, *arguments: Any, **options: Any) -> None:
        prepare(self, *arguments, **options)
        chosen.append(self.plan.config)

    monkeypatch.setattr(launch.ForwardCall, "__init__", note)
    options = Options(window=case.window, is_causal=case.is_causal)
    check_scores(case, HOPPER, options, Extras(None, bias, None, None), device)
    assert [config.bias_stages > 0 for config in chosen] == [unseen != 21]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("seed", range(8))
def test_masks(seed: int, arch: int, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are hidden and tiles that are shown, with grouped heads and bands, in lists of any length."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    draw = np.random.default_rng(seed)
    group = int(draw.integers(1, 4))
    window = None if draw.random() < 0.5 else (int(draw.integers(0, 150)), int(draw.integers(0, 80)))
    case = Case(
        "float16", batch=2, num_heads=2 * group, num_heads_kv=2, seqlen_q=int(draw.integers(1, 280)),
        seqlen_k=int(draw.integers(1, 280)), head_dim=64, head_dim_v=64, window=window, seed=seed,
    )  # fmt: skip
    batch, heads = (size if draw.random() < 0.5 else 1 for size in (case.batch, case.num_heads))
    mask = draw.random((batch, heads, case.seqlen_q, case.seqlen_k)) < 0.8
    tiles = draw.integers(0, 3, (batch, heads, *(-(-n // 64) for n in mask.shape[2:])))
    tiles = tiles.repeat(64, -1).repeat(64, -2)[:, :, : case.seqlen_q, : case.seqlen_k]
    extras = Extras(device.put(np.broadcast_to((mask & (tiles > 0)) | (tiles > 1), mask.shape)), None, None, None)
    check_scores(case, arch, Options(window=window), extras, device)


#: Sizes of blocks that tiles divide, and that they do not; a band that cuts off keys, whole blocks of them and parts.
BLOCKS: tuple[tuple[tuple[int, int], dict[str, Any]], ...] = (
    ((128, 128), {}),
    ((128, 128), {"deterministic": True}),
    ((128, 128), {"window": (72, 50)}),
    ((128, 128), {"window": (90, 50)}),
    ((48, 40), {"window": (90, None)}),
    ((1, 100), {}),
    ((256, 1), {"window": (50, 10)}),
    ((1000, 64), {"window": (3, 70)}),
)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("block", "options"), BLOCKS, ids=str)
def test_masks_by_blocks(
    block: tuple[int, int], options: dict[str, Any], arch: int, programs: Programs, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Elements of a mask that stand for many pairs, with bits and without."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    case = Case(
        "float16", batch=2, num_heads=4, num_heads_kv=2, seqlen_q=100, seqlen_k=300, head_dim=64, head_dim_v=64,
        window=options.get("window"),
    )  # fmt: skip
    lengths = (configs.ceil_div(length, size) for length, size in zip((100, 300), block, strict=True))
    blocks = np.random.default_rng(3).random((2, 4, *lengths)) < 0.6
    extras = Extras(device.put(blocks[:, :, :: -1 if block == (48, 40) else 1]), None, None, None)
    check_scores(case, arch, Options(**options), extras, device, block=block)


@pytest.mark.parametrize("arch", [80, 90])
def test_derivatives_of_hidden_pairs(
    arch: int, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an expression hides a pair, its derivatives count for nothing, whatever they are."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    case = Case("float16", num_heads=2, num_heads_kv=1, seqlen_q=45, seqlen_k=77, head_dim=32, head_dim_v=32)
    mod = cuflash.score_mod(
        "score * gate[h] if k_idx % 3 else log(gate[h] * 0 + 0 * score)",
        gate=device.put(np.array([0.5, 1.5], np.float32)),
    )
    check_scores(case, arch, Options(), Extras(), device, mod)


@pytest.mark.parametrize("q_offset", [-250, -1000])
@pytest.mark.parametrize("names", [("alibi_slopes",), ("bias", "alibi_slopes")], ids="+".join)
def test_slopes_begin_with_the_nearest_keys(
    q_offset: int, names: tuple[str, ...], programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward on Hopper turns the order of keys, with several tiles of queries and one head of falling scores."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    plan_in_small(monkeypatch)
    case = Case("float16", batch=2, num_heads=2, num_heads_kv=2, seqlen_q=400, seqlen_k=500, head_dim=32, head_dim_v=32)
    extras = make_extras(case, names, device.put)
    extras.alibi_slopes[:, 1] *= -0.1
    check_scores(case, 90, Options(q_offset=q_offset), extras, device)


#: Axes that a bias has, of (batch, heads, queries, keys).
BROADCASTS = ("hqk", "bqk", "qk", "bhk", "k", "bhq", "hq", "bh", "b", "")
BIAS_RUNS = [
    *(
        (*path, (85, 147), axes, ("bias",))
        for path in (("float16", 80, "auto"), ("float64", 80, "auto"))
        for axes in BROADCASTS
    ),
    *(("float16", 80, "auto", lengths, axes, ("bias",)) for lengths, axes in (((1, 147), "hk"), ((85, 1), "q"))),
    *(
        (*path, (85, 147), axes, ("bias", "mask", "alibi_slopes", "sinks", "curve"))
        for path in (("float16", 90, "auto"), ("float32", 80, "auto"), ("float16", 75, "simt"))
        for axes in ("qk", "bk", "h")
    ),
]


@pytest.mark.filterwarnings("ignore:.*without tensor cores")
@pytest.mark.parametrize(("dtype", "arch", "family", "lengths", "axes", "names"), BIAS_RUNS)
def test_bias_in_a_fixed_order(
    dtype: str, arch: int, family: str, lengths: tuple[int, int], axes: str, names: tuple[str, ...],
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What a bias is broadcast over is summed up by a kernel of its own."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    monkeypatch.setenv("CUFLASH_KERNEL", family)
    everything = len(names) > 1
    case = Case(
        dtype, batch=2, num_heads=4, num_heads_kv=2, seqlen_q=lengths[0], seqlen_k=lengths[1], head_dim=24,
        head_dim_v=32 if everything else 29, window=(50, 9),
    )  # fmt: skip
    sizes = zip("bhqk", (case.batch, case.num_heads, *lengths), strict=True)
    bias = np.random.default_rng(3).standard_normal([size if axis in axes else 1 for axis, size in sizes])
    extras = make_extras(case, names, device.put)._replace(bias=device.put(bias.astype(dtype)))
    options = Options(
        window=case.window, deterministic=True, softcap=2.0 if everything else None,
        dropout_p=0.25 if everything else 0.0,
    )  # fmt: skip
    mods = [make_mod(mod, case, device.put) for mod in names if mod in EXPRESSIONS]
    check_scores(case, arch, options, extras, device, *mods, backward_alone=True)


def view(array: np.ndarray, name: str) -> ArrayView:
    """An array as one on a GPU."""
    return dataclasses.replace(NumPyArrays().view(array, name), device=0)


def views_of(extras: Extras, block: tuple[int, int]) -> Extras:
    """The extras as on a GPU, the mask by blocks."""
    views = extras.map(view, Extras._fields)
    return views if views.mask is None else views._replace(mask=dataclasses.replace(views.mask, block=block))


def look_at_mask(make: launch.MaskCall | None, device: Device, mask: int) -> int:
    """Where what a launch reads of a mask is, all of it written: the rest of the memory is full of ones."""
    if make is None:
        return 0
    made = device.address(device.put(np.full(make.num_bytes, 0xFF, np.uint8)))
    make(mask, made, 1)
    return made


def check_scores(
    case: Case,
    gpu: int | plan.DeviceInfo,
    options: Options,
    extras: Extras,
    device: Device,
    mod: ScoreMod | None = None,
    block: tuple[int, int] = (1, 1),
    *,
    backward_alone: bool = False,
) -> None:
    """Judge out, LSE and all gradients of a call with that done to its scores; the mask is one by blocks."""
    arrays = {} if mod is None else mod.arrays
    if mod is not None:
        options = options._replace(score_mod=mod.option)
    clean = make_operands(case)
    q_offset = case.seqlen_k - case.seqlen_q if options.q_offset is None else options.q_offset
    score = Score(options.softcap, extras.bias, extras.mask, extras.alibi_slopes, q_offset, extras.sinks,
                  options.dropout_p, 1 << 40, 3, None if mod is None else bound_of(mod), block)  # fmt: skip
    yardstick = Yardstick(clean.q, clean.k, clean.v, band=case.band, scale=case.softmax_scale, score=score)

    q, k, v, d_out = make_operands(case, device.put)
    info = plan.DeviceInfo.of_arch(gpu) if isinstance(gpu, int) else gpu
    views = [view(x, letter) for x, letter in zip((q, k, v), "qkv", strict=True)]
    extra_views = views_of(extras, block)
    captured = [view(x, name) for name, x in arrays.items()]
    call = arguments.forward(*views, None, options, extra_views, captured)
    pointers = tuple(0 if x is None else device.address(x) for x in extras)
    seed = device.put(np.array([score.seed], np.uint64))
    of_seed = (0, device.address(seed)) if extras.mask is None else (score.seed, 0)
    of_score = pointers, *of_seed, score.first_batch, tuple(map(device.address, arrays.values()))
    out = device.put(np.full(yardstick.out.shape, np.nan, q.dtype))
    number = np.dtype(call.problem.lse_dtype)
    lse = device.put(np.full(yardstick.lse.shape, np.nan, number))
    strides = {"extras": call.extras, "itemsizes": call.itemsizes, "captured": call.captured}
    if not backward_alone:
        run = launch.ForwardCall(call.problem, 0, *call.strides, device_info=info, **strides)
        made = look_at_mask(run.mask_call, device, pointers[0])
        run(*map(device.address, (q, k, v, out, lse)), 1, *of_score, made)
        yardstick.assert_forward(out, lse)

    out[...], lse[...] = yardstick.out, yardstick.lse
    if not backward_alone:
        check_weights(yardstick, (q, k, lse), options, (extras, block, pointers, arrays), device, info)
    d_lse = np.where(np.isfinite(yardstick.lse), np.random.default_rng(1).standard_normal(lse.shape), 0)
    d_lse = device.put(d_lse.astype(number))
    wanted = Extras(None, *(True if x is not None else None for x in extras[1:]))
    rest = [view(x, text) for x, text in ((out, "out"), (lse, "lse"), (d_lse, "d_lse"))]
    # By captured arrays there is no fixed order.
    reals = [not options.deterministic and name in mod.expression.real_arrays for name in arrays] if mod else []
    call = arguments.backward(
        view(d_out, "d_out"), *views, *rest, options, extra_views, captured, wanted, reals
    )  # fmt: skip
    gradients = [device.put(np.full(x.shape, np.nan, x.dtype)) for x in (q, k, v)]
    strides |= {"d_bias": call.d_extras.bias, "wants_captured": call.d_captured}
    back = launch.BackwardCall(call.problem, 0, *call.strides, device_info=info, **strides)
    workspace = device.put(np.full(back.workspace_bytes, 0xFF, np.uint8))
    heads = (case.batch, case.num_heads)
    sums = [
        None if extra is None else device.put(np.zeros(shape, number))
        for extra, shape in zip(
            extras[1:],
            (call.d_bias_shape, (*heads, back.num_slope_sums), (*heads, back.num_sink_sums)),
            strict=True,
        )
    ]
    d_captured = {
        name: device.put(np.zeros(x.shape, number)) if is_real else None
        for (name, x), is_real in zip(arrays.items(), reals, strict=True)
    }
    addresses = [0 if x is None else device.address(x) for x in sums]
    by_captured = tuple(0 if x is None else device.address(x) for x in d_captured.values())
    made = look_at_mask(back.mask_call, device, pointers[0])
    pointers = map(device.address, (d_out, q, k, v, out, lse, d_lse, *gradients, workspace))
    of_back = *pointers, 1, *of_score, *addresses, by_captured, made
    back(*of_back)
    d_bias, slope_sums, sink_sums = sums
    if d_bias is not None and options.deterministic:  # launches add to what is there
        before = d_bias.copy()
        back(*of_back)
        np.testing.assert_array_equal(d_bias, 2 * before)
        d_bias[...] = before
    if d_bias is not None:
        d_bias = sum_to(NumPyArrays(), d_bias, np.shape(extras.bias))
    found = reference.Gradients(
        *gradients, d_bias, None if slope_sums is None else slope_sums.sum(-1),
        None if sink_sums is None else sink_sums.sum((0, 2)),
        {name: x for name, x in d_captured.items() if x is not None},
    )  # fmt: skip
    yardstick.assert_backward(clean.d_out, found, d_lse=d_lse)


def check_weights(
    yardstick: Yardstick, operands: Any, options: Options, of_score: Any, device: Device, info: plan.DeviceInfo
) -> None:
    """Judge rows of the weights that follow from an LSE, and their sums."""
    q, k, lse = operands
    extras, block, pointers, arrays = of_score
    views = [view(x, name) for x, name in zip(operands, ("q", "k", "lse"), strict=True)]
    extra_views = views_of(extras._replace(sinks=None), block)
    captured = [view(x, name) for name, x in arrays.items()]
    options = options._replace(dropout_p=0.0, deterministic=False)
    for rows in (slice(3, None, 2), None):
        if rows is None:
            call = arguments.received(*views, options, extra_views, captured)
            shape = (*lse.shape[:2], k.shape[2])
        else:
            call = arguments.weights(*views, rows, options, extra_views, captured)
            shape = (*lse.shape[:2], len(call.rows), k.shape[2])
        run = launch.WeightsCall(
            call.problem, 0, *call.strides, rows=call.rows, extras=call.extras, itemsizes=call.itemsizes,
            captured=call.captured, device_info=info,
        )  # fmt: skip
        found = device.put(np.full(shape, np.nan, np.float32))
        addresses = (*pointers[:3], 0), 0, 0, 3, tuple(map(device.address, arrays.values()))
        run(*map(device.address, (q, k, lse, found)), 1, *addresses)
        if rows is None:
            yardstick.assert_received(found, lse)
        else:
            yardstick.assert_weights(found, lse, call.rows)


SEVERAL_STEPS = Case(num_heads=4, num_heads_kv=2, seqlen_q=300, seqlen_k=400)


@dataclass(frozen=True)
class Bug:
    """Something wrong in a kernel, and what the emulator says of it, or who judges the results."""

    name: str
    config: Main
    header: str
    old: str
    new: str
    found: str
    case: Case = SEVERAL_STEPS


FORWARD, BY_ELEMENT = (configs.forward_wgmma_configs("f16", 64, 64, aligned)[-2][0] for aligned in (True, False))
BACKWARD, IN_TURN = (configs.backward_wgmma_config("f16", 64, 64, in_turn) for in_turn in (False, True))
WAIT, PIN, RELEASE = (
    f"            {line};\n" for line in ("warpgroup_wait<1>()", "warpgroup_pin(s[0])", "release_k(ring)")
)
OVERWRITTEN = "yet to read|written while a product on them was in flight"
WRONG = "d_q"
MANY_SECTIONS = Case(num_heads=6, num_heads_kv=6, seqlen_q=300, seqlen_k=100, is_causal=True, q_offset=0)

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
    Bug("dS of others is not awaited", BACKWARD, "backward_wgmma.cuh",
        "if (kStreams && has_before) steps.await_ds(at + -1);", "", f"{OVERWRITTEN}|without a proxy_fence since"),
    Bug("a turn is not passed on", IN_TURN, "attention/backward_steps.cuh",
        "store_release(semaphore, turn_here + 1);", "", "(?s)deadlock.* wait for semaphore"),
    Bug("zeros are not awaited", BACKWARD, "attention/backward_steps.cuh",
        "load_acquire(num_shares(section)) < tiles_per_section()", "false", WRONG, MANY_SECTIONS),
    Bug("zeros are counted before they are there", BACKWARD, "attention/backward_steps.cuh",
        "bulk_finish();\n        add_release(num_shares(section), 1);",
        "add_release(num_shares(section), 1);\n        bulk_finish();", WRONG, MANY_SECTIONS),
    Bug("a share of zeros is left out", BACKWARD, "attention/backward_steps.cuh", "int piece = share;",
        "int piece = share + tiles_per_section();", WRONG),
    Bug("zeros are not counted", BACKWARD, "attention/backward_steps.cuh", "add_release(num_shares(section), 1);", "",
        "(?s)deadlock.* wait for semaphore"),
    Bug("Q is released before its last product", BACKWARD, "backward_wgmma.cuh",
        "warpgroup_wait<1>();\n                if (goes_on) release(steps.empty(at));",
        "if (goes_on) release(steps.empty(at));\n                warpgroup_wait<1>();", OVERWRITTEN),
    Bug("keys are released with their last dQ to come", BACKWARD, "backward_wgmma.cuh",
        "if (joins) release(steps.kv_empty(tile + -1));", "if (joins) release(steps.kv_empty(tile));",
        f"{OVERWRITTEN}|copy is on its way|deadlock"),
    Bug("a tile of one step waits for the next one", BACKWARD, "backward_wgmma.cuh", "if (last && !first) {",
        "if (last) {", "(?s)deadlock", Case(num_heads=2, num_heads_kv=2, seqlen_q=100, seqlen_k=1200)),
)  # fmt: skip


@pytest.mark.parametrize("config", [BACKWARD, IN_TURN], ids=lambda config: config.name)
def test_keys_that_nobody_sees(
    config: Main, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles without work follow each other so fast that one is claimed while an earlier one is still stored."""
    device = Device(tmp_path, programs)
    device.install(monkeypatch)
    plan_in_small(monkeypatch)
    case = Case(batch=3, num_heads=2, seqlen_q=100, seqlen_k=1200, is_causal=True, q_offset=0)
    check(Run(config, case), device, range(6))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_found(bug: Bug, objects: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are right do not show what the emulator would say of others."""
    device = Device(tmp_path, Programs(tmp_path, objects, [(bug.header, bug.old, bug.new)]))
    device.install(monkeypatch)
    plan_in_small(monkeypatch)
    with pytest.raises((KernelError, AssertionError), match=bug.found):
        check(Run(bug.config, bug.case), device, range(8))
