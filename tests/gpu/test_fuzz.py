"""The public functions on arrays of any shape, strides and options that hypothesis comes up with.

A kernel is compiled per dtype, padded head dims and way of copying, so a test is one such family: it draws lengths,
heads, bands, strides and the head dims that are padded alike freely, and compiles nothing new.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu.harness import check_backward, check_forward
from tests.strategies import DTYPES, STORAGES, Case, cases

# Padded head dim, and the smallest that is padded to it.
BUCKETS = {64: 33, 128: 97, 256: 193}
ALIGNED = [name for name in STORAGES if name not in ("odd_rows", "offset")]
FAMILIES = [
    Case(dtype=dtype, head_dim=bucket, head_dim_v=bucket, storage=(storage,) * 4)
    for dtype in DTYPES
    for bucket in BUCKETS
    for storage in ("contiguous", "offset")
]


def dims_of(family: Case) -> st.SearchStrategy[tuple[int, int]]:
    """Head dims that the family's kernel serves; whole 16-byte vectors where its operands are aligned."""
    largest, smallest = family.head_dim, BUCKETS[family.head_dim]
    if family.storage[0] == "contiguous":
        dim = st.integers(-(-smallest // 8), largest // 8).map(lambda eighth: 8 * eighth)
    else:
        dim = st.integers(smallest, largest)
    return st.tuples(dim, dim)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
@settings(max_examples=12)
@given(data=st.data(), with_d_lse=st.booleans())
def test_any_call(case: Case, data: st.DataObject, with_d_lse: bool) -> None:
    drawn = data.draw(
        cases(
            dtypes=(case.dtype,),
            dims=dims_of(case),
            storages=ALIGNED if case.storage[0] == "contiguous" else STORAGES,
            max_seqlen=300,
        )
    )
    check_forward(drawn)
    check_backward(drawn, with_d_lse=with_d_lse)
