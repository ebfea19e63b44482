"""Exact attention that never stores the score matrix, forward and gradients, for any array library.

``cuflash.attention(q, k, v)`` takes arrays of NumPy, CuPy, PyTorch, JAX or any other library that
speaks DLPack; the result lives where the inputs live.
"""

from . import score_mods
from .block_mask import BlockMask
from .functional import (
    Gradients,
    attention,
    attention_backward,
    attention_received,
    attention_weights,
    dropout_mask,
    merge_attention,
)
from .score_mods import ScoreMod, score_mod

__version__ = "0.1.0"

__all__ = [
    "BlockMask",
    "Gradients",
    "ScoreMod",
    "attention",
    "attention_backward",
    "attention_received",
    "attention_weights",
    "dropout_mask",
    "merge_attention",
    "score_mod",
    "score_mods",
]
