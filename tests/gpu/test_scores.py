"""What is done to scores and weights, alone and together, on every path: against the float64 reference.

A kernel is compiled per dtype, padded head dims, path and set of options, so a test is one such family; lengths, heads,
bands, strides, broadcasts and numbers are hypothesis's to choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash import arrays, reference, rng
from cuflash import compile as compiler
from cuflash.expression import Bound
from cuflash.scores import Score
from tests.gpu.harness import ScoreFamily, WeightsFamily, assert_same_bits, cupy
from tests.strategies import DTYPES, EXPRESSIONS, Case, cases, make_mod, make_operands
from tests.tolerance import Yardstick

#: Names of the options of a call.
SETS = (
    ("bias",),
    ("mask",),
    ("softcap", "alibi_slopes"),
    ("sinks", "dropout"),
    ("mask", "bias", "alibi_slopes", "sinks", "softcap", "dropout"),
    ("expression",),
    ("curve", "mask", "bias", "alibi_slopes", "sinks", "softcap", "dropout"),
)
#: Paths (`CUFLASH_KERNEL`) that a dtype can take beside the planner's own.
PATHS = {
    "float16": ("auto", "mma", "simt"),
    "bfloat16": ("auto",),
    "float32": ("auto", "simt"),
    "float64": ("auto",),
}
EVERY = [
    ScoreFamily(dtype, path, dim, names)
    for dtype in DTYPES
    for path in PATHS[dtype]
    for dim in ((64, 128) if path == "auto" else (64,))
    for names in SETS
]


def broadcastable(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with some axes of one element, and some left out in front."""
    kept = tuple(size if draw(st.booleans()) else 1 for size in shape)
    return kept[draw(st.integers(0, len(shape) - 1)) :]


