"""Tables and recurrent layers, whose operator takes a whole weight: as a smaller one, and a linear layer beside it.

    embedding(ids, w)      linear(embedding(ids, small), up)         small: [entries, rank], up: [width, rank]
    lstm(x, h, w, ...)     lstm(linear(x, down), h, up, ...)         down: [rank, inputs], up: [gates, rank]

Of a recurrent layer it is what its first layer reads; two directions share ``down``. With data errors are weighed by
what the squared gradients of the weight sum up to by inputs and by outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.cost import local_figures
from regauge.ir.edit import Builder, record, replace_uses, set_input, set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.losses import labelled
from regauge.passes.calibration.weight_gradients import example_gradients
from regauge.passes.factorization.forms import Choice, ranks_up_to
from regauge.passes.factorization.metric_svd import Factored, factored
from regauge.passes.factorization.problems import places

_STATES = {"lstm": 2, "gru": 1, "rnn": 1}  # operands between the input and the weights
_SMALL = 1e-3  # share of the mean weight of an input, for those that the data does not have


@dataclass(frozen=True)
class Reader:
    """A node and the weights that are factorized together: one, or those of both directions."""

    node: Node
    weights: tuple[Parameter, ...]

    @property
    def name(self) -> str:
        return self.weights[0].name

    @property
    def is_table(self) -> bool:
        return self.node.op == "embedding"

    def matrix(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """[outputs, columns] in double precision, of data of the shapes of the weights."""
        found = tensors[0].t() if self.is_table else torch.cat(list(tensors))
        return found.detach().double()

    def factors(self, squares: torch.Tensor | None) -> Factored:
        """The best factors, with the mean squared gradients [outputs, columns] of the weight or without any."""
        weight = self.matrix([own.tensor for own in self.weights])
        if squares is None:
            return factored(weight)
        by_input, by_output = squares.sum(0) / squares.sum().clamp(min=1e-300), squares.sum(1)
        root = (by_input + _SMALL * by_input.mean() + 1e-30).sqrt()
        found = factored(weight * root, None, (by_output + _SMALL * by_output.mean() + 1e-30).diag())
        return Factored(found.up, found.down / root, found.tail)

    def scale(self, found: Factored, *, on_data: bool) -> float:
        """By which losses are divided: without data they are shares."""
        return 1.0 if on_data else max(float(found.tail[0]), 1e-300)

    def choices(self, graph: Graph, found: Factored, multiple: int, *, on_data: bool) -> list[Choice]:
        """To leave it whole, and the ranks with which it has fewer parameters."""
        outputs, columns = len(found.up), found.down.shape[1]
        whole = local_figures([self.node], graph).macs
        x = self.node.output if self.is_table else self.node.inputs[0]
        assert isinstance(x, Value)
        rows = places(graph, x, -1)
        each = outputs if self.is_table else columns + outputs
        spared = 0 if self.is_table else outputs * columns * rows
        scale = self.scale(found, on_data=on_data)
        return [
            Choice("", (), outputs * columns, whole, 0.0),
            *(
                Choice(
                    "low-rank",
                    (rank,),
                    rank * (outputs + columns),
                    whole - spared + rank * each * rows,
                    float(found.tail[rank]) / scale,
                )
                for rank in ranks_up_to(-(-outputs * columns // (outputs + columns)), multiple)
            ),
        ]

    def set_product(self, graph: Graph, up: torch.Tensor, down: torch.Tensor, *, by: str) -> None:
        """Give the weights what their factors multiply to."""
        product = up @ down
        if self.is_table:
            parts: Sequence[torch.Tensor] = [product.t()]
        else:
            parts = torch.split(product, [int(own.shape[0]) for own in self.weights])
        for own, part in zip(self.weights, parts, strict=True):
            set_weight(graph, own, part.to(own.tensor.dtype).contiguous(), by=by)

    def write(self, graph: Graph, up: torch.Tensor, down: torch.Tensor, *, by: str) -> None:
        """Put the smaller weights and the linear layer in."""
        node, build = self.node, Builder(graph, by=by)
        stem = self.name.rpartition(".")[0]
        prefix = f"{stem}." if stem else ""

        def parameter(name: str, data: torch.Tensor) -> Parameter:
            kept = data.to(self.weights[0].tensor.dtype).contiguous()
            return build.parameter(build.unique(f"{prefix}{name}"), kept, trainable=self.weights[0].trainable)

        with build.at(node):
            if self.is_table:
                small = build.embedding(parameter("table.weight", down.t()), *node.inputs[1:], **node.attributes)
                found = build.linear(small, parameter("up.weight", up), name=node.output.name)
                replace_uses(graph, node.output, found)
            else:
                small = build.linear(node.inputs[0], parameter("down.weight", down))
                set_input(node, 0, small, graph)
                parts = torch.split(up, [int(own.shape[0]) for own in self.weights])
                for own, part in zip(self.weights, parts, strict=True):
                    slot = node.inputs.index(own)
                    set_input(node, slot, parameter(f"{own.name.rpartition('.')[2]}_up", part), graph)
        record(graph, by, f"{self.name}: rank {up.shape[1]}")


def readers_in(graph: Graph) -> list[Reader]:
    """Those of a graph whose weights nothing else reads."""
    found = []
    for node in graph.nodes:
        weights = node.inputs[:1] if node.op == "embedding" else _first_layer(node) if node.op in _STATES else ()
        own = tuple(value for value in weights if isinstance(value, Parameter) and _is_own(value))
        if own and len(own) == len(weights):
            found.append(Reader(node, own))
    return found


def squared_reader_gradients(
    graph: Graph, readers: Sequence[Reader], batches: Sequence[Any], seed: int
) -> Mapping[str, torch.Tensor]:
    """The mean over examples of squared gradients [outputs, columns], by name."""
    parameters = [own for reader in readers for own in reader.weights]
    sums, count = dict[str, torch.Tensor](), 0
    for found in example_gradients(graph, parameters, [labelled(graph, b) for b in batches], None, seed):
        count += 1
        for reader in readers:
            if all(own in found for own in reader.weights):
                square = reader.matrix([found[own] for own in reader.weights]).square()
                sums[reader.name] = sums.get(reader.name, torch.zeros_like(square)) + square
    return {name: total / max(1, count) for name, total in sums.items()}


def _first_layer(node: Node) -> tuple[Any, ...]:
    """What the weights that read the input are, of each direction."""
    start, each = 1 + _STATES[node.op], 4 if node.attributes.get("has_biases", True) else 2
    return tuple(node.inputs[start + each * place] for place in range(2 if node.attributes.get("bidirectional") else 1))


def _is_own(value: Parameter) -> bool:
    floating = isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point
    return value.kind == "parameter" and len(value.uses) == 1 and floating and value.rank == 2
