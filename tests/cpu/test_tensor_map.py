"""Descriptors without a driver: what it is asked for, and what is kept of its answers."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cuflash import launch, plan, tensor_map
from cuflash.problem import Features, Problem
from cuflash.scores import Band
from cuflash.tensor_map import TensorMap, TensorMaps


class Driver:
    """Stands for cuTensorMapEncodeTiled: writes the address into the descriptor, and remembers what was asked."""

    def __init__(self, error: int = 0) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.error = error

    def __call__(self, target: Any, dtype: Any, rank: Any, address: Any, *arrays: Any) -> int:
        assert target.value % 64 == 0
        lengths, strides, box, steps, *flags = arrays
        asked = map(list, (lengths, strides, box, steps))
        self.asked.append((dtype.value, rank.value, *asked, [flag.value for flag in flags]))
        ctypes.memset(target.value, 0, 128)
        ctypes.c_uint64.from_address(target.value).value = address.value or 0
        return self.error


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(tensor_map, "_encode_function", lambda: fake)
    return fake


def address_in(descriptor: bytes) -> int:
    return int.from_bytes(descriptor[:8], "little")


def test_what_the_driver_is_asked(driver: Driver) -> None:
    descriptor = TensorMap("bfloat16", (40, 0, 3), (80, 8000), (64, 128, 1)).encode(4096)
    assert len(descriptor) == 128
    assert address_in(descriptor) == 4096
    # bfloat16, rank, lengths (none of them 0), strides, box, steps; no interleaving, 128-byte swizzle, 256 B, zeros
    assert driver.asked == [(9, 3, [40, 1, 3], [80, 8000], [64, 128, 1], [1, 1, 1], [0, 3, 3, 0])]


def test_a_refusal_says_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_map, "_encode_function", lambda: Driver(error=1))
    with pytest.raises(RuntimeError, match=r"CUresult 1: float16, lengths \(8, 2\), strides \(17,\) B.*address 3"):
        TensorMap("float16", (8, 2), (17,), (64, 2)).encode(3)


def test_addresses_that_come_again_are_not_encoded_again(driver: Driver) -> None:
    maps = TensorMaps([TensorMap("float16", (64, 8), (128,), (64, 8)) for _ in range(2)])
    assert maps.count == 2

    def addresses(pointers: tuple[int, ...]) -> Sequence[int]:
        encoded = maps(pointers)
        return [address_in(encoded[at : at + 128]) for at in (0, 128)]

    for _ in range(3):
        assert addresses((16, 32)) == [16, 32]
        assert addresses((32, 16)) == [32, 16]
    assert len(driver.asked) == 4
    for number in range(1000):
        assert addresses((16 * number, 0)) == [16 * number, 0]
    assert len(maps._encoded) <= 64


def test_packed_queries_are_an_axis_of_their_own(driver: Driver) -> None:
    """Rows of a tile are (query, head): the box takes all heads that share keys before the next query."""
    p = Problem("float16", 2, 12, 3, 5, 700, 64, 64, 0.1, Band())
    chosen = plan.plan_forward(p, plan.DeviceInfo.of_arch(90))
    assert chosen.order is not None
    assert chosen.order.pack == 4
    q, k, v = (5 * 12 * 64, 64, 12 * 64), (700 * 3 * 64, 700 * 64, 64), (700 * 3 * 64, 64, 3 * 64)
    launch._forward_maps(p, chosen.config, chosen.order.pack, None, q, k, v)((0, 0, 0))
    rows = chosen.config.block_m // 4
    (_, _, *q_map), (_, _, *k_map), (_, _, *v_map) = (asked[:5] for asked in driver.asked)
    assert q_map == [[64, 4, 5, 3, 2], [128, 12 * 128, 4 * 128, 5 * 12 * 128], [64, 4, rows, 1, 1]]
    assert k_map == [[64, 700, 3, 2], [128, 700 * 128, 700 * 3 * 128], [64, chosen.config.block_n, 1, 1]]
    assert v_map == [[64, 700, 3, 2], [3 * 128, 128, 700 * 3 * 128], [64, chosen.config.block_n, 1, 1]]


@pytest.mark.parametrize(("heads", "batch"), [(True, True), (False, True), (True, False)])
def test_axes_along_which_a_bias_is_broadcast_have_one_entry(driver: Driver, heads: bool, batch: bool) -> None:
    features = Features(bias="bfloat16", bias_tiles=True)
    p = Problem("float16", 2, 4, 4, 300, 700, 64, 64, 0.1, features=features)
    chosen = plan.plan_forward(p, plan.DeviceInfo.of_arch(90))
    operand = (4 * 700 * 64, 700 * 64, 64)
    bias = (900 * 704 if batch else 0, 300 * 704 if heads else 0, 704, 1)
    maps = launch._forward_maps(p, chosen.config, 1, bias, *[operand] * 3)
    assert maps.count == 4
    maps((0, 0, 0, 0))
    dtype, _, *asked = driver.asked[3][:5]
    assert dtype == 9
    strides = [1408, 2 * bias[1], 2 * bias[0]]
    assert asked == [[700, 300, 4 if heads else 1, 2 if batch else 1], strides, [64, chosen.config.block_m, 1, 1]]


def test_threads_that_share_a_map_get_their_own_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver runs without the interpreter's lock: what one thread asks for must not end up with another."""
    both_wrote = threading.Barrier(2)

    class Slow(Driver):
        def __call__(self, *arguments: Any) -> int:
            error = super().__call__(*arguments)
            both_wrote.wait(timeout=10)
            return error

    fake = Slow()
    monkeypatch.setattr(tensor_map, "_encode_function", lambda: fake)
    shared = TensorMap("float16", (64, 8), (128,), (64, 8))
    with ThreadPoolExecutor(2) as pool:
        assert [address_in(found) for found in pool.map(shared.encode, (16, 32))] == [16, 32]
