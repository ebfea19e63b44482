"""Kernel configurations: tile tables per kernel, architecture and head_dim.

A configuration is everything that changes the *shape of the code*; it has the same fields, in the same
order, as the C++ struct of the same name in ``kernels_cu/attention/config.cuh`` and is compiled into one
kernel. What is not a field (lengths, strides, scale, window) is a run-time parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import ClassVar, TypeVar

from .problem import ITEMSIZE, Features, Mod

#: (head_dim, head_dim_v) that have kernels; others are padded inside the kernel to the next pair.
HEAD_DIM_PAIRS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
#: Architectures that the tables are written for, and the -arch of NVRTC.
ARCHS = (75, 80, 86, 89, 90, 100, 120)
#: Shared memory a block may use, in bytes, by compute capability.
SMEM_PER_BLOCK = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

_MMA_CPP = {"f16": "kF16", "bf16": "kBF16", "f16_turing": "kF16Turing", "tf32": "kTF32", "tf32x3": "kTF32x3"}
_COPY_CPP = {"tma": "kTma", "async": "kAsync", "vector": "kVector", "element": "kElement"}
_DTYPE_CPP = {"float16": "kF16", "bfloat16": "kBF16", "float32": "kF32", "float64": "kF64"}
_STEP_CPP = {"delta": "kDelta", "dkdv": "kDKDV", "dq": "kDQ", "captured": "kCaptured", "bias": "kBias"}
_ENUMS = {
    "mma": ("Mma", _MMA_CPP),
    "copy": ("Copy", _COPY_CPP),
    "dtype": ("Dtype", _DTYPE_CPP),
    "step": ("BackwardStep", _STEP_CPP),
}


def pad_head_dims(head_dim: int, head_dim_v: int) -> tuple[int, int] | None:
    """Smallest pair of head dims that has kernels and holds the given ones; None where none does."""
    return next((pair for pair in HEAD_DIM_PAIRS if pair[0] >= head_dim and pair[1] >= head_dim_v), None)


def smem_limit(arch: int) -> int:
    """Shared memory of a block on the nearest architecture at or below `arch`."""
    return SMEM_PER_BLOCK[max(known for known in ARCHS if known <= arch)]


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def _elem_bytes(mma: str) -> int:
    return 4 if mma.startswith("tf32") else 2


def _acc_bytes(dtype: str) -> int:
    """Bytes of the type that the SIMT kernels compute in."""
    return 8 if dtype == "float64" else 4


def _block_gemm_bytes(dtype: str, rows: int, cols: int, columns: int) -> int:
    """``BlockGemm::kBytes`` of ``tile/block_gemm.cuh``: the operand stage and P, rows padded by 16 bytes."""
    size = _acc_bytes(dtype)
    depth_nn = 8192 // (columns * size)
    stage = max((rows + cols) * (64 + 16), depth_nn * columns * size)
    return stage + rows * (cols * size + 16)


class Config:
    """What every configuration knows: how to name itself and how to appear in C++."""

    header: ClassVar[str]
    function: ClassVar[str]
    params: ClassVar[str]
    #: C++ template that lays out the shared memory, whose size is to be `smem_bytes`; empty where there is none.
    tiles: ClassVar[str] = ""
    #: Fields that only Python and the launch bounds read.
    host_fields: ClassVar[frozenset[str]] = frozenset({"min_blocks", "tuned"})
    #: Blocks per multiprocessor that registers have to suffice for.
    min_blocks: int
    num_warps: int
    #: Whether the kernel does without tensor cores.
    is_simt: ClassVar[bool] = False

    #: Whether the kernel's instructions exist on one architecture only, and not on later ones.
    arch_specific: ClassVar[bool] = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.num_warps

    @property
    def mod(self) -> Mod | None:
        """The expression by which scores are changed, if there is one."""
        score: ScoreConfig | None = getattr(self, "score", None)
        return None if score is None else score.mod

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name of the kernel, unique among configurations."""
        raise NotImplementedError

    @property
    def rounding(self) -> tuple[object, ...]:
        """What the bits of a result depend on: configurations that agree in this are free to replace each other."""
        return (self,)

    @property
    def cpp(self) -> str:
        """The configuration as a C++ designated initialiser."""
        parts = []
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in self.host_fields:
                continue
            if isinstance(value, ScoreConfig):
                text = value.cpp
            elif field.name in _ENUMS:
                enum, names = _ENUMS[field.name]
                text = f"{enum}::{names[value]}"
            else:
                text = str(value).lower() if isinstance(value, bool) else str(value)
            parts.append(f".{field.name} = {text}")
        return f"{type(self).__name__}{{{', '.join(parts)}}}"


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """What is done to scores and weights beside scaling: ``attention/score.cuh``."""

    softcap: bool = False
    mod: Mod | None = None
    mask: bool = False
    bias: str | None = None
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False

    @classmethod
    def of(cls, features: Features) -> ScoreConfig:
        """What a call with these features has."""
        f = features
        return cls(
            f.softcap is not None,
            f.mod,
            f.mask is not None,
            f.bias,
            f.alibi_slopes is not None,
            f.sinks is not None,
            f.dropout_p > 0,
        )

    def any(self) -> bool:
        """Whether anything is done."""
        return self != ScoreConfig()

    @property
    def bends(self) -> bool:
        """Whether derivatives of scores by q.k are not all the scale."""
        return self.softcap or self.mod is not None

    @property
    def name(self) -> str:
        """Part of a kernel's name; empty where nothing is done."""
        names = [name for name in ("softcap", "mask", "alibi", "sinks", "dropout") if getattr(self, name)]
        first = [f"mod_{_digest(self.mod)}"] if self.mod else []
        first += [f"bias_{self.bias}"] if self.bias else []
        return "".join(f"_{name}" for name in first + names)

    @property
    def cpp(self) -> str:
        flags = {field.name: str(getattr(self, field.name)).lower() for field in fields(self)}
        flags["mod"] = str(self.mod is not None).lower()
        flags["bias"] = f"Bias::{_DTYPE_CPP[self.bias] if self.bias else 'kNone'}"
        return f"{{{', '.join(f'.{name} = {value}' for name, value in flags.items())}}}"


def _digest(mod: Mod) -> str:
    text = repr((mod.expression.text, list(mod.expression.captures.items()), mod.dtypes))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True, slots=True)
class TileConfig(Config):
    """What the main kernels on tensor cores have in common: their arithmetic, and the tile of scores."""

    mma: str
    copy: str
    head_dim: int
    head_dim_v: int
    block_m: int
    block_n: int

    @property
    def elem_bytes(self) -> int:
        return _elem_bytes(self.mma)

    @property
    def tile_name(self) -> str:
        """First part of the name."""
        return (
            f"attention_{self.function}_{self.mma}_d{self.head_dim}_dv{self.head_dim_v}_m{self.block_m}_n{self.block_n}"
        )


