"""``python -m bench <suite>``: measure, print, keep; ``python -m bench report``: tables and plots of what was kept."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Suite:
    """A module with ``run(options)`` and its ``Options``, and which of the options it understands.

    ``folder`` is where results are kept: all that is in ``results`` goes into the report.
    """

    module: str
    sentence: str
    options: tuple[str, ...]
    folder: str = "results"


#: The CPU suite gives everybody as many threads, by every name that a library knows.
CPU_THREADS = 2
THREAD_VARIABLES = ("CUFLASH_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

GRID = ("dims", "lens", "dtype", "providers", "rounds")

SUITES = {
    "forward": Suite("forward", "forward, TFLOP/s, for a grid of shapes", GRID),
    "backward": Suite("backward", "backward alone, TFLOP/s, for the same grid", GRID),
    "options": Suite(
        "options", "what is done to scores and weights, beside FlexAttention", ("dims", "lens", "dtype", "rounds")
    ),
    "step": Suite("step", "forward and backward of a transformer block", GRID),
    "host": Suite("host_overhead", "host time of a small call", ("providers", "rounds")),
    "compile": Suite("compile_time", "time to the first result, cold and warm cache", ("dims", "providers", "rounds")),
    "memory": Suite("memory", "bytes beyond inputs and outputs", ("dims", "lens", "dtype", "providers")),
    "cpu": Suite("cpu", "CPU path, two threads", ("dims", "lens", "providers", "rounds")),
    "tune": Suite(
        "tune", "tiles of the Hopper kernels beside cuDNN", ("dims", "lens", "rounds", "measure", "write"), "tuning"
    ),
}


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    known = ("float16", "bfloat16", "float32")
    unknown = [word for word in _words(text) if word not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(known)}")
    return _words(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line: one sub-command per suite, and ``report``."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of cuflash; see bench/README.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=suite.sentence, description=suite.sentence)
        command.add_argument("--quick", action="store_true", help="fewer shapes and rounds; kept only with --out")
        if "dims" in suite.options:
            command.add_argument("--dims", type=_numbers, default=(), help="head_dim, comma-separated")
        if "lens" in suite.options:
            command.add_argument("--lens", type=_numbers, default=(), help="seqlen, comma-separated")
        if "dtype" in suite.options:
            command.add_argument("--dtype", type=_dtypes, default=(), help="dtypes, comma-separated")
        if "providers" in suite.options:
            command.add_argument("--providers", type=_words, default=(), help="contestants, comma-separated")
        if "rounds" in suite.options:
            command.add_argument("--rounds", type=int, help="how often each contestant is measured")
        if "measure" in suite.options:
            measures = ("forward", "backward")
            command.add_argument("--measure", choices=measures, default=measures[0], help="what the tiles compute")
        if "write" in suite.options:
            command.add_argument("--write", action="store_true", help="put the winners into cuflash/configs.py")
        command.add_argument("--kernel", default="auto", help="kernel family that cuflash may choose (CUFLASH_KERNEL)")
        command.add_argument("--out", type=Path, help=f"folder of the results; default bench/{suite.folder}/<device>")
        command.add_argument("--commit", help="commit to record, for a copy of the tree without its .git")
    report = commands.add_parser("report", help="tables and plots from kept results")
    report.add_argument("--results", type=Path, default=FOLDER / "results", help="folder that holds them")
    report.add_argument("--readme", type=Path, default=FOLDER.parent / "README.md", help="page to fill in")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite or the report; 1 where an answer was wrong or a contestant failed."""
    asked = make_parser().parse_args(arguments)
    if asked.command == "report":
        from . import report

        return report.write(asked.results, asked.readme)
    threads = dict.fromkeys(THREAD_VARIABLES, str(CPU_THREADS))
    if asked.command == "cpu" and not threads.items() <= os.environ.items():
        # NumPy and PyTorch read these when they are first imported, which may already have happened here.
        command = [sys.executable, "-m", __package__, *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env=os.environ | threads, check=False).returncode
    return run_suite(asked)


def run_suite(asked: argparse.Namespace) -> int:
    """Measure, print and keep one suite."""
    suite = SUITES[asked.command]
    os.environ["CUFLASH_KERNEL"] = asked.kernel
    from . import context, rows

    chosen = {name: getattr(asked, name) for name in suite.options}
    found = context.collect(asked.commit)
    if suite.module != "cpu" and found["gpu"] is None:
        print(f"{asked.command}: needs a GPU that PyTorch can use", file=sys.stderr)
        return 2
    module = importlib.import_module(f".{suite.module}", __package__)
    measured = module.run(module.Options(quick=asked.quick, **chosen))
    # A suite of several measures, of which each run is about one, keeps a file for each.
    name = f"{asked.command}-{asked.measure}" if "measure" in suite.options else asked.command
    results = rows.Results(name, found, {"quick": asked.quick, "kernel": asked.kernel, **chosen}, measured)
    if asked.out is not None or not asked.quick:
        folder = asked.out or FOLDER / suite.folder / context.slug(context.device_name(asked.command, found))
        print(f"kept in {results.save(folder)}")
    bad = [row for row in measured if row.is_bad]
    for row in bad:
        print(f"{row.status}: {row}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
