"""A graph over whole signals written anew for a few frames at a time.

What a node does with frames is read off its axis rule: where the axis of the frames is mapped, the node is written as
it is, and frames of several operands are brought to one delay. Windows keep earlier frames, layers that run along the
axis keep their state. All else needs frames that are not there yet, or all of them: it is refused with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import sympy

from regauge.ir.dims.extents import Concat, Dim, Extent, Product, leaves, resolve
from regauge.ir.dims.local_axes import LocalAxes, local_axes
from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.ops.windows import per_axis
from regauge.ir.sizes.expressions import Size, evaluate, product, total
from regauge.passes.streaming.frames import Buffers, Frames, Window, moved

Padding: TypeAlias = Literal["exact", "causal", "signal"]
_RECURRENT = ("lstm", "gru", "rnn")
_CONVOLUTIONS = ("conv", "conv_transpose")
_PER_FRAME = {"map", "produce", "linear"}
_USUAL = {"stride": 1, "dilation": 1, "padding": 0}  # of windows that do not say it
_POOLS = ("max_pool", "avg_pool", "lp_pool")


class StepWriter:
    """Writes the nodes of ``graph`` behind values that come in frames; ``sizes`` are those of the whole signal."""

    def __init__(self, graph: Graph, sizes: Mapping[sympy.Symbol, int], padding: Padding) -> None:
        self.graph, self.sizes, self.padding = graph, sizes, padding
        self.build = Builder(graph)
        self.buffers = Buffers(self.build)
        self.frames: dict[Value, Frames] = {}
        self.nodes_at = Counter(node.scope[-1:] for node in graph.nodes)

    def write(self, node: Node) -> None:
        """Write one node, if it reads frames."""
        slots = [slot for slot, value in node.operands() if value in self.frames]
        if not slots:
            return
        if node.regions:
            raise PassError(f"{node.label} reads frames in a branch or a loop: that has no form for a stream")
        # A layer that is a module of its own stays one: what it needs of earlier frames is joined outside of it.
        inside = len(node.scope) > 1 and self.nodes_at[node.scope[-1:]] == 1
        self.buffers.scope = node.scope[:-1] if inside else node.scope
        with self.build.at(node):
            self._rule(node, slots)(node, slots)

    def _rule(self, node: Node, slots: Sequence[int]) -> Callable[[Node, Sequence[int]], None]:
        frames = self.frames[node.inputs[slots[0]]]  # type: ignore[index]
        if slots == [0]:
            if node.op in _RECURRENT:
                return self._recurrent
            if node.op == "conv" and frames.axis >= frames.value.rank - _spatial(node):
                return self._window
            if node.op == "conv_transpose" and frames.axis >= frames.value.rank - _spatial(node):
                return self._transposed
            if node.op in _POOLS and frames.axis >= frames.value.rank - _spatial(node):
                return self._window
            if node.op == "pad" and any(_pads(node)[frames.axis]):
                return self._pad
            if node.op == "slice" and node.attributes["dim"] % frames.value.rank == frames.axis:
                return self._slice
        return self._each

    # -- frame by frame ----------------------------------------------------------------------------------------------

    def _each(self, node: Node, slots: Sequence[int]) -> None:
        local, dim = self._frames_axis(node, slots)
        given = [self.frames[node.inputs[slot]] for slot in slots]  # type: ignore[index]
        delay = max(frames.delay for frames in given)
        if delay < 0 and not _keeps_zeros(node, len(slots)):
            delay = 0  # what is made of the zeros in front has to be computed
        late = [self.buffers.delayed(frames, delay, node.name) for frames in given]
        if len({frames.count for frames in late}) > 1:
            raise PassError(f"{node.label} reads values that have different numbers of frames in a step")
        operands = list(node.inputs)
        for slot, frames in zip(slots, late, strict=True):
            operands[slot] = frames.value
        attributes = dict(node.attributes)
        for name, extents in local.call.derived.items():
            attributes[name] = _sizes(extents, dim, late[0].count)
        fewest = min(late, key=lambda frames: frames.reached)
        self._put(node, operands, attributes, [replace(fewest, axis=_axis(axes, dim)) for axes in local.results])

    def _frames_axis(self, node: Node, slots: Sequence[int]) -> tuple[LocalAxes, Dim]:
        """The axes of a node and the Dim of its frames; raises PassError where they are not mapped one by one."""
        local = local_axes(node)
        if local is None:
            raise PassError(f"{node.label} has no axis rule that fits: what it does with frames is not known")
        found = [leaves(local.operands[slot][self.frames[node.inputs[slot]].axis]) for slot in slots]  # type: ignore[index]
        dim = found[0][0] if found[0] else None
        if dim is None or any(dims != [dim] for dims in found):
            raise PassError(f"{node.label} takes the axis of frames apart or joins it with another")
        roles = {role for role, extent in local.call.roles if dim in leaves(extent)} - _PER_FRAME
        if roles:
            raise PassError(f"{node.label} cannot go frame by frame: for the axis of frames it is {_words(roles)}")
        for slot, value in node.operands():
            if value not in self.frames and any(dim in leaves(extent) for extent in local.operands[slot]):
                raise PassError(f"{node.label} combines frames with {value}, which differs from frame to frame")
        if any([leaves(extent) for extent in axes].count([dim]) != 1 for axes in local.results):
            raise PassError(f"{node.label} joins the axis of frames with another, or drops it")
        return local, dim

    def _put(self, node: Node, operands: Sequence[Operand], attributes: Mapping[str, Any], kinds: list[Frames]) -> None:
        made = self.build(node.op, *operands, name=node.name, **attributes)
        values = made if isinstance(made, tuple) else (made,)
        for old, new, kind in zip(node.outputs, values, kinds, strict=True):
            self.frames[old] = replace(kind, value=new)

    # -- windows -----------------------------------------------------------------------------------------------------

    def _window(self, node: Node, slots: Sequence[int]) -> None:
        frames = self.frames[node.inputs[0]]  # type: ignore[index]
        spatial = _spatial(node)
        place = frames.axis - (frames.value.rank - spatial)
        options: dict[str, list[int]] = {
            name: list(per_axis(node.attributes.get(name, usual), spatial)) for name, usual in _USUAL.items()
        }
        dilation, padding = options["dilation"][place], options["padding"][place]
        if node.attributes.get("ceil_mode") or (padding and node.op != "conv"):
            raise PassError(f"{node.label} pools windows that lie partly beside the signal, which no step can give")
        window = Window((_places(node, place) - 1) * dilation, options["stride"][place], padding, padding)
        found = self.buffers.windowed(frames, self._padded(window, frames, node), node)
        options["padding"][place] = 0
        attributes = {name: tuple(options[name]) if name in options else v for name, v in node.attributes.items()}
        self._put(node, [found.value, *node.inputs[1:]], attributes, [found] * len(node.outputs))

    def _transposed(self, node: Node, slots: Sequence[int]) -> None:
        """Frame i of the input is spread over those from i stride - padding on; a step ends with a whole stride."""
        given = self.frames[node.inputs[0]]  # type: ignore[index]
        frames = self.buffers.delayed(given, max(0, given.delay), node.name)
        spatial = _spatial(node)
        place = frames.axis - (frames.value.rank - spatial)
        options = {name: list(per_axis(node.attributes[name], spatial)) for name in (*_USUAL, "output_padding")}
        stride, padding, more = (options[name][place] for name in ("stride", "padding", "output_padding"))
        reach = (_places(node, place) - 1) * options["dilation"][place]
        if frames.delay > 0 and reach > padding and self.padding != "signal":
            raise PassError(
                f"{node.label} spreads {frames.delay} frames before the signal, which stand for nothing, into it: "
                "padding=signal lets them be"
            )
        total = (frames.total - 1) * stride - 2 * padding + reach + 1 + more
        before = 0 if self.padding == "causal" else padding
        reached = max(0, min(total, frames.reached * stride - before))
        earlier = reach // stride
        options["padding"][place], options["output_padding"][place] = 0, max(0, stride - reach - 1)
        attributes = {name: tuple(options[name]) if name in options else v for name, v in node.attributes.items()}
        value = self.buffers.with_earlier(frames, earlier, node.name)
        whole = self.build(node.op, value, *node.inputs[1:], name=node.name, **attributes)
        taken = self.buffers.part(whole, frames.axis, earlier * stride, (earlier + frames.count) * stride)
        edge = frames.edge or (node.label if reached < total else "")
        delay = frames.delay * stride + before
        self.frames[node.output] = replace(frames, value=taken, delay=delay, total=total, reached=reached, edge=edge)

    def _padded(self, window: Window, frames: Frames, node: Node) -> Window:
        """A window with zeros on both sides as they are read in a stream; raises PassError where they cannot be."""
        if self.padding == "causal":
            window = replace(window, before=window.before + window.after, after=0)
        if window.before and frames.delay > 0 and self.padding != "signal":
            raise PassError(
                f"{node.label} puts zeros in front of frames that come {frames.delay} late, behind others that stand "
                "for nothing: padding=causal lets layers look back only, padding=signal reads what comes there instead"
            )
        return window

    def _pad(self, node: Node, slots: Sequence[int]) -> None:
        frames = self.frames[node.inputs[0]]  # type: ignore[index]
        pads = [list(pair) for pair in _pads(node)]
        before, after = pads[frames.axis]
        if node.attributes["mode"] != "constant" or node.attributes["value"] != 0 or not _numbers((before, after)):
            raise PassError(
                f"{node.label} puts other things than zeros beside the signal: that has no form for a stream"
            )
        window = self._padded(Window(0, 1, before, after), frames, node)
        pads[frames.axis] = [0, 0]
        value = frames.value
        if any(map(any, pads)):
            value = self.build.pad(value, **{**node.attributes, "pads": tuple(map(tuple, pads))})
        counted = moved(frames, window, node)
        self.frames[node.output] = replace(counted, value=value, delay=frames.delay - window.before)

    def _slice(self, node: Node, slots: Sequence[int]) -> None:
        frames = self.frames[node.inputs[0]]  # type: ignore[index]
        start, step = node.attributes["start"], node.attributes["step"]
        size: Any = evaluate(node.output.shape[frames.axis], self.sizes)
        if not _numbers((start, step, size)):
            raise PassError(f"{node.label} starts at a frame that depends on how many there are")
        window = Window(0, step, -start)
        if step == 1:
            found = replace(moved(frames, window, node), delay=frames.delay + start)
        else:
            found = self.buffers.windowed(frames, window, node)
            end = frames.count - step + 1
            taken = self.build.slice(found.value, dim=frames.axis, start=0, end=end, step=step)
            found = replace(found, value=taken)
        self.frames[node.output] = replace(found, total=size, reached=min(size, found.reached))

    # -- layers that run along the frames ----------------------------------------------------------------------------

    def _recurrent(self, node: Node, slots: Sequence[int]) -> None:
        count = len(node.outputs) - 1  # of states
        given = self.frames[node.inputs[0]]  # type: ignore[index]
        if node.attributes["bidirectional"]:
            raise PassError(f"{node.label} runs backward too: it needs the end of the signal")
        if given.axis != (1 if node.attributes["batch_first"] else 0):
            raise PassError(f"{node.label} runs along another axis than that of frames")
        if given.delay > 0:
            raise PassError(
                f"{node.label} would run over {given.delay} frames before the signal, which stand for nothing"
            )
        if not all(_is_zero(value) for value in node.inputs[1 : 1 + count]) or any(o.uses for o in node.outputs[1:]):
            raise PassError(f"{node.label} starts from a state that is not zero, or its last state is read")
        frames = self.buffers.delayed(given, 0, node.name)
        last = enumerate(node.outputs[1:])
        states = [self.buffers.state(f"{node.name}.{place}", value.shape, value) for place, value in last]
        whole = node.outputs[0]
        shape = tuple(frames.count if axis == frames.axis else size for axis, size in enumerate(whole.shape))
        results = [(shape, whole.dtype), *((state.shape, state.dtype) for state in states)]
        operands = [frames.value, *states, *node.inputs[1 + count :]]
        made = self.build(node.op, *operands, name=node.name, results=results, **node.attributes)
        self.buffers.pairs += zip(states, made[1:], strict=True)
        self.frames[whole] = replace(frames, value=made[0])


# -- what is read of nodes ---------------------------------------------------------------------------------------------


def _spatial(node: Node) -> int:
    """Over how many axes, the last ones, a window slides."""
    if node.op in _CONVOLUTIONS:
        weight = node.inputs[1]
        return weight.rank - 2 if isinstance(weight, Value) else 0
    return len(node.attributes["kernel_size"])


def _places(node: Node, place: int) -> int:
    """The places of a window along one of its axes."""
    weight = node.inputs[1] if node.op in _CONVOLUTIONS else None
    size: Any = weight.shape[2 + place] if isinstance(weight, Value) else node.attributes["kernel_size"][place]
    if not isinstance(size, int):
        raise PassError(f"{node.label} has a window of a dynamic size")
    return size


def _pads(node: Node) -> Sequence[tuple[Size, Size]]:
    pads: Sequence[tuple[Size, Size]] = node.attributes["pads"]
    return pads


def _numbers(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _is_zero(operand: Operand) -> bool:
    """Whether a first state is all zeros, however many."""
    node = operand.producer if isinstance(operand, Value) else None
    if node is not None and node.op in ("expand", "reshape"):
        return _is_zero(node.inputs[0])
    if node is not None and node.op == "full":
        return bool(node.attributes["value"] == 0)
    return isinstance(operand, Parameter) and operand.kind == "constant" and not bool(operand.tensor.any())


def _keeps_zeros(node: Node, streamed: int) -> bool:
    """Whether a node makes zeros of zeros."""
    zero_at_zero = (Symmetry.LINEAR, Symmetry.LAYOUT, Symmetry.HOMOGENEOUS, Symmetry.ODD)
    return streamed == len(node.inputs) and symmetry_of(node) in zero_at_zero


def _axis(axes: Sequence[Extent], dim: Dim) -> int:
    return next(axis for axis, extent in enumerate(axes) if leaves(extent) == [dim])


def _sizes(derived: Any, dim: Dim, count: int) -> Any:
    """The sizes of a (nested tuple of) extents where one Dim has another size; numbers stay as they are."""
    if isinstance(derived, tuple | list):
        return tuple(_sizes(part, dim, count) for part in derived)
    if not isinstance(derived, Dim | Product | Concat):
        return derived
    found = resolve(derived)
    if isinstance(found, Dim):
        return count if found is dim else found.size
    if isinstance(found, Product):
        return product([_sizes(part, dim, count) for part in found.factors])
    return total([_sizes(part, dim, count) for part in found.segments])


def _words(roles: set[str]) -> str:
    words = {
        "contract": "summed over",
        "reduce": "reduced",
        "normalise": "normalised over",
        "window": "a window's",
        "scan": "run along",
    }
    return " and ".join(words.get(role, "needed as a whole") for role in sorted(roles))
