"""Refitting stacks of LSTM, GRU and plain recurrent layers: of each layer the input map and the recurrent map.

The input map is fitted to what its gates got from the input in the original, X W_ih'; the recurrent map on the
original's own hidden states, of which the cut leaves some columns: H W_hh'. Each has its own bias, so that both are
sound for GRUs too, whose candidate sees the recurrent part through a gate. Fitted so, a layer has not seen how its own
errors come back to it; the new weights are taken where the outputs of the whole stack are nearer with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from regauge.ir.dims.kept import Keep, flat_indices, part_kept, touches
from regauge.ir.graph import Graph, Node, Parameter
from regauge.passes.calibration.moments import Halves
from regauge.passes.pruning.refit import fitted

STATES = {"lstm": 2, "gru": 1, "rnn": 1}
"""How many tensors of state each stack has."""

Weights = list[torch.Tensor]


def refitted_stack(
    original: Graph, keep: Keep, was: Node, node: Node, before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]
) -> dict[Parameter, torch.Tensor] | None:
    """New weights of a stack, where the results are nearer to the original's with them; else None.

    ``before`` and ``now`` are the operands of the stack for each batch: in the original, and as it is fed now.
    """
    states = STATES[node.op]
    parameters = node.inputs[1 + states :]
    own = [value for value in parameters if isinstance(value, Parameter) and len(value.uses) == 1]
    if len(own) != len(parameters):
        return None
    stack = _Stack(original, keep, was, node, states)
    weights = stack.fitted(before, now)
    old = [value.tensor.detach() for value in own]
    with torch.no_grad():
        expected = [stack.kept(stack.run(was, operands, operands[1 + states :]), was) for operands in before]
        errors = [
            sum(_distance(stack.run(node, operands, given), y) for operands, y in zip(now, expected, strict=True))
            for given in (weights, old)
        ]
    return dict(zip(own, weights, strict=True)) if errors[0] < errors[1] else None


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).double().square().sum())


class _Stack:
    def __init__(self, original: Graph, keep: Keep, was: Node, node: Node, states: int) -> None:
        self.original, self.keep, self.was, self.node, self.states = original, keep, was, node, states
        attributes = node.attributes
        self.directions = 2 if attributes["bidirectional"] else 1
        self.each = 4 if attributes["has_biases"] else 2
        self.time = 1 if attributes["batch_first"] else 0

    def run(self, node: Node, operands: Sequence[Any], weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """What a stack gives with these weights: its first result."""
        result: torch.Tensor = node.operator.evaluate(*operands[: 1 + self.states], *weights, **node.attributes)[0]
        return result

    def kept(self, y: torch.Tensor, was: Node) -> torch.Tensor:
        """A result of the original as the cut leaves it."""
        return part_kept(y, self.original.axes.of[was.outputs[0]], self.keep)

    def fitted(self, before: Sequence[Sequence[Any]], now: Sequence[Sequence[Any]]) -> Weights:
        """All weights of the stack, layer by layer; each layer reads what those below it give now."""
        first = 1 + self.states
        weights = [value.tensor.detach() for value in self.node.inputs[first:] if isinstance(value, Parameter)]
        old = [value.tensor.detach() for value in self.was.inputs[first:] if isinstance(value, Parameter)]
        theirs, ours = [operands[0] for operands in before], [operands[0] for operands in now]
        many = self.directions * self.each
        for layer in range(int(self.node.attributes["num_layers"])):
            at = layer * many
            sequences = self._layer(self.was, before, theirs, old[at : at + many], layer)
            for direction in range(self.directions):
                place = at + direction * self.each
                previous = [
                    self._previous(y, operands[1], layer, direction)
                    for y, operands in zip(sequences, before, strict=True)
                ]
                self._map(weights, old, place, 0, ours, theirs)
                kept = self._columns(place + 1)
                self._map(weights, old, place, 1, [h if kept is None else h[..., kept] for h in previous], previous)
            ours = self._layer(self.node, now, ours, weights[at : at + many], layer)
            theirs = sequences
        return weights

    def _layer(self, node: Node, operands: Any, inputs: Any, weights: Weights, layer: int) -> list[torch.Tensor]:
        """What one layer of the stack gives, for each batch."""
        attributes = {**node.attributes, "num_layers": 1}
        part = slice(layer * self.directions, (layer + 1) * self.directions)
        evaluate: Callable[..., Any] = node.operator.evaluate
        with torch.no_grad():
            return [
                evaluate(x, *(state[part] for state in given[1 : 1 + self.states]), *weights, **attributes)[0]
                for x, given in zip(inputs, operands, strict=True)
            ]

    def _previous(self, y: torch.Tensor, start: torch.Tensor, layer: int, direction: int) -> torch.Tensor:
        """The hidden state that each step of a direction starts from."""
        size = y.shape[-1] // self.directions
        own = y[..., direction * size : (direction + 1) * size]
        begin = start[layer * self.directions + direction].unsqueeze(self.time)
        length = own.shape[self.time]
        if direction == 0:
            return torch.cat([begin, own.narrow(self.time, 0, length - 1)], self.time)
        return torch.cat([own.narrow(self.time, 1, length - 1), begin], self.time)

    def _columns(self, place: int) -> torch.Tensor | None:
        return self._indices(place, 1)

    def _indices(self, place: int, axis: int) -> torch.Tensor | None:
        """The indices of an axis of a weight that the cut keeps; None for all."""
        weight = self.was.inputs[1 + self.states + place]
        assert isinstance(weight, Parameter)
        extent = self.original.axes.of[weight][axis]
        return torch.from_numpy(flat_indices(extent, self.keep)) if touches(extent, self.keep) else None

    def _map(self, weights: Weights, old: Weights, place: int, which: int, inputs: Any, wanted: Any) -> None:
        """Fit the input map (0) or the recurrent map (1) whose weights begin at ``place``, in ``weights``."""
        matrix, bias = place + which, place + 2 + which if self.each == 4 else None
        if all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(inputs, wanted, strict=True)):
            return
        rows = self._indices(matrix, 0)
        rows = torch.arange(len(old[matrix])) if rows is None else rows
        moments = Halves(weights[matrix].shape[1], len(rows))
        for x, y in zip(inputs, wanted, strict=True):
            target = y.reshape(-1, y.shape[-1]) @ old[matrix][rows].t()
            moments.add(x.reshape(-1, x.shape[-1]), target if bias is None else target + old[bias][rows])
        moments.check(self.node.label)
        start = torch.zeros(len(rows), dtype=torch.float64) if bias is None else weights[bias].double()
        new = fitted(moments, weights[matrix], start, bias is not None)
        if new is not None:
            weights[matrix] = new[0]
            if bias is not None:
                weights[bias] = new[1].to(weights[bias].dtype)