@dataclass(frozen=True, slots=True)
class ForwardMmaConfig(TileConfig):
    """``forward_mma.cuh``."""

    num_warps: int
    num_stages: int = 2
    overlap: bool = False
    min_blocks: int = 1
    tuned: bool = True
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "forward_mma.cuh"
    function: ClassVar[str] = "forward_mma"
    params: ClassVar[str] = "ForwardParams"
    tiles: ClassVar[str] = "ForwardMmaTiles"

    @property
    def smem_bytes(self) -> int:
        q_or_out = self.block_m * max(self.head_dim, self.head_dim_v)
        stages = self.num_stages * self.block_n * (self.head_dim + self.head_dim_v)
        return (q_or_out + stages) * self.elem_bytes

    @property
    def name(self) -> str:
        return f"{self.tile_name}_w{self.num_warps}{'_overlap' if self.overlap else ''}_{self.copy}{self.score.name}"


@dataclass(frozen=True, slots=True)
class ForwardWgmmaConfig(TileConfig):
    """``forward_wgmma.cuh``."""

    num_stages: int = 2
    q_stages: int = 2
    ping_pong: bool = True
    bias_stages: int = 0
    min_blocks: int = 1
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "forward_wgmma.cuh"
    function: ClassVar[str] = "forward_wgmma"
    params: ClassVar[str] = "ForwardWgmmaParams"
    tiles: ClassVar[str] = "ForwardWgmmaTiles"
    arch_specific: ClassVar[bool] = True

    @property
    def num_warps(self) -> int:  # type: ignore[override]
        return 4 * (self.block_m // 64 + 1)

    @property
    def rounding(self) -> tuple[object, ...]:
        # A warp's 16 queries are the same in tiles of any multiple of 64, and so are the blocks of keys they see.
        return (self.function, self.mma, self.head_dim, self.head_dim_v, self.block_n)

    @property
    def smem_bytes(self) -> int:
        # Tile rows are whole slabs of 64 columns.
        columns, columns_v = (ceil_div(dim, 64) * 64 for dim in (self.head_dim, self.head_dim_v))
        stage = self.block_n * (columns + columns_v)
        elems = self.q_stages * self.block_m * columns + self.num_stages * stage
        elems += self.bias_stages * self.block_m * ceil_div(self.block_n, 64) * 64
        return 2 * elems + 32 * (self.q_stages + self.num_stages) + 16 * self.bias_stages

    @property
    def name(self) -> str:
        return (
            f"{self.tile_name}_s{self.num_stages}_q{self.q_stages}{'_pingpong' if self.ping_pong else ''}_{self.copy}"
            f"{self.score.name}{f'_b{self.bias_stages}' if self.bias_stages else ''}"
        )


@dataclass(frozen=True, slots=True)
class BackwardMmaConfig(TileConfig):
    """``backward_mma.cuh``."""

    num_warps: int
    num_stages: int
    dq_warps_m: int
    reduce_width: int
    min_blocks: int = 1
    deterministic: bool = False
    tuned: bool = True
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "backward_mma.cuh"
    function: ClassVar[str] = "backward_mma"
    params: ClassVar[str] = "BackwardParams"
    tiles: ClassVar[str] = "BackwardMmaTiles"

    #: Whether warps hold columns of d_q as the rows of their accumulators.
    dq_transposed: ClassVar[bool] = False

    @property
    def dq_columns(self) -> int:
        """Columns of d_q that the workspace holds."""
        return self.head_dim

    @property
    def dq_layout(self) -> tuple[int, int, int]:
        """Warps, those along the rows of a d_q tile, and how many floats they add at once."""
        return self.num_warps, self.dq_warps_m, self.reduce_width

    @property
    def listed(self) -> bool:
        """Whether tiles that a mask hides are skipped: turns are counted by the band alone."""
        return self.score.mask and not self.deterministic

    @property
    def smem_bytes(self) -> int:
        row = self.head_dim + self.head_dim_v
        stage = self.block_m * row + self.block_n * self.block_m  # Q, dO and dS
        handed_over = 2 if self.score.bends else 1  # P, and the derivative of the scores
        elems = self.block_n * row + handed_over * self.block_n * self.block_m + self.num_stages * stage
        return elems * self.elem_bytes + self.num_stages * 2 * self.block_m * 4

    @property
    def name(self) -> str:
        return (
            f"{self.tile_name}_w{self.num_warps}_s{self.num_stages}_q{self.dq_warps_m}_r{self.reduce_width}_{self.copy}"
            f"{'_deterministic' if self.deterministic else ''}{self.score.name}"
        )

    @property
    def slope_sums(self) -> int:
        """How many sums a tile of keys leaves of the gradient of ALiBi's slope of a head."""
        return self.num_warps // 2


@dataclass(frozen=True, slots=True)
class BackwardWgmmaConfig(TileConfig):
    """``backward_wgmma.cuh``."""

    kv_stages: int = 1
    num_stages: int = 2
    overlap: bool = False
    deterministic: bool = False
    min_blocks: int = 1
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "backward_wgmma.cuh"
    function: ClassVar[str] = "backward_wgmma"
    params: ClassVar[str] = "BackwardWgmmaParams"
    tiles: ClassVar[str] = "BackwardWgmmaTiles"
    arch_specific: ClassVar[bool] = True

    @property
    def listed(self) -> bool:
        """Whether tiles that a mask hides are skipped: turns are counted by the band alone."""
        return self.score.mask and not self.deterministic

    @property
    def by_role(self) -> bool:
        """Whether two warpgroups share the work on 64 keys by what they compute; on more, each has 64 of its own."""
        return self.block_n == 64

    @property
    def num_warps(self) -> int:  # type: ignore[override]
        return 12 if self.by_role else 4 * (self.block_n // 64 + 1)

    @property
    def dq_transposed(self) -> bool:
        """Whether warpgroups share a tile of d_q by columns, as 64 rows each would not make it up."""
        return self.by_role or self.block_m != self.block_n

    @property
    def dq_columns(self) -> int:
        """Columns of d_q that the workspace holds."""
        return 16 * self.dq_layout[0] if self.dq_transposed else self.head_dim

    @property
    def dq_layout(self) -> tuple[int, int, int]:
        """Warps, those along the rows of a d_q tile, and how many floats they add at once."""
        warps = ceil_div(self.head_dim, 64) * 4 if self.dq_transposed else self.block_n // 16
        return warps, warps, 4

    @property
    def smem_bytes(self) -> int:
        columns, columns_v = (ceil_div(dim, 64) * 64 for dim in (self.head_dim, self.head_dim_v))
        elems = (self.kv_stages * self.block_n + self.num_stages * self.block_m) * (columns + columns_v)
        # dS twice, and P where others need it, with the derivative of the scores if there is one.
        elems += (2 + (1 + self.score.bends) * self.by_role) * self.block_m * self.block_n
        stats = 2 * self.num_stages * ceil_div(self.block_m * 4, 128) * 128
        barriers = 5 + 4 * self.kv_stages + 3 * self.num_stages
        return 2 * elems + stats + 1024 + 32 * self.num_stages + 4 * 48 + 16 + 8 * barriers

    @property
    def name(self) -> str:
        stages = f"kv{self.kv_stages}_s{self.num_stages}{'_overlap' if self.overlap else ''}"
        return f"{self.tile_name}_{stages}_{self.copy}{'_deterministic' if self.deterministic else ''}{self.score.name}"

    @property
    def slope_sums(self) -> int:
        """How many sums a tile of keys leaves of the gradient of ALiBi's slope of a head."""
        return 4


@dataclass(frozen=True, slots=True)
class BackwardPreprocessConfig(Config):
    """``backward_preprocess.cuh``."""

    mma: str
    copy: str
    dq_columns: int
    head_dim_v: int
    block_m: int
    num_warps: int
    semaphores: int
    min_blocks: int = 1

    header: ClassVar[str] = "backward_preprocess.cuh"
    function: ClassVar[str] = "backward_preprocess"
    params: ClassVar[str] = "BackwardParams"

    @property
    def smem_bytes(self) -> int:
        return 0

    @property
    def name(self) -> str:
        return (
            f"attention_backward_preprocess_{self.mma}_d{self.dq_columns}_dv{self.head_dim_v}_m{self.block_m}"
            f"_x{self.semaphores}_{self.copy}"
        )


@dataclass(frozen=True, slots=True)
class BackwardConvertConfig(Config):
    """``backward_convert.cuh``."""

    mma: str
    copy: str
    head_dim: int
    block_m: int
    num_warps: int
    dq_warps_m: int
    reduce_width: int
    transposed: bool = False
    min_blocks: int = 1

    header: ClassVar[str] = "backward_convert.cuh"
    function: ClassVar[str] = "backward_convert"
    params: ClassVar[str] = "BackwardParams"

    @property
    def smem_bytes(self) -> int:
        return self.block_m * self.head_dim * _elem_bytes(self.mma)

    @property
    def name(self) -> str:
        return (
            f"attention_backward_convert_{self.mma}_d{self.head_dim}_m{self.block_m}_w{self.num_warps}"
            f"_q{self.dq_warps_m}_r{self.reduce_width}{'_t' if self.transposed else ''}_{self.copy}"
        )


@dataclass(frozen=True, slots=True)
class BackwardSinksConfig(Config):
    """``backward_sinks.cuh``."""

    dtype: str
    num_warps: int = 8
    min_blocks: int = 1

    header: ClassVar[str] = "backward_sinks.cuh"
    function: ClassVar[str] = "backward_sinks"
    params: ClassVar[str] = "BackwardParams"

    @property
    def smem_bytes(self) -> int:
        return 0

    @property
    def name(self) -> str:
        return f"attention_backward_sinks_{self.dtype}"


@dataclass(frozen=True, slots=True)
class BackwardCapturedConfig(TileConfig):
    """``backward_captured.cuh``, after a main kernel with parameters of that name."""

    main_params: str
    min_blocks: int = 1
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "backward_captured.cuh"
    function: ClassVar[str] = "backward_captured"
    tiles: ClassVar[str] = "RecomputedTiles"
    host_fields: ClassVar[frozenset[str]] = TileConfig.host_fields | {"main_params"}

    @property
    def params(self) -> str:  # type: ignore[override]
        return self.main_params

    @property
    def num_warps(self) -> int:  # type: ignore[override]
        return self.block_m // 16

    @property
    def smem_bytes(self) -> int:
        return (self.block_m + self.block_n) * (self.head_dim + self.head_dim_v) * self.elem_bytes

    @property
    def name(self) -> str:
        of_main = self.main_params.removeprefix("Backward").removesuffix("Params").lower()
        return f"{self.tile_name}_{self.copy}{f'_{of_main}' if of_main else ''}{self.score.name}"


@dataclass(frozen=True, slots=True)
class BackwardBiasConfig(BackwardCapturedConfig):
    """``backward_bias.cuh``, which takes the tiles of ``backward_captured.cuh``."""

    header: ClassVar[str] = "backward_bias.cuh"
    function: ClassVar[str] = "backward_bias"


@dataclass(frozen=True, slots=True)
class WeightsConfig(Config):
    """``weights.cuh``."""

    mma: str
    copy: str
    head_dim: int
    block_m: int
    block_n: int
    sums: bool
    min_blocks: int = 1
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "weights.cuh"
    function: ClassVar[str] = "weights"
    params: ClassVar[str] = "WeightsParams"
    tiles: ClassVar[str] = "WeightsTiles"

    @property
    def num_warps(self) -> int:  # type: ignore[override]
        return self.block_m // 16

    @property
    def smem_bytes(self) -> int:
        return (self.block_m + self.block_n) * self.head_dim * _elem_bytes(self.mma)

    @property
    def name(self) -> str:
        tile = f"d{self.head_dim}_m{self.block_m}_n{self.block_n}"
        return f"attention_weights_{self.mma}_{tile}_{self.copy}{'_sums' if self.sums else ''}{self.score.name}"


@dataclass(frozen=True, slots=True)
class WeightsSimtConfig(Config):
    """``weights_simt.cuh``."""

    dtype: str
    block_m: int
    block_n: int
    columns: int
    num_warps: int
    sums: bool
    min_blocks: int = 1
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "weights_simt.cuh"
    function: ClassVar[str] = "weights_simt"
    params: ClassVar[str] = "WeightsParams"
    is_simt: ClassVar[bool] = True

    @property
    def smem_bytes(self) -> int:
        return _block_gemm_bytes(self.dtype, self.block_m, self.block_n, self.columns)

    @property
    def name(self) -> str:
        return f"attention_weights_simt_{self.dtype}{'_sums' if self.sums else ''}{self.score.name}"


@dataclass(frozen=True, slots=True)
class MaskBlocksConfig(Config):
    """``mask_blocks.cuh``, for a main kernel with parameters of that name."""

    main_params: str
    block_m: int
    block_n: int
    by_keys: bool
    by_blocks: bool = False
    num_warps: int = 32
    min_blocks: int = 1

    header: ClassVar[str] = "mask_blocks.cuh"
    function: ClassVar[str] = "mask_blocks"
    host_fields: ClassVar[frozenset[str]] = frozenset({"min_blocks", "main_params"})

    @property
    def params(self) -> str:  # type: ignore[override]
        return self.main_params

    @property
    def rounding(self) -> tuple[object, ...]:
        return (self.function,)  # nothing is rounded

    @property
    def smem_bytes(self) -> int:
        return 128

    @property
    def name(self) -> str:
        family = self.main_params.removesuffix("Params").lower()
        how = f"{'_by_keys' if self.by_keys else ''}{'_by_blocks' if self.by_blocks else ''}"
        return f"attention_mask_blocks_{family}_m{self.block_m}_n{self.block_n}{how}"


@dataclass(frozen=True, slots=True)
class BackwardGatherConfig(Config):
    """``backward_gather.cuh``."""

    mma: str
    head_dim: int
    head_dim_v: int
    block_n: int
    deterministic: bool
    min_blocks: int = 1

    header: ClassVar[str] = "backward_gather.cuh"
    function: ClassVar[str] = "backward_gather"
    params: ClassVar[str] = "BackwardWgmmaParams"
    #: Warps of the main kernel that have d_k and d_v; a block sums up what one of them had.
    main_warps: ClassVar[int] = 8

    @property
    def smem_bytes(self) -> int:
        return 0

    @property
    def columns(self) -> int:
        """Those of d_k, d_v or both that a warp of the main kernel has."""
        by_role = self.block_n == 64
        return max(self.head_dim, self.head_dim_v) if by_role else self.head_dim + self.head_dim_v

    @property
    def place_elems(self) -> int:
        """Floats that a block of the main kernel leaves of a tile: ``PartAccum`` of ``tile_parts.cuh``."""
        return self.main_warps * 16 * self.columns

    @property
    def num_warps(self) -> int:  # type: ignore[override]
        return self.columns // 32

    @property
    def name(self) -> str:
        return (
            f"attention_backward_gather_{self.mma}_d{self.head_dim}_dv{self.head_dim_v}_n{self.block_n}"
            f"{'_deterministic' if self.deterministic else ''}"
        )


@dataclass(frozen=True, slots=True)
class ForwardSimtConfig(Config):
    """``forward_simt.cuh``."""

    dtype: str
    block_m: int
    block_n: int
    columns: int
    num_warps: int
    min_blocks: int = 1
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "forward_simt.cuh"
    function: ClassVar[str] = "forward_simt"
    is_simt: ClassVar[bool] = True
    params: ClassVar[str] = "ForwardParams"

    @property
    def smem_bytes(self) -> int:
        return _block_gemm_bytes(self.dtype, self.block_m, self.block_n, self.columns)

    @property
    def name(self) -> str:
        tile = f"m{self.block_m}_n{self.block_n}_c{self.columns}_w{self.num_warps}"
        return f"attention_forward_simt_{self.dtype}_{tile}{self.score.name}"


@dataclass(frozen=True, slots=True)
class BackwardSimtConfig(Config):
    """``backward_simt.cuh``: one of its kernels, which run in the order delta, dkdv, dq, captured, bias."""

    step: str
    dtype: str
    block_m: int
    block_n: int
    columns: int
    num_warps: int
    min_blocks: int = 1
    score: ScoreConfig = ScoreConfig()

    header: ClassVar[str] = "backward_simt.cuh"
    function: ClassVar[str] = "backward_simt"
    is_simt: ClassVar[bool] = True
    params: ClassVar[str] = "BackwardParams"

    @property
    def smem_bytes(self) -> int:
        if self.step == "delta":
            return 0
        rows, cols = (self.block_n, self.block_m) if self.step == "dkdv" else (self.block_m, self.block_n)
        return _block_gemm_bytes(self.dtype, rows, cols, self.columns)

    @property
    def name(self) -> str:
        tile = "" if self.step == "delta" else f"_m{self.block_m}_n{self.block_n}_c{self.columns}"
        return f"attention_backward_simt_{self.step}_{self.dtype}{tile}_w{self.num_warps}{self.score.name}"

    @property
    def slope_sums(self) -> int:
        """How many sums a tile of keys leaves of the gradient of ALiBi's slope of a head."""
        return self.num_warps


def feasible(config: Config, arch: int) -> bool:
    """Whether a block of `config` fits the shared memory of `arch`, `min_blocks` times."""
    per_sm = smem_limit(arch) + 1024
    return config.smem_bytes <= smem_limit(arch) and config.min_blocks * (config.smem_bytes + 1024) <= per_sm


# Tiles by shared memory in KB (a class of architectures) and head_dim. The rows for 227 KB are measured on an
# H200 (bench/README.md has the ladder); the others follow from them by arithmetic: what fits, in two blocks of
# four warps or one of eight per multiprocessor.

# Forward: block_m, block_n, num_warps, min_blocks.
_ForwardRows = dict[int, tuple[int, int, int, int]]
_FORWARD_16BIT: dict[int, _ForwardRows] = {
    227: {
        32: (128, 128, 4, 2),
        64: (128, 96, 4, 2),
        96: (128, 64, 4, 2),
        128: (128, 48, 4, 2),
        192: (128, 96, 8, 1),
        256: (64, 32, 4, 1),
    },
    163: {
        32: (128, 128, 4, 2),
        64: (128, 96, 4, 2),
        96: (128, 64, 4, 2),
        128: (128, 48, 4, 2),
        192: (128, 64, 8, 1),
        256: (64, 32, 4, 1),
    },
    99: {
        32: (128, 128, 4, 2),
        64: (128, 64, 4, 2),
        96: (128, 32, 4, 2),
        128: (128, 32, 8, 1),
        192: (128, 32, 8, 1),
        256: (64, 32, 4, 1),
    },
    64: {
        32: (128, 64, 4, 1),
        64: (128, 64, 4, 1),
        96: (128, 32, 8, 1),
        128: (128, 32, 8, 1),
        192: (64, 16, 4, 1),
        256: (64, 16, 4, 1),
    },
}
_FORWARD_32BIT: dict[int, _ForwardRows] = {
    227: {
        32: (128, 32, 4, 2),
        64: (128, 32, 4, 2),
        96: (64, 32, 4, 2),
        128: (128, 32, 8, 1),
        192: (64, 16, 4, 1),
        256: (128, 16, 8, 1),
    },
    163: {
        32: (128, 32, 4, 2),
        64: (128, 32, 4, 2),
        96: (64, 32, 4, 2),
        128: (128, 32, 8, 1),
        192: (64, 16, 4, 1),
        256: (64, 16, 4, 1),
    },
    99: {
        32: (128, 32, 4, 2),
        64: (128, 32, 8, 1),
        96: (64, 32, 4, 1),
        128: (64, 16, 4, 1),
        192: (64, 16, 4, 1),
        256: (32, 16, 2, 1),
    },
}

# What is too tight for an architecture whose compiler needs more registers, by element bytes and head_dim.
_FORWARD_SM100: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (2, 32): (128, 96, 4, 2),
    (2, 64): (128, 80, 4, 2),
    (2, 96): (128, 48, 4, 2),
    (2, 128): (128, 64, 4, 2),
    (2, 192): (128, 80, 8, 1),
    (4, 64): (64, 32, 4, 2),
}
# Rows that are not worth more than being right, by element bytes, shared memory and head_dim: no tile that fits does
# without spilling registers everywhere.
_FORWARD_TIGHT = {(4, 99, 256)}


# Where scores or weights are changed, by element bytes, shared memory and head_dim: that takes registers. Not measured
# yet: the largest tiles without spills.
_FORWARD_SCORES: dict[tuple[int, int, int], tuple[int, int, int, int]] = {
    **{(2, size, dim): (128, 64, 8, 1) for size in (227, 163) for dim in (32, 64, 96, 128, 192)},
    (2, 99, 32): (128, 64, 8, 1),
    **{(2, size, 256): (64, 16, 4, 1) for size in (227, 163, 99)},
    (2, 64, 64): (128, 64, 8, 1),
    (4, 227, 128): (64, 16, 4, 1),
    (4, 227, 256): (64, 16, 4, 1),
    (4, 163, 192): (64, 32, 4, 1),
}
_FORWARD_SCORES_TIGHT = {(4, 99, 192)}


def _smem_class(arch: int) -> int:
    """The tables' entry for an architecture: the largest that fits its shared memory."""
    return max(size for size in _FORWARD_16BIT if size * 1024 <= smem_limit(arch))


def mma_of(dtype: str, precision: str, arch: int) -> str | None:
    """Tensor-core arithmetic for a dtype on an architecture; None where only the SIMT kernels compute."""
    if dtype == "float16":
        return "f16" if arch >= 80 else "f16_turing"
    if dtype == "bfloat16":
        return "bf16" if arch >= 80 else None
    if dtype == "float32" and arch >= 80:
        return "tf32" if precision == "tf32" else "tf32x3"
    return None


def has_wgmma(mma: str, arch: int) -> bool:
    """Whether the Hopper kernels compute this: their instructions exist on sm_90 alone, for 16-bit elements."""
    return arch == 90 and _elem_bytes(mma) == 2


def _copy(arch: int, vectorized: bool) -> str:
    return "element" if not vectorized else "async" if arch >= 80 else "vector"


def forward_mma_config(
    mma: str, arch: int, head_dim: int, head_dim_v: int, vectorized: bool, score: ScoreConfig = ScoreConfig()
) -> ForwardMmaConfig:
    """The row of the table for one architecture; `head_dim`s are padded ones."""
    elem_bytes, size, dim = _elem_bytes(mma), _smem_class(arch), max(head_dim, head_dim_v)
    row = (_FORWARD_16BIT if elem_bytes == 2 else _FORWARD_32BIT)[size][dim]
    if arch == 100:
        row = _FORWARD_SM100.get((elem_bytes, dim), row)
    tight = _FORWARD_TIGHT
    if score.any():
        row = _FORWARD_SCORES.get((elem_bytes, size, dim), row)
        tight = _FORWARD_TIGHT | _FORWARD_SCORES_TIGHT
    block_m, block_n, num_warps, min_blocks = row
    return ForwardMmaConfig(
        mma,
        _copy(arch, vectorized),
        head_dim,
        head_dim_v,
        block_m,
        block_n,
        num_warps,
        min_blocks=min_blocks,
        tuned=vectorized and (elem_bytes, size, dim) not in tight,
        score=score,
    )


# Hopper forward, by padded head dims: block_n, and for each block_m the num_stages, q_stages, ping_pong, and what a
# tile costs relative to the first row, which does most for its time. Smaller tiles are for when there are few.
# Measured on an H200 (bench/tune.py).
_WgmmaRow = tuple[int, int, int, bool, float]
_FORWARD_WGMMA: dict[tuple[int, int], tuple[int, tuple[_WgmmaRow, ...]]] = {
    (32, 32): (128, ((192, 4, 2, False, 1.0), (128, 4, 2, False, 0.84), (64, 3, 2, False, 0.59))),
    (64, 64): (128, ((192, 4, 2, False, 1.0), (128, 3, 2, False, 0.85), (64, 4, 2, False, 0.61))),
    (96, 96): (64, ((192, 4, 2, False, 1.0), (128, 4, 2, False, 0.81), (64, 4, 2, False, 0.6))),
    (128, 128): (64, ((192, 4, 2, False, 1.0), (128, 4, 2, False, 0.76), (64, 4, 2, False, 0.57))),
    (192, 128): (128, ((128, 2, 1, True, 1.0), (64, 2, 2, False, 0.72))),
    (192, 192): (64, ((128, 3, 1, True, 1.0), (64, 3, 2, False, 0.71))),
    (256, 256): (64, ((128, 2, 1, True, 1.0), (64, 3, 1, False, 0.6))),
}


# Where scores or weights are changed: fewer queries or keys at a time, which leaves registers for it; fewer yet with a
# bias. The first row is measured for heads of 64 and 128, and the costs are not.
_FORWARD_WGMMA_SCORES: dict[tuple[int, int], tuple[int, tuple[_WgmmaRow, ...]]] = {
    (32, 32): (128, ((128, 4, 2, False, 1.0), (64, 4, 2, False, 0.6))),
    (64, 64): (128, ((128, 3, 2, False, 1.0), (64, 4, 2, False, 0.6))),
    (96, 96): (128, ((128, 2, 2, False, 1.0), (64, 2, 2, False, 0.6))),
    (128, 128): (128, ((128, 2, 2, False, 1.0), (64, 2, 2, False, 0.6))),
    (192, 128): (64, ((128, 3, 1, False, 1.0), (64, 3, 2, False, 0.6))),
    (192, 192): (64, ((128, 2, 1, False, 1.0), (64, 3, 1, False, 0.6))),
    (256, 256): (32, ((128, 3, 1, False, 1.0), (64, 4, 2, False, 0.6))),
}
_FORWARD_WGMMA_BIAS = _FORWARD_WGMMA_SCORES | {
    (32, 32): (64, ((192, 4, 2, False, 1.0), (128, 4, 2, False, 0.85), (64, 4, 2, False, 0.6))),
    (64, 64): (64, ((192, 4, 2, False, 1.0), (128, 4, 2, False, 0.85), (64, 4, 2, False, 0.6))),
    (96, 96): (96, ((128, 3, 2, False, 1.0), (64, 3, 2, False, 0.6))),
    (128, 128): (96, ((128, 2, 2, False, 1.0), (64, 2, 2, False, 0.6))),
}
# Without a mask, whose hidden blocks are those of powers of two.
_FORWARD_WGMMA_UNMASKED = _FORWARD_WGMMA_SCORES | {
    (64, 64): (96, ((192, 4, 2, False, 1.0), (128, 4, 2, False, 0.85), (64, 4, 2, False, 0.6))),
}


# The same where tiles of the bias are loaded, two at a time: it needs room beside keys and values, not registers.
_FORWARD_WGMMA_BIAS_TILES = _FORWARD_WGMMA_SCORES | {
    (32, 32): (96, ((192, 2, 2, False, 1.0), (128, 2, 2, False, 0.85), (64, 2, 2, False, 0.6))),
    (64, 64): (96, ((192, 2, 2, False, 1.0), (128, 2, 2, False, 0.85), (64, 2, 2, False, 0.6))),
    (96, 96): (128, ((128, 2, 1, False, 1.0), (64, 2, 2, False, 0.6))),
    (128, 128): (128, ((128, 2, 1, False, 1.0), (64, 2, 1, False, 0.6))),
}
_FORWARD_WGMMA_BIAS_TILES_MASKED = _FORWARD_WGMMA_BIAS_TILES | dict.fromkeys(
    ((32, 32), (64, 64)), (64, ((192, 4, 2, False, 1.0), (128, 4, 2, False, 0.85), (64, 4, 2, False, 0.6)))
)
_BIAS_STAGES = 2


def _forward_wgmma_table(
    score: ScoreConfig, bias_tiles: bool
) -> dict[tuple[int, int], tuple[int, tuple[_WgmmaRow, ...]]]:
    if not score.any():
        return _FORWARD_WGMMA
    if bias_tiles:
        return _FORWARD_WGMMA_BIAS_TILES_MASKED if score.mask else _FORWARD_WGMMA_BIAS_TILES
    if score.bias or (score.mod and score.mod.expression.differs_by_pair):
        return _FORWARD_WGMMA_BIAS
    return _FORWARD_WGMMA_SCORES if score.mask else _FORWARD_WGMMA_UNMASKED


def forward_wgmma_configs(
    mma: str,
    head_dim: int,
    head_dim_v: int,
    vectorized: bool,
    score: ScoreConfig = ScoreConfig(),
    bias_tiles: bool = False,
) -> list[tuple[ForwardWgmmaConfig, float]]:
    """The rows of the table, each with the cost of a tile; `head_dim`s are padded ones.

    The rows of one entry give the same bits: they differ in nothing that rounding depends on.
    """
    block_n, rows = _forward_wgmma_table(score, bias_tiles)[head_dim, head_dim_v]
    copy = "tma" if vectorized else "element"
    # Copying element by element takes registers that three consumers do not leave.
    most = 192 if vectorized else 128
    dims = head_dim, head_dim_v
    ahead = _BIAS_STAGES if bias_tiles else 0
    return [
        (ForwardWgmmaConfig(mma, copy, *dims, block_m, block_n, stages, q_stages, ping_pong, ahead, score=score), cost)
        for block_m, stages, q_stages, ping_pong, cost in rows
        if block_m <= most
    ]


# Backward: block_m, block_n, num_warps, num_stages, dq_warps_m, min_blocks.
_BackwardRows = dict[int, tuple[int, int, int, int, int, int]]
_BACKWARD_16BIT: dict[int, _BackwardRows] = {
    227: {
        32: (64, 64, 4, 2, 2, 4),
        64: (64, 64, 4, 2, 2, 3),
        96: (64, 128, 8, 2, 4, 1),
        128: (64, 128, 8, 2, 2, 1),
        192: (64, 64, 8, 2, 2, 1),
        256: (32, 64, 8, 2, 2, 1),
    },
    163: {
        32: (64, 64, 4, 2, 2, 3),
        64: (64, 64, 4, 2, 2, 2),
        96: (64, 128, 8, 2, 4, 1),
        128: (64, 128, 8, 1, 2, 1),
        192: (64, 64, 8, 1, 2, 1),
        256: (32, 64, 8, 2, 2, 1),
    },
    99: {
        32: (64, 128, 8, 2, 4, 1),
        64: (64, 128, 8, 1, 4, 1),
        96: (64, 64, 4, 2, 2, 1),
        128: (32, 128, 8, 1, 2, 1),
        192: (32, 64, 8, 1, 2, 1),
        256: (32, 32, 4, 1, 2, 1),
    },
    64: {
        32: (64, 128, 8, 1, 4, 1),
        64: (32, 128, 8, 1, 2, 1),
        96: (32, 64, 4, 1, 2, 1),
        128: (32, 64, 8, 1, 2, 1),
        192: (32, 32, 4, 1, 2, 1),
        256: (32, 16, 2, 1, 2, 1),
    },
}
_BACKWARD_32BIT: dict[int, _BackwardRows] = {
    227: {
        32: (32, 64, 4, 2, 2, 2),
        64: (32, 128, 8, 2, 2, 1),
        96: (64, 64, 8, 2, 4, 1),
        128: (32, 64, 8, 2, 2, 1),
        192: (32, 64, 8, 2, 2, 1),
        256: (16, 64, 8, 2, 1, 1),
    },
    163: {
        32: (64, 64, 8, 2, 4, 1),
        64: (64, 64, 8, 1, 4, 1),
        96: (64, 64, 8, 1, 4, 1),
        128: (32, 64, 8, 2, 2, 1),
        192: (32, 64, 8, 1, 2, 1),
        256: (16, 32, 4, 2, 1, 1),
    },
    99: {
        32: (64, 64, 8, 2, 4, 1),
        64: (32, 64, 8, 2, 2, 1),
        96: (32, 32, 4, 2, 2, 1),
        128: (16, 64, 8, 1, 1, 1),
        192: (16, 32, 4, 1, 1, 1),
        256: (16, 16, 2, 1, 1, 1),
    },
}


# Waiting for a turn takes registers: rows that are too tight for it, by shared memory and head_dim.
_BACKWARD_DETERMINISTIC = {
    (227, 32): (64, 64, 4, 2, 2, 3),
    (227, 64): (64, 64, 4, 2, 2, 2),
    (163, 128): (32, 128, 8, 2, 2, 1),
}


# Rows that are not worth more than being right: no tile of that size fits without spilling registers.
_BACKWARD_TIGHT = {(2, 64, 256)}

# As for the forward; the last ones are for an architecture whose compiler needs more registers.
_BACKWARD_SCORES: dict[tuple[int, int, int], tuple[int, int, int, int, int, int]] = {
    **{(2, size, dim): (64, 64, 8, 2, 2, 1) for size in (227, 163) for dim in (32, 64, 96, 128)},
    **{(2, size, 192): (32, 64, 8, 1, 2, 1) for size in (227, 163)},
    (2, 99, 32): (64, 64, 8, 2, 2, 1),
    (2, 99, 64): (64, 64, 8, 2, 2, 1),
    (2, 99, 96): (64, 64, 8, 1, 2, 1),
    (2, 99, 128): (32, 64, 8, 1, 2, 1),
    (2, 64, 32): (64, 64, 8, 2, 2, 1),
    (2, 64, 64): (64, 64, 8, 1, 2, 1),
    (2, 64, 96): (32, 32, 4, 1, 2, 1),
    (4, 163, 32): (32, 64, 4, 2, 2, 1),
    (4, 163, 192): (16, 32, 4, 1, 1, 1),
    (4, 99, 32): (32, 64, 4, 2, 2, 1),
}
_BACKWARD_SCORES_SM100 = {64: (32, 64, 8, 1, 2, 1), 96: (32, 32, 4, 1, 2, 1), 128: (32, 64, 8, 1, 2, 1)}
_BACKWARD_SCORES_TIGHT = {(4, 163, 32), (4, 163, 256), (4, 99, 256)}


def backward_mma_config(
    mma: str,
    arch: int,
    head_dim: int,
    head_dim_v: int,
    vectorized: bool,
    deterministic: bool,
    score: ScoreConfig = ScoreConfig(),
) -> BackwardMmaConfig:
    """The row of the table for one architecture; `head_dim`s are padded ones."""
    elem_bytes, size, dim = _elem_bytes(mma), _smem_class(arch), max(head_dim, head_dim_v)
    tight = _BACKWARD_TIGHT
    if elem_bytes == 4:
        row = _BACKWARD_32BIT[size][dim]
    else:
        row = _BACKWARD_16BIT[size][dim]
        if deterministic:
            row = _BACKWARD_DETERMINISTIC.get((size, dim), row)
    if score.any():
        row = _BACKWARD_SCORES.get((elem_bytes, size, dim), row)
        if arch == 100 and elem_bytes == 2:
            row = _BACKWARD_SCORES_SM100.get(dim, row)
        tight = _BACKWARD_TIGHT | _BACKWARD_SCORES_TIGHT
    block_m, block_n, num_warps, num_stages, dq_warps_m, min_blocks = row
    # dQ has head_dim columns alone: where they are few, more warps have to go along its rows.
    while head_dim % (16 * (num_warps // dq_warps_m)) != 0:
        dq_warps_m *= 2
    return BackwardMmaConfig(
        mma,
        _copy(arch, vectorized),
        head_dim,
        head_dim_v,
        block_m,
        block_n,
        num_warps,
        num_stages,
        dq_warps_m,
        4 if arch >= 90 else 1,
        min_blocks,
        deterministic,
        tuned=vectorized and (elem_bytes, size, dim) not in tight,
        score=score,
    )


# Hopper backward, by padded head dims: block_m, block_n, kv_stages, num_stages, overlap, which takes two kv_stages.
_BACKWARD_WGMMA: dict[tuple[int, int], tuple[int, int, int, int, bool]] = {
    (32, 32): (128, 128, 2, 2, True),
    (64, 64): (128, 128, 2, 2, True),
    (96, 96): (96, 128, 1, 2, False),
    (128, 128): (64, 128, 2, 2, True),
    (192, 128): (64, 64, 1, 3, False),
    (192, 192): (64, 64, 1, 2, False),
    (256, 256): (48, 64, 1, 2, False),
}
# The same, by role, where scores or weights are changed: only then there are registers for it.
_BACKWARD_WGMMA_SCORES: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (64, 64): (128, 64, 2, 2),
    (96, 96): (64, 64, 1, 2),
    (128, 128): (64, 64, 1, 2),
    (192, 128): (64, 64, 1, 3),
    (192, 192): (64, 64, 1, 2),
    (256, 256): (48, 64, 1, 2),
}
# Exceptions, by head dims, derivatives and mask: derivatives take registers, too, and blocks that a mask hides
# are those of powers of two.
_BACKWARD_WGMMA_SCORES_BY_OPTION: dict[tuple[int, int, bool, bool], tuple[int, int, int, int]] = {
    (64, 64, True, True): (64, 64, 1, 2),
    (64, 64, True, False): (96, 64, 1, 2),
    (128, 128, True, False): (96, 64, 1, 2),
    (128, 128, False, False): (80, 64, 1, 2),
}
#: The widest head_dim that gains from `overlap` where d_q is summed in a fixed order, too.
_OVERLAP_IN_ORDER = 64


def backward_wgmma_config(
    mma: str, head_dim: int, head_dim_v: int, deterministic: bool, score: ScoreConfig = ScoreConfig()
) -> BackwardWgmmaConfig:
    """The row of the table; `head_dim`s are padded ones."""
    if score.any():
        dims = max((head_dim, head_dim_v), (64, 64))
        by_option = (*dims, score.bends, score.mask)
        tile = _BACKWARD_WGMMA_SCORES_BY_OPTION.get(by_option, _BACKWARD_WGMMA_SCORES[dims])
        return BackwardWgmmaConfig(mma, "tma", *dims, *tile, deterministic=deterministic, score=score)
    block_m, block_n, kv_stages, num_stages, overlap = _BACKWARD_WGMMA[head_dim, head_dim_v]
    if overlap and deterministic and head_dim > _OVERLAP_IN_ORDER:
        kv_stages, overlap = 1, False
    return BackwardWgmmaConfig(
        mma, "tma", head_dim, head_dim_v, block_m, block_n, kv_stages, num_stages, overlap, deterministic
    )


def backward_companions(
    main: BackwardMmaConfig | BackwardWgmmaConfig,
) -> tuple[BackwardPreprocessConfig, BackwardConvertConfig]:
    """The kernels before and after the main one, which share its tiles."""
    copy = "async" if main.copy == "tma" else main.copy
    num_warps, dq_warps_m, reduce_width = main.dq_layout
    # One thread of a Hopper block sees to the order, in portable ones each warp.
    semaphores = (1 if isinstance(main, BackwardWgmmaConfig) else num_warps) if main.deterministic else 0
    return (
        BackwardPreprocessConfig(main.mma, copy, main.dq_columns, main.head_dim_v, main.block_m, 8, semaphores),
        BackwardConvertConfig(
            main.mma, copy, main.head_dim, main.block_m, num_warps, dq_warps_m, reduce_width, main.dq_transposed
        ),
    )


#: Query rows and keys of a tile that is computed once more, the largest first; larger ones take all registers.
_RECOMPUTED_TILES = ((64, 32), (32, 32), (32, 16), (16, 16))


def backward_captured_config(main: BackwardMmaConfig | BackwardWgmmaConfig, arch: int) -> BackwardCapturedConfig:
    """The largest tile that fits."""
    return _recomputed_config(BackwardCapturedConfig, main, arch)


def backward_bias_config(main: BackwardMmaConfig | BackwardWgmmaConfig, arch: int) -> BackwardBiasConfig:
    """The same."""
    return _recomputed_config(BackwardBiasConfig, main, arch)


_Recomputed = TypeVar("_Recomputed", bound=BackwardCapturedConfig)


def _recomputed_config(
    kind: type[_Recomputed], main: BackwardMmaConfig | BackwardWgmmaConfig, arch: int
) -> _Recomputed:
    copy = _copy(arch, main.copy != "element")
    choices = (
        kind(main.mma, copy, main.head_dim, main.head_dim_v, *tile, main_params=main.params, score=main.score)
        for tile in _RECOMPUTED_TILES
    )
    return next(config for config in choices if config.smem_bytes <= smem_limit(arch))


def backward_simt_more_config(step: str, dtype: str, score: ScoreConfig) -> BackwardSimtConfig:
    """The steps "captured" and "bias", the same on plain arithmetic: they sum no columns."""
    return replace(backward_simt_configs(dtype, 64, 64)[2], step=step, score=score, min_blocks=1)


def weights_config(
    mma: str, arch: int, head_dim: int, vectorized: bool, sums: bool, score: ScoreConfig = ScoreConfig()
) -> WeightsConfig:
    """One tile for all but the widest heads of 32 bits; `head_dim` is a padded one."""
    block_n = 64 if head_dim * _elem_bytes(mma) <= 512 else 32
    return WeightsConfig(mma, _copy(arch, vectorized), head_dim, 64, block_n, sums, score=score)


def weights_simt_config(dtype: str, sums: bool, score: ScoreConfig = ScoreConfig()) -> WeightsSimtConfig:
    """The tile of the forward."""
    f = forward_simt_config(dtype, 64)
    return WeightsSimtConfig(dtype, f.block_m, f.block_n, f.columns, f.num_warps, sums, score=score)


def mask_blocks_config(main: TileConfig, by_blocks: bool) -> MaskBlocksConfig:
    """The kernel that looks at the mask before the main one: which tiles it hides, and its bits."""
    by_keys = isinstance(main, BackwardMmaConfig | BackwardWgmmaConfig)
    return MaskBlocksConfig(main.params, main.block_m, main.block_n, by_keys, by_blocks)


def backward_gather_config(main: BackwardWgmmaConfig) -> BackwardGatherConfig:
    """The kernel for tiles of keys that blocks of the main one share."""
    return BackwardGatherConfig(main.mma, main.head_dim, main.head_dim_v, main.block_n, main.deterministic)


# A block of 16 threads per row: 64 rows by 8 warps, or 32 rows by 4 warps where a number takes two registers.
# `columns` is how much of an output row stays in registers, in multiples of 64. Beyond it the scores are computed
# again per chunk; below it, work would go into columns that do not exist.


def _columns(dim: int, most: int) -> int:
    return next((c for c in (64, 128, 256) if c >= min(dim, most)), most)


def forward_simt_config(dtype: str, head_dim_v: int) -> ForwardSimtConfig:
    """Two kernels for float64 (64, 128 columns), three for the others (64, 128, 256)."""
    if dtype == "float64":
        return ForwardSimtConfig(dtype, 32, 64, _columns(head_dim_v, 128), 4, min_blocks=2)
    columns = _columns(head_dim_v, 256)
    return ForwardSimtConfig(dtype, 64, 64, columns, 8, min_blocks=1 if columns == 256 else 2)


def backward_simt_configs(dtype: str, head_dim: int, head_dim_v: int) -> tuple[BackwardSimtConfig, ...]:
    """The three launches, in their order."""
    rows, warps, float64 = (32, 4, True) if dtype == "float64" else (64, 8, False)
    dkdv = _columns(max(head_dim, head_dim_v), 128)
    dq = _columns(head_dim, 128 if float64 else 256)
    return (
        BackwardSimtConfig("delta", dtype, 64, 64, 64, 8),  # only the warps matter: one row each
        BackwardSimtConfig("dkdv", dtype, 64, rows, dkdv, warps, 2 if float64 or dkdv == 64 else 1),
        BackwardSimtConfig("dq", dtype, rows, 64, dq, warps, 2 if float64 or dq < 256 else 1),
    )


def all_configs(arch: int) -> list[Config]:
    """Every configuration that the planner may choose on an architecture."""
    return list(dict.fromkeys(_all_configs(arch)))


def score_configs(arch: int) -> list[Config]:
    """Some of those for calls that change scores or weights: all options together, and each alone at one head_dim."""
    return list(dict.fromkeys(_score_configs(arch)))


def mod_configs(arch: int, mod: Mod) -> list[Config]:
    """Those for calls with an expression, alone, of a head_dim or two per kernel."""
    score = ScoreConfig(mod=mod)
    backward = [replace(config, score=score) for config in backward_simt_configs("float64", 64, 64)[1:]]
    chosen: list[Config] = [replace(forward_simt_config("float64", 64), score=score), *backward]
    chosen.append(backward_simt_more_config("captured", "float64", score))
    for dtype in ("float16", "float32"):
        if (mma := mma_of(dtype, "ieee", arch)) is None:
            continue
        for dims in ((64, 64), (128, 128)) if dtype == "float16" else ((64, 64),):
            main: BackwardMmaConfig | BackwardWgmmaConfig = backward_mma_config(mma, arch, *dims, True, False, score)
            chosen += [forward_mma_config(mma, arch, *dims, True, score), main, backward_captured_config(main, arch)]
            if has_wgmma(mma, arch):
                chosen += [row for row, _ in forward_wgmma_configs(mma, *dims, True, score)]
                main = backward_wgmma_config(mma, *dims, False, score)
                chosen += [main, backward_captured_config(main, arch)]
    return chosen + weights_configs(arch, score)


def weights_configs(arch: int, score: ScoreConfig = ScoreConfig()) -> list[Config]:
    """Those for weights, of a narrow and of the widest head_dim."""
    chosen: list[Config] = []
    for sums in (False, True):
        chosen.append(weights_simt_config("float64", sums, score))
        for dtype in ("float16", "float32"):
            if (mma := mma_of(dtype, "ieee", arch)) is not None:
                chosen += [weights_config(mma, arch, head_dim, True, sums, score) for head_dim in (64, 256)]
    return chosen


def _score_configs(arch: int) -> Iterator[Config]:
    for dtype in ITEMSIZE:
        every = ScoreConfig(True, None, True, dtype, True, True, True)
        if dtype == "float64":
            yield replace(forward_simt_config(dtype, 64), score=every)
            yield from (replace(config, score=every) for config in backward_simt_configs(dtype, 64, 64)[1:])
            yield backward_simt_more_config("bias", dtype, every)
            continue
        mma = mma_of(dtype, "ieee", arch)
        if mma is None or (dtype == "bfloat16" and arch != 90):
            continue
        alone = [replace(ScoreConfig(), **{name: value}) for name, value in asdict(every).items() if value]
        has_all = dtype == "float16" and arch in (75, 80, 90)
        for dims in HEAD_DIM_PAIRS if has_all else ((64, 64), (128, 128)):
            if has_wgmma(mma, arch):
                by_tiles = replace(ScoreConfig(), bias=dtype) if has_all else every
                yield from (row for row, _ in forward_wgmma_configs(mma, *dims, True, by_tiles, bias_tiles=True))
            for score in (every, *(alone if has_all and arch == 90 and dims == (64, 64) else ())):
                forward: list[ForwardMmaConfig | ForwardWgmmaConfig] = [
                    forward_mma_config(mma, arch, *dims, True, score)
                ]
                backward: list[BackwardMmaConfig | BackwardWgmmaConfig] = [
                    backward_mma_config(mma, arch, *dims, True, False, score)
                ]
                if has_wgmma(mma, arch):
                    forward += [row for row, _ in forward_wgmma_configs(mma, *dims, True, score)]
                    backward.append(backward_wgmma_config(mma, *dims, False, score))
                for main in (*forward, *backward):
                    yield main
                    if score.mask:
                        yield from (mask_blocks_config(main, by_blocks) for by_blocks in (False, True))
                if score.bias and dims in ((64, 64), (256, 256)):
                    yield from (backward_bias_config(main, arch) for main in backward)


def _all_configs(arch: int) -> Iterator[Config]:
    for dtype in ITEMSIZE:
        if dtype == "bfloat16" and arch < 80:
            continue
        for dim in (64, 128, 256):
            yield forward_simt_config(dtype, dim)
            yield from backward_simt_configs(dtype, dim, dim)
        for precision in ("ieee", "tf32") if dtype == "float32" else ("ieee",):
            mma = mma_of(dtype, precision, arch)
            if mma is None:
                continue
            for head_dim, head_dim_v in HEAD_DIM_PAIRS:
                for vectorized in (True, False):
                    if has_wgmma(mma, arch):
                        yield from (row[0] for row in forward_wgmma_configs(mma, head_dim, head_dim_v, vectorized))
                    yield forward_mma_config(mma, arch, head_dim, head_dim_v, vectorized)
                    for deterministic in (False, True):
                        mains: list[BackwardMmaConfig | BackwardWgmmaConfig] = [
                            backward_mma_config(mma, arch, head_dim, head_dim_v, vectorized, deterministic)
                        ]
                        if has_wgmma(mma, arch):
                            mains.append(backward_wgmma_config(mma, head_dim, head_dim_v, deterministic))
                        for main in mains:
                            yield main
                            yield from backward_companions(main)
                            if isinstance(main, BackwardWgmmaConfig) and not main.deterministic:
                                yield backward_gather_config(main)
