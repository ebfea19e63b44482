"""What is shipped: the wheel carries the kernels and works where it is installed; the README says what CI does."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cuflash
from cuflash import environment

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel, offline where the build backend is at hand."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    (path,) = folder.glob("cuflash-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder that holds the installed package, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(folder)
    return folder


def _run(program: str, installed: Path) -> str:
    """Run Python against the installed package; ``-P`` and the folder keep the checkout out of its path."""
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n{program}"
    finished = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=installed, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def test_wheel_carries_the_kernels_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    kernels = {path.relative_to(ROOT / "kernels_cu").as_posix() for path in (ROOT / "kernels_cu").rglob("*.cuh")}
    assert kernels
    assert {f"cuflash/_kernels_cu/{name}" for name in kernels} <= names
    assert {"cuflash/__init__.py", "cuflash/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"cuflash", f"cuflash-{cuflash.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


def test_installed_package_computes(installed):
    program = (
        "import cuflash, numpy as np\n"
        "q = np.ones((2, 5, 8), np.float32)\n"
        "print(cuflash.__file__, cuflash.attention(q, q, q).sum())"
    )
    file, total = _run(program, installed).rsplit(" ", 1)
    assert Path(file).parent == installed / "cuflash"
    assert float(total) == 80


def test_installed_package_finds_and_compiles_its_kernels(installed):
    pytest.importorskip("cupy")
    program = (
        "from cuflash import compile, configs\n"
        "print(compile.kernel_root())\n"
        "print(len(compile.compile_cubin(configs.all_configs(80)[0], 80).cubin))"
    )
    root, size = _run(program, installed).splitlines()
    assert Path(root) == installed / "cuflash" / "_kernels_cu"
    assert int(size) > 0


def test_checkout_uses_its_own_kernels():
    from cuflash.compile import kernel_root

    if Path(cuflash.__file__).resolve().parent.parent != ROOT:
        pytest.skip("the package under test is not the checkout's")
    assert kernel_root().resolve() == ROOT / "kernels_cu"


def test_numpy_is_the_only_hard_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [re.match(r"\w+", name)[0] for name in project["dependencies"]] == ["numpy"]
    assert project["version"] == cuflash.__version__


def test_optional_packages_are_not_imported_for_the_user():
    program = (
        "import sys, cuflash\n"
        "import numpy as np\n"
        "q = np.ones((2, 5, 8), np.float32)\n"
        "cuflash.attention(q, q, q)\n"
        "print(*sorted({'cupy', 'torch', 'jax', 'ml_dtypes', 'matplotlib'}.intersection(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == ""


def test_readme_commands_are_those_of_ci():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.search(r"```bash\n(pip install \..*?)```", readme, re.DOTALL)[1].splitlines()
    commands = [command.split("  #")[0].strip() for command in commands if command.strip()]
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    positions = [script.index(f"'{command}'") for command in commands]
    assert positions == sorted(positions)


def test_readme_lists_every_environment_variable_and_no_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(CUFLASH_\w+)` \| (.*?) \|$", readme, re.MULTILINE))
    assert listed == {variable.name: variable.sentence for variable in environment.VARIABLES}
    used = {
        name
        for path in (ROOT / "cuflash").glob("*.py")
        for name in re.findall(r"CUFLASH_[A-Z_]+", path.read_text(encoding="utf-8"))
    }
    assert used == set(listed)


def test_readme_examples_are_python():
    """The blocks compile; those that need neither a GPU nor a framework also run."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        modules = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        if modules <= {"cuflash", "numpy"}:
            exec(compile(block, "README.md", "exec"), {})
