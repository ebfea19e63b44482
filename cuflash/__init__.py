"""Exact attention that never stores the score matrix, forward and gradients, for any array library.

``cuflash.attention(q, k, v)`` takes arrays of NumPy, CuPy, PyTorch, JAX or any other library that
speaks DLPack; the result lives where the inputs live.
"""

from .functional import Gradients, attention, attention_backward, dropout_mask, merge_attention

__version__ = "0.1.0"

__all__ = ["Gradients", "attention", "attention_backward", "dropout_mask", "merge_attention"]
