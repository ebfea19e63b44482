"""PyTorch: reading tensors, and autograd. Nothing else in cuflash knows this framework.

``attention`` on tensors that require gradients goes through ``_Attention``, whose backward pass is
another Function, ``_AttentionBackward``, so that asking for second derivatives is an error rather
than a wrong number. Both know how to be vmapped: an axis that torch.vmap maps over is a batch axis.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

import numpy
import torch
from torch.autograd import forward_ad

from . import functional
from .arguments import Options
from .arrays import ALIGNMENT, CPU, ArrayView, Framework, import_cupy, numpy_dtype
from .block_mask import BlockMask
from .scores import NO_EXTRAS, Extras

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}

# Private, and several times cheaper than their public equivalents, which stand in where they are missing.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_get_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


class TorchArrays(Framework):
    """Tensors on the CPU or a CUDA device."""

    name = "PyTorch"

    def signature(self, array: torch.Tensor) -> Hashable:
        return (
            array.shape,
            array.stride(),
            array.dtype,
            array.device,
            array.data_ptr() % ALIGNMENT,
            array.is_neg(),
        )

    def view(self, array: torch.Tensor, name: str) -> ArrayView:
        if array.layout is not torch.strided or array.is_nested:
            kind = "nested" if array.is_nested else str(array.layout).removeprefix("torch.")
            raise TypeError(f"{name}: got a {kind} tensor, wanted a strided one")
        if array.is_neg():
            raise ValueError(f"{name}: got a tensor with lazy negation, wanted a plain one (resolve_neg())")
        device = array.device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: got a tensor on {device}, wanted one on the CPU or a CUDA device")
        return ArrayView(
            name=name,
            pointer=array.data_ptr(),
            shape=tuple(array.shape),
            strides=array.stride(),
            dtype=str(array.dtype).removeprefix("torch."),
            itemsize=array.element_size(),
            device=CPU if device.type == "cpu" else device.index,
        )

    def pointer(self, array: torch.Tensor) -> int:
        return array.data_ptr()

    def empty(self, like: torch.Tensor, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return like.new_empty(shape, dtype=_DTYPES[dtype])

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[name]

    def namespace(self, array: torch.Tensor) -> Any:
        return torch

    def contiguous(self, array: torch.Tensor) -> torch.Tensor:
        return array.contiguous()

    def cast(self, array: torch.Tensor, dtype: Any) -> torch.Tensor:
        return array.to(dtype)

    def is_lazy(self, *arrays: torch.Tensor) -> bool:
        return any(array.is_neg() for array in arrays)

    def resolve(self, array: torch.Tensor) -> torch.Tensor:
        return array.resolve_neg()

    def as_numpy(self, array: torch.Tensor) -> numpy.ndarray:
        array = array.detach()
        if array.dtype == torch.bfloat16:
            # NumPy knows no bfloat16 of its own: hand the bits over and say what they are.
            return array.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return array.numpy()

    def stream(self, device: int) -> int:
        if _raw_stream is not None:
            return _raw_stream(device)
        return torch.cuda.current_stream(device).cuda_stream

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def current_device(self) -> int:
        return _get_device()

    def use_device(self, device: int) -> AbstractContextManager[Any]:
        return torch.cuda.device(device)

    def compute_capability(self, device: int) -> int:
        if torch.version.cuda is None:
            raise RuntimeError("this PyTorch is built for ROCm; cuflash needs CUDA")
        import_cupy(torch.version.cuda)
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor

    def mark_written(self, array: torch.Tensor) -> None:
        torch.autograd.graph.increment_version(array)

    def records(self, *arrays: torch.Tensor | None) -> bool:
        if torch.is_grad_enabled():
            for array in arrays:
                if array is not None and array.requires_grad:
                    return True
        # torch.func's transforms, and dual numbers, whose tangents would be lost.
        return _transforms_active() or forward_ad._current_level >= 0

    def seed(self, array: torch.Tensor) -> Any:
        seed = torch.randint(1 << 62, (), device=array.device)
        return seed if array.is_cuda else int(seed)

    def attention(self, q: Any, k: Any, v: Any, options: tuple[Any, ...], *rest: Any) -> tuple[Any, Any]:
        extras, seed, captured = rest
        return _Attention.apply(q, k, v, *extras, seed, options, *captured)

    def attention_backward(self, *arguments: Any) -> functional.Gradients:
        *operands, options, extras, wanted, seed, captured = arguments
        return _gradients(_AttentionBackward.apply(*operands, *extras, wanted, seed, options, *captured))


#: The one object that serves tensors.
ARRAYS = TorchArrays()


def _extras(arrays: tuple[Any, ...]) -> Extras:
    return NO_EXTRAS if all(array is None for array in arrays) else Extras(*arrays)


def _check_one_seed(in_dim: int | None) -> None:
    if in_dim is not None:
        raise ValueError("seed: got a seed for each entry inside vmap, wanted one: entries are counted, and differ")


def _check_captured(options: tuple[Any, ...], in_dims: tuple[int | None, ...]) -> None:
    mod = Options(*options).score_mod
    if any(in_dim is not None for in_dim in in_dims):
        raise ValueError("score_mod: got a captured array for each entry inside vmap, wanted the same for all")
    if mod is not None and mod.expression.uses("b"):
        raise ValueError("score_mod: got an expression that uses b inside vmap, whose entries are counted as well")


def _gradients(gradients: tuple[Any, ...]) -> functional.Gradients:
    """What ``_AttentionBackward`` returns, those by captured arrays in one tuple."""
    d_q, d_k, d_v, d_bias, d_sinks, d_alibi_slopes, *d_captured = gradients
    return functional.Gradients(d_q, d_k, d_v, d_bias, d_sinks, d_alibi_slopes, tuple(d_captured))


class _Attention(torch.autograd.Function):
    """(q, k, v, mask, bias, alibi_slopes, sinks, seed, options, *captured) -> (out, lse), both differentiable."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, *arguments: Any) -> tuple[Any, Any]:
        extras, (seed, options), captured = arguments[:4], arguments[4:6], arguments[6:]
        return functional.forward(ARRAYS, q, k, v, None, True, options, _extras(extras), seed, captured)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        (q, k, v), extras, (seed, ctx.options), captured = inputs[:3], inputs[3:7], inputs[7:9], inputs[9:]
        # A tensor is saved like the others, so that changing it before the backward pass is an error.
        ctx.seed, at = (None, seed) if isinstance(seed, torch.Tensor) else (seed, None)
        ctx.mask, mask = (extras[0], None) if isinstance(extras[0], BlockMask) else (None, extras[0])
        ctx.save_for_backward(q, k, v, *output, mask, *extras[1:], at, *captured)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Any, d_lse: Any) -> tuple[Any, ...]:
        if d_out is None and d_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        (q, k, v, out, lse), extras, at = ctx.saved_tensors[:5], ctx.saved_tensors[5:9], ctx.saved_tensors[9]
        captured = ctx.saved_tensors[10:]
        if ctx.mask is not None:
            extras = (ctx.mask, *extras[1:])
        seed = ctx.seed if at is None else at
        d_out = torch.zeros_like(out) if d_out is None else _with_contiguous_rows(d_out)
        operands = (d_out, q, k, v, out, lse, d_lse)
        wanted = (*ctx.needs_input_grad[4:7], *ctx.needs_input_grad[9:])
        if ARRAYS.records(*operands, *functional.given(_extras(extras)), *captured):
            gradients = _gradients(_AttentionBackward.apply(*operands, *extras, wanted, seed, ctx.options, *captured))
        else:
            gradients = functional.backward(ARRAYS, *operands, ctx.options, _extras(extras), wanted, seed, captured)
        d_q, d_k, d_v, d_bias, d_sinks, d_alibi_slopes, d_captured = gradients
        return d_q, d_k, d_v, None, d_bias, d_alibi_slopes, d_sinks, None, None, *d_captured

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], q: Any, k: Any, v: Any, *arguments: Any) -> Any:
        extras, (seed, options), captured = arguments[:4], arguments[4:6], arguments[6:]
        _check_one_seed(in_dims[7])
        _check_captured(options, in_dims[9:])
        num_axes = [_num_axes(x, in_dim) for x, in_dim in zip((q, k, v), in_dims, strict=False)]
        least = 3 if Options(*options).layout == "bshd" else 2
        if min(num_axes) < least:
            raise ValueError(f"q, k, v: got {num_axes} axes inside vmap, wanted at least {least} each")
        batched = [
            _with_batch_axis(x, in_dim, info.batch_size, max(3, *num_axes))
            for x, in_dim in zip((q, k, v), in_dims, strict=False)
        ]
        more = _batched_extras(extras, in_dims[3:7], info.batch_size, max(3, *num_axes))
        out, lse = _Attention.apply(*batched, *more, seed, options, *captured)
        if max(num_axes) == 2:  # matrices only, which were given an axis of heads
            out, lse = out.squeeze(1), lse.squeeze(1)
        return (out, lse), (0, 0)


