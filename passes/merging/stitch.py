"""``stitch``: the front of one network and the back of another, joined by a linear map that data tells.

SN-Net (Pan et al. 2023): M = least squares of what the back would have got by what the front gives. Beyond the paper M
has an intercept, a column of ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch

from regauge.ir.dims.extents import leaves
from regauge.ir.edit import Builder, record, remove_dead
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.sizes.expressions import replaced
from regauge.passes.base import Context
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.calibration.moments import Moments

_SAME = 1e-10  # singular values below this share of the largest are none


def stitch(front: Graph, back: Graph, at: tuple[str, str], data: Iterable[Any]) -> Graph:
    """``front`` up to its value ``at[0]``, a layer of its own, and what ``back`` makes of its value ``at[1]``.

    ``data`` are batches that both networks take; the layer gives the nearest to what ``back`` has at ``at[1]``. The two
    values have one shape but for their channels: the axis that weights run along. Names of the parts begin with
    ``front.``, ``stitch.`` and ``back.``. Raises GraphError for values of other shapes, and for inputs of ``back`` that
    ``front`` does not have, where something behind ``at[1]`` reads them.
    """
    a, b = front.find(at[0]), back.find(at[1])
    axis = _channels(front, a)
    if a.rank != b.rank or _channels(back, b) != axis:
        raise GraphError(f"{a} and {b} cannot be joined: they have other axes, or channels on another one")
    weight, bias = _least_squares(front, back, a, b, axis, data)
    result, mapping = Graph(name="stitched", symbols=dict(front.symbols)), dict[Value, Value]()
    build = Builder(result, by="stitch")
    for value in front.inputs:
        mapping[value] = build.input(value.name, value.shape, value.dtype)
    _append(build, front, [a], mapping, "front")
    build.scope = (("", "Stitched"), ("stitch", "Linear" if axis == a.rank - 1 else "Conv"))
    kernel = weight.reshape(*weight.shape, *(1 for _ in range(0 if axis == a.rank - 1 else a.rank - axis - 1)))
    dtype = b.dtype
    assert isinstance(dtype, torch.dtype)
    given = [build.parameter(f"stitch.{n}", t.to(dtype)) for n, t in (("weight", kernel), ("bias", bias))]
    joined = build.linear(mapping[a], *given) if axis == a.rank - 1 else build.conv(mapping[a], *given)
    for value in back.inputs:
        same = next((own for own in result.inputs if own.name == value.name), None)
        if same is not None:
            mapping[value] = same
    mapping[b] = joined
    outputs = [output for output in back.outputs if isinstance(output, Value)]
    _append(build, back, outputs, mapping, "back")
    result.outputs = [mapping[output] if isinstance(output, Value) else output for output in back.outputs]
    remove_dead(result)
    record(result, "stitch", f"{front.name} up to {a.name}, {back.name} from {b.name}")
    return result


def _channels(graph: Graph, value: Value) -> int:
    """The axis that most weights run along."""
    counts = []
    for extent in graph.axes.axes(value):
        groups = [graph.axes.groups[dim] for dim in leaves(extent) if dim in graph.axes.groups]
        counts.append(sum(len(group.members) for group in groups))
    if not counts or not max(counts):
        raise GraphError(f"{value} has no axis of channels: name a value that layers give")
    return counts.index(max(counts))


def _least_squares(
    front: Graph, back: Graph, a: Value, b: Value, axis: int, data: Iterable[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [channels of b, channels of a] and bias, in double precision."""
    moments: Moments | None = None
    for batch in calibration_batches(front, Context(data=data)):
        x, y = (_rows(graph, value, axis, batch) for graph, value in ((front, a), (back, b)))
        if len(x) != len(y):
            raise GraphError(f"{a} and {b} have different numbers of places: {len(x)} and {len(y)} in a batch")
        moments = moments or Moments(x.shape[1], y.shape[1])
        moments.add(x, y)
    assert moments is not None
    moments.check(a.name)
    solved = moments.cross @ torch.linalg.pinv(moments.gram, rtol=_SAME, hermitian=True)
    return solved[:, :-1], solved[:, -1]


def _rows(graph: Graph, value: Value, axis: int, batch: Any) -> torch.Tensor:
    """What a value is in a run, [places, channels]."""
    found: list[torch.Tensor] = []

    def keep(node: Node, results: tuple[Any, ...]) -> None:
        if value.producer is node:
            found.append(results[value.index])

    graph.run(batch, hook=keep)
    if not found:
        raise GraphError(f"{value} is not computed in graph {graph.name!r}: name the result of a node")
    return found[0].movedim(axis, -1).flatten(0, -2)


def _append(build: Builder, graph: Graph, wanted: list[Value], mapping: dict[Value, Value], prefix: str) -> None:
    """Copy what ``wanted`` values need, but for what is mapped already; names and modules lie below ``prefix``."""
    symbols: dict[sympy.Symbol, Any] = {}
    for old, new in mapping.items():
        symbols |= {s: t for s, t in zip(old.shape, new.shape, strict=True) if isinstance(s, sympy.Symbol)}
    for node in _needed(wanted, mapping):
        if node.regions:
            raise GraphError(f"{node.label} has branches or a loop: it cannot be taken over")
        for _, value in node.operands():
            if isinstance(value, Parameter) and value not in mapping:
                mapping[value] = build.parameter(
                    build.unique(f"{prefix}.{value.name}"), value.weight, value.kind, trainable=value.trainable
                )
            if value not in mapping:
                raise GraphError(
                    f"{node.label} reads the input {value.name} of graph {graph.name!r}, which is not there"
                )
        root, *inner = node.scope or (("", graph.name),)
        build.scope = (("", "Stitched"), (prefix, root[1]), *((f"{prefix}.{path}", kind) for path, kind in inner))
        operands = [mapping[o] if isinstance(o, Value) else _renamed(o, symbols) for o in node.inputs]
        attributes = {name: _renamed(given, symbols) for name, given in node.attributes.items()}
        shapes = [(_renamed(value.shape, symbols), value.dtype) for value in node.outputs]
        made = build(node.op, *operands, name=node.name, results=shapes, **attributes)
        mapping.update(zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=True))


def _renamed(sizes: Any, symbols: dict[sympy.Symbol, Any]) -> Any:
    """Sizes, also nested ones, with those of one graph in the place of the other's."""
    return tuple(_renamed(s, symbols) for s in sizes) if isinstance(sizes, tuple) else replaced(sizes, symbols)


def _needed(wanted: list[Value], known: dict[Value, Value]) -> list[Node]:
    """The nodes that compute some values from known ones, in order."""
    found: dict[Node, None] = {}
    stack: list[tuple[Value, bool]] = [(value, False) for value in reversed(wanted)]
    while stack:
        value, ready = stack.pop()
        node = value.producer
        if node is None or node in found or value in known:
            continue
        if ready:
            found[node] = None
            continue
        stack.append((value, True))
        stack += [(operand, False) for _, operand in reversed(list(node.operands()))]
    return list(found)
