"""``BlockMask`` on a GPU: the same bits as the mask by elements, what is kept of it, streams and graphs.

What it computes, with all else that is done to scores, the combinations of ``test_scores.py`` judge.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import arrays, launch
from tests.gpu.harness import assert_same_bits, cupy

SHAPE = (2, 4, 600, 64)
SIZES = [(128, 128), (100, 60), (256, 1), (1, 1)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of what has been made of masks so far."""
    keys: list[str] = []
    make = launch.MaskCall.__call__

    def count(self: launch.MaskCall, *arguments: int) -> None:
        keys.append(self.key)
        make(self, *arguments)

    monkeypatch.setattr(launch.MaskCall, "__call__", count)
    return keys


def operands() -> tuple[Any, ...]:
    """q, k, v and d_out, with key heads that query heads share."""
    draw = cupy.random.default_rng(0)
    q, d_out = draw.standard_normal((2, *SHAPE)).astype(np.float16)
    k, v = draw.standard_normal((2, 2, 2, 700, 64)).astype(np.float16)
    return q, k, v, d_out


def blocks_of(size: tuple[int, int], *outer: int) -> Any:
    """Blocks for the operands."""
    shape = (*outer, -(-600 // size[0]), -(-700 // size[1]))
    return cupy.asarray(np.random.default_rng(1).random(shape) < 0.6)


def by_elements(blocks: Any, size: tuple[int, int]) -> Any:
    """The mask that they mean."""
    return cupy.ascontiguousarray(blocks.repeat(size[0], -2).repeat(size[1], -1)[..., :600, :700])


def step(q: Any, k: Any, v: Any, d_out: Any, *, deterministic: bool = True, **options: Any) -> tuple[Any, ...]:
    """All results of a call."""
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(d_out, q, k, v, out, lse, deterministic=deterministic, **options)[:3]
    weights = cuflash.attention_weights(q, k, lse, rows=slice(3, None, 50), **options)
    return out, lse, *gradients, weights, cuflash.attention_received(q, k, lse, **options)


@pytest.mark.parametrize("path", ["auto", "mma", "simt"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (40, 30), "q_offset": 150}, {"window": (72, 5), "q_offset": 200}],
    ids=str,
)  # fmt: skip
def test_same_bits_as_by_elements(
    options: dict[str, Any], size: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_KERNEL", path)
    arrays.framework_of(q=cupy.zeros(1)).prepared.clear()
    for outer in ((), (2, 4)):
        blocks = blocks_of(size, *outer)
        wanted = step(*operands(), mask=by_elements(blocks, size), **options)
        mask = cuflash.BlockMask(blocks, size)
        for _ in range(2):
            assert_same_bits(step(*operands(), mask=mask, **options), wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_backward_skips_tiles_as_by_elements(size: tuple[int, int]) -> None:
    blocks = blocks_of(size, 4)
    found, wanted = (
        step(*operands(), mask=mask, deterministic=False)
        for mask in (cuflash.BlockMask(blocks, size), by_elements(blocks, size))
    )
    assert_same_bits((*found[:2], *found[3:5]), (*wanted[:2], *wanted[3:5]))
    cupy.testing.assert_allclose(found[2].astype(np.float32), wanted[2].astype(np.float32), atol=2e-3)


def test_what_is_made_is_kept(made: list[str]) -> None:
    mask = cuflash.BlockMask(blocks_of((128, 128), 4))
    plain = by_elements(mask.blocks, (128, 128))
    arrays.framework_of(q=plain).prepared.clear()
    for _ in range(2):
        step(*operands(), mask=plain)
        assert len(made) == 2, "an array may have changed: forward and backward look at it every time"
        made.clear()
    for count in (2, 0, 0):
        step(*operands(), mask=mask)
        assert len(made) == count
        made.clear()
    step(*operands(), mask=mask, is_causal=True)
    step(*operands(), mask=mask, is_causal=True)
    assert len(made) == 2, "another band leaves other tiles"
    made.clear()
    step(*operands(), mask=mask, scale=0.3)
    assert not made, "the scale makes no other tiles"


def test_memory_of_blocks() -> None:
    """Lists only: 64 thousand tokens would have a mask of 4 GiB, or half a GiB of bits."""
    q = cupy.zeros((1, 65536, 64), np.float16)
    mask = cuflash.BlockMask(cupy.eye(512, dtype=bool))
    out, lse = cuflash.attention(q, q, q, mask=mask, return_lse=True)
    cuflash.attention_backward(out, q, q, q, out, lse, mask=mask)
    assert sum(x.nbytes for x in mask._kept.values()) < 16 << 20


def test_other_streams_make_their_own(made: list[str]) -> None:
    mask = cuflash.BlockMask(blocks_of((100, 60)), (100, 60))
    inputs = operands()
    wanted = step(*inputs, mask=mask)
    cupy.cuda.Device().synchronize()
    for stream in [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]:
        made.clear()
        with stream:
            found = step(*inputs, mask=mask)
            again = step(*inputs, mask=mask)
        stream.synchronize()
        assert len(made) == 2
        assert_same_bits(found, wanted)
        assert_same_bits(again, wanted)
    made.clear()
    step(*inputs, mask=mask)
    assert not made


def test_graphs(made: list[str]) -> None:
    """A graph that is captured without anything kept makes it in every replay; with it, never."""
    torch = pytest.importorskip("torch")
    inputs = [torch.from_dlpack(x).clone() for x in operands()]
    mask = cuflash.BlockMask(torch.from_dlpack(blocks_of((100, 60)).astype(np.uint8)).bool(), (100, 60))
    wanted = step(*inputs, mask=cuflash.BlockMask(mask.blocks, (100, 60)))
    stream = torch.cuda.Stream()
    for is_kept in (False, True):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            if is_kept:
                step(*inputs, mask=mask)
            stream.synchronize()
            made.clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                found = step(*inputs, mask=mask)
        assert len(made) == (0 if is_kept else 2)
        assert len(mask._kept) == (2 if is_kept else 0)
        for result in found:
            result.zero_()
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def test_launches_of_axes_that_are_looped_over(made: list[str]) -> None:
    """Each has its part of the mask, unless they share it."""
    draw = cupy.random.default_rng(0)
    q = draw.standard_normal((3, 2, 4, 200, 64)).astype(np.float16)
    k = draw.standard_normal((2, 4, 200, 64)).astype(np.float16)
    v = draw.standard_normal((3, 1, 4, 200, 64)).astype(np.float16)
    for outer, count in (((3, 2, 4), 3), ((2, 4), 1)):
        blocks = cupy.asarray(np.random.default_rng(1).random((*outer, 4, 2)) < 0.6)
        mask = cuflash.BlockMask(blocks, (64, 100))
        plain = cupy.ascontiguousarray(blocks.repeat(64, -2).repeat(100, -1)[..., :200, :200])
        wanted = step(q, k, v, q, mask=plain)
        made.clear()
        for _ in range(2):
            assert_same_bits(step(q, k, v, q, mask=mask), wanted)
        assert len(made) == 2 * count


def test_autograd_and_threads_of_its_own() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, d_out = (torch.from_dlpack(x).clone() for x in operands())
    blocks = torch.from_dlpack(blocks_of((100, 60)).astype(np.uint8)).bool()
    plain = blocks.repeat_interleave(100, 0).repeat_interleave(60, 1)[:600, :700].contiguous()
    found = []
    for mask in (cuflash.BlockMask(blocks, (100, 60)), plain):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        for _ in range(2):
            out = cuflash.attention(*leaves, mask=mask, deterministic=True)
            found.append((out, *torch.autograd.grad(out, leaves, d_out)))
    for other in found[1:]:
        for one, wanted in zip(other, found[0], strict=True):
            assert torch.equal(one.view(torch.uint8), wanted.view(torch.uint8))


def test_blocks_of_another_place() -> None:
    q, k, v, _ = operands()
    mask = cuflash.BlockMask(np.ones((5, 6), bool))
    with pytest.raises(TypeError, match="mask: got an array of NumPy, wanted one of CuPy as q is"):
        cuflash.attention(q, k, v, mask=mask)
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_dlpack(x).clone() for x in (q, k, v))
    mask = cuflash.BlockMask(torch.ones((5, 6), dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: got an array on the CPU, wanted it on cuda:0"):
        cuflash.attention(q, k, v, mask=mask)
