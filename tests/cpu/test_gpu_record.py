"""The GPU record: its own logic on a small tree, and whether the real one still speaks of this tree."""

import json
from pathlib import Path

import pytest

from tests import gpu_record


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("cuflash/plan.py", "cuflash/cpu.py", "kernels_cu/tile/copy.cuh", "tests/gpu/test_forward.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"contents of {name}\n")
    (tmp_path / "record.json").write_text(json.dumps({"files": gpu_record.file_hashes(tmp_path)}))
    return tmp_path


def test_unchanged_tree_is_current(tree: Path) -> None:
    (tree / "cuflash" / "__pycache__").mkdir()
    (tree / "cuflash" / "__pycache__" / "plan.pyc").write_bytes(b"noise")
    (tree / "tests" / "gpu_record.json").write_text("{}")
    plan = tree / "cuflash" / "plan.py"
    plan.write_bytes(plan.read_bytes().replace(b"\n", b"\r\n"))
    assert gpu_record.check(tree / "record.json", tree) == ({}, {})


def test_differences_are_named_and_sorted_by_what_they_decide(tree: Path) -> None:
    (tree / "kernels_cu" / "tile" / "copy.cuh").write_text("edited")
    (tree / "kernels_cu" / "decode.cuh").write_text("new")
    (tree / "cuflash" / "plan.py").unlink()
    (tree / "cuflash" / "cpu.py").write_text("edited")
    (tree / "tests" / "gpu" / "test_forward.py").write_text("edited")
    decisive, others = gpu_record.check(tree / "record.json", tree)
    assert decisive == {
        "cuflash/plan.py": "removed", "kernels_cu/decode.cuh": "added", "kernels_cu/tile/copy.cuh": "changed"
    }  # fmt: skip
    assert others == {"cuflash/cpu.py": "changed", "tests/gpu/test_forward.py": "changed"}


def test_tree_hash_sees_names_and_contents() -> None:
    hashes = {gpu_record.tree_hash(files) for files in ({}, {"a": "1"}, {"a": "2"}, {"b": "1"}, {"a": "1", "b": "1"})}
    assert len(hashes) == 5
    assert gpu_record.tree_hash({"a": "1", "b": "2"}) == gpu_record.tree_hash({"b": "2", "a": "1"})


def test_gpu_tests_have_run_on_this_code() -> None:
    if not gpu_record.RECORD.exists():
        pytest.skip("no GPU run is recorded yet")
    decisive, _ = gpu_record.check()
    assert not decisive, (
        "these files differ from those that the GPU tests last ran on; run `pytest tests/gpu --gpu-record` "
        f"on a machine with a GPU and commit the record with them: {decisive}"
    )
