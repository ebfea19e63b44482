"""The public functions around the kernels: batch axes, layouts, results in place, merging, calls on a device."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import arrays, cpu, functional, reference
from cuflash.arrays import ArrayView, NumPyArrays
from cuflash.expression import Bound
from cuflash.scores import NO_EXTRAS, Extras, Score, make_band

DTYPES = ["float16", "bfloat16", "float32", "float64"]


def random(*shape: int, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def dtype_or_skip(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def assert_close(actual: Any, desired: Any) -> None:
    np.testing.assert_allclose(actual, desired, rtol=1e-11, atol=1e-11)


# --------------------------------------------------------------------------------------------------- batch axes


@st.composite
def broadcast_operands(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """q, k and v whose batch axes broadcast: some missing, some 1, some strided."""
    batch = draw(st.lists(st.integers(1, 3), max_size=3))
    heads_kv = draw(st.integers(1, 2))
    seqlen_q, seqlen_k, dim, dim_v = (draw(st.integers(1, 4)) for _ in range(4))
    core = (
        (heads_kv * draw(st.integers(1, 2)), seqlen_q, dim),
        (heads_kv, seqlen_k, dim),
        (heads_kv, seqlen_k, dim_v),
    )
    operands = []
    for seed, last in enumerate(core):
        own = [draw(st.sampled_from([size, 1])) for size in batch[draw(st.integers(0, len(batch))) :]]
        array = random(*own, *last, seed=seed)
        if own and draw(st.booleans()):
            array = np.repeat(array, 2, axis=0)[::2]
        if own and draw(st.booleans()):
            array = array[::-1]
        operands.append(array)
    return tuple(operands)


@given(operands=broadcast_operands(), is_causal=st.booleans())
def test_batch_axes_broadcast_as_a_loop_would(operands, is_causal):
    q, k, v = operands
    out, lse = cuflash.attention(q, k, v, is_causal=is_causal, return_lse=True)
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in operands))
    assert out.shape == (*batch, *q.shape[-3:-1], v.shape[-1])
    assert lse.shape == out.shape[:-1]
    d_out, d_lse = random(*out.shape, seed=3), random(*lse.shape, seed=4)
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, is_causal=is_causal)

    whole = [np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in operands]
    wanted = [np.zeros(x.shape) for x in operands]
    sums = [np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in wanted]
    for x in sums:
        x.flags.writeable = True  # adding to a broadcast view is the sum that a gradient is
    for index in np.ndindex(batch):
        part = [x[index] for x in whole]
        part_out, part_lse = cuflash.attention(*part, is_causal=is_causal, return_lse=True)
        assert_close(out[index], part_out)
        assert_close(lse[index], part_lse)
        gradients = cuflash.attention_backward(
            d_out[index], *part, part_out, part_lse, d_lse=d_lse[index], is_causal=is_causal
        )
        for total, gradient in zip(sums, gradients, strict=False):
            total[index] += gradient
    for gradient, desired, operand in zip(found, wanted, operands, strict=False):
        assert gradient.shape == operand.shape
        assert_close(gradient, desired)


def test_matrices_are_one_head_without_batch():
    q, k, v = random(3, 4), random(5, 4), random(5, 2)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    assert out.shape == (3, 2)
    assert lse.shape == (3,)
    wanted, wanted_lse = reference.attention(q[None, None], k[None, None], v[None, None], scale=0.5)
    assert_close(out, wanted[0, 0])
    assert_close(lse, wanted_lse[0, 0])
    gradients = cuflash.attention_backward(np.ones_like(out), q, k, v, out, lse)
    assert [x.shape for x in gradients[:3]] == [q.shape, k.shape, v.shape]


def test_matrices_of_keys_serve_every_head():
    q, k, v = random(2, 6, 3, 4), random(5, 4), random(5, 2)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    assert_close(out, cuflash.attention(q, np.broadcast_to(k, (2, 6, 5, 4)), np.broadcast_to(v, (2, 6, 5, 2))))
    d_out = random(*out.shape, seed=1)
    _, d_k, d_v, *_ = cuflash.attention_backward(d_out, q, k, v, out, lse)
    whole = np.broadcast_to(k, (2, 1, 5, 4)), np.broadcast_to(v, (2, 1, 5, 2))
    wanted = cuflash.attention_backward(d_out, q, *whole, out, lse)
    assert_close(d_k, wanted.d_k.sum((0, 1)))
    assert_close(d_v, wanted.d_v.sum((0, 1)))


@pytest.mark.parametrize("name", DTYPES)
def test_gradients_of_broadcast_operands_are_summed_in_float32(name):
    """2048 ones in a row are 2048 in float16 however many follow, and bfloat16 stops at 256."""
    dtype = dtype_or_skip(name)
    batch = 4096
    q, k = np.zeros((batch, 1, 1, 1), dtype), np.zeros((1, 1, 1), dtype)
    v = np.ones((1, 1, 1), dtype)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    gradients = cuflash.attention_backward(np.ones_like(out), q, k, v, out, lse)
    assert gradients.d_v.dtype == dtype
    assert float(gradients.d_v[0, 0, 0]) == batch
    assert gradients.d_bias is None
    assert gradients.d_sinks is None


# -------------------------------------------------------------------------------------- layouts, dtypes, results


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (2, 1), "q_offset": 1, "scale": -0.3}], ids=str
)
def test_agrees_with_the_reference(name, layout, options):
    dtype = dtype_or_skip(name)
    q, k, v, d_out = (
        x.astype(dtype) for x in (random(2, 4, 5, 8), random(2, 2, 7, 8), random(2, 2, 7, 3), random(2, 4, 5, 3))
    )
    d_lse = random(2, 4, 5).astype(np.float64 if name == "float64" else np.float32)
    band = make_band(options.get("is_causal", False), options.get("window"), options.get("q_offset"), 5, 7)
    scale = options.get("scale", 8**-0.5)
    wanted, wanted_lse = reference.attention(q, k, v, band=band, scale=scale)
    wanted_gradients = reference.attention_backward(d_out, q, k, v, band=band, scale=scale, d_lse=d_lse)

    def arranged(x: np.ndarray) -> np.ndarray:
        return x if layout == "bhsd" else x.swapaxes(1, 2)

    operands = [arranged(x) for x in (q, k, v)]
    out, lse = cuflash.attention(*operands, layout=layout, return_lse=True, **options)
    gradients = cuflash.attention_backward(arranged(d_out), *operands, out, lse, d_lse=d_lse, layout=layout, **options)
    assert out.dtype == dtype
    assert lse.dtype == d_lse.dtype
    assert out.flags.c_contiguous
    tolerance = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}[name]
    for actual, desired in zip(
        (arranged(out), lse, *map(arranged, gradients[:3])), (wanted, wanted_lse, *wanted_gradients[:3]), strict=True
    ):
        np.testing.assert_allclose(actual.astype(np.float64), desired, rtol=tolerance, atol=tolerance)


def test_lse_may_have_any_strides_in_the_backward_pass():
    q, k, v = random(2, 4, 5, 8), random(2, 4, 7, 8), random(2, 4, 7, 3)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    d_lse = random(5, 4, 2).T
    strided = cuflash.attention_backward(out, q, k, v, out, np.asfortranarray(lse), d_lse=d_lse)
    usual = cuflash.attention_backward(out, q, k, v, out, lse, d_lse=d_lse.copy())
    for actual, desired in zip(strided[:3], usual[:3], strict=True):
        np.testing.assert_array_equal(actual, desired)


def test_read_only_operands():
    q, k, v = (random(3, 4, seed=seed) for seed in range(3))
    wanted = cuflash.attention(q, k, v)
    for x in (q, k, v):
        x.flags.writeable = False
    np.testing.assert_array_equal(cuflash.attention(q, k, v), wanted)


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((2, 3, 0, 4), (2, 3, 5, 4)),
        ((2, 3, 5, 4), (2, 3, 0, 4)),
        ((2, 3, 0, 4), (2, 3, 0, 4)),
        ((0, 3, 5, 4), (0, 3, 6, 4)),
        ((0, 3, 5, 4), (1, 3, 6, 4)),
        ((2, 0, 5, 4), (2, 0, 6, 4)),
        ((2, 0, 5, 4), (2, 1, 6, 4)),
        ((2, 3, 5, 4), (0, 2, 3, 6, 4)),
    ],
)
def test_empty(q_shape, k_shape):
    """Nothing to compute is no error: no keys give 0 and -inf, no queries give zero gradients."""
    q, k, v = random(*q_shape), random(*k_shape), random(*k_shape)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    gradients = cuflash.attention_backward(out, q, k, v, out, lse)
    for gradient, operand in zip(gradients, (q, k, v), strict=False):
        np.testing.assert_array_equal(gradient, np.zeros_like(operand))


# ---------------------------------------------------------------------------------------------------------- out=


def test_out_is_written_in_place_whatever_its_strides():
    q, k, v = random(2, 4, 5, 8), random(2, 4, 7, 8), random(2, 4, 7, 3)
    wanted = cuflash.attention(q, k, v)
    memory = np.full((5, 2, 9, 4, 3), np.nan)
    for out in (
        np.empty_like(wanted),
        memory[:, :, 1].transpose(1, 2, 0, 3),
        memory[:, :, ::-2][:, :, 0].transpose(1, 2, 0, 3),
    ):
        assert cuflash.attention(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, wanted)
        again, lse = cuflash.attention(q, k, v, out=out, return_lse=True)
        assert again is out
        assert lse.shape == (2, 4, 5)
    assert np.isnan(memory[:, :, 2:8]).all()


def test_out_may_lie_between_inputs_but_not_on_them():
    memory = random(6, 4, 5, 3)  # q, k, v and out as slices of one array
    q, k, v = (memory[i : i + 1] for i in range(3))
    wanted = cuflash.attention(q, k, v)
    np.testing.assert_array_equal(cuflash.attention(q, k, v, out=memory[3:4]), wanted)
    interleaved = random(4, 5, 4, 3)
    q, k, v, out = (interleaved[:, :, i] for i in range(4))
    wanted = cuflash.attention(q, k, v)
    np.testing.assert_array_equal(cuflash.attention(q, k, v, out=out), wanted)
    for name, taken in (("q", q), ("k", k), ("v", v)):
        with pytest.raises(ValueError, match=f"out: overlaps {name} in memory"):
            cuflash.attention(q, k, v, out=taken)
    shifted = random(4, 6, 3)
    with pytest.raises(ValueError, match="out: overlaps q in memory"):
        cuflash.attention(shifted[:, :5], k, v, out=shifted[:, 1:])


def test_overlap_is_checked_in_every_call():
    q, k, v = random(4, 5, 3), random(4, 5, 3, seed=1), random(4, 5, 3, seed=2)
    cuflash.attention(q, k, v, out=np.empty_like(q))
    with pytest.raises(ValueError, match="out: overlaps v in memory"):
        cuflash.attention(q, k, v, out=v)


# ------------------------------------------------------------------------------------------------ remembered calls


@pytest.fixture
def framework(monkeypatch):
    """The framework of NumPy arrays, with nothing remembered."""
    fresh = NumPyArrays()
    monkeypatch.setitem(arrays.frameworks, np.ndarray, fresh)
    return fresh


def test_calls_of_one_kind_are_prepared_once(framework):
    q = random(2, 3, 4)
    cuflash.attention(q, q, q)
    cuflash.attention(q + 1, q.copy(), q)
    assert len(framework.prepared) == 1
    for options in ({"is_causal": True}, {"scale": 2.0}, {"window": (1, 1)}, {"out": np.empty_like(q)}):
        cuflash.attention(q, q, q, **options)
    cuflash.attention(q[:, ::2], q, q)
    cuflash.attention(q.astype(np.float32), *[q.astype(np.float32)] * 2)
    assert len(framework.prepared) == 7


def test_remembered_calls_are_bounded(framework, monkeypatch):
    monkeypatch.setattr(functional, "MAX_PREPARED", 3)
    q = random(2, 3, 4)
    for scale in range(1, 8):
        cuflash.attention(q, q, q, scale=scale)
        assert 1 <= len(framework.prepared) <= 3


def test_errors_are_not_remembered(framework):
    q = random(2, 3, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match="scale"):
            cuflash.attention(q, q, q, scale=np.inf)
    assert not framework.prepared


# ------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", DTYPES)
def test_merged_parts_are_the_whole(name):
    dtype = dtype_or_skip(name)
    q, k, v = (x.astype(dtype) for x in (random(2, 4, 5, 8), random(2, 2, 9, 8), random(2, 2, 9, 3)))
    bounds = [0, 2, 2, 7, 9]
    outs, lses = zip(
        *(
            cuflash.attention(q, k[:, :, start:stop], v[:, :, start:stop], return_lse=True)
            for start, stop in itertools.pairwise(bounds)
        ),
        strict=True,
    )
    assert np.isneginf(lses[1]).all()
    out, lse = cuflash.merge_attention(outs, lses)
    wanted, wanted_lse = cuflash.attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (wanted.dtype, wanted_lse.dtype)
    tolerance = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-6, "float64": 1e-14}[name]
    np.testing.assert_allclose(out.astype(float), wanted.astype(float), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)


def test_merging_differing_dtypes_gives_float32():
    """So that a running result keeps what it has over 16-bit parts."""
    out, lse = random(3, 4).astype(np.float32), random(3).astype(np.float32)
    merged, merged_lse = cuflash.merge_attention([out, out.astype(np.float16)], [lse, lse])
    assert (merged.dtype, merged_lse.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(merged, out, atol=1e-3)
    np.testing.assert_allclose(merged_lse, lse + np.log(2), rtol=1e-6)
    merged, _ = cuflash.merge_attention([out.astype(np.float16), out.astype(np.float64)], [lse, lse])
    assert merged.dtype == np.float64


def test_merging_large_statistics_does_not_overflow():
    out = np.stack([np.zeros((2, 3)), np.ones((2, 3))])
    merged, lse = cuflash.merge_attention(out, np.array([[1e4, -1e4], [1e4, 1e4]]))
    np.testing.assert_array_equal(merged, [[0.5] * 3, [1.0] * 3])
    np.testing.assert_allclose(lse, [1e4 + np.log(2), 1e4])


def test_merging_nothing_says_nothing():
    with np.errstate(all="raise"):
        out, lse = cuflash.merge_attention([np.full((2, 3), np.nan)] * 2, [np.full(2, -np.inf)] * 2)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


# ------------------------------------------------------------------------------------------- a device, on the host


def c_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def at(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> np.ndarray:
    """Array at an address, with strides in elements."""
    dtype = np.dtype(dtype)
    interface = {
        "version": 3,
        "data": (pointer, False),
        "shape": shape,
        "strides": tuple(dtype.itemsize * stride for stride in strides),
        "typestr": dtype.str,
    }
    return np.asarray(type("Memory", (), {"__array_interface__": interface})())


class HostLaunches:
    """Stands in for `cuflash.launch`: kernels that are NumPy, on what pointers and strides say."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def operand(self, problem: Any, name: str, pointer: int, strides: tuple[int, ...]) -> np.ndarray:
        heads, seqlen = (
            (problem.num_heads, problem.seqlen_q) if name in "q out" else (problem.num_heads_kv, problem.seqlen_k)
        )
        dim = problem.head_dim if name in "q k" else problem.head_dim_v
        return at(pointer, (problem.batch, heads, seqlen, dim), (*strides, 1), problem.dtype)

    def lse(self, problem: Any, pointer: int) -> np.ndarray | None:
        heads, seqlen = problem.num_heads, problem.seqlen_q
        shape, strides = (problem.batch, heads, seqlen), (heads * seqlen, seqlen, 1)
        return at(pointer, shape, strides, problem.lse_dtype) if pointer else None

    def bind(self, problem: Any, captured: Any, pointers: Any) -> Bound | None:
        f = problem.features
        if f.mod is None:
            return None
        arrays = {
            name: at(pointer, array.shape, array.strides, dtype)
            for (name, dtype), array, pointer in zip(f.mod.dtypes, captured, pointers, strict=True)
        }
        numbers = iter(f.mod_numbers)
        names = f.mod.expression.captures
        return Bound(f.mod.expression, {name: arrays[name] if name in arrays else next(numbers) for name in names})

    def score(
        self,
        problem: Any,
        strides: Extras,
        captured: Any,
        pointers: Any,
        seed: int,
        seed_at: int,
        first_batch: int,
        captures: Any,
    ) -> Score:
        f, mod = problem.features, self.bind(problem, captured, captures)
        if seed_at:
            assert seed == 0
            seed = int(at(seed_at, (1,), (1,), "uint64")[0])
        shape = (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k)
        sizes = f.mask_block[:2]
        blocks = (*shape[:2], *(-(-length // size) for length, size in zip(shape[2:], sizes, strict=True)))
        shapes = (blocks, shape, shape[:2], shape[1:2])
        dtypes = ("bool", f.bias, problem.lse_dtype, problem.lse_dtype)
        mask, bias, slopes, sinks = (
            at(pointer, size, own, dtype) if pointer else None
            for pointer, size, own, dtype in zip(pointers, shapes, strides, dtypes, strict=True)
        )
        return Score(f.softcap, bias, mask, slopes, f.q_offset, sinks, f.dropout_p, seed, first_batch, mod, sizes)

    def mask_call(self, problem: Any, what: str) -> Any:
        """Stand for what looks at a mask: what it leaves is the address of the mask."""
        if problem.features.mask is None:
            return None

        def make(mask: int, made: int, stream: int) -> None:
            self.log.append((f"mask for {what}", 1, stream))
            at(made, (1,), (1,), "uint64")[0] = mask

        make.num_bytes, make.key = 64, what
        return make

    def ForwardCall(
        self,
        problem: Any,
        device: int,
        *strides: tuple[int, ...],
        extras: Extras = NO_EXTRAS,
        itemsizes: Extras = NO_EXTRAS,
        captured: Any = (),
    ) -> Any:
        def call(
            q: int,
            k: int,
            v: int,
            out: int,
            lse: int,
            stream: int,
            pointers: Any = (0,) * 4,
            seed: int = 0,
            seed_at: int = 0,
            first: int = 0,
            captures: Any = (),
            made: int = 0,
        ) -> None:
            assert (call.mask_call is None) == (made == 0)
            assert made == 0 or at(made, (1,), (1,), "uint64")[0] == pointers[0]
            self.log.append(("forward", device, stream))
            addressed = zip(("q", "k", "v", "out"), (q, k, v, out), strides, strict=True)
            parts = [self.operand(problem, *each) for each in addressed]
            score = self.score(problem, extras, captured, pointers, seed, seed_at, first, captures)
            cpu.forward(*parts, self.lse(problem, lse), band=problem.band, scale=problem.scale, score=score)

        call.mask_call = self.mask_call(problem, "forward")
        return call

    def WeightsCall(
        self,
        problem: Any,
        device: int,
        *strides: tuple[int, ...],
        rows: range | None,
        extras: Extras = NO_EXTRAS,
        itemsizes: Extras = NO_EXTRAS,
        captured: Any = (),
    ) -> Any:
        batch = problem.batch, problem.num_heads
        shape = (*batch, problem.seqlen_k) if rows is None else (*batch, len(rows), problem.seqlen_k)

        def call(
            q: int,
            k: int,
            lse: int,
            weights: int,
            stream: int,
            pointers: Any = (0,) * 4,
            seed: int = 0,
            seed_at: int = 0,
            first: int = 0,
            captures: Any = (),
        ) -> None:
            self.log.append(("weights", device, stream))
            parts = [self.operand(problem, *each) for each in zip(("q", "k"), (q, k), strides, strict=True)]
            score = self.score(problem, extras, captured, pointers, seed, seed_at, first, captures)
            options = {"band": problem.band, "scale": problem.scale, "score": score}
            out = at(weights, shape, c_order(shape), problem.lse_dtype)
            if rows is None:
                cpu.received(*parts, self.lse(problem, lse), out, **options)
            else:
                cpu.weights(*parts, self.lse(problem, lse), out, rows=rows, **options)

        return call

    def BackwardCall(
        self,
        problem: Any,
        device: int,
        *strides: tuple[int, ...],
        extras: Extras = NO_EXTRAS,
        itemsizes: Extras = NO_EXTRAS,
        captured: Any = (),
        d_bias: Any = None,
        wants_captured: Any = (),
    ) -> Any:
        def call(*pointers: Any) -> None:
            operands, (workspace, stream), rest = pointers[:10], pointers[10:12], pointers[12:]
            f = problem.features
            nothing = (0,) * 4, 0, 0, 0, (), 0, 0, 0, ()
            if call.mask_call is not None:
                *rest, made = rest
                assert at(made, (1,), (1,), "uint64")[0] == rest[0][0]
            extra_pointers, seed, seed_at, first, captures, *sums, by_captured = rest or nothing
            at(workspace, (64,), (1,), "uint8")[...] = 1
            self.log.append(("backward", device, stream))
            lse, d_lse = (self.lse(problem, pointer) for pointer in operands[5:7])
            names = ("out", "q", "k", "v", "out", "q", "k", "v")
            addressed = zip(names, operands[:5] + operands[7:], strides, strict=True)
            parts = [self.operand(problem, *each) for each in addressed]
            shape = (problem.batch, problem.num_heads, problem.seqlen_q, problem.seqlen_k)
            bias_sum, slope_sums, sink_sums = (
                at(pointer, size, own, problem.lse_dtype) if pointer else None
                for pointer, size, own in zip(
                    sums, (shape, shape[:2], shape[:2]), (d_bias, (shape[1], 1), (shape[1], 1)), strict=True
                )
            )
            if bias_sum is not None:
                bias_sum = bias_sum[tuple(slice(0, 1) if n == 0 else slice(None) for n in bias_sum.strides)]
            if sink_sums is not None:
                sink_sums = sink_sums[0]  # the others are zeros, and so is their share of the sum
            score = self.score(problem, extras, captured, extra_pointers, seed, seed_at, first, captures)
            assert [bool(pointer) for pointer in by_captured] == list(wants_captured)
            d_captured = {
                name: at(pointer, array.shape, c_order(array.shape), problem.lse_dtype)
                for (name, _), array, pointer in zip(f.mod.dtypes if f.mod else (), captured, by_captured, strict=True)
                if pointer
            }
            cpu.backward(
                *parts[:5], lse, d_lse, *parts[5:], band=problem.band, scale=problem.scale, score=score,
                d_bias=bias_sum, d_alibi_slopes=slope_sums, d_sinks=sink_sums, d_captured=d_captured,
            )  # fmt: skip

        call.workspace_bytes = 64
        call.mask_call = self.mask_call(problem, "backward")
        call.num_slope_sums = call.num_sink_sums = 1
        return call


class DeviceArray(np.ndarray):
    """Memory that claims to be on cuda:1."""


class DeviceArrays(NumPyArrays):
    """A device whose kernels run on the host; cuda:0 is the current one."""

    name = "fake"
    capability = 90

    def __init__(self) -> None:
        super().__init__()
        self.device = 0
        self.current_stream, self.capturing = 7, False

    def is_capturing(self) -> bool:
        assert self.device == 1, "it was asked while another device was current"
        return self.capturing

    def view(self, array: np.ndarray, name: str) -> ArrayView:
        return replace(super().view(array, name), device=1)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        return super().empty(like, shape, dtype).view(DeviceArray)

    def stream(self, device: int) -> int:
        assert device == self.device, "the stream was read while another device was current"
        return self.current_stream

    def current_device(self) -> int:
        return self.device

    @contextlib.contextmanager
    def use_device(self, device: int) -> Any:
        before, self.device = self.device, device
        yield
        self.device = before

    def compute_capability(self, device: int) -> int:
        return self.capability


@pytest.fixture
def device(monkeypatch):
    launches = HostLaunches()
    monkeypatch.setattr(cuflash, "launch", launches, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "cuflash.launch", launches)
    launches.arrays = DeviceArrays()
    monkeypatch.setitem(arrays.frameworks, DeviceArray, launches.arrays)
    return launches


DEVICE_CASES = [
    # (shapes of q, k, v; layout; launches)
    (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)), "bhsd", 1),
    (((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 3)), "bshd", 1),
    (((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (2, 7, 3)), "bhsd", 1),
    (((3, 2, 4, 5, 8), (2, 2, 7, 8), (3, 1, 2, 7, 3)), "bhsd", 3),
    (((5, 8), (7, 8), (7, 3)), "bhsd", 1),
    (((2, 4, 0, 8), (2, 2, 7, 8), (2, 2, 7, 3)), "bhsd", 0),
]


@pytest.mark.parametrize(("shapes", "layout", "launches"), DEVICE_CASES)
def test_device_calls_agree_with_host_calls(device, shapes, layout, launches):
    q, k, v = (random(*shape, seed=seed)[..., ::-1, :] for seed, shape in enumerate(shapes))
    out, lse = cuflash.attention(q, k, v, layout=layout, is_causal=True, return_lse=True)
    d_out, d_lse = random(*out.shape, seed=3), random(*lse.shape[::-1], seed=4).T
    gradients = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, layout=layout, is_causal=True)

    on_device = [x.view(DeviceArray) for x in (q, k, v)]
    for _ in range(2):
        found, found_lse = cuflash.attention(*on_device, layout=layout, is_causal=True, return_lse=True)
        np.testing.assert_array_equal(found, out)
        np.testing.assert_array_equal(found_lse, lse)
    np.testing.assert_array_equal(cuflash.attention(*on_device, layout=layout, is_causal=True), out)
    assert device.log == [("forward", 1, 7)] * 3 * launches
    assert device.arrays.device == 0

    device.log.clear()
    statistics = [x.view(DeviceArray) for x in (d_out, out, lse, d_lse)]
    found_gradients = cuflash.attention_backward(
        statistics[0], *on_device, *statistics[1:3], d_lse=statistics[3], layout=layout, is_causal=True
    )
    for actual, desired in zip(found_gradients[:3], gradients[:3], strict=True):
        np.testing.assert_array_equal(actual, desired)
    assert device.log == [("backward", 1, 7)] * launches
    out_of_mine = np.empty_like(out).view(DeviceArray)
    assert cuflash.attention(*on_device, layout=layout, is_causal=True, out=out_of_mine) is out_of_mine
    np.testing.assert_array_equal(out_of_mine, out)


SCORE_CASES = [
    # (shapes of q, k, v; of mask, bias, slopes; layout; launches)
    (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)), ((2, 1, 5, 7), (4, 1, 7), (4,)), "bhsd", 1),
    (((2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 3)), ((1, 7), (2, 4, 5, 7), (2, 4)), "bshd", 1),
    (((3, 2, 4, 5, 8), (2, 2, 7, 8), (3, 1, 2, 7, 3)), ((2, 1, 5, 7), (3, 1, 4, 5, 1), (3, 1, 4)), "bhsd", 3),
    (((5, 8), (7, 8), (7, 3)), ((5, 1), (5, 7), (1,)), "bhsd", 1),
]


