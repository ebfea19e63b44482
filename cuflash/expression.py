"""Expressions that change scores: one text, checked once, for NumPy and for CUDA C++, with its derivatives.

The language is what Python and its readers know of arithmetic: ``+ - * / // % **``, comparisons, ``and or not``,
``a if c else b``, the functions of :data:`FUNCTIONS`, and elements of captured arrays, ``rel[h, q_idx - k_idx + 128]``.
``/`` is the quotient of real numbers; ``//`` and ``%`` round down. Comparisons may be chained. Nothing else is run.

Derivatives are those of dual numbers: every value carries its partial derivative by the score and by each element of a
captured array that the expression reads, so that one evaluation gives all of them (Clifford 1873; Griewank and
Walther 2008, chapter 3). What a number is, is left open: an array, for NumPy, or a variable of a C++ program that the
evaluation writes. So there is one definition of what an expression means, and of its derivatives.
"""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

#: Integers that every expression may use, beside the score: numbers of the batch entry, the query head and the key
#: head, of the query and the key, and the lengths.
INDICES = ("b", "h", "h_kv", "q_idx", "k_idx", "seqlen_q", "seqlen_k")
CONSTANTS = {"inf": math.inf, "pi": math.pi}


@dataclass(frozen=True, slots=True)
class Captured:
    """What an expression has to know of what it captures: how many axes, None for a number, and whether it is real."""

    num_axes: int | None
    is_real: bool


@dataclass(frozen=True, slots=True)
class Function:
    """A function: its value in an arithmetic, and its derivatives there by its arguments, given these and its value."""

    value: Callable[..., Any]
    partials: tuple[Callable[..., Any], ...]

    @property
    def num_arguments(self) -> int:
        return len(self.partials)


#: Each is computed by the method of the arithmetic that has its name.
FUNCTIONS: dict[str, Function] = {
    "exp": Function(lambda on, x: on.exp(x), (lambda on, x, y: y,)),
    "log": Function(lambda on, x: on.log(x), (lambda on, x, y: on.divide(1.0, x),)),
    "sqrt": Function(lambda on, x: on.sqrt(x), (lambda on, x, y: on.divide(0.5, y),)),
    "sin": Function(lambda on, x: on.sin(x), (lambda on, x, y: on.cos(x),)),
    "cos": Function(lambda on, x: on.cos(x), (lambda on, x, y: -on.sin(x),)),
    "tanh": Function(lambda on, x: on.tanh(x), (lambda on, x, y: 1.0 - y * y,)),
    "sigmoid": Function(lambda on, x: on.tanh(x * 0.5) * 0.5 + 0.5, (lambda on, x, y: y * (1.0 - y),)),
    "abs": Function(lambda on, x: on.abs(x), (lambda on, x, y: on.where(on.less(x, 0), -1.0, 1.0),)),
    # Of equal arguments the first one is taken.
    "min": Function(
        lambda on, a, b: on.where(on.less(b, a), b, a),
        (lambda on, a, b, y: on.where(on.less(b, a), 0.0, 1.0), lambda on, a, b, y: on.where(on.less(b, a), 1.0, 0.0)),
    ),
    "max": Function(
        lambda on, a, b: on.where(on.less(a, b), b, a),
        (lambda on, a, b, y: on.where(on.less(a, b), 0.0, 1.0), lambda on, a, b, y: on.where(on.less(a, b), 1.0, 0.0)),
    ),
}

#: Names of the arithmetic's methods.
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}


# --- what may be written --------------------------------------------------------------------------


