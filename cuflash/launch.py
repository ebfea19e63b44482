"""Plan + arrays -> parameter struct -> launch: the only file that hands pointers to a kernel.

A call object is built once per shape. Its hot path writes the pointers into a parameter block that it
keeps per thread and calls the driver; the driver copies the block before it returns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import struct
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import compile as compiler
from . import configs, environment, params, rng
from .arrays import ALIGNMENT
from .plan import DeviceInfo, Plan, plan_backward, plan_bias, plan_captured, plan_forward, plan_weights
from .problem import ITEMSIZE, CapturedArray, Problem
from .scores import NO_EXTRAS, Band, Extras
from .tensor_map import TensorMap, TensorMaps


class _Call:
    """Launches that share one parameter block. Pointers are written per call, everything else once."""

    def __init__(
        self,
        plans: tuple[Plan, ...],
        device_id: int,
        block: np.ndarray,
        pointers: tuple[str, ...],
        maps: TensorMaps | None = None,
    ) -> None:
        """Descriptors, if there are any, are those of the first pointers, and follow one another in the block."""
        from cupy_backends.cuda.api import driver, runtime

        self._block = block
        self._maps = maps
        self._fields = [_field(block.dtype, name) for name in pointers]
        self._maps_at = 0 if maps is None else _field(block.dtype, f"{pointers[0]}_map")[0]
        self._driver_launch = driver.launchKernel
        self._launches = []
        for plan in plans:
            if plan.grid:
                kernel = compiler.load(plan.config, device_id)
                self._launches.append((kernel.handle, plan.grid, 1, 1, plan.block, 1, 1, plan.smem_bytes))
        self._make_current = functools.partial(runtime.setDevice, device_id)
        self._local = threading.local()

    def _thread_state(self) -> tuple[Any, ...]:
        # A block of its own for every thread: the driver copies it during the launch, outside of the
        # interpreter's lock. The last two keep alive what the first ones point to.
        # A thread that frameworks made for themselves (autograd's, for one) may have no context yet, and the driver
        # asks for one; the caller has chosen the device already.
        self._make_current()
        block = self._block.copy()
        arguments = np.array([block.ctypes.data], dtype=np.uintp)
        bytes_of_block = memoryview(block.view(np.uint8))  # type: ignore[arg-type]
        writers = [functools.partial(form.pack_into, bytes_of_block, offset) for offset, form in self._fields]
        state = self._local.state = (writers, arguments.ctypes.data, bytes_of_block, arguments, block)
        return state

    def __call__(self, stream: int, *pointers: int) -> None:
        state = getattr(self._local, "state", None) or self._thread_state()
        for write, pointer in zip(state[0], pointers):  # noqa: B905 (checked by the tests; this path is hot)
            write(pointer)
        if self._maps is not None:
            encoded = self._maps(pointers[: self._maps.count])
            state[2][self._maps_at : self._maps_at + len(encoded)] = encoded
        for launch in self._launches:
            self._driver_launch(*launch, stream, state[1], 0)


_POINTER, _NUMBER = struct.Struct("=Q"), struct.Struct("=i")


def _field(dtype: np.dtype, path: str) -> tuple[int, struct.Struct]:
    """Offset of a field, or of the pointer that it begins with, and how to write it; ``a.b`` is field b of field a."""
    offset = 0
    for name in path.split("."):
        assert dtype.fields is not None
        dtype, field_offset = dtype.fields[name][:2]
        offset += field_offset
    return offset, _NUMBER if dtype == np.int32 else _POINTER


def _announce(problem: Problem, plans: tuple[Plan, ...]) -> None:
    """Print the plans where that is asked for, and warn where they are much slower than the caller may expect."""
    if plans[0].config.is_simt and problem.dtype != "float64":
        why = (
            f"head_dim {max(problem.head_dim, problem.head_dim_v)}, beyond {configs.HEAD_DIM_PAIRS[-1][0]},"
            if configs.pad_head_dims(problem.head_dim, problem.head_dim_v) is None
            else f"{problem.dtype} here"
        )
        warnings.warn(
            f"cuflash: {why} is computed without tensor cores, several times slower per element", stacklevel=2
        )
    if environment.print_plan():
        print(problem, *plans, sep="\n", file=sys.stderr)


def _with_keys(problem: Problem, first: int, end: int) -> Problem:
    """The problem with keys [first, end) alone, counted from 0 again."""
    if end - first == problem.seqlen_k:
        return problem
    lower, upper = (None if bound is None else bound - first for bound in (problem.band.lower, problem.band.upper))
    features = problem.features
    if features.alibi_slopes is not None:
        features = dataclasses.replace(features, q_offset=features.q_offset - first)
    if features.bias_tiles and first * ITEMSIZE[str(features.bias)] % ALIGNMENT:
        features = dataclasses.replace(features, bias_tiles=False)
    query_block, key_block, _ = features.mask_block
    features = dataclasses.replace(features, mask_block=(query_block, key_block, first % key_block))
    return dataclasses.replace(problem, seqlen_k=end - first, band=Band(lower, upper), features=features)


class MaskCall:
    """What makes of a mask the lists and bits that another launch reads, but for its pointers."""

    def __init__(
        self, problem: Problem, main: Plan, device_id: int, block: Any, mask: tuple[int, ...], at: int
    ) -> None:
        """``block`` is that of the main launch, filled; the mask has these strides, and begins ``at`` bytes late."""
        made = main.mask_blocks
        assert made is not None
        assert main.before is not None
        p = problem
        #: Bytes that every call needs, aligned to 256.
        self.num_bytes = made.num_bytes
        #: What is made depends on this, on the mask, and on where in its memory it begins. Strings know their hash.
        self.key = repr((main.before.config, made, p.seqlen_q, p.seqlen_k, p.band, p.features.mask_block, mask, at))
        self._at, self._bits_at = at, made.bits_at if made.rows else None
        self._call = _Call((main.before,), device_id, block, ("score.mask", *_MADE))

    def __call__(self, mask: int, made: int, stream: int) -> None:
        """Enqueue the launch: ``made`` is written, of a mask given as to the main launch."""
        self._call(stream, mask + self._at, *self.pointers(made))

    def pointers(self, made: int) -> tuple[int, int]:
        """Where the lists are, and the bits, or 0 if there are none."""
        return made, 0 if self._bits_at is None else made + self._bits_at


#: Fields of the block for what is made of a mask.
_MADE = ("score.mask_blocks", "score.mask_bits")


def _mask_call(
    problem: Problem, main: Plan, device_id: int, block: Any, mask: tuple[int, ...] | None, at: int = 0
) -> MaskCall | None:
    """What makes the lists and bits that a launch reads, if it does; their strides are written to its block."""
    if main.mask_blocks is None or mask is None:
        return None
    block["score"]["mask_blocks"] = (0, *main.mask_blocks.list_strides, 0)
    block["score"]["mask_bits"] = (0, *main.mask_blocks.bits_strides)
    return MaskCall(problem, main, device_id, block, mask, at)


def _forward_maps(
    problem: Problem,
    config: configs.ForwardWgmmaConfig,
    pack: int,
    bias: tuple[int, ...] | None,
    *strides: params.Strides,
) -> TensorMaps:
    """Descriptors of q, (dim, query head of a pack, row, head, batch), and of k and v, (dim, row, head, batch).

    Where tiles of it are loaded, of the bias, (key, query, head, batch), too.
    """
    p = problem
    q, k, v = (tuple(stride * ITEMSIZE[p.dtype] for stride in operand) for operand in strides)
    q_lengths = (p.head_dim, pack, p.seqlen_q, p.num_heads // pack, p.batch)
    q_strides = (q[1], q[2], q[1] * pack, q[0])
    k_lengths = (p.head_dim, p.seqlen_k, p.num_heads_kv, p.batch)
    v_lengths = (p.head_dim_v, *k_lengths[1:])
    key_box = (64, config.block_n, 1, 1)
    maps = [
        TensorMap(p.dtype, q_lengths, q_strides, (64, pack, config.block_m // pack, 1, 1)),
        TensorMap(p.dtype, k_lengths, k[::-1], key_box),
        TensorMap(p.dtype, v_lengths, v[::-1], key_box),
    ]
    if config.bias_stages:
        assert bias is not None
        assert p.features.bias is not None
        outer = [stride * ITEMSIZE[p.features.bias] for stride in bias[:3]]
        # Axes along which it is broadcast have one entry.
        heads, batch = (n if stride else 1 for n, stride in zip((p.num_heads, p.batch), outer[1::-1], strict=True))
        lengths = (p.seqlen_k, p.seqlen_q, heads, batch)
        maps.append(TensorMap(p.features.bias, lengths, outer[::-1], (64, config.block_m, 1, 1)))
    return TensorMaps(maps)


def _backward_maps(problem: Problem, config: configs.BackwardWgmmaConfig, *strides: params.Strides) -> TensorMaps:
    """Descriptors of d_out, q, k and v, (dim, row, head, batch): of the rows that see something, or are seen."""
    p = problem
    first_query, end_query = p.band.query_range(0, p.seqlen_k, p.seqlen_q)
    first_key, end_key = p.band.key_range(0, p.seqlen_q, p.seqlen_k)
    queries = first_query, end_query - first_query, p.num_heads, config.block_m
    keys = first_key, end_key - first_key, p.num_heads_kv, config.block_n
    maps = []
    for dim, (first, rows, heads, block), stride in zip(
        (p.head_dim_v, p.head_dim, p.head_dim, p.head_dim_v), (queries, queries, keys, keys), strides, strict=True
    ):
        by_axis = tuple(n * ITEMSIZE[p.dtype] for n in stride[::-1])
        maps.append(TensorMap(p.dtype, (dim, rows, heads, p.batch), by_axis, (64, block, 1, 1), first * by_axis[0]))
    return TensorMaps(maps)


class ForwardCall:
    """A forward call but for its pointers.

    Strides are those of the (batch, heads, seqlen, dim) operands in elements. ``device_info`` plans for
    another device than the present one (whose kernels the present one must be able to run).
    """

    def __init__(
        self,
        problem: Problem,
        device_id: int,
        q: params.Strides,
        k: params.Strides,
        v: params.Strides,
        out: params.Strides,
        *,
        extras: Extras = NO_EXTRAS,
        itemsizes: Extras = NO_EXTRAS,
        captured: Sequence[CapturedArray] = (),
        device_info: DeviceInfo | None = None,
        plan: Plan | None = None,
    ) -> None:
        # Keys that no query sees are cut off, so that no tile reaches into them.
        first_key, end_key = problem.band.key_range(0, problem.seqlen_q, problem.seqlen_k)
        if problem.features.dropout_p > 0 and first_key % rng.BLOCK:
            first_key = 0
        whole, problem = problem, _with_keys(problem, first_key, end_key)
        # What belongs to pairs begins with the first key, too, or with the block of the mask that it is in.
        firsts = (first_key // problem.features.mask_block[1], first_key, 0, 0)
        self._extra_offsets = tuple(
            0 if own is None or len(own) < 4 else first * own[3] * size
            for own, size, first in zip(extras, itemsizes, firsts, strict=True)
        )
        itemsize = ITEMSIZE[problem.dtype]
        self._k_offset, self._v_offset = k[2] * first_key * itemsize, v[2] * first_key * itemsize
        self.plan = plan or plan_forward(problem, device_info or DeviceInfo.current(device_id), environment.kernel())
        _announce(problem, (self.plan,))
        config = self.plan.config
        block = np.zeros(1, params.block_dtype(config.params, config.mod))
        for name, strides in (("q", q), ("k", k), ("v", v), ("out", out)):
            params.fill_operand(block, name, strides, itemsize)
        params.fill_shape(block, problem)
        # A scale of 0 becomes one so small that products vanish: 0 times a hidden score would be NaN.
        scale_log2 = max(abs(problem.scale) * params.LOG2_E, 1e-37)
        sign = -1.0 if problem.scale < 0 else 1.0
        maps = None
        if isinstance(config, configs.ForwardWgmmaConfig):
            assert self.plan.order is not None
            block["scale_log2"] = sign * scale_log2
            block["order"] = dataclasses.astuple(self.plan.order)
            if config.copy == "tma":
                maps = _forward_maps(problem, config, self.plan.order.pack, extras.bias, q, k, v)
        else:
            block["scale_log2"], block["score_sign"] = scale_log2, sign
        block["scale"] = problem.scale
        params.fill_score(block, problem, extras, itemsizes)
        block["score"]["first_key"] = first_key
        params.fill_mod(block, whole, first_key, captured)
        of_score = ("mask", "alibi_slopes", "sinks", "seed", "seed_at", "first_batch")
        # What may have a descriptor comes first.
        pointers = ("q", "k", "v", "score.bias", "out", "lse", *(f"score.{name}" for name in of_score))
        pointers = (*pointers, *_MADE, *params.pointers_of_mod(config.mod))
        #: To be called before, if it is there.
        self.mask_call = _mask_call(problem, self.plan, device_id, block, extras.mask, self._extra_offsets[0])
        self._call = _Call((self.plan,), device_id, block, pointers, maps)

    def __call__(
        self,
        q: int,
        k: int,
        v: int,
        out: int,
        lse: int,
        stream: int,
        extras: tuple[int, ...] = (0, 0, 0, 0),
        seed: int = 0,
        seed_at: int = 0,
        first_batch: int = 0,
        captured: tuple[int, ...] = (),
        made: int = 0,
    ) -> None:
        """Enqueue the launch; `lse` is a contiguous (batch, num_heads, seqlen_q) buffer, or 0.

        `extras` are pointers, or 0; `seed_at` is one to the seed, or 0 where `seed` is the seed itself; `first_batch`
        is the number of the first batch entry, as dropout counts them; `captured` are pointers to what an expression
        captures; `made` is what `mask_call` has made, if it is there.
        """
        mask, bias, slopes, sinks = map(operator.add, extras, self._extra_offsets)
        of_mask = (0, 0) if self.mask_call is None else self.mask_call.pointers(made)
        more = (mask, slopes, sinks, seed, seed_at, first_batch, *of_mask, *captured)
        self._call(stream, q, k + self._k_offset, v + self._v_offset, bias, out, lse, *more)


class WeightsCall:
    """What computes weights from an LSE, but for pointers; see :class:`ForwardCall`."""

    def __init__(
        self,
        problem: Problem,
        device_id: int,
        q: params.Strides,
        k: params.Strides,
        *,
        rows: range | None,
        extras: Extras = NO_EXTRAS,
        itemsizes: Extras = NO_EXTRAS,
        captured: Sequence[CapturedArray] = (),
        device_info: DeviceInfo | None = None,
    ) -> None:
        device = device_info or DeviceInfo.current(device_id)
        self.plan = plan_weights(problem, None if rows is None else len(rows), device, environment.kernel())
        _announce(problem, (self.plan,))
        config = self.plan.config
        block = np.zeros(1, params.block_dtype(config.params, config.mod))
        for name, strides in (("q", q), ("k", k)):
            params.fill_operand(block, name, strides, ITEMSIZE[problem.dtype])
        params.fill_shape(block, problem)
        picked = range(problem.seqlen_q) if rows is None else rows
        block["first_row"], block["row_step"], block["num_rows"] = picked.start, picked.step, len(picked)
        block["scale"] = problem.scale
        params.fill_score(block, problem, extras, itemsizes)
        params.fill_mod(block, problem, 0, captured)
        of_score = (f"score.{name}" for name in (*Extras._fields, "seed", "seed_at", "first_batch"))
        pointers = ("q", "k", "lse", "weights", *of_score, *params.pointers_of_mod(config.mod))
        self._call = _Call((self.plan,), device_id, block, pointers)

    def __call__(
        self,
        q: int,
        k: int,
        lse: int,
        weights: int,
        stream: int,
        extras: tuple[int, ...] = (0, 0, 0, 0),
        seed: int = 0,
        seed_at: int = 0,
        first_batch: int = 0,
        captured: tuple[int, ...] = (),
    ) -> None:
        """Enqueue the launch; LSE and weights are contiguous."""
        self._call(stream, q, k, lse, weights, *extras, seed, seed_at, first_batch, *captured)


class BackwardCall:
    """A backward call but for its pointers; see :class:`ForwardCall`."""

    def __init__(
        self,
        problem: Problem,
        device_id: int,
        d_out: params.Strides,
        q: params.Strides,
        k: params.Strides,
        v: params.Strides,
        out: params.Strides,
        d_q: params.Strides,
        d_k: params.Strides,
        d_v: params.Strides,
        *,
        extras: Extras = NO_EXTRAS,
        itemsizes: Extras = NO_EXTRAS,
        captured: Sequence[CapturedArray] = (),
        wants_captured: Sequence[bool] = (),
        d_bias: tuple[int, ...] | None = None,
        device_info: DeviceInfo | None = None,
        plans: tuple[Plan, ...] | None = None,
    ) -> None:
        device = device_info or DeviceInfo.current(device_id)
        self.plans = plans or plan_backward(problem, device, environment.kernel())
        _announce(problem, self.plans)
        layout = self.plans[0].workspace
        assert layout is not None
        #: Bytes of scratch memory, aligned to 256, that every call needs: O(seqlen).
        self.workspace_bytes = layout.total
        scratch = ("delta", "lse_log2", "dq_accum", "semaphore", "counters", "parts")
        self._offsets = [getattr(layout, name) for name in scratch]
        # The kernels around the main one read the first part of its parameters.
        main = self.plans[1].config
        block = np.zeros(1, params.block_dtype(main.params, main.mod))
        operands = {"d_out": d_out, "q": q, "k": k, "v": v, "out": out, "d_q": d_q, "d_k": d_k, "d_v": d_v}
        for name, strides in operands.items():
            params.fill_operand(block, name, strides, ITEMSIZE[problem.dtype])
        params.fill_shape(block, problem)
        block["rows"], block["num_counters"] = layout.rows, layout.num_counters
        block["num_emptied"] = layout.num_emptied
        block["num_batches"] = problem.batch
        block["scale"], block["scale_log2"] = problem.scale, problem.scale * params.LOG2_E
        params.fill_score(block, problem, extras, itemsizes)
        params.fill_mod(block, problem, 0, captured)
        # Either the main kernel adds to the gradient by the bias or one of its own does.
        of_bias = None if d_bias is None else plan_bias(self.plans[1], problem, device, d_bias)
        bias_sums = "d_bias" if of_bias is None else "bias_sums"
        if d_bias is not None:
            size = ITEMSIZE[problem.lse_dtype]
            block[bias_sums] = (0, *(stride * size for stride in d_bias))
        maps = None
        if isinstance(main, configs.BackwardWgmmaConfig):
            block["order"] = dataclasses.astuple(self.plans[1].order)  # type: ignore[arg-type]
            block["tail"] = dataclasses.astuple(self.plans[1].tail)  # type: ignore[arg-type]
            block["sections_ahead"] = self.plans[1].sections_ahead
            maps = _backward_maps(problem, main, d_out, q, k, v)
        of_score = (
            *(f"score.{name}" for name in (*Extras._fields, "seed", "seed_at", "first_batch")),
            bias_sums,
            "slope_sums",
            "sink_sums",
            *params.pointers_of_mod(main.mod),
            *(f"mod.{name}" for name in params.sums_of_mod(main.mod)),
        )
        names = [] if main.mod is None else [name for name, _ in main.mod.dtypes]
        self._is_real = [main.mod.expression.captures[name].is_real for name in names] if main.mod is not None else []
        #: Sums that a head leaves of the gradient by its ALiBi slope, and by its sink.
        self.num_slope_sums = self.num_sink_sums = 0
        if problem.features.alibi_slopes is not None:
            assert isinstance(
                main, configs.BackwardMmaConfig | configs.BackwardWgmmaConfig | configs.BackwardSimtConfig
            )
            self.num_slope_sums = -(-problem.seqlen_k // main.block_n) * main.slope_sums
        if problem.features.sinks is not None:
            self.num_sink_sums = self.plans[-1].config.num_warps
        if of_bias is not None:
            self.plans = (*self.plans, of_bias)
        if any(wants_captured):
            self.plans = (*self.plans, plan_captured(self.plans[1], problem, device))
        #: To be called before, if it is there.
        self.mask_call = _mask_call(problem, self.plans[1], device_id, block, extras.mask)
        parts = (*scratch, *_MADE)
        self._call = _Call(self.plans, device_id, block, (*operands, "lse", "d_lse", *parts, *of_score), maps)

    def __call__(
        self,
        d_out: int,
        q: int,
        k: int,
        v: int,
        out: int,
        lse: int,
        d_lse: int,
        d_q: int,
        d_k: int,
        d_v: int,
        workspace: int,
        stream: int,
        extras: tuple[int, ...] = (0, 0, 0, 0),
        seed: int = 0,
        seed_at: int = 0,
        first_batch: int = 0,
        captured: tuple[int, ...] = (),
        d_bias: int = 0,
        slope_sums: int = 0,
        sink_sums: int = 0,
        d_captured: tuple[int, ...] = (),
        made: int = 0,
    ) -> None:
        """Enqueue the launches; `lse` and `d_lse` are contiguous (batch, num_heads, seqlen_q), `d_lse` may be 0.

        `extras`, the seed, `first_batch` and `made` are as in :class:`ForwardCall`. The gradient by the bias is added
        to `d_bias`. Terms of those by slopes and sinks are written to `slope_sums`, (batch, num_heads,
        `num_slope_sums`), which has to hold zeros, and `sink_sums`, (batch, num_heads, `num_sink_sums`). Each of the
        three may be 0.
        Gradients by arrays that an expression captures are added to `d_captured`, if they are not 0.
        """
        scratch = [workspace + offset for offset in self._offsets]
        of_mask = (0, 0) if self.mask_call is None else self.mask_call.pointers(made)
        self._call(
            stream,
            d_out,
            q,
            k,
            v,
            out,
            d_q,
            d_k,
            d_v,
            lse,
            d_lse,
            *scratch,
            *of_mask,
            *extras,
            seed,
            seed_at,
            first_batch,
            d_bias,
            slope_sums,
            sink_sums,
            *captured,
            *itertools.compress(d_captured or (0,) * len(captured), self._is_real),
        )
