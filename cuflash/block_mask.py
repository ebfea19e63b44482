"""BlockMask: a mask by blocks of queries and keys, which keeps what the kernels make of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy

from . import arrays
from .arrays import CPU, ArrayView, Framework

#: Arrays that a mask keeps. None is ever dropped for another one: a captured graph may read it.
MAX_KEPT = 64


class BlockMask:
    r"""Which blocks of queries and keys see each other, as ``mask=`` of ``attention`` and the other functions.

    With blocks of :math:`b_q` queries and :math:`b_k` keys, query :math:`i` sees key :math:`j` where

    .. math:: \text{blocks}[\dots, \lfloor i / b_q \rfloor, \lfloor j / b_k \rfloor].

    Parameters
    ----------
    blocks : array of bool, broadcastable to (..., heads, ceil(seqlen_q / b_q), ceil(seqlen_k / b_k))
        True where the queries of a block see its keys; two axes or more, any strides. It is of the framework and on the
        device of `q`. It is copied, on the current stream, so that it cannot change any more.
    block_size : int or (int, int), default 128
        :math:`(b_q, b_k)`, or one number for both. The lengths need not be multiples of it. With 1, `blocks` is a
        mask by elements.

    Raises
    ------
    TypeError
        For blocks that are no array of booleans, and a block_size of other types.
    ValueError
        For blocks of less than two axes, and a block_size below 1. That they fit the lengths is checked by the calls.

    Notes
    -----
    The mask is immutable, and several threads may use it. It is never expanded to (seqlen_q, seqlen_k).

    Tensor-core kernels read lists of the tiles that a tile sees, and a bit per pair of those tiles that reach into
    several blocks; with blocks whose sizes are multiples of the tiles' (128, mostly) there are no such bits. They are
    made in the first call and kept, so that later calls of the same kind (lengths, dtype, stream) begin at once. What
    is made of a plain array is not kept, since nobody can tell whether it has changed. A call that is being captured
    into a CUDA graph keeps nothing, but reads what its stream has already: a graph needs its mask alive.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1000, 64))  # 2 heads of 1000 rows
    >>> blocks = np.eye(8, dtype=bool)  # 1000 rows are 8 blocks of up to 128
    >>> blocks[:, 0] = True  # whose keys all see
    >>> mask = cuflash.BlockMask(blocks)
    >>> mask
    BlockMask((8, 8), block_size=(128, 128))
    >>> out = cuflash.attention(q, k, v, mask=mask)
    >>> by_pairs = blocks.repeat(128, 0).repeat(128, 1)[:1000, :1000]
    >>> bool(np.allclose(out, cuflash.attention(q, k, v, mask=by_pairs)))
    True
    """

    __slots__ = ("_array", "_block_size", "_blocks", "_kept")

    def __init__(self, blocks: Any, block_size: int | tuple[int, int] = 128) -> None:
        sizes = _check_block_size(block_size)
        own = arrays.framework_of(mask=blocks)
        given = arrays.import_dlpack(blocks, "mask") if own is None else blocks
        framework = own or arrays.framework_of(mask=given)
        assert framework is not None
        view = _check_blocks(framework, given)
        with nullcontext() if view.device == CPU else framework.use_device(view.device):
            copy = framework.empty(given, view.shape, "bool")
            copy[...] = given
        if own is not None and isinstance(copy, numpy.ndarray):
            copy.flags.writeable = False
        # As array of a framework, and of the user's library.
        self._array = copy
        self._blocks = copy if own is not None else arrays.export_dlpack(copy, blocks)
        self._block_size = sizes
        self._kept: dict[Hashable, Any] = {}

    @property
    def blocks(self) -> Any:
        """The copy of the blocks, which must not be written to."""
        return self._blocks

    @property
    def block_size(self) -> tuple[int, int]:
        """Queries and keys of a block."""
        return self._block_size

    @property
    def array(self) -> Any:
        """The same memory as array of NumPy, CuPy or PyTorch, whichever library the blocks are of."""
        return self._array

    def __repr__(self) -> str:
        return f"BlockMask({tuple(self._array.shape)}, block_size={self.block_size})"

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockMask, (self.blocks, self.block_size)

    def keep(self, key: Hashable, make: Callable[[], Any], is_capturing: Callable[[], bool]) -> Any:
        """The array of this key, made if there is none yet, and kept unless a graph is being captured."""
        made = self._kept.get(key)
        if made is None:
            made = make()
            if len(self._kept) < MAX_KEPT and not is_capturing():
                # Another thread may have been faster: each uses its own then.
                self._kept.setdefault(key, made)
        return made


def array_of(mask: Any) -> Any:
    """The array that a mask, or any other extra, is or is made of."""
    return mask.array if isinstance(mask, BlockMask) else mask


def view_of(framework: Framework, array: Any, name: str) -> ArrayView:
    """``framework.view`` of an array, or of a mask by blocks."""
    view = framework.view(array_of(array), name)
    return replace(view, block=array.block_size) if isinstance(array, BlockMask) else view


def signature_of(framework: Framework, array: Any) -> Hashable:
    """``framework.signature`` of an array, or of a mask by blocks."""
    if isinstance(array, BlockMask):
        return array.block_size, framework.signature(array.array)
    return framework.signature(array)


def _check_block_size(block_size: Any) -> tuple[int, int]:
    sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    if len(sizes) != 2 or any(isinstance(size, bool) or not hasattr(size, "__index__") for size in sizes):
        raise TypeError(f"block_size: got {block_size!r}, wanted an integer, or a tuple of two (queries, keys)")
    query, key = map(operator.index, sizes)
    if query < 1 or key < 1:
        raise ValueError(f"block_size: got {block_size!r}, wanted numbers of queries and keys above 0")
    return query, key


def _check_blocks(framework: Framework, blocks: Any) -> ArrayView:
    try:
        view = framework.view(blocks, "mask")
    except RuntimeError as error:
        raise ValueError(
            "mask: got blocks without memory of their own, as torch.vmap makes them, wanted an array; make the "
            "BlockMask outside of vmap"
        ) from error
    if view.dtype != "bool":
        raise TypeError(f"mask: got blocks of dtype {view.dtype}, wanted bool, True where queries see keys")
    if view.ndim < 2:
        raise ValueError(f"mask: got blocks of shape {view.shape}, wanted two axes or more, (..., queries, keys)")
    return view
