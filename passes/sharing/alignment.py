"""Blocks of one structure brought into one basis, as far as what each computes stays the same.

Trained apart, two blocks that do the same have their hidden channels in another order, their heads in another order
and each head in a basis of its own; what they share shows once these are taken out. In turn:

    gains of norms       one, in the layers behind them; other channels that may be scaled: as large in the weights that
                         write them as in those that read them
    orders               the linear assignment of greatest inner product over all weights that have the Dim (weight
                         matching, Ainsworth et al. 2023, Git Re-Basin, algorithm 1). Of Dims in whose indices a basis
                         is free, as heads, what is compared is what no basis changes: what reads times what writes
    bases                the singular basis of that product, as large on both sides, then the rotation that is nearest
                         to the other blocks (orthogonal Procrustes, Schoenemann 1966); with RMS norms the rotation

Blocks are taken in turns, each against those before it and then against all others (ibid., algorithm 3, MergeMany).
Signs alone, and pairs that rotary positions turn, stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.reorder import reorder
from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import Frame, Side
from regauge.ir.gauge.insertion import rotated, scaled
from regauge.ir.graph import Graph, Node
from regauge.passes.sharing.places import Private

Likeness: TypeAlias = Callable[[int, Sequence[tuple[int, np.ndarray]]], np.ndarray]
"""How much each index of a block is like each place of others, which are in given orders: [size, size]."""

_ROUNDS = 4  # over the blocks
_MOST_APART = 1e-5  # the least singular value of a basis by its greatest, for it to be left: rounding grows by this


def aligned(graph: Graph, names: Sequence[Sequence[str]], *, by: str) -> Graph:
    """A new graph that computes the same, its blocks in one basis.

    ``names`` are those of the blocks' own weights, in corresponding order: of :class:`.structure.Repeated`.
    """
    graph = _evened(graph, names, by)
    done: set[str] = set()
    while True:
        private = Private(graph, names)
        frames = private.frames()
        waiting = [dims for dims in private.dims() if dims[0].name not in done and not _turns(dims[0], frames)]
        if not waiting:
            break
        dims = min(waiting, key=lambda dims: not _heads(dims[0], frames))  # heads first
        done.add(dims[0].name)
        graph = _ordered(private, dims, frames, by)
    return _turned(private, frames, by)


def _turns(dim: Dim, frames: Sequence[Sequence[Frame]]) -> bool:
    """Whether a basis of the Dim is free, which takes care of its order."""
    return any(own[0].dim is dim and own[0].gauge & Gauge.ORTHOGONAL for own in frames)


def _heads(dim: Dim, frames: Sequence[Sequence[Frame]]) -> list[Sequence[Frame]]:
    """The frames in whose every index of the Dim another basis is free."""
    return [own for own in frames if dim in own[0].majors and own[0].gauge & Gauge.ORTHOGONAL]


# -- scales ------------------------------------------------------------------------------------------------------------


def _evened(graph: Graph, names: Sequence[Sequence[str]], by: str) -> Graph:
    private = Private(graph, names)
    scales = {}
    for frames in private.frames():
        if Gauge.SCALE in frames[0].gauge and not frames[0].gauge & Gauge.ORTHOGONAL:
            for block, frame in enumerate(frames):
                scale = _gain(private, block, frame)
                scales[frame] = _balance(private, block, frame) if scale is None else scale
    return scaled(graph, scales, by=by) if scales else graph


def _gain(private: Private, block: int, frame: Frame) -> torch.Tensor | None:
    """What makes the gain of a norm one, [*majors, size], where the frame begins at one; gains of zero stay."""
    gains = [side for side in frame.writers if side.parameter.rank == 1 and _is_gain(side.parameter.uses)]
    if len(gains) != 1 or any(side.parameter.rank > 1 for side in frame.writers):
        return None
    gain = private.along(block, frame, gains)[..., 0]
    usable = gain != 0 if Gauge.SIGN in frame.gauge else gain > 0
    return torch.where(usable, 1 / gain.where(usable, 1.0), 1.0).reshape(frame.shape)


def _is_gain(uses: Iterable[tuple[Node, int]]) -> bool:
    return all(node.operator.slots[slot] == "weight" for node, slot in uses)


def _balance(private: Private, block: int, frame: Frame) -> torch.Tensor:
    written, read = (private.along(block, frame, sides).norm(dim=2) for sides in (frame.writers, frame.readers))
    usable = (written > 0) & (read > 0)
    scale: torch.Tensor = (read / written).where(usable, 1.0).sqrt()
    return scale.reshape(frame.shape)


# -- orders ------------------------------------------------------------------------------------------------------------


def _ordered(private: Private, dims: Sequence[Dim], frames: Sequence[Sequence[Frame]], by: str) -> Graph:
    """The graph with one Dim of every block in the order that makes them most alike."""
    inner = _heads(dims[0], frames)
    covered = {(side.parameter, side.axis) for own in inner for frame in own for side in frame.writers + frame.readers}
    compared: list[Likeness] = [_between_products(private, dims[0], own) for own in inner]
    direct = []
    for block, dim in enumerate(dims):
        sides = [side for side in private.sides(block, dim) if (side.parameter, side.axis) not in covered]
        times = Counter(weight for weight, axis in {(side.parameter, side.axis) for side in sides})
        direct.append([side for side in sides if times[side.parameter] == 1])
    if direct[0]:
        compared.append(_between_rows([private.rows(own) for own in direct]))
    orders = _assigned(compared, len(dims), int(dims[0].size)) if compared else []
    changed = {dim: order for dim, order in zip(dims, orders, strict=False) if (np.diff(order) != 1).any()}
    return reorder(private.graph, changed, by=by) if changed else private.graph


def _assigned(compared: Sequence[Likeness], count: int, size: int) -> list[np.ndarray]:
    """An order of the indices for each block."""
    orders = [np.arange(size) for _ in range(count)]
    for turn in range(_ROUNDS):
        before = list(orders)
        for block, others in _turns_of(count, turn):
            total = sum(like(block, [(o, orders[o]) for o in others]) for like in compared)
            orders[block] = linear_sum_assignment(-np.asarray(total).T)[1]
        if all((a == b).all() for a, b in zip(orders, before, strict=True)):
            break
    return orders


def _turns_of(count: int, turn: int) -> Iterator[tuple[int, list[int]]]:
    """The blocks in turn, with those that each is compared with: at first those before it."""
    for block in range(1 if turn == 0 else 0, count):
        yield block, list(range(block)) if turn == 0 else [other for other in range(count) if other != block]


def _between_rows(rows: Sequence[torch.Tensor]) -> Likeness:
    """By the inner products of what weights [size, entries] have for each index."""
    lengths = [max(float(own.norm()), 1e-150) for own in rows]

    def like(block: int, others: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        total = torch.stack([rows[other][order] / lengths[other] for other, order in others]).sum(0)
        found: np.ndarray = (rows[block] @ total.t()).numpy() / lengths[block]
        return found

    return like


def _between_products(private: Private, dim: Dim, frames: Sequence[Frame]) -> Likeness:
    """By the inner products of what blocks read times what they write there, for each index of the first one's Dim.

    tr((R1' W1)' (R2' W2)) = sum of (W1 W2') * (R1 R2') over the frame: the products themselves are never made.
    """
    place = frames[0].majors.index(dim)

    def by_index(block: int, sides: Sequence[Side]) -> torch.Tensor:
        frame = frames[block]
        found = private.along(block, frame, sides)
        split = found.reshape(*frame.shape, -1).movedim(place, 0)
        return split.reshape(len(split), -1, *found.shape[1:])  # [index of the Dim, of other majors, size, entries]

    written = [by_index(block, frame.writers) for block, frame in enumerate(frames)]
    read = [by_index(block, frame.readers) for block, frame in enumerate(frames)]

    @cache
    def inner(a: int, b: int) -> np.ndarray:
        if a < b:
            return inner(b, a).T
        both = [torch.einsum("hmik,gmjk->hgmij", side[a], side[b]) for side in (written, read)]
        found: np.ndarray = (both[0] * both[1]).sum((2, 3, 4)).numpy()
        return found

    lengths = [max(float(np.trace(inner(block, block))), 1e-300) ** 0.5 for block in range(len(frames))]

    def like(block: int, others: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
        total = [inner(block, other)[:, order] / lengths[other] for other, order in others]
        found: np.ndarray = np.sum(total, 0) / lengths[block]
        return found

    return like


# -- bases -------------------------------------------------------------------------------------------------------------


def _turned(private: Private, frames: Sequence[Sequence[Frame]], by: str) -> Graph:
    matrices = dict[Frame, torch.Tensor]()
    for own in frames:
        if own[0].gauge & Gauge.ORTHOGONAL:
            found = _bases(private, own, Gauge.GENERAL in own[0].gauge)
            matrices |= {f: m.reshape(*f.shape, m.shape[-1]) for f, m in zip(own, found, strict=True)}
    return rotated(private.graph, matrices, by=by) if matrices else private.graph


def _bases(private: Private, frames: Sequence[Frame], general: bool) -> list[torch.Tensor]:
    """For each block what its values are multiplied by, [indices of the majors, size, size]."""
    written = [private.along(block, frame, frame.writers) for block, frame in enumerate(frames)]
    read = [private.along(block, frame, frame.readers) for block, frame in enumerate(frames)]
    eye = torch.eye(written[0].shape[1], dtype=torch.float64).expand(len(written[0]), -1, -1)
    maps = [_balanced(w, r) if general else eye for w, r in zip(written, read, strict=True)]
    both = [
        torch.cat([own @ w, torch.linalg.inv(own).mT @ r], 2) for own, w, r in zip(maps, written, read, strict=True)
    ]
    turns = [eye for _ in frames]
    for turn in range(_ROUNDS):
        for block, others in _turns_of(len(frames), turn):
            total = torch.stack([turns[o] @ both[o] for o in others]).sum(0)
            u, _, v = torch.linalg.svd(total @ both[block].mT)
            turns[block] = u @ v
    return [turn @ own for turn, own in zip(turns, maps, strict=True)]


def _balanced(written: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """T [.., size, size] with T W and T^-T R as large as each other, their product in its singular basis.

    Where W or R lack directions, or almost, T is one.
    """
    lower_w, lower_r = (torch.linalg.qr(side.mT, mode="r")[1] for side in (written, read))
    eye = torch.eye(written.shape[1], dtype=torch.float64)
    if lower_w.shape[-2] < len(eye) or lower_r.shape[-2] < len(eye):
        return eye.expand(len(written), -1, -1)
    _, values, v = torch.linalg.svd(lower_r @ lower_w.mT)
    whole = values[..., -1] > _MOST_APART * values[..., 0]
    safe = torch.where(whole[:, None, None], lower_w, eye)
    found = values.sqrt()[..., None] * torch.linalg.solve_triangular(safe, v.mT, upper=True).mT
    return torch.where(whole[:, None, None], found, eye)