@pytest.mark.parametrize(("shapes", "extras", "layout", "launches"), SCORE_CASES)
def test_device_calls_change_scores_as_host_calls_do(device, shapes, extras, layout, launches):
    q, k, v = (random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    num_heads = extras[2][-1]
    of_score = {
        "mask": random(*extras[0], seed=5) < 0.7,
        "bias": random(*extras[1], seed=6)[..., ::-1].astype(np.float32),
        "alibi_slopes": random(*extras[2], seed=7).astype(np.float32),
        "sinks": random(num_heads, seed=8),
    }
    captured = {
        "gate": random(num_heads, seed=9), "table": random(7, 20, seed=10)[:, ::2].astype(np.float16),
        "numbers": np.arange(7) // 2,
    }  # fmt: skip

    def mod(**arrays):
        return cuflash.score_mod("score * gate[h] + x * table[b, numbers[k_idx]] * q_idx", x=0.5, **arrays)

    options = {"softcap": 2.0, "dropout_p": 0.25, "seed": 1 << 50, "is_causal": True, "layout": layout}
    of_score["score_mod"] = mod(**captured)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **of_score, **options)
    d_out, d_lse = random(*out.shape, seed=3), random(*lse.shape, seed=4)
    *gradients, d_captured = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **of_score, **options)
    gradients += [d_captured.pop("gate"), d_captured.pop("table")]
    assert not d_captured
    dtypes = np.float64, np.float64, np.float64, np.float32, np.float64, np.float32, np.float64, np.float16
    assert tuple(x.dtype for x in gradients) == dtypes

    there = {name: array.view(DeviceArray) for name, array in of_score.items() if name != "score_mod"}
    there["score_mod"] = mod(**{name: array.view(DeviceArray) for name, array in captured.items()})
    operands = [x.view(DeviceArray) for x in (d_out, q, k, v, out, lse)]
    found, found_lse = cuflash.attention(*operands[1:4], return_lse=True, **there, **options)
    np.testing.assert_array_equal(found, out)
    np.testing.assert_array_equal(found_lse, lse)
    *found, d_captured = cuflash.attention_backward(*operands, d_lse=d_lse.view(DeviceArray), **there, **options)
    found += [d_captured["gate"], d_captured["table"]]
    for actual, desired in zip(found, gradients, strict=True):
        assert actual.dtype == desired.dtype
        np.testing.assert_allclose(actual, desired, rtol=1e-6 if desired.dtype == np.float32 else 1e-12, atol=1e-12)
    # What is made of an array that may have changed is made for every launch.
    assert device.log == [
        (name, 1, 7) for what in ("forward", "backward") for name in (f"mask for {what}", what) * launches
    ]


