"""``BlockMask`` on the CPU: the same as the mask by elements that it means, to the bit; and what is wrong with one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import cpu
from cuflash.scores import Band, Score
from tests.cpu import test_cpu_scores
from tests.cpu.test_dlpack import Array
from tests.strategies import Case, cases, make_operands
from tests.tolerance import Yardstick


def random(*shape: int, dtype: Any = np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def blocks_of(*shape: int, share: float = 0.5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).random(shape) < share


def by_elements(blocks: np.ndarray, size: tuple[int, int], seqlen_q: int, seqlen_k: int) -> np.ndarray:
    """What a mask by blocks means, pair by pair."""
    found = np.empty((*blocks.shape[:-2], seqlen_q, seqlen_k), bool)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            row = 0 if blocks.shape[-2] == 1 else i // size[0]
            found[..., i, j] = blocks[..., row, 0 if blocks.shape[-1] == 1 else j // size[1]]
    return found


def results(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any, **options: Any) -> list[np.ndarray]:
    """All that the functions which take a mask return."""
    out, lse = cuflash.attention(q, k, v, mask=mask, return_lse=True, **options)
    d_out, d_lse = random(*out.shape, dtype=out.dtype, seed=8), random(*lse.shape, dtype=lse.dtype, seed=9)
    d_lse[~np.isfinite(lse)] = 0
    gradients = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, mask=mask, **options)
    weights = [
        cuflash.attention_weights(q, k, lse, mask=mask, rows=rows, **options)
        for rows in (None, slice(1, None, 3), -1)
        if q.shape[-2 if options.get("layout") != "bshd" else -3] or rows is None
    ]
    return [out, lse, *gradients[:3], *weights, cuflash.attention_received(q, k, lse, mask=mask, **options)]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------------- the mask that it means


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 5), (1, 4), (7, 1), (4, 4), (100, 3), (13, 1000)], ids=str)
@pytest.mark.parametrize("outer", [(), (1,), (4,), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_is_the_mask_by_elements(size: tuple[int, int], outer: tuple[int, ...], layout: str) -> None:
    q, k, v = random(2, 4, 13, 6), random(2, 2, 17, 6, seed=1), random(2, 2, 17, 3, seed=2)
    if layout == "bshd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    for narrow in ((False, False), (True, False), (False, True), (True, True)):
        shape = (1 if narrow[0] else -(-13 // size[0])), (1 if narrow[1] else -(-17 // size[1]))
        blocks = blocks_of(*outer, *shape, seed=3)
        wanted = results(q, k, v, by_elements(blocks, size, 13, 17), layout=layout)
        assert_same(results(q, k, v, cuflash.BlockMask(blocks, size), layout=layout), wanted)


@pytest.mark.parametrize("size", [(64, 32), (100, 130), (512, 700), (128, 128)], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (300, 40)}], ids=str)
def test_many_tiles(size: tuple[int, int], options: dict[str, Any]) -> None:
    q, k, v = random(4, 700, 8), random(2, 1100, 8, seed=1), random(2, 1100, 8, seed=2)
    blocks = blocks_of(4, -(-700 // size[0]), -(-1100 // size[1]))
    wanted = results(q, k, v, blocks.repeat(size[0], -2).repeat(size[1], -1)[:, :700, :1100], **options)
    assert_same(results(q, k, v, cuflash.BlockMask(blocks, size), **options), wanted)


def test_one_number_is_the_size_of_both_axes_and_strides_do_not_matter() -> None:
    q, k, v = random(3, 2, 13, 6)
    blocks = blocks_of(3, 10, 10)[:2, ::-2, 1::2]
    wanted = results(q, k, v, by_elements(blocks, (3, 3), 13, 13))
    assert_same(results(q, k, v, cuflash.BlockMask(blocks, 3)), wanted)
    assert cuflash.BlockMask(blocks).block_size == (128, 128)


def test_the_same_blocks_in_other_sizes() -> None:
    """A call that was prepared for one of them does not serve the others, nor plain masks."""
    q, k, v = random(2, 4, 13, 6), random(2, 2, 17, 6), random(2, 2, 17, 3)
    blocks = np.eye(2, dtype=bool)
    for size in ((7, 9), (9, 12), (7, 12)):
        wanted = results(q, k, v, by_elements(blocks, size, 13, 17))
        assert_same(results(q, k, v, cuflash.BlockMask(blocks, size)), wanted)
    with pytest.raises(ValueError, match="mask: got shape"):
        cuflash.attention(q, k, v, mask=blocks)


def test_matrices_and_batch_axes_that_are_no_single_one() -> None:
    q, k, v = random(3, 13, 6)
    blocks = blocks_of(5, 4)
    assert_same(
        results(q, k, v, cuflash.BlockMask(blocks, (3, 4))), results(q, k, v, by_elements(blocks, (3, 4), 13, 13))
    )
    q, k, v = random(3, 2, 4, 13, 6), random(2, 2, 17, 6), random(3, 1, 2, 17, 3)
    for outer in ((3, 1, 1), (2, 4), (3, 2, 1)):
        blocks = blocks_of(*outer, 5, 5)
        wanted = results(q, k, v, by_elements(blocks, (3, 4), 13, 17))
        assert_same(results(q, k, v, cuflash.BlockMask(blocks, (3, 4))), wanted)


@st.composite
def masks(draw: Any, case: Case) -> tuple[np.ndarray, tuple[int, int]]:
    """Blocks that broadcast to a case, and their sizes."""
    size = draw(st.tuples(*[st.sampled_from((1, 2, 3, 16, 50, 64, 128, 1000))] * 2))
    whole = (case.batch, case.num_heads, -(-case.seqlen_q // size[0]), -(-case.seqlen_k // size[1]))
    shape = tuple(n if draw(st.booleans()) else 1 for n in whole)[draw(st.integers(0, 2)) :]
    return blocks_of(*shape, share=draw(st.sampled_from((0.1, 0.5, 0.9))), seed=draw(st.integers(0, 99))), size


@given(data=st.data())
def test_any_call(data: Any) -> None:
    dims = st.tuples(st.integers(1, 24), st.integers(1, 24))
    case = data.draw(cases(dims=dims, dtypes=("float32", "float64"), max_seqlen=140, max_batch=2))
    blocks, size = data.draw(masks(case))
    q, k, v, _ = make_operands(case)
    pairs = blocks
    for axis, length in ((-2, case.seqlen_q), (-1, case.seqlen_k)):
        if blocks.shape[axis] > 1 or length == 0:
            pairs = pairs.repeat(size[axis], axis).take(range(length), axis)
    wanted = results(q, k, v, pairs, **case.options)
    assert_same(results(q, k, v, cuflash.BlockMask(blocks, size), **case.options), wanted)


def test_is_what_the_reference_says() -> None:
    """With everything else that is done to scores, and weights of queries that do not follow one another."""
    shape = (2, 4, 2, 71, 93, 20, 13)
    blocks = blocks_of(2, 4, 8, 5)
    options = {key: value for one in test_cpu_scores.make_options(shape).values() for key, value in one.items()}
    every = Score(**options | {"mask": blocks, "mask_block": (10, 20)})
    for score in (Score(mask=blocks, mask_block=(10, 20)), every):
        problem = test_cpu_scores.make_problem(shape, score=score, band=Band(None, 60))
        operands = problem[:3]
        yardstick = Yardstick(*operands, band=problem.band, scale=problem.scale, score=score)
        pairs = by_elements(blocks, (10, 20), 71, 93)
        other = Yardstick(
            *operands, band=problem.band, scale=problem.scale, score=score._replace(mask=pairs, mask_block=(1, 1))
        )
        np.testing.assert_array_equal(yardstick.out, other.out)
        out, lse = np.empty(yardstick.out.shape, np.float32), np.empty(yardstick.lse.shape, np.float32)
        views = test_cpu_scores.canonical(problem._replace(score=score._replace(mask=None)))
        cpu.forward(
            *operands, out, lse, band=problem.band, scale=problem.scale,
            score=views._replace(mask=blocks, mask_block=(10, 20)),
        )  # fmt: skip
        yardstick.assert_forward(out, lse)


def test_tiles_that_it_hides_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """And blocks are looked up only where a tile has visible and hidden ones."""
    tiles, found = [], []
    tile, lookup = cpu._Scores.tile, cpu.mask_of_pairs

    def count(*arguments: Any) -> Any:
        tiles.append(tile(*arguments))
        return tiles[-1]

    def expand(*arguments: Any) -> Any:
        found.append(lookup(*arguments))
        return found[-1]

    monkeypatch.setattr(cpu._Scores, "tile", count)
    monkeypatch.setattr(cpu, "mask_of_pairs", expand)
    q, k, v = random(3, 1, 2048, 8)
    mask = cuflash.BlockMask(np.eye(4, dtype=bool), 512)
    cuflash.attention(q, k, v, mask=mask)
    assert sum(x is None for x in tiles) == 12
    assert len(tiles) == 16
    assert not found
    cuflash.attention(q, k, v, mask=cuflash.BlockMask(np.eye(8, dtype=bool), 256))
    assert {x.shape[-2:] for x in found} == {(512, 512)}


# --------------------------------------------------------------------------------------------------- the object


def test_it_copies_what_it_is_given_and_does_not_change() -> None:
    blocks = blocks_of(5, 5)
    mask = cuflash.BlockMask(blocks, (3, 4))
    before = blocks.copy()
    blocks[...] = ~blocks
    np.testing.assert_array_equal(mask.blocks, before)
    with pytest.raises(ValueError, match="read-only"):
        mask.blocks[0, 0] = True
    with pytest.raises(AttributeError):
        mask.block_size = (1, 1)
    with pytest.raises(AttributeError):
        mask.blocks = before
    assert repr(mask) == "BlockMask((5, 5), block_size=(3, 4))"
    for other in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
        np.testing.assert_array_equal(other.blocks, before)
        assert other.block_size == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[True]],), TypeError, "mask: got list, wanted an array"),
        ((np.ones((2, 2)),), TypeError, "mask: got blocks of dtype float64, wanted bool"),
        ((np.ones(2, bool),), ValueError, r"mask: got blocks of shape \(2,\), wanted two axes or more"),
        ((np.ones((2, 2), bool), 0), ValueError, "block_size: got 0, wanted numbers of queries and keys above 0"),
        ((np.ones((2, 2), bool), (4, -1)), ValueError, r"block_size: got \(4, -1\)"),
        ((np.ones((2, 2), bool), 2.0), TypeError, "block_size: got 2.0, wanted an integer, or a tuple of two"),
        ((np.ones((2, 2), bool), True), TypeError, "block_size: got True"),
        ((np.ones((2, 2), bool), (1, 2, 3)), TypeError, r"block_size: got \(1, 2, 3\)"),
        ((np.ones((2, 2), bool), [1, 2]), TypeError, r"block_size: got \[1, 2\]"),
    ],
)
def test_errors_of_the_object(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cuflash.BlockMask(*arguments)


@pytest.mark.parametrize(
    ("shape", "size", "wanted"),
    [
        ((5, 4), (3, 4), r"\(2, 4, 5, 5\), \(\.\.\., heads, ceil\(seqlen_q / 3\), ceil\(seqlen_k / 4\)\)"),
        ((5, 5), (4, 4), r"\(2, 4, 4, 5\)"),
        ((3, 5, 5), (3, 4), r"\(2, 4, 5, 5\)"),
        ((2, 2, 4, 5, 5), (3, 4), r"\(2, 4, 5, 5\)"),
        ((13, 16), (1, 1), r"\(2, 4, 13, 17\), \(\.\.\., heads, seqlen_q, seqlen_k\)"),
    ],
)
def test_blocks_that_do_not_fit(shape: tuple[int, ...], size: tuple[int, int], wanted: str) -> None:
    q, k, v = random(2, 4, 13, 6), random(2, 2, 17, 6), random(2, 2, 17, 3)
    mask = cuflash.BlockMask(blocks_of(*shape), size)
    with pytest.raises(ValueError, match=rf"mask: got shape .*, wanted a shape that broadcasts to {wanted}"):
        cuflash.attention(q, k, v, mask=mask)
    _, lse = cuflash.attention(q, k, v, return_lse=True)
    with pytest.raises(ValueError, match="mask: got shape"):
        cuflash.attention_weights(q, k, lse, mask=mask)


# ------------------------------------------------------------------------------------------------- other libraries


def test_arrays_through_dlpack() -> None:
    q, k, v = random(3, 2, 13, 6)
    blocks = blocks_of(5, 4)
    mask = cuflash.BlockMask(Array(blocks), (3, 4))
    assert type(mask.blocks) is Array
    np.testing.assert_array_equal(mask.blocks.array, blocks)
    found = cuflash.attention(*map(Array, (q, k, v)), mask=mask)
    np.testing.assert_array_equal(found.array, cuflash.attention(q, k, v, mask=cuflash.BlockMask(blocks, (3, 4))))
    with pytest.raises(TypeError, match="mask: got an array of NumPy, wanted one of"):
        cuflash.attention(*map(Array, (q, k, v)), mask=cuflash.BlockMask(blocks, (3, 4)))
    with pytest.raises(TypeError, match="wanted one of NumPy as q is"):
        cuflash.attention(q, k, v, mask=mask)


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    q, k, v = random(3, 2, 13, 6, dtype=np.float32)
    blocks = blocks_of(5, 4)
    mask = cuflash.BlockMask(jax.numpy.asarray(blocks), (3, 4))
    found = cuflash.attention(*map(jax.numpy.asarray, (q, k, v)), mask=mask)
    assert isinstance(mask.blocks, jax.Array)
    np.testing.assert_array_equal(found, cuflash.attention(q, k, v, mask=cuflash.BlockMask(blocks, (3, 4))))


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def test_autograd(torch: Any) -> None:
    q, k, v = (torch.tensor(random(2, 4, 13, 6, seed=seed), requires_grad=True) for seed in range(3))
    blocks = torch.tensor(blocks_of(4, 5, 4))
    mask = cuflash.BlockMask(blocks, (3, 4))
    elements = torch.tensor(by_elements(blocks.numpy(), (3, 4), 13, 13))
    blocks.zero_()
    found, wanted = (
        torch.autograd.grad(cuflash.attention(q, k, v, mask=x).square().sum(), (q, k, v)) for x in (mask, elements)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert any(x.any() for x in found)
    negative = torch.complex(torch.zeros_like(q), -q).conj().imag.detach()
    with torch.no_grad():
        torch.testing.assert_close(cuflash.attention(negative, k, v, mask=mask), cuflash.attention(q, k, v, mask=mask))
        _, lse = cuflash.attention(q, k, v, mask=mask, return_lse=True)
        received = cuflash.attention_received(q, k, lse, mask=mask)
        torch.testing.assert_close(received, cuflash.attention_received(q, k, lse, mask=elements))


@pytest.mark.parametrize("num_axes", [2, 3, 4])
def test_vmap(num_axes: int, torch: Any) -> None:
    """Every entry gets the same mask."""
    shape = (2, 4, 13, 6)[4 - num_axes :]
    q, k, v = (torch.tensor(random(3, *shape, seed=seed)) for seed in range(3))
    mask = cuflash.BlockMask(torch.tensor(blocks_of(*shape[:-2], 5, 4)), (3, 4))

    def gradients(*x: Any) -> Any:
        return torch.func.grad(lambda *x: cuflash.attention(*x, mask=mask).square().sum(), argnums=(0, 1, 2))(*x)

    for function in (lambda *x: (cuflash.attention(*x, mask=mask),), gradients):
        found = torch.func.vmap(function)(q, k, v)
        for i in range(3):
            wanted = function(q[i], k[i], v[i])
            torch.testing.assert_close(tuple(x[i] for x in found), tuple(wanted))


def test_masks_are_not_made_inside_vmap(torch: Any) -> None:
    q = torch.tensor(random(3, 4, 13, 6))
    blocks = torch.tensor(blocks_of(3, 5, 4))
    with pytest.raises(ValueError, match="mask: got blocks without memory of their own"):
        torch.func.vmap(lambda q, x: cuflash.attention(q, q, q, mask=cuflash.BlockMask(x, (3, 4))))(q, blocks)
