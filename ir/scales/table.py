"""The scale variables of a graph as a table: who shares each, what state it is in and why, what moves with it."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from regauge.ir.graph import Parameter
from regauge.ir.scales.variables import Scales, ScaleVariable, cell_name

MAX_LISTED = 4  # names in one cell of the table


def scale_rows(scales: Scales, *, everything: bool = False) -> list[list[str]]:
    """A header and one row per variable; those of weights alone only where ``everything`` is asked for."""
    rows = [["scale", "state", "shared by", "why, or what takes it up", "a vector along"]]
    for variable in scales.variables:
        if everything or not variable.of_weights:
            along = [f"{dim.name} ({dim.size})" for dim in scales.along(variable)]
            rows.append([variable.name, variable.state, _sharing(variable), _why(variable), _listed(along)])
    return rows


def scale_counts(scales: Scales) -> str:
    """How many variables of activations are in each state: ``4 moves, 2 fixed``."""
    states = Counter(variable.state for variable in scales.variables if not variable.of_weights)
    return ", ".join(f"{count} {state}" for state, count in states.most_common())


def _sharing(variable: ScaleVariable) -> str:
    first = variable.first
    return _listed([_power(cell_name(cell), power / first[1]) for cell, power in variable.parts if cell != first[0]])


def _why(variable: ScaleVariable) -> str:
    if variable.state != "moves":
        return _listed(variable.reasons, "; ")
    first = variable.first[1]
    weights = [_power(cell_name(c), p / first) for c, p in variable.parts if isinstance(c.value, Parameter)]
    others = [_power(other.name, power * other.first[1] / first) for other, power in variable.follows]
    return _listed(weights + others) or "other scales that move"


def _power(name: str, power: Fraction) -> str:
    """``name``, or ``name^-1`` for one that is divided by what the variable is multiplied by."""
    return name if power == 1 else f"{name}^{power}"


def _listed(names: list[str], gap: str = ", ") -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return gap.join(names[:MAX_LISTED]) + more
