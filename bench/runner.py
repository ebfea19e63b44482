"""One workload, many contestants: skip who cannot, check everybody's answer, time who is right."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from .check import Inputs, Reference
from .providers import OURS, Provider
from .rows import Row, print_rows
from .shapes import Workload
from .timing import Call, Spread

#: Rounds of a full and of a quick run.
ROUNDS, QUICK_ROUNDS = 25, 8


@dataclass(frozen=True, slots=True)
class Options:
    """What a run was asked for; whatever is empty or None is the suite's own choice."""

    quick: bool = False
    dims: tuple[int, ...] = ()
    lens: tuple[int, ...] = ()
    dtype: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    rounds: int | None = None

    def num_rounds(self, full: int = ROUNDS, quick: int = QUICK_ROUNDS) -> int:
        """Rounds to run: those asked for, or the suite's."""
        return self.rounds or (quick if self.quick else full)


#: Median and percentiles of every call, over so many rounds.
Timer = Callable[[Mapping[str, Call], int], dict[str, Spread]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A contestant on one workload: ``prepare`` does the work of the first time and returns what is timed."""

    name: str
    prepare: Callable[[], Call]
    unsupported: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured, and the unit that it is written in."""

    suite: str
    measure: str
    workload: Workload
    unit: str

    def row(self, name: str) -> Row:
        """Row of the contestant ``name``, still without a measurement."""
        return Row.of(self.suite, self.measure, name, self.workload)


def run_case(
    case: Case,
    candidates: Iterable[Candidate],
    check: Callable[[str, Call], float],
    timer: Timer,
    rounds: int,
) -> list[Row]:
    """Rows of all candidates, in their order.

    ``check`` runs the call of a name and returns its error as a fraction of what is allowed. Who is wrong gets a
    row that says so, and no time.
    """
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for candidate in candidates:
        row = case.row(candidate.name)
        if candidate.unsupported is not None:
            rows[row.provider] = replace(row, status="skipped", note=candidate.unsupported)
            continue
        try:
            call = candidate.prepare()
            error = check(candidate.name, call)
        except Exception as exception:
            status, note = classify(candidate.name, exception)
            rows[row.provider] = replace(row, status=status, note=note)
            continue
        rows[row.provider] = row.checked(error)
        if not rows[row.provider].is_bad:
            calls[row.provider] = call
    for name, spread in timer(calls, rounds).items():
        rows[name] = rows[name].measured(spread, case.unit)
    print_rows(rows.values())
    return list(rows.values())


def run_providers(
    suite: str,
    measures: Iterable[str],
    workload: Workload,
    providers: Iterable[Provider],
    timer: Timer,
    rounds: int,
    *,
    unit: str = "ms",
    device: str = "cuda",
) -> list[Row]:
    """Rows of GPU contestants on fresh operands, one reference for all measures."""
    providers = list(providers)
    inputs = Inputs.random(workload, device)
    reference = Reference(workload, inputs)
    rows = []
    for measure in measures:

        def check(_: str, call: Call, measure: str = measure) -> float:
            inputs.poison()
            return reference.error(measure, call())

        candidates = [
            Candidate(
                provider.name,
                functools.partial(provider.call, measure, workload, inputs),
                provider.unsupported(workload),
            )
            for provider in providers
        ]
        rows += run_case(Case(suite, measure, workload, unit), candidates, check, timer, rounds)
    return rows


def classify(name: str, exception: Exception) -> tuple[str, str]:
    """Status and note of a contestant that raised.

    A peer that declines a workload, or runs out of memory, is skipped; anything else is a failure,
    and anything that cuflash raises is one.
    """
    note = (str(exception).strip().splitlines() or [""])[0][:200]
    if not name.startswith(OURS):
        if isinstance(exception, torch.OutOfMemoryError):
            return "skipped", "out of memory"
        if "No available kernel" in str(exception):
            return "skipped", f"PyTorch: {note}"
    traceback.print_exception(exception, file=sys.stderr)
    return "failed", f"{type(exception).__name__}: {note}"
