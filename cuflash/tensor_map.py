"""TMA descriptors: how the copy engine of sm_90 and later sees a tensor in global memory.

The driver makes the 128 bytes of a descriptor from address, lengths, strides and the box that one instruction
copies. Everything but the address is settled when a call is prepared.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

#: CUtensorMapDataType of the dtypes that kernels load this way.
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_256B, _FILL_ZERO = 0, 3, 3, 0
_BYTES = 128
#: Strides are smaller than this, in bytes; they and the address are multiples of 16.
STRIDE_LIMIT = 1 << 40


@functools.cache
def _encode_function() -> Any:
    """The driver's cuTensorMapEncodeTiled, which no Python package that is always there offers."""
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    return driver.cuTensorMapEncodeTiled


class TensorMap:
    """Descriptor of one operand, but for its address.

    Parameters
    ----------
    dtype : str
        float16 or bfloat16.
    lengths : sequence of int
        Elements along each axis, innermost first. What lies outside reads as zero.
    strides : sequence of int
        Bytes from one element to the next along each axis but the innermost, whose elements are neighbours.
    box : sequence of int
        Elements that one instruction copies along each axis, into rows of 128 bytes with their 16-byte pieces swizzled.
    offset : int
        Bytes from the operand's address to the first element that is described.
    """

    def __init__(
        self, dtype: str, lengths: Sequence[int], strides: Sequence[int], box: Sequence[int], offset: int = 0
    ) -> None:
        rank = len(lengths)
        self._offset = offset
        self._before = (ctypes.c_int(_DATA_TYPES[dtype]), ctypes.c_uint32(rank))
        self._after = (
            (ctypes.c_uint64 * rank)(*(max(length, 1) for length in lengths)),  # the driver accepts no empty axis
            (ctypes.c_uint64 * (rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            *map(ctypes.c_int, (_INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_256B, _FILL_ZERO)),
        )
        self._what = f"{dtype}, lengths {tuple(lengths)}, strides {tuple(strides)} B, box {tuple(box)}"

    def encode(self, pointer: int) -> bytes:
        """The descriptor for an operand at this address."""
        # Memory of this call alone: threads may share a descriptor's owner, and the driver writes without the
        # interpreter's lock. It wants 64-byte alignment.
        memory = ctypes.create_string_buffer(_BYTES + 64)
        address = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
        first = ctypes.c_void_p(pointer + self._offset)
        error = _encode_function()(ctypes.c_void_p(address), *self._before, first, *self._after)
        if error:
            raise RuntimeError(f"cuTensorMapEncodeTiled failed with CUresult {error}: {self._what}, address {pointer}")
        return ctypes.string_at(address, _BYTES)


class TensorMaps:
    """Descriptors of all operands of a call, kept for addresses that come again (allocators reuse memory)."""

    def __init__(self, maps: Sequence[TensorMap]) -> None:
        self._maps = maps
        self.count = len(maps)
        self._encoded: dict[tuple[int, ...], bytes] = {}

    def __call__(self, pointers: tuple[int, ...]) -> bytes:
        """The descriptors one after the other."""
        encoded = self._encoded.get(pointers)
        if encoded is None:
            if len(self._encoded) >= 64:
                self._encoded.clear()
            encoded = b"".join(m.encode(pointer) for m, pointer in zip(self._maps, pointers, strict=True))
            self._encoded[pointers] = encoded
        return encoded
