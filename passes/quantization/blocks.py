"""A graph cut into blocks of layers, each of which can be run by itself.

A block ends where one value alone, of all that depend on the layers, is still to be read: it is a residual branch with
the sum behind it, or a layer with the activation behind it (blocks as in Li et al. 2021, BRECQ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.interpret import Interpreter
from regauge.passes.calibration.layers import Layer


def ends_of_blocks(graph: Graph, layers: Sequence[Layer]) -> list[int]:
    """The place of the last node of each block; blocks without a layer go with what is in front of them."""
    place = {node: step for step, node in enumerate(graph.nodes)}
    own, ends = {layer.node for layer in layers}, list[int]()
    depends, live = set[Value](), dict[Value, int]()  # the last place that reads a value
    held = True  # whether the segment has a layer, or is the first
    for step, node in enumerate(graph.nodes):
        held = held or node in own
        if node in own or any(value in depends for _, value in node.operands()):
            depends.update(node.outputs)
            last = {
                value: max((place[user] for user in value.consumers() if user in place), default=-1)
                for value in node.outputs
            }
            live |= last
        live = {value: reader for value, reader in live.items() if reader > step}
        if len(live) <= 1:
            if held or not ends:
                ends.append(step)
            else:
                ends[-1] = step
            held = False
    return ends


class Block:
    """Some nodes of a graph in a row: the values that they ``read`` from outside, and those that they give."""

    def __init__(self, graph: Graph, nodes: Sequence[Node], layers: Sequence[Layer], bindings: Sequence[Any]) -> None:
        self.graph, self.nodes, self.layers, self.bindings = graph, nodes, layers, bindings
        made = {value for node in nodes for value in node.outputs}
        operands = (value for node in nodes for _, value in node.operands())
        self.read = [v for v in dict.fromkeys(operands) if v not in made and not isinstance(v, Parameter)]
        inside = set(nodes)
        self.gives = [
            (place, slot)
            for place, node in enumerate(nodes)
            for slot, value in enumerate(node.outputs)
            if value in graph.outputs or any(user not in inside for user in value.consumers())
        ]

    def run(self, given: Sequence[torch.Tensor], place: int, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """What it gives where it reads ``given``, values of the batch at ``place``, and has these weights."""
        interpreter, bindings = Interpreter(self.graph, weights=weights), self.bindings[place]
        environment: dict[Value, Any] = dict(zip(self.read, given, strict=True))
        for node in self.nodes:
            environment.update(zip(node.outputs, interpreter.run_node(node, environment, bindings), strict=True))
        return [environment[self.nodes[place].outputs[slot]] for place, slot in self.gives]
