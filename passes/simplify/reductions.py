"""Reductions that are written as several steps.

sqrt(sum(x * x, dims))    vector_norm(x, dims=dims)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import randn

from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.rewrite import RuleSet, differs, rule


def _root_of_squares(op: Any, x: Any, dims: Any, keepdim: Any) -> Any:
    squares = op.either(op.mul(x, x), op.pow(x, 2))
    total = op.sum(squares, dims=dims, keepdim=keepdim)
    return op.either(op.sqrt(total), op.pow(total, 0.5))


def _samples() -> Iterator[dict[str, Any]]:
    x = randn(2, 3, 4).double()
    yield {"x": x, "dims": (-1,), "keepdim": True}
    yield {"x": x, "dims": (0, 2), "keepdim": False}
    yield {"x": x, "dims": None, "keepdim": False}


@rule(_root_of_squares, samples=_samples)
def root_of_squares(build: Builder, x: Value, dims: Any, keepdim: bool, match: Match) -> Value:
    """The root of a sum of squares is a norm."""
    if not is_real(x.dtype):
        return differs("its numbers are not real")
    known = [(match.roots[0].shape, x.dtype)]  # torch would load its compiler to infer it
    return build("vector_norm", x, results=known, ord=2, dims=dims, keepdim=keepdim)  # type: ignore[no-any-return]


RULES = RuleSet([root_of_squares])
