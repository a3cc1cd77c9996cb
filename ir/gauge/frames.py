"""Frames: the values that have to be written in one basis of a Dim, and the parameters that write and read them.

A map of a Dim's index space may be inserted where values begin and undone where they end. Within a frame all values
take the same map, so that the parameters that write it take the map T and those that read it the inverse transpose:

    h = relu(x w1')   y = h w2'          the rows of w1 write h, the columns of w2 read it: one frame of two parameters
    h = norm(x) * g   y = h w'           the norm's gain writes h, whatever x is: x lies in another frame
    r = x * g                            x and r may take different scales where g is a parameter: it reads x, writes r
    s = q k'                             q and k take opposite sides: what writes k reads q

What a node lets through is said by its axis rule, on extents of its own, and by :mod:`regauge.ir.gauge.classes`; a node
that lets nothing through but permutations ends all frames that touch it, and so do inputs and outputs of the graph.
Maps of different frames are chosen independently of each other. A Dim can have several frames (the stream behind a
residual network's norms is not the stream itself), and where a Dim lies within others (:mod:`regauge.ir.dims.majors`),
a scale may differ in each index of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import find_groups
from regauge.ir.dims.majors import majors_of
from regauge.ir.errors import GraphError
from regauge.ir.gauge.classes import Gauge, gauge_in_words
from regauge.ir.gauge.links import Links, Place
from regauge.ir.graph import Graph, Parameter, Value


class Side(NamedTuple):
    """A parameter of a frame: the axis, and which occurrence of the Dim on it, counted from the left."""

    parameter: Parameter
    axis: int
    number: int


@dataclass(eq=False)
class Frame:
    """Values that share one map of a Dim.

    ``gauge`` are the maps that it may be; ``writers`` take the map and ``readers`` its inverse transpose (one parameter
    may do both). ``values`` are computed values that take the map, ``opposite`` those that take the inverse transpose.
    A scale may be another one in each index of the ``majors``. ``limits`` says in words what left no more.
    """

    dim: Dim
    gauge: Gauge
    majors: tuple[Dim, ...]
    writers: list[Side] = field(default_factory=list)
    readers: list[Side] = field(default_factory=list)
    values: list[Place] = field(default_factory=list)
    opposite: list[Place] = field(default_factory=list)
    limits: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of scales: [*sizes of the majors, size of the Dim]."""
        return tuple(int(dim.size) for dim in (*self.majors, self.dim))

    @property
    def name(self) -> str:
        """The name of the Dim, and where that may be one of several, of a value or parameter that begins the frame."""
        first = self.writers[0].parameter if self.writers else self.values[0][0] if self.values else None
        own = first is None or self.dim.name.startswith(f"{first.name}:")
        return self.dim.name if own or first is None else f"{self.dim.name} of {first.name}"

    def __repr__(self) -> str:
        sides = f"{len(self.writers)} writers, {len(self.readers)} readers"
        return f"<Frame {self.name} of {self.dim.size}, {gauge_in_words(self.gauge)}, {sides}>"


def find_frames(graph: Graph) -> list[Frame]:
    """All frames with parameters in which more than a permutation is free, in the order of their Dims; one walk."""
    analysis = graph.axes
    order = {dim: place for place, dim in enumerate(analysis.groups)}
    links = Links(graph)
    by_root: dict[Place, Frame] = {}
    for place, root, sign in links.members():
        frame = by_root.get(root)
        if frame is None:
            frame = by_root[root] = Frame(links.dim(root), links.gauge(root), (), limits=links.limits(root))
        _enter(frame, place, sign)
    for gain, read, written in links.absorbers:
        for place, sign in gain:
            for end, side in ((read, -sign), (written, sign)):
                root, turned = links.find(end)
                _enter(by_root[root], place, side * turned)
    found = [f for f in by_root.values() if f.gauge & ~Gauge.PERMUTE and f.writers and f.readers]
    found.sort(key=lambda frame: order[frame.dim])
    majors = majors_of(graph, {frame.dim: None for frame in found})
    for frame in found:
        frame.majors = majors[frame.dim]
    return found


def _enter(frame: Frame, place: Place, sign: int) -> None:
    value, axis, number = place
    if isinstance(value, Parameter):
        (frame.writers if sign > 0 else frame.readers).append(Side(value, axis, number))
    else:
        (frame.values if sign > 0 else frame.opposite).append(place)


def frames_of(graph: Graph, name: str) -> list[Frame]:
    """The frames of a Dim given by its name, or of all Dims of a parameter axis, in which a map is free.

    Raises ExplainError for an unknown name, and GraphError where nothing but permutations is free, saying why.
    """
    dims = [group.dim for group in find_groups(graph, name)]
    found = [frame for frame in find_frames(graph) if frame.dim in dims]
    if found:
        return found
    raise GraphError(f"no scale and no rotation is free along {name}: {'; '.join(_why(graph, dims)) or 'none is read'}")


def _why(graph: Graph, dims: Sequence[Dim]) -> Iterator[str]:
    links = Links(graph)
    seen = dict.fromkeys(
        limit for place, root, _ in links.members() if links.dim(place) in dims for limit in links.limits(root)
    )
    yield from list(seen)[:3]


def frames_at(frames: Iterable[Frame], value: Value, axis: int) -> list[tuple[Frame, Place, int]]:
    """The frames that run along an axis of a value: each with the place, and +1 where it takes the map, else -1."""
    axis %= value.rank
    return [
        (frame, place, side)
        for frame in frames
        for places, side in ((frame.values, 1), (frame.opposite, -1))
        for place in places
        if place[0] is value and place[1] == axis
    ]
