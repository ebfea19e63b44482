"""Tiles of the Hopper kernels, as ``tune`` knows them: which may be any good, how one runs, what the best ones become.

A class for each kernel, and an object for each pair of padded head dims.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

import cuflash
from cuflash import configs
from cuflash.configs import BackwardWgmmaConfig, ForwardWgmmaConfig
from cuflash.launch import BackwardCall, ForwardCall
from cuflash.params import Strides
from cuflash.plan import DeviceInfo, plans_around, wgmma_plan
from cuflash.problem import Problem

from .check import Inputs
from .providers import OURS
from .shapes import Workload
from .timing import Call

ARCH, MMA = 90, "bf16"

#: Registers that a consumer thread of the forward may hold, by block_m: what ``forward_wgmma.cuh`` gives it where two
#: or three warpgroups consume. One alone has all that a thread can have, 255, and the estimate is kept a little below.
FORWARD_REGISTERS = {64: 240, 128: 232, 192: 160}

#: The same of the backward, where two consume whatever the tile.
BACKWARD_REGISTERS = 240

#: What may become the first row of a forward entry: block_m 64 is for when there are few tiles, whatever its score.
FIRST_BLOCK_M = (128, 192)

#: Speed of tiles on each workload, by their names as contestants, the best first.
Ranking = Mapping[str, Mapping[Workload, float]]

#: What a table says of a pair of head dims.
Entry = tuple[Any, ...]

Tile = TypeVar("Tile", bound=configs.Config)


@dataclass(frozen=True, slots=True)
class Tiles(Generic[Tile]):
    """What a sweep has to know of a kernel."""

    head_dim: int
    head_dim_v: int

    #: What it computes, as a measure.
    measure: ClassVar[str]
    #: Name of its table in configs.py.
    table: ClassVar[str]

    def present(self) -> list[Tile]:
        """Tiles of the table as it is."""
        raise NotImplementedError

    def others(self) -> Iterator[Tile]:
        """Tiles that fit shared memory and registers; the present ones may be among them."""
        raise NotImplementedError

    def registers(self, tile: Tile) -> int:
        """Estimate of the registers that a consumer thread holds at once.

        It is there to keep the sweep short: whether a tile spills, the compiler says.
        """
        raise NotImplementedError

    def name(self, tile: Tile) -> str:
        """A tile as a contestant, unique for its head dims. One of ours: whatever it raises is a failure."""
        raise NotImplementedError

    def call(self, tile: Tile, workload: Workload, inputs: Inputs) -> Call:
        """The measure with this tile, launched as ``cuflash`` launches those of the table."""
        raise NotImplementedError

    def entry(self, ranked: Ranking) -> Entry | None:
        """The entry of the table that the ranking calls for; None where nothing that may be in it was ranked."""
        raise NotImplementedError

    def candidates(self) -> list[Tile]:
        """All that compete: the present ones, whatever the estimate says, and the others."""
        return list(dict.fromkeys([*self.present(), *self.others()]))

    def by_name(self) -> dict[str, Tile]:
        """All that compete, by their names."""
        return {self.name(tile): tile for tile in self.candidates()}


@dataclass(frozen=True, slots=True)
class ForwardTiles(Tiles[ForwardWgmmaConfig]):
    """``forward_wgmma.cuh``."""

    measure: ClassVar[str] = "forward"
    table: ClassVar[str] = "_FORWARD_WGMMA"

    def present(self) -> list[ForwardWgmmaConfig]:
        return [tile for tile, _ in configs.forward_wgmma_configs(MMA, self.head_dim, self.head_dim_v, True)]

    def others(self) -> Iterator[ForwardWgmmaConfig]:
        # Of the stages only the two largest numbers that fit: fewer hide less, and free nothing that another tile
        # could use.
        shapes = itertools.product(FORWARD_REGISTERS, range(64, 193, 16), (4,), (1, 2), (True, False))
        for shape in shapes:
            deepest = ForwardWgmmaConfig(MMA, "tma", self.head_dim, self.head_dim_v, *shape)
            if deepest.ping_pong and deepest.block_m == 64:  # one warpgroup has nobody to take turns with
                continue
            if self.registers(deepest) <= FORWARD_REGISTERS[deepest.block_m]:
                tiles = (replace(deepest, num_stages=stages) for stages in (4, 3, 2))
                yield from itertools.islice((tile for tile in tiles if configs.feasible(tile, ARCH)), 2)

    def registers(self, tile: ForwardWgmmaConfig) -> int:
        # Its shares of S and O in float32 and of P in 16 bits, of 64 rows and 128 threads each, and 32 for row
        # statistics, addresses and counters.
        return tile.block_n // 2 + tile.block_n // 4 + tile.head_dim_v // 2 + 32

    def name(self, tile: ForwardWgmmaConfig) -> str:
        turns = "-pp" if tile.ping_pong else ""
        return f"{OURS}-{tile.block_m}x{tile.block_n}-s{tile.num_stages}-q{tile.q_stages}{turns}"

    def call(self, tile: ForwardWgmmaConfig, workload: Workload, inputs: Inputs) -> Call:
        q, k, v, d_out = inputs.q, inputs.k, inputs.v, inputs.d_out
        problem, device_id = problem_of(workload, inputs), torch.cuda.current_device()
        plan = wgmma_plan(tile, problem, DeviceInfo.current(device_id))
        launch = ForwardCall(problem, device_id, *strides(q, k, v, d_out), plan=plan)

        def forward() -> tuple[Tensor, ...]:
            out = torch.empty_like(d_out)
            arguments: list[int] = [*pointers(q, k, v, out), 0, torch.cuda.current_stream().cuda_stream]
            launch(*arguments)
            return (out,)

        return Call(forward)

    def entry(self, ranked: Ranking) -> Entry | None:
        """block_n of the best tile that may be first; a row for it, and for the best of each smaller block_m with it.

        A row is block_m, num_stages, q_stages, ping_pong and cost.
        """
        tiles = self.by_name()
        best: dict[tuple[int, int], str] = {}  # by block_m and block_n
        for key in ranked:
            best.setdefault((tiles[key].block_m, tiles[key].block_n), key)
        winner = next((key for (block_m, _), key in best.items() if block_m in FIRST_BLOCK_M), None)
        if winner is None:
            return None
        first = tiles[winner]
        longest = max((w for w in ranked[winner] if not w.is_causal), key=lambda w: w.seqlen_q)
        rows = []
        for block_m in sorted(FORWARD_REGISTERS, reverse=True):
            chosen = best.get((block_m, first.block_n))
            if chosen is not None and block_m <= first.block_m:
                cost = ranked[winner][longest] / ranked[chosen][longest] * block_m / first.block_m
                tile = tiles[chosen]
                rows.append((block_m, tile.num_stages, tile.q_stages, tile.ping_pong, round(cost, 2)))
        return first.block_n, tuple(rows)


@dataclass(frozen=True, slots=True)
class BackwardTiles(Tiles[BackwardWgmmaConfig]):
    """``backward_wgmma.cuh``, the main step; those around it follow from its tile."""

    measure: ClassVar[str] = "backward"
    table: ClassVar[str] = "_BACKWARD_WGMMA"

    def present(self) -> list[BackwardWgmmaConfig]:
        return [configs.backward_wgmma_config(MMA, self.head_dim, self.head_dim_v, False)]

    def others(self) -> Iterator[BackwardWgmmaConfig]:
        for shape in itertools.product(range(32, 129, 16), (64, 128), (1, 2), (2, 3), (True, False)):
            tile = BackwardWgmmaConfig(MMA, "tma", self.head_dim, self.head_dim_v, *shape)
            fits = self.registers(tile) <= BACKWARD_REGISTERS and configs.feasible(tile, ARCH)
            if fits and self.is_supported(tile):
                yield tile

    def is_supported(self, tile: BackwardWgmmaConfig) -> bool:
        """Whether the kernel is made for this tile: d_q has shares for both warpgroups, by keys one for each.

        And steps overlap from one tile of keys to the next, for which there has to be a place.
        """
        shares = tile.dq_layout[0] // 4  # of 64 rows or columns
        # By role there is one order of products only.
        return shares >= 2 and not tile.overlap if tile.by_role else shares == 2 and tile.kv_stages > tile.overlap

    def registers(self, tile: BackwardWgmmaConfig) -> int:
        # Float32, of 64 rows and 128 threads each: its shares of d_k and d_v, and of S and dP; by role of one of
        # either, and of d_q, which is as large as S. And 32 for addresses and counters.
        dims = (tile.head_dim, tile.head_dim_v)
        return (max(dims) if tile.by_role else sum(dims)) // 2 + 2 * (tile.block_m // 2) + 32

    def name(self, tile: BackwardWgmmaConfig) -> str:
        overlap = "-overlap" if tile.overlap else ""
        return f"{OURS}-{tile.block_m}x{tile.block_n}-kv{tile.kv_stages}-s{tile.num_stages}{overlap}"

    def call(self, tile: BackwardWgmmaConfig, workload: Workload, inputs: Inputs) -> Call:
        d_out, q, k, v = inputs.d_out, inputs.q, inputs.k, inputs.v
        problem, device_id = problem_of(workload, inputs), torch.cuda.current_device()
        out, lse = cuflash.attention(q, k, v, is_causal=workload.is_causal, return_lse=True)
        plans = plans_around(tile, problem, DeviceInfo.current(device_id))
        launch = BackwardCall(problem, device_id, *strides(d_out, q, k, v, out, q, k, v), plans=plans)

        def backward() -> tuple[Tensor, ...]:
            gradients = tuple(torch.empty_like(operand) for operand in (q, k, v))
            workspace = q.new_empty(launch.workspace_bytes, dtype=torch.uint8)
            stream = torch.cuda.current_stream().cuda_stream
            arguments: list[int] = [*pointers(d_out, q, k, v, out, lse), 0, *pointers(*gradients, workspace), stream]
            launch(*arguments)
            return gradients

        return Call(backward)

    def entry(self, ranked: Ranking) -> Entry | None:
        """The best tile: block_m, block_n, kv_stages, num_stages and overlap."""
        if not ranked:
            return None
        tile = self.by_name()[next(iter(ranked))]
        return tile.block_m, tile.block_n, tile.kv_stages, tile.num_stages, tile.overlap


#: The class of each measure.
TILES: dict[str, type[Tiles[Any]]] = {kernel.measure: kernel for kernel in (ForwardTiles, BackwardTiles)}


# --- operands, as a launch wants them -------------------------------------------------------------


def problem_of(workload: Workload, inputs: Inputs) -> Problem:
    """The problem of operands whose v may have a head_dim of its own."""
    w = workload
    return Problem(
        w.dtype, w.batch, w.num_heads, w.num_heads_kv, w.seqlen_q, w.seqlen_k, w.head_dim, inputs.v.shape[-1],
        w.scale, w.band,
    )  # fmt: skip


def strides(*tensors: Tensor) -> list[Strides]:
    """Strides of all axes but the last."""
    return [tensor.stride()[:3] for tensor in tensors]


def pointers(*tensors: Tensor) -> list[int]:
    """Where they start."""
    return [tensor.data_ptr() for tensor in tensors]
