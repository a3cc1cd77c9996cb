"""Operators of a user's own, registered for the length of a test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from regauge.ir import operator as registry
from regauge.ir.operator import Operator, Sample, register_operator


@contextmanager
def registered(evaluate: Callable[..., Any], rule: Any, *samples: Sample, **fields: Any) -> Iterator[str]:
    """Register a function under its own name; afterwards the registry is as it was."""
    tables: list[dict[Any, Any]] = [registry._BY_NAME, registry._BY_ATEN, registry._BY_ONNX]
    registry.all_operators()  # loads what is built in, which must stay
    before = [dict(table) for table in tables]
    drawn = (lambda: list(samples)) if samples else None
    try:
        yield register_operator(
            Operator(name=evaluate.__name__, evaluate=evaluate, rule=rule, samples=drawn, **fields)
        ).name
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
