"""What makes a new compiled kernel: an edited header and another shape of the code, but no run-time value."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cuflash import compile as compiler
from cuflash import configs
from cuflash.plan import DeviceInfo, plan_backward, plan_forward
from cuflash.problem import Problem
from cuflash.scores import Band

DEVICE = DeviceInfo.of_arch(90)
PROBLEM = Problem("float16", 2, 8, 2, 1000, 1500, 64, 64, 0.125, Band(None, 500))
ROOT = compiler.kernel_root()
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.cuh"))


def sources(problem: Problem, device: DeviceInfo = DEVICE) -> list[str]:
    """Texts of all kernels of a problem, forward and backward."""
    plans = (plan_forward(problem, device), *plan_backward(problem, device))
    return [compiler.source(plan.config) for plan in plans]


def copy_of_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the CUDA sources, in use from now on."""
    shutil.copytree(ROOT, folder)
    monkeypatch.setattr(compiler, "kernel_root", lambda: folder)
    return folder


def test_a_copy_has_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is made of names and contents, not of the place where a user happens to have installed them."""
    original = sources(PROBLEM)
    copy_of_kernels(tmp_path / "kernels", monkeypatch)
    assert sources(PROBLEM) == original


@pytest.mark.parametrize("header", HEADERS)
def test_an_edited_header_is_a_new_key(header: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sources(PROBLEM)
    with (copy_of_kernels(tmp_path / "kernels", monkeypatch) / header).open("a") as file:
        file.write("// edited\n")
    assert not set(sources(PROBLEM)) & set(original)


def test_a_new_or_renamed_header_is_a_new_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {compiler.header_hash()}
    (copy_of_kernels(tmp_path / "more", monkeypatch) / "tile" / "new.cuh").touch()
    hashes.add(compiler.header_hash())
    folder = copy_of_kernels(tmp_path / "renamed", monkeypatch)
    (folder / HEADERS[0]).rename(folder / "renamed.cuh")
    hashes.add(compiler.header_hash())
    assert len(hashes) == 3


def test_an_edited_header_is_what_gets_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    config = plan_forward(PROBLEM, DEVICE).config
    with (copy_of_kernels(tmp_path / "kernels", monkeypatch) / config.header).open("a") as file:
        file.write("#error edited by a test\n")
    with pytest.raises(compiler.CompileError, match="edited by a test"):
        compiler.compile_cubin(config, 90)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 7},
        {"num_heads": 16},
        {"num_heads_kv": 8},
        {"seqlen_q": 1},
        {"seqlen_q": 1001},
        {"seqlen_k": 1},
        {"seqlen_k": 100_000},
        {"scale": 1.0},
        {"scale": -3.0},
        {"band": Band()},
        {"band": Band(-3, 4)},
        {"head_dim": 63},  # padded inside the same kernel
    ],
    ids=str,
)
def test_run_time_values_are_no_new_key(change: dict) -> None:
    ampere = DeviceInfo.of_arch(80)
    assert sources(replace(PROBLEM, **change), ampere) == sources(PROBLEM, ampere)
    # On Hopper a few configurations of the forward serve few and many queries; all else is the same.
    one, other = sources(replace(PROBLEM, **change)), sources(PROBLEM)
    forward = {compiler.source(config) for config, _ in configs.forward_wgmma_configs("f16", 64, 64, True)}
    assert len(forward) <= 3
    assert {one[0], other[0]} <= forward
    # Whether tiles are cut into parts, which a kernel of its own sums up, hangs on how many there are.
    gather = compiler.source(configs.backward_gather_config(configs.backward_wgmma_config("f16", 64, 64, False)))
    assert [source for source in one[1:] if source != gather] == other[1:]


@pytest.mark.parametrize("family", ["wgmma", "mma"])
def test_sides_that_count_shared_memory_differently_do_not_compile(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cupy")
    config = plan_forward(PROBLEM, DEVICE, family).config
    size = config.smem_bytes
    monkeypatch.setattr(type(config), "smem_bytes", property(lambda self: size - 16))
    with pytest.raises(compiler.CompileError, match="shared memory: size differs"):
        compiler.compile_cubin(config, 90)


@pytest.mark.parametrize(
    "change",
    [{"dtype": "bfloat16"}, {"dtype": "float32"}, {"head_dim": 128}, {"head_dim_v": 128}, {"vectorized": False}],
    ids=str,
)
def test_what_changes_the_code_is_a_new_key(change: dict) -> None:
    forward, *backward = sources(PROBLEM)
    other_forward, *other_backward = sources(replace(PROBLEM, **change))
    assert forward != other_forward
    assert backward != other_backward


def test_sources_are_readable_and_one_per_configuration() -> None:
    every = [config for arch in configs.ARCHS for config in configs.all_configs(arch)]
    by_source = {compiler.source(config): config for config in every}
    assert len(by_source) == len(set(every))
    for text, config in by_source.items():
        assert f"{config.name}(" in text
        assert config.cpp.partition("{")[2] in text
        assert text.count("\n") < 50
