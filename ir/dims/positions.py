"""Pins for Dims that count positions rather than features: looked-up entries and learned tokens.

Removing a feature is setting weights to zero, because whatever reads it multiplies it by weights of its own. Nothing
does so for a token: it goes through biases on its way into a softmax or a mean over all tokens, so that no weights make
the network behave as if it were not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regauge.ir.dims.extents import Dim, leaves, pin
from regauge.ir.dtypes import is_real
from regauge.ir.graph import Node, Parameter, Value

if TYPE_CHECKING:
    from regauge.ir.dims.axes import Analysis

_BY_WEIGHTS = {"produce", "contract"}


def pin_positions(analysis: Analysis) -> None:
    """Pin positions of integer tables that no weight has, and tokens that are averaged or compared with each other."""
    held = analysis.held
    for dim, group in analysis.groups.items():
        if dim not in held:
            for table in {member.parameter: None for member in group.members if not is_real(member.parameter.dtype)}:
                pin(dim, "it counts positions of a table, and no weight has it", table.name)
    over_all = _dims_over_all(analysis)
    candidates = {dim for dim in over_all if dim in held and not dim.pins}
    if candidates:
        for dim in _not_weighed(analysis, candidates):
            pin(dim, "it counts learned entries, which no weight reads one by one", over_all[dim].label)


def _dims_over_all(analysis: Analysis) -> dict[Dim, Node]:
    """Dims that some node normalises or reduces over, with that node."""
    return {dim: node for node, role, dims in analysis.ends if role != "contract" for dim in dims}


def _not_weighed(analysis: Analysis, candidates: set[Dim]) -> set[Dim]:
    """The candidates that no weight produces or contracts: no parameter, nor what is computed of parameters alone."""
    left = set(candidates)
    still: set[Value] = set()
    for node, call in analysis.calls.items():
        operands = [operand for operand in node.inputs if isinstance(operand, Value)]
        weights = [operand for operand in operands if isinstance(operand, Parameter) or operand in still]
        if not weights:
            continue
        if len(weights) == len(operands):
            still.update(node.outputs)
        reached = {d for role, extent in call.roles if role in _BY_WEIGHTS for d in leaves(extent) if d in left}
        if reached:
            left -= reached.intersection(d for w in weights for extent in analysis.of[w] for d in leaves(extent))
        if not left:
            break
    return left
