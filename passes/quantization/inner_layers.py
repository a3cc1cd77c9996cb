"""What weights that are read in float are worth on data: the error of the layer that reads each, in a branch too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from regauge.ir.graph import Graph, Node, Parameter
from regauge.ir.running.lockstep import Lockstep, Watcher
from regauge.passes.calibration.layers import layer_of
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import change_of_output
from regauge.passes.quantization.storage import OnData, Plain
from regauge.passes.quantization.weights import RIDGE

Rows: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], torch.Tensor]
"""[rows, columns] that a weight is multiplied with, of the operands and the results of its reader."""

_RECURRENT = ("onnx_lstm", "onnx_gru", "onnx_rnn")


@dataclass(frozen=True)
class _Map:
    """A weight as a matrix whose rows lie on ``axis``, the node that multiplies it, and what with."""

    weight: Parameter
    node: Node
    rows: Rows
    axis: int
    columns: int
    bias: Parameter | None = None


def problems_of(
    graph: Graph, plain: Sequence[Plain], batches: Sequence[Any], *, free: bool = True
) -> Mapping[Parameter, OnData]:
    """The change of what is made with each weight as a function of the weight, if one node alone reads it.

    Layers of one block, and the products within recurrent layers of one direction, whose states are taken as they are
    in float; biases stay unless they are ``free``. What lies in a branch that the data never takes has none, nor has
    anything without batches. Memory: the moments of all of them at once.
    """
    found = {one.weight: own for one in plain if (own := _map(one.weight)) is not None}
    moments = {weight: Moments(own.columns) for weight, own in found.items()}
    if found and batches:
        run = Lockstep(graph, batches)
        readers = dict[Node, list[_Map]]()
        for own in found.values():
            readers.setdefault(own.node, []).append(own)
        run.watch({node: _adding(maps, moments) for node, maps in readers.items()})
        for _ in run.steps():
            pass
    return {weight: _problem(found[weight], own, free) for weight, own in moments.items() if own.rows}


def _map(weight: Parameter) -> _Map | None:
    uses = list(weight.uses)
    if len(uses) != 1:
        return None
    node, slot = uses[0]
    layer = layer_of(node) if slot == 1 else None
    if layer is not None:
        return _Map(weight, node, lambda x, _: layer.rows_of_input(x[0]), layer.made, layer.columns, layer.bias)
    one_way = node.op in _RECURRENT and node.attributes.get("direction", "forward") == "forward"
    if not one_way or slot not in (1, 2) or any(x is not None for x in node.inputs[4:5]):
        return None
    return _Map(weight, node, _states if slot == 2 else _entries, 1, int(weight.shape[2]))


def _entries(operands: Sequence[Any], _: Sequence[Any]) -> torch.Tensor:
    x: torch.Tensor = operands[0]
    return x.reshape(-1, x.shape[-1])


def _states(operands: Sequence[Any], results: Sequence[Any]) -> torch.Tensor:
    """The states that each step starts from: the first one, zeros if not given, and what all steps but the last give.

    y [steps, 1, batch, states], h0 [1, batch, states].
    """
    y: torch.Tensor = results[0][:, 0]
    first = operands[5] if len(operands) > 5 and operands[5] is not None else torch.zeros_like(y[:1])
    return torch.cat([first, y[:-1]]).reshape(-1, y.shape[-1])


def _adding(maps: Sequence[_Map], moments: Mapping[Parameter, Moments]) -> Watcher:
    def watch(_: Node, operands: list[Any], results: tuple[Any, ...]) -> None:
        for own in maps:
            moments[own.weight].add(own.rows(operands, results))

    return watch


def _problem(own: _Map, moments: Moments, free: bool) -> OnData:
    moments.check(own.node.label)
    weight = own.weight.tensor.detach().movedim(own.axis, 0).flatten(1).double()
    bias = torch.zeros(len(weight)).double() if own.bias is None else own.bias.tensor.detach().double()
    problem = change_of_output(moments, weight, bias, RIDGE, free=free and own.bias is not None)
    return OnData(problem, own.axis, own.bias if free else None)
