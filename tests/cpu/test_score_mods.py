"""Programmable scores as users write them: ready-made ones, one after the other, captured arrays, and errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import configs, plan, score_mods
from cuflash.problem import Features, Mod, Problem

DRAW = np.random.default_rng(0)
Q = DRAW.standard_normal((2, 4, 5, 8))
K, V = DRAW.standard_normal((2, 2, 2, 9, 8))
D_OUT = DRAW.standard_normal((2, 4, 5, 8))
#: Queries and keys by their positions, the last query at the last key.
QUERIES, KEYS = np.arange(5)[:, None] + 4, np.arange(9)
SLOPES = np.array([0.5, 0.25, 0.125, -0.1])
DOCUMENTS = np.sort(DRAW.integers(0, 3, (2, 9)))


def assert_alike(options: dict[str, Any], others: dict[str, Any]) -> None:
    """Compare out, LSE and gradients of two calls."""
    results = []
    for each in (options, others):
        out, lse = cuflash.attention(Q, K, V, return_lse=True, **each)
        results.append((out, lse, *cuflash.attention_backward(D_OUT, Q, K, V, out, lse, **each)[:3]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


READY_MADE = {
    "alibi": (score_mods.alibi(SLOPES), {"alibi_slopes": SLOPES}),
    "softcap": (score_mods.softcap(2), {"softcap": 2.0}),
    "tanh gate": (score_mods.tanh_gate(np.full(4, 0.5)), {"scale": math.tanh(0.5) / math.sqrt(8)}),
    "sigmoid gate": (score_mods.sigmoid_gate(np.zeros(4)), {"scale": 0.5 / math.sqrt(8)}),
    "documents": (
        score_mods.document_mask(DOCUMENTS[:, 4:], DOCUMENTS),
        {"mask": (DOCUMENTS[:, 4:, None] == DOCUMENTS[:, None])[:, None]},
    ),
    "prefix": (
        score_mods.prefix_lm(np.array([6, 0])),
        {"mask": ((KEYS <= QUERIES) | (np.array([6, 0])[:, None, None] > KEYS))[:, None]},
    ),
    "dilated window": (
        score_mods.dilated_window(2, 3),
        {"mask": ((QUERIES - KEYS) % 3 == 0) & (abs(QUERIES - KEYS) <= 6)},
    ),
}


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made(name: str) -> None:
    mod, same = READY_MADE[name]
    assert_alike({"score_mod": mod}, same)


@pytest.mark.parametrize("is_bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (6, 7)])
def test_t5_bias(num_buckets: int, max_distance: int, is_bidirectional: bool) -> None:
    table = np.arange(num_buckets * 4, dtype=np.float64).reshape(num_buckets, 4)
    mod = score_mods.t5_bias(table, max_distance=max_distance, is_bidirectional=is_bidirectional)
    # A key of scores that are but the bias at a time, which is then the LSE.
    q, k = np.zeros((4, 131, 8)), np.zeros((4, 131, 8))
    for query in (0, 60, 130):
        for key in range(131):
            bucket = t5_bucket(key - query, num_buckets, max_distance, is_bidirectional)
            mask = np.arange(131) == key
            if key % 7 == 0:
                _, lse = cuflash.attention(q, k, k, score_mod=mod, mask=mask, return_lse=True)
                np.testing.assert_array_equal(lse[:, query], table[bucket])


def t5_bucket(relative: int, num_buckets: int, max_distance: int, is_bidirectional: bool) -> int:
    """The bucket of a key so far behind the query, as the paper's authors compute it."""
    first = 0
    if is_bidirectional:
        num_buckets //= 2
        first = num_buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    num_exact = num_buckets // 2
    if distance < num_exact:
        return first + distance
    share = np.log(np.float32(distance) / np.float32(num_exact)) / np.float32(math.log(max_distance / num_exact))
    return first + min(num_exact + int(share * np.float32(num_buckets - num_exact)), num_buckets - 1)


def test_one_after_the_other() -> None:
    first = cuflash.score_mod("score + x[h]", x=SLOPES)
    second = cuflash.score_mod("score * x * y[k_idx]", x=2.0, y=np.arange(9.0))
    both = first >> second
    out, lse = cuflash.attention(Q, K, V, score_mod=both, return_lse=True)
    scores = (Q @ np.repeat(K, 2, 1).swapaxes(-1, -2) / math.sqrt(8) + SLOPES[:, None, None]) * 2 * np.arange(9)
    np.testing.assert_allclose(lse, np.log(np.exp(scores).sum(-1)))
    found = cuflash.attention_backward(D_OUT, Q, K, V, out, lse, score_mod=both)
    assert found.d_captured.keys() == {"x", "y"}
    assert found.d_captured["x"].shape == (4,)
    assert found.d_captured["y"].shape == (9,)
    assert repr(both) == "score_mod('score + x[h]; score * x_2 * y[k_idx]', x=..., y=..., x_2=2.0)"
    assert both.option == (first >> second).option
    assert both.option != (second >> first).option


