"""PyTorch tensors on a GPU: automatic differentiation, streams, threads, graphs, memory."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import cuflash
from tests import gradcheck
from tests.gpu.harness import cupy, judge_backward, judge_forward
from tests.strategies import DTYPES, Case, make_operands

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("this PyTorch has no CUDA GPU", allow_module_level=True)

CASE = Case(batch=2, num_heads=4, num_heads_kv=2, seqlen_q=150, seqlen_k=200, is_causal=True)


def tensors(case: Case) -> list[Any]:
    """Operands of a case as tensors of their own; q, k and v require gradients."""
    q, k, v, d_out = (torch.from_dlpack(array).clone() for array in make_operands(case, cupy.asarray))
    torch.cuda.current_stream().synchronize()  # before CuPy hands out the memory that was copied from
    return [*(tensor.requires_grad_() for tensor in (q, k, v)), d_out]


def as_cupy(tensor: Any) -> Any:
    """Share a tensor's memory with CuPy."""
    return cupy.from_dlpack(tensor.detach())


def same_bits(first: Any, second: Any) -> bool:
    """Compare tensors bit by bit."""
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "case", [replace(CASE, dtype=dtype, layout=layout) for dtype in DTYPES for layout in ("bhsd", "bshd")], ids=str
)
def test_autograd(case: Case) -> None:
    q, k, v, d_out = tensors(case)
    out, lse = cuflash.attention(q, k, v, return_lse=True, **case.options)
    assert out.requires_grad
    assert lse.requires_grad
    judge_forward(case, *map(as_cupy, (q, k, v, out, lse)))
    out.backward(d_out)
    gradients = [as_cupy(tensor.grad) for tensor in (q, k, v)]
    judge_backward(case, *map(as_cupy, (d_out, q, k, v)), None, gradients)


def test_gradient_through_the_lse() -> None:
    case = replace(CASE, dtype="float32")
    q, k, v, d_out = tensors(case)
    out, lse = cuflash.attention(q, k, v, return_lse=True, is_causal=True)
    d_lse = torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (d_out, d_lse))
    judge_backward(case, *map(as_cupy, (d_out, q, k, v)), as_cupy(d_lse), list(map(as_cupy, gradients)))


def test_only_the_gradients_that_are_asked_for() -> None:
    q, k, v, d_out = tensors(CASE)
    k.requires_grad_(False)
    cuflash.attention(q, k, v, is_causal=True).backward(d_out)
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is not None
    with torch.no_grad():
        assert not cuflash.attention(q, k, v).requires_grad
    assert not cuflash.attention(*(tensor.detach() for tensor in (q, k, v))).requires_grad


def _dense(q: Any, k: Any, v: Any) -> Any:
    return q, k, v


def _transposed(q: Any, k: Any, v: Any) -> Any:
    return tuple(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, k, v))


def _expanded(q: Any, k: Any, v: Any) -> Any:
    return q, k[:1].expand(q.shape[0], -1, -1, -1), v[:1]


def _packed(q: Any, k: Any, v: Any) -> Any:
    kv = torch.cat((k, v), dim=-1)
    return q, kv[..., : k.shape[-1]], kv[..., k.shape[-1] :]


@pytest.mark.parametrize("view", [_dense, _transposed, _expanded, _packed])
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (2, 1), "q_offset": -2, "scale": 0.7}], ids=str
)
def test_gradcheck(view: Callable, options: dict) -> None:
    torch.manual_seed(0)
    shapes = ((2, 2, 5, 3), (2, 1, 7, 3), (2, 1, 7, 4))
    q, k, v = (torch.randn(shape, dtype=torch.float64, device="cuda", requires_grad=True) for shape in shapes)

    def attend(q: Any, k: Any, v: Any) -> Any:
        out, lse = cuflash.attention(*view(q, k, v), return_lse=True, **options)
        # The rows that see nothing have an LSE of -inf, which finite differences cannot judge.
        return out, lse.masked_fill(lse.isinf(), 0.0)

    # Gradients may be summed in any order (deterministic=False), so two runs differ by rounding.
    assert torch.autograd.gradcheck(attend, (q, k, v), nondet_tol=1e-12)


