"""Every configuration that a planner may choose compiles for its architecture, and the tuned ones spill nothing.

NVRTC needs no GPU for this. What is collected compiles in the background, on all cores, while the tests wait for
one result after the other. All of it takes some 15 minutes of one core; with --few-kernels all architectures but one
compile one configuration per kernel, arithmetic and head dims.

What has tiles on tensor cores, where every register counts, is compiled for each architecture that would choose it; the
rest, what copies element by element, and the tables of sm_89, which has those and the instructions of sm_86, for the
first of them and for the main one. Portable kernels of bfloat16, which are those of float16 but for one instruction,
and of tf32, which is a part of tf32x3, are compiled for their first architecture alone.
"""

import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cuflash import compile as compiler
from cuflash import configs
from cuflash.expression import Captured, Expression
from cuflash.problem import Mod

pytest.importorskip("cupy")

Compilation = tuple[configs.Config, int]

REGISTERS_PER_BLOCK = 65536

#: Who asks for all options of scores at once may find some registers spilled.
EVERYTHING = {
    configs.ScoreConfig(True, mask=True, bias=dtype, alibi=True, sinks=True, dropout=True) for dtype in configs.ITEMSIZE
}
SPILLED_BY_EVERYTHING = 600

#: An expression that reads an array by pairs, and the architectures for which it is compiled.
MOD = Mod(Expression("score + x[h, q_idx - k_idx + 8] * gate", {"x": Captured(2, True), "gate": Captured(None, True)}),
          (("x", "float32"),))  # fmt: skip
MOD_ARCHS = (75, 86, 90)

#: The architecture whose tables --few-kernels leaves whole.
MAIN_ARCH = 90
#: The first that has bfloat16 and tf32.
FIRST_ARCH = 80


def selection(arch: int, few_kernels: bool) -> list[configs.Config]:
    """Configurations to compile for an architecture."""
    every = configs.all_configs(arch) + configs.score_configs(arch)
    if arch in MOD_ARCHS:
        every += configs.mod_configs(arch, MOD) + configs.weights_configs(arch)
    if arch == MAIN_ARCH or not few_kernels:
        return every
    chosen: dict[tuple[object, ...], configs.Config] = {}
    for config in every:
        fields = (getattr(config, name, None) for name in ("mma", "dtype", "head_dim", "head_dim_v", "score"))
        chosen.setdefault((type(config), *fields), config)
    return list(chosen.values())


def compilations(few_kernels: bool) -> Iterator[Compilation]:
    """What is compiled for which architecture."""
    seen: set[configs.Config] = set()
    for arch in configs.ARCHS:
        for config in selection(arch, few_kernels):
            is_tight = isinstance(config, configs.TileConfig) and config.copy != "element"
            is_like_another = getattr(config, "mma", None) in ("bf16", "tf32") and not config.arch_specific
            if is_like_another and arch != FIRST_ARCH:
                continue
            if (is_tight and arch != 89) or config not in seen or arch == MAIN_ARCH:
                yield config, arch
            seen.add(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "config" in metafunc.fixturenames:
        pairs = list(compilations(metafunc.config.getoption("--few-kernels")))
        ids = [f"sm_{arch}-{config.name}" for config, arch in pairs]
        metafunc.parametrize(("config", "arch"), pairs, ids=ids)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[[configs.Config, int], compiler.Compiled]]:
    """Wait for the compilation of a configuration; all of them are under way."""
    pool = ThreadPoolExecutor(os.cpu_count())
    futures: dict[Compilation, Future[compiler.Compiled]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_compiles:
            config, arch = item.callspec.params["config"], item.callspec.params["arch"]
            futures[config, arch] = pool.submit(compiler.compile_cubin, config, arch)

    def result(config: configs.Config, arch: int) -> compiler.Compiled:
        try:
            return futures.pop((config, arch)).result()
        except ImportError as error:
            pytest.skip(f"no NVRTC: {error}")

    yield result
    pool.shutdown(cancel_futures=True)


def is_whole_elf(cubin: bytes) -> bool:
    """Whether a 64-bit ELF file ends where the last of its two tables of headers does."""
    (program_headers, section_headers), sizes = (
        struct.unpack_from("<QQ", cubin, 32),
        struct.unpack_from("<4H", cubin, 54),
    )
    ends = program_headers + sizes[0] * sizes[1], section_headers + sizes[2] * sizes[3]
    return cubin.startswith(b"\x7fELF") and max(ends) == len(cubin)


def test_compiles(
    config: configs.Config, arch: int, compiled: Callable[[configs.Config, int], compiler.Compiled]
) -> None:
    result = compiled(config, arch)
    assert is_whole_elf(result.cubin)
    assert "warning" not in result.log
    assert "C75" not in result.log, f"wgmma is waited for, or its registers are moved: {result.log}"
    assert result.registers * config.threads <= REGISTERS_PER_BLOCK
    if getattr(config, "tuned", True):
        limit = SPILLED_BY_EVERYTHING if getattr(config, "score", None) in EVERYTHING else 0
        spilled = f"spills {result.spill_bytes} bytes with {result.registers} registers"
        assert result.spill_bytes <= limit, f"{spilled}, allowed are {limit}"


@pytest.mark.parametrize("arch", configs.ARCHS)
def test_tables_are_feasible_and_named_apart(arch: int) -> None:
    every = configs.all_configs(arch) + configs.score_configs(arch) + configs.mod_configs(arch, MOD)
    every += configs.weights_configs(arch)
    assert every
    for config in every:
        assert configs.feasible(config, arch), f"{config.name} does not fit sm_{arch}"
        assert config.threads <= 1024
    names = [config.name for config in every]
    assert len(set(names)) == len(names)
