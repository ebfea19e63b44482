"""The band of visible pairs: every shortcut against the definition, on small grids."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cuflash.scores import Band, make_band

LENGTH = st.integers(0, 12)
BOUND = st.one_of(st.none(), st.integers(-16, 16))
BAND = st.builds(Band, BOUND, BOUND)


def visible(band, seqlen_q, seqlen_k):
    pairs = np.zeros((seqlen_q, seqlen_k), bool)
    for i, j in np.ndindex(pairs.shape):
        pairs[i, j] = (band.lower is None or i + band.lower <= j) and (band.upper is None or j <= i + band.upper)
    return pairs


@given(BAND, LENGTH, LENGTH)
def test_visible_and_its_count(band, seqlen_q, seqlen_k):
    pairs = visible(band, seqlen_q, seqlen_k)
    found = band.visible(np.arange(seqlen_q)[:, None], np.arange(seqlen_k)[None, :])
    np.testing.assert_array_equal(found, pairs)
    assert band.num_visible(seqlen_q, seqlen_k) == pairs.sum()


@given(BAND, LENGTH, LENGTH, st.data())
def test_ranges_are_the_smallest_that_hold_what_is_visible(band, seqlen_q, seqlen_k, data):
    for mine, other, of in ((seqlen_q, seqlen_k, band.key_range), (seqlen_k, seqlen_q, band.query_range)):
        start = data.draw(st.integers(0, mine))
        stop = data.draw(st.integers(start, mine))
        pairs = visible(band, seqlen_q, seqlen_k)
        if of == band.query_range:
            pairs = pairs.T
        seen = np.flatnonzero(pairs[start:stop].any(axis=0))
        found = of(start, stop, other)
        assert 0 <= found[0] <= found[1] <= other
        assert set(seen) <= set(range(*found))
        # A band whose bounds exclude each other has ranges, but nothing in them.
        if band.lower is None or band.upper is None or band.lower <= band.upper:
            assert found[1] - found[0] == (seen[-1] + 1 - seen[0] if len(seen) else 0)


@given(BAND, LENGTH, LENGTH, st.data())
def test_is_full_means_that_everything_is_visible(band, seqlen_q, seqlen_k, data):
    q_start = data.draw(st.integers(0, seqlen_q))
    q_stop = data.draw(st.integers(q_start, seqlen_q))
    k_start = data.draw(st.integers(0, seqlen_k))
    k_stop = data.draw(st.integers(k_start, seqlen_k))
    if q_start < q_stop and k_start < k_stop:
        block = visible(band, seqlen_q, seqlen_k)[q_start:q_stop, k_start:k_stop]
        assert band.is_full(q_start, q_stop, k_start, k_stop) == block.all()


WINDOW = st.one_of(st.none(), st.tuples(*[st.one_of(st.none(), st.integers(0, 14))] * 2))


@given(st.booleans(), WINDOW, st.one_of(st.none(), st.integers(-16, 16)), LENGTH, LENGTH)
def test_make_band_says_what_the_options_say(is_causal, window, q_offset, seqlen_q, seqlen_k):
    band = make_band(is_causal, window, q_offset, seqlen_q, seqlen_k)
    offset = seqlen_k - seqlen_q if q_offset is None else q_offset
    left, right = window or (None, None)
    expected = np.ones((seqlen_q, seqlen_k), bool)
    for i, j in np.ndindex(expected.shape):
        expected[i, j] = (
            (not is_causal or j <= i + offset)
            and (left is None or i + offset - left <= j)
            and (right is None or j <= i + offset + right)
        )
    np.testing.assert_array_equal(visible(band, seqlen_q, seqlen_k), expected)
    # Bounds that hide nothing are dropped, so that equal problems are equal.
    if seqlen_q and seqlen_k and expected.all():
        assert band.is_open
        assert band == Band()


def test_defaults():
    assert make_band(False, None, None, 5, 7) == Band()
    assert make_band(True, None, None, 5, 7) == Band(None, 2)  # the last query sees the last key
    assert make_band(True, None, 0, 5, 7) == Band(None, 0)
    assert make_band(False, (1, 2), None, 7, 7) == Band(-1, 2)
    assert make_band(True, (1, 2), None, 7, 7) == Band(-1, 0)
