"""Report: kept results as Markdown tables, ratios and plots, and the performance block of the top-level README.

Everything here is computed from the JSON files, so that no figure on a page can be older or newer
than the run it came from.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .context import FA4, device_name, slug
from .rows import Results, Row, load_all
from .shapes import Workload

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"

#: The contestant that ratios are about. Peers are all those whose name does not begin with it.
OURS = "cuflash"
BEST = "best peer"

TITLES = {
    "forward": "Forward, TFLOP/s (4 FLOPs per visible pair, head and unit of head_dim)",
    "backward": "Backward, TFLOP/s (10 FLOPs per visible pair, head and unit of head_dim)",
    "options": "Options: what is done to scores and weights",
    "step": "Training step of a transformer block",
    "host": "Host time of a small call",
    "compile": "First call in a process, imports done",
    "memory": "Memory beyond inputs and outputs",
    "cpu": "CPU, two threads",
}

#: Suites that are written as rates; the others are written as what they measure.
RATES = ("forward", "backward")


# --- numbers --------------------------------------------------------------------------------------


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def by_case(rows: Iterable[Row]) -> dict[tuple[str, Workload], dict[str, Row]]:
    """Rows by measure and workload, then by contestant, in order of appearance."""
    cases: dict[tuple[str, Workload], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.measure, row.workload), {})[row.provider] = row
    return cases


def speedup(case: dict[str, Row], peer: str) -> float | None:
    """Time of ``peer`` over ours (above 1: ours is faster), or None where one of them was not timed, or bytes were.

    ``BEST`` stands for whichever peer is fastest on this workload.
    """
    times = {name: row.median for name, row in case.items() if row.median is not None and row.unit != "MiB"}
    peers = [time for name, time in times.items() if _is_peer(name) and peer in (name, BEST)]
    return min(peers) / times[OURS] if peers and OURS in times else None


def _ratios(cases: Iterable[dict[str, Row]], peer: str) -> list[float]:
    return [ratio for case in cases if (ratio := speedup(case, peer)) is not None]


def _is_peer(provider: str) -> bool:
    return not provider.startswith(OURS)


def _providers(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.provider for row in rows))


# --- Markdown -------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown table."""
    body = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in body)


def significant(value: float) -> str:
    """At least three significant digits, never an exponent."""
    digits = max(2 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:.{digits}f}"


def cell(row: Row | None) -> str:
    """A row in one cell: its rate or its median with the unit; ``-`` where it does not serve the workload."""
    if row is None or row.status == "skipped":
        return "-"
    if row.is_bad or row.median is None:
        return f"**{row.status}**"
    if row.suite in RATES and row.tflops is not None:
        return significant(row.tflops)
    return f"{significant(row.median)} {row.unit.replace('us', 'µs')}"


def comparison_table(rows: Sequence[Row]) -> str:
    """Measures and workloads down, contestants across, and the speed-up over the best peer where time is measured."""
    names = _providers(rows)
    timed = any(map(_is_peer, names)) and any(row.unit != "MiB" for row in rows)
    lines = []
    for (measure, workload), case in by_case(rows).items():
        line = [measure, str(workload), *(cell(case.get(name)) for name in names)]
        if timed:
            ratio = speedup(case, BEST)
            line.append("-" if ratio is None else f"{ratio:.2f}")
        lines.append(line)
    return table(["measure", "workload", *names, *([f"over {BEST}"] if timed else [])], lines)


def ratio_table(runs: Iterable[Results]) -> str:
    """Speed-up over each peer, per measure and dtype: geometric mean and extremes over the shapes; empty without."""
    lines = []
    for run in runs:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in run.rows:
            groups.setdefault((row.measure, row.dtype), []).append(row)
        for (measure, dtype), rows in groups.items():
            cases = by_case(rows).values()
            ratios = {peer: _ratios(cases, peer) for peer in _providers(rows) if _is_peer(peer)}
            ratios = {peer: values for peer, values in ratios.items() if values}
            if len(ratios) > 1:
                ratios = {BEST: _ratios(cases, BEST), **ratios}
            for peer, values in ratios.items():
                extremes = f"{min(values):.2f} to {max(values):.2f}"
                lines.append([measure, dtype, peer, str(len(values)), f"{geometric_mean(values):.2f}", extremes])
    return table(["measure", "dtype", "against", "shapes", "speed-up", "from, to"], lines) if lines else ""


def context_line(run: Results) -> str:
    """Where and with what a run was made, in one line."""
    facts = run.context
    labels = {"numpy": "NumPy"}
    if run.suite != "cpu":
        labels = {"driver": "driver", "cuda": "CUDA", "nvrtc": "NVRTC", "cudnn": "cuDNN", "cupy": "CuPy"}
        labels[FA4] = "FlashAttention-4"
    labels["torch"] = "PyTorch"
    parts = [device_name(run.suite, facts)]
    parts += [f"{label} {facts[name]}" for name, label in labels.items() if facts.get(name)]
    parts.append(f"commit {facts.get('commit') or 'unknown'}")
    if run.options.get("kernel", "auto") != "auto":
        parts.append(f"kernel family {run.options['kernel']} only")
    if run.options.get("quick"):
        parts.append("quick run")
    return f"{', '.join(parts)}; {facts['date'].split()[0]}."


