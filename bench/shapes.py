"""Workloads: the shapes that are measured, and how many FLOPs each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cuflash.scores import Band, make_band

#: FLOPs per visible (query, key) pair, head and unit of head_dim: 2 products forward, 5 backward.
FLOPS_PER_PAIR = {"forward": 4, "backward": 10, "forward+backward": 14}

#: The usual grid: as many heads and sequences as keep these two products constant.
HIDDEN_SIZE = 2048
NUM_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Workload:
    """Shape of one call: q (batch, num_heads, seqlen_q, head_dim), k and v with num_heads_kv and seqlen_k."""

    dtype: str
    batch: int
    num_heads: int
    seqlen_q: int
    head_dim: int
    is_causal: bool = False
    num_heads_kv: int = 0  # 0: num_heads
    seqlen_k: int = 0  # 0: seqlen_q

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_heads_kv", self.num_heads_kv or self.num_heads)
        object.__setattr__(self, "seqlen_k", self.seqlen_k or self.seqlen_q)

    @property
    def band(self) -> Band:
        """Visible pairs of one head."""
        return make_band(self.is_causal, None, None, self.seqlen_q, self.seqlen_k)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.head_dim**-0.5

    def flops(self, measure: str) -> int | None:
        """FLOPs over visible pairs, or None for a measure that is not made of FLOPs."""
        if measure not in FLOPS_PER_PAIR:
            return None
        pairs = self.batch * self.num_heads * self.band.num_visible(self.seqlen_q, self.seqlen_k)
        return FLOPS_PER_PAIR[measure] * self.head_dim * pairs

    def __str__(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads_kv == self.num_heads else f"{self.num_heads}/{self.num_heads_kv}"
        lengths = f"{self.seqlen_q}" if self.seqlen_k == self.seqlen_q else f"{self.seqlen_q}/{self.seqlen_k}"
        mask = "causal" if self.is_causal else "full"
        return f"{self.dtype} {self.batch}x{heads}x{lengths}x{self.head_dim} {mask}"


def grid(dtype: str, head_dims: Iterable[int], lengths: Iterable[int]) -> list[Workload]:
    """Full and causal workloads of constant hidden size and token count."""
    return [
        Workload(dtype, max(NUM_TOKENS // seqlen, 1), max(HIDDEN_SIZE // head_dim, 1), seqlen, head_dim, is_causal)
        for head_dim in head_dims
        for is_causal in (False, True)
        for seqlen in lengths
    ]


def default_grid(dtype: str, head_dims: Sequence[int], lengths: Sequence[int], quick: bool) -> list[Workload]:
    """The grid of ``dtype``; empty ``head_dims`` or ``lengths`` stand for the usual ones.

    float32 has a smaller grid: it is an order of magnitude slower, and varies less with length.
    """
    half = dtype in ("float16", "bfloat16")
    if not head_dims:
        head_dims = (64, 128) if quick or not half else (64, 128, 256)
    if not lengths:
        lengths = (2048, 8192) if quick or not half else (1024, 2048, 4096, 8192, 16384)
    return grid(dtype, head_dims, lengths)
