"""Timing: every contestant once per round, for many rounds, so that a drifting clock hits all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and the 20th and 80th percentiles of repeated measurements (seconds, or bytes in the memory suite)."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Summary of ``samples``, of which there must be at least one."""
        p20, median, p80 = (float(value) for value in np.percentile(samples, (20, 50, 80)))
        return cls(median, p20, p80)


@dataclass(frozen=True, slots=True)
class Call:
    """What is timed: ``run`` takes nothing and returns the tensors it computed.

    ``context`` makes what must hold while it runs (which kernel PyTorch may choose, say); entering
    it is never part of the time.
    """

    run: Callable[[], tuple[Any, ...]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self) -> tuple[Any, ...]:
        with self.context():
            return self.run()


def shuffled_rounds(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Order of every round. A fixed order would let one contestant always run on the heat of the same other one."""
    shuffle = random.Random(0)
    return [shuffle.sample(list(names), len(names)) for _ in range(rounds)]


class CudaTimer:
    """Time on the GPU between two events around the call, with a cold L2 cache.

    Before every call a buffer sixteen times the size of the L2 is written. That evicts the operands,
    and it keeps the GPU busy while the host enqueues the call, so that the host's share of a call
    is not in the window (``host`` is the suite that measures it).
    """

    scrub_factor = 16
    warmup_seconds = 0.1

    def __init__(self) -> None:
        import torch

        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._torch = torch
        self._scrub = torch.empty(self.scrub_factor * l2_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, calls: Mapping[str, Call], rounds: int) -> dict[str, Spread]:
        """Seconds of each call."""
        if not calls:
            return {}
        started = time.perf_counter()
        while time.perf_counter() - started < self.warmup_seconds:  # clocks rise, allocators fill
            self._round(calls, list(calls))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for order in shuffled_rounds(list(calls), rounds):
            for name, seconds in self._round(calls, order).items():
                samples[name].append(seconds)
        return {name: Spread.of(values) for name, values in samples.items()}

    def _round(self, calls: Mapping[str, Call], order: Sequence[str]) -> dict[str, float]:
        windows = {}
        for name in order:
            call = calls[name]
            start, stop = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            with call.context():
                self._scrub.zero_()
                start.record()
                call.run()
                stop.record()
            windows[name] = (start, stop)
        self._torch.cuda.synchronize()
        return {name: start.elapsed_time(stop) * 1e-3 for name, (start, stop) in windows.items()}


@dataclass(frozen=True, slots=True)
class WallTimer:
    """Wall-clock time of one call, as the mean over ``repeats`` back-to-back calls.

    ``barrier`` runs before the clock starts and before it stops (a device synchronisation, where a
    GPU does the work); ``pause`` seconds pass before each, so that no contestant shares the cores
    with worker threads of the one before that still spin.
    """

    repeats: int = 1
    barrier: Callable[[], object] = lambda: None
    pause: float = 0.0

    def __call__(self, calls: Mapping[str, Call], rounds: int) -> dict[str, Spread]:
        """Seconds of each call; the first round warms up and is dropped."""
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for order in shuffled_rounds(list(calls), rounds + 1):
            for name in order:
                samples[name].append(self._sample(calls[name]))
        return {name: Spread.of(values[1:]) for name, values in samples.items()}

    def _sample(self, call: Call) -> float:
        run = call.run
        with call.context():
            time.sleep(self.pause)
            self.barrier()
            started = time.perf_counter()
            for _ in range(self.repeats):
                run()
            self.barrier()
            return (time.perf_counter() - started) / self.repeats
