"""The command line, run as a user runs it or, where it is slow to start, by its main()."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

import cuflash
from cuflash import environment
from cuflash.__main__ import main
from cuflash.demo import format_bytes, format_seconds, format_table

TINY = ["demo", "--device", "cpu", "--heads", "2", "--seqlen", "48", "--head-dim", "16", "--repeats", "1"]

needs_nvrtc = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy for its NVRTC")


@pytest.mark.parametrize("extra", [[], ["--causal"], ["--dtype", "float64", "--batch", "2"]])
def test_demo_compares_both_ways_on_the_cpu(capsys, extra):
    assert main([*TINY, *extra]) == 0
    output, progress = capsys.readouterr()
    for word in ("standard", "cuflash", "forward + backward", "speed-up", "peak memory", "largest difference"):
        assert word in output
    assert "4/4" in progress
    differences = [float(text) for text in re.findall(r"\d\.\de[-+]\d+", output)]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def test_demo_needs_nothing_but_numpy():
    """Every optional package is made unimportable; what is left is a bare install."""
    program = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('cupy', 'torch', 'jax', 'ml_dtypes', 'matplotlib', 'rich')))\n"
        f"sys.argv[1:] = {[argument for argument in TINY if argument not in ('--device', 'cpu')]!r}\n"
        "runpy.run_module('cuflash', run_name='__main__')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "NumPy" in finished.stdout


def test_demo_draws(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "demo.png"
    assert main([*TINY, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out


def test_demo_says_what_a_plot_needs(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*TINY, "--plot", str(tmp_path / "demo.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--framework", "torch", "--device", "cpu"], ["--seqlen", "0"], ["--heads", "x"]]
)
def test_demo_refuses_what_it_cannot_do(capsys, arguments):
    try:
        status = main(["demo", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert capsys.readouterr().err


def test_info_runs_as_a_module():
    finished = subprocess.run(
        [sys.executable, "-m", "cuflash", "info"], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert finished.returncode == 0, finished.stderr
    for word in (f"cuflash    {cuflash.__version__}", "numpy", "cupy", "torch", "kernels", "cache", "bfloat16"):
        assert word in finished.stdout


def test_info_shows_what_is_set(capsys, monkeypatch):
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "1")
    assert main(["info"]) == 0
    assert "CUFLASH_NUM_THREADS=1" in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_plan_prints_without_a_gpu(capsys, arch):
    arguments = ["--q", "2,16,4096,128", "--k", "2,4,1000,128", "--causal", "--window", "256,none", "--backward"]
    assert main(["plan", *arguments, "--arch", arch]) == 0
    output = capsys.readouterr().out
    assert "num_heads_kv=4" in output
    assert "forward" in output
    assert "backward" in output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--q", "2,16,4096"], "four numbers"),
        (["--q", "2,16,64,128", "--k", "2,3,64,128"], "disagree"),
        (["--q", "2,16,64,128", "--window", "5"], "LEFT,RIGHT"),
        (["--q", "2,16,64,128", "--arch", "hopper"], "sm_75"),
        (["--q", "2,16,64,128", "--arch", "sm_70"], "sm_75"),
        (["--q", "2,16,64,128", "--precision", "tf32"], "float32"),
        (["--q", "2,16,64,128", "--dtype", "int8"], "float16"),
    ],
)
def test_plan_explains_what_is_wrong(capsys, arguments, word):
    try:
        status = main(["plan", *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert word in capsys.readouterr().err


def test_compile_lists_configurations(capsys):
    assert main(["compile", "--arch", "sm_80"]) == 0
    names = capsys.readouterr().out.split()
    assert names
    assert len(set(names)) == len(names)


@needs_nvrtc
def test_compile_reports_registers(capsys):
    main(["compile", "--arch", "sm_80"])
    name = capsys.readouterr().out.split()[0]
    assert main(["compile", "--arch", "sm_80", "--match", name, "--jobs", "1"]) == 0
    assert re.search(rf"{name} +\d+ +\d+ +\d+\.\d\d", capsys.readouterr().out)


def test_compile_fails_where_a_kernel_does(capsys, monkeypatch):
    main(["compile", "--arch", "sm_80"])
    name = capsys.readouterr().out.split()[0]

    def broken(config, arch):
        raise RuntimeError("does not compile")

    class InThisProcess:
        """Stands in for the pool: a worker process would not see the broken compiler."""

        def __init__(self, *args, **kwargs): ...
        def __enter__(self):
            return self

        def __exit__(self, *args): ...

        def submit(self, function, *args):
            class Task:
                def result(self):
                    return function(*args)

            return Task()

    monkeypatch.setattr("cuflash.compile.compile_cubin", broken)
    monkeypatch.setattr("cuflash.__main__.ProcessPoolExecutor", InThisProcess)
    assert main(["compile", "--arch", "sm_80", "--match", name]) == 1
    assert "does not compile" in capsys.readouterr().err


def test_compile_knows_what_there_is(capsys):
    assert main(["compile", "--arch", "sm_80", "--match", "no such kernel"]) == 2
    assert "no such kernel" in capsys.readouterr().err


def test_bench_is_that_of_the_checkout():
    finished = subprocess.run(
        [sys.executable, "-m", "cuflash", "bench", "--help"], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert "forward" in finished.stdout


def test_bench_needs_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cuflash, "__file__", str(tmp_path / "cuflash" / "__init__.py"))
    assert main(["bench", "forward"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_tables_and_units_are_readable():
    assert format_table([["a", "time"], ["bcd", "5"]]) == "a    time\n---------\nbcd     5"
    assert [format_seconds(seconds) for seconds in (0.0001234, 0.0123, 0.234, 2.5)] == [
        "0.12 ms",
        "12.30 ms",
        "234 ms",
        "2.50 s",
    ]
    assert [format_bytes(count) for count in (12, 2048, 3 * 2**20, 2**30)] == [
        "12.0 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "1.0 GiB",
    ]


def test_plan_shows_what_the_environment_asks_for(monkeypatch, capsys):
    monkeypatch.setenv("CUFLASH_KERNEL", "simt")
    assert main(["plan", "--q", "2,16,4096,128", "--backward", "--arch", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert "attention_forward_simt" in out
    assert "attention_backward_simt" in out
    assert "_mma_" not in out


def test_environment_variables_are_read_when_used(monkeypatch):
    for variable in environment.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)
    assert not environment.print_plan()
    assert not environment.log()
    assert environment.kernel() == "auto"
    assert environment.dump() == frozenset()
    assert environment.num_threads() is None
    monkeypatch.setenv("CUFLASH_PRINT_PLAN", "1")
    monkeypatch.setenv("CUFLASH_LOG", "0")
    monkeypatch.setenv("CUFLASH_DUMP", "ptx, sass")
    monkeypatch.setenv("CUFLASH_NUM_THREADS", "3")
    assert environment.print_plan()
    assert not environment.log()
    assert environment.dump() == {"ptx", "sass"}
    assert environment.num_threads() == 3


@pytest.mark.parametrize(
    ("variable", "value", "read"),
    [
        ("CUFLASH_KERNEL", "fastest", environment.kernel),
        ("CUFLASH_DUMP", "ptx,elf", environment.dump),
        ("CUFLASH_NUM_THREADS", "-1", environment.num_threads),
        ("CUFLASH_NUM_THREADS", "many", environment.num_threads),
    ],
)
def test_environment_variables_are_checked(monkeypatch, variable, value, read):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable):
        read()
