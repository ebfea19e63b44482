"""Problem x Device -> Plan: which kernel, which configuration, which grid.

Pure: no GPU, no clock, no environment is looked at, so that a plan can be printed and tested anywhere.
The choice depends on dtype, head dims, lengths and architecture but never on the batch, so that a sequence gets
the same bits alone and in company.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from . import configs
from .configs import Config
from .problem import Problem


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
    total: int
    delta: int = 0

    @classmethod
    def of(cls, problem: Problem, block_m: int, itemsize: int, dq_columns: int, semaphores: int) -> Workspace:
        """Parts for rows in tiles of `block_m`, float32 or float64 sums, and semaphores per tile."""
        rows = _ceil_div(problem.seqlen_q, block_m) * block_m
        heads = problem.batch * problem.num_heads
        tiles = heads * rows // block_m
        sizes = (heads * rows * itemsize,) * 2 + (heads * rows * dq_columns * 4, tiles * semaphores * 4)
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + _ceil_div(size, 256) * 256)
        return cls(rows, *ends[1:])


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch: the kernel's configuration and how many blocks of it."""

    config: Config
    grid: int
    workspace: Workspace | None = None

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
        return self.workspace.total if self.workspace is not None else 0

    def __str__(self) -> str:
        workspace = f", workspace {self.workspace_bytes:,} B" if self.workspace is not None else ""
        return (
            f"{self.config.name}\n  {self.config.cpp}\n"
            f"  grid {self.grid} x {self.block} threads, {self.smem_bytes:,} B of shared memory{workspace}"
        )


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _tensor_core(problem: Problem, device: DeviceInfo, family: str) -> tuple[str, int, int] | None:
    """Arithmetic and padded head dims on tensor cores; None where the SIMT kernels have to compute."""
    if family == "simt":
        return None
    mma = configs.mma_of(problem.dtype, problem.precision, device.arch)
    head_dims = configs.pad_head_dims(problem.head_dim, problem.head_dim_v)
    if mma is not None and head_dims is not None:
        return mma, *head_dims
    if family == "mma":
        raise ValueError(
            f"CUFLASH_KERNEL: got mma for {problem.dtype} with head_dim {problem.head_dim} and head_dim_v "
            f"{problem.head_dim_v} on sm_{device.arch}, which no such kernel computes; wanted auto or simt"
        )
    return None


def plan_forward(problem: Problem, device: DeviceInfo, family: str = "auto") -> Plan:
    """The launch that computes ``out`` and ``lse``; `family` is ``CUFLASH_KERNEL``'s value."""
    p = problem
    choice = _tensor_core(p, device, family)
    if choice is None:
        simt = configs.forward_simt_config(p.dtype, p.head_dim_v)
        chunks = _ceil_div(p.head_dim_v, simt.columns)
        return Plan(simt, chunks * _ceil_div(p.seqlen_q, simt.block_m) * p.num_heads * p.batch)
    mma, head_dim, head_dim_v = choice
    config = configs.forward_mma_config(mma, device.arch, head_dim, head_dim_v, p.vectorized)
    return Plan(config, _ceil_div(p.seqlen_q, config.block_m) * p.num_heads * p.batch)


def plan_backward(problem: Problem, device: DeviceInfo, family: str = "auto") -> tuple[Plan, ...]:
    """The launches that compute the gradients, in order; all share one workspace."""
    choice = _tensor_core(problem, device, family)
    if choice is None:
        return _plan_backward_simt(problem)
    mma, head_dim, head_dim_v = choice
    p = problem
    main = configs.backward_mma_config(mma, device.arch, head_dim, head_dim_v, p.vectorized, p.deterministic)
    return plans_around(main, problem)


def _plan_backward_simt(problem: Problem) -> tuple[Plan, ...]:
    p = problem
    delta, dkdv, dq = configs.backward_simt_configs(p.dtype, p.head_dim, p.head_dim_v)
    workspace = Workspace.of(p, 1, 8 if p.dtype == "float64" else 4, 0, 0)
    dkdv_chunks = _ceil_div(max(p.head_dim, p.head_dim_v), dkdv.columns)
    dq_chunks = _ceil_div(p.head_dim, dq.columns)
    return (
        Plan(delta, _ceil_div(p.seqlen_q, delta.num_warps) * p.num_heads * p.batch, workspace),
        Plan(dkdv, dkdv_chunks * _ceil_div(p.seqlen_k, dkdv.block_n) * p.num_heads_kv * p.batch, workspace),
        Plan(dq, dq_chunks * _ceil_div(p.seqlen_q, dq.block_m) * p.num_heads * p.batch, workspace),
    )


def plans_around(main: configs.BackwardMmaConfig, problem: Problem) -> tuple[Plan, ...]:
    """Preprocess and convert kernels that fit a main kernel, and their grids."""
    p = problem
    preprocess, convert = configs.backward_companions(main)
    workspace = Workspace.of(p, main.block_m, 4, main.head_dim, preprocess.semaphores)
    tiles = workspace.rows // main.block_m * p.num_heads * p.batch
    return (
        Plan(preprocess, tiles, workspace),
        Plan(main, _ceil_div(p.seqlen_k, main.block_n) * p.num_heads_kv * p.batch, workspace),
        Plan(convert, tiles, workspace),
    )
