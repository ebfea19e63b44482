"""Rows: what one measurement of one contestant came to, and the files that keep them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .shapes import Workload
from .timing import Spread

#: Factor from the base unit (seconds, bytes) to the unit that a row is written in.
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "MiB": 2.0**-20}


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant on one workload.

    ``status`` is ``ok``, ``skipped`` (the contestant does not serve this workload), ``wrong`` (its
    answer is not within the tolerance, and it was not timed) or ``failed`` (it raised); ``note``
    says why. ``error`` is the largest error as a fraction of the allowed one.
    """

    suite: str
    measure: str
    provider: str
    dtype: str
    batch: int
    num_heads: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    is_causal: bool
    status: str = "ok"
    note: str = ""
    error: float | None = None
    unit: str = ""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    tflops: float | None = None

    @classmethod
    def of(cls, suite: str, measure: str, provider: str, workload: Workload, **values: Any) -> Row:
        """Row of a workload without a measurement; see ``measured``."""
        return cls(suite, measure, provider, **asdict(workload), **values)

    @property
    def is_bad(self) -> bool:
        """True where something is broken, and the run must not pass."""
        return self.status in ("wrong", "failed")

    @property
    def workload(self) -> Workload:
        """The shape of the row."""
        return Workload(**{field.name: getattr(self, field.name) for field in fields(Workload)})

    def checked(self, error: float) -> Row:
        """The row with the error of its answer, as a fraction of the allowed one; ``wrong`` above 1 and for NaN."""
        if error <= 1.0:
            return replace(self, error=error)
        return replace(self, status="wrong", error=error, note=f"error is {error:.3g} of what is allowed")

    def measured(self, spread: Spread, unit: str) -> Row:
        """The row with its measurement; TFLOP/s where the measure is made of FLOPs."""
        factor = UNITS[unit]
        flops = self.workload.flops(self.measure)
        return replace(
            self,
            unit=unit,
            median=spread.median * factor,
            p20=spread.p20 * factor,
            p80=spread.p80 * factor,
            tflops=flops / spread.median * 1e-12 if flops is not None else None,
        )

    def __str__(self) -> str:
        head = f"{self.suite:8} {self.workload!s:36} {self.measure:18} {self.provider:16}"
        if self.median is None or self.p20 is None or self.p80 is None:
            return f"{head} {self.status}: {self.note}"
        rate = f"{self.tflops:8.4g} TFLOP/s" if self.tflops is not None else ""
        error = f"error {self.error:4.2f} of allowed" if self.error is not None else ""
        return f"{head} {self.median:9.3f} {self.unit} ({self.p20:.3f} to {self.p80:.3f}) {rate} {error}".rstrip()


@dataclass(frozen=True, slots=True)
class Results:
    """One run of one suite: where it ran, how it was asked for, and its rows."""

    suite: str
    context: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row]

    def save(self, folder: Path) -> Path:
        """Write ``<suite>.json`` (everything) and ``<suite>.csv`` (the rows) into ``folder``; return the JSON path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.suite}.json"
        rounded = [{key: _rounded(value) for key, value in asdict(row).items()} for row in self.rows]
        content = {"suite": self.suite, "context": self.context, "options": self.options, "rows": rounded}
        path.write_text(json.dumps(content, indent=1) + "\n")
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rounded)
        return path

    @classmethod
    def load(cls, path: Path) -> Results:
        """The run that ``save`` wrote to ``path``."""
        content = json.loads(path.read_text())
        rows = [Row(**row) for row in content["rows"]]
        return cls(content["suite"], content["context"], content["options"], rows)


def load_all(folder: Path) -> list[Results]:
    """Every run below ``folder``, in the order of their paths."""
    return [Results.load(path) for path in sorted(folder.glob("**/*.json"))]


def print_rows(rows: Iterable[Row]) -> None:
    """Print rows as they come, so that a long run shows how far it is."""
    for row in rows:
        print(row, flush=True)


def _rounded(value: Any) -> Any:
    """Floats with five significant digits: more would only be noise in a diff."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
