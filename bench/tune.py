"""Tune: every plausible tile of the Hopper forward, ranked beside cuDNN; with ``--write``, the winners as the table.

A tile that deadlocks takes the process with it, so each is named on stderr before it is launched, on a small problem
first: the last name is that of the culprit, and the tables of the head dims before it have been printed and written.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cuflash import compile as compiler
from cuflash import configs
from cuflash.configs import ForwardWgmmaConfig
from cuflash.launch import ForwardCall
from cuflash.plan import DeviceInfo, wgmma_plan
from cuflash.problem import Problem

from . import runner
from .check import Inputs, Reference
from .providers import OURS, select
from .report import geometric_mean, table
from .rows import Row
from .runner import Candidate, Case, Timer, run_case
from .shapes import Workload, grid
from .timing import Call, CudaTimer, Spread

ARCH, MMA, DTYPE = 90, "bf16", "bfloat16"

#: Whose time scores are relative to, so that they can be averaged over workloads.
YARDSTICK = "sdpa-cudnn"

#: Registers that a consumer thread may hold, by block_m: what ``forward_wgmma.cuh`` gives it where two or three
#: warpgroups consume. One alone has all that a thread can have, 255, and the estimate is kept a little below.
CONSUMER_REGISTERS = {64: 240, 128: 232, 192: 160}

#: What may become the first row of an entry: block_m 64 is for when there are few tiles, whatever its score.
FIRST_BLOCK_M = (128, 192)

#: Batch, heads and length of the problem that each tile has to survive first: more blocks of queries than a GPU
#: has multiprocessors and of keys than there are stages, so that all rings wrap, and a length that no block divides.
SMALL = (2, 20, 1000)

#: The measure of that problem, which nobody times.
FIRST = "first answer"

#: Lines of a printed table.
BEST = 8

#: The file that ``--write`` changes.
TABLE_FILE = Path(configs.__file__)

#: A row of an entry of the table in it: block_m, num_stages, q_stages, ping_pong, cost.
TableRow = tuple[int, int, int, bool, float]

#: An entry: block_n, and the rows that share it.
Entry = tuple[int, tuple[TableRow, ...]]


@dataclass(frozen=True, slots=True)
class Options(runner.Options):
    """The shared options, and whether the winners become the table."""

    write: bool = False


def run(options: Options) -> list[Row]:
    """Rows of every head dim; tables go to stdout, all else that is printed to stderr."""
    arch = DeviceInfo.current(torch.cuda.current_device()).arch
    if not configs.has_wgmma(MMA, arch):
        raise SystemExit(f"tune: the tiles are those of sm_{ARCH}, and this is sm_{arch}")
    lengths = options.lens or ((4096,) if options.quick else (1024, 4096, 16384))
    timer = CudaTimer()
    rows = []
    winners: dict[tuple[int, int], Entry] = {}
    for pair in select_pairs(options.dims or ((64, 128) if options.quick else ())):
        with contextlib.redirect_stdout(sys.stderr):
            swept = sweep(*pair, lengths, timer, options.num_rounds())
        rows += swept
        ranked = ranking(swept)
        print(f"\n{pair[0]}x{pair[1]}, {summary(*pair, ranked)}", flush=True)
        if found := entry(ranked, candidates(*pair)):
            winners[pair] = found
        if options.write:
            TABLE_FILE.write_text(rewritten(TABLE_FILE.read_text(encoding="utf-8"), winners), encoding="utf-8")
    print("\nwinners:", *table_lines(winners), sep="\n", flush=True)
    return rows


# --- what competes --------------------------------------------------------------------------------


def select_pairs(dims: Iterable[int]) -> list[tuple[int, int]]:
    """Padded head dims (of q and k, of v) whose first is one of ``dims``, all where that is empty."""
    wanted = tuple(dims)
    known = [head_dim for head_dim, _ in configs.HEAD_DIM_PAIRS]
    if unknown := [str(head_dim) for head_dim in wanted if head_dim not in known]:
        raise ValueError(f"no kernel is compiled for head_dim {', '.join(unknown)}; known: {sorted(set(known))}")
    return [pair for pair in configs.HEAD_DIM_PAIRS if not wanted or pair[0] in wanted]


def registers(tile: ForwardWgmmaConfig) -> int:
    """Estimate of the registers that a consumer thread holds at once.

    Its shares of S and O in float32 and of P in 16 bits, of 64 rows and 128 threads each, and 32 for row statistics,
    addresses and counters. It is there to keep the sweep short: whether a tile spills, the compiler says.
    """
    return tile.block_n // 2 + tile.block_n // 4 + tile.head_dim_v // 2 + 32


def candidates(head_dim: int, head_dim_v: int) -> list[ForwardWgmmaConfig]:
    """The present rows of the table, whatever the estimate says, and tiles that fit shared memory and registers.

    Of the stages only the two largest numbers that fit: fewer hide less, and free nothing that another tile could use.
    """
    found = present(head_dim, head_dim_v)
    shapes = itertools.product(CONSUMER_REGISTERS, range(64, 193, 16), (1, 2), (True, False))
    for block_m, block_n, q_stages, ping_pong in shapes:
        if ping_pong and block_m == 64:  # one warpgroup has nobody to take turns with
            continue
        deepest = ForwardWgmmaConfig(MMA, "tma", head_dim, head_dim_v, block_m, block_n, 4, q_stages, ping_pong)
        if registers(deepest) <= CONSUMER_REGISTERS[block_m]:
            tiles = (replace(deepest, num_stages=stages) for stages in (4, 3, 2))
            found += itertools.islice((tile for tile in tiles if configs.feasible(tile, ARCH)), 2)
    return list(dict.fromkeys(found))


def present(head_dim: int, head_dim_v: int) -> list[ForwardWgmmaConfig]:
    """Tiles of the table as it is."""
    return [tile for tile, _ in configs.forward_wgmma_configs(MMA, head_dim, head_dim_v, True)]


def name(tile: ForwardWgmmaConfig) -> str:
    """A tile as a contestant, unique for its head dims. One of ours: whatever it raises is a failure."""
    turns = "-pp" if tile.ping_pong else ""
    return f"{OURS}-{tile.block_m}x{tile.block_n}-s{tile.num_stages}-q{tile.q_stages}{turns}"


# --- the sweep ------------------------------------------------------------------------------------


def sweep(
    head_dim: int, head_dim_v: int, lengths: Iterable[int], timer: Timer, rounds: int, device: str = "cuda"
) -> list[Row]:
    """Rows of all tiles: the small problem, then the grid. Who spills, is wrong or fails is out from there on."""
    tiles = {name(tile): tile for tile in candidates(head_dim, head_dim_v)}
    spills = {key: f"{size} bytes of local memory" for key, size in local_bytes(tiles).items() if size}
    rows: list[Row] = []
    first = [Workload(DTYPE, *SMALL, head_dim, is_causal) for is_causal in (False, True)]
    for workload in (*first, *grid(DTYPE, (head_dim,), lengths)):
        rows += run_workload(workload, head_dim_v, tiles, spills, None if workload in first else timer, rounds, device)
        out = {row.provider for row in rows if row.status != "ok"}
        tiles = {key: tile for key, tile in tiles.items() if key not in out}
    return rows


def local_bytes(tiles: Mapping[str, ForwardWgmmaConfig]) -> dict[str, int]:
    """Local memory per thread of every tile's kernel, all of them compiled at once.

    A kernel that does not compile is not among them: its candidate will say why.
    """
    device_id = torch.cuda.current_device()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loads = {key: pool.submit(compiler.load, tile, device_id) for key, tile in tiles.items()}
    kernels = {key: load.result() for key, load in loads.items() if load.exception() is None}
    return {key: int(kernel.module[1].attributes["local_size_bytes"]) for key, kernel in kernels.items()}


def run_workload(
    workload: Workload,
    head_dim_v: int,
    tiles: Mapping[str, ForwardWgmmaConfig],
    spills: Mapping[str, str],
    timer: Timer | None,
    rounds: int,
    device: str,
) -> list[Row]:
    """Rows of tiles and yardstick on one workload; without a timer of the tiles alone, which have to be right."""
    inputs, reference = operands(workload, head_dim_v, device)

    def check(contestant: str, call: Call) -> float:
        print(f"{contestant} on {workload}", flush=True)
        inputs.poison()
        (out,) = call()
        return reference.error("forward", [F.pad(out, (0, workload.head_dim - head_dim_v))])

    contestants = [
        Candidate(key, functools.partial(tile_call, tile, workload, inputs), spills.get(key))
        for key, tile in tiles.items()
    ]
    if timer is None:
        return run_case(Case("tune", FIRST, workload, "ms"), contestants, check, untimed, 0)
    (peer,) = select([YARDSTICK])
    prepare = functools.partial(peer.forward, workload, inputs)
    contestants.append(Candidate(peer.name, prepare, peer.unsupported(workload)))
    # FLOPs are counted with one head_dim: where v has its own, a measure by another name has no rate.
    measure = "forward" if head_dim_v == workload.head_dim else f"forward, head_dim_v {head_dim_v}"
    return run_case(Case("tune", measure, workload, "ms"), contestants, check, timer, rounds)


def untimed(calls: Mapping[str, Call], rounds: int) -> dict[str, Spread]:
    """The ``Timer`` of a case that is only checked."""
    return {}


def operands(workload: Workload, head_dim_v: int, device: str) -> tuple[Inputs, Reference]:
    """Operands whose v has head_dim_v columns, and the reference for them.

    The reference knows one head_dim only, and v with zeros in its other columns gives the same output but for zeros.
    """
    inputs = Inputs.random(workload, device)
    inputs.v[..., head_dim_v:] = 0
    return replace(inputs, v=inputs.v[..., :head_dim_v].contiguous()), Reference(workload, inputs)


def tile_call(tile: ForwardWgmmaConfig, workload: Workload, inputs: Inputs) -> Call:
    """The forward with this tile, launched as ``cuflash.attention`` launches those of the table."""
    w, device_id = workload, torch.cuda.current_device()
    q, k, v = inputs.q, inputs.k, inputs.v
    shape = (*q.shape[:-1], v.shape[-1])
    problem = Problem(
        w.dtype, w.batch, w.num_heads, w.num_heads_kv, w.seqlen_q, w.seqlen_k, w.head_dim, v.shape[-1],
        w.scale, w.band,
    )  # fmt: skip
    strides = [tensor.stride()[:3] for tensor in (q, k, v, q.new_empty(shape, device="meta"))]
    plan = wgmma_plan(tile, problem, DeviceInfo.current(device_id))
    launch = ForwardCall(problem, device_id, *strides, plan=plan)

    def forward() -> tuple[Tensor, ...]:
        out = q.new_empty(shape)
        stream = torch.cuda.current_stream().cuda_stream
        launch(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0, stream)
        return (out,)

    return Call(forward)


# --- what came of it ------------------------------------------------------------------------------


def ranking(rows: Iterable[Row]) -> dict[str, dict[Workload, float]]:
    """Speed of the tiles on each workload, the best geometric mean first; only of those timed on every workload.

    Speed is cuDNN's time over the tile's; where cuDNN declines, the time of the fastest tile over it: any yardstick
    of a workload gives the same order.
    """
    times: dict[Workload, dict[str, float]] = {}
    for row in rows:
        if row.median is not None:
            times.setdefault(row.workload, {})[row.provider] = row.median
    speeds: dict[str, dict[Workload, float]] = {}
    for workload, case in times.items():
        yardstick = case.pop(YARDSTICK, None) or min(case.values())
        for key, seconds in case.items():
            speeds.setdefault(key, {})[workload] = yardstick / seconds
    complete = [key for key, cells in speeds.items() if len(cells) == len(times)]
    return {key: speeds[key] for key in sorted(complete, key=lambda key: -score(speeds[key]))}


def score(cells: Mapping[Workload, float]) -> float:
    """What tiles are ranked by."""
    return geometric_mean(list(cells.values()))


def summary(head_dim: int, head_dim_v: int, ranked: Mapping[str, Mapping[Workload, float]]) -> str:
    """The best tiles as a table, and the present ones wherever they came in."""
    known = {name(tile) for tile in present(head_dim, head_dim_v)}
    shown = [key for place, key in enumerate(ranked) if place < BEST or key in known]
    workloads = [*next(iter(ranked.values()), {})]
    header = [f"{w.seqlen_q} {'causal' if w.is_causal else 'full'}" for w in workloads]
    lines = [
        [
            key.removeprefix(f"{OURS}-") + " (present)" * (key in known),
            *(f"{value:.3f}" for value in (score(ranked[key]), *ranked[key].values())),
        ]
        for key in shown
    ]
    title = f"{len(ranked)} tiles, time of {YARDSTICK} (where it declines, of the fastest of them) over theirs"
    return f"{title}:\n\n" + table(["tile", "score", *header], lines)


# --- the table ------------------------------------------------------------------------------------


def entry(ranked: Mapping[str, Mapping[Workload, float]], tiles: Iterable[ForwardWgmmaConfig]) -> Entry | None:
    """The entry of the best tile that may be first, and of each smaller block_m the best with its block_n.

    None where nothing that may be first was ranked.
    """
    by_name = {name(tile): tile for tile in tiles}
    best: dict[tuple[int, int], str] = {}  # by block_m and block_n
    for key in ranked:
        best.setdefault((by_name[key].block_m, by_name[key].block_n), key)
    winner = next((key for (block_m, _), key in best.items() if block_m in FIRST_BLOCK_M), None)
    if winner is None:
        return None
    first = by_name[winner]
    longest = max((w for w in ranked[winner] if not w.is_causal), key=lambda w: w.seqlen_q)
    rows = []
    for block_m in sorted(CONSUMER_REGISTERS, reverse=True):
        chosen = best.get((block_m, first.block_n))
        if chosen is not None and block_m <= first.block_m:
            cost = ranked[winner][longest] / ranked[chosen][longest] * block_m / first.block_m
            tile = by_name[chosen]
            rows.append((block_m, tile.num_stages, tile.q_stages, tile.ping_pong, round(cost, 2)))
    return first.block_n, tuple(rows)


def table_lines(entries: Mapping[tuple[int, int], Entry]) -> list[str]:
    """Entries as the table has them."""
    return [f"    {pair}: {found}," for pair, found in entries.items()]


def rewritten(text: str, winners: Mapping[tuple[int, int], Entry]) -> str:
    """``text`` of configs.py with the winners in its table; other entries stay."""
    literal = re.search(r"^_FORWARD_WGMMA\b[^=]*= (\{.*?^\})$", text, re.MULTILINE | re.DOTALL)
    if literal is None:
        raise ValueError("configs.py has no literal _FORWARD_WGMMA")
    entries = ast.literal_eval(literal[1]) | dict(winners)
    return text[: literal.start(1)] + "\n".join(["{", *table_lines(entries), "}"]) + text[literal.end(1) :]
