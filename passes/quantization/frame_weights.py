"""The weights of a frame as its scales see them: which entries belong to which scale, and how great they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from regauge.ir.gauge.frames import Frame, Side
from regauge.ir.gauge.insertion import entries
from regauge.ir.graph import Graph, Parameter


class FrameWeight(NamedTuple):
    """A weight of two axes or more beside a frame, and the number of the scale that belongs to each entry, or -1."""

    parameter: Parameter
    scales: torch.Tensor


class Balance(NamedTuple):
    """A frame between the weights that write it and those that read it; gains and biases count for neither."""

    frame: Frame
    writers: list[FrameWeight]
    readers: list[FrameWeight]


def balance_of(graph: Graph, frame: Frame) -> Balance:
    return Balance(frame, _weights(graph, frame, frame.writers), _weights(graph, frame, frame.readers))


def _weights(graph: Graph, frame: Frame, sides: Sequence[Side]) -> list[FrameWeight]:
    return [
        FrameWeight(side.parameter, torch.from_numpy(entries(graph, frame, side)))
        for side in sides
        if side.parameter.rank > 1
    ]


def greatest(tensor: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """The greatest magnitude of the entries of each scale, [count]; 0 where it has none."""
    size = tensor.abs()
    for axis in range(tensor.dim()):
        if index.shape[axis] == 1 < size.shape[axis]:
            size = size.amax(axis, keepdim=True)
    found = torch.zeros(count + 1, dtype=size.dtype)  # the last is for entries of no scale
    places = torch.where(index < 0, count, index).reshape(-1)
    return found.scatter_reduce(0, places, size.reshape(-1), "amax")[:count]