class _AttentionBackward(torch.autograd.Function):
    """(d_out, q, k, v, out, lse, d_lse, mask, bias, alibi_slopes, sinks, wanted, seed, options, *captured) -> results.

    They are those of ``functional.Gradients``, one after the other, and not differentiable.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Any, ...]:
        operands, extras, (wanted, seed, options) = arguments[:7], arguments[7:11], arguments[11:14]
        d_out, q, k, v, out, lse, d_lse = operands
        gradients = functional.backward(
            ARRAYS, d_out, q, k, v, out, lse, d_lse, options, _extras(extras), wanted, seed, arguments[14:]
        )
        return *gradients[:6], *gradients.d_captured

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        raise NotImplementedError(
            "cuflash.attention: second derivatives are not implemented yet; a loss that needs them has to be computed "
            "with a differentiable attention, such as torch.nn.attention's SDPBackend.MATH"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        operands, extras, (wanted, seed, options) = arguments[:7], arguments[7:11], arguments[11:14]
        captured = arguments[14:]
        _check_one_seed(in_dims[12])
        _check_captured(options, in_dims[14:])
        if any(wanted[3:]):
            raise NotImplementedError("score_mod: gradients by captured arrays for each entry inside vmap")
        num_axes = [None if x is None else _num_axes(x, in_dim) for x, in_dim in zip(operands, in_dims, strict=False)]
        most = max(3, *(num for num in num_axes[:5] if num is not None))
        batched = [
            None if x is None else _with_batch_axis(x, in_dim, info.batch_size, most - (index >= 5))
            for index, (x, in_dim) in enumerate(zip(operands, in_dims, strict=False))
        ]
        batched[0] = _with_contiguous_rows(batched[0])
        own_axes = [
            None if x is None else _num_axes(x, in_dim) for x, in_dim in zip(extras[1:], in_dims[8:], strict=False)
        ]
        extras = _batched_extras(extras, in_dims[7:11], info.batch_size, most)
        gradients = _AttentionBackward.apply(*batched, *extras, wanted, seed, options, *captured)
        # An axis that was put between batch and operand has one element and goes again.
        of_extras = own_axes[0], own_axes[2], own_axes[1]
        results = tuple(
            None if gradient is None else gradient.reshape(info.batch_size, *gradient.shape[gradient.ndim - num :])
            for gradient, num in zip(gradients[:6], (*num_axes[1:4], *of_extras), strict=True)
        )
        results += (None,) * len(captured)
        return results, tuple(None if result is None else 0 for result in results)


def _batched_extras(extras: Any, in_dims: Any, batch_size: int, num_axes: int) -> Extras:
    """The extras with the mapped axis in front, as one more batch axis of operands that have so many axes."""
    if extras[3] is not None and in_dims[3] is not None:
        raise ValueError("sinks: got an axis that vmap maps over, wanted the same sinks for all")
    axes = num_axes, num_axes, num_axes - 2
    # A mask by blocks is the same for all, and broadcasts.
    mask, bias, alibi_slopes = (
        x if x is None or isinstance(x, BlockMask) else _with_batch_axis(x, in_dim, batch_size, num)
        for x, in_dim, num in zip(extras[:3], in_dims[:3], axes, strict=True)
    )
    return Extras(mask, bias, alibi_slopes, extras[3])


def _with_contiguous_rows(gradient: torch.Tensor) -> torch.Tensor:
    """What autograd made of ``out``'s gradient, in a form that can be read: ``sum().backward()`` expands a scalar."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def _num_axes(x: torch.Tensor, in_dim: int | None) -> int:
    return x.ndim - (in_dim is not None)


def _with_batch_axis(x: torch.Tensor, in_dim: int | None, batch_size: int, num_axes: int) -> torch.Tensor:
    """``x`` with the mapped axis first, expanded where it is not mapped, then ``num_axes`` axes of its own."""
    x = x.expand(batch_size, *x.shape) if in_dim is None else x.movedim(in_dim, 0)
    return x.reshape(batch_size, *[1] * (num_axes + 1 - x.ndim), *x.shape[1:])