class Expression:
    """A checked expression, or several of which each takes the result of the one before for its score; hashable."""

    def __init__(self, text: str, captures: Mapping[str, Captured]) -> None:
        self.text = text
        self.captures = dict(captures)
        for name in captures:
            if not name.isidentifier() or name == "score" or name in (*INDICES, *CONSTANTS, *FUNCTIONS):
                raise ValueError(f"score_mod: {name!r} is no name for an array, as it has a meaning of its own")
        try:
            tree: ast.expr = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ValueError(self._pointing(f"score_mod: {error.msg}", error.lineno or 1, error.offset or 1)) from None
        self._check(tree)
        self.steps: tuple[ast.expr, ...] = (tree,)

    def then(self, other: Expression) -> tuple[Expression, dict[str, str]]:
        """Both, the other one last, and by which names they know the captures of that."""
        names = {name: self._unused(name, other.captures) for name in other.captures}
        both = Expression.__new__(Expression)
        renamed = tuple(_Renamer(names).visit(copy.deepcopy(step)) for step in other.steps)
        both.steps = self.steps + renamed
        both.captures = {**self.captures, **{names[name]: found for name, found in other.captures.items()}}
        both.text = "; ".join(map(ast.unparse, both.steps))
        return both, names

    def _unused(self, name: str, others: Mapping[str, Captured]) -> str:
        """The name, or one like it where this expression captures something else by it."""
        if name not in self.captures:
            return name
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        return next(new for new in numbered if new not in self.captures and new not in others)

    def uses(self, name: str) -> bool:
        """Whether the name occurs."""
        return any(isinstance(node, ast.Name) and node.id == name for step in self.steps for node in ast.walk(step))

    @property
    def differs_by_pair(self) -> bool:
        """Whether it asks for more of a pair than its head."""
        return self.uses("q_idx") or self.uses("k_idx")

    @property
    def real_arrays(self) -> tuple[str, ...]:
        """Names of the captured arrays that have gradients."""
        return tuple(name for name, found in self.captures.items() if found.is_real and found.num_axes is not None)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return tuple(map(ast.unparse, self.steps)), tuple(self.captures.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def _pointing(self, message: str, line: int, column: int) -> str:
        """The message with the line that it is about, and a mark below the column."""
        lines = self.text.strip().splitlines() or [""]
        return f"{message}\n    {lines[min(line, len(lines)) - 1]}\n    {' ' * (column - 1)}^"

    def error(self, node: ast.expr, message: str) -> ValueError:
        """An error that shows where in the text it is."""
        return ValueError(self._pointing(f"score_mod: {message}", node.lineno, node.col_offset + 1))

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=bool() | int() | float()):
                pass
            case ast.Name(id=name):
                self._check_name(node, name)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
                self._check(operand)
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod() | ast.Pow()):
                self._check(node.left)
                self._check(node.right)
            case ast.BoolOp(values=values):
                for value in values:
                    self._check(value)
            case ast.Compare(left=left, ops=ops, comparators=others):
                if unknown := [op for op in ops if type(op) not in _COMPARISONS]:
                    raise self.error(node, f"got the comparison {type(unknown[0]).__name__}, wanted < <= > >= == !=")
                for value in (left, *others):
                    self._check(value)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                for value in (test, body, orelse):
                    self._check(value)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                self._check_call(node, name, arguments)
            case ast.Subscript(value=ast.Name(id=name)):
                self._check_read(node, name)
            case _:
                known = "arithmetic, comparisons, and or not, if else, functions and elements of captured arrays"
                raise self.error(node, f"got {ast.unparse(node)!r}, wanted {known}")

    def _check_name(self, node: ast.expr, name: str) -> None:
        if name == "score" or name in INDICES or name in CONSTANTS:
            return
        if name not in self.captures:
            known = ("score", *INDICES, *CONSTANTS, *self.captures)
            raise self.error(node, f"got the name {name!r}, wanted one of {', '.join(known)}")
        if num_axes := self.captures[name].num_axes:
            raise self.error(node, f"got {name!r} alone, wanted an element of it, by {num_axes} indices")

    def _check_call(self, node: ast.expr, name: str, arguments: list[ast.expr]) -> None:
        if name not in FUNCTIONS:
            raise self.error(node, f"got the function {name!r}, wanted one of {', '.join(FUNCTIONS)}")
        wanted = FUNCTIONS[name].num_arguments
        if len(arguments) != wanted:
            raise self.error(node, f"{name}: got {len(arguments)} arguments, wanted {wanted}")
        for argument in arguments:
            self._check(argument)

    def _check_read(self, node: ast.Subscript, name: str) -> None:
        num_axes = self.captures[name].num_axes if name in self.captures else None
        if not num_axes:
            arrays = ", ".join(key for key, found in self.captures.items() if found.num_axes) or "none is captured"
            raise self.error(node, f"got an element of {name!r}, wanted one of an array: {arrays}")
        indices = indices_of(node)
        if len(indices) != num_axes:
            raise self.error(node, f"{name}: got {len(indices)} indices, wanted {num_axes}")
        for index in indices:
            if any(isinstance(part, ast.Name) and part.id == "score" for part in ast.walk(index)):
                raise self.error(index, f"{name}: got an index that depends on the score, wanted one of positions")
            self._check(index)