def on_lines(array: cupy.ndarray) -> cupy.ndarray:
    """The same with rows that begin on 16 bytes, as engines that load tiles want them."""
    columns, step = array.shape[-1], 16 // array.itemsize
    room = cupy.empty((*array.shape[:-1], -(-columns // step) * step), array.dtype)
    room[..., :columns] = array
    return room[..., :columns]


def bound(mod: cuflash.ScoreMod) -> Bound:
    """What the reference takes for it."""
    return Bound(mod.expression, {**mod.arrays, **mod.numbers})


@st.composite
def block_masks(draw: Any, case: Case) -> dict[str, Any]:
    """A mask by blocks, which tiles divide or do not."""
    size = draw(st.tuples(*[st.sampled_from((1, 3, 16, 64, 100, 128, 256))] * 2))
    blocks = (-(-length // one) for length, one in zip((case.seqlen_q, case.seqlen_k), size, strict=True))
    shape = tuple(n if draw(st.booleans()) else 1 for n in (case.batch, case.num_heads, *blocks))
    numbers = np.random.default_rng(draw(st.integers(0, 999)))
    return {"mask": numbers.random(shape[draw(st.integers(0, 2)) :]) < 0.7, "mask_block": size}


@st.composite
def scores(draw: Any, case: Case, family: ScoreFamily) -> Score:
    """The family's options, with arrays on the device."""
    names = family.names
    numbers = np.random.default_rng(draw(st.integers(0, 999)))
    pairs = (case.batch, case.num_heads, case.seqlen_q, case.seqlen_k)
    made: dict[str, Any] = {}
    if "mask" in names:
        made["mask"] = mask = numbers.random(broadcastable(draw, pairs)) < draw(st.sampled_from((0.1, 0.7, 0.95)))
        if draw(st.booleans()):  # tiles that are hidden, or shown, wholly
            pairs_of_mask = np.atleast_2d(mask)
            *outer, rows, columns = pairs_of_mask.shape
            size = draw(st.sampled_from((16, 64, 128)))
            tiles = numbers.integers(0, 3, (*outer, -(-rows // size), -(-columns // size)))
            tiles = tiles.repeat(size, -1).repeat(size, -2)[..., :rows, :columns]
            pairs_of_mask &= tiles > 0
            pairs_of_mask |= tiles > 1
        if draw(st.booleans()):
            made |= draw(block_masks(case))
    if "bias" in names:
        bias = draw(st.sampled_from((1.0, 10.0))) * numbers.standard_normal(broadcastable(draw, pairs))
        made["bias"] = bias.astype(family.bias_dtype)
    if "alibi_slopes" in names:
        shape = draw(st.sampled_from(((case.num_heads,), (case.batch, case.num_heads))))
        made["alibi_slopes"] = numbers.random(shape).astype(family.sum_dtype) / 4
    if "sinks" in names:
        made["sinks"] = draw(st.sampled_from((1.0, 5.0))) * numbers.standard_normal(case.num_heads)
    if "softcap" in names:
        made["softcap"] = draw(st.sampled_from((0.5, 5.0, 50.0)))
    if "dropout" in names:
        made |= {"dropout_p": draw(st.sampled_from((0.1, 0.5))), "seed": draw(st.integers(0, 2**64 - 1))}
    for name in ("mask", "bias", "alibi_slopes", "sinks"):
        if name in made:
            made[name] = cupy.asarray(made[name])
    if "bias" in names and draw(st.booleans()):
        made["bias"] = on_lines(made["bias"])
    for name in EXPRESSIONS:
        if name in names:
            made["mod"] = bound(make_mod(name, case, cupy.asarray))
    q_offset = case.seqlen_k - case.seqlen_q if case.q_offset is None else case.q_offset
    return Score(**made)._replace(q_offset=q_offset)


#: Of what changes scores all that a kernel of weights reads, and nothing.
WEIGHTS = [
    WeightsFamily(dtype, path, dim, names)
    for dtype in DTYPES
    for path in PATHS[dtype]
    for dim in ((64, 256) if path == "auto" else (64,))
    for names in ((), ("expression",), ("curve", "mask", "bias", "alibi_slopes", "sinks", "softcap"))
]


@pytest.mark.parametrize("family", WEIGHTS, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_any_weights(family: WeightsFamily, data: st.DataObject) -> None:
    dims = st.just((family.head_dim, family.head_dim))
    case = data.draw(
        cases(dtypes=(family.dtype,), dims=dims, storages=("contiguous", "padded", "sliced"), max_seqlen=200)
        .filter(lambda case: case.seqlen_q * case.seqlen_k > 0)
    )  # fmt: skip
    score = data.draw(scores(case, family))
    rows = slice(data.draw(st.integers(0, case.seqlen_q - 1)), data.draw(st.integers(1, case.seqlen_q)),
                 data.draw(st.integers(1, 5)))  # fmt: skip
    check_weights(family, case, score, rows)


def test_weights_of_one_key() -> None:
    """Two scores, which a plain program happens to get to the last bit from terms many times as large."""
    lengths = {"seqlen_q": 1, "seqlen_k": 1, "head_dim": 256, "head_dim_v": 256}
    case = Case("float32", num_heads=2, num_heads_kv=1, **lengths, spread=3.0)
    check_weights(WeightsFamily("float32", "auto", 256, ()), case, Score(), slice(0, 1))


def check_weights(family: WeightsFamily, case: Case, score: Score, rows: slice) -> None:
    """Judge the weights of some queries, and what keys receive of all, on the family's path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUFLASH_KERNEL", family.path)
        arrays.framework_of(q=cupy.zeros(1)).prepared.clear()
        q, k, v, _ = make_operands(case, cupy.asarray)
        arranged = [x if case.layout == "bhsd" else x.swapaxes(1, 2) for x in (q, k, v)]
        slopes = score.alibi_slopes
        two_axes = score._replace(alibi_slopes=None if slopes is None else slopes.reshape(-1, case.num_heads))
        yardstick = Yardstick(*arranged, band=case.band, scale=case.softmax_scale, score=two_axes)
        lse = yardstick.lse.astype(family.sum_dtype)
        options = options_of(case, score)
        del options["sinks"], options["dropout_p"], options["seed"]
        weights = cuflash.attention_weights(q, k, lse, rows=rows, **options)
        yardstick.assert_weights(weights, lse, range(case.seqlen_q)[rows])
        received = cuflash.attention_received(q, k, lse, **options)
        yardstick.assert_received(received, lse)
        assert_same_bits((cuflash.attention_received(q, k, lse, **options),), (received,))


@pytest.mark.parametrize("family", EVERY, ids=str)
@settings(max_examples=40)
@given(data=st.data(), with_d_lse=st.booleans())
def test_any_call(family: ScoreFamily, data: st.DataObject, with_d_lse: bool) -> None:
    dims = st.just((family.head_dim, family.head_dim))
    case = data.draw(
        cases(dtypes=(family.dtype,), dims=dims, storages=("contiguous", "padded", "sliced"), max_seqlen=200)
        .filter(lambda case: case.seqlen_q * case.seqlen_k > 0)
    )  # fmt: skip
    score = data.draw(scores(case, family))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUFLASH_KERNEL", family.path)
        arrays.framework_of(q=cupy.zeros(1)).prepared.clear()  # a call that was prepared for another path
        runs = 2 if family.has_order and data.draw(st.booleans()) else 0
        check(case, score, with_d_lse=with_d_lse, runs_in_order=runs)


def test_scores_far_above_softcap() -> None:
    """Derivatives of softcap are those of scores whose terms cancel; of 65 keys queries see few."""
    case = Case("float32", batch=3, seqlen_q=65, seqlen_k=65, head_dim=128, head_dim_v=128, spread=3.0)
    numbers = np.random.default_rng(0)
    score = Score(
        0.5, cupy.asarray(numbers.standard_normal((1, 1, 1, 1)), np.float32), cupy.asarray(numbers.random(65) < 0.15),
        cupy.full(1, 0.05, np.float32), 0, cupy.full(1, 1.3), 0.1,
    )  # fmt: skip
    check(case, score, with_d_lse=True)


def options_of(case: Case, score: Score) -> dict[str, Any]:
    """Keyword arguments of the public functions."""
    mod = None
    if score.mod is not None:
        expression, values = score.mod
        numbers = {name for name, found in expression.captures.items() if found.num_axes is None}
        mod = cuflash.ScoreMod(
            expression,
            {name: values[name] for name in values if name not in numbers},
            {name: values[name] for name in values if name in numbers},
        )
    mask = score.mask if score.mask_block == (1, 1) else cuflash.BlockMask(score.mask, score.mask_block)
    return {
        **case.options, "mask": mask, "bias": score.bias, "alibi_slopes": score.alibi_slopes,
        "sinks": score.sinks, "softcap": score.softcap, "dropout_p": score.dropout_p, "seed": score.seed,
        "score_mod": mod,
    }  # fmt: skip


def check(case: Case, score: Score, *, with_d_lse: bool, runs_in_order: int = 0) -> None:
    """Judge out, LSE and all gradients of a call by the one tolerance rule; as many runs have to give the same bits."""
    q, k, v, d_out = make_operands(case, cupy.asarray)
    options = options_of(case, score)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    d_lse = None
    if with_d_lse:
        d_lse = cupy.asarray(np.random.default_rng(1).standard_normal(lse.shape), dtype=lse.dtype)
        d_lse[~cupy.isfinite(lse)] = 0
    options["deterministic"] = runs_in_order > 0
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **options)
    for _ in range(runs_in_order - 1):
        again = cuflash.attention_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **options)
        for one, other in zip(again[:6], found[:6], strict=True):
            if other is not None:
                assert_same_bits(one, other)

    arranged = [x if case.layout == "bhsd" else x.swapaxes(1, 2) for x in (q, k, v, d_out, out, *found[:3])]
    slopes = score.alibi_slopes
    two_axes = score._replace(alibi_slopes=None if slopes is None else slopes.reshape(-1, case.num_heads))
    yardstick = Yardstick(*arranged[:3], band=case.band, scale=case.softmax_scale, score=two_axes)
    yardstick.assert_forward(arranged[4], lse)
    d_slopes = None if slopes is None else found.d_alibi_slopes.reshape(-1, case.num_heads)
    gradients = reference.Gradients(*arranged[5:], found.d_bias, d_slopes, found.d_sinks, found.d_captured)
    yardstick.assert_backward(arranged[3], gradients, d_lse=d_lse)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "band", [{}, {"q_offset": -500}, {"is_causal": True}, {"window": (300, 200)}, {"window": (900, 900)}], ids=str
)
def test_slopes_of_long_sequences(dim: int, band: dict[str, Any]) -> None:
    """Scores fall by distance, far below those of the nearest keys, or rise, whichever tile they lie in."""
    arrays.framework_of(q=cupy.zeros(1)).prepared.clear()
    sizes = {"num_heads": 4, "num_heads_kv": 2, "seqlen_q": 1100, "seqlen_k": 1300, "head_dim": dim, "head_dim_v": dim}
    case = Case(batch=2, **sizes, **band)
    slopes = cupy.asarray([0.5, 0.01, 0.0, -0.05], np.float32)
    q_offset = 200 if case.q_offset is None else case.q_offset
    check(case, Score(alibi_slopes=slopes, q_offset=q_offset), with_d_lse=False)


@pytest.mark.parametrize("path", ["auto", "mma", "simt"])
def test_softcap_of_a_single_score(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The LSE of one key is its score, which is small beside the cap: its error must be, too."""
    monkeypatch.setenv("CUFLASH_KERNEL", path)
    arrays.framework_of(q=cupy.zeros(1)).prepared.clear()
    case = Case(seqlen_q=1, seqlen_k=1, head_dim=64, head_dim_v=64)
    check(case, Score(softcap=50.0), with_d_lse=False)


@pytest.mark.parametrize(
    ("dtype", "path"),
    [("float16", "auto"), ("float16", "mma"), ("float16", "simt"), ("float32", "auto"), ("float64", "auto")],
)
@pytest.mark.parametrize("axes", ["bhqk", "hqk", "bqk", "qk", "bhk", "hk", "k", "bhq", "hq", "q", "bh", "h", "b", ""])
def test_gradient_by_bias_in_a_fixed_order(axes: str, dtype: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bias that has these axes, of (batch, heads, queries, keys)."""
    monkeypatch.setenv("CUFLASH_KERNEL", path)
    arrays.framework_of(q=cupy.zeros(1)).prepared.clear()
    lengths = {"b": 3, "h": 4, "q": 200, "k": 300}
    case = Case(
        dtype, batch=3, num_heads=4, num_heads_kv=2, seqlen_q=200, seqlen_k=300, head_dim=64, head_dim_v=64,
        is_causal=True,
    )  # fmt: skip
    shape = [size if axis in axes else 1 for axis, size in lengths.items()]
    bias = cupy.asarray(np.random.default_rng(0).standard_normal(shape).astype(dtype))
    check(case, Score(bias=bias), with_d_lse=True, runs_in_order=20)


@pytest.mark.parametrize("shape", [(1, 2, 1, 200, 300), (3, 1, 4, 200, 300), (3, 1, 4, 1, 300), (2, 1, 1, 1)], ids=str)
def test_gradient_by_bias_of_several_batch_axes_in_a_fixed_order(shape: tuple[int, ...]) -> None:
    """Launches that follow each other add to the same sums: they are those of a batch that is copied."""
    draw = cupy.random.default_rng(0)
    q, d_out = draw.standard_normal((2, 3, 2, 4, 200, 64)).astype(np.float16)
    k, v = draw.standard_normal((2, 2, 2, 300, 64)).astype(np.float16)
    bias = draw.standard_normal(shape)
    out, lse = cuflash.attention(q, k, v, bias=bias, return_lse=True)
    options = {"bias": bias, "deterministic": True}
    first, *others = (cuflash.attention_backward(d_out, q, k, v, out, lse, **options).d_bias for _ in range(5))
    for other in others:
        assert_same_bits(other, first)
    host = [cupy.asnumpy(x).astype(np.float64) for x in (d_out, q, k, v, out)]
    wanted = cuflash.attention_backward(*host, cupy.asnumpy(lse).astype(np.float64), bias=cupy.asnumpy(bias)).d_bias
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(cupy.asnumpy(first), wanted, rtol=1e-2, atol=1e-2 * max(largest, 1.0))


@pytest.mark.parametrize("path", ["auto", "mma", "simt"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dropout_mask_is_the_same_everywhere(dim: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal scores and values that tell the keys apart, out says which weights were kept."""
    monkeypatch.setenv("CUFLASH_KERNEL", path)
    arrays.framework_of(q=cupy.zeros(1)).prepared.clear()
    shape, seed, dropout_p = (2, 3, 150, dim), 987654321, 0.3
    q = cupy.zeros(shape, np.float16)
    mask = rng.dropout_mask(seed, dropout_p, (2, 3, 150, dim))
    v = cupy.broadcast_to(cupy.eye(dim, dtype=np.float16), (2, 3, dim, dim))
    k = cupy.zeros((2, 3, dim, dim), np.float16)
    out = cuflash.attention(q, k, v, dropout_p=dropout_p, seed=seed)
    np.testing.assert_array_equal(cupy.asnumpy(out) != 0, mask)
    np.testing.assert_allclose(cupy.asnumpy(out)[mask], 1 / dim / (1 - dropout_p), rtol=2e-3)
    # The backward keeps the same ones: d_v is the transpose of the weights.
    _, lse = cuflash.attention(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=True)
    d_out = cupy.zeros(shape, np.float16)
    d_out[:, :, :dim] = cupy.eye(dim, dtype=np.float16)[:150]
    found = cuflash.attention_backward(d_out, q, k, v, out, lse, dropout_p=dropout_p, seed=seed)
    rows = min(dim, 150)
    np.testing.assert_array_equal(cupy.asnumpy(found.d_v)[:, :, :, :rows] != 0, mask[:, :, :rows].swapaxes(2, 3))


@pytest.mark.parametrize("path", ["auto", "mma", "simt"])
def test_expressions_of_long_sequences(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients by captured arrays are sums over many tiles, of elements that few or all pairs read."""
    monkeypatch.setenv("CUFLASH_KERNEL", path)
    arrays.framework_of(q=cupy.zeros(1)).prepared.clear()
    sizes = {"num_heads": 4, "num_heads_kv": 2, "seqlen_q": 1100, "seqlen_k": 1300, "head_dim": 64, "head_dim_v": 64}
    case = Case("float16", batch=2, **sizes)
    table = cupy.random.default_rng(0).standard_normal((32, 4), dtype=np.float32)
    for mod in (
        make_mod("expression", case, cupy.asarray),
        cuflash.score_mods.t5_bias(table) >> cuflash.score_mods.sigmoid_gate(table[0]),
    ):
        check(case, Score(mod=bound(mod)), with_d_lse=True)


def test_other_numbers_and_arrays_compile_nothing() -> None:
    q, k, v = cupy.random.default_rng(0).standard_normal((3, 2, 50, 64)).astype(np.float16)
    kernels = set()
    for number in (1.0, 2.0, -3.5):
        table = cupy.full((2, 50 + int(number)), number, np.float32)
        mod = cuflash.score_mod("score * x + table[h, k_idx]", x=number, table=table)
        out, lse = cuflash.attention(q, k, v, score_mod=mod, return_lse=True)
        cuflash.attention_backward(out, q, k, v, out, lse, score_mod=mod)
        kernels.add(compiler.loaded_kernels())
    assert len(kernels) == 1


def test_captured_arrays_of_another_place() -> None:
    q = cupy.zeros((2, 50, 64), np.float16)
    with pytest.raises(TypeError, match="score_mod: table"):
        cuflash.attention(q, q, q, score_mod=cuflash.score_mod("score + table[h]", table=np.zeros(2)))
    torch = pytest.importorskip("torch")
    q = torch.zeros((2, 50, 64), device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match="score_mod: table: got an array on the CPU, wanted it on cuda:0"):
        cuflash.attention(q, q, q, score_mod=cuflash.score_mod("score + table[h]", table=torch.zeros(2)))
    q, table = cupy.zeros((2, 50, 64), np.float16), cupy.zeros(2, np.float32)
    mod = cuflash.score_mod("score + table[h]", table=table)
    out, lse = cuflash.attention(q, q, q, score_mod=mod, return_lse=True)
    with pytest.raises(NotImplementedError, match="deterministic: got True for the gradient by an array that score_"):
        cuflash.attention_backward(out, q, q, q, out, lse, score_mod=mod, deterministic=True)