def made(device):
    """What was made of masks since the last time that somebody asked, and how many launches read it."""
    names = [name for name, *_ in device.log]
    device.log.clear()
    masks = [name for name in names if name.startswith("mask")]
    return masks, len(names) - len(masks)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(("shapes", "extras", "layout", "launches"), SCORE_CASES)
def test_what_is_made_of_a_mask_by_blocks_is_kept(device, shapes, extras, layout, launches, is_shared):
    q, k, v = (random(*shape, seed=seed) for seed, shape in enumerate(shapes))
    *outer, rows, columns = (1,) * max(2 - len(extras[0]), 0) + extras[0]
    outer = [launches, *outer] if launches > 1 and not is_shared else outer
    blocks = random(*outer, -(-rows // 2), -(-columns // 3), seed=5) < 0.3
    options = {"layout": layout, "is_causal": True}
    on_host, mask = cuflash.BlockMask(blocks, (2, 3)), cuflash.BlockMask(blocks.view(DeviceArray), (2, 3))
    out, lse = cuflash.attention(q, k, v, return_lse=True, mask=on_host, **options)
    d_out = random(*out.shape, seed=3)
    wanted = cuflash.attention_backward(d_out, q, k, v, out, lse, mask=on_host, **options)
    there = [x.view(DeviceArray) for x in (d_out, q, k, v, out, lse)]

    def run():
        np.testing.assert_array_equal(cuflash.attention(*there[1:4], mask=mask, **options), out)
        found = cuflash.attention_backward(*there, mask=mask, **options)
        for actual, desired in zip(found[:3], wanted[:3], strict=True):
            np.testing.assert_array_equal(actual, desired)
        return made(device)

    # Launches share it, unless they are of axes that the mask has.
    num_masks = 1 if is_shared else launches
    first = ["mask for forward"] * num_masks + ["mask for backward"] * num_masks
    assert run() == (first, 2 * launches)
    assert run() == ([], 2 * launches)
    device.arrays.current_stream = 8  # which may be ahead of the other
    assert run() == (first, 2 * launches)
    device.arrays.current_stream = 7
    assert run() == ([], 2 * launches)


def test_graphs_keep_nothing_and_read_what_is_kept(device):
    q = random(2, 4, 5, 8).view(DeviceArray)
    mask = cuflash.BlockMask(np.eye(3, dtype=bool).view(DeviceArray), 2)
    device.arrays.capturing = True
    for _ in range(2):
        cuflash.attention(q, q, q, mask=mask)
        assert made(device) == (["mask for forward"], 1)
    device.arrays.capturing = False
    cuflash.attention(q, q, q, mask=mask)
    assert made(device) == (["mask for forward"], 1)
    device.arrays.capturing = True
    cuflash.attention(q, q, q, mask=mask)
    assert made(device) == ([], 1)


def test_other_masks_and_many_streams(device, monkeypatch):
    """A prepared call serves all masks of a size; and a mask that is full drops nothing."""
    from cuflash import block_mask

    monkeypatch.setattr(block_mask, "MAX_KEPT", 2)
    q = random(2, 4, 5, 8).view(DeviceArray)
    masks = [cuflash.BlockMask((random(3, 3, seed=seed) < 0.5).view(DeviceArray), 2) for seed in range(2)]
    for mask in masks:
        cuflash.attention(q, q, q, mask=mask)
        assert made(device) == (["mask for forward"], 1)
    for stream, count in ((7, 0), (8, 1), (9, 1), (9, 1), (8, 0), (7, 0)):
        device.arrays.current_stream = stream
        cuflash.attention(q, q, q, mask=masks[0])
        assert made(device) == (["mask for forward"] * count, 1)
    elements = cuflash.BlockMask(np.eye(5, dtype=bool).view(DeviceArray), 1)
    for count in (1, 0):
        cuflash.attention(q, q, q, mask=elements)
        assert made(device) == (["mask for forward"] * count, 1)


def test_seeds_on_the_device_stay_there(device):
    q, k, v, d_out = (random(2, 4, 5, 8, seed=seed).view(DeviceArray) for seed in range(4))
    number = -5
    wanted, lse = cuflash.attention(q, k, v, dropout_p=0.5, seed=number, return_lse=True)
    gradients = cuflash.attention_backward(d_out, q, k, v, wanted, lse, dropout_p=0.5, seed=number)
    for seed in (np.array(number).view(DeviceArray), np.array([number % 2**64], np.uint64).view(DeviceArray)):
        options = {"dropout_p": 0.5, "seed": seed}
        np.testing.assert_array_equal(cuflash.attention(q, k, v, **options), wanted)
        found = cuflash.attention_backward(d_out, q, k, v, wanted, lse, **options)
        np.testing.assert_array_equal(found.d_v, gradients.d_v)
        assert cuflash.attention(q, k, v, seed=seed).shape == q.shape
    # On the host an array is a number like any other.
    for seed in (np.array(number), np.array([number]), np.int32(number)):
        np.testing.assert_array_equal(cuflash.attention(q, k, v, dropout_p=0.5, seed=seed), wanted)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (np.array(1.0).view(DeviceArray), "seed: got an array of float64 (), wanted one int64 or uint64"),
        (np.array(1, np.int32).view(DeviceArray), "seed: got an array of int32 (), wanted one int64 or uint64"),
        (np.array([1, 2]).view(DeviceArray), "seed: got an array of int64 (2,), wanted one int64 or uint64"),
        (np.array([1, 2]), "seed: got array([1, 2]), wanted an integer"),
        (np.array(1.5), "seed: got 1.5, wanted an integer"),
        ("1", "seed: got '1', wanted an integer"),
    ],
)
def test_what_is_no_seed(device, seed, message):
    x = random(4, 5, 8).view(DeviceArray)
    with pytest.raises(TypeError, match=re.escape(message)):
        cuflash.attention(x, x, x, dropout_p=0.5, seed=seed)


