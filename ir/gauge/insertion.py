"""Inserting maps into a graph: scales, rotations and other changes of basis, exactly, by its parameters alone.

before   h = relu(x w1')            y = h w2'             scaled(graph, {frame: s})
after    h = relu(x (s w1)')        y = h (w2 / s)'

Frames (:mod:`regauge.ir.gauge.frames`) say which parameters take the map and which its inverse transpose. Permutations,
which more Dims admit, are applied by :mod:`regauge.ir.dims.reorder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, Extent, Product, coordinates, leaves, resolve, size_of
from regauge.ir.dims.kept import numbered
from regauge.ir.edit import record, set_weight
from regauge.ir.errors import GraphError
from regauge.ir.gauge.classes import Gauge, gauge_in_words
from regauge.ir.gauge.frames import Frame
from regauge.ir.gauge.links import Place
from regauge.ir.graph import Graph, Parameter
from regauge.ir.storage.weight_edits import computed_weight

Change = Callable[[torch.Tensor], torch.Tensor]
_ORTHOGONAL_TO = 1e-6  # how far Q'Q may be from one, at its worst entry


def scaled(graph: Graph, scales: Mapping[Frame, torch.Tensor], *, by: str = "scaled") -> Graph:
    """A new graph in which the values of each frame are multiplied by scales [*sizes of its majors, size].

    Scales are positive, or of any sign where the frame's gauge has signs; they may also be [size], the same in all
    majors. The function stays the same up to rounding. Frames are those of ``find_frames(graph)``. Raises GraphError
    where a frame admits no scale, and for numbers that are none.
    """
    return _changed(graph.copy(), _scaling(graph, scales), [frame.name for frame in scales], by)


def rescale(graph: Graph, scales: Mapping[Frame, torch.Tensor], *, by: str) -> None:
    """As :func:`scaled`, in place; frames that were found before are of no use then."""
    _changed(graph, _scaling(graph, scales), [frame.name for frame in scales], by)


def _scaling(graph: Graph, scales: Mapping[Frame, torch.Tensor]) -> dict[Parameter, list[Change]]:
    changes: dict[Parameter, list[Change]] = {}
    for frame, given in scales.items():
        scale = _checked_scale(frame, given)
        for sides, factor in ((frame.writers, scale), (frame.readers, 1 / scale)):
            for side in sides:
                index = torch.from_numpy(entries(graph, frame, side))
                changes.setdefault(side.parameter, []).append(_multiplied(index, factor))
    return changes


def rotated(graph: Graph, matrices: Mapping[Frame, torch.Tensor], *, by: str = "rotated") -> Graph:
    """A new graph in which the values h of each frame become T h, with a matrix T [size, size].

    T is orthogonal, or any invertible matrix where the frame's gauge is general linear; it may also be another one in
    each index of the frame's majors, [*sizes of its majors, size, size]. Raises GraphError where the frame admits no
    such matrix.
    """
    changes: dict[Parameter, list[Change]] = {}
    for frame, matrix in matrices.items():
        for parameter, steps in rotating(graph, frame, matrix).items():
            changes.setdefault(parameter, []).extend(steps)
    return _changed(graph.copy(), changes, [frame.name for frame in matrices], by)


def rotating(graph: Graph, frame: Frame, matrix: torch.Tensor) -> dict[Parameter, list[Change]]:
    """What a map of a frame, as :func:`rotated` takes it, does to the data of its parameters."""
    own = _checked_matrix(frame, matrix)
    changes: dict[Parameter, list[Change]] = {}
    for sides, factor in ((frame.writers, own), (frame.readers, torch.linalg.inv(own).mT)):
        for side in sides:
            changes.setdefault(side.parameter, []).append(_rotation(graph, frame, side, factor))
    return changes


def _rotation(graph: Graph, frame: Frame, side: Place, factor: torch.Tensor) -> Change:
    if factor.dim() == 2:
        positions = fibres(graph.axes.of[side[0]][side[1]], side[2])
        return mixed(side[1], torch.from_numpy(positions), factor)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        parts, put = within(graph, frame, side, tensor)
        return put(factor.reshape(-1, *factor.shape[-2:]).to(parts) @ parts)

    return change


def within(graph: Graph, frame: Frame, place: Place, tensor: torch.Tensor) -> tuple[torch.Tensor, Change]:
    """The lines of a tensor in which a frame's Dim runs, [indices of the majors, size, lines], and how to put others
    there: a function of such lines that gives a tensor of the same shape.

    The place is a parameter or a value of the frame, and the tensor has its shape.
    """
    index = entries(graph, frame, place)
    varying = [axis for axis, size in enumerate(index.shape) if size > 1 or axis == place[1]]
    flat = index.reshape([index.shape[axis] for axis in varying]).reshape(-1)
    order = np.argsort(flat, kind="stable")[int((flat < 0).sum()) :]
    size, majors = frame.shape[-1], int(np.prod(frame.shape[:-1]))
    table = torch.from_numpy(order.reshape(majors, size, len(order) // (majors * size)))
    front = list(range(len(varying)))
    moved = tensor.movedim(varying, front)
    rows = moved.reshape(len(flat), -1)

    def put(lines: torch.Tensor) -> torch.Tensor:
        result = rows.clone()
        result[table] = lines.reshape(*table.shape, -1).to(rows)
        return result.reshape(moved.shape).movedim(front, varying)

    return rows[table].flatten(2), put


def written_through(graph: Graph, sides: Iterable[Place], matrix: torch.Tensor, *, by: str) -> Graph:
    """A new graph in which parameters write M h in place of h; M is [size, size], and nothing is undone elsewhere.

    The function stays the same only where all who read h read the same of M h.
    """
    changes: dict[Parameter, list[Change]] = {}
    for parameter, axis, number in sides:
        assert isinstance(parameter, Parameter)
        positions = fibres(graph.axes.of[parameter][axis], number)
        changes.setdefault(parameter, []).append(mixed(axis, torch.from_numpy(positions), matrix))
    return _changed(graph.copy(), changes, [], by)


def entries(graph: Graph, frame: Frame, place: Place) -> np.ndarray:
    """Which of a frame's scales, counted through, belongs to each entry of a tensor; -1 for none. It broadcasts.

    The place is a parameter or a value of the frame: the tensor, the axis, and which occurrence of the Dim it is there.
    """
    value, axis, number = place
    axes = graph.axes.of[value]
    index = numbered(axes, axis, (*frame.majors, frame.dim))
    own = _covered(axes[axis], number).reshape([-1 if at == axis else 1 for at in range(len(axes))])
    return np.where(own, index, -1)


def _covered(extent: Extent, number: int) -> np.ndarray:
    """Of the positions on an axis those that belong to one of its leaves, which are counted from the left."""
    found = resolve(extent)
    if isinstance(found, Dim):
        return np.ones(int(found.size), dtype=bool)
    parts = found.factors if isinstance(found, Product) else found.segments
    held, place = [], number
    for part in parts:
        count = len(leaves(part))
        inside = 0 <= place < count
        size = int(size_of(part))
        held.append(_covered(part, place) if inside else np.full(size, isinstance(found, Product)))
        place -= count
    if not isinstance(found, Product):
        return np.concatenate(held)
    whole = np.ones(1, dtype=bool)
    for one in held:
        whole = (whole[:, None] & one[None, :]).reshape(-1)
    return whole


def fibres(extent: Extent, number: int) -> np.ndarray:
    """The positions along each line in which one leaf of an axis runs, [indices of its Dim, lines]."""
    dim = leaves(extent)[number]
    index, step = coordinates(extent, dim)
    starts = np.flatnonzero(_covered(extent, number) & (index == 0))
    found: np.ndarray = starts[None, :] + np.arange(int(dim.size))[:, None] * step[starts][None, :]
    return found


def _multiplied(index: torch.Tensor, factor: torch.Tensor) -> Change:
    table = torch.cat([factor.reshape(-1), torch.ones(1, dtype=torch.float64)])  # the last is for -1
    return lambda tensor: tensor * table[index].to(tensor.device)


def mixed(axis: int, positions: torch.Tensor, matrix: torch.Tensor) -> Change:
    """What multiplies the lines at these positions of an axis, [size, lines], by a matrix; gradients go through."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        moved, flat = tensor.movedim(axis, 0), positions.reshape(-1).to(tensor.device)
        result = moved.clone()
        part = moved[flat].reshape(len(positions), -1)
        result[flat] = (matrix.to(part) @ part).reshape(-1, *moved.shape[1:])
        return result.movedim(0, axis)

    return change


