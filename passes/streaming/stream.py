"""``stream``: a network over whole signals as one that takes a few frames at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import sympy

from regauge.ir.edit import dead_nodes, record, remove_dead, remove_node
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Value
from regauge.ir.states import carry, forget_origin
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.options import option
from regauge.passes.streaming.frames import Frames
from regauge.passes.streaming.signals import STREAM, StreamForm
from regauge.passes.streaming.steps import Padding, StepWriter

_MANY = 1 << 20  # steps of a signal whose length is not fixed: more than any window spans


@dataclass(frozen=True, kw_only=True)
class Stream(Pass):
    """Take a few frames at a time, and carry what is needed of earlier ones as states.

    before  y = conv(x, w)                                  x: f32[1,8,1000]    w: f32[16,8,3]
    after   y = conv(concat(x_state, x), w)                 x: f32[1,8,10], x_state: f32[1,8,2]
            x_state.next = the last two frames of both

    What the steps give, one behind the other, is what the whole signal gives: frame for frame, behind as many frames as
    the report says, which come first and stand for nothing. ``regauge.Steps`` runs them, and ``regauge.run_stream`` a
    whole signal. Streams are convolutions that look back only, or without zeros beside the signal, transposed ones,
    pools, LSTMs, and whatever goes frame by frame; branches wait for one another. Zeros behind the end of a signal
    cannot be known: a network of such convolutions is refused, unless ``padding`` says that it may become another one.
    """

    name: ClassVar[str] = "stream"
    contract: ClassVar[Contract] = "approximate"  # of steps: no run of one graph is a run of the other

    chunk: int = option(1, "frames of the input in a step, a multiple of all strides together", at_least=1)
    axis: int = option(-1, "the axis of the inputs that frames come along")
    inputs: tuple[str, ...] = option((), "inputs that come in frames; if not given, all")
    padding: Padding = option(
        "exact",
        "zeros beside the signal: exact refuses those behind it, causal moves them to its front (another function, "
        "which looks back only), signal reads what comes there instead (equal but near both ends)",
    )

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        steps = StepWriter(result, self._sizes(result), self.padding)
        named = self._streamed(result)
        for value in named:
            self._enter(steps, value)
        for node in list(result.nodes):
            steps.write(node)
        found = self._outputs(result, steps)
        _finish(result, steps, named, found)
        axes = {steps.frames[value].value.name: self._axis(value) for value in named}
        delays = tuple(frames.delay for frames in found)
        result.metadata[STREAM] = StreamForm(self.chunk, axes, tuple(frames.axis for frames in found), delays)
        for frames in found:
            late = f", the first {frames.delay} of all stand for nothing" if frames.delay else ""
            context.note(f"{frames.value.name}: {frames.count} frames in a step{late}")
        count = len(steps.buffers.pairs)
        context.note(f"{count} states are carried")
        record(result, self.name, f"{self.chunk} frames in a step, {count} states")
        return result

    def _outputs(self, graph: Graph, steps: StepWriter) -> list[Frames]:
        """The frames of the outputs, each with a value of its own; none is there before the first step."""
        found: list[Frames] = []
        for output in graph.outputs:
            frames = steps.frames.get(output) if isinstance(output, Value) else None
            if frames is None:
                raise PassError("stream: an output does not depend on what comes in frames: take it out of the graph")
            self._check(frames)
            late = steps.buffers.delayed(frames, max(0, frames.delay), "output")
            taken = {other.value for other in found} | {state for _, state in steps.buffers.pairs}
            if late.value.producer is None or late.value in taken:
                late = replace(late, value=steps.build.identity(late.value))
            found.append(late)
        return found

    def _axis(self, value: Value) -> int:
        if not -value.rank <= self.axis < value.rank:
            raise PassError(
                f"stream: the input {value} has no axis {self.axis}: name the inputs that have with inputs="
            )
        return self.axis % value.rank

    def _streamed(self, graph: Graph) -> list[Value]:
        names = [value.name for value in graph.inputs]
        for name in self.inputs:
            if name not in names:
                raise PassError(f"stream: the graph has no input {name!r}: there are {', '.join(names)}")
        return [value for value in graph.inputs if not self.inputs or value.name in self.inputs]

    def _sizes(self, graph: Graph) -> dict[sympy.Symbol, int]:
        """The sizes that dynamic axes of frames are counted with."""
        sizes = [value.shape[self._axis(value)] for value in self._streamed(graph)]
        return {size: _MANY * self.chunk for size in sizes if isinstance(size, sympy.Symbol)}

    def _enter(self, steps: StepWriter, value: Value) -> None:
        axis = self._axis(value)
        size = value.shape[axis]
        known = size if isinstance(size, int) else steps.sizes.get(size)
        if known is None:
            raise PassError(f"stream: the axis {axis} of the input {value} is no size of its own")
        shape = tuple(self.chunk if place == axis else size for place, size in enumerate(value.shape))
        steps.frames[value] = Frames(steps.build.input(value.name, shape, value.dtype), axis, 0, known, known)

    def _check(self, frames: Frames) -> None:
        if self.padding == "exact" and frames.reached < frames.total:
            raise PassError(
                f"{frames.edge} reads zeros behind the end of the signal, which no step can know: padding=causal moves "
                "them to the front, padding=signal reads what comes there instead"
            )


def _finish(graph: Graph, steps: StepWriter, named: list[Value], found: list[Frames]) -> None:
    """Leave the graph of the steps alone: inputs, then states; outputs, then what the states become."""
    names = {frames.value: old.name for old, frames in zip(graph.outputs, found, strict=True) if isinstance(old, Value)}
    for old, frames in steps.frames.items():
        names.setdefault(frames.value, old.name)
    states = [state for state, _ in steps.buffers.pairs]
    entered = {value: steps.frames[value].value for value in named}
    given = [value for value in graph.inputs if value not in {*entered.values(), *states}]
    graph.inputs = [*(entered.get(value, value) for value in given), *states]
    graph.outputs = [frames.value for frames in found]
    graph.version += 1
    for before, after in steps.buffers.pairs:
        carry(graph, before, after)
    for node in dead_nodes(graph):
        remove_node(graph, node)
    remove_dead(graph)
    taken = {value.name for value in graph.values()}
    for value, name in names.items():
        if name not in taken and value.name in taken:
            taken ^= {name, value.name}
            value.name = name
    for symbol in steps.sizes:
        graph.symbols.pop(symbol, None)
    forget_origin(graph)