def test_batch_entries_and_heads_are_counted_over_all_axes() -> None:
    q, k = DRAW.standard_normal((2, 3, 4, 5, 8)), DRAW.standard_normal((3, 2, 9, 8))
    table = DRAW.standard_normal((6, 4, 2))
    mod = cuflash.score_mod("score + table[b, h, h_kv]* k_idx", table=table)
    _, lse = cuflash.attention(q, k, k, score_mod=mod, return_lse=True)
    bias = table.reshape(2, 3, 4, 2)[:, :, np.arange(4), np.arange(4) // 2][..., None, None] * np.arange(9)
    _, wanted = cuflash.attention(q, k, k, bias=bias, return_lse=True)
    np.testing.assert_allclose(lse, wanted)


def test_numbers_are_no_part_of_kernels() -> None:
    kernels = set()
    for number, softcap in ((1.0, 3.0), (2.0, 4.0)):
        mod = cuflash.score_mod("score * x", x=number)
        features = Features(softcap, mod=Mod(mod.expression), mod_numbers=mod.option.numbers)
        problem = Problem("float16", 1, 1, 1, 64, 64, 64, 64, 1.0, features=features)
        kernels.add(plan.plan_forward(problem, plan.DeviceInfo.of_arch(90)).config)
    assert len(kernels) == 1
    other = Mod(cuflash.score_mod("score * x * x", x=1.0).expression)
    names = {configs.ScoreConfig(mod=mod).name for mod in (other, Mod(mod.expression))}
    assert len(names) == 2


def test_array_that_changes_is_read_anew() -> None:
    gate = np.ones(4)
    mod = cuflash.score_mod("score * gate[h]", gate=gate)
    before = cuflash.attention(Q, K, V, score_mod=mod)
    gate *= 2
    after = cuflash.attention(Q, K, V, score_mod=mod)
    np.testing.assert_allclose(after, cuflash.attention(Q, K, V, scale=2 / math.sqrt(8)))
    assert not np.allclose(before, after)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"])
def test_dtypes_and_strides(dtype: str) -> None:
    array = np.arange(40).reshape(4, 10)[::-1, ::2].astype(dtype)
    mod = cuflash.score_mod("score + array[h, k_idx]", array=array)
    bias = array[:, np.minimum(np.arange(9), 4)].astype(np.float64)[:, None]
    assert_alike({"score_mod": mod}, {"bias": bias})


ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: cuflash.score_mod(3), TypeError, "got int for the expression, wanted a str"),
    (lambda: cuflash.score_mod("score +"), ValueError, r"score_mod: .*\n    score \+\n"),
    (lambda: cuflash.score_mod("score + rel[h]"), ValueError, "got an element of 'rel', wanted one of an array: none"),
    (lambda: cuflash.score_mod("score * x", x=[1.0]), TypeError, r"got x=\[1.0\], wanted an array or a number"),
    (lambda: cuflash.score_mod("score * x", x=1 << 40), ValueError, "wanted an integer of 32 bits, or a float"),
    (
        lambda: cuflash.score_mod("score * x[h]", x=np.zeros(4, complex)),
        TypeError,
        "got x of complex128, wanted one of",
    ),
    (lambda: cuflash.score_mod("score * x[h]", x=np.zeros(0)), ValueError, r"got x of shape \(0,\), wanted at least"),
    (lambda: score_mods.t5_bias(np.zeros((2, 4))), ValueError, "t5_bias: got 2 buckets and max_distance 128, wanted"),
    (lambda: score_mods.dilated_window(3, 0), ValueError, "dilated_window: got size 3 and dilation 0"),
    (
        lambda: cuflash.attention(Q, K, V, score_mod="score"),
        TypeError,
        "^score_mod: got str, wanted None or what cuflash",
    ),
    (lambda: score_mods.softcap(3) >> 2, TypeError, "unsupported operand"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in (Q, K, V))
    table = torch.zeros(4, 9, dtype=torch.float32, requires_grad=True)
    numbers = torch.arange(9)
    mod = cuflash.score_mod("score + table[h, numbers[k_idx]]", table=table, numbers=numbers)
    cuflash.attention(q, k, v, score_mod=mod).square().sum().backward()
    bias = torch.zeros(4, 1, 9, dtype=torch.float64, requires_grad=True)
    others = [x.detach().requires_grad_() for x in (q, k, v)]
    cuflash.attention(*others, bias=bias).square().sum().backward()
    assert table.grad.dtype == torch.float32
    torch.testing.assert_close(table.grad.double(), bias.grad[:, 0], rtol=1e-5, atol=1e-6)
    for one, other in zip((q, k, v), others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    # Only what is captured asks for gradients.
    out = cuflash.attention(*(x.detach() for x in (q, k, v)), score_mod=mod)
    assert out.requires_grad
    with pytest.raises(TypeError, match="score_mod: table"):
        cuflash.attention(Q, K, V, score_mod=mod)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(
            torch.autograd.grad(cuflash.attention(q, k, v, score_mod=mod).sum(), table, create_graph=True)[0].sum(), q
        )


def test_vmap() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in (Q, K, V))
    mod = cuflash.score_mod("score * gate[h]", gate=torch.ones(4))
    mapped = torch.vmap(lambda q, k, v: cuflash.attention(q, k, v, score_mod=mod))(q, k, v)
    torch.testing.assert_close(mapped, cuflash.attention(q, k, v, score_mod=mod))
    counting = cuflash.score_mod("score * b")
    with pytest.raises(ValueError, match="score_mod: got an expression that uses b inside vmap"):
        torch.vmap(lambda q, k, v: cuflash.attention(q, k, v, score_mod=counting))(q, k, v)
