"""PyTorch tensors on the CPU: values, autograd, torch.func, and what makes tensors unlike arrays."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import gradcheck

torch = pytest.importorskip("torch")


def random(*shape: int, dtype: Any = None, requires_grad: bool = False, seed: int = 0) -> Any:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return torch.tensor(values, dtype=dtype or torch.float64, requires_grad=requires_grad)


def operands(**facts: Any) -> tuple[Any, Any, Any]:
    """Grouped heads, and dims that differ."""
    return random(2, 4, 5, 6, **facts), random(2, 2, 7, 6, **facts), random(2, 2, 7, 3, **facts)


OPTIONS = [
    {},
    {"is_causal": True},
    {"window": (2, 1), "q_offset": 0},
    {"scale": -0.7, "q_offset": -2, "is_causal": True},
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_agrees_with_pytorch(dtype, layout):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    q, k, v = operands(dtype=dtype)
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), enable_gqa=True)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        wanted = wanted.transpose(1, 2)
    out, lse = cuflash.attention(q, k, v, layout=layout, return_lse=True)
    assert type(out) is torch.Tensor
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (2, 4, 5)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)


def test_bfloat16_without_ml_dtypes_says_what_to_install(monkeypatch):
    from cuflash import arrays

    q = random(2, 3, 4, dtype=torch.bfloat16)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    monkeypatch.delitem(arrays._numpy_dtypes, "bfloat16", raising=False)
    with pytest.raises(ImportError, match="pip install ml_dtypes"):
        cuflash.attention(q, q, q)


# ------------------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradcheck(options, layout):
    inputs = operands(requires_grad=True)

    def call(q: Any, k: Any, v: Any) -> Any:
        if layout == "bshd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return cuflash.attention(q, k, v, layout=layout, return_lse=True, **options)

    if options.get("q_offset") == -2:
        # Rows that see nothing have LSE -inf, whose numerical derivative is NaN.
        torch.autograd.gradcheck(lambda *x: call(*x)[0], inputs)
    else:
        torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("names", gradcheck.SETS, ids="+".join)
def test_gradcheck_of_scores(names):
    gradcheck.gradcheck(names, "cpu")


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (5, 4), (5, 2)),
        ((4, 3, 4), (4, 5, 4), (2, 4, 5, 2)),
        ((2, 3, 2, 3, 4), (3, 1, 5, 4), (2, 1, 1, 5, 2)),
    ],
)
def test_gradcheck_of_broadcast_operands(shapes):
    inputs = [random(*shape, requires_grad=True) for shape in shapes]
    torch.autograd.gradcheck(cuflash.attention, inputs)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 3), (3, 0)])
def test_gradients_of_empty_operands(seqlen_q, seqlen_k):
    inputs = [random(2, seqlen, 4, requires_grad=True) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]
    cuflash.attention(*inputs).sum().backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in inputs)


def test_gradcheck_of_strided_and_expanded_operands():
    q = random(5, 2, 4, 6, requires_grad=True)
    k = random(1, 1, 7, 4, requires_grad=True)
    v = random(2, 4, 14, 3, requires_grad=True)

    def call(q: Any, k: Any, v: Any) -> Any:
        return cuflash.attention(q.permute(1, 2, 0, 3)[..., 1:5], k.expand(2, 4, 7, 4), v[:, :, ::2], return_lse=True)

    torch.autograd.gradcheck(call, (q, k, v))


def test_only_what_requires_gradients_gets_them():
    q, k, v = operands()
    v.requires_grad_()
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    assert out.requires_grad
    out.sum().backward()
    assert q.grad is k.grad is None
    wanted = cuflash.attention_backward(torch.ones_like(out.detach()), q, k, v.detach(), out.detach(), lse.detach())
    torch.testing.assert_close(v.grad, wanted.d_v, rtol=0, atol=0)


def test_lse_alone_is_differentiable():
    q, k, v = operands(requires_grad=True)
    _, lse = cuflash.attention(q, k, v, return_lse=True)
    d_q, d_k, d_v = torch.autograd.grad(lse.sum(), (q, k, v))
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 6**-0.5
    wanted = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    torch.testing.assert_close((d_q, d_k), wanted)
    assert not d_v.any()


@pytest.mark.parametrize("expanded", [(), (2,), (1, 2, 3)])
def test_incoming_gradients_may_be_expanded(expanded):
    """What `sum().backward()` and its like make: strides of 0, on the last axis too."""
    inputs = operands(requires_grad=True)
    out = cuflash.attention(*inputs)
    shape = [1 if axis in expanded or not expanded else size for axis, size in enumerate(out.shape)]
    d_out = random(*shape).expand_as(out)
    found = torch.autograd.grad(out, inputs, d_out, retain_graph=True)
    wanted = torch.autograd.grad(out, inputs, d_out.contiguous())
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_no_graph_is_kept_without_need():
    q, k, v = operands()
    assert not cuflash.attention(q, k, v).requires_grad
    q.requires_grad_()
    with torch.no_grad():
        assert not cuflash.attention(q, k, v).requires_grad
    with torch.inference_mode():
        assert not cuflash.attention(q, k, v).requires_grad


def test_second_derivatives_raise():
    q, k, v = operands(requires_grad=True)
    (d_q,) = torch.autograd.grad(cuflash.attention(q, k, v).square().sum(), q, create_graph=True)
    assert d_q.requires_grad
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        torch.autograd.grad(d_q.sum(), q)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    gradients = cuflash.attention_backward(torch.ones_like(out), q, k, v, out, lse)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        gradients.d_k.sum().backward()


def test_forward_derivatives_raise():
    q, k, v = operands()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: cuflash.attention(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="jvp"):
            cuflash.attention(dual, k, v)
        cuflash.attention(q, k, v)


def test_changing_an_operand_before_the_backward_pass_raises():
    q, k, v = (x * 1 for x in operands(requires_grad=True))
    out = cuflash.attention(q, k, v)
    k += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ----------------------------------------------------------------------------------------------------- torch.func


def test_func_grad():
    q, k, v = operands()

    def loss(q: Any, k: Any, v: Any) -> Any:
        return cuflash.attention(q, k, v, is_causal=True).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*inputs), inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shapes", "in_dims", "layout"),
    [
        (((3, 2, 5, 4), (3, 2, 6, 4), (3, 2, 6, 3)), (0, 0, 0), "bhsd"),
        (((2, 3, 5, 4), (2, 6, 4), (2, 6, 3, 3)), (1, None, 2), "bhsd"),
        (((3, 5, 4), (6, 4), (3, 6, 3)), (0, None, 0), "bhsd"),
        (((5, 4), (3, 6, 4), (2, 1, 6, 3)), (None, 0, None), "bhsd"),
        (((3, 2, 5, 4), (2, 1, 6, 4), (1, 3, 6, 3)), (0, None, 1), "bhsd"),
        (((3, 2, 5, 4, 4), (3, 6, 2, 4), (6, 2, 3)), (0, 0, None), "bshd"),
    ],
)
def test_vmap(shapes, in_dims, layout):
    arrays = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    def call(*x: Any) -> Any:
        return cuflash.attention(*x, layout=layout, return_lse=True)

    def gradients(*x: Any) -> Any:
        def loss(*x: Any) -> Any:
            out, lse = call(*x)
            return out.square().sum() + lse.sin().sum()

        return torch.func.grad(loss, argnums=(0, 1, 2))(*x)

    for function in (call, gradients):
        found = torch.func.vmap(function, in_dims)(*arrays)
        for i in range(3):
            wanted = function(*(x if dim is None else x.select(dim, i) for x, dim in zip(arrays, in_dims, strict=True)))
            torch.testing.assert_close(tuple(x[i] for x in found), tuple(wanted))


def test_vmap_over_what_would_be_no_operand():
    with pytest.raises(ValueError, match="inside vmap, wanted at least 2 each"):
        torch.func.vmap(cuflash.attention)(*[random(3, 4)] * 3)
    with pytest.raises(ValueError, match="inside vmap, wanted at least 3 each"):
        torch.func.vmap(lambda *x: cuflash.attention(*x, layout="bshd"))(*[random(3, 5, 4)] * 3)


# ------------------------------------------------------------------------------------------- tensors of all kinds


def test_parameters_and_tensors_go_together():
    q, k, v = operands()
    wanted = cuflash.attention(q, k, v)
    weight = torch.nn.Parameter(k)
    out = cuflash.attention(q, weight, v)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    out.sum().backward()
    assert weight.grad is not None


def test_lazy_negation_is_done():
    q, k, v = operands()
    negative = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(negative, q, rtol=0, atol=0)
    d_out = random(2, 4, 5, 3)
    for lazy, usual in ((negative, q), (negative.detach().clone().requires_grad_(), q.clone().requires_grad_())):
        torch.testing.assert_close(cuflash.attention(lazy, k, v), cuflash.attention(usual, k, v), rtol=0, atol=0)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    found = cuflash.attention_backward(d_out, negative, k, v, out, lse)
    wanted = cuflash.attention_backward(d_out, q, k, v, out, lse)
    torch.testing.assert_close(found[:3], wanted[:3], rtol=0, atol=0)
    inputs = torch.complex(torch.zeros_like(q), -q).requires_grad_()
    (gradient,) = torch.autograd.grad(cuflash.attention(inputs.conj().imag, k, v), inputs, d_out)
    torch.testing.assert_close(gradient.imag, -wanted.d_q, rtol=0, atol=0)
    with pytest.raises(ValueError, match="out: got a tensor with lazy negation"):
        cuflash.attention(q, k, k, out=negative)


def test_out():
    q, k, v = operands()
    wanted = cuflash.attention(q, k, v)
    out = torch.empty(5, 2, 4, 3, dtype=torch.float64).permute(1, 2, 0, 3)
    version = out._version
    assert cuflash.attention(q, k, v, out=out) is out
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert out._version > version, "autograd has to learn that the memory changed"
    for inputs, target in (((q.clone().requires_grad_(), k, v), out), ((q, k, v), out.clone().requires_grad_())):
        with pytest.raises(ValueError, match="out= does not support automatic differentiation"):
            cuflash.attention(*inputs, out=target)
        with torch.no_grad():
            assert cuflash.attention(*inputs, out=target) is target
    with pytest.raises(TypeError, match="out: got an array of NumPy, wanted one of PyTorch as q is"):
        cuflash.attention(q, k, v, out=out.numpy())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda q: q.numpy(), TypeError, "k: got an array of PyTorch, wanted one of NumPy as q is"),
        (lambda q: q.to_sparse(), TypeError, "q: got a sparse_coo tensor, wanted a strided one"),
        (lambda q: q.to("meta"), ValueError, "q: got a tensor on meta, wanted one on the CPU or a CUDA device"),
        (lambda q: torch.nested.nested_tensor([q[0], q[1]]), TypeError, "q: got a nested tensor, wanted a strided one"),
        (lambda q: q.to(torch.float8_e5m2), TypeError, "q: got dtype float8_e5m2, .*nearest supported: float16"),
        (lambda q: q.long(), TypeError, "q: got dtype int64, .*nearest supported: float64"),
        (lambda q: q.transpose(-1, -2).contiguous().transpose(-1, -2), ValueError, "q: got a stride of 5 elements"),
        (lambda q: q.float(), TypeError, "k: got dtype float64, wanted float32 as q has"),
    ],
)
def test_errors(wrong, error, message):
    q, k, v = operands()
    with pytest.raises(error, match=message):
        cuflash.attention(wrong(q), k, v)


# -------------------------------------------------------------------------------------------------------- merging


def test_merging_is_differentiable():
    q, k, v = operands(requires_grad=True)

    def merged(q: Any, k: Any, v: Any) -> Any:
        parts = [
            cuflash.attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
            for keys in (slice(0, 3), slice(3, 3), slice(3, 7))
        ]
        return cuflash.merge_attention(*zip(*parts, strict=True))

    found, wanted = merged(q, k, v), cuflash.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(found, wanted)
    d_out, d_lse = random(*found[0].shape), random(*found[1].shape)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), (d_out, d_lse)), torch.autograd.grad(wanted, (q, k, v), (d_out, d_lse))
    )


def test_merging_rows_that_see_nothing_keeps_gradients_finite():
    out = random(2, 3, 4, requires_grad=True)
    lse = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, -torch.inf, -torch.inf]], dtype=torch.float64, requires_grad=True)
    merged, merged_lse = cuflash.merge_attention(list(out), list(lse))
    assert merged_lse[1] == -torch.inf
    gradients = torch.autograd.grad(merged.sum() + merged_lse[::2].sum(), (out, lse))
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][1, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merging_16_bit_results(dtype):
    out, lse = random(3, 4, dtype=dtype), random(3, dtype=torch.float32)
    merged, merged_lse = cuflash.merge_attention([out, out], [lse, lse])
    assert (merged.dtype, merged_lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(merged, out)
    merged, _ = cuflash.merge_attention([out, out.float()], [lse, lse])
    assert merged.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ CUDA, faked


def test_cuda_tensors_without_cupy_say_what_to_install(monkeypatch):
    from cuflash.torch import ARRAYS

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ImportError, match=r'pip install "cuflash\[cuda13\]"'):
        ARRAYS.compute_capability(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="built for ROCm"):
        ARRAYS.compute_capability(0)
