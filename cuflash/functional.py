"""The public functions: docstring, then normalise -> plan -> run.

A call is prepared once per combination of shapes, strides, dtypes and options; the prepared call is
kept in the framework's cache, so that a second call costs a look-up, an allocation and a launch.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy
from numpy.lib.stride_tricks import as_strided

from . import arguments, arrays, cpu, rng
from .arguments import Call, Options
from .arrays import CPU, Framework
from .block_mask import BlockMask, array_of, signature_of, view_of
from .expression import Bound
from .problem import ITEMSIZE, Features
from .score_mods import ScoreMod
from .scores import NO_EXTRAS, Extras, Score

#: Prepared calls kept per framework; all are dropped when there are more.
MAX_PREPARED = 4096


class Gradients(NamedTuple):
    """Gradients by the operands of ``attention``; None for what the call did not have."""

    d_q: Any
    d_k: Any
    d_v: Any
    d_bias: Any = None
    d_sinks: Any = None
    d_alibi_slopes: Any = None
    #: Of what score_mod captures the arrays of real numbers, by their names.
    d_captured: Any = None


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: ScoreMod | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    layout: str = "bhsd",
    precision: str | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    r"""Exact softmax attention, without ever storing the (seqlen_q, seqlen_k) matrix.

    For every head, with :math:`s_{ij} = \text{scale} \cdot q_i \cdot k_j` and the sums running over
    the keys :math:`j` that query :math:`i` sees,

    .. math:: \text{lse}_i = \ln \sum_j e^{s_{ij}}, \qquad \text{out}_i = \sum_j e^{s_{ij} - \text{lse}_i} \, v_j.

    A query that sees no key gets out 0 and LSE -inf. What keys and values hold that `is_causal` or
    `window` hides from every query (NaN included) reaches no result; what only `mask` hides has to
    be finite.

    Parameters
    ----------
    q : array, shape (..., heads, seqlen_q, head_dim)
        Queries: float16, bfloat16, float32 or float64. NumPy, CuPy, PyTorch, JAX or any other array
        that speaks DLPack, on the CPU or a CUDA device. Only the last axis has to be contiguous;
        every other axis may have any stride. Two axes are one head without batch.
    k : array, shape (..., heads_kv, seqlen_k, head_dim)
        Keys; dtype, framework and device of `q`. ``heads`` must be a multiple of ``heads_kv``: query
        head ``i`` reads key head ``i // (heads // heads_kv)`` (grouped-query attention). Axes before
        the heads broadcast between `q`, `k` and `v`, without a copy.
    v : array, shape (..., heads_kv, seqlen_k, head_dim_v)
        Values; ``head_dim_v`` may differ from ``head_dim``.
    mask : array of bool, broadcastable to (..., heads, seqlen_q, seqlen_k), or BlockMask, optional
        True where a query sees a key, in either layout; any strides. Tensor-core kernels leave out the tiles that it
        hides wholly; what they need to know of it, a bit per element of the mask, is found out first. A
        ``cuflash.BlockMask`` says it by blocks of queries and keys, and what is found out is kept for later calls.
    bias : array of floats, broadcastable to (..., heads, seqlen_q, seqlen_k), optional
        Added to the scores; any strides. It may be of another dtype than `q`. -inf hides a key.
    is_causal : bool, default False
        Query ``i`` sees keys ``j <= i + q_offset`` only.
    window : (int or None, int or None), optional
        ``(left, right)``: query ``i`` sees keys ``i + q_offset - left <= j <= i + q_offset + right``
        only, both bounds included; None leaves a side open. May be combined with `is_causal`.
    q_offset : int, default ``seqlen_k - seqlen_q``
        Position of query 0 among the keys, for `is_causal` and `window`. The default aligns the last
        query with the last key; 0 aligns the first ones.
    scale : float, default ``head_dim ** -0.5``
        Factor of the products ``q_i . k_j``; any finite number.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``, before anything else is done to them.
    alibi_slopes : array of floats, shape (heads,) or (..., heads), optional
        Scores are lowered by ``slope * abs(i + q_offset - j)`` (ALiBi [3]_).
    sinks : array of floats, shape (heads,), optional
        One more logit per row, of a key whose value is 0: it takes part in the softmax and in the LSE. A query that
        sees no key has then out 0 and the sink as LSE.
    score_mod : ScoreMod, optional
        What ``cuflash.score_mod`` makes of an expression: changes scores after `softcap`, before everything else.
    dropout_p : float, default 0.0
        Probability in [0, 1) with which a weight becomes 0 after the softmax; the others are multiplied by
        ``1 / (1 - dropout_p)``. The LSE is that without dropout.
    seed : int or array of one int64 or uint64, optional
        Seed of dropout, 64 bits: the same seed drops the same weights, on every device. Nobody waits for one in the
        memory of the GPU: it is read when the call runs, so that a captured graph drops other weights whenever it
        has changed. Without a seed PyTorch's generator of the device is asked; other arrays need one.
    layout : {"bhsd", "bshd"}, default "bhsd"
        Order of the axes. "bshd" takes (..., seqlen, heads, dim), at least three axes, and gives `out`
        in that order as well, without transposing anything.
    precision : {None, "ieee", "tf32"}, default None
        None and "ieee" multiply float32 as float32. "tf32" permits a GPU to round float32 factors to
        10 mantissa bits, which is faster; the CPU makes no use of the permission.
    deterministic : bool, default False
        Whether gradients are reproducible to the bit. The forward pass always is.
    return_lse : bool, default False
        Whether to return the LSE, too.
    out : array, optional
        Where to write the result: shape, dtype, framework and device of the result, any strides with
        a contiguous last axis, not overlapping the inputs. It is returned itself.

    Returns
    -------
    out : array, shape (..., heads, seqlen_q, head_dim_v), or (..., seqlen_q, heads, head_dim_v)
        In C order, of the framework, device and dtype of the inputs. On a GPU it is computed on the
        caller's current stream.
    lse : array, shape (..., heads, seqlen_q), in either layout
        Only with ``return_lse=True``: natural logarithm of the sum of exponentials; float32, or float64
        for float64 inputs.

    Raises
    ------
    TypeError
        For what is not an array, mixed frameworks, unsupported or unequal dtypes, options of a wrong type.
    ValueError
        For shapes that do not go together, mixed devices, a last axis that is not contiguous, option values
        out of range.
    ImportError
        For arrays on a GPU without CuPy, or bfloat16 on the CPU without ml_dtypes; the message says what to install.
    RuntimeError
        For a GPU older than compute capability 7.5.

    See Also
    --------
    attention_backward : the gradients. PyTorch users need not call it: `attention` is differentiable, `lse` included.
    attention_weights, attention_received : the weights of chosen queries, and what every key receives of all of them.
    merge_attention : joins results over disjoint sets of keys.
    dropout_mask : the weights that dropout keeps.
    BlockMask : masks by blocks, and masks that many calls share.

    Notes
    -----
    float16 and bfloat16 inputs are multiplied exactly and accumulated in float32, softmax and LSE included; float32
    is computed in float32 and float64 in float64. The forward pass is bitwise deterministic, and its result does not
    depend on what else is in the batch.

    Batch axes whose strides do not allow it to see them as a single axis are launched one after the other.

    The method is FlashAttention-2 [1]_ with the online softmax of [2]_.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023,
       arXiv:2307.08691.
    .. [2] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
    .. [3] O. Press, N. A. Smith, M. Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length
       Extrapolation", 2021, arXiv:2108.12409.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 5, 16), dtype=np.float32)  # batch, heads, seqlen, dim
    >>> k, v = rng.standard_normal((2, 2, 2, 7, 16), dtype=np.float32)  # 2 heads of keys and values serve 8
    >>> cuflash.attention(q, k, v, is_causal=True).shape
    (2, 8, 5, 16)

    It is what the formula says:

    >>> out, lse = cuflash.attention(q, k, v, return_lse=True)
    >>> scores = q @ np.repeat(k, 4, axis=1).swapaxes(-1, -2) / 4
    >>> bool(np.allclose(lse, np.log(np.exp(scores).sum(-1)), atol=1e-5))
    True
    >>> bool(np.allclose(out, np.exp(scores - lse[..., None]) @ np.repeat(v, 4, axis=1), atol=1e-5))
    True
    """
    framework = _framework(q, k, v)
    if out is not None:
        arrays.framework_of(q=q, out=out)
    extras = _extras(mask, bias, alibi_slopes, sinks, q)
    mod, captured = (None, ()) if score_mod is None else _take_apart(score_mod, q)
    options = (is_causal, window, q_offset, scale, layout, precision, deterministic, softcap, dropout_p, mod)
    if dropout_p != 0.0 or seed is not None:
        drawn = framework.seed(q) if seed is None and framework is not None else None
        seed = _check_seed(seed, dropout_p, q) if drawn is None else drawn
    if framework is None:
        result = _attention_dlpack(q, k, v, out, return_lse, options, extras, seed, captured)
    elif framework.records(q, k, v, out, *given(extras), *captured):
        if out is not None:
            raise ValueError("out: got an array, wanted None: out= does not support automatic differentiation")
        result = framework.attention(q, k, v, options, extras, seed, captured)
    else:
        result = forward(framework, q, k, v, out, return_lse, options, extras, seed, captured)
    return result if return_lse else result[0]


def attention_backward(
    d_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    d_lse: Any = None,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: ScoreMod | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    layout: str = "bhsd",
    precision: str | None = None,
    deterministic: bool = False,
) -> Gradients:
    r"""Gradients of a loss by the operands of ``attention``, from those by its results.

    With :math:`p_{ij} = e^{s_{ij} - \text{lse}_i}` recomputed and
    :math:`\delta_i = \text{d\_out}_i \cdot \text{out}_i - \text{d\_lse}_i`,

    .. math::

        \text{ds}_{ij} = p_{ij} (\text{d\_out}_i \cdot v_j - \delta_i), \quad
        \text{d\_q}_i = \text{scale} \sum_j \text{ds}_{ij} k_j, \quad
        \text{d\_k}_j = \text{scale} \sum_i \text{ds}_{ij} q_i, \quad
        \text{d\_v}_j = \sum_i p_{ij} \, \text{d\_out}_i.

    Parameters
    ----------
    d_out : array, shape of `out`
        Gradient by `out`, in the dtype of `q`; the last axis has to be contiguous.
    q, k, v : array
        The operands of the forward call.
    out, lse : array
        Its results.
    d_lse : array, shape of `lse`, optional
        Gradient by `lse`, in the dtype of `lse`; without it 0.
    mask, bias, is_causal, window, q_offset, scale, softcap, alibi_slopes, sinks, score_mod, dropout_p, seed, layout, \
