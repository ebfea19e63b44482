"""Expressions that change scores: what may be written, what it means in NumPy, and its derivatives."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuflash.expression import Captured, Dual, Evaluator, Expression, _NumPy, evaluate, to_cuda

ARRAYS = {
    "rel": np.linspace(-0.93, 1.07, 5),
    "table": np.linspace(-1.9, 2.1, 12).reshape(3, 4),
    "ids": np.arange(6) // 2,
    "slope": 0.3,
}
AXES = {
    "rel": Captured(1, True), "table": Captured(2, True), "ids": Captured(1, False), "slope": Captured(None, True)
}  # fmt: skip


def indices(shape: tuple[int, int, int] = (3, 4, 5)) -> dict[str, Any]:
    heads, seqlen_q, seqlen_k = shape
    return {
        "b": 1, "h": np.arange(heads)[:, None, None], "h_kv": np.arange(heads)[:, None, None] // 2,
        "q_idx": np.arange(seqlen_q)[:, None], "k_idx": np.arange(seqlen_k), "seqlen_q": seqlen_q, "seqlen_k": seqlen_k,
    }  # fmt: skip


def draw_score(shape: tuple[int, int, int] = (3, 4, 5)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


CASES = {
    "score": lambda s, h, i, j: s,
    "score + rel[q_idx - k_idx + 2]": lambda s, h, i, j: s + ARRAYS["rel"][np.clip(i - j + 2, 0, 4)],
    "score + table[h, k_idx]": lambda s, h, i, j: s + ARRAYS["table"][h, np.clip(j, 0, 3)],
    "score - slope * abs(q_idx - k_idx)": lambda s, h, i, j: s - 0.3 * abs(i - j),
    "30 * tanh(score / 30)": lambda s, h, i, j: 30 * np.tanh(s / 30),
    "score if k_idx <= q_idx or k_idx < 2 else -inf": lambda s, h, i, j: np.where((j <= i) | (j < 2), s, -np.inf),
    "score if ids[q_idx] == ids[k_idx] else -inf": lambda s, h, i, j: np.where(i // 2 == j // 2, s, -np.inf),
    "score if not (q_idx - k_idx) % 2 else -inf": lambda s, h, i, j: np.where((i - j) % 2 == 0, s, -np.inf),
    "max(score, 0) * sigmoid(2 * score) ** 2 // 1": lambda s, h, i, j: (
        np.maximum(s, 0) / (1 + np.exp(-2 * s)) ** 2 // 1
    ),
    "score if 0 <= q_idx - k_idx < 3 else -1e9": lambda s, h, i, j: np.where((i >= j) & (i - j < 3), s, -1e9),
    "score * seqlen_k / (k_idx + 1) + b - pi * h_kv": lambda s, h, i, j: s * 5 / (j + 1) + 1 - np.pi * (h // 2),
}


@pytest.mark.parametrize("text", CASES)
def test_values_are_those_of_numpy(text: str) -> None:
    s, at = draw_score(), indices()
    found = evaluate(Expression(text, AXES), s, at, ARRAYS)
    np.testing.assert_allclose(found.score, np.broadcast_to(CASES[text](s, at["h"], at["q_idx"], at["k_idx"]), s.shape))


@pytest.mark.parametrize("text", [*CASES, "min(h, 2) * sqrt(k_idx) / 3 + score ** k_idx", "q_idx // 3 + k_idx"])
def test_nothing_becomes_float64(text: str) -> None:
    class Watched(Evaluator):
        def visit(self, node: ast.expr) -> Dual:
            dual = super().visit(node)
            for x in (dual.value, *dual.partials.values()):
                assert isinstance(x, (int, float)) or x.dtype in (np.float32, np.int64, bool), ast.unparse(node)
            return dual

    score = draw_score().astype(np.float32)
    arrays = {name: x.astype(np.float32) if name in ("rel", "table") else x for name, x in ARRAYS.items()}
    Watched(Expression(text, AXES), _NumPy(arrays, score.dtype), score, {**indices(), "slope": 0.3})
    found = evaluate(Expression(text, AXES), score, indices(), arrays)
    assert {x.dtype for x in (found.score, found.by_score, *(by for *_, by in found.reads))} == {score.dtype}


def test_what_is_true_counts_as_one() -> None:
    score, at = draw_score(), indices()
    found = evaluate(Expression("-(q_idx > k_idx) + (h > 0) + (score > 0) * seen[k_idx]", {"seen": Captured(1, False)}),
                     score, at, {"seen": np.arange(5) > 2})  # fmt: skip
    wanted = (at["h"] > 0) - 1 * (at["q_idx"] > at["k_idx"]) + 1 * ((score > 0) & (at["k_idx"] > 2))
    np.testing.assert_array_equal(found.score, wanted)


def test_small_integers_do_not_overflow() -> None:
    expression = Expression("score * 0 + (ids[k_idx] - 200) * 1000", {"ids": Captured(1, False)})
    found = evaluate(expression, draw_score(), indices(), {"ids": np.arange(5, dtype=np.uint8)})
    np.testing.assert_array_equal(found.score[0, 0], 1000 * (np.arange(5) - 200))


#: Functions that programs expect, and arrays as they expect them; prints value, derivative, and that by each read.
PREAMBLE = """
#include <cmath>
#include <cstdio>
using Acc = double;
static double infinity() { return INFINITY; }
struct Math {
    static double exp(double x) { return std::exp(x); }
    static double log(double x) { return std::log(x); }
    static double sqrt(double x) { return std::sqrt(x); }
    static double sin(double x) { return std::sin(x); }
    static double cos(double x) { return std::cos(x); }
    static double tanh(double x) { return std::tanh(x); }
    static double divide(double x, double y) { return x / y; }
    static double power(double x, double y) { return std::pow(x, y); }
    static double abs(double x) { return std::fabs(x); }
    static int abs(int x) { return x < 0 ? -x : x; }
    static double floor_divide(double x, double y) { return std::floor(x / y); }
    static int floor_divide(int x, int y) { return (x % y != 0 && (x < 0) != (y < 0)) ? x / y - 1 : x / y; }
};
static int clip(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }
"""


def cxx_of_array(name: str, array: np.ndarray) -> str:
    kind = "double" if array.dtype.kind == "f" else "int"
    values = ", ".join(map(repr, array.ravel().tolist()))
    arguments = ", ".join(f"int i{axis}" for axis in range(array.ndim))
    place = "0"
    for axis, size in enumerate(array.shape):
        place = f"({place}) * {size} + clip(i{axis}, {size})"
    return f"static {kind} {name}({arguments}) {{ static {kind} const x[] = {{{values}}}; return x[{place}]; }}\n"


def run_as_cxx(texts: list[str], score: np.ndarray, at: dict[str, Any], folder: Path) -> list[np.ndarray]:
    """For each text the rows (value, derivative by the score, derivatives by reads) of all pairs."""
    source = PREAMBLE + "".join(
        cxx_of_array(name, array) for name, array in ARRAYS.items() if isinstance(array, np.ndarray)
    )
    source += f"static double const slope = {ARRAYS['slope']};\n"
    names = "b", "h", "h_kv", "q_idx", "k_idx", "seqlen_q", "seqlen_k"
    for number, text in enumerate(texts):
        program = to_cuda(Expression(text, AXES), {name: name for name in AXES})
        results = [program.score, program.by_score, *(by for *_, by in program.reads)]
        source += f"static void f{number}(double score, {', '.join(f'int {name}' for name in names)}) {{\n"
        source += "double const q_real = q_idx, k_real = k_idx;\n"
        source += program.statements + "\n" + "".join(f'printf("%.17g ", double({x}));' for x in results)
        source += 'printf("\\n"); }\n'
    calls = "".join(f"f{number}(score, i[0], i[1], i[2], i[3], i[4], i[5], i[6]);" for number in range(len(texts)))
    source += f'int main() {{ double score; int i[7]; while (scanf("%lf{" %d" * 7}", &score, '
    source += ", ".join(f"i + {n}" for n in range(7)) + f") == 8) {{ {calls} }} }}\n"
    (folder / "program.cpp").write_text(source)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++20", "-O0", "-w", "-o", str(folder / "program"), str(folder / "program.cpp")]
    subprocess.run(command, check=True)
    columns = [np.broadcast_to(np.asarray(at[name]), score.shape).ravel() for name in names]
    rows = "\n".join(
        " ".join(map(repr, row)) for row in zip(score.ravel().tolist(), *(c.tolist() for c in columns), strict=True)
    )
    done = subprocess.run([str(folder / "program")], input=rows, capture_output=True, text=True, check=True)
    lines = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    return [np.array(lines[number :: len(texts)]) for number in range(len(texts))]


def test_programs_compute_what_numpy_does(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)

    def nested(depth: int) -> str:
        if depth == 0:
            return str(draw.choice(SMOOTH))
        return str(draw.choice(FORMS)).format(a=nested(depth - 1), b=nested(depth - 1))

    texts = [*CASES, *(nested(depth) for depth in (1, 2, 3) for _ in range(30))]
    score, at = draw_score(), indices()
    for text, rows in zip(texts, run_as_cxx(texts, score, at, tmp_path), strict=True):
        wanted = evaluate(Expression(text, AXES), score, at, ARRAYS)
        columns = [wanted.score, wanted.by_score, *(by for *_, by in wanted.reads)]
        for column, numbers in zip(rows.T, columns, strict=True):
            np.testing.assert_allclose(column, numbers.ravel(), rtol=1e-9, atol=1e-12, err_msg=text)


SMOOTH = (
    "score", "rel[q_idx - k_idx + 2]", "table[h, k_idx]", "slope", "h", "(k_idx + 1)", "2.5",
)  # fmt: skip
FORMS = (
    "({a} + {b})", "({a} - {b})", "({a} * {b})", "({a} / (2 + {b} * {b}))", "tanh({a})", "sigmoid({a})",
    "exp(-{a} * {a})", "sin({a})", "cos({a})", "log(1 + {a} * {a})", "sqrt(1 + {a} * {a})", "-{a}",
    "({a} if k_idx < q_idx else {b})",
    "max({a}, {b})", "min({a}, {b})", "abs({a} + 0.123)", "(1.5 + tanh({a})) ** {b}", "tanh({a}) ** 3",
)  # fmt: skip
texts = st.recursive(
    st.sampled_from(SMOOTH),
    lambda inner: st.builds(lambda form, a, b: form.format(a=a, b=b), st.sampled_from(FORMS), inner, inner),
    max_leaves=6,
)


# Arrays hold no whole numbers, unlike heads and keys: where both branches of max meet, differences are of neither.
@given(text=texts)
def test_derivatives_are_those_of_finite_differences(text: str) -> None:
    expression, s, at, step = Expression(text, AXES), draw_score(), indices(), 1e-6
    here = evaluate(expression, s, at, ARRAYS)
    if not np.all(np.abs(here.score) < 1e3):
        return  # differences of such numbers say nothing

    def difference(score_step: float, arrays_step: dict[str, np.ndarray]) -> np.ndarray:
        def moved(sign: int) -> np.ndarray:
            arrays = ARRAYS | {name: ARRAYS[name] + sign * by for name, by in arrays_step.items()}
            return evaluate(expression, s + sign * score_step, at, arrays).score

        return (moved(1) - moved(-1)) / (2 * step)

    # A few points lie where two branches meet, and differences there are those of neither.
    def assert_mostly_close(actual: np.ndarray, desired: np.ndarray) -> None:
        wrong = ~np.isclose(actual, desired, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(desired).max()))
        assert wrong.mean() <= 0.02, (text, actual[wrong], desired[wrong])

    assert_mostly_close(here.by_score, difference(step, {}))
    for name in ("rel", "table"):
        for place in np.ndindex(ARRAYS[name].shape):
            bump = np.zeros_like(ARRAYS[name])
            bump[place] = step
            own = np.zeros_like(s)
            for read, where, by in here.reads:
                if read == name:
                    hit = np.ones((), bool)
                    for axis, index in enumerate(where):
                        hit = hit & (index == place[axis])
                    own += np.where(hit, by, 0)
            assert_mostly_close(own, difference(0, {name: bump}))


@pytest.mark.parametrize(
    ("text", "message", "mark"),
    [
        ("score +", "invalid syntax", None),
        ("score + bias", "got the name 'bias', wanted one of score, b, h, h_kv, q_idx", "bias"),
        ("score + rel", "got 'rel' alone, wanted an element of it, by 1 indices", "rel"),
        ("score + rel[h, k_idx]", "rel: got 2 indices, wanted 1", "rel["),
        ("score + slope[h]", "got an element of 'slope', wanted one of an array: rel, table, ids", "slope"),
        ("score + rel[score]", "rel: got an index that depends on the score, wanted one of positions", "score]"),
        ("erf(score)", "got the function 'erf', wanted one of exp, log", "erf"),
        ("tanh(score, 1)", "tanh: got 2 arguments, wanted 1", "tanh"),
        ("score.real", "got 'score.real', wanted arithmetic, comparisons", "score"),
        ("__import__('os')", "got the function '__import__'", "__import__"),
        ("[x for x in (1,)]", "wanted arithmetic, comparisons", "["),
        ("score is 1", "got the comparison Is, wanted < <=", "score"),
        ("score if k_idx in (1, 2) else 0", "got the comparison In", "k_idx"),
        ("'a'", "got \"'a'\", wanted arithmetic", "'a'"),
        ("1j * score", "got '1j', wanted arithmetic", "1j"),
        ("lambda: score", "wanted arithmetic", "lambda"),
        ("(x := score)", "wanted arithmetic", "x"),
    ],
)
def test_what_may_not_be_written(text: str, message: str, mark: str | None) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Expression(text, AXES)
    *_, line, below = str(caught.value).splitlines()
    assert line.strip() == text
    if mark is not None:
        assert line[below.index("^") :].startswith(mark)


@pytest.mark.parametrize("name", ["score", "q_idx", "exp", "pi", "not a name"])
def test_names_that_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=r"score_mod: .* is no name for an array"):
        Expression("score", {name: Captured(1, True)})