@pytest.mark.parametrize("names", gradcheck.SETS, ids="+".join)
def test_gradcheck_of_scores(names: tuple[str, ...]) -> None:
    gradcheck.gradcheck(names, "cuda")


def test_gradients_that_flow_back_with_any_strides() -> None:
    """What autograd hands to a backward may be expanded, transposed or not contiguous in its last axis."""
    case = replace(CASE, dtype="float32")
    q, k, v, _ = tensors(case)

    def gradients(weight: Any, reduce: Callable[[Any], Any]) -> Any:
        out = cuflash.attention(q, k, v, is_causal=True, deterministic=True)
        wanted = torch.autograd.grad(out, (q, k, v), weight.expand_as(out).contiguous(), retain_graph=True)
        found = torch.autograd.grad(reduce(out), (q, k, v))
        return zip(found, wanted, strict=True)

    one = torch.ones((), device="cuda")
    for found, wanted in gradients(one, lambda out: out.sum()):
        assert same_bits(found, wanted)
    row = torch.randn(case.seqlen_q, 1, device="cuda")
    for found, wanted in gradients(row, lambda out: (out.transpose(-1, -2) @ row).sum()):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def start_spinning() -> None:
    """Keep the current stream busy for a tenth of a second or more."""
    torch.cuda._sleep(300_000_000)


@pytest.fixture
def stream() -> Iterator[Any]:
    """A current stream that does not wait for the default one; what the tests call is loaded and warm on it."""
    with torch.cuda.stream(torch.cuda.Stream()):
        current = torch.cuda.current_stream()
        q, k, v, d_out = tensors(CASE)
        cuflash.attention(q, k, v, is_causal=True, deterministic=True).backward(d_out)
        start_spinning()
        current.synchronize()
        yield current
        current.synchronize()


