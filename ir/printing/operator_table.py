"""Prints the operators for ``regauge operators``: a table of all records, and the facts of one."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import accumulate

from regauge.ir.errors import OperatorError
from regauge.ir.operator import Operator, Symmetry, all_operators

_WIDTH = 40
"""Characters of names of one kind that the table of all operators has; the facts of one operator have them all."""


def operator_rows() -> list[list[str]]:
    """Every record: its name, axis rule, and the first of its names in torch and ONNX."""
    rows = [["operator", "axis rule", "torch", "ONNX"]]
    return rows + [
        [name, _rule(record), _first(record.aten), _first(record.onnx)]
        for name, record in sorted(all_operators().items())
    ]


def _first(mapping: Iterable[str]) -> str:
    names = list(mapping)
    fit = max(1, sum(length + place <= _WIDTH for place, length in enumerate(accumulate(map(len, names)))))
    return " ".join(names[:fit]) + (f" and {len(names) - fit} more" if names[fit:] else "")


def described(name: str) -> list[list[list[str]]]:
    """For each record that has a name, in Regauge, torch or ONNX, the rows that describe it; raises OperatorError."""
    found = [record for record in all_operators().values() if name in _names(record)]
    if not found:
        known = sorted({other for record in all_operators().values() for other in _names(record)})
        close = get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`regauge operators` lists them"
        raise OperatorError(f"no operator is called {name}: {hint}")
    return [_facts(record) for record in found]


def _names(record: Operator) -> set[str]:
    overloads = {name.partition(".")[0] for name in record.aten}
    return {record.name, *record.aten, *overloads, *record.onnx}


def _facts(record: Operator) -> list[list[str]]:
    symmetry = record.symmetry.value if isinstance(record.symmetry, Symmetry) else "depends on the node"
    return [
        ["operator", record.name],
        ["operands", ", ".join(record.slots) or "none"],
        ["attributes", ", ".join(record.attributes) or "none"],
        ["axis rule", _rule(record)],
        ["symmetry", symmetry],
        ["costs MACs", "no" if record.macs is None else "yes"],
        ["torch", ", ".join(record.aten) or "none"],
        ["ONNX", ", ".join(record.onnx) or "none"],
        ["new nodes in ONNX", "can be written" if record.in_onnx else "cannot be written"],
    ]


def _rule(record: Operator) -> str:
    """The rule as it is written; of one that is code, what it says of itself, or where it stands."""
    if isinstance(record.rule, str):
        return record.rule
    said = (inspect.getdoc(record.rule) or "").partition("\n")[0]
    return said or f"code in {record.rule.__module__}"
