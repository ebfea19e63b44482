"""Random bits of dropout: known answers, and what follows from keys that are positions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuflash
from cuflash import rng

#: Of the authors' reference implementation (Random123, kat_vectors): rounds, counter, key, result.
KNOWN_ANSWERS = [
    (7, 0x00000000, 0x0000000000000000, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (10, 0x00000000, 0x0000000000000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(rounds, counter, key, words):
    word = np.array(counter)
    assert tuple(rng.philox((word, word, word, word), key, rounds).tolist()) == words


def kept(seed, dropout_p, batch, head, i, j):
    """One weight, as a lane of a tensor-core fragment would look it up."""
    row, column = i % 16, j % 16
    lane = row % 8 * 4 + column % 8 // 2
    counter = (j // 16, i // 16, batch, head * 32 + lane)
    words = rng.philox(tuple(np.array(word) for word in counter), seed)
    draw = int(words[column % 2 * 2 + column // 8]) >> (16 * (row // 8)) & 0xFFFF
    return draw >= round(dropout_p * 65536)


@given(
    st.integers(0, 2**64 - 1), st.floats(0, 0.99), st.integers(0, 1000), st.integers(0, 200),
    st.integers(0, 70), st.integers(1, 20), st.integers(0, 70), st.integers(1, 20),
)  # fmt: skip
def test_any_tile_is_a_piece_of_the_whole(seed, dropout_p, batch, head, q_start, rows, k_start, columns):
    queries, keys = slice(q_start, q_start + rows), slice(k_start, k_start + columns)
    tile = rng.keep(seed, dropout_p, batch, slice(head, head + 2), queries, keys)
    assert tile.shape == (2, rows, columns)
    for h, i, j in ((0, 0, 0), (1, rows - 1, columns - 1), (1, rows // 2, columns // 3)):
        assert tile[h, i, j] == kept(seed, dropout_p, batch, head + h, q_start + i, k_start + j)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9])
def test_rate(dropout_p):
    """Within five standard deviations; per row and per column, too, where patterns would show."""
    mask = rng.dropout_mask(123, dropout_p, (4, 8, 256, 512))
    sigma = np.sqrt(dropout_p * (1 - dropout_p))
    for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        mean = mask.mean(axes)
        count = mask.size / max(mean.size, 1)
        assert np.all(np.abs(mean - (1 - dropout_p)) <= 5 * sigma / np.sqrt(count) + 2**-17)


def test_independence():
    """No two of seeds, batch entries, heads, rows, columns and neighbours agree more often than chance has it."""
    mask = rng.dropout_mask(9, 0.5, (2, 2, 512, 512))
    other = rng.dropout_mask(10, 0.5, (2, 2, 512, 512))
    distant = rng.dropout_mask(9 + (1 << 32), 0.5, (2, 2, 512, 512))
    pairs = [(mask, other), (mask, distant), (mask[0], mask[1]), (mask[:, 0], mask[:, 1])]
    pairs += [(mask[..., distance:], mask[..., :-distance]) for distance in (1, 2, 8, 16, 32)]
    pairs += [(mask[..., distance:, :], mask[..., :-distance, :]) for distance in (1, 2, 8, 16, 32)]
    for one, two in pairs:
        assert abs((one == two).mean() - 0.5) < 5 * 0.5 / np.sqrt(one.size)


def test_extremes_and_empty_shapes():
    assert rng.dropout_mask(0, 0.0, (3, 5, 7)).all()
    np.testing.assert_array_equal(cuflash.dropout_mask(-3, 0.5, [3, 5, 7]), rng.dropout_mask(2**64 - 3, 0.5, (3, 5, 7)))
    assert rng.dropout_mask(0, 0.5, (0, 2, 3, 4)).shape == (0, 2, 3, 4)
    assert rng.dropout_mask(0, 0.5, (2, 0, 3)).shape == (2, 0, 3)
    # Batch axes are one, in C order.
    np.testing.assert_array_equal(
        rng.dropout_mask(4, 0.5, (2, 3, 1, 20, 20)).reshape(6, 1, 20, 20), rng.dropout_mask(4, 0.5, (6, 1, 20, 20))
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((1.5, 0.5, (2, 3, 4)), TypeError, "seed: got 1.5, wanted an integer"),
        ((1, 1.0, (2, 3, 4)), ValueError, r"dropout_p: got 1.0, wanted a probability in \[0, 1\)"),
        ((1, 0.5, (3, 4)), ValueError, r"shape: got \(3, 4\), wanted \(..., heads, seqlen_q, seqlen_k\)"),
        ((1, 0.5, (2, -3, 4)), ValueError, "none of them negative"),
        ((1, 0.5, 5), TypeError, "shape: got 5, wanted integers"),
    ],
)
def test_wrong_arguments_of_the_public_mask(arguments, error, text):
    with pytest.raises(error, match=text):
        cuflash.dropout_mask(*arguments)
