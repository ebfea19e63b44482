"""Arrays of other libraries: in and out through DLPack, on the CPU, without a copy where there can be none."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import arrays


class Array:
    """The least that a library can offer: DLPack, and `from_dlpack` in its module."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array = array
        self.device = device

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def from_dlpack(array: Any) -> Array:
    return Array(np.from_dlpack(array))


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def operands() -> tuple[np.ndarray, ...]:
    return random(2, 4, 5, 6), random(2, 2, 7, 6), random(2, 2, 7, 3)


def test_results_are_arrays_of_the_same_library():
    q, k, v = operands()
    wanted, wanted_lse = cuflash.attention(q, k, v, is_causal=True, return_lse=True)
    foreign = [Array(x) for x in (q, k, v)]
    out, lse = cuflash.attention(*foreign, is_causal=True, return_lse=True)
    assert type(out) is type(lse) is Array
    np.testing.assert_array_equal(out.array, wanted)
    np.testing.assert_array_equal(lse.array, wanted_lse)
    assert type(cuflash.attention(*foreign)) is Array

    d_out, d_lse = random(2, 4, 5, 3, seed=1), random(2, 4, 5, seed=2)
    wanted_gradients = cuflash.attention_backward(d_out, q, k, v, wanted, wanted_lse, d_lse=d_lse, is_causal=True)
    for statistics in ({}, {"d_lse": Array(d_lse)}):
        gradients = cuflash.attention_backward(Array(d_out), *foreign, out, lse, is_causal=True, **statistics)
        assert all(type(x) is Array for x in gradients[:3])
    for actual, desired in zip(gradients[:3], wanted_gradients[:3], strict=True):
        np.testing.assert_array_equal(actual.array, desired)

    merged, merged_lse = cuflash.merge_attention([out, out], [lse, lse])
    assert type(merged) is type(merged_lse) is Array
    np.testing.assert_allclose(merged.array, wanted, rtol=1e-6)


def test_operands_are_not_copied():
    q, k, v = operands()
    imported = arrays.import_dlpack(Array(q), "q")
    assert np.shares_memory(imported, q)
    out = np.empty((2, 4, 5, 3), np.float32)
    target = Array(out)
    assert cuflash.attention(Array(q), Array(k), Array(v), out=target) is target
    np.testing.assert_array_equal(out, cuflash.attention(q, k, v))


def test_strides_cross():
    q, k, v = operands()
    wanted = cuflash.attention(q, k, v)
    moved = [Array(np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)) for x in (q, k, v)]
    np.testing.assert_array_equal(cuflash.attention(*moved).array, wanted)
    with pytest.raises(ValueError, match="q: got a stride of 5 elements on the last axis"):
        cuflash.attention(Array(random(2, 4, 6, 5).swapaxes(-1, -2)), moved[1], moved[2])


def test_errors():
    q, k, v = (Array(x) for x in operands())
    with pytest.raises(TypeError, match="k: got an array of NumPy, wanted one of"):
        cuflash.attention(q, k.array, v)
    with pytest.raises(TypeError, match="q: got dtype int32"):
        cuflash.attention(Array(np.ones((2, 3), np.int32)), k, v)
    with pytest.raises(ValueError, match=r"v: got an array on DLPack device \(8, 0\), wanted one on the CPU \(1\) or"):
        cuflash.attention(q, k, Array(v.array, device=(8, 0)))


def test_libraries_are_not_mixed():
    other = type("Other", (Array,), {"__module__": "elsewhere.arrays"})
    q, k, v = operands()
    with pytest.raises(TypeError, match="v: got an array of elsewhere, wanted one of"):
        cuflash.attention(Array(q), Array(k), other(v))
    with pytest.raises(TypeError, match="elsewhere has no from_dlpack"):
        cuflash.attention(other(q), other(k), other(v))


def test_cuda_arrays_without_cupy_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    q = Array(operands()[0], device=(2, 0))
    with pytest.raises(ImportError, match=r'pip install "cuflash\[cuda12\]" or pip install "cuflash\[cuda13\]"'):
        cuflash.attention(q, q, q)


def test_arrays_of_the_standard_keep_their_namespace():
    """Merging uses it directly, so that it is as differentiable and traceable as the library is."""

    class Namespace:
        def __getattr__(self, name: str) -> Any:
            used.append(name)
            return getattr(np, name)

        def astype(self, array: np.ndarray, dtype: Any) -> Any:
            return np.asarray(array).astype(dtype).view(Standard)

    used: list[str] = []
    namespace = Namespace()

    class Standard(np.ndarray):
        def __array_namespace__(self, api_version: str | None = None) -> Any:
            return namespace

    out, lse = random(3, 4).view(Standard), random(3).view(Standard)
    merged, merged_lse = cuflash.merge_attention([out, out], [lse, lse])
    assert "exp" in used
    assert type(merged) is type(merged_lse) is Standard
    np.testing.assert_allclose(merged, out, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ JAX


@pytest.fixture(scope="module")
def jnp():
    return pytest.importorskip("jax.numpy")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jax(jnp, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v = (jnp.asarray(x).astype(dtype) for x in operands())
    wanted, wanted_lse = cuflash.attention(*(np.asarray(x) for x in (q, k, v)), return_lse=True)
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    assert type(out) is type(lse) is type(q)
    assert out.dtype == q.dtype
    np.testing.assert_array_equal(np.asarray(out), wanted)
    np.testing.assert_array_equal(np.asarray(lse), wanted_lse)
    gradients = cuflash.attention_backward(out, q, k, v, out, lse)
    assert all(type(x) is type(q) and x.dtype == q.dtype for x in gradients[:3])
    merged, _ = cuflash.merge_attention([out, out], [lse, lse])
    assert merged.dtype == out.dtype
    np.testing.assert_allclose(np.asarray(merged, np.float32), np.asarray(out, np.float32), rtol=1e-2)


def test_jax_arrays_are_immutable(jnp):
    q, k, v = (jnp.asarray(x) for x in operands())
    with pytest.raises(TypeError, match="out: got a JAX array, which is immutable"):
        cuflash.attention(q, k, v, out=jnp.zeros((2, 4, 5, 3)))


def test_jax_tracers(jnp):
    import jax

    q, k, v = (jnp.asarray(x) for x in operands())
    with pytest.raises(TypeError, match="q: got a JAX tracer, wanted a JAX array"):
        jax.jit(cuflash.attention)(q, k, v)
    with pytest.raises(TypeError, match="k: got a JAX tracer"):
        jax.grad(lambda k: cuflash.attention(q, k, v).sum())(k)


def test_jax_merges_while_tracing(jnp):
    import jax

    q, k, v = (jnp.asarray(x) for x in operands())
    out, lse = cuflash.attention(q, k, v, return_lse=True)

    def total(out: Any) -> Any:
        merged, _ = cuflash.merge_attention([out, out], [lse, lse])
        return merged.sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(out), np.ones(out.shape), rtol=1e-6)