def suite_section(run: Results) -> str:
    """Everything about one run: context, all rows, ratios, and why anybody is missing."""
    missing = sorted({f"* {row.provider}: {row.status}, {row.note}" for row in run.rows if row.status != "ok"})
    ratios = ratio_table([run]) if run.suite != "host" else ""
    parts = [f"### {TITLES.get(run.suite, run.suite)}", context_line(run), comparison_table(run.rows), ratios]
    return "\n\n".join(part for part in [*parts, "\n".join(missing)] if part)


def full_report(runs: Sequence[Results], plots: dict[str, Path]) -> str:
    """The page beside the results: every row of every run."""
    parts = [
        "# Results",
        "Generated by `python -m bench report`; what is measured, and how: [bench/README.md](../README.md).",
        "Speed-ups are the time of the peer over that of cuflash on the same tensors in the same run.",
    ]
    for device, group in by_device(runs).items():
        parts.append(f"## {device}")
        if device in plots:
            parts.append(f"![Rates on {device}]({plots[device].name})")
        parts += [suite_section(run) for run in group]
    return "\n\n".join(parts) + "\n"


def summary(runs: Sequence[Results], plots: dict[str, str], details: str) -> str:
    """The block of the top-level README: ratios, the plot, and the suites that are a few lines long.

    ``plots`` and ``details`` are paths relative to that page.
    """
    if not runs:
        return "No results yet."
    parts = []
    for device, group in by_device(runs).items():
        parts.append(f"### {device}")
        parts.append("\n".join(dict.fromkeys(context_line(run) for run in group)))
        if device in plots:
            parts.append(f"![Rates on {device}]({plots[device]})")
        parts.append(ratio_table(run for run in group if run.suite != "host"))
        for run in group:
            if run.suite in ("host", "compile", "memory", "cpu"):
                parts += [f"{TITLES[run.suite]}:", comparison_table(run.rows)]
    parts.append(
        "Speed-up: the time of the peer over that of cuflash, same tensors, same process, interleaved; geometric mean "
        f"over the shapes. Every row: [{details}]({details}); spreads and versions are in the files beside it."
    )
    return "\n\n".join(part for part in parts if part)


def by_device(runs: Iterable[Results]) -> dict[str, list[Results]]:
    """Runs by what they ran on, suites in the order of ``TITLES``."""
    order = {suite: position for position, suite in enumerate(TITLES)}
    devices: dict[str, list[Results]] = {}
    for run in sorted(runs, key=lambda run: order.get(run.suite, len(order))):
        devices.setdefault(device_name(run.suite, run.context), []).append(run)
    return devices


def fill(page: str, block: str) -> str:
    """``page`` with ``block`` between its performance marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


# --- plots ----------------------------------------------------------------------------------------


def plot(runs: Sequence[Results], path: Path) -> bool:
    """Bars of TFLOP/s over seqlen: a column of panels per head_dim, a row per measure and mask. False without rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    halves = ("float16", "bfloat16")
    rows = [row for run in runs if run.suite in RATES for row in run.rows if row.tflops and row.dtype in halves]
    if not rows:
        return False
    panels = list(dict.fromkeys((row.measure, row.is_causal) for row in rows))
    head_dims = sorted({row.head_dim for row in rows})
    names = sorted(_providers(rows), key=_is_peer)
    size = (1 + 3.6 * len(head_dims), 2.4 * len(panels))
    figure, axes = pyplot.subplots(len(panels), len(head_dims), figsize=size, squeeze=False, sharey="row")
    for (measure, is_causal), line in zip(panels, axes, strict=True):
        for head_dim, axis in zip(head_dims, line, strict=True):
            shown = [r for r in rows if (r.measure, r.is_causal, r.head_dim) == (measure, is_causal, head_dim)]
            lengths = sorted({row.seqlen_q for row in shown})
            for number, name in enumerate(names):
                rates = {row.seqlen_q: row.tflops for row in shown if row.provider == name}
                places = [place + 0.8 * (number + 0.5) / len(names) - 0.4 for place in range(len(lengths))]
                heights = [rates.get(seqlen) or 0.0 for seqlen in lengths]
                axis.bar(places, heights, 0.8 / len(names), label=name, color=f"C{number}", zorder=2)
            axis.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
            axis.set_title(f"{measure}, {'causal' if is_causal else 'full'}, head_dim {head_dim}", fontsize=9)
            axis.grid(axis="y", alpha=0.3, zorder=0)
        line[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("seqlen")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and version that matplotlib would add, equal results are equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return True


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path, readme: Path) -> int:
    """Write the page and the plots beside the results, and the block of ``readme``; 1 where there are no results."""
    runs = load_all(folder)
    if not runs:
        print(f"no results below {folder}", file=sys.stderr)
        return 1
    plots: dict[str, Path] = {}
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
    else:
        for device, group in by_device(runs).items():
            path = folder / f"{slug(device)}.png"
            if plot(group, path):
                plots[device] = path
    details = folder / "README.md"
    details.write_text(full_report(runs, plots), encoding="utf-8")
    relative = {device: _relative(path, readme) for device, path in plots.items()}
    page = readme.read_text(encoding="utf-8")
    readme.write_text(fill(page, summary(runs, relative, _relative(details, readme))), encoding="utf-8")
    print(f"wrote {details}, {len(plots)} plots and the block of {readme}")
    return 0


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()