precision
        The options of the forward call.
    deterministic : bool, default False
        Whether the gradients are reproducible to the bit, at some cost in speed: on a GPU that by a bias which is
        broadcast takes another pass over the scores. That by an array which `score_mod` captures is not to be had then
        on a GPU: NotImplementedError.

    Returns
    -------
    Gradients
        ``d_q``, ``d_k`` and ``d_v``, and ``d_bias``, ``d_sinks`` and ``d_alibi_slopes`` where the call has such an
        array (else None), each with the shape and dtype of its operand; ``d_captured`` is a dict of those by arrays of
        real numbers that `score_mod` captures.
        Where an operand was broadcast, or a key head was shared by query heads, its gradient is the sum.
        A query that sees no key has gradient 0, and so has a key that nobody sees.

    Raises
    ------
    TypeError, ValueError, NotImplementedError, ImportError, RuntimeError
        As ``attention`` does.

    See Also
    --------
    attention : the forward pass, with all options explained.

    Notes
    -----
    16-bit gradients are accumulated in float32 and rounded once; sums over broadcast axes are made of rounded terms,
    in float32. On PyTorch tensors this function is not differentiable itself: asking for it raises.

    The method is that of FlashAttention-2 [1]_, the gradient by the LSE that of the softmax normaliser.

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023,
       arXiv:2307.08691.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 6, 8))  # 4 heads of 6 rows of 8 elements
    >>> out, lse = cuflash.attention(q, k, v, return_lse=True)
    >>> d_q, d_k, d_v, *_ = cuflash.attention_backward(np.ones_like(out), q, k, v, out, lse)

    The weights of every row add up to 1, so a loss that sums all of `out` has these gradients by `v` in total:

    >>> bool(np.allclose(d_v.sum(axis=1), 6))
    True
    """
    framework = _framework(q, k, v)
    others = {"d_out": d_out, "out": out, "lse": lse, **({} if d_lse is None else {"d_lse": d_lse})}
    arrays.framework_of(q=q, **others)
    extras = _extras(mask, bias, alibi_slopes, sinks, q)
    mod, captured = (None, ()) if score_mod is None else _take_apart(score_mod, q)
    options = (is_causal, window, q_offset, scale, layout, precision, deterministic, softcap, dropout_p, mod)
    seed = _check_seed(seed, dropout_p, q)
    operands = (d_out, q, k, v, out, lse, d_lse)
    wanted = (bias is not None, alibi_slopes is not None, sinks is not None, *_is_real(mod))
    if framework is None:
        gradients = _attention_backward_dlpack(operands, options, extras, wanted, seed, captured)
    elif framework.records(*operands, *given(extras), *captured):
        gradients = framework.attention_backward(*operands, options, extras, wanted, seed, captured)
    else:
        gradients = backward(framework, *operands, options, extras, wanted, seed, captured)
    named = None
    if score_mod is not None:
        named = {name: x for name, x in zip(score_mod.arrays, gradients.d_captured, strict=True) if x is not None}
    return gradients._replace(d_captured=named)


def attention_weights(
    q: Any,
    k: Any,
    lse: Any,
    *,
    rows: int | slice | range | None = None,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    score_mod: ScoreMod | None = None,
    layout: str = "bhsd",
    precision: str | None = None,
) -> Any:
    r"""Weights that ``attention`` gave to the keys, for chosen queries.

    With the scores :math:`s_{ij}` as `attention` changes and hides them,

    .. math:: p_{ij} = e^{s_{ij} - \text{lse}_i}.

    Parameters
    ----------
    q : array, shape (..., heads, seqlen_q, head_dim)
        All queries of the call, as `attention` takes them.
    k : array, shape (..., heads_kv, seqlen_k, head_dim)
        Its keys.
    lse : array, shape (..., heads, seqlen_q), in either layout
        What ``attention(..., return_lse=True)`` gave; float32, or float64 for float64 inputs. Where the values had more
        batch axes than `q` and `k`, it has them, and so has the result.
    rows : None, int, slice or range, default None
        The queries :math:`i`: all, one, or those of a slice or range with a step above 0. Negative ones count from the
        end. All else that depends on where a query stands sees its position in the whole of `q`.
    mask, bias, is_causal, window, q_offset, scale, softcap, alibi_slopes, score_mod, layout, precision
        The options of the call that gave `lse`. There are no `sinks`, since `lse` knows of them, and no dropout.

    Returns
    -------
    array, shape (..., heads, num_rows, seqlen_k), in either layout
        In C order, of the framework and device of the inputs and the dtype of `lse`. One row is an axis of length 1.
        A pair that is not visible has weight 0, whatever its query and key hold, and so has a query whose LSE is -inf.

    Raises
    ------
    TypeError, ValueError
        As `attention` does, and for other `rows`, or such that reach beyond `q` (slices never do).
    IndexError
        For an integer that is no row of `q`.
    ImportError, RuntimeError
        As `attention` does.
    NotImplementedError
        For arrays that record operations for differentiation, and inside of torch.func's transforms: detach them, or
        call under ``torch.no_grad()``.

    See Also
    --------
    attention_received : the sums of the weights over all queries, without a matrix.

    Notes
    -----
    Beyond the result, memory is linear in the lengths. Weights are those before dropout; with sinks a row adds up to
    less than 1. They are made anew of scores in the dtype of `lse`, which are not rounded exactly as in the forward
    pass, so that rows add up to 1 to within the rounding errors of their scores.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 6, 8))  # 4 heads of 6 rows of 8 elements
    >>> out, lse = cuflash.attention(q, k, v, is_causal=True, return_lse=True)
    >>> weights = cuflash.attention_weights(q, k, lse, is_causal=True)
    >>> weights.shape, bool(np.allclose(weights @ v, out))
    ((4, 6, 6), True)

    The last query alone, which sees every key:

    >>> last = cuflash.attention_weights(q, k, lse, rows=-1, is_causal=True)
    >>> last.shape, bool(np.allclose(last.sum(-1), 1))
    ((4, 1, 6), True)
    """
    options = (is_causal, window, q_offset, scale, layout, precision, False, softcap, 0.0)
    extras = _extras(mask, bias, alibi_slopes, None, q)
    return _of_weights("attention_weights", q, k, lse, rows, options, extras, score_mod)


def attention_received(
    q: Any,
    k: Any,
    lse: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    score_mod: ScoreMod | None = None,
    layout: str = "bhsd",
    precision: str | None = None,
) -> Any:
    r"""What every key receives of the weights of all queries, without ever storing their matrix.

    With the weights :math:`p_{ij}` of `attention_weights`,

    .. math:: \text{received}_j = \sum_i p_{ij},

    by which methods such as H2O [1]_ choose the keys to keep.

    Parameters
    ----------
    q : array, shape (..., heads, seqlen_q, head_dim)
        All queries of the call, as `attention` takes them.
    k : array, shape (..., heads_kv, seqlen_k, head_dim)
        Its keys.
    lse : array, shape (..., heads, seqlen_q), in either layout
        What ``attention(..., return_lse=True)`` gave; float32, or float64 for float64 inputs. Where the values had more
        batch axes than `q` and `k`, it has them, and so has the result.
    mask, bias, is_causal, window, q_offset, scale, softcap, alibi_slopes, score_mod, layout, precision
        The options of the call that gave `lse`. There are no `sinks`, since `lse` knows of them, and no dropout.

    Returns
    -------
    array, shape (..., heads, seqlen_k), in either layout
        In C order, of the framework and device of the inputs and the dtype of `lse`. There is one sum per query head,
        also where several of them share a key head. A key that no query sees has 0.

    Raises
    ------
    TypeError, ValueError
        As `attention` does.
    ImportError, RuntimeError
        As `attention` does.
    NotImplementedError
        For arrays that record operations for differentiation, and inside of torch.func's transforms: detach them, or
        call under ``torch.no_grad()``.

    See Also
    --------
    attention_weights : the weights themselves, of chosen queries.

    Notes
    -----
    Memory is linear in the lengths, and the time is about that of a forward pass. Weights are those before dropout, and
    what sinks receive is missing: over all keys, a row without sinks that sees a key adds 1.

    References
    ----------
    .. [1] Z. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
       2023, arXiv:2306.14048.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 6, 8))  # 4 heads of 6 rows of 8 elements
    >>> _, lse = cuflash.attention(q, k, v, is_causal=True, return_lse=True)
    >>> received = cuflash.attention_received(q, k, lse, is_causal=True)
    >>> received.shape, bool(np.allclose(received.sum(-1), 6))
    ((4, 6), True)

    The three keys of each head that matter most, in ascending order:

    >>> np.sort(np.argsort(received)[..., -3:]).shape
    (4, 3)
    """
    options = (is_causal, window, q_offset, scale, layout, precision, False, softcap, 0.0)
    extras = _extras(mask, bias, alibi_slopes, None, q)
    return _of_weights("attention_received", q, k, lse, None, options, extras, score_mod)


def merge_attention(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    r"""Join results of attention over disjoint sets of keys into the result over all of them.

    .. math::

        \text{lse} = \ln \sum_p e^{\text{lse}_p}, \qquad
        \text{out} = \sum_p e^{\text{lse}_p - \text{lse}} \, \text{out}_p.

    Parameters
    ----------
    outs : sequence of arrays, shape (..., seqlen_q, head_dim_v)
        Partial results of ``attention``, all of one shape. Layout "bshd" has to be transposed to the order of the LSE,
        ``out.swapaxes(-3, -2)``.
    lses : sequence of arrays, shape (..., seqlen_q)
        Their LSEs, natural logarithms. A part with LSE -inf saw no key and does not count, whatever its `out` holds.

    Returns
    -------
    out : array, shape (..., seqlen_q, head_dim_v)
        In the dtype of `outs`; where they differ (say, a float32 running result and a float16 part) in float32, or
        float64 where one of them is float64.
    lse : array, shape (..., seqlen_q)
        In the dtype of `lses`, by the same rule.

    Raises
    ------
    TypeError
        For what is not an array, and for mixed frameworks.
    ValueError
        For no parts, sequences of different lengths, and shapes that do not go together.

    Notes
    -----
    Made of the framework's own operations in float32 or float64, so it is differentiable wherever they are, and it
    runs on their device and stream. Parts may be merged in any order and grouping. Keep a running result in float32:
    each rounding to 16 bits on the way adds its error.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 4, 6, 8))
    >>> parts = [cuflash.attention(q, k[:, keys], v[:, keys], return_lse=True) for keys in (slice(0, 2), slice(2, 6))]
    >>> out, lse = cuflash.merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, cuflash.attention(q, k, v)))
    True
    """
    outs, lses = tuple(outs), tuple(lses)
    arguments.check_parts(outs, lses)
    named = {f"outs[{i}]": out for i, out in enumerate(outs)} | {f"lses[{i}]": lse for i, lse in enumerate(lses)}
    operations = arrays.operations(**named)
    if operations is None:
        like = outs[0]
        native = [arrays.import_dlpack(array, name) for name, array in named.items()]
        out, lse = merge_attention(native[: len(outs)], native[len(outs) :])
        return arrays.export_dlpack(out, like), arrays.export_dlpack(lse, like)
    xp, cast = operations
    every = (*outs, *lses)
    accumulator = xp.float64 if any(array.dtype == xp.float64 for array in every) else xp.float32
    out_dtype, lse_dtype = (
        parts[0].dtype if all(part.dtype == parts[0].dtype for part in parts) else accumulator for parts in (outs, lses)
    )
    outs, lses = ([cast(part, accumulator) for part in parts] for parts in (outs, lses))
    lse_max = functools.reduce(xp.maximum, lses)
    lse_max = xp.where(lse_max == -math.inf, 0.0, lse_max)
    weights = [xp.exp(lse - lse_max) for lse in lses]
    total = functools.reduce(operator.add, weights)
    sees_nothing = total == 0
    total = xp.where(sees_nothing, 1.0, total)
    # Parts without weight are taken out rather than multiplied by 0, which would let their NaNs through.
    terms = [
        weight[..., None] * xp.where(weight[..., None] == 0, 0.0, out)
        for weight, out in zip(weights, outs, strict=True)
    ]
    out = functools.reduce(operator.add, terms) / total[..., None]
    lse = xp.where(sees_nothing, -math.inf, lse_max + xp.log(total))
    return cast(out, out_dtype), cast(lse, lse_dtype)


def dropout_mask(seed: int, dropout_p: float, shape: Sequence[int]) -> numpy.ndarray:
    """Which weights dropout keeps: exactly those of a call with this seed, on every device.

    Parameters
    ----------
    seed : int
        Seed of the call, 64 bits.
    dropout_p : float
        Probability in [0, 1) of dropping a weight.
    shape : sequence of int, (..., heads, seqlen_q, seqlen_k)
        Shape of the weights, in either layout. A weight's fate depends on where it stands: batch axes are counted in C
        order, and the same (batch, head, query, key) of a larger shape is kept or dropped alike.

    Returns
    -------
    numpy.ndarray of bool
        True where a weight is kept, and multiplied by ``1 / (1 - dropout_p)``.

    Raises
    ------
    TypeError, ValueError
        As ``attention`` does, and for a shape of less than three axes or with negative lengths.

    Notes
    -----
    The probability of keeping is ``1 - dropout_p`` rounded to a multiple of 2 ** -16. The generator is Philox4x32 with
    seven rounds [1]_; one call of it serves eight weights.

    References
    ----------
    .. [1] J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 4, 6, 8))  # 4 heads of 6 rows of 8 elements
    >>> kept = cuflash.dropout_mask(7, 0.25, (4, 6, 6))
    >>> scores = q @ k.swapaxes(-1, -2) * 8**-0.5
    >>> weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    >>> out = cuflash.attention(q, k, v, dropout_p=0.25, seed=7)
    >>> bool(np.allclose(out, (weights * kept / 0.75) @ v))
    True
    """
    dropout_p = arguments.check_dropout_p(dropout_p)
    return rng.dropout_mask(arguments.check_seed(seed, dropout_p), dropout_p, arguments.check_weights_shape(shape))


# --- one call: look up or prepare, allocate, launch -------------------------------------------------------------


def forward(
    framework: Framework,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    with_lse: bool,
    options: tuple[Any, ...],
    extras: Extras = NO_EXTRAS,
    seed: Any = None,
    captured: tuple[Any, ...] = (),
) -> tuple[Any, Any]:
    """Out and, where asked for, LSE; ``options`` are those of ``arguments.Options``."""
    signature = framework.signature
    key: tuple[Hashable, ...] | None = None
    try:
        key = (signature(q), signature(k), signature(v), None if out is None else signature(out), options)
        if extras is not NO_EXTRAS:
            key = (*key, signatures(framework, extras))
        if captured:
            key = (*key, *map(signature, captured))
        run = framework.prepared.get(key)
    except (TypeError, RuntimeError):
        # An unhashable option, or an array that has no strides: preparing says which.
        run = None
    if run is None:
        run = _prepare_forward(framework, q, k, v, out, options, extras, captured)
        _remember(framework, key, run)
    return run(q, k, v, out, with_lse, extras, seed, captured)


def backward(
    framework: Framework,
    d_out: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    d_lse: Any,
    options: tuple[Any, ...],
    extras: Extras = NO_EXTRAS,
    wanted: tuple[bool, ...] = (False, False, False),
    seed: Any = None,
    captured: tuple[Any, ...] = (),
) -> Gradients:
    """Gradients by q, k and v, and by those of bias, alibi_slopes, sinks and captured arrays that are ``wanted``.

    ``d_captured`` is a tuple, with None for those that are not.
    """
    operands = (d_out, q, k, v, out, lse) if d_lse is None else (d_out, q, k, v, out, lse, d_lse)
    key: tuple[Hashable, ...] | None = None
    try:
        key = (*map(framework.signature, operands), options)
        if extras is not NO_EXTRAS:
            key = (*key, signatures(framework, extras), wanted)
        if captured:
            key = (*key, *map(framework.signature, captured), wanted)
        run = framework.prepared.get(key)
    except (TypeError, RuntimeError):
        run = None
    if run is None:
        run = _prepare_backward(framework, operands, options, extras, wanted, captured)
        _remember(framework, key, run)
    return run(d_out, q, k, v, out, lse, d_lse, extras, seed, captured)


def weights(
    framework: Framework,
    name: str,
    q: Any,
    k: Any,
    lse: Any,
    rows: Any,
    options: tuple[Any, ...],
    extras: Extras = NO_EXTRAS,
    captured: tuple[Any, ...] = (),
) -> Any:
    """What the function of this name returns: ``attention_weights`` or ``attention_received``, which has no rows."""
    signature = framework.signature
    key: tuple[Hashable, ...] | None = None
    try:
        # Some versions of Python do not hash slices; and True is no row, though it equals 1.
        chosen = (rows.start, rows.stop, rows.step) if isinstance(rows, slice) else rows
        key = (name, *map(signature, (q, k, lse)), options, (type(rows), chosen), signatures(framework, extras))
        key = (*key, *map(signature, captured))
        run = framework.prepared.get(key)
    except (TypeError, RuntimeError):
        key = run = None
    if run is None:
        run = _prepare_weights(framework, name, q, k, lse, rows, options, extras, captured)
        _remember(framework, key, run)
    return run(q, k, lse, extras, captured)


def _remember(framework: Framework, key: Hashable, run: Any) -> None:
    if len(framework.prepared) >= MAX_PREPARED:
        framework.prepared.clear()
    framework.prepared[key] = run


def _check_seed(seed: Any, dropout_p: float, q: Any) -> Any:
    """The seed as 64 bits or, on a GPU, as the array that holds it, so that nobody has to wait for it."""
    if hasattr(seed, "__dlpack__"):
        own = arrays.framework_of(seed=seed)
        native = arrays.import_dlpack(seed, "seed") if own is None else seed
        framework = own or arrays.framework_of(seed=native)
        assert framework is not None
        view = framework.view(native, "seed")
        if view.device != arrays.CPU:
            arrays.framework_of(q=q, seed=seed)  # raises where frameworks mix
            arguments.check_seed_array(view)
            return native
        seed = framework.as_numpy(native)
        seed = seed.item() if seed.size == 1 else seed
    return arguments.check_seed(seed, dropout_p)


def _extras(mask: Any, bias: Any, alibi_slopes: Any, sinks: Any, q: Any) -> Extras:
    """The arrays beside q, k and v, of the same framework."""
    if mask is bias is alibi_slopes is sinks is None:
        return NO_EXTRAS
    extras = Extras(mask, bias, alibi_slopes, sinks)
    named = {name: array for name, array in extras._asdict().items() if array is not None}
    if isinstance(mask, BlockMask):
        named["mask"] = mask.blocks
    arrays.framework_of(q=q, **named)
    return extras


def _take_apart(score_mod: Any, q: Any) -> tuple[arguments.ScoreModOption, tuple[Any, ...]]:
    """The expression, and the arrays that it captures, of the framework of q."""
    if not isinstance(score_mod, ScoreMod):
        raise TypeError(f"score_mod: got {type(score_mod).__name__}, wanted None or what cuflash.score_mod(...) makes")
    arrays.framework_of(q=q, **{f"score_mod: {name}": array for name, array in score_mod.arrays.items()})
    return score_mod.option, tuple(score_mod.arrays.values())


def _array_names(mod: arguments.ScoreModOption | None) -> list[str]:
    captures = {} if mod is None else mod.expression.captures
    return [f"score_mod: {name}" for name, found in captures.items() if found.num_axes is not None]


def _is_real(mod: arguments.ScoreModOption | None) -> tuple[bool, ...]:
    """For each array that an expression captures whether its elements are real."""
    captures = {} if mod is None else mod.expression.captures
    return tuple(found.is_real for found in captures.values() if found.num_axes is not None)


def given(extras: Extras) -> list[Any]:
    """The arrays that the call has."""
    return [array_of(extra) for extra in extras if extra is not None]


def signatures(framework: Framework, extras: Extras) -> Extras:
    """All of the extras that a prepared call depends on."""
    return extras.map(functools.partial(signature_of, framework))


def resolved(framework: Framework, extras: Extras) -> Extras:
    """The extras without anything lazy; blocks of a mask are not."""
    return extras.map(lambda extra: extra if isinstance(extra, BlockMask) else framework.resolve(extra))


def imported(extras: Extras) -> Extras:
    """The extras as arrays of a framework; a mask by blocks has one already."""

    def of(extra: Any, name: str) -> Any:
        return extra if isinstance(extra, BlockMask) else arrays.import_dlpack(extra, name)

    return extras.map(of, Extras._fields)


def _prepare_forward(
    framework: Framework,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    options: tuple[Any, ...],
    extras: Extras,
    captured: tuple[Any, ...],
) -> Callable[..., tuple[Any, Any]]:
    if framework.is_lazy(q, k, v, *given(extras), *captured):

        def run(
            q: Any, k: Any, v: Any, out: Any, with_lse: bool, extras: Extras, seed: Any, captured: tuple[Any, ...]
        ) -> tuple[Any, Any]:
            q, k, v, *captured_now = map(framework.resolve, (q, k, v, *captured))
            extras = resolved(framework, extras)
            return forward(framework, q, k, v, out, with_lse, options, extras, seed, tuple(captured_now))

        return run
    views = [framework.view(array, name) for name, array in zip("qkv", (q, k, v), strict=True)]
    out_view = None if out is None else framework.view(out, "out")
    extra_views = extras.map(functools.partial(view_of, framework), Extras._fields)
    checked = Options(*options)
    captured_views = list(map(framework.view, captured, _array_names(checked.score_mod)))
    call = arguments.forward(views[0], views[1], views[2], out_view, checked, extra_views, captured_views)
    return (_HostForward if call.device == CPU else _DeviceForward)(framework, call)


def _prepare_backward(
    framework: Framework,
    operands: tuple[Any, ...],
    options: tuple[Any, ...],
    extras: Extras,
    wanted: tuple[bool, ...],
    captured: tuple[Any, ...],
) -> Callable[..., Gradients]:
    if framework.is_lazy(*operands, *given(extras), *captured):

        def run(*arguments: Any) -> Gradients:
            *operands, extras, seed, captured = arguments
            d_out, q, k, v, out, lse, d_lse = (None if x is None else framework.resolve(x) for x in operands)
            extras, captured = resolved(framework, extras), tuple(map(framework.resolve, captured))
            return backward(framework, d_out, q, k, v, out, lse, d_lse, options, extras, wanted, seed, captured)

        return run
    names = ("d_out", "q", "k", "v", "out", "lse", "d_lse")
    views: list[Any] = [framework.view(array, name) for name, array in zip(names, operands, strict=False)]
    d_lse_view = views.pop() if len(views) == len(names) else None
    d_out, q, k, v, out, lse = views
    extra_views = extras.map(functools.partial(view_of, framework), Extras._fields)
    asked_for = Extras(None, *(True if is_wanted else None for is_wanted in wanted[:3]))
    checked = Options(*options)
    captured_views = list(map(framework.view, captured, _array_names(checked.score_mod)))
    call = arguments.backward(
        d_out, q, k, v, out, lse, d_lse_view, checked, extra_views, captured_views, asked_for, wanted[3:]
    )
    return (_HostBackward if call.device == CPU else _DeviceBackward)(framework, call)


def _prepare_weights(
    framework: Framework,
    name: str,
    q: Any,
    k: Any,
    lse: Any,
    rows: Any,
    options: tuple[Any, ...],
    extras: Extras,
    captured: tuple[Any, ...],
) -> Callable[..., Any]:
    if framework.is_lazy(q, k, lse, *given(extras), *captured):

        def run(q: Any, k: Any, lse: Any, extras: Extras, captured: tuple[Any, ...]) -> Any:
            q, k, lse, *captured_now = map(framework.resolve, (q, k, lse, *captured))
            extras = resolved(framework, extras)
            return weights(framework, name, q, k, lse, rows, options, extras, tuple(captured_now))

        return run
    q, k, lse = map(framework.view, (q, k, lse), ("q", "k", "lse"))
    extra_views = extras.map(functools.partial(view_of, framework), Extras._fields)
    checked = Options(*options)
    captured_views = list(map(framework.view, captured, _array_names(checked.score_mod)))
    if name == "attention_weights":
        call = arguments.weights(q, k, lse, rows, checked, extra_views, captured_views)
    else:
        call = arguments.received(q, k, lse, checked, extra_views, captured_views)
    return (_HostWeights if call.device == CPU else _DeviceWeights)(framework, call)


class _Prepared:
    """A checked call of some shapes, strides and options, to be run on any arrays that have them."""

    def __init__(self, framework: Framework, call: Call) -> None:
        self.framework = framework
        self.call = call
        self.dtype = call.problem.dtype
        self.lse_dtype = call.problem.lse_dtype
        self.out_shape = call.out_shape
        self.lse_shape = call.lse_shape

    def allocate(self, q: Any, k: Any, v: Any, out: Any, with_lse: bool) -> tuple[Any, Any]:
        """Result arrays of a forward call; an ``out`` that is given is checked and kept."""
        framework = self.framework
        if out is None:
            out = framework.empty(q, self.out_shape, self.dtype)
        else:
            self.check_disjoint(out, (q, k, v))
            framework.mark_written(out)
        return out, framework.empty(q, self.lse_shape, self.lse_dtype) if with_lse else None

    def check_disjoint(self, out: Any, inputs: Sequence[Any]) -> None:
        """Check that ``out`` shares no memory with an input; exactly only where their ranges of memory meet."""
        framework = self.framework
        *input_spans, (out_low, out_high) = self.call.spans
        out_pointer = framework.pointer(out)
        for name, array, (low, high) in zip("qkv", inputs, input_spans, strict=True):
            pointer = framework.pointer(array)
            if pointer + low < out_pointer + out_high and out_pointer + out_low < pointer + high:
                arguments.check_disjoint(framework.view(out, "out"), framework.view(array, name))

    def zeros(self, q: Any, shape: tuple[int, ...]) -> Any:
        """Where sums are added up: float32, or float64."""
        array = self.framework.empty(q, shape, self.lse_dtype)
        array[...] = 0
        return array

    def allocate_weights(self, q: Any) -> Any:
        """Result of a call for weights; zeros where there is nothing to launch."""
        result = self.framework.empty(q, self.out_shape, self.lse_dtype)
        if not self.call.has_pairs:
            result[...] = 0
        return result

    def allocate_gradients(self, q: Any) -> list[Any]:
        """Gradients before they are summed over broadcast axes; zeros where there is nothing to launch."""
        gradients = [self.framework.empty(q, shape, self.dtype) for shape in self.call.gradient_shapes]
        if not self.call.has_pairs:
            for gradient in gradients:
                gradient[...] = 0
        return gradients

    def in_accumulator(self, extras: Extras) -> Extras:
        """The extras, with slopes and sinks in C order and the dtype that sums have: they are few."""
        framework = self.framework
        numbers = {
            name: framework.contiguous(framework.cast(array, framework.dtype(self.lse_dtype)))
            for name, array in (("alibi_slopes", extras.alibi_slopes), ("sinks", extras.sinks))
            if array is not None
        }
        return extras._replace(**numbers)

    def allocate_extra_gradients(self, q: Any, extras: Extras) -> Extras:
        """Zeros to add the gradients of extras to, where these are asked for: float32, or float64."""
        return self.call.d_extras.map(lambda _, extra: self.zeros(q, tuple(extra.shape)), extras)

    def allocate_captured_gradients(self, q: Any) -> list[Any]:
        """Zeros to add the gradients by captured arrays to, None where there are none: float32, or float64."""
        pairs = zip(self.call.captured, self.call.d_captured, strict=True)
        return [self.zeros(q, array.shape) if is_wanted else None for array, is_wanted in pairs]

    def finish(
        self,
        gradients: Sequence[Any],
        operands: Sequence[Any],
        d_extras: Extras,
        extras: Extras,
        d_captured: Sequence[Any],
        captured: Sequence[Any],
    ) -> Gradients:
        """Gradients in the shapes of the operands, and in the dtypes of the extras and of what is captured."""
        d_q, d_k, d_v = (
            arrays.sum_to(self.framework, gradient, tuple(operand.shape))
            for gradient, operand in zip(gradients, operands, strict=True)
        )
        rounded = d_extras.map(lambda gradient, extra: self.framework.cast(gradient, extra.dtype), extras)
        by_captured = tuple(
            None if gradient is None else self.framework.cast(gradient, array.dtype)
            for gradient, array in zip(d_captured, captured, strict=True)
        )
        return Gradients(d_q, d_k, d_v, rounded.bias, rounded.sinks, rounded.alibi_slopes, by_captured)


class _Host(_Prepared):
    """A call on the CPU, by NumPy."""

    def canonical(self, array: Any, strides: tuple[int, ...], heads: int, seqlen: int, dim: int) -> numpy.ndarray:
        """View of an operand as (*loop, batch, heads, seqlen, dim)."""
        array = self.framework.as_numpy(array)
        shape = (*self.call.loop, self.call.problem.batch, heads, seqlen, dim)
        return as_strided(array, shape, tuple(array.itemsize * stride for stride in (*strides, 1)))

    def canonical_lse(self, lse: Any) -> numpy.ndarray:
        """View of a contiguous LSE as (*loop, batch, heads, seqlen_q)."""
        problem = self.call.problem
        shape = (*self.call.loop, problem.batch, problem.num_heads, problem.seqlen_q)
        return self.framework.as_numpy(lse).reshape(shape)

    def canonical_extras(self, extras: Extras, strides: Extras) -> Extras:
        """Views as (*loop, batch, heads, seqlen_q, seqlen_k), or the first of these; of the sinks as (heads,).

        A mask by blocks has their numbers instead of the lengths.
        """
        p = self.call.problem
        query_block, key_block, _ = p.features.mask_block
        outer = (*self.call.loop, p.batch, p.num_heads)
        pairs = (*outer, p.seqlen_q, p.seqlen_k)
        shapes = Extras(
            (*outer, -(-p.seqlen_q // query_block), -(-p.seqlen_k // key_block)), pairs, outer, (p.num_heads,)
        )

        def view(own: tuple[int, ...], extra: Any, shape: tuple[int, ...]) -> numpy.ndarray:
            array = self.framework.as_numpy(array_of(extra))
            return as_strided(array, shape, tuple(array.itemsize * stride for stride in own))

        return strides.map(view, extras, shapes)

    def bind(self, captured: Sequence[Any]) -> Bound | None:
        """The expression with what it captures."""
        f = self.call.problem.features
        if f.mod is None:
            return None
        own, numbers = iter(captured), iter(f.mod_numbers)
        return Bound(
            f.mod.expression,
            {
                name: next(numbers) if found.num_axes is None else self.framework.as_numpy(next(own))
                for name, found in f.mod.expression.captures.items()
            },
        )

    def score(self, extras: Extras, index: tuple[int, ...], launch: int, seed: Any, mod: Bound | None) -> Score:
        """What is done to the scores of one launch, given the canonical extras of all."""
        p = self.call.problem
        here = self.at(extras, index)
        f = p.features
        if not isinstance(seed, int | None):
            raise ValueError("seed: got an array on a GPU for operands on the CPU, wanted an integer")
        return Score(
            f.softcap, here.bias, here.mask, here.alibi_slopes, f.q_offset, here.sinks, f.dropout_p, seed or 0,
            launch * p.batch, mod, f.mask_block[:2],
        )  # fmt: skip

    @staticmethod
    def at(extras: Extras, index: tuple[int, ...]) -> Extras:
        """The canonical extras of one launch; the sinks are those of all."""
        return extras._replace(
            **{name: x[index] for name, x in extras._asdict().items() if x is not None and x.ndim > 1}
        )


class _HostForward(_Host):
    def __call__(
        self, q: Any, k: Any, v: Any, out: Any, with_lse: bool, extras: Extras, seed: Any, captured: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        out, lse = self.allocate(q, k, v, out, with_lse)
        if self.call.has_rows:
            p = self.call.problem
            queries = (p.num_heads, p.seqlen_q)
            keys = (p.num_heads_kv, p.seqlen_k)
            sizes = ((*queries, p.head_dim), (*keys, p.head_dim), (*keys, p.head_dim_v), (*queries, p.head_dim_v))
            operands = [
                self.canonical(array, strides, *size)
                for array, strides, size in zip((q, k, v, out), self.call.strides, sizes, strict=True)
            ]
            canonical_lse = None if lse is None else self.canonical_lse(lse)
            extras = self.canonical_extras(self.in_accumulator(extras), self.call.extras)
            mod = self.bind(captured)
            for launch, index in enumerate(numpy.ndindex(self.call.loop)):
                q_part, k_part, v_part, out_part = (operand[index] for operand in operands)
                lse_part = None if canonical_lse is None else canonical_lse[index]
                score = self.score(extras, index, launch, seed, mod)
                cpu.forward(q_part, k_part, v_part, out_part, lse_part, band=p.band, scale=p.scale, score=score)
        return out, lse


class _HostBackward(_Host):
    def __call__(
        self,
        d_out: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        d_lse: Any,
        extras: Extras,
        seed: Any,
        captured: tuple[Any, ...],
    ) -> Gradients:
        gradients = self.allocate_gradients(q)
        d_extras = self.allocate_extra_gradients(q, extras)
        d_captured = self.allocate_captured_gradients(q)
        if self.call.has_pairs or (self.call.has_rows and d_extras.sinks is not None):
            p = self.call.problem
            q_size, k_size = (p.num_heads, p.seqlen_q, p.head_dim), (p.num_heads_kv, p.seqlen_k, p.head_dim)
            v_size, out_size = (p.num_heads_kv, p.seqlen_k, p.head_dim_v), (p.num_heads, p.seqlen_q, p.head_dim_v)
            sizes = (out_size, q_size, k_size, v_size, out_size, q_size, k_size, v_size)
            operands = [
                self.canonical(array, strides, *size)
                for array, strides, size in zip(
                    (d_out, q, k, v, out, *gradients), self.call.strides, sizes, strict=True
                )
            ]
            contiguous = self.framework.contiguous
            lse = self.canonical_lse(contiguous(lse))
            d_lse = None if d_lse is None else self.canonical_lse(contiguous(d_lse))
            canonical = self.canonical_extras(self.in_accumulator(extras), self.call.extras)
            sums = self.canonical_extras(d_extras, self.call.d_extras)
            mod = self.bind(captured)
            for launch, index in enumerate(numpy.ndindex(self.call.loop)):
                inputs, outputs = [x[index] for x in operands[:5]], [x[index] for x in operands[5:]]
                d_lse_part = None if d_lse is None else d_lse[index]
                parts: list[Any] = [*inputs, lse[index], d_lse_part, *outputs]
                score = self.score(canonical, index, launch, seed, mod)
                # Where the extra was broadcast there is one element to add to.
                d_bias, d_slopes, d_sinks = (
                    None if x is None else x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.strides)]
                    for x in self.at(sums, index)[1:]
                )
                names = [] if p.features.mod is None else [name for name, _ in p.features.mod.dtypes]
                sums_of_captured = {
                    name: self.framework.as_numpy(x) for name, x in zip(names, d_captured, strict=True) if x is not None
                }
                cpu.backward(
                    *parts, band=p.band, scale=p.scale, score=score, d_bias=d_bias, d_alibi_slopes=d_slopes,
                    d_sinks=d_sinks, d_captured=sums_of_captured,
                )  # fmt: skip
        return self.finish(gradients, (q, k, v), d_extras, extras, d_captured, captured)


class _HostWeights(_Host):
    def __call__(self, q: Any, k: Any, lse: Any, extras: Extras, captured: tuple[Any, ...]) -> Any:
        result = self.allocate_weights(q)
        if self.call.has_pairs:
            p, rows = self.call.problem, self.call.rows
            sizes = (p.num_heads, p.seqlen_q, p.head_dim), (p.num_heads_kv, p.seqlen_k, p.head_dim)
            q, k = (
                self.canonical(array, strides, *size)
                for array, strides, size in zip((q, k), self.call.strides, sizes, strict=True)
            )
            lse = self.canonical_lse(self.framework.contiguous(lse))
            num_rows = () if rows is None else (len(rows),)
            out = self.framework.as_numpy(result).reshape(*lse.shape[:-1], *num_rows, p.seqlen_k)
            extras = self.canonical_extras(self.in_accumulator(extras), self.call.extras)
            mod = self.bind(captured)
            for launch, index in enumerate(numpy.ndindex(self.call.loop)):
                score = self.score(extras, index, launch, None, mod)
                compute = cpu.received if rows is None else functools.partial(cpu.weights, rows=rows)
                compute(q[index], k[index], lse[index], out[index], band=p.band, scale=p.scale, score=score)
        return result


class _Device(_Prepared):
    """A call on a GPU: a launch per index of ``loop``, on the caller's stream."""

    def __init__(self, framework: Framework, call: Call) -> None:
        super().__init__(framework, call)
        self.device = call.device
        arguments.check_device(call.problem, framework.compute_capability(call.device), call.device)
        with framework.use_device(call.device):
            self.prepare([strides[-3:] for strides in call.strides])

    def prepare(self, strides: list[Any]) -> None:
        """Build the launch and what it needs."""
        raise NotImplementedError

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done to the scores."""
        return self.call.problem.features == Features()

    def per_launch(self, strides: Extras) -> Extras:
        """Strides without those of the axes to loop over."""
        depth = len(self.call.loop)
        return Extras(
            *(
                own if own is None or name == "sinks" else own[depth:]
                for name, own in zip(Extras._fields, strides, strict=True)
            )
        )

    def offsets_of(self, strides: tuple[int, ...], itemsize: int) -> Iterator[int]:
        """For every launch the offset in bytes of an array with these strides."""
        depth = len(self.call.loop)
        for index in itertools.product(*map(range, self.call.loop)):
            yield itemsize * sum(map(operator.mul, index, strides[:depth]))

    def score_arguments(self, extras: Extras, seed: Any, captured: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        """For every launch what it needs of extras, seed and captures.

        These are the pointers of the extras, the seed or a pointer to it, the first batch entry, and the pointers of
        what is captured.
        """
        seed_at = 0
        if not isinstance(seed, int | None):
            device = self.framework.view(seed, "seed").device
            if device != self.device:
                raise ValueError(f"seed: got an array on cuda:{device}, wanted one on cuda:{self.device}, as q is")
            seed, seed_at = 0, self.framework.pointer(seed)
        starts = [0 if extra is None else self.framework.pointer(array_of(extra)) for extra in extras]
        offsets = [
            itertools.repeat(0) if own is None or name == "sinks" else self.offsets_of(own, size)
            for name, own, size in zip(Extras._fields, self.call.extras, self.call.itemsizes, strict=True)
        ]
        batch = self.call.problem.batch
        own = tuple(map(self.framework.pointer, captured))
        for launch in range(math.prod(self.call.loop)):
            yield tuple(map(operator.add, starts, map(next, offsets))), seed or 0, seed_at, launch * batch, own

    def made(self, make: Any, mask: Any, address: int, q: Any, stream: int) -> Any:
        """What a launch reads of the mask at an address: made now, or before if it is a mask that keeps it."""
        framework = self.framework

        def new() -> Any:
            made = framework.empty(q, (make.num_bytes,), "uint8")
            make(address, framework.pointer(made), stream)
            return made

        if not isinstance(mask, BlockMask):
            return new()
        key = make.key, stream, address - framework.pointer(mask.array)
        return mask.keep(key, new, framework.is_capturing)


class _DeviceForward(_Device):
    def prepare(self, strides: list[Any]) -> None:
        from . import launch  # what the CPU does not need is loaded with the first call on a GPU

        self.offsets: tuple[tuple[int, ...], ...] = ()
        self.mask_call = None
        if self.call.has_rows:
            extras = self.per_launch(self.call.extras)
            self.launch = launch.ForwardCall(
                self.call.problem, self.device, *strides, extras=extras, itemsizes=self.call.itemsizes,
                captured=self.call.captured,
            )  # fmt: skip
            self.mask_call = self.launch.mask_call
            self.offsets = tuple(self.call.offsets())

    def __call__(
        self, q: Any, k: Any, v: Any, out: Any, with_lse: bool, extras: Extras, seed: Any, captured: tuple[Any, ...]
    ) -> tuple[Any, Any]:
        framework = self.framework
        if framework.current_device() != self.device:
            with framework.use_device(self.device):
                return self(q, k, v, out, with_lse, extras, seed, captured)
        out, lse = self.allocate(q, k, v, out, with_lse)
        pointer = framework.pointer
        q_ptr, k_ptr, v_ptr, out_ptr = pointer(q), pointer(k), pointer(v), pointer(out)
        stream = framework.stream(self.device)
        more: Iterator[tuple[Any, ...]] = itertools.repeat(())
        if not self.is_plain:
            extras = self.in_accumulator(extras)
            more = self.score_arguments(extras, seed, captured)
        for (to_q, to_k, to_v, to_out, to_lse), score in zip(self.offsets, more, strict=False):
            if self.mask_call is not None:
                made = self.made(self.mask_call, extras.mask, score[0][0], q, stream)
                score = (*score, pointer(made))
            lse_ptr = 0 if lse is None else pointer(lse) + to_lse
            self.launch(q_ptr + to_q, k_ptr + to_k, v_ptr + to_v, out_ptr + to_out, lse_ptr, stream, *score)
        return out, lse


class _DeviceBackward(_Device):
    def prepare(self, strides: list[Any]) -> None:
        from . import launch

        self.offsets: tuple[tuple[int, ...], ...] = ()
        self.workspace_bytes = 0
        self.mask_call = None
        if self.call.has_pairs:
            d_bias = self.per_launch(self.call.d_extras).bias
            self.launch = launch.BackwardCall(
                self.call.problem, self.device, *strides, extras=self.per_launch(self.call.extras),
                itemsizes=self.call.itemsizes, captured=self.call.captured, d_bias=d_bias,
                wants_captured=self.call.d_captured,
            )  # fmt: skip
            self.workspace_bytes, self.mask_call = self.launch.workspace_bytes, self.launch.mask_call
            self.offsets = tuple(self.call.offsets())

    def __call__(
        self,
        d_out: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        d_lse: Any,
        extras: Extras,
        seed: Any,
        captured: tuple[Any, ...],
    ) -> Gradients:
        framework = self.framework
        if framework.current_device() != self.device:
            with framework.use_device(self.device):
                return self(d_out, q, k, v, out, lse, d_lse, extras, seed, captured)
        gradients = self.allocate_gradients(q)
        lse = framework.contiguous(lse)
        d_lse = None if d_lse is None else framework.contiguous(d_lse)
        workspace = framework.empty(q, (self.workspace_bytes,), "uint8")
        pointer = framework.pointer
        pointers = [pointer(array) for array in (d_out, q, k, v, out, *gradients)]
        stream = framework.stream(self.device)
        more: Iterator[tuple[Any, ...]] = itertools.repeat(())
        sums = NO_EXTRAS
        d_captured = self.allocate_captured_gradients(q)
        if not self.is_plain:
            numbers = self.in_accumulator(extras)
            sums = self.allocate_sums(q, extras)
            by_captured = tuple(0 if x is None else pointer(x) for x in d_captured)
            sum_arguments = ((*own, by_captured) for own in self.sum_arguments(sums))
            more = map(operator.add, self.score_arguments(numbers, seed, captured), sum_arguments)
        for (*offsets, lse_offset), score in zip(self.offsets, more, strict=False):
            shifted = [address + offset for address, offset in zip(pointers, offsets, strict=True)]
            lse_ptr = pointer(lse) + lse_offset
            d_lse_ptr = 0 if d_lse is None else pointer(d_lse) + lse_offset
            parts: list[Any] = [*shifted[:5], lse_ptr, d_lse_ptr, *shifted[5:], pointer(workspace), stream]
            if self.mask_call is not None:
                made = self.made(self.mask_call, extras.mask, score[0][0], q, stream)
                score = (*score, pointer(made))
            self.launch(*parts, *score)
        d_slopes, d_sinks = sums.alibi_slopes, sums.sinks
        if d_slopes is not None:
            d_slopes = d_slopes.sum(-1).reshape(*self.lse_shape[:-2], -1)
            d_slopes = arrays.sum_to(framework, d_slopes, tuple(extras.alibi_slopes.shape))
        if d_sinks is not None:
            d_sinks = d_sinks.sum(-1).reshape(-1, self.call.problem.num_heads).sum(0)
        d_bias = None if sums.bias is None else arrays.sum_to(framework, sums.bias, tuple(extras.bias.shape))
        sums = Extras(None, d_bias, d_slopes, d_sinks)
        return self.finish(gradients, (q, k, v), sums, extras, d_captured, captured)

    def allocate_sums(self, q: Any, extras: Extras) -> Extras:
        """Zeros for the gradient by the bias, and for terms of the others: (*loop, batch, heads, ...)."""
        wanted, problem = self.call.d_extras, self.call.problem
        heads = (*self.call.loop, problem.batch, problem.num_heads)
        num_slope_sums, num_sink_sums = (
            (self.launch.num_slope_sums, self.launch.num_sink_sums) if self.offsets else (0, 0)
        )
        shapes = Extras(
            None,
            None if wanted.bias is None else self.call.d_bias_shape,
            None if wanted.alibi_slopes is None else (*heads, num_slope_sums),
            None if wanted.sinks is None else (*heads, num_sink_sums),
        )

        return shapes.map(functools.partial(self.zeros, q))

    def sum_arguments(self, sums: Extras) -> Iterator[tuple[int, int, int]]:
        """For every launch the pointers to these."""
        problem, size = self.call.problem, ITEMSIZE[self.lse_dtype]
        heads = problem.batch * problem.num_heads * size
        bias = self.call.d_extras.bias
        to_bias = itertools.repeat(0) if bias is None else self.offsets_of(bias, size)
        starts = [0 if array is None else self.framework.pointer(array) for array in sums]
        for launch in range(math.prod(self.call.loop)):
            bias_offset = next(to_bias)
            slopes = starts[2] + launch * heads * self.launch.num_slope_sums if starts[2] else 0
            sinks = starts[3] + launch * heads * self.launch.num_sink_sums if starts[3] else 0
            yield starts[1] + bias_offset if starts[1] else 0, slopes, sinks


class _DeviceWeights(_Device):
    def prepare(self, strides: list[Any]) -> None:
        from . import launch

        self.offsets: tuple[tuple[int, ...], ...] = ()
        if self.call.has_pairs and 0 not in self.out_shape:
            self.launch = launch.WeightsCall(
                self.call.problem, self.device, *strides, rows=self.call.rows,
                extras=self.per_launch(self.call.extras), itemsizes=self.call.itemsizes, captured=self.call.captured,
            )  # fmt: skip
            self.offsets = tuple(self.call.offsets())

    def __call__(self, q: Any, k: Any, lse: Any, extras: Extras, captured: tuple[Any, ...]) -> Any:
        framework = self.framework
        if framework.current_device() != self.device:
            with framework.use_device(self.device):
                return self(q, k, lse, extras, captured)
        result = self.allocate_weights(q)
        lse = framework.contiguous(lse)
        q_ptr, k_ptr, lse_ptr, out_ptr = map(framework.pointer, (q, k, lse, result))
        stream = framework.stream(self.device)
        more: Iterator[tuple[Any, ...]] = itertools.repeat(())
        if not self.is_plain:
            extras = self.in_accumulator(extras)
            more = self.score_arguments(extras, None, captured)
        out_bytes = ITEMSIZE[self.lse_dtype] * math.prod(self.out_shape) // max(len(self.offsets), 1)
        for launch, ((to_q, to_k, to_lse), score) in enumerate(zip(self.offsets, more, strict=False)):
            self.launch(q_ptr + to_q, k_ptr + to_k, lse_ptr + to_lse, out_ptr + launch * out_bytes, stream, *score)
        return result


# --- frameworks -------------------------------------------------------------------------------------------------


def _framework(q: Any, k: Any, v: Any) -> Framework | None:
    kind = type(q)
    framework = arrays.frameworks.get(kind)
    if framework is None or type(k) is not kind or type(v) is not kind:
        framework = arrays.framework_of(q=q, k=k, v=v)
    return framework


def _of_weights(
    name: str, q: Any, k: Any, lse: Any, rows: Any, options: tuple[Any, ...], extras: Extras, score_mod: Any
) -> Any:
    """``weights`` on arrays of any library; the options lack what is made of score_mod."""
    framework = arrays.framework_of(q=q, k=k, lse=lse)
    mod, captured = (None, ()) if score_mod is None else _take_apart(score_mod, q)
    options = (*options, mod)
    if framework is None:
        native = {of: arrays.import_dlpack(array, of) for of, array in (("q", q), ("k", k), ("lse", lse))}
        framework = arrays.framework_of(**native)
        assert framework is not None
        extras = imported(extras)
        captured = tuple(map(arrays.import_dlpack, captured, _array_names(mod)))
        result = weights(framework, name, **native, rows=rows, options=options, extras=extras, captured=captured)
        return arrays.export_dlpack(result, q)
    if framework.records(q, k, lse, *given(extras), *captured):
        raise NotImplementedError(
            f"{name}: got arrays that record operations for differentiation, wanted others: detach() them, or call "
            "under torch.no_grad() and outside of torch.func's transforms"
        )
    return weights(framework, name, q, k, lse, rows, options, extras, captured)


def _attention_dlpack(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    with_lse: bool,
    options: tuple[Any, ...],
    extras: Extras,
    seed: Any,
    captured: tuple[Any, ...],
) -> tuple[Any, Any]:
    named = {"q": q, "k": k, "v": v}
    if out is not None:
        arrays.check_mutable(out)
        named["out"] = out
    native = {name: arrays.import_dlpack(array, name) for name, array in named.items()}
    framework = arrays.framework_of(**native)
    assert framework is not None
    extras = imported(extras)
    captured = tuple(map(arrays.import_dlpack, captured, _array_names(options[-1])))
    result, lse = forward(
        framework, native["q"], native["k"], native["v"], native.get("out"), with_lse, options, extras, seed, captured
    )
    return (
        arrays.export_dlpack(result, q) if out is None else out,
        arrays.export_dlpack(lse, q) if with_lse else None,
    )


def _attention_backward_dlpack(
    operands: tuple[Any, ...],
    options: tuple[Any, ...],
    extras: Extras,
    wanted: tuple[bool, ...],
    seed: Any,
    captured: tuple[Any, ...],
) -> Gradients:
    names = ("d_out", "q", "k", "v", "out", "lse", "d_lse")
    native = [None if a is None else arrays.import_dlpack(a, name) for a, name in zip(operands, names, strict=True)]
    framework = arrays.framework_of(**{name: a for name, a in zip(names, native, strict=True) if a is not None})
    assert framework is not None
    d_out, q, k, v, out, lse, d_lse = native
    extras = imported(extras)
    captured = tuple(map(arrays.import_dlpack, captured, _array_names(options[-1])))
    gradients = backward(framework, d_out, q, k, v, out, lse, d_lse, options, extras, wanted, seed, captured)

    def export(x: Any) -> Any:
        return None if x is None else arrays.export_dlpack(x, operands[1])

    d_captured = tuple(map(export, gradients.d_captured))
    return Gradients(*map(export, (*gradients[:6], None)))._replace(d_captured=d_captured)
