"""Bonds in their singular form: inner axes with a free basis, balanced between what writes and what reads them.

    y = R' W x    over a bond h = W x    ->    W W' = R R' = diag(s)    the singular values of R' W, the greatest first

In the metric of data the two sides are second moments: of what is contracted over the bond, where that is computed
(h, or queries and keys), else of the weights (:func:`contracted`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from regauge.ir.dims.extents import leaves
from regauge.ir.dtypes import is_real
from regauge.ir.edit import record, set_weight
from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import Frame
from regauge.ir.gauge.insertion import rotating, within
from regauge.ir.gauge.links import Place
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.lockstep import Lockstep

_FLOOR = 1e-12  # of the mean entry of a diagonal: directions in which nothing is written or read stay invertible

Moments: TypeAlias = dict[tuple[Frame, int], torch.Tensor]
"""Second moments [majors, size, size] of what takes a frame's map (1), and of what takes its inverse transpose (-1)."""


def is_bond(frame: Frame, left: Counter[str]) -> bool:
    """Whether a frame takes every map, and each of its weights stands on one side of it; else ``left`` says why not."""
    if Gauge.GENERAL not in frame.gauge:
        return False
    if not all(is_real(side.parameter.dtype) for side in (*frame.writers, *frame.readers)):
        left["a weight beside a bond is not real"] += 1
        return False
    written = {side.parameter: side.axis for side in frame.writers}
    if any(written.get(side.parameter, side.axis) != side.axis for side in frame.readers):
        left["one weight both reads and writes a bond"] += 1
        return False
    return True


def balance_frame(graph: Graph, result: Graph, frame: Frame, moments: Moments, *, by: str) -> None:
    """Bring a frame into singular form in ``result``, a copy of the graph, by the moments that there are of it."""
    sides = []
    for sign, parameters in ((1, frame.writers), (-1, frame.readers)):
        found = moments.get((frame, sign))
        sides.append(moments_of_weights(graph, frame, parameters, result.parameters) if found is None else found)
    matrix = balancing(*sides).reshape(*frame.shape, -1)
    for parameter, steps in rotating(graph, frame, matrix).items():
        own = result.parameters[parameter.name]
        changed = own.tensor.detach().double()
        for step in steps:
            changed = step(changed)
        set_weight(result, own, changed.to(own.tensor.dtype), by=by)
    record(result, by, f"{frame.name}: singular form")


def balancing(writers: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """The map T [..., size, size] with T A T' = inv(T)' B inv(T) = diag(s), s falling, of the moments A and B of the
    two sides: s is the singular values of what is written and read. Nothing grows: each index has norm sqrt(s) at most.
    """
    a, b = (torch.linalg.cholesky(_with_floor(moments)) for moments in (writers, readers))
    u, s, _ = torch.linalg.svd(b.mT @ a)
    root = s.clamp(min=1e-300).rsqrt()
    found: torch.Tensor = root[..., None] * (u.mT @ b.mT)
    return found


def _with_floor(moments: torch.Tensor) -> torch.Tensor:
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    return moments + _FLOOR * mean[..., None, None] * torch.eye(moments.shape[-1], dtype=moments.dtype)


def moments_of_weights(
    graph: Graph, frame: Frame, sides: Sequence[Place], weights: Mapping[str, Parameter]
) -> torch.Tensor:
    """Of the parameters that write a frame, or read it: the sum of their products with themselves."""
    found = torch.zeros(())
    for side in sides:
        lines, _ = within(graph, frame, side, weights[side[0].name].tensor.detach().double())
        found = found + lines @ lines.mT
    return found


def moments_on_data(graph: Graph, frames: Sequence[Frame], batches: Sequence[Any]) -> Moments:
    """The second moments of what is contracted over each frame on all batches, where it is computed."""
    reading: dict[Node, list[tuple[Frame, Place, int]]] = {}
    for frame in frames:
        for node, place, side in contracted(graph, frame):
            reading.setdefault(node, []).append((frame, place, side))
    found: Moments = {}
    run = Lockstep(graph, batches)
    for node in run.steps():
        for frame, place, side in reading.get(node, ()):
            for value in run.values(place[0]):
                lines, _ = within(graph, frame, place, value.double())
                found[frame, side] = found.get((frame, side), torch.zeros(())) + lines @ lines.mT
    return found


def contracted(graph: Graph, frame: Frame) -> Iterator[tuple[Node, Place, int]]:
    """Nodes behind which a frame's Dim is gone, with the computed values that have it there and the sides they are."""
    for places, side in ((frame.values, 1), (frame.opposite, -1)):
        for place in places:
            value: Value = place[0]
            for node in dict.fromkeys(user for user, _ in value.uses):
                made = (extent for result in node.outputs for extent in graph.axes.of[result])
                if not any(frame.dim in leaves(extent) for extent in made):
                    yield node, place, side
