"""Problem x Device -> Plan: which kernel, which configuration, which grid.

Pure: no GPU, no clock, no environment is looked at, so that a plan can be printed and tested anywhere.
The choice depends on dtype, head dims, lengths and architecture but never on the batch, so that a sequence gets
the same bits alone and in company. The one exception is a backward whose order of sums is free anyway: which of its
tiles are cut into parts depends on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from . import configs
from .configs import Config, ceil_div
from .problem import ITEMSIZE, Problem


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a plan needs to know of a GPU; sizes in bytes."""

    name: str
    arch: int
    num_sms: int
    smem_per_block: int
    smem_per_sm: int

    @classmethod
    def of_arch(cls, arch: int) -> DeviceInfo:
        """A typical device of an architecture, described without having one."""
        num_sms = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}.get(arch, 108)
        smem = configs.smem_limit(arch)
        return cls(f"sm_{arch}", arch, num_sms, smem, smem + 1024)

    @classmethod
    @cache
    def current(cls, device_id: int) -> DeviceInfo:
        """The device itself, asked through CuPy."""
        import cupy

        properties = cupy.cuda.runtime.getDeviceProperties(device_id)
        return cls(
            properties["name"].decode(),
            10 * properties["major"] + properties["minor"],
            properties["multiProcessorCount"],
            properties["sharedMemPerBlockOptin"],
            properties["sharedMemPerMultiprocessor"],
        )


