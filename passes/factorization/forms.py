"""Forms that a layer may be factorized into; each says which ranks it may have, what they cost and lose, and its links.

low-rank   y = up (down x): of a convolution, one to fewer channels and one of single places behind it; of experts, or
           any stack of matrices, two stacks of one rank
tucker     a convolution between two of single places (:mod:`regauge.passes.factorization.separated`)
tucker-1   a convolution of single places to fewer channels, then one of several (on outputs this is low-rank)
columns    a convolution along the first axis of the kernel, then one along the second
rows       the other way round
cp, tt     along one axis after the other (:mod:`regauge.passes.factorization.tensor_convs`)

Of a layer of several blocks each has the same ranks (:mod:`regauge.passes.factorization.blocks`): a depthwise kernel as
columns of rank 1 is separable.

Of linear layers there are structured ones besides (:mod:`regauge.passes.factorization.structured`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.chains import Link
from regauge.passes.factorization.problems import Problem, places

_MOST_RANKS = 48  # that are weighed for a layer


@dataclass(frozen=True)
class Choice:
    """A form and its ranks, what the links cost with them, and what they lose.

    ``axes`` are the sizes of the axes that the features are split into, where the form splits them, and ``order`` that
    in which those of the outputs come, where this is free.
    """

    form: str
    ranks: tuple[int, ...]
    parameters: int
    macs: int
    loss: float
    axes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the links are determined by."""
        return self.ranks + self.axes + self.order


class Form(Protocol):
    """One way to factorize a layer."""

    @property
    def name(self) -> str: ...

    def misfit(self, layer: Layer) -> str | None:
        """Why a layer cannot be factorized so; None where it can."""

    def choices(self, problem: Problem, graph: Graph, multiple: int) -> list[Choice]:
        """The ranks, multiples of a number, with which the layer has fewer parameters or multiplications."""

    def lossless(self, layer: Layer) -> list[tuple[int, ...]]:
        """The numbers of choices with which nothing is lost, whatever the weight; they need not save anything."""

    def links(self, problem: Problem, ranks: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
        """The links with the numbers of a choice, and the matrix [outputs, columns] that they multiply by."""


class LowRank:
    """Two links: the best directions of what the layer gives, in the metrics of the problem."""

    name = "low-rank"

    def misfit(self, layer: Layer) -> str | None:
        return None

    def choices(self, problem: Problem, graph: Graph, multiple: int) -> list[Choice]:
        layer, found = problem.layer, problem.factored
        each = layer.outputs + layer.columns
        channels = 1 if layer.node.op in ("conv", "conv_transpose") else -1
        behind = places(graph, layer.node.output, channels)
        x = layer.node.inputs[0]
        assert isinstance(x, Value)
        first = places(graph, x, channels) if layer.node.op == "conv_transpose" else behind
        macs = layer.columns * first + layer.outputs * behind
        if layer.node.op in ("matmul", "grouped_mm"):  # whose blocks have rows of their own
            macs = -(-macs // layer.blocks)
        return [
            Choice(self.name, (rank,), rank * each, rank * macs, float(found.tail[rank]) / problem.scale)
            for rank in ranks_up_to(layer.outputs * layer.columns // each, multiple)
        ]

    def lossless(self, layer: Layer) -> list[tuple[int, ...]]:
        return [(min(layer.outputs, layer.columns),)]

    def links(self, problem: Problem, ranks: Sequence[int]) -> tuple[list[Link], torch.Tensor]:
        (rank,) = ranks
        layer, node = problem.layer, problem.layer.node
        up, down = problem.factored.of_rank(rank)
        if node.op == "linear":
            return [Link("down", "linear", down), Link("up", "linear", up)], up @ down
        if node.op in ("matmul", "grouped_mm"):
            return [Link("down", node.op, down.t()), Link("up", node.op, up.t())], up @ down
        kernel = [int(size) for size in layer.weight.shape[2:]]
        channels = layer.columns // layer.taps
        if node.op == "conv":
            first = down.reshape(rank, channels, *kernel)
        else:
            first = down.reshape(rank, channels, *kernel).transpose(0, 1)
        last = up.reshape(layer.outputs, rank, *(1 for _ in kernel))
        links = [
            Link("down", node.op, first, {**node.attributes, "groups": 1}),
            Link("up", "conv", last, single_places(len(kernel))),
        ]
        return links, up @ down


def ranks_up_to(limit: int, multiple: int) -> list[int]:
    """Multiples of a number, below a limit, thinned out evenly where there are many."""
    found = list(range(multiple, limit, multiple)) or ([1] if limit > 1 else [])
    if len(found) > _MOST_RANKS:
        found = [found[round(place * (len(found) - 1) / (_MOST_RANKS - 1))] for place in range(_MOST_RANKS)]
    return found


def single_places(rank: int) -> dict[str, object]:
    """The attributes of a convolution of single places."""
    return {"stride": (1,) * rank, "padding": (0,) * rank, "dilation": (1,) * rank, "groups": 1}


def kernel_sizes(layer: Layer) -> list[int]:
    """Of a convolution the channels that a block reads, and the axes of the kernel."""
    return [layer.columns // layer.taps, *(int(size) for size in layer.weight.shape[2:])]
