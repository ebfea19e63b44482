"""Test set-up: GPU detection, markers, hypothesis profiles, parallel compilation, and the GPU record."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import gpu_record

_GPU_TESTS = Path(__file__).parent / "gpu"

# Compiling, and a first call on a busy machine, take longer than any deadline that would find something.
hypothesis.settings.register_profile("dev", max_examples=60, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("gpu", max_examples=300, deadline=None, print_blob=True)


def _has_gpu() -> bool:
    try:
        import cupy
    except Exception:  # a broken CuPy raises more than ImportError, and is no GPU to test on either
        return False
    try:
        return cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


HAS_GPU = _has_gpu()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few-kernels", action="store_true", help="compile a selection of the kernels, in two minutes")
    parser.addoption("--portable", action="store_true", help="plan as if the Hopper kernels did not exist")
    parser.addoption(
        "--gpu-record", action="store_true", help="write tests/gpu_record.json after a full, green run of tests/gpu"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", None):
        hypothesis.settings.load_profile("gpu" if HAS_GPU else "ci" if os.environ.get("CI") else "dev")
    if config.getoption("--portable"):
        if config.getoption("--gpu-record"):
            raise pytest.UsageError("--gpu-record is for all kernels, and --portable leaves some out")
        from cuflash import configs

        configs.has_wgmma = lambda mma, arch: False
    if config.getoption("--gpu-record"):
        config.pluginmanager.register(_Recorder(), "gpu-recorder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not HAS_GPU:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU, or no CuPy"))


@pytest.fixture(scope="session", autouse=True)
def _compile_in_parallel(request: pytest.FixtureRequest) -> None:
    """Compile what the collected cases need before the first test, in parallel.

    Tests run one after the other, and so would their compilations. A handful of tests, as when one is debugged,
    is left alone: then nothing runs but the test. Of several processes (pytest-xdist) each compiles a part, for all.
    """
    if HAS_GPU:
        from tests.gpu import harness

        cases = {
            argument
            for item in request.session.items
            if isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.get_closest_marker("gpu")
            for argument in item.callspec.params.values()
            if isinstance(argument, harness.Case | harness.ScoreFamily)
        }
        if len(cases) > 20:
            worker, num_workers = _worker(request.config)
            with ThreadPoolExecutor() as pool:
                list(pool.map(harness.warm, sorted(cases, key=str)[worker::num_workers]))


def _worker(config: pytest.Config) -> tuple[int, int]:
    """Number of this process among those of pytest-xdist, and how many there are."""
    given = getattr(config, "workerinput", None)
    return (0, 1) if given is None else (int(given["workerid"].removeprefix("gw")), given["workercount"])


class _Recorder:
    """Counts the GPU tests of a session, and writes the record if all of them ran and none failed.

    With pytest-xdist the tests run in workers, and the process that gets all their reports writes the record.
    """

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.files: set[Path] = set()
        self.deselected = 0
        self.start = time.monotonic()

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += sum(item.get_closest_marker("gpu") is not None for item in items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "gpu" not in report.keywords:
            return
        self.files.add(gpu_record.ROOT / report.location[0])
        if report.failed or report.skipped or report.when == "call":
            self.counts[report.outcome] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.deselected = max(self.deselected, getattr(node, "workeroutput", {}).get("gpu_deselected", 0))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["gpu_deselected"] = self.deselected
            return
        self.missing = set(_GPU_TESTS.glob("test_*.py")) - self.files
        self.written = (
            HAS_GPU and exitstatus == pytest.ExitCode.OK and self.counts["passed"] > 0
            and not self.counts["failed"] and not self.deselected and not self.missing
        )  # fmt: skip
        if self.written:
            gpu_record.write(self.counts, time.monotonic() - self.start)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.written:
            terminalreporter.write_line(f"wrote {gpu_record.RECORD}")
        else:
            terminalreporter.write_line(
                f"GPU record not written: wanted a green run of all of tests/gpu on a GPU, got {self.counts}, "
                f"{self.deselected} deselected, {len(self.missing)} files that did not run"
            )
