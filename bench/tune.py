"""Tune: every plausible tile of a Hopper kernel, ranked beside cuDNN; with ``--write``, the winners as the table.

A tile that deadlocks takes the process with it, so each is named on stderr before it is launched, on a small problem
first: the last name is that of the culprit, and the tables of the head dims before it have been printed and written.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from cuflash import compile as compiler
from cuflash import configs
from cuflash.configs import Config
from cuflash.plan import DeviceInfo

from . import runner
from .check import Inputs, Reference
from .providers import OURS, select
from .report import geometric_mean, table
from .rows import Row
from .runner import Candidate, Case, Timer, run_case
from .shapes import Workload, grid
from .tiles import ARCH, MMA, TILES, Entry, Ranking, Tiles
from .timing import Call, CudaTimer, Spread

DTYPE = "bfloat16"

#: Whose time scores are relative to, so that they can be averaged over workloads.
YARDSTICK = "sdpa-cudnn"

#: Batch, heads and length of the problem that each tile has to survive first: more tiles than a GPU has
#: multiprocessors and more steps in each than there are stages, so that all rings wrap, and a length that no block
#: divides.
SMALL = (2, 20, 1000)

#: The measure of that problem, which nobody times.
FIRST = "first answer"

#: Lines of a printed table.
BEST = 8

#: The file that ``--write`` changes.
TABLE_FILE = Path(configs.__file__)


@dataclass(frozen=True, slots=True)
class Options(runner.Options):
    """The shared options, whose tiles are swept, and whether the winners become the table."""

    measure: str = "forward"
    write: bool = False


def run(options: Options) -> list[Row]:
    """Rows of every head dim; tables go to stdout, all else that is printed to stderr."""
    arch = DeviceInfo.current(torch.cuda.current_device()).arch
    if not configs.has_wgmma(MMA, arch):
        raise SystemExit(f"tune: the tiles are those of sm_{ARCH}, and this is sm_{arch}")
    lengths = options.lens or ((4096,) if options.quick else (1024, 4096, 16384))
    timer, kernel = CudaTimer(), TILES[options.measure]
    rows = []
    winners: dict[tuple[int, int], Entry] = {}
    for pair in select_pairs(options.dims or ((64, 128) if options.quick else ())):
        tiles = kernel(*pair)
        with contextlib.redirect_stdout(sys.stderr):
            swept = sweep(tiles, lengths, timer, options.num_rounds())
        rows += swept
        ranked = ranking(swept)
        print(f"\n{pair[0]}x{pair[1]}, {summary(tiles, ranked)}", flush=True)
        if found := tiles.entry(ranked):
            winners[pair] = found
        if options.write:
            text = TABLE_FILE.read_text(encoding="utf-8")
            TABLE_FILE.write_text(rewritten(text, kernel.table, winners), encoding="utf-8")
    print("\nwinners:", *table_lines(winners), sep="\n", flush=True)
    return rows


def select_pairs(dims: Iterable[int]) -> list[tuple[int, int]]:
    """Padded head dims (of q and k, of v) whose first is one of ``dims``, all where that is empty."""
    wanted = tuple(dims)
    known = [head_dim for head_dim, _ in configs.HEAD_DIM_PAIRS]
    if unknown := [str(head_dim) for head_dim in wanted if head_dim not in known]:
        raise ValueError(f"no kernel is compiled for head_dim {', '.join(unknown)}; known: {sorted(set(known))}")
    return [pair for pair in configs.HEAD_DIM_PAIRS if not wanted or pair[0] in wanted]


# --- the sweep ------------------------------------------------------------------------------------


def sweep(tiles: Tiles[Any], lengths: Iterable[int], timer: Timer, rounds: int, device: str = "cuda") -> list[Row]:
    """Rows of all tiles: the small problem, then the grid. Who spills, is wrong or fails is out from there on."""
    left = tiles.by_name()
    spills = {key: f"{size} bytes of local memory" for key, size in local_bytes(left).items() if size}
    rows: list[Row] = []
    first = [Workload(DTYPE, *SMALL, tiles.head_dim, is_causal) for is_causal in (False, True)]
    for workload in (*first, *grid(DTYPE, (tiles.head_dim,), lengths)):
        rows += run_workload(workload, tiles, left, spills, None if workload in first else timer, rounds, device)
        out = {row.provider for row in rows if row.status != "ok"}
        left = {key: tile for key, tile in left.items() if key not in out}
    return rows


def local_bytes(tiles: Mapping[str, Config]) -> dict[str, int]:
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
    tiles: Tiles[Any],
    left: Mapping[str, Config],
    spills: Mapping[str, str],
    timer: Timer | None,
    rounds: int,
    device: str,
) -> list[Row]:
    """Rows of the tiles left and of the yardstick; without a timer of the tiles alone, which have to be right."""
    inputs, reference = operands(workload, tiles.head_dim_v, device)

    def check(contestant: str, call: Call) -> float:
        print(f"{contestant} on {workload}", flush=True)
        inputs.poison()
        padded = [F.pad(tensor, (0, workload.head_dim - tensor.shape[-1])) for tensor in call()]
        return reference.error(tiles.measure, padded)

    contestants = [
        Candidate(key, functools.partial(tiles.call, tile, workload, inputs), spills.get(key))
        for key, tile in left.items()
    ]
    if timer is None:
        return run_case(Case("tune", FIRST, workload, "ms"), contestants, check, untimed, 0)
    (peer,) = select([YARDSTICK])
    prepare = functools.partial(peer.call, tiles.measure, workload, inputs)
    contestants.append(Candidate(peer.name, prepare, peer.unsupported(workload)))
    # FLOPs are counted with one head_dim: where v has its own, a measure by another name has no rate.
    own = "" if tiles.head_dim_v == workload.head_dim else f", head_dim_v {tiles.head_dim_v}"
    return run_case(Case("tune", tiles.measure + own, workload, "ms"), contestants, check, timer, rounds)


def untimed(calls: Mapping[str, Call], rounds: int) -> dict[str, Spread]:
    """The ``Timer`` of a case that is only checked."""
    return {}


def operands(workload: Workload, head_dim_v: int, device: str) -> tuple[Inputs, Reference]:
    """Operands of which v and d_out have head_dim_v columns, and the reference for them.

    The reference knows one head_dim only. With zeros in the other columns of v and d_out its results are the same, but
    for zeros in those columns of out and d_v.
    """
    inputs = Inputs.random(workload, device)
    for tensor in (inputs.v, inputs.d_out):
        tensor[..., head_dim_v:] = 0
    v, d_out = (tensor[..., :head_dim_v].contiguous() for tensor in (inputs.v, inputs.d_out))
    return replace(inputs, v=v, d_out=d_out), Reference(workload, inputs)


# --- what came of it ------------------------------------------------------------------------------


def ranking(rows: Iterable[Row]) -> Ranking:
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


def summary(tiles: Tiles[Any], ranked: Ranking) -> str:
    """The best tiles as a table, and the present ones wherever they came in."""
    known = {tiles.name(tile) for tile in tiles.present()}
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


def table_lines(entries: Mapping[tuple[int, int], Entry]) -> list[str]:
    """Entries as the table has them."""
    return [f"    {pair}: {found}," for pair, found in entries.items()]


def rewritten(text: str, name: str, winners: Mapping[tuple[int, int], Entry]) -> str:
    """``text`` of configs.py with the winners in the table of that name; other entries stay."""
    literal = re.search(rf"^{name}\b[^=]*= (\{{.*?^\}})$", text, re.MULTILINE | re.DOTALL)
    if literal is None:
        raise ValueError(f"configs.py has no literal {name}")
    entries = ast.literal_eval(literal[1]) | dict(winners)
    return text[: literal.start(1)] + "\n".join(["{", *table_lines(entries), "}"]) + text[literal.end(1) :]
