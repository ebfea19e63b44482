"""Problem: what one attention call computes, free of any framework and of any pointer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .expression import Expression
from .scores import Band

#: Bytes of one element, for every dtype the library computes with.
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Mod:
    """An expression that changes scores, and of the arrays that it captures the dtypes: what becomes code."""

    expression: Expression
    #: By the names that the expression has for them, in its order.
    dtypes: tuple[tuple[str, str], ...] = ()


class CapturedArray(NamedTuple):
    """An array that an expression captures; strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True, slots=True)
class Features:
    """What a call does to its scores beside scaling them and hiding what lies outside the band; see ``scores.Score``.

    Arrays are named by their dtype; None stands for what the call does not have.
    """

    softcap: float | None = None
    #: Whether the mask differs among batch entries, heads, queries and keys.
    mask: tuple[bool, bool, bool, bool] | None = None
    bias: str | None = None
    alibi_slopes: str | None = None
    #: Where query 0 stands among the keys; 0 where no feature asks for it.
    q_offset: int = 0
    sinks: str | None = None
    dropout_p: float = 0.0
    mod: Mod | None = None
    #: What the expression captures beside arrays, in its order.
    mod_numbers: tuple[float, ...] = ()
    #: Whether tiles of the bias can be loaded by TMA: 16 bits, keys side by side, rows of their own on 16 bytes.
    bias_tiles: bool = False
    #: The queries and keys that an element of the mask stands for, and which of these keys is the first key.
    mask_block: tuple[int, int, int] = (1, 1, 0)

    @property
    def has_mask_by_blocks(self) -> bool:
        """Whether an element of the mask stands for more than one pair."""
        return self.mask_block[:2] != (1, 1)


@dataclass(frozen=True, slots=True)
class Problem:
    """One call, hashable: the planner's whole input and the key of the plan cache.

    Shapes are those after batch axes were broadcast and collapsed: q (batch, num_heads, seqlen_q,
    head_dim), k (batch, num_heads_kv, seqlen_k, head_dim), v (..., seqlen_k, head_dim_v).
    """

    dtype: str
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    scale: float
    band: Band = Band()
    features: Features = Features()
    #: "ieee": float32 products with the error of a float32 product; "tf32": tensor-core inputs.
    precision: str = "ieee"
    deterministic: bool = False
    #: Every row of every operand starts on 16 bytes and is a multiple of 16 bytes long.
    vectorized: bool = True
    #: No stride is negative or out of the reach of a TMA descriptor.
    mappable: bool = True

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // max(self.num_heads_kv, 1)

    @property
    def lse_dtype(self) -> str:
        """float32, except for float64 problems, whose gradients need a float64 LSE to be exact."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def num_visible(self) -> int:
        """Visible (query, key) pairs over all batches and heads."""
        return self.batch * self.num_heads * self.band.num_visible(self.seqlen_q, self.seqlen_k)

    @property
    def forward_flops(self) -> int:
        """2 products x 2 FLOPs, over visible pairs only."""
        return 2 * self.num_visible * (self.head_dim + self.head_dim_v)

    @property
    def backward_flops(self) -> int:
        """5 products (S, dP, dV, dK, dQ), over visible pairs only."""
        return 2 * self.num_visible * (3 * self.head_dim + 2 * self.head_dim_v)