class _Renamer(ast.NodeTransformer):
    """Gives names other names."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)


class Bound(NamedTuple):
    """An expression with what it captures: arrays and numbers by their names."""

    expression: Expression
    values: Mapping[str, Any]

    def with_reals_in(self, dtype: Any) -> Bound:
        """The same with its real arrays, NumPy's or CuPy's, in a dtype."""
        reals = {name: self.values[name].astype(dtype, copy=False) for name in self.expression.real_arrays}
        return self._replace(values={**self.values, **reals})


def indices_of(node: ast.Subscript) -> list[ast.expr]:
    """The indices of an element."""
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


# --- what it means --------------------------------------------------------------------------------

#: Partial derivatives: by the score at BY_SCORE, by what the expression reads at the number of the read. Where there
#: is none the value does not depend on that.
Partials = dict[int, Any]
BY_SCORE = -1


@dataclass(frozen=True, slots=True)
class Dual:
    """A dual number of an arithmetic."""

    value: Any
    partials: Partials


class Arithmetic(Protocol):
    """What numbers can do beside ``+ - *`` and ``-x``, which are theirs."""

    # exp, log, sqrt, sin, cos, tanh, abs; less, less_equal, greater, greater_equal, equal, not_equal;
    # logical_and, logical_or, logical_not: by their names.
    def __getattr__(self, name: str) -> Callable[..., Any]: ...
    def numbers(self, *values: Any) -> Sequence[Any]:
        """Operands of ``+ - *``, which are numbers of one kind: what is true is 1, and whole ones become real."""

    def divide(self, a: Any, b: Any) -> Any:
        """Quotient of real numbers."""

    def floor_divide(self, a: Any, b: Any) -> Any:
        """Quotient rounded down, of whole or of real numbers."""

    def power(self, a: Any, b: Any) -> Any:
        """A real number."""

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """``a`` where the condition holds, ``b`` elsewhere."""

    def read(self, name: str, indices: list[Any]) -> Any:
        """An element of a captured array, whose indices are brought inside of it."""


def _sum(*terms: tuple[Any, Partials]) -> Partials:
    """Sum of factors times partials."""
    total: Partials = {}
    for factor, partials in terms:
        for key, partial in partials.items():
            product = partial * factor
            total[key] = total[key] + product if key in total else product
    return total


class Evaluator:
    """Runs an expression in an arithmetic, given the numbers that names stand for; with derivatives or without."""

    def __init__(
        self, expression: Expression, on: Arithmetic, score: Any, numbers: Mapping[str, Any], derivatives: bool = True
    ) -> None:
        self.on, self.derivatives = on, derivatives
        self.captures = expression.captures
        self.names = {name: Dual(value, {}) for name, value in (*CONSTANTS.items(), *numbers.items())}
        self.names["score"] = Dual(score, {BY_SCORE: 1.0} if derivatives else {})
        #: What was read, in the order of the text: names and indices.
        self.reads: list[tuple[str, list[Any]]] = []
        for step in expression.steps:
            self.names["score"] = self.visit(step)
        self.result = self.names["score"]

    def visit(self, node: ast.expr) -> Dual:
        on = self.on
        match node:
            case ast.Constant(value=constant):
                return Dual(constant, {})
            case ast.Name(id=name):
                return self.names[name] if name in self.names else self._read(name, [])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Dual(on.logical_not(self.visit(operand).value), {})
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                x = self.visit(operand)
                return Dual(-on.numbers(x.value)[0], _sum((-1.0, x.partials)))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.visit(operand)
            case ast.BinOp(left=left, op=operation, right=right):
                return self._binary(operation, self.visit(left), self.visit(right))
            case ast.BoolOp(op=combination, values=operands):
                combine = on.logical_and if isinstance(combination, ast.And) else on.logical_or
                return Dual(functools.reduce(combine, [self.visit(each).value for each in operands]), {})
            case ast.Compare(left=left, ops=comparisons, comparators=others):
                sides = [self.visit(side).value for side in (left, *others)]
                holds = [
                    getattr(on, _COMPARISONS[type(comparison)])(a, b)
                    for comparison, a, b in zip(comparisons, sides, sides[1:], strict=False)
                ]
                return Dual(functools.reduce(on.logical_and, holds), {})
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition = self.visit(test).value
                a, b = self.visit(body), self.visit(orelse)
                # In the order of the reads, so that the same text always gives the same program.
                keys = sorted(a.partials.keys() | b.partials.keys())
                partials = {
                    key: on.where(condition, a.partials.get(key, 0.0), b.partials.get(key, 0.0)) for key in keys
                }
                return Dual(on.where(condition, a.value, b.value), partials)
            case ast.Call(func=ast.Name(id=name), args=arguments):
                function, inputs = FUNCTIONS[name], [self.visit(argument) for argument in arguments]
                values = [x.value for x in inputs]
                value = function.value(on, *values)
                terms = [
                    (partial(on, *values, value), x.partials)
                    for partial, x in zip(function.partials, inputs, strict=True)
                    if x.partials
                ]
                return Dual(value, _sum(*terms))
            case ast.Subscript(value=ast.Name(id=name)):
                return self._read(name, indices_of(node))
        raise AssertionError(ast.dump(node))

    def _read(self, name: str, nodes: list[ast.expr]) -> Dual:
        number = len(self.reads)
        self.reads.append((name, []))  # its indices may read, too, and come after it in the text
        self.reads[number][1].extend(self.visit(index).value for index in nodes)
        has_partial = self.derivatives and self.captures[name].is_real
        return Dual(self.on.read(*self.reads[number]), {number: 1.0} if has_partial else {})

    def _binary(self, operation: ast.operator, a: Dual, b: Dual) -> Dual:
        on = self.on
        x, y = on.numbers(a.value, b.value)
        match operation:
            case ast.Add():
                return Dual(x + y, _sum((1.0, a.partials), (1.0, b.partials)))
            case ast.Sub():
                return Dual(x - y, _sum((1.0, a.partials), (-1.0, b.partials)))
            case ast.Mult():
                return Dual(x * y, _sum((y, a.partials), (x, b.partials)))
            case ast.Div():
                quotient = on.divide(x, y)
                terms = [(on.divide(1.0, y), a.partials)] if a.partials else []
                terms += [(-on.divide(quotient, y), b.partials)] if b.partials else []
                return Dual(quotient, _sum(*terms))
            case ast.FloorDiv():
                return Dual(on.floor_divide(x, y), {})
            case ast.Mod():
                rounded = on.floor_divide(x, y)
                return Dual(x - rounded * y, _sum((1.0, a.partials), (-rounded, b.partials)))
            case ast.Pow():
                value = on.power(x, y)
                terms = [(y * on.power(x, y - 1), a.partials)] if a.partials else []
                terms += [(value * on.log(x), b.partials)] if b.partials else []
                return Dual(value, _sum(*terms))
        raise AssertionError(ast.dump(operation))


# --- NumPy ----------------------------------------------------------------------------------------


class _NumPy:
    """The arithmetic of arrays, whose reals are of one dtype: NumPy alone makes float64 of float32 and integers."""

    def __init__(self, captured: Mapping[str, Any], dtype: np.dtype) -> None:
        self.captured, self.dtype = captured, dtype

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *values: self._rounded(getattr(np, name)(*values))

    def _rounded(self, x: Any) -> Any:
        return x.astype(self.dtype, copy=False) if x.dtype.kind == "f" else x

    def numbers(self, *values: Any) -> Sequence[Any]:
        arrays = [np.asarray(value) for value in values]
        is_whole = all(array.dtype.kind in "biu" for array in arrays)
        return [array.astype(np.int64 if is_whole else self.dtype, copy=False) for array in arrays]

    def floor_divide(self, a: Any, b: Any) -> Any:
        return np.floor_divide(*self.numbers(a, b))

    def power(self, a: Any, b: Any) -> Any:
        return self._rounded(np.float_power(a, b))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return np.where(condition, *self.numbers(a, b))

    def read(self, name: str, indices: list[Any]) -> Any:
        array, places = self.captured[name], self.places(name, indices)
        # One index is several times as fast as two.
        is_flat = array.flags.c_contiguous
        found = array.reshape(-1).take(flat_index(places, array.shape)) if is_flat else array[places]
        return found.astype(np.int64) if found.dtype.kind in "iu" else found  # few bits soon overflow

    def places(self, name: str, indices: list[Any]) -> tuple[Any, ...]:
        """The indices inside of the array."""
        arrays = map(np.asarray, indices)
        wholes = (x if x.dtype.kind == "i" else np.floor(x).astype(np.int64) for x in arrays)
        return tuple(np.clip(x, 0, size - 1) for x, size in zip(wholes, self.captured[name].shape, strict=True))


def flat_index(places: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    """Numbers, in C order, of elements that have these indices."""
    number: Any = 0
    for place, size in zip(places, shape, strict=True):
        number = number * size + place
    return number


@dataclass(frozen=True, slots=True)
class Evaluated:
    """New scores, their derivative by the old ones, and by each element read: (name, indices, derivative).

    All have the shape and the dtype of the scores; derivatives are views that are not to be written to.
    """

    score: Any
    by_score: Any
    reads: tuple[tuple[str, tuple[Any, ...], Any], ...]


def evaluate(
    expression: Expression,
    score: Any,
    indices: Mapping[str, Any],
    captured: Mapping[str, Any],
    derivatives: bool = True,
) -> Evaluated:
    """Scores after the expression; `indices` are arrays of integers, or integers, that broadcast with `score`.

    An index of an array that is out of bounds is brought to the nearest that is not, as on a GPU. Without derivatives,
    they are 0 and nothing is said of reads.
    """
    on = _NumPy(captured, score.dtype)
    numbers = {name: captured[name] for name, found in expression.captures.items() if found.num_axes is None}
    with np.errstate(all="ignore"):
        run = Evaluator(expression, on, score, {**indices, **numbers}, derivatives)
        reads = enumerate(run.reads) if derivatives else ()

        def whole(x: Any) -> Any:
            return np.broadcast_to(np.asarray(x, score.dtype), score.shape)

        partials = run.result.partials
        return Evaluated(
            whole(run.result.value),
            whole(partials.get(BY_SCORE, 0)),
            tuple((name, on.places(name, where), whole(partials.get(number, 0))) for number, (name, where) in reads),
        )


# --- CUDA C++ -------------------------------------------------------------------------------------

#: The largest constant exponent of powers that are products.
_MAX_MULTIPLIED = 8
#: Kinds of variables, each of which holds what those before it do.
_KINDS = ("bool", "int", "Acc")


@dataclass(frozen=True, slots=True)
class _Variable:
    """A variable of the program."""

    program: _Program
    name: str
    kind: str
    #: Of a whole number that is a sum, a difference or an absolute value: which, and of what.
    parts: tuple[str, tuple[Any, ...]] | None = None

    def __add__(self, other: Any) -> _Variable:
        return self.program.operation("+", self, other)

    def __radd__(self, other: Any) -> _Variable:
        return self.program.operation("+", other, self)

    def __sub__(self, other: Any) -> _Variable:
        return self.program.operation("-", self, other)

    def __rsub__(self, other: Any) -> _Variable:
        return self.program.operation("-", other, self)

    def __mul__(self, other: Any) -> _Variable:
        return self if other == 1.0 and self.kind == "Acc" else self.program.operation("*", self, other)

    def __rmul__(self, other: Any) -> _Variable:
        return self * other

    def __neg__(self) -> _Variable:
        return self.program.let(max("int", self.kind, key=_KINDS.index), f"-{self.name}")


class _Program:
    """The arithmetic that writes a C++ program, a variable per number; equal ones are computed once."""

    def __init__(self, captures: Mapping[str, Captured], names: Mapping[str, str]) -> None:
        self.captures, self.names = captures, names
        self.lines: dict[str, _Variable] = {}

    def let(self, kind: str, text: str, parts: tuple[str, tuple[Any, ...]] | None = None) -> _Variable:
        """The variable that holds what C++ computes by that text."""
        if text not in self.lines:
            self.lines[text] = _Variable(self, f"t{len(self.lines)}", kind, parts)
        return self.lines[text]

    def real(self, number: Any) -> str:
        """A whole number as a real one in C++: sums of others are made anew of real ones, which there are already."""
        if not isinstance(number, _Variable) or number.kind != "int":
            return self.text(number, "Acc")
        if number.name in _REAL_INDICES:
            return _REAL_INDICES[number.name]
        if number.parts is None:
            return f"static_cast<Acc>({number.name})"
        form, operands = number.parts
        return self.let("Acc", form.format(*map(self.real, operands))).name

    def text(self, number: Any, kind: str | None = None) -> str:
        """A number in C++, of a kind if that is asked for."""
        if isinstance(number, _Variable):
            if kind in (None, number.kind):
                return number.name
            return self.real(number) if (kind, number.kind) == ("Acc", "int") else f"static_cast<{kind}>({number.name})"
        if isinstance(number, bool) and kind in (None, "bool"):
            return str(number).lower()
        if isinstance(number, int) and kind in (None, "int") and abs(number) < 1 << 31:
            return f"({int(number)})"
        if math.isinf(number):
            return f"{'-' if number < 0 else ''}static_cast<Acc>(infinity())"
        return f"static_cast<Acc>({float(number)!r})"

    def kind(self, *numbers: Any) -> str:
        """The kind that holds all of them."""
        kinds = {bool: "bool", int: "int", float: "Acc"}
        found = (x.kind if isinstance(x, _Variable) else kinds[type(x)] for x in numbers)
        return max(found, key=_KINDS.index)

    def operation(self, operator: str, a: Any, b: Any) -> _Variable:
        kind = max("int", self.kind(a, b), key=_KINDS.index)
        parts = (f"{{}} {operator} {{}}", (a, b)) if kind == "int" and operator in "+-" else None
        return self.let(kind, f"{self.text(a, kind)} {operator} {self.text(b, kind)}", parts)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in _CUDA_COMPARISONS:
            return functools.partial(self._compare, _CUDA_COMPARISONS[name])
        if name in ("logical_and", "logical_or"):
            return functools.partial(self._logical, "&&" if name == "logical_and" else "||")
        if name in _CUDA_FUNCTIONS:
            return lambda x: self.let("Acc", f"Math::{name}({self.text(x, 'Acc')})")
        raise AttributeError(name)

    def _compare(self, operator: str, a: Any, b: Any) -> _Variable:
        kind = max("int", self.kind(a, b), key=_KINDS.index)
        return self.let("bool", f"{self.text(a, kind)} {operator} {self.text(b, kind)}")

    def _logical(self, operator: str, a: Any, b: Any) -> _Variable:
        return self.let("bool", f"{self.truth(a)} {operator} {self.truth(b)}")

    def truth(self, x: Any) -> str:
        return self.text(x) if self.kind(x) == "bool" else f"({self.text(x)} != 0)"

    def numbers(self, *values: Any) -> Sequence[Any]:
        return values  # operations bring them together

    def logical_not(self, x: Any) -> _Variable:
        return self.let("bool", f"!{self.truth(x)}")

    def abs(self, x: Any) -> _Variable:
        kind = max("int", self.kind(x), key=_KINDS.index)
        parts = ("Math::abs({})", (x,)) if kind == "int" else None
        return self.let(kind, f"Math::abs({self.text(x, kind)})", parts)

    def divide(self, a: Any, b: Any) -> _Variable:
        return self.let("Acc", f"Math::divide({self.text(a, 'Acc')}, {self.text(b, 'Acc')})")

    def floor_divide(self, a: Any, b: Any) -> _Variable:
        kind = max("int", self.kind(a, b), key=_KINDS.index)
        return self.let(kind, f"Math::floor_divide({self.text(a, kind)}, {self.text(b, kind)})")

    def power(self, a: Any, b: Any) -> _Variable:
        if type(b) is int and 0 < b <= _MAX_MULTIPLIED:
            return functools.reduce(operator.mul, [a * 1.0] * b) if b > 1 else a * 1.0
        return self.let("Acc", f"Math::power({self.text(a, 'Acc')}, {self.text(b, 'Acc')})")

    def where(self, condition: Any, a: Any, b: Any) -> _Variable:
        kind = self.kind(a, b)
        return self.let(kind, f"{self.truth(condition)} ? {self.text(a, kind)} : {self.text(b, kind)}")

    def read(self, name: str, indices: list[Any]) -> _Variable:
        kind = "Acc" if self.captures[name].is_real else "int"
        places = ", ".join(self.text(index, "int") for index in indices)
        return self.let(kind, f"{self.names[name]}({places})")


#: What there is as real numbers beside the score.
_REAL_INDICES = {"q_idx": "q_real", "k_idx": "k_real"}
_CUDA_COMPARISONS = {
    "less": "<", "less_equal": "<=", "greater": ">", "greater_equal": ">=", "equal": "==", "not_equal": "!=",
}  # fmt: skip
_CUDA_FUNCTIONS = ("exp", "log", "sqrt", "sin", "cos", "tanh")


@dataclass(frozen=True, slots=True)
class Program:
    """C++ statements that compute an expression, and what holds its results: names of variables, or numbers.

    They expect ``score`` and reals as ``Acc``, integers as ``int``, ``q_idx`` and ``k_idx`` also as ``q_real`` and
    ``k_real`` of ``Acc``, captured numbers by their names, captured arrays as functions of ``int`` indices, and
    ``Math`` with the functions.
    """

    statements: str
    score: str
    by_score: str
    #: Of each read the name of the array, its indices, and the derivative.
    reads: tuple[tuple[str, tuple[str, ...], str], ...]


def to_cuda(expression: Expression, names: Mapping[str, str]) -> Program:
    """The expression as a program, in which what it captures has other names."""
    on = _Program(expression.captures, names)
    numbers = {name: _Variable(on, name, "int") for name in INDICES}
    for name, found in expression.captures.items():
        if found.num_axes is None:
            numbers[name] = _Variable(on, names[name], "Acc" if found.is_real else "int")
    run = Evaluator(expression, on, _Variable(on, "score", "Acc"), numbers)
    partials = run.result.partials
    score, by_score = (on.text(x, "Acc") for x in (run.result.value, partials.get(BY_SCORE, 0.0)))
    reads = tuple(
        (name, tuple(on.text(index, "int") for index in where), on.text(partials.get(number, 0.0), "Acc"))
        for number, (name, where) in enumerate(run.reads)
    )
    # At last, since numbers of another kind are more statements.
    statements = "\n".join(f"{x.kind} const {x.name} = {text};" for text, x in on.lines.items())
    return Program(statements, score, by_score, reads)