@dataclass(frozen=True, slots=True)
class Workspace:
    """Scratch memory of a backward call: byte offsets of its parts, each aligned to 256."""

    rows: int  # query rows of a head, rounded up to whole tiles
    lse_log2: int
    dq_accum: int
    semaphore: int
    counters: int
    parts: int
    total: int
    delta: int = 0
    num_counters: int = 0
    #: Tiles of dq_accum that the first launch empties, that is fills with zeros.
    num_emptied: int = 0

    @classmethod
    def of(
        cls,
        problem: Problem,
        block_m: int,
        itemsize: int,
        dq_columns: int,
        semaphores: int,
        num_counters: int = 0,
        part_floats: int = 0,
        heads_emptied: int | None = None,
    ) -> Workspace:
        """Parts for rows in tiles of `block_m`, float32 or float64 sums, semaphores per tile, and the tail.

        The first launch empties what belongs to the first `heads_emptied` heads, or, if that is None, to all.
        """
        rows = ceil_div(problem.seqlen_q, block_m) * block_m
        heads = problem.batch * problem.num_heads
        tiles = heads * rows // block_m
        sizes = [heads * rows * itemsize] * 2
        sizes += [n * 4 for n in (heads * rows * dq_columns, tiles * semaphores, num_counters, part_floats)]
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + ceil_div(size, 256) * 256)
        lse_log2, dq_accum, semaphore, counters, parts, total = ends[1:]
        emptied = tiles if heads_emptied is None else min(tiles, heads_emptied * rows // block_m)
        return cls(
            rows, lse_log2, dq_accum, semaphore, counters, parts, total, num_counters=num_counters, num_emptied=emptied
        )


@dataclass(frozen=True, slots=True)
class TileOrder:
    """How blocks that take tiles one after the other number them: ``TileOrder`` of ``params.cuh``."""

    num_tiles: int
    num_blocks: int
    num_heads: int
    section: int
    pack: int = 1

    @property
    def num_sections(self) -> int:
        """That all heads make up; none where they have no tiles."""
        return ceil_div(self.num_tiles, self.section * self.num_blocks) if self.num_tiles else 0


@dataclass(frozen=True, slots=True)
class TileParts:
    """How the last tiles are cut into parts for all blocks to end together: ``TileParts`` of ``params.cuh``."""

    first_tile: int
    tile_steps: int = 1
    num_steps: int = 0
    part_steps: int = 0

    @property
    def places(self) -> int:
        """Places in the workspace: a part takes one for each tile that it reaches into."""
        return ceil_div(self.num_steps, self.part_steps) + self.num_tiles - 1 if self.num_tiles else 0

    @property
    def num_tiles(self) -> int:
        """Tiles that are in parts."""
        return self.num_steps // self.tile_steps


#: What a tile costs beside its blocks, in blocks.
_TILE_COST = 0.75
#: Bytes that stay in the level-2 cache of an H100 (50 MB) or H200.
_CACHE_BYTES = 40 << 20
#: Bytes of the heads that the backward works on together, and if d_q is summed in a fixed order.
_SECTION_BYTES, _SECTION_BYTES_IN_ORDER = 12 << 20, 32 << 20
#: Tiles that each block takes after those that empty a part of the workspace and before those that use it.
_WAVES_AHEAD = 2
#: Steps of the shortest part of a tile, and what a part costs beside them.
_PART_STEPS, _PART_COST = 4, 4
#: Tiles that are enough to see how evenly an order spreads them.
_MAX_SIMULATED = 1 << 15


def _forward_order(problem: Problem, config: configs.ForwardWgmmaConfig, pack: int, grid: int) -> TileOrder:
    """Tiles of queries of a head each, or of the `pack` query heads that share keys, for `grid` blocks."""
    p = problem
    rows = config.block_m // pack
    num_blocks, num_heads = ceil_div(p.seqlen_q, rows), p.num_heads // pack
    group = max(p.group_size // pack, 1)  # the heads that share keys and values, then the next ones
    section = group
    if not p.band.is_open and num_blocks > 1 and p.batch * num_heads > 0:
        starts = range(0, num_blocks * rows, rows)
        ranges = (p.band.key_range(start, min(start + rows, p.seqlen_q), p.seqlen_k) for start in starts)
        section = _section(p, _blocks(ranges, config.block_n), p.batch * num_heads, group, grid)
    return TileOrder(p.batch * num_heads * num_blocks, num_blocks, num_heads, section, pack)


def _backward_order(problem: Problem, config: configs.BackwardWgmmaConfig) -> TileOrder:
    """Tiles of keys of a key/value head each, counted from the last: causal masks leave it the least work."""
    p = problem
    num_blocks = ceil_div(p.seqlen_k, config.block_n)
    # Each block takes the next tile when it is done with its last one. So the more heads a section has the more of the
    # heavy tiles come before the light ones, and the fewer blocks wait for each other in a fixed order; but it should
    # stay in the cache.
    row_bytes = (p.head_dim + p.head_dim_v) * ITEMSIZE[p.dtype] + config.dq_columns * 4
    all_alike = p.band.is_open and not config.deterministic
    section_bytes = _SECTION_BYTES_IN_ORDER if config.deterministic else _SECTION_BYTES
    head_bytes = max(p.group_size * p.seqlen_q * row_bytes, 1)
    section = 1 if all_alike else max(section_bytes // head_bytes, 1)
    num_heads = p.batch * p.num_heads_kv
    return TileOrder(num_heads * num_blocks, num_blocks, p.num_heads_kv, min(section, max(num_heads, 1)))


def _backward_tail(problem: Problem, config: configs.BackwardWgmmaConfig, num_tiles: int, num_sms: int) -> TileParts:
    """The tiles that are left when all blocks have had the same number of them, in parts if that ends earlier."""
    left = num_tiles % num_sms
    tile_steps = ceil_div(problem.seqlen_q, config.block_m) * problem.group_size
    part_steps = max(ceil_div(left * tile_steps, num_sms), _PART_STEPS)
    is_worth_it = part_steps + _PART_COST < 0.9 * tile_steps and left * tile_steps < 1 << 28
    # Tiles that differ even out by themselves; parts of a tile would wait for each other in a fixed order.
    # And a part leaves no sums for slopes.
    has_slopes = config.score.alibi
    if left == 0 or not problem.band.is_open or config.deterministic or has_slopes or config.listed or not is_worth_it:
        return TileParts(num_tiles)
    return TileParts(num_tiles - left, tile_steps, left * tile_steps, part_steps)


def _sections_ahead(order: TileOrder, grid: int) -> int:
    """So many sections after its own a tile of keys empties the workspace, long before blocks come there.

    That of the first sections is left to the first launch.
    """
    return min(ceil_div(_WAVES_AHEAD * grid, max(order.section * order.num_blocks, 1)), order.num_sections)


def _blocks(ranges: Iterable[tuple[int, int]], size: int) -> np.ndarray:
    """Blocks of `size` that ranges touch; ``block_range.cuh`` is the other side."""
    return np.array([ceil_div(end, size) - begin // size for begin, end in ranges], dtype=np.int64)


def _section(problem: Problem, work: np.ndarray, heads: int, group: int, grid: int) -> int:
    """Heads per section: few, so that their keys stay in the cache, but so that all blocks get the same work.

    Blocks take tiles in turn, forwards and backwards (``tile_order.cuh``), and tiles of a head differ in `work`.
    Whether that evens out depends on how the numbers of tiles and of blocks divide: it is tried.
    """
    p = problem
    heads = min(heads, max(_MAX_SIMULATED // len(work), 1))
    choices = [group * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if group * n < heads] + [heads]
    costs = {section: _makespan(work + _TILE_COST, heads, section, grid) for section in choices}
    head_bytes = p.seqlen_k * (p.head_dim + p.head_dim_v) * ITEMSIZE[p.dtype] // group
    cached = {section: cost for section, cost in costs.items() if section * head_bytes <= _CACHE_BYTES}
    # Wide heads need more bytes for their work than memory delivers besides, narrow ones less.
    patience = 1.05 if p.head_dim > 64 else 1.01
    if cached and min(cached.values()) <= patience * min(costs.values()):
        costs = cached
    return next(section for section, cost in costs.items() if cost <= 1.01 * min(costs.values()))


def _makespan(cost: np.ndarray, heads: int, section: int, grid: int) -> float:
    """Work of the block that has the most."""
    sections = [min(section, heads - first) for first in range(0, heads, section)]
    tiles = np.concatenate([np.repeat(cost[::-1], size) for size in sections])
    rounds = ceil_div(len(tiles), grid)
    table = np.zeros((rounds, grid))
    table.ravel()[: len(tiles)] = tiles
    table[1::2] = table[1::2, ::-1]
    return float(table.sum(axis=0).max())


@dataclass(frozen=True, slots=True)
class MaskBlocks:
    """What ``mask_blocks.cuh`` makes of a mask: for every tile a list of those that it sees, and the mask in bits.

    There are no bits, and no rows of them, where every tile lies in one block of the mask, so that who reads the lists
    does not ask for them.
    """

    #: Batch entries and heads that have a mask of their own.
    batch: int
    heads: int
    #: Tiles of a head, and of the other axis.
    tiles: int
    others: int
    #: Rows of bits of a head, and the bytes in them of one tile and of all.
    rows: int
    tile_bytes: int
    row_bytes: int

    @classmethod
    def of(cls, problem: Problem, block_m: int, block_n: int, by_keys: bool, reads_lists: bool = True) -> MaskBlocks:
        """Lists of tiles of keys for those of queries, or by keys the other way round."""
        p = problem
        assert p.features.mask is not None
        by_batch, by_head, by_query, by_key = p.features.mask
        axes = (p.seqlen_q, block_m, by_query), (p.seqlen_k, block_n, by_key)
        (rows, block, rows_differ), (columns, other, columns_differ) = axes[::-1] if by_keys else axes
        others = ceil_div(columns, other)
        query_block, key_block, first_key = p.features.mask_block
        has_whole_tiles = reads_lists and p.features.has_mask_by_blocks
        has_whole_tiles &= not by_query or query_block % block_m == 0
        has_whole_tiles &= not by_key or key_block % block_n == first_key % block_n == 0
        bit_rows = 0 if has_whole_tiles else rows if rows_differ else 1
        return cls(
            p.batch if by_batch else 1, p.num_heads if by_head else 1, ceil_div(rows, block), others,
            bit_rows, other // 8, ceil_div((others if columns_differ else 1) * other // 8, 16) * 16,
        )  # fmt: skip

    @property
    def num_lists(self) -> int:
        return self.batch * self.heads * self.tiles

    @property
    def list_strides(self) -> tuple[int, int, int]:
        """Bytes from one batch entry, head and tile to the next; 0 where they share lists."""
        of_tile = 4 * (1 + self.others)
        return *self._outer(of_tile * self.tiles), of_tile

    @property
    def bits_strides(self) -> tuple[int, int, int, int]:
        """Bytes from one batch entry, head, row, and tile of the other axis to the next; 0 where they are alike."""
        all_alike = self.row_bytes < self.others * self.tile_bytes
        of_row, of_tile = self.row_bytes if self.rows > 1 else 0, 0 if all_alike else self.tile_bytes
        return *self._outer(self.row_bytes * self.rows), of_row, of_tile

    def _outer(self, of_head: int) -> tuple[int, int]:
        return of_head * self.heads if self.batch > 1 else 0, of_head if self.heads > 1 else 0

    @property
    def bits_at(self) -> int:
        """Where the bits begin, behind the lists."""
        return ceil_div(self.num_lists * self.list_strides[2], 256) * 256

    @property
    def num_bytes(self) -> int:
        return self.bits_at + self.batch * self.heads * self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch: the kernel's configuration and how many blocks of it."""

    config: Config
    grid: int
    workspace: Workspace | None = None
    order: TileOrder | None = None
    tail: TileParts | None = None
    #: What the launch reads of a mask, and the launch that makes it, which others that read the same need not repeat.
    mask_blocks: MaskBlocks | None = None
    before: Plan | None = None
    #: Tiles of keys empty what the workspace has for the heads of so many sections later.
    sections_ahead: int = 0

    @property
    def kernel(self) -> str:
        return self.config.function

    @property
    def block(self) -> int:
        return self.config.threads

    @property
    def smem_bytes(self) -> int:
        return self.config.smem_bytes

    @property
    def workspace_bytes(self) -> int:
        return 0 if self.workspace is None else self.workspace.total

    @property
    def made_bytes(self) -> int:
        return 0 if self.mask_blocks is None else self.mask_blocks.num_bytes

    def __str__(self) -> str:
        workspace = f", workspace {self.workspace_bytes:,} B" if self.workspace_bytes else ""
        workspace += f", {self.made_bytes:,} B of lists and bits of the mask" if self.made_bytes else ""
        order = ""
        if self.order is not None:
            order = f", {self.order.num_tiles:,} tiles in sections of {self.order.section} heads"
            order += f", {self.order.pack} query heads in one tile" if self.order.pack > 1 else ""
        if self.tail is not None and self.tail.num_tiles:
            parts = ceil_div(self.tail.num_steps, self.tail.part_steps)
            order += f", the last {self.tail.num_tiles} in {parts} parts"
        before = f"{self.before}\n" if self.before is not None else ""
        return (
            f"{before}{self.config.name}\n  {self.config.cpp}\n"
            f"  grid {self.grid} x {self.block} threads, {self.smem_bytes:,} B of shared memory{workspace}{order}"
        )


def _tensor_core(problem: Problem, device: DeviceInfo, family: str) -> tuple[str, int, int] | None:
    """Arithmetic and padded head dims on tensor cores; None where the SIMT kernels have to compute."""
    if family == "simt":
        return None
    mma = configs.mma_of(problem.dtype, problem.precision, device.arch)
    head_dims = configs.pad_head_dims(problem.head_dim, problem.head_dim_v)
    if mma is not None and head_dims is not None:
        return mma, *head_dims
    if family in ("mma", "wgmma"):
        raise ValueError(
            f"CUFLASH_KERNEL: got {family} for {problem.dtype} with head_dim {problem.head_dim} and head_dim_v "
            f"{problem.head_dim_v} on sm_{device.arch}, which no such kernel computes; wanted auto or simt"
        )
    return None


def plan_forward(problem: Problem, device: DeviceInfo, family: str = "auto") -> Plan:
    """The launch that computes ``out`` and ``lse``; `family` is ``CUFLASH_KERNEL``'s value."""
    p = problem
    score = configs.ScoreConfig.of(p.features)
    choice = _tensor_core(p, device, family)
    if choice is None:
        simt = replace(configs.forward_simt_config(p.dtype, p.head_dim_v), score=score)
        chunks = ceil_div(p.head_dim_v, simt.columns)
        return Plan(simt, chunks * ceil_div(p.seqlen_q, simt.block_m) * p.num_heads * p.batch)
    mma, head_dim, head_dim_v = choice
    # Unaligned rows are copied element by element; the portable kernels have more threads for that.
    fits = configs.has_wgmma(mma, device.arch) and p.mappable and (p.vectorized or not score.any())
    # Keys that nobody sees are cut off there, and dropout counts keys by 16.
    fits &= not score.dropout or p.band.key_range(0, p.seqlen_q, p.seqlen_k)[0] % 16 == 0
    if fits and (family == "wgmma" or (family == "auto" and p.vectorized)):
        return _plan_forward_wgmma(mma, head_dim, head_dim_v, p, device)
    if family == "wgmma":
        raise _no_wgmma(p, device, configs.has_wgmma(mma, device.arch))
    config = configs.forward_mma_config(mma, device.arch, head_dim, head_dim_v, p.vectorized, score)
    made, before = _look_at_mask(config, p)
    grid = ceil_div(p.seqlen_q, config.block_m) * p.num_heads * p.batch
    return Plan(config, grid, mask_blocks=made, before=before)


def _look_at_mask(config: configs.TileConfig, problem: Problem) -> tuple[MaskBlocks | None, Plan | None]:
    """What a main kernel reads of a mask, and the launch before that makes it; None where there is no mask."""
    if problem.features.mask is None:
        return None, None
    looks = configs.mask_blocks_config(config, problem.features.has_mask_by_blocks)
    reads_lists = not isinstance(config, configs.BackwardMmaConfig | configs.BackwardWgmmaConfig) or config.listed
    made = MaskBlocks.of(problem, config.block_m, config.block_n, looks.by_keys, reads_lists)
    return made, Plan(looks, made.num_lists)


def _no_wgmma(problem: Problem, device: DeviceInfo, exists: bool) -> ValueError:
    p = problem
    why = f"sm_{device.arch}"
    if exists:
        why = "rows that do not start on 16 bytes" if p.mappable else "strides that no TMA descriptor holds"
    return ValueError(
        f"CUFLASH_KERNEL: got wgmma for {p.dtype} on {why}, which no such kernel computes; wanted auto, mma or simt"
    )


def _plan_forward_wgmma(mma: str, head_dim: int, head_dim_v: int, problem: Problem, device: DeviceInfo) -> Plan:
    p = problem
    score = configs.ScoreConfig.of(p.features)
    rows = configs.forward_wgmma_configs(mma, head_dim, head_dim_v, p.vectorized, score, p.features.bias_tiles)
    largest = rows[0][0]
    # What is done to scores differs between heads, so that a tile is of one.
    pack = _pack(p, largest.block_m) if p.vectorized and not score.any() else 1
    if pack > 1:  # by lengths alone: how queries of different heads share warps may show in the last bit
        config = next((row for row, _ in reversed(rows) if row.block_m // pack >= p.seqlen_q), largest)
    else:

        def waves(row: tuple[configs.ForwardWgmmaConfig, float]) -> float:
            tiles = ceil_div(p.seqlen_q, row[0].block_m) * p.num_heads * p.batch
            return ceil_div(tiles, device.num_sms) * row[1]

        config = min(rows, key=waves)[0]
    return wgmma_plan(config, p, device, pack)


def _pack(problem: Problem, block_m: int) -> int:
    """Query heads in one tile: all that share keys, where tiles of single heads would be emptier."""
    p = problem
    if not 1 < p.group_size <= block_m:
        return 1
    padded = ceil_div(p.seqlen_q, block_m) * block_m * p.group_size
    packed = ceil_div(p.seqlen_q, block_m // p.group_size) * block_m  # the rows of a query stay in one tile
    return p.group_size if packed < 0.9 * padded else 1


def wgmma_plan(config: configs.ForwardWgmmaConfig, problem: Problem, device: DeviceInfo, pack: int = 1) -> Plan:
    """The launch of a Hopper configuration: a block per multiprocessor, or per tile if there are fewer."""
    order = _forward_order(problem, config, pack, device.num_sms)
    made, before = _look_at_mask(config, problem)
    return Plan(config, min(order.num_tiles, device.num_sms), order=order, mask_blocks=made, before=before)


def plan_backward(problem: Problem, device: DeviceInfo, family: str = "auto") -> tuple[Plan, ...]:
    """The launches that compute the gradients, in order; all share one workspace."""
    choice = _tensor_core(problem, device, family)
    if choice is None:
        return _plan_backward_simt(problem)
    mma, head_dim, head_dim_v = choice
    p = problem
    score = configs.ScoreConfig.of(p.features)
    has_wgmma = configs.has_wgmma(mma, device.arch)
    if has_wgmma and p.mappable and p.vectorized and family != "mma":
        main = configs.backward_wgmma_config(mma, head_dim, head_dim_v, p.deterministic, score)
        return plans_around(main, p, device)
    if family == "wgmma":
        raise _no_wgmma(p, device, has_wgmma)
    portable = configs.backward_mma_config(mma, device.arch, head_dim, head_dim_v, p.vectorized, p.deterministic, score)
    return plans_around(portable, p, device)


def _plan_backward_simt(problem: Problem) -> tuple[Plan, ...]:
    p = problem
    delta, dkdv, dq = configs.backward_simt_configs(p.dtype, p.head_dim, p.head_dim_v)
    score = configs.ScoreConfig.of(p.features)
    dkdv, dq = replace(dkdv, score=score), replace(dq, score=score)
    workspace = Workspace.of(p, 1, 8 if p.dtype == "float64" else 4, 0, 0)
    dkdv_chunks = ceil_div(max(p.head_dim, p.head_dim_v), dkdv.columns)
    dq_chunks = ceil_div(p.head_dim, dq.columns)
    return (
        Plan(delta, ceil_div(p.seqlen_q, delta.num_warps) * p.num_heads * p.batch, workspace),
        Plan(dkdv, dkdv_chunks * ceil_div(p.seqlen_k, dkdv.block_n) * p.num_heads_kv * p.batch, workspace),
        Plan(dq, dq_chunks * ceil_div(p.seqlen_q, dq.block_m) * p.num_heads * p.batch, workspace),
        *_sinks(p, workspace),
    )


def plans_around(
    main: configs.BackwardMmaConfig | configs.BackwardWgmmaConfig, problem: Problem, device: DeviceInfo
) -> tuple[Plan, ...]:
    """The launch of a main kernel, and of the preprocess and convert kernels that fit it."""
    p = problem
    preprocess, convert = configs.backward_companions(main)
    sizes = main.block_m, 4, main.dq_columns, preprocess.semaphores
    num_blocks = ceil_div(p.seqlen_k, main.block_n)
    made, before = _look_at_mask(main, p)
    if isinstance(main, configs.BackwardWgmmaConfig):
        order = _backward_order(p, main)
        tail = _backward_tail(p, main, order.num_tiles, device.num_sms)
        gather = configs.backward_gather_config(main)
        # A thread block per multiprocessor, or per tile if there are fewer and they stay whole.
        grid = device.num_sms if tail.num_tiles else min(order.num_tiles, device.num_sms)
        ahead = _sections_ahead(order, grid)
        # Parts of a tile do not empty anything.
        assert (order.num_sections - ahead) * order.section * order.num_blocks <= tail.first_tile
        workspace = Workspace.of(
            p,
            *sizes,
            num_counters=1 + order.num_sections,
            part_floats=tail.places * gather.place_elems,
            heads_emptied=None if ahead == order.num_sections else ahead * order.section * p.group_size,
        )
        middle = [Plan(main, grid, workspace, order, tail, made, before, sections_ahead=ahead)]
        if tail.num_tiles:
            middle.append(Plan(gather, tail.num_tiles * gather.main_warps, workspace))
    else:
        workspace = Workspace.of(p, *sizes)
        grid = num_blocks * p.num_heads_kv * p.batch
        middle = [Plan(main, grid, workspace, mask_blocks=made, before=before)]
    tiles = workspace.rows // main.block_m * p.num_heads * p.batch
    return Plan(preprocess, tiles, workspace), *middle, Plan(convert, tiles, workspace), *_sinks(p, workspace)


def plan_weights(problem: Problem, num_rows: int | None, device: DeviceInfo, family: str = "auto") -> Plan:
    """The launch that computes so many rows of the matrix of weights, or, for None, its sums over queries."""
    p = problem
    score = configs.ScoreConfig.of(p.features)
    sums = num_rows is None
    choice = _tensor_core(p, device, "mma" if family == "wgmma" else family)
    config: configs.WeightsConfig | configs.WeightsSimtConfig
    if choice is None:
        config = configs.weights_simt_config(p.dtype, sums, score)
    else:
        config = configs.weights_config(choice[0], device.arch, choice[1], p.vectorized, sums, score)
    blocks = ceil_div(p.seqlen_k, config.block_n) if num_rows is None else ceil_div(num_rows, config.block_m)
    return Plan(config, blocks * p.num_heads * p.batch)


def plan_bias(main: Plan, problem: Problem, device: DeviceInfo, strides: tuple[int, ...]) -> Plan | None:
    """The launch, after all others, that computes the gradient by the bias in a fixed order.

    `strides` are those of the gradient by (batch, head, query, key). None where the main kernel does it: where any
    order will do, or each element of it is of one pair.
    """
    p = problem
    lengths = p.batch, p.num_heads, p.seqlen_q, p.seqlen_k
    if not p.deterministic or all(stride or length <= 1 for stride, length in zip(strides, lengths, strict=True)):
        return None
    config: configs.BackwardBiasConfig | configs.BackwardSimtConfig
    if isinstance(main.config, configs.BackwardMmaConfig | configs.BackwardWgmmaConfig):
        config = configs.backward_bias_config(main.config, device.arch)
    else:
        config = configs.backward_simt_more_config("bias", p.dtype, configs.ScoreConfig.of(p.features))
    blocks = p.batch, p.num_heads, ceil_div(p.seqlen_q, config.block_m), ceil_div(p.seqlen_k, config.block_n)
    return Plan(config, math.prod(count for stride, count in zip(strides, blocks, strict=True) if stride))


def plan_captured(main: Plan, problem: Problem, device: DeviceInfo) -> Plan:
    """The launch, after all others of the backward, that computes the gradients by what an expression captures."""
    config: configs.BackwardCapturedConfig | configs.BackwardSimtConfig
    if isinstance(main.config, configs.BackwardMmaConfig | configs.BackwardWgmmaConfig):
        config = configs.backward_captured_config(main.config, device.arch)
    else:
        config = configs.backward_simt_more_config("captured", problem.dtype, configs.ScoreConfig.of(problem.features))
    return Plan(config, ceil_div(problem.seqlen_q, config.block_m) * problem.num_heads * problem.batch)


def _sinks(problem: Problem, workspace: Workspace) -> tuple[Plan, ...]:
    """The gradient by the sinks, where there are any."""
    if problem.features.sinks is None:
        return ()
    config = configs.BackwardSinksConfig(problem.lse_dtype)
    return (Plan(config, problem.batch * problem.num_heads, workspace),)
