"""Masks that are computed of positions: where they say no more than the order of these, attention is causal.

    attention(q, k, v, arange(n) <= unsqueeze(arange(n)))             ->     attention(q, k, v, is_causal=True)
    attention(q, k, v, where(tril(ones(n, n)), 0, -inf))              ->     attention(q, k, v, is_causal=True)
    attention(q, k, v, arange(n) <= unsqueeze(arange(past, n)))       ->     the same with lower_right=True

Positions are affine, ``index + start``, and so is what compares them: column <= row + offset. With the offset 0, or
that of queries which are the last positions behind a cache, no mask has to be read, and what it hides is skipped
(:func:`regauge.ir.fusion.attention.causal_bound`). One mask may be that of many layers: a kernel of each knows it by
itself. Tables of truth values, as models keep them, are looked through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from regauge.ir.edit import Builder, remove_dead, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.sizes.expressions import Size, is_static, same

ATTENTIONS = ("attention", "capped_attention")
LARGEST = 2**24
"""Entries of a table that are compared with what a causal mask has."""
COUNTING = (torch.int32, torch.int64)
"""Types that tell all positions apart."""


@dataclass(frozen=True)
class Order:
    """Where ``column <= row + offset``, or with ``reverse`` where it is not."""

    offset: Size
    reverse: bool = False

    @property
    def turned(self) -> Order:
        return replace(self, reverse=not self.reverse)


def mark_causal(graph: Graph) -> int:
    """Let attention be causal whose mask says just that; returns how many nodes were changed. Masks that nothing else
    reads go."""
    written = {state.before for state in graph.states}
    found = {
        node: order
        for node in graph.nodes
        if node.op in ATTENTIONS and (order := _causal(node)) and written.isdisjoint(_read_for(node.inputs[3]))
    }
    for node, order in found.items():
        attributes = {**node.attributes, **order}
        build = Builder(graph)
        with build.at(node):
            causal: Value = build(node.op, *node.inputs[:3], **attributes)
        replace_uses(graph, node.output, causal)
        for part in graph.nested():
            part.outputs = [causal if output is node.output else output for output in part.outputs]
        build.release([causal.name, node.output.name])
        causal.name, node.output.name = node.output.name, causal.name
        remove_node(graph, node)
    if found:
        remove_dead(graph)
    return len(found)


def _causal(node: Node) -> dict[str, bool] | None:
    """The attributes that say what the mask of a node says; None where it says more."""
    if len(node.inputs) != 4 or not isinstance(node.inputs[3], Value):
        return None
    mask = node.inputs[3]
    if not mask.ranked or mask.rank < 2:
        return None
    query, key = (value for value in node.inputs[:2] if isinstance(value, Value))
    leading = zip(reversed(mask.shape[:-2]), reversed(query.shape[:-2]), strict=False)
    if mask.rank > query.rank or any(not same(size, 1) and not same(size, own) for size, own in leading):
        return None  # the result has an axis of the mask
    if not same(mask.shape[-2], query.shape[-2]) or not same(mask.shape[-1], key.shape[-2]):
        return None  # it is repeated along positions
    order = _order(mask) if mask.dtype == torch.bool else _added(mask)
    if order is None or order.reverse:
        return None
    if node.attributes["is_causal"]:
        implied = is_static(order.offset) and int(order.offset) >= 0 and not node.attributes["lower_right"]
        return {"is_causal": True} if implied else None
    if same(order.offset, 0):
        return {"is_causal": True}
    last = same(order.offset, key.shape[-2] - query.shape[-2])
    return {"is_causal": True, "lower_right": True} if last else None


def _read_for(value: Operand) -> set[Value]:
    """The value and all that it is computed of: buffers that a run writes hold something else in the next one."""
    found, left = set[Value](), [value]
    while left:
        one = left.pop()
        if isinstance(one, Value) and one not in found:
            found.add(one)
            left.extend(() if one.producer is None else one.producer.inputs)
    return found


# -- truth values ------------------------------------------------------------------------------------------------------


def _order(value: Operand) -> Order | None:
    """The order of positions that a value of two axes says, true or not zero where it holds; None where it is more."""
    if isinstance(value, Parameter):
        return _of_table(value, 1.0, 0.0)
    node = value.producer if isinstance(value, Value) else None
    if node is None:
        return None
    first, second = (*node.inputs, None, None)[:2]
    if node.op in COMPARED:
        if _number(second) == 0 and node.op in ("ne", "eq"):
            order = _order(first) if _has_positions_of(first, node.output) else None
            return order if order is None or node.op == "ne" else order.turned
        return COMPARED[node.op](first, second)
    if node.op == "logical_not":
        order = _order(first)
        return order and order.turned
    if node.op in ("tril", "triu"):
        number = _number(first)
        return _of_triangle(node) if number and 1 <= abs(number) < 128 else None  # an integer of any type is not zero
    if node.op == "cast" or _keeps_positions(node):
        return _shifted(_order(first), node)
    return None


def _shifted(order: Order | None, node: Node) -> Order | None:
    """The order of a result of the order of its operand, where it is a slice that begins at another position."""
    if order is None or node.op != "slice":
        return order
    x, start = node.inputs[0], node.attributes["start"]
    assert isinstance(x, Value)
    behind = {x.rank - 2: start, x.rank - 1: -start}.get(node.attributes["dim"] % x.rank, 0)
    return replace(order, offset=order.offset + behind)


def _of_triangle(node: Node) -> Order:
    diagonal = node.attributes["diagonal"]
    return Order(diagonal) if node.op == "tril" else Order(diagonal - 1, reverse=True)


def _keeps_positions(node: Node) -> bool:
    """Whether a node hands on the last two axes of its operand, or neighbouring positions of these."""
    x = node.inputs[0] if node.inputs else None
    if not isinstance(x, Value) or not x.ranked or x.rank < 2 or len(node.outputs) != 1:
        return False
    if node.op == "slice":
        return bool(node.attributes["step"] == 1)
    views = ("reshape", "unsqueeze", "expand", "identity")
    return node.op in views and all(map(same, x.shape[-2:], node.output.shape[-2:]))


def _has_positions_of(part: Operand, whole: Value) -> bool:
    """Whether an operand has both axes of positions of a result, and is not repeated along one."""
    return isinstance(part, Value) and part.rank >= 2 and all(map(same, part.shape[-2:], whole.shape[-2:]))


def _not_above(left: Operand, right: Operand, strictly: int) -> Order | None:
    """left <= right, or left < right, of positions along the last two axes."""
    first, second = _position(left), _position(right)
    if first is None or second is None or {first[0], second[0]} != {1, 2}:
        return None
    difference = second[1] - first[1]
    if first[0] == 1:  # column + first <= row + second
        return Order(difference - strictly)
    return Order(-difference - 1 + strictly, reverse=True)  # not column + second < row + first


COMPARED: Mapping[str, Callable[[Operand, Operand], Order | None]] = {
    "le": lambda x, y: _not_above(x, y, 0),
    "lt": lambda x, y: _not_above(x, y, 1),
    "ge": lambda x, y: _not_above(y, x, 0),
    "gt": lambda x, y: _not_above(y, x, 1),
    "ne": lambda x, y: None,
    "eq": lambda x, y: None,
}


def _position(value: Operand) -> tuple[int, Size] | None:
    """Along which axis, counted from the last one, a value is a position, and the first one."""
    node = value.producer if isinstance(value, Value) else None
    if node is None or not isinstance(value, Value) or len(node.outputs) != 1:
        return None
    if node.op == "arange":
        start, step = node.attributes["start"], node.attributes["step"]
        exact = node.output.dtype in (*COUNTING, torch.float32, torch.float64)
        return (1, start) if step == 1 and exact and not same(node.output.shape[0], 1) else None
    x = node.inputs[0] if node.inputs else None
    if not isinstance(x, Value):
        return None
    found = _position(x)
    if found is None:
        return None
    axis, start = found
    if node.op in ("add", "sub") and (number := _number(node.inputs[1])) is not None and number.is_integer():
        return axis, start + int(number) * (1 if node.op == "add" else -1)
    if node.op == "cast" and node.output.dtype in COUNTING:
        return found
    if node.op == "expand":
        return found
    if node.op in ("reshape", "unsqueeze"):
        long = [place for place, size in enumerate(reversed(value.shape), 1) if not same(size, 1)]
        return (long[0], start) if len(long) == 1 and same(value.shape[-long[0]], x.shape[-axis]) else None
    return None


# -- what is added -----------------------------------------------------------------------------------------------------


def _added(value: Operand) -> Order | None:
    """The order where zero is added to scores, and elsewhere what leaves nothing of them."""
    if isinstance(value, Parameter):
        return _of_table(value, 0.0, None)
    node = value.producer if isinstance(value, Value) else None
    if node is None:
        return None
    if node.op == "triu" and _hides(_number(node.inputs[0]), node.output):
        return _of_triangle(node).turned
    if node.op == "where":
        order, (first, second) = _order(node.inputs[0]), map(_number, node.inputs[1:])
        if order is None or not _has_positions_of(node.inputs[0], node.output):
            return None
        shown, hidden = (second, first) if order.reverse else (first, second)
        return Order(order.offset) if shown == 0 and _hides(hidden, node.output) else None
    if node.op == "cast" and _keeps_lowest(node) or _keeps_positions(node):
        return _shifted(_added(node.inputs[0]), node)
    return None


def _keeps_lowest(node: Node) -> bool:
    x = node.inputs[0]
    return isinstance(x, Value) and x.dtype == node.output.dtype


def _hides(number: float | None, mask: Value) -> bool:
    """Whether nothing of a weight is left where this is added: minus infinity, or the least number of the type."""
    if number is None or not isinstance(mask.dtype, torch.dtype) or not mask.dtype.is_floating_point:
        return False
    return number == -math.inf or number == torch.finfo(mask.dtype).min


def _number(value: Operand) -> float | None:
    """The one number that an operand holds everywhere; None where it is not known."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, Parameter):
        return float(value.tensor) if value.kind != "parameter" and value.tensor.numel() == 1 else None
    node = value.producer if isinstance(value, Value) else None
    if node is None:
        return None
    if node.op == "full":
        number = node.attributes["value"]
        return float(number) if isinstance(number, bool | int | float) else None
    views = ("reshape", "unsqueeze", "expand", "cast", "slice")
    number = _number(node.inputs[0]) if node.op in views and node.inputs else None
    if node.op == "cast" and number is not None and not number.is_integer() and math.isfinite(number):
        return number if node.output.dtype in (torch.float32, torch.float64) else None
    return number


def _of_table(table: Parameter, shown: float, hidden: float | None) -> Order | None:
    """The order that a table of a model states; ``hidden`` None is what hides a score."""
    if table.kind == "parameter" or table.rank < 2 or not all(size == 1 for size in table.shape[:-2]):
        return None
    tensor = table.tensor.reshape(table.tensor.shape[-2:])
    if tensor.numel() > LARGEST or min(tensor.shape) < 2:
        return None
    rows, columns = tensor.shape
    for offset in dict.fromkeys((0, max(columns - rows, 0))):
        below = torch.ones(tensor.shape, dtype=torch.bool).tril(offset)
        above = tensor[~below].double()
        lowest = hidden if hidden is not None else float(above[0]) if above.numel() else -math.inf
        seen = bool((tensor[below].double() == shown).all()) and bool((above == lowest).all())
        if seen and (hidden is not None or _hides(lowest, table)):
            return Order(offset)
    return None
