"""The record of the last full, green run of the GPU tests: what ran, on what, over which files.

A machine that checks changes need not have a GPU. The record says that one had, for exactly these files:
`pytest tests/gpu --gpu-record` writes it, `python -m tests.gpu_record check` compares it with the tree, and
`tests/cpu/test_gpu_record.py` fails once anything that decides what a GPU computes differs from it.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "gpu_record.json"

#: What is hashed, and what of it needs a new run when it changes: all device code, and the modules between a
#: user's GPU array and the launch.
_FOLDERS = ("cuflash", "kernels_cu", "tests")
_DECISIVE_MODULES = {
    "arguments", "arrays", "block_mask", "compile", "configs", "expression", "functional", "launch", "params", "plan",
    "problem", "score_mods", "scores", "tensor_map", "torch",
}  # fmt: skip
_IGNORED_SUFFIXES = (".pyc", ".json", ".csv")


def is_decisive(name: str) -> bool:
    """Tell whether a change of this file can change what a GPU computes."""
    path = Path(name)
    if path.parts[0] == "kernels_cu":
        return path.suffix == ".cuh"
    return path.parent == Path("cuflash") and path.suffix == ".py" and path.stem in _DECISIVE_MODULES


def file_hashes(root: Path = ROOT) -> dict[str, str]:
    """Short content hash of every source file under the recorded folders, by name relative to `root`."""
    hashes = {}
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if path.is_file() and not hidden and path.suffix not in _IGNORED_SUFFIXES:
                # Line endings may differ between checkouts; contents then do not.
                contents = path.read_bytes().replace(b"\r\n", b"\n")
                hashes[relative.as_posix()] = hashlib.sha256(contents).hexdigest()[:12]
    return hashes


def differences(recorded: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str]:
    """Say "added", "removed" or "changed" for each file that differs."""
    result = {}
    for name in sorted(recorded.keys() | present.keys()):
        if name not in recorded:
            result[name] = "added"
        elif name not in present:
            result[name] = "removed"
        elif recorded[name] != present[name]:
            result[name] = "changed"
    return result


def tree_hash(hashes: Mapping[str, str]) -> str:
    """One hash over all files, to tell at a glance whether two records saw the same tree."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Device, driver and the versions that take part. Needs a GPU."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    versions = {}
    for name in ("numpy", "cupy", "torch", "ml_dtypes"):
        try:
            versions[name] = importlib.import_module(name).__version__
        except ImportError:
            versions[name] = None
    return {
        "device": properties["name"].decode(),
        "arch": properties["major"] * 10 + properties["minor"],
        "driver_cuda": runtime.driverGetVersion(),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "python": sys.version.split()[0],
        **versions,
    }


def write(counts: Mapping[str, int], seconds: float, path: Path = RECORD, root: Path = ROOT) -> None:
    """Write the record of a run that has just ended."""
    hashes = file_hashes(root)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment(),
        **counts,
        "seconds": round(seconds, 1),
        "tree": tree_hash(hashes),
        "files": hashes,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def check(path: Path = RECORD, root: Path = ROOT) -> tuple[dict[str, str], dict[str, str]]:
    """Differences between the record and the tree: (decisive ones, others)."""
    changed = differences(json.loads(path.read_text())["files"], file_hashes(root))
    decisive = {name: how for name, how in changed.items() if is_decisive(name)}
    return decisive, {name: how for name, how in changed.items() if name not in decisive}


def main(arguments: list[str]) -> int:
    """`check`: print how the tree differs from the record; 0 where nothing does, else 1."""
    if arguments != ["check"]:
        print("usage: python -m tests.gpu_record check", file=sys.stderr)
        return 2
    if not RECORD.exists():
        print(f"no record: run `pytest tests/gpu --gpu-record` on a machine with a GPU to write {RECORD.name}")
        return 1
    record = json.loads(RECORD.read_text())
    print(f"recorded {record['date']} on {record['device']}: {record['passed']} passed, {record['skipped']} skipped")
    decisive, others = check()
    for title, names in (("need a new run of the GPU tests", decisive), ("differ, without deciding results", others)):
        if names:
            print(f"{title}:", *(f"  {how:8} {name}" for name, how in names.items()), sep="\n")
    if not decisive and not others:
        print("current")
    return 1 if decisive or others else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
