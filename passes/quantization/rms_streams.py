"""Norms made bare, so that the streams that they read can be rotated (Ashkboos et al. 2024, SliceGPT, section 3.1).

    layer_norm(x, g, b) = rms_norm(C x) g + b      C = 1 - 11'/n takes the mean off
    rms_norm(x, g)      = rms_norm(x) g

C goes into what writes the stream, where nothing but norms and sums read it; g and b go into the layers behind. A
weight that is a table and a layer, as tied embeddings are, becomes two: the layer takes a gain, the table does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.dims.extents import leaves
from regauge.ir.edit import Builder, remove_node, replace_uses, set_input
from regauge.ir.gauge.classes import DIAGONAL, Gauge
from regauge.ir.gauge.frames import Frame, find_frames, frames_at
from regauge.ir.gauge.insertion import scaled, written_through
from regauge.ir.gauge.links import Links, Place
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.base import Context
from regauge.passes.simplify.simplify import Simplify

_NORMS = ("layer_norm", "rms_norm")
_LEAST = 1e-3  # of the greatest gain: a shift over a gain is not to drown the value that it is added to


@dataclass
class Stream:
    """Values that norms read: the names of these, and the parameters that write the values."""

    norms: list[Node] = field(default_factory=list)
    writers: list[Place] = field(default_factory=list)
    read: bool = False  # by others than norms

    @property
    def centred(self) -> bool:
        """Whether norms take the mean off."""
        return any(norm.op == "layer_norm" for norm in self.norms)

    @property
    def may_be_bare(self) -> bool:
        return bool(self.writers) and not (self.centred and (self.read or any(n.op == "rms_norm" for n in self.norms)))


def with_bare_norms(graph: Graph, *, by: str) -> Graph:
    """The graph with norms without gains wherever the stream in front of them can be rotated then."""
    untied = graph.copy()
    _untie(Builder(untied, by=by))
    untied = _gains_moved(untied, [norm for stream in _streams(untied) for norm in stream.norms], by)
    streams = [stream for stream in _streams(untied) if stream.may_be_bare and any(map(_dressed, stream.norms))]
    if not streams:
        return graph
    found = _bared(untied, streams, by)
    turning = [frame for frame in find_frames(found) if Gauge.ORTHOGONAL in frame.gauge]
    free = {(side.parameter.name, side.axis) for frame in turning for side in frame.writers}
    good = [s for s in streams if all((place[0].name, place[1]) in free for place in s.writers)]
    if len(good) == len(streams):
        return found
    return _bared(untied, good, by) if good else graph


def _dressed(norm: Node) -> bool:
    return norm.op == "layer_norm" or len(norm.inputs) > 1


def _streams(graph: Graph) -> list[Stream]:
    links = Links(graph)
    found: dict[Place, Stream] = {}
    sides: dict[Place, int] = {}
    for node in graph.nodes:
        x = node.inputs[0] if node.op in _NORMS else None
        if not isinstance(x, Value) or len(node.attributes["normalized_shape"]) != 1 or _computed_gain(node):
            continue
        place = (x, x.rank - 1, 0)
        if links.holds(place) and len(leaves(graph.axes.of[x][-1])) == 1:  # the mean of pieces is not that of each
            root, side = links.find(place)
            found.setdefault(root, Stream()).norms.append(node)
            sides[root] = side
    for place, root, side in links.members():
        if root in found and side != sides[root]:
            found[root].read = True
        elif root in found and isinstance(place[0], Parameter):
            found[root].writers.append(place)
    for place in links.on_both_sides:
        found.get(links.find(place)[0], Stream()).read = True
    return list(found.values())


def _gains_moved(graph: Graph, norms: Sequence[Node], by: str) -> Graph:
    """The graph with gains in what reads the norms, wherever it stands; a gain with entries near zero stays."""
    frames = find_frames(graph)
    scales: dict[Frame, torch.Tensor] = {}
    for norm in norms:
        gain = norm.inputs[1] if len(norm.inputs) > 1 else None
        for frame, place, side in frames_at(frames, norm.output, -1):
            own = {writer.parameter for writer in frame.writers} <= set(norm.inputs[1:])
            signed = DIAGONAL in frame.gauge and side > 0 and place[2] == 0
            if not isinstance(gain, Parameter) or not own or not signed or frame.majors or frame in scales:
                continue
            size = gain.tensor.detach().double()
            if tuple(size.shape) == frame.shape and float(size.abs().min()) > _LEAST * float(size.abs().max()):
                scales[frame] = 1 / size
    return scaled(graph, scales, by=by) if scales else graph


def _is(parameter: object, number: float) -> bool:
    """Whether nothing is left of a gain or a shift."""
    return isinstance(parameter, Parameter) and bool(((parameter.tensor - number).abs() < 1e-12).all())


def _computed_gain(norm: Node) -> bool:
    return any(isinstance(value, Value) and not isinstance(value, Parameter) for value in norm.inputs[1:])


def _bared(graph: Graph, streams: Sequence[Stream], by: str) -> Graph:
    norms = [norm.name for stream in streams for norm in stream.norms if _dressed(norm)]
    for stream in streams:
        if stream.centred:
            size = int(stream.norms[0].attributes["normalized_shape"][0])
            centring = torch.eye(size, dtype=torch.float64) - 1 / size
            own = [(graph.parameters[place[0].name], *place[1:]) for place in stream.writers]
            graph = written_through(graph, own, centring, by=by)
    result = graph.copy()
    by_name = {node.name: node for node in result.nodes}
    build = Builder(result, by=by)
    for name in norms:
        _undress(build, by_name[name])
    return Simplify(only=("affine", "assemble-linear", "dead-code")).call(result, Context())


def _undress(build: Builder, norm: Node) -> None:
    """A norm by length, with what its gain and shift do behind it."""
    x, gain, shift = (*norm.inputs, None, None)[:3]
    with build.at(norm):
        attributes = {name: norm.attributes[name] for name in ("normalized_shape", "eps")}
        y = build.rms_norm(x, name=f"{norm.name}_bare", **attributes)
        y = y if gain is None or _is(gain, 1) else build.mul(y, gain)
        y = y if shift is None or _is(shift, 0) else build.add(y, shift)
    replace_uses(build.graph, norm.output, y)
    remove_node(build.graph, norm)


def _untie(build: Builder) -> None:
    """Give layers whose weight is a table, too, a weight of their own."""
    for node in build.graph.nodes:
        weight = node.inputs[1] if node.op in ("linear", "matmul") else None
        if isinstance(weight, Parameter) and any(user.op == "embedding" for user, _ in weight.uses):
            name = next(iter(weight.aliases), f"{weight.name}_untied")
            weight.aliases = tuple(alias for alias in weight.aliases if alias != name)
            set_input(node, 1, build.parameter(name, weight.weight), build.graph)
