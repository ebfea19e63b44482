"""Every environment variable the library reads: its name, its default and its sentence, in one place.

Variables are read when they are used, not at import, so that tests and notebooks can set them at
any time. None of them is read on the path of a call whose kernel is already loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable; ``choices`` are the words it accepts, empty where it takes any value."""

    name: str
    sentence: str
    default: str = ""
    choices: tuple[str, ...] = ()

    def read(self) -> str:
        """Value of the variable, its default where it is unset or empty."""
        value = os.environ.get(self.name, "").strip() or self.default
        if self.choices and value and value not in self.choices:
            raise ValueError(f"{self.name}={value!r} is none of {', '.join(self.choices)}")
        return value

    def read_flag(self) -> bool:
        """True unless the variable is unset, empty or 0."""
        return os.environ.get(self.name, "").strip() not in ("", "0")

    def read_words(self) -> frozenset[str]:
        """The comma-separated words of the variable, each of them one of ``choices``."""
        words = frozenset(word.strip() for word in os.environ.get(self.name, "").split(",") if word.strip())
        unknown = words.difference(self.choices)
        if unknown:
            raise ValueError(f"{self.name}: {', '.join(sorted(unknown))} is none of {', '.join(self.choices)}")
        return words


PRINT_PLAN = Variable("CUFLASH_PRINT_PLAN", "1: print the plan of every new problem on stderr, once.")
LOG = Variable("CUFLASH_LOG", "1: say on stderr what is compiled, and how long it took.")
KERNEL = Variable(
    "CUFLASH_KERNEL",
    "Kernels the planner may choose: auto, the best for the device; mma (tensor cores), wgmma (Hopper) or simt, only "
    "those.",
    default="auto",
    choices=("auto", "mma", "wgmma", "simt"),
)
DUMP = Variable(
    "CUFLASH_DUMP",
    "Any of cu,ptx,sass,log: what to keep of every kernel that is compiled, in files named after it.",
    choices=("cu", "ptx", "sass", "log"),
)
DUMP_DIR = Variable("CUFLASH_DUMP_DIR", "Where CUFLASH_DUMP writes.", default="cuflash_dump")
NUM_THREADS = Variable("CUFLASH_NUM_THREADS", "Threads of the CPU path; by default one per core the process may use.")

#: All of them, in the order in which documentation lists them.
VARIABLES = (PRINT_PLAN, LOG, KERNEL, DUMP, DUMP_DIR, NUM_THREADS)


def print_plan() -> bool:
    """Whether the plan of a new problem is printed."""
    return PRINT_PLAN.read_flag()


def log() -> bool:
    """Whether compilations are announced on stderr."""
    return LOG.read_flag()


def kernel() -> str:
    """Kernel family the planner may choose: ``"auto"`` or the name of one."""
    return KERNEL.read()


def dump() -> frozenset[str]:
    """What to keep of every compiled kernel: a subset of cu, ptx, sass and log."""
    return DUMP.read_words()


def dump_dir() -> Path:
    """Folder that ``dump()`` is written to."""
    return Path(DUMP_DIR.read())


def num_threads() -> int | None:
    """Threads of the CPU path, or None where the user leaves the choice to it."""
    value = NUM_THREADS.read()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{NUM_THREADS.name}={value!r} is not a positive whole number")
    return int(value)
