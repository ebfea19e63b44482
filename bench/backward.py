"""Backward alone, through autograd for everyone, of a graph that was built once; the grid of the forward."""

from __future__ import annotations

from . import forward
from .rows import Row
from .runner import Options


def run(options: Options) -> list[Row]:
    """Rows of the whole grid."""
    return forward.run(options, measure="backward")
