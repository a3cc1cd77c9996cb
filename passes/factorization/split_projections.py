"""``split-projections``: a linear layer whose result is taken apart becomes one for each part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from regauge.ir.edit import Builder, record, remove_dead, replace_uses
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.ops.slice_bounds import bound
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.chains import weight_like
from regauge.passes.options import option

_WHOLE = "its result is read whole"
_TURNED = "its parts are turned into each other, as rotary positions do"


@dataclass(frozen=True, kw_only=True)
class SplitProjections(Pass):
    """Make one layer for each part that the result of a linear layer is taken apart into: queries, keys and values,
    or the halves of a gate; ``factorize`` then gives each a rank of its own.

    before  y = linear(x, w, b)       q, k, v = split(y, (64, 64, 64))      w: f32[192,64]
    after   q = linear(x, w0, b0)     k = linear(x, w1, b1)     v = ...     w0, w1, w2: f32[64,64]

    Parts are what slices, splits and selections read behind reshapes and permutations; heads may lie in any order
    (``(3 h d)``, ``(h (q + k + v))``). Halves that rotary positions turn into each other stay together. ``simplify``
    joins layers of one input again where that pays.
    """

    name: ClassVar[str] = "split-projections"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")

    def call(self, graph: Graph, context: Context) -> Graph:
        result, plans = graph.copy(), dict[str, list[_View]]()
        held = {*result.outputs, *(value for state in result.states for value in (state.before, state.after))}
        nodes = set(result.nodes)

        def misfit(layer: Layer) -> str | None:
            if layer.node.op not in ("linear", "matmul") or layer.blocks > 1:
                return "no linear layer"
            found = _parts(layer, held, nodes)
            if isinstance(found, str):
                return found
            plans[layer.weight.name] = found
            return None

        layers = chosen_layers(result, self.include, self.exclude, context.left, misfit)
        for layer in layers:
            _split(result, layer, plans[layer.weight.name], by=self.name)
        if not layers:
            return graph
        remove_dead(result)
        context.note(f"split: {', '.join(layer.weight.name for layer in layers)}")
        return result


@dataclass(frozen=True)
class _View:
    """The result of a layer as some value holds it: which channel lies where, and the order of its axes.

    ``leading`` has the sizes of the axes in front, ``channels`` the axes that channels are laid out along; ``order``
    says of each axis of the value which leading axis it is, counted from 0, or which of ``channels``, counted from -1
    downwards.
    """

    value: Value
    leading: tuple[Any, ...]
    channels: np.ndarray
    order: tuple[int, ...]

    def channel_axis(self, axis: int) -> int | None:
        """The axis of ``channels`` that an axis of the value is; None where it is a leading one."""
        return -1 - self.order[axis] if self.order[axis] < 0 else None


def _parts(layer: Layer, held: Container[Any], nodes: Container[Node]) -> list[_View] | str:
    """What the result is taken apart into, or why it is not."""
    y, _ = _result(layer)
    if layer.node.output in held:
        return _WHOLE
    whole = _View(y, y.shape[:-1], np.arange(layer.outputs), (*range(y.rank - 1), -1))
    found = list(_followed(whole, held, nodes))
    parts = [part for part in found if isinstance(part, _View)]
    if len(parts) < len(found):
        return next(reason for reason in found if isinstance(reason, str))
    every = Counter(channel for part in parts for channel in part.channels.ravel().tolist())
    if len(parts) < 2 or any(count > 1 for count in every.values()):
        return _WHOLE
    return _TURNED if _are_turned([part.value for part in parts]) else parts


def _are_turned(parts: Sequence[Value]) -> bool:
    """Whether two parts are halves of pairs that are rotated: x cos - y sin and x sin + y cos, at least two such sums
    of products with both."""
    by_node = dict[Node, set[int]]()
    for place, part in enumerate(parts):
        for product, _ in part.uses:
            if product.op == "mul":
                for node, _ in product.output.uses:
                    if node.op in ("add", "sub"):
                        by_node.setdefault(node, set()).add(place)
    pairs = Counter(frozenset(own) for own in by_node.values() if len(own) == 2)
    return max(pairs.values(), default=0) > 1


def _result(layer: Layer) -> tuple[Value, Parameter | None]:
    """What the layer gives with its bias, which may be added by a node of its own behind it, as ONNX files have it."""
    y = layer.node.output
    users = list(y.uses)
    if layer.bias is None and len(users) == 1 and users[0][0].op == "add":
        node, slot = users[0]
        other = node.inputs[1 - slot]
        vector = isinstance(other, Parameter) and other.kind == "parameter" and other.shape == (layer.outputs,)
        if vector and node.output.shape == y.shape:
            assert isinstance(other, Parameter)
            return node.output, other
    return y, layer.bias


def _followed(view: _View, held: Container[Any], nodes: Container[Node]) -> Iterator[_View | str]:
    """The parts that are read behind a view, or reasons why it does not consist of parts."""
    if view.value in held:
        yield _WHOLE
    for user, slot in view.value.uses:
        if slot != 0 or user.op not in _STEPS or user not in nodes:
            yield _WHOLE
            continue
        for step in _STEPS[user.op](view, user):
            if isinstance(step, str) or user.op in _CUTS:
                yield step
            else:
                yield from _followed(step, held, nodes)


def _reshaped(view: _View, node: Node) -> Iterator[_View | str]:
    y, count = node.output, len(view.leading)
    kept = view.order[:count] == tuple(range(count)) and all(axis < 0 for axis in view.order[count:])
    start = _first_channel_axis(y, view.channels.size)
    if not kept or start is None:
        yield "its result is reshaped with other axes"
        return
    ordered = view.channels.transpose([-1 - axis for axis in view.order[count:]])
    channels = ordered.reshape([int(size) for size in y.shape[start:]])
    yield _View(y, y.shape[:start], channels, (*range(start), *(-1 - axis for axis in range(channels.ndim))))


def _first_channel_axis(y: Value, channels: int) -> int | None:
    """From which axis on the last axes of a reshaped value have all channels, and no others."""
    found = 1
    for axis in reversed(range(y.rank)):
        size = y.shape[axis]
        found *= size if isinstance(size, int) else 0
        if found == channels:
            return axis
    return None


def _permuted(view: _View, node: Node) -> Iterator[_View | str]:
    dims = [int(dim) % len(view.order) for dim in node.attributes["dims"]]
    yield replace(view, value=node.output, order=tuple(view.order[dim] for dim in dims))


def _cut(view: _View, node: Node) -> Iterator[_View | str]:
    axis = int(node.attributes["dim"]) % len(view.order)
    own = view.channel_axis(axis)
    if own is None:
        yield "its result is cut along other axes"
        return
    for value, places in zip(node.outputs, _places(node, view.channels.shape[own]), strict=True):
        if places is None:
            yield "its result is cut where is not known"
        elif not value.uses:
            continue
        elif isinstance(places, int):
            order = tuple(_without(other, own) for place, other in enumerate(view.order) if place != axis)
            yield _View(value, view.leading, view.channels.take(places, own), order)
        else:
            channels = view.channels.take(np.arange(view.channels.shape[own])[places], own)
            yield replace(view, value=value, channels=channels)


def _without(axis: int, gone: int) -> int:
    """An entry of ``order`` once an axis of the channels is gone."""
    return axis + 1 if axis < 0 and -1 - axis > gone else axis


def _places(node: Node, size: int) -> list[slice | int | None]:
    """What each result of a cut takes of an axis."""
    attributes: Any = node.attributes
    if node.op == "split":
        ends = np.cumsum(attributes["sizes"]).tolist()
        return [slice(end - own, end) for own, end in zip(attributes["sizes"], ends, strict=True)]
    if node.op == "unbind":
        return list(range(size))
    if node.op == "select":
        index = attributes["index"]
        return [index % size if isinstance(index, int) else None]
    start, end, step = bound(attributes["start"], size), bound(attributes["end"], size), attributes["step"]
    known = all(isinstance(number, int) for number in (start, end, step))
    return [slice(int(start), int(end), int(step)) if known else None]


_CUTS = ("split", "slice", "select", "unbind")
_STEPS: dict[str, Any] = {"reshape": _reshaped, "permute": _permuted, **dict.fromkeys(_CUTS, _cut)}


def _split(graph: Graph, layer: Layer, parts: Sequence[_View], *, by: str) -> None:
    node, build = layer.node, Builder(graph, by=by)
    name = layer.weight.name
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}."
    x = node.inputs[0]
    assert isinstance(x, Value)
    matrix = layer.matrix(layer.weight.tensor.detach())
    _, whole = _result(layer)
    for number, part in enumerate(parts):
        # channels in the order of the value's axes, so that a reshape and a permutation lay them out
        along = [-1 - axis for axis in part.order if axis < 0]
        channels = part.channels.transpose(along)
        rows = torch.from_numpy(channels.ravel().copy())
        own = matrix[rows]
        with build.at(node):
            stored = own.t() if node.op == "matmul" else own
            weight = weight_like(build, f"{stem}part{number}.weight", stored, layer.weight)
            operands: list[Value] = [x, weight]
            bias = None
            if whole is not None:
                bias = weight_like(build, f"{stem}part{number}.bias", whole.tensor.detach()[rows], whole)
                operands += [bias] if layer.bias is not None else []
            value = build(node.op, *operands, name=f"{node.output.name}_part{number}", **node.attributes)
            if bias is not None and layer.bias is None:
                value = build.add(value, bias)
            value = build.reshape(value, shape=(*part.leading, *channels.shape))
            sources = _sources(part.order, len(part.leading))
            if sources != list(range(len(sources))):
                value = build.permute(value, dims=tuple(sources))
        replace_uses(graph, part.value, value)
    record(graph, by, f"{name}: {len(parts)} layers of {', '.join(str(p.channels.size) for p in parts)}")


def _sources(order: Sequence[int], leading: int) -> list[int]:
    """Of each axis of a part where it lies in [leading axes, channels in the order of the part]."""
    found, seen = [], leading
    for axis in order:
        found.append(axis if axis >= 0 else seen)
        seen += axis < 0
    return found
