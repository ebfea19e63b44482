"""Expressions that change scores, bound to what they capture, for tests below the public functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cuflash import ScoreMod
from cuflash.expression import Bound, Captured, Expression


def bound(values: Mapping[str, Any], kinds: Mapping[str, Captured], *texts: str) -> Bound:
    """Expressions one after the other, each with those of the values that it names."""
    first, *others = (Expression(text, {name: kind for name, kind in kinds.items() if name in text}) for text in texts)
    both = Bound(first, {name: values[name] for name in first.captures})
    for other in others:
        expression, names = both.expression.then(other)
        both = Bound(expression, {**both.values, **{names[name]: values[name] for name in other.captures}})
    return both


def bound_of(mod: ScoreMod) -> Bound:
    """What the reference takes for what ``attention`` takes."""
    return Bound(mod.expression, {**mod.arrays, **mod.numbers})