def _changed(result: Graph, changes: Mapping[Parameter, list[Change]], names: list[str], by: str) -> Graph:
    """The graph, whose parameters of the same names are changed in place."""
    for parameter, steps in changes.items():
        own = result.parameters[parameter.name]
        assert isinstance(own.dtype, torch.dtype)

        def change(tensor: torch.Tensor, steps: list[Change] = steps) -> torch.Tensor:
            for step in steps:
                tensor = step(tensor)
            return tensor

        set_weight(result, own, computed_weight(change, [own], own.weight.shape, own.dtype), by=by)
    for name in names:
        record(result, by, f"{name}: another basis")
    return result


def _checked_scale(frame: Frame, given: torch.Tensor) -> torch.Tensor:
    if Gauge.SCALE not in frame.gauge:
        raise _refusal(frame, "takes no scale")
    if tuple(given.shape) not in (frame.shape, frame.shape[-1:]):
        raise GraphError(f"{frame.name} is scaled by numbers of the shape {list(frame.shape)}, not {list(given.shape)}")
    scale = given.detach().double().cpu()
    signs = Gauge.SIGN in frame.gauge
    if not bool((torch.isfinite(scale) & ((scale != 0) if signs else (scale > 0))).all()):
        what = "numbers other than zero" if signs else "positive numbers"
        raise GraphError(f"{frame.name} is scaled by {what}: these have one that is not")
    return scale.expand(frame.shape)


def _checked_matrix(frame: Frame, given: torch.Tensor) -> torch.Tensor:
    size = int(frame.dim.size)
    if not frame.gauge & (Gauge.ORTHOGONAL | Gauge.GENERAL):
        raise _refusal(frame, "takes no rotation")
    if tuple(given.shape) not in ((size, size), (*frame.shape, size)):
        raise GraphError(f"{frame.name} is rotated by a matrix [{size}, {size}], not {list(given.shape)}")
    matrix = given.detach().double().cpu()
    apart = float((matrix.mT @ matrix - torch.eye(size, dtype=torch.float64)).abs().max())
    if Gauge.GENERAL not in frame.gauge and not apart <= _ORTHOGONAL_TO:
        raise _refusal(frame, f"takes no matrix but orthogonal ones: this one is {apart:.1e} away")
    return matrix


def _refusal(frame: Frame, what: str) -> GraphError:
    why = "; ".join(frame.limits) or "nothing says more"
    return GraphError(f"{frame.name} {what}: its gauge is {gauge_in_words(frame.gauge)} ({why})")