def test_current_stream_is_used_and_not_waited_for(stream: Any) -> None:
    later = [tensor.detach() for tensor in tensors(replace(CASE, seed=1))]
    q, k, v, d_out = (torch.zeros_like(tensor) for tensor in later)
    stream.synchronize()
    start_spinning()
    for tensor, values in zip((q, k, v, d_out), later, strict=True):
        tensor.copy_(values)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = cuflash.attention(q, k, v, is_causal=True, deterministic=True)
        out.backward(d_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not stream.query(), "the host waited for the GPU"
    stream.synchronize()
    again = [tensor.clone().requires_grad_() for tensor in later[:3]]
    wanted = cuflash.attention(*again, is_causal=True, deterministic=True)
    wanted.backward(later[3])
    assert same_bits(out, wanted)
    for tensor, other in zip((q, k, v), again, strict=True):
        assert same_bits(tensor.grad, other.grad)


def test_the_current_stream_of_cupy_does_not_count(stream: Any) -> None:
    q, k, v, _ = tensors(CASE)
    start_spinning()
    with cupy.cuda.Stream(non_blocking=True) as other:
        cuflash.attention(q, k, v, is_causal=True)
        assert other.done
    assert not stream.query()


def test_threads_with_streams_of_their_own() -> None:
    case = replace(CASE, seqlen_q=400, seqlen_k=400)
    wanted: dict[int, list[Any]] = {}
    found: dict[int, list[Any]] = {}

    def work(seed: int, results: dict[int, list[Any]]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                q, k, v, d_out = tensors(replace(case, seed=seed))
                out = cuflash.attention(q, k, v, is_causal=True, deterministic=True)
                out.backward(d_out)
            results[seed] = [out, q.grad, k.grad, v.grad]
            torch.cuda.current_stream().synchronize()

    for seed in range(4):
        work(seed, wanted)
    threads = [threading.Thread(target=work, args=(seed, found)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, tensors_ in wanted.items():
        for tensor, other in zip(tensors_, found[seed], strict=True):
            assert same_bits(tensor, other)


def test_forward_and_backward_can_be_captured_into_a_graph() -> None:
    q, k, v, d_out = tensors(CASE)

    def step() -> tuple[Any, ...]:
        out, lse = cuflash.attention(q, k, v, is_causal=True, deterministic=True, return_lse=True)
        return out, lse, *torch.autograd.grad(out, (q, k, v), d_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor, values in zip((q, k, v, d_out), tensors(replace(CASE, seed=1)), strict=True):
            tensor.copy_(values)
    graph.replay()
    torch.cuda.synchronize()
    for tensor, wanted in zip(captured, step(), strict=True):
        assert same_bits(tensor, wanted)


def test_seed_on_the_device_is_the_seed() -> None:
    q, k, v, d_out = tensors(CASE)
    number = 3**39
    results = []
    for seed in (number, torch.tensor(number, device="cuda"), torch.tensor([number], device="cuda").to(torch.uint64)):
        out = cuflash.attention(q, k, v, dropout_p=0.3, seed=seed, deterministic=True)
        results.append((out, *torch.autograd.grad(out, (q, k, v), d_out)))
    for result in results[1:]:
        assert all(same_bits(x, wanted) for x, wanted in zip(result, results[0], strict=True))


def test_seeds_are_those_of_the_generator() -> None:
    q, k, v, _ = (x.detach() for x in tensors(CASE))
    torch.manual_seed(5)
    first, second = (cuflash.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not same_bits(first, second)
    torch.manual_seed(5)
    assert same_bits(cuflash.attention(q, k, v, dropout_p=0.5), first)


def test_changing_the_seed_before_the_backward_pass_raises() -> None:
    q, k, v, d_out = tensors(CASE)
    seed = torch.tensor(1, device="cuda")
    out = cuflash.attention(q, k, v, dropout_p=0.5, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(d_out)


def test_every_replay_of_a_graph_drops_other_weights() -> None:
    """And its backward pass those that its forward pass has dropped: d_v sums up to what out does."""
    q, k, v, _ = tensors(replace(CASE, dtype="float32"))

    def step() -> tuple[Any, Any]:
        out = cuflash.attention(q, k, v, dropout_p=0.5)
        # With d_out = 1, the sum of v * d_v is that of out: both are sums of the same weights times v.
        (d_v,) = torch.autograd.grad(out, v, torch.ones_like(out))
        return out, (d_v * v).sum()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, total = step()
    found = []
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(total, out.sum(), rtol=1e-3, atol=1e-2)
        found.append(out.clone())
    assert not any(same_bits(found[i], found[j]) for i in range(3) for j in range(i))


def test_forward_takes_no_memory_beyond_its_results() -> None:
    """No scores, no workspace: 4 MiB of output and 128 KiB of LSE for 16384 queries, whose scores would be 1 GiB."""
    q, k, v = (torch.randn(1, 2, 16384, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    cuflash.attention(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = cuflash.attention(q, k, v, return_lse=True)
    results = out.numel() * 2 + lse.numel() * 4
    assert torch.cuda.max_memory_allocated() - before <= results + 4096


def test_backward_takes_memory_linear_in_the_lengths() -> None:
    def peak(seqlen: int) -> int:
        q, k, v = (torch.randn(1, 2, seqlen, 64, dtype=torch.float16, device="cuda", requires_grad=True) for _ in "qkv")
        out = cuflash.attention(q, k, v)
        d_out = torch.randn_like(out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.backward(d_out)
        return torch.cuda.max_memory_allocated() - before

    peak(256)
    assert peak(16384) < 4.5 * peak(4096)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one() -> None:
    q, k, v, d_out = (tensor.detach() for tensor in tensors(CASE))
    there = [tensor.to("cuda:1").requires_grad_() for tensor in (q, k, v)]
    assert torch.cuda.current_device() == 0
    out = cuflash.attention(*there, is_causal=True)
    out.backward(d_out.to("cuda:1"))
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert same_bits(out.cpu(), cuflash.attention(q, k, v, is_causal=True).cpu())
