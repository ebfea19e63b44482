"""Imports in `cuflash/` and includes in `kernels_cu/` point one way, and frameworks stay the user's choice."""

import ast
import graphlib
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "cuflash"
KERNELS = ROOT / "kernels_cu"

# From the bottom up: a module imports only from layers below its own.
LAYERS = (
    {"environment", "expression", "rng", "tensor_map"},
    {"scores"},
    {"problem", "cpu", "reference", "arrays"},
    {"configs", "params", "arguments", "block_mask"},
    {"plan", "compile", "score_mods"},
    {"launch"},
    {"functional"},
    {"torch"},
    {"__init__", "demo"},
    {"__main__"},
)
# Modules that see less than their layer would let them.
ONLY = {
    "cpu": {"environment", "expression", "rng", "scores"},
    "reference": {"expression", "rng", "scores"},
    "environment": set(),
    "arrays": {"environment"},
    "block_mask": {"arrays"},
}

OPTIONAL = {"cupy", "cupy_backends", "cuda", "torch", "jax", "ml_dtypes"}
# What may import a framework at all, and only inside functions.
USES = {
    "cupy": {"arrays", "compile", "launch", "plan", "torch", "demo", "__main__"},
    "torch": {"arrays", "torch", "demo", "__main__"},
    "jax": {"arrays", "demo", "__main__"},
}


def _imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Every absolute name that a module of the package imports, and whether importing the module imports it."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or ""), at_import
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((f"cuflash.{name}", at_import) for name in names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not inside)

    yield from visit(tree, True)


MODULES = {path.stem: list(_imports(ast.parse(path.read_text()))) for path in sorted(PACKAGE.glob("*.py"))}


def _siblings(module: str) -> set[str]:
    """Modules of the package that `module` imports, anywhere in it."""
    names = {name.split(".")[1] for name, _ in MODULES[module] if name.startswith("cuflash.")}
    return {name if name in MODULES else "__init__" for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    rank = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    assert module in rank, f"say in LAYERS where {module} stands"
    if module == "__init__":
        # The public names import `torch` and the like only when asked to, so the ranks of those do not count.
        return
    up = {name for name in _siblings(module) if rank[name] >= rank[module]}
    assert not up, f"{module} imports {up}, which is not below it"
    assert _siblings(module) <= ONLY.get(module, set(MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_frameworks_are_imported_late_and_by_few(module: str) -> None:
    for name, at_import in MODULES[module]:
        framework = name.split(".")[0]
        if framework in OPTIONAL:
            assert not at_import or module == framework, f"importing cuflash.{module} imports {name}"
        assert module in USES.get(framework, {module}), f"{module} imports {name}"


def _modules_loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_no_framework_is_imported_for_the_user() -> None:
    frameworks = {"cupy", "torch", "jax"}
    assert not frameworks & _modules_loaded_by("import cuflash")
    call = "import numpy as np, cuflash; x = np.ones((2, 3, 4), np.float32); cuflash.attention(x, x, x)"
    assert not frameworks & _modules_loaded_by(call)


# --------------------------------------------------------------------------------------------------- includes

HEADERS = {path.relative_to(KERNELS).as_posix(): path for path in sorted(KERNELS.rglob("*.cuh"))}
HEIGHT = {"ptx": 0, "tile": 1, "attention": 2, "": 3}


def _includes(name: str) -> list[str]:
    """What a header includes: our headers relative to the root, others as they are written."""
    written = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', HEADERS[name].read_text(), re.MULTILINE)
    relative = [posixpath.normpath(posixpath.join(_folder(name), path)) for path in written]
    return [ours if ours in HEADERS else path for ours, path in zip(relative, written, strict=True)]


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


@pytest.mark.parametrize("name", HEADERS)
def test_includes_point_down(name: str) -> None:
    assert _folder(name) in HEIGHT, f"{name} lies in none of the folders {sorted(HEIGHT)}"
    for included in _includes(name):
        if included not in HEADERS:
            # Light headers of CUDA itself; <cuda/std/...> costs a second of compile time, host headers do not exist.
            assert re.fullmatch(r"cuda_(fp16|bf16|fp8)\.h", included), f"{name} includes {included}"
        elif _folder(name) == "":
            assert _folder(included) != "", f"{name} includes {included}: a kernel includes no other kernel"
        else:
            assert HEIGHT[_folder(included)] <= HEIGHT[_folder(name)], f"{name} includes {included}, which is above it"


def test_includes_have_no_cycle() -> None:
    graph = {name: [included for included in _includes(name) if included in HEADERS] for name in HEADERS}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_guarded(name: str) -> None:
    assert "#pragma once" in HEADERS[name].read_text()