def test_seeds_elsewhere(device):
    x, seed = random(4, 5, 8), np.array(1).view(DeviceArray)
    with pytest.raises((TypeError, ValueError), match="seed: got an array"):
        cuflash.attention(x, x, x, dropout_p=0.5, seed=seed)


#: Shapes of biases of matrices, and of a batch with one axis or with two, of which one is broadcast and launched over.
BIASES_IN_ORDER = [
    ((), (5, 7)), ((), (5, 1)), ((), (7,)), ((), (1,)),
    *(((3,), shape) for shape in ((3, 4, 5, 7), (4, 5, 7), (3, 1, 5, 7), (1, 5, 7), (5, 7))),
    *(((3,), shape) for shape in ((3, 4, 1, 7), (4, 1, 7), (7,), (3, 1, 5, 1), (5, 1), (3, 4, 1, 1), (4, 1, 1), (1,))),
    *(((2, 3), shape) for shape in ((2, 1, 4, 5, 7), (3, 1, 5, 7), (2, 1, 4, 1, 7), (3, 1, 5, 1), (2, 1, 1, 1, 1))),
]  # fmt: skip


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize(("batch", "shape"), BIASES_IN_ORDER, ids=str)
def test_gradient_by_a_bias_in_a_fixed_order(device, batch, shape, is_strided):
    heads = (4,) if batch else ()
    kv_heads = (2,) if batch else ()
    q, d_out = random(*batch, *heads, 5, 8), random(*batch, *heads, 5, 8, seed=1)
    k, v = random(2, *batch[1:] or batch, *kv_heads, 7, 8, seed=2)
    bias = random(*shape, seed=3)
    if is_strided:  # of a bias that is not broadcast, but has equal elements, every one has a gradient
        bias = np.broadcast_to(bias[..., :1], shape)
    dropout = {"dropout_p": 0.25, "seed": 5}
    out, lse = cuflash.attention(q, k, v, bias=bias, return_lse=True, **dropout)
    wanted = cuflash.attention_backward(d_out, q, k, v, out, lse, bias=bias, **dropout)
    operands = [x.view(DeviceArray) for x in (d_out, q, k, v, out, lse)]
    found = cuflash.attention_backward(*operands, bias=bias.view(DeviceArray), deterministic=True, **dropout)
    for actual, desired in zip(found[:4], wanted[:4], strict=True):
        assert actual.shape == desired.shape
        np.testing.assert_allclose(actual, desired, rtol=1e-12, atol=1e-12)
    assert len(device.log) == (batch[0] if len(batch) > 1 else 1)


def test_seeds_are_no_new_prepared_calls(device):
    q = random(2, 3, 4).view(DeviceArray)
    results = [cuflash.attention(q, q, q, dropout_p=0.5, seed=seed) for seed in range(5)]
    assert len(device.arrays.prepared) == 1
    assert len({result.tobytes() for result in results}) > 1


def test_devices_that_are_too_old(device):
    q = random(2, 3, 4).view(DeviceArray)
    device.arrays.capability = 70
    with pytest.raises(RuntimeError, match=r"cuda:1 has compute capability 7\.0"):
        cuflash.attention(q, q, q)
    assert not device.log
