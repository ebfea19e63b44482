"""The parameter structs of the kernels, mirrored as NumPy dtypes.

``kernels_cu/attention/params.cuh`` is the other side; every generated entry asserts that size and offsets
agree, so that a field out of place does not compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import rng
from .problem import CapturedArray, Mod, Problem
from .scores import Extras

Strides = tuple[int, int, int]


_OPERAND = np.dtype(
    [("pointer", "u8"), ("batch_stride", "i8"), ("head_stride", "i8"), ("row_stride", "i8")], align=True
)
_SHAPE = np.dtype(
    [
        (name, "i4")
        for name in (
            "num_heads", "group_size", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v", "lower", "upper"
        )
    ],
    align=True,
)  # fmt: skip
_PAIRS = np.dtype(
    [("pointer", "u8"), *((f"{axis}_stride", "i8") for axis in ("batch", "head", "query", "key"))], align=True
)
_MASK_BITS = np.dtype(
    [("pointer", "u8"), *((f"{axis}_stride", "i8") for axis in ("batch", "head", "row", "tile"))], align=True
)
_SCORE = np.dtype(
    [
        *((name, _PAIRS) for name in ("mask", "bias", "alibi_slopes", "sinks", "mask_blocks")),
        ("mask_bits", _MASK_BITS),
        ("seed", "u8"),
        ("seed_at", "u8"),
        ("softcap", "f8"),
        ("kept_scale", "f8"),
        *((name, "f4") for name in ("factor", "softcap_f32", "kept_scale_f32")),
        *((name, "i4") for name in ("dropped", "first_batch", "q_offset", "first_key")),
        *((name, "i4") for name in ("mask_block_q", "mask_block_k", "mask_first_key")),
    ],
    align=True,
)
_FORWARD = [*((name, _OPERAND) for name in ("q", "k", "v", "out")), ("lse", "u8"), ("shape", _SHAPE)]
_BACKWARD = [
    *((name, _OPERAND) for name in ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")),
    *((name, "u8") for name in ("lse", "d_lse", "delta", "lse_log2", "dq_accum", "semaphore", "counters", "parts")),
    ("shape", _SHAPE),
    ("rows", "i4"),
    ("num_counters", "i4"),
    ("num_emptied", "i4"),
    ("scale_log2", "f4"),
    ("num_batches", "i4"),
    ("scale", "f8"),
    ("score", _SCORE),
    ("d_bias", _PAIRS),
    ("bias_sums", _PAIRS),
    ("slope_sums", "u8"),
    ("sink_sums", "u8"),
]
_MAP = np.dtype("V128")
_TILE_ORDER = np.dtype(
    [(name, "i4") for name in ("num_tiles", "num_blocks", "num_heads", "section", "pack")], align=True
)
_TILE_PARTS = np.dtype([(name, "i4") for name in ("first_tile", "tile_steps", "num_steps", "part_steps")], align=True)


def _with_maps(fields: list[tuple[str, Any]]) -> np.dtype:
    """A struct as C++ lays it out; descriptors, which NumPy knows only as bytes, lie on multiples of 64."""
    offsets, end, largest = [], 0, 1
    for _, format_ in fields:
        dtype = np.dtype(format_)
        alignment = 64 if dtype == _MAP else dtype.alignment
        offsets.append(-(-end // alignment) * alignment)
        end, largest = offsets[-1] + dtype.itemsize, max(largest, alignment)
    names, formats = zip(*fields, strict=True)
    size = -(-end // largest) * largest
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


PARAMS = {
    "ForwardParams": np.dtype(
        [*_FORWARD, ("scale", "f8"), ("scale_log2", "f4"), ("score_sign", "f4"), ("score", _SCORE)], align=True
    ),
    "ForwardWgmmaParams": _with_maps(
        [
            *((name, _MAP) for name in ("q_map", "k_map", "v_map", "bias_map")),
            *_FORWARD,
            ("scale_log2", "f4"),
            ("order", _TILE_ORDER),
            ("scale", "f8"),
            ("score", _SCORE),
        ]
    ),
    "WeightsParams": np.dtype(
        [
            ("q", _OPERAND),
            ("k", _OPERAND),
            ("lse", "u8"),
            ("weights", "u8"),
            ("shape", _SHAPE),
            ("first_row", "i4"),
            ("row_step", "i4"),
            ("num_rows", "i4"),
            ("scale", "f8"),
            ("score", _SCORE),
        ],
        align=True,
    ),
    "BackwardParams": np.dtype(_BACKWARD, align=True),
    "BackwardWgmmaParams": _with_maps(
        [
            *_BACKWARD,
            *((name, _MAP) for name in ("d_out_map", "q_map", "k_map", "v_map")),
            ("order", _TILE_ORDER),
            ("tail", _TILE_PARTS),
            ("sections_ahead", "i4"),
        ]
    ),
}
#: Stands for an open side of the band; lengths are limited so that sums with it stay inside 32 bits.
OPEN = 1_000_000_000
LOG2_E = math.log2(math.e)


def block_dtype(params: str, mod: Mod | None) -> np.dtype:
    """What a launch passes: the struct of that name and, where scores are changed by an expression, ``ModParams``."""
    base = PARAMS[params]
    if mod is None:
        return base
    own = mod_dtype(mod)
    assert base.fields is not None
    begin = _ceil_64(base.itemsize)
    return np.dtype(
        {
            "names": [*base.fields, "mod"],
            "formats": [*(field[0] for field in base.fields.values()), own],
            "offsets": [*(field[1] for field in base.fields.values()), begin],
            "itemsize": _ceil_64(begin + own.itemsize),
        }
    )


def _ceil_64(size: int) -> int:
    return -(-size // 64) * 64


def mod_dtype(mod: Mod) -> np.dtype:
    """``ScoreMod::Params`` of an expression; what it captures is numbered."""

    def format_of(num_axes: int | None, is_real: bool) -> Any:
        if num_axes is None:
            return "f8" if is_real else "i4"
        axes = max(num_axes, 1)
        return np.dtype([("pointer", "u8"), ("strides", "i8", (axes,)), ("sizes", "i4", (axes,))], align=True)

    captures = enumerate(mod.expression.captures.values())
    return np.dtype(
        [
            *((name, "i4") for name in ("seqlen_q", "seqlen_k", "first_key")),
            *((f"captured_{index}", format_of(found.num_axes, found.is_real)) for index, found in captures),
            *((name, "u8") for name in sums_of_mod(mod)),
        ],
        align=True,
    )


def layout_assertions(params: str, mod: Mod | None) -> list[str]:
    """C++ that fails to compile where the struct of that name, or ``Params`` made of it, differs from the NumPy dtype.

    NVRTC has no offsetof; ``__INTADDR__`` is the intrinsic that its compiler front end defines it with.
    """
    dtype, struct = block_dtype(params, mod), params if mod is None else "Params"
    assert dtype.fields is not None
    offsets = {name: field[1] for name, field in dtype.fields.items()}
    if mod is not None:
        own = dtype.fields["mod"][0].fields
        assert own is not None
        offsets |= {f"mod.{name}": offsets["mod"] + field[1] for name, field in own.items()}
    lines = [f'static_assert(sizeof({struct}) == {dtype.itemsize}, "{struct}: size differs from cuflash/params.py");']
    lines += [
        f"static_assert(__INTADDR__(&static_cast<{struct}*>(nullptr)->{name}) == {offset}, "
        f'"{struct}::{name}: offset differs from cuflash/params.py");'
        for name, offset in offsets.items()
    ]
    return lines


def fill_shape(block: Any, problem: Problem) -> None:
    """Write the lengths and the visibility of a problem."""
    p = problem
    if max(p.seqlen_q, p.seqlen_k) > OPEN:
        raise ValueError(f"seqlen: got {max(p.seqlen_q, p.seqlen_k)}, wanted at most {OPEN}")
    lower = -OPEN if p.band.lower is None else max(-OPEN, min(OPEN, p.band.lower))
    upper = OPEN if p.band.upper is None else max(-OPEN, min(OPEN, p.band.upper))
    block["shape"] = (p.num_heads, p.group_size, p.seqlen_q, p.seqlen_k, p.head_dim, p.head_dim_v, lower, upper)


def fill_score(block: Any, problem: Problem, strides: Extras, itemsizes: Extras) -> None:
    """Write what is done to scores; pointers, the seed and the first batch entry follow with every call.

    ``strides`` are those of the extras in elements: (batch, head, query, key) or the first of these, sinks (head,).
    """
    features = problem.features
    for name, own, itemsize in zip(Extras._fields, strides, itemsizes, strict=True):
        if own is not None:
            axes = (0, *own) if name == "sinks" else own
            in_bytes = [stride * itemsize for stride in axes]
            block["score"][name] = (0, *in_bytes, *[0] * (4 - len(in_bytes)))
    block["score"]["factor"] = problem.scale / (features.softcap or 1.0)
    for name, value in (("softcap", features.softcap or 0.0), ("kept_scale", 1 / (1 - features.dropout_p))):
        block["score"][name] = block["score"][f"{name}_f32"] = value
    block["score"]["dropped"] = rng.threshold(features.dropout_p)
    block["score"]["q_offset"] = features.q_offset
    for name, size in zip(("mask_block_q", "mask_block_k", "mask_first_key"), features.mask_block, strict=True):
        block["score"][name] = min(size, OPEN)


def fill_mod(block: Any, problem: Problem, first_key: int, captured: Sequence[CapturedArray]) -> None:
    """Write what an expression reads, if there is one; pointers to what it captures follow with every call.

    ``problem`` has all keys, of which the launch sees those from ``first_key`` on.
    """
    mod = problem.features.mod
    if mod is None:
        return
    own = block["mod"]
    own["seqlen_q"], own["seqlen_k"], own["first_key"] = problem.seqlen_q, problem.seqlen_k, first_key
    arrays, numbers = iter(captured), iter(problem.features.mod_numbers)
    for index, found in enumerate(mod.expression.captures.values()):
        if found.num_axes is None:
            own[f"captured_{index}"] = next(numbers)
        elif found.num_axes > 0:
            array = next(arrays)
            own[f"captured_{index}"]["strides"] = [stride * array.itemsize for stride in array.strides]
            own[f"captured_{index}"]["sizes"] = array.shape
        else:
            next(arrays)


def pointers_of_mod(mod: Mod | None) -> list[str]:
    """Fields of the block for pointers to captured arrays."""
    captures = [] if mod is None else list(mod.expression.captures.values())
    return [f"mod.captured_{index}" for index, found in enumerate(captures) if found.num_axes is not None]


def sums_of_mod(mod: Mod | None) -> list[str]:
    """Fields of the expression's part for pointers to gradients by those that are real."""
    captures = [] if mod is None else list(mod.expression.captures.values())
    return [f"sums_{index}" for index, found in enumerate(captures) if found.num_axes is not None and found.is_real]


def fill_operand(block: Any, name: str, strides: Strides, itemsize: int) -> None:
    """Write the strides of one operand, given in elements; its pointer follows with every call."""
    block[name] = (0, *(stride * itemsize for stride in strides))
