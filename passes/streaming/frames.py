"""Values that arrive frame by frame: which frames a step gives, and how earlier ones are kept.

Frames of a value are its indices along one axis. A step takes ``chunk`` frames of the input; of a value with n frames
in a step it gives those j with

    step n - delay  <=  j  <  (step + 1) n - delay

so that with a delay of d the first d frames of all stand for none of the signal, and with one of -d the frames 0 .. d-1
are there before the first step: zeros, which are put in front of the signal. A window of k places that are ``dilation``
apart, every ``stride`` frames, with ``before`` zeros in front, reads for frame j frames up to j stride + e, where
e = (k - 1) dilation - before. It gives n / stride frames in a step, and

    delay' = max(0, floor((delay + e) / stride))        kept of earlier steps: delay' stride + before - delay frames

(Kechris et al. 2024, Don't Think It Twice, where windows have no zeros in front and all begin with whole signals.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Node, Value
from regauge.ir.sizes.expressions import Size


@dataclass(frozen=True)
class Frames:
    """What becomes of a value: ``value`` is that of one step, with its frames along ``axis``.

    ``total`` counts the frames of the whole signal, ``reached`` those of them that need nothing behind its end, and
    ``edge`` is the node that made others need it.
    """

    value: Value
    axis: int
    delay: int
    total: int
    reached: int
    edge: str = ""

    @property
    def count(self) -> int:
        """Frames in a step."""
        size = self.value.shape[self.axis]
        assert isinstance(size, int)
        return size


@dataclass(frozen=True)
class Window:
    """Which frames are read for one of the result; see the module."""

    reach: int  # (places - 1) * dilation
    stride: int = 1
    before: int = 0
    after: int = 0


class Buffers:
    """The states that keep earlier frames: each is an input of the graph, and what it becomes."""

    def __init__(self, build: Builder) -> None:
        self.build = build
        self.pairs: list[tuple[Value, Value]] = []
        self.scope: tuple[tuple[str, str], ...] = ()  # the module that holds them

    def state(self, name: str, shape: tuple[Size, ...], like: Value) -> Value:
        """A new state of this shape, and of the type of another value; what it becomes goes into ``pairs``."""
        return self.build.input(f"{name}_state", shape, like.dtype)

    def with_earlier(self, frames: Frames, count: int, name: str) -> Value:
        """``count`` earlier frames in front of those of this step; where it is negative, without the first ones."""
        if count <= 0:
            return self.part(frames.value, frames.axis, -count, frames.count)
        shape = tuple(count if axis == frames.axis else size for axis, size in enumerate(frames.value.shape))
        state = self.state(name, shape, frames.value)
        size = count + frames.count
        inside, self.build.scope = self.build.scope, self.scope
        joined: Value = self.build.concat(state, frames.value, dim=frames.axis)
        kept: Value = self.build.slice(joined, dim=frames.axis, start=size - count, end=size)
        self.build.scope = inside
        self.pairs.append((state, kept))
        return joined

    def part(self, value: Value, axis: int, start: int, end: int) -> Value:
        """``value[start:end]`` along an axis; the value itself where that is all of it."""
        if (start, end) == (0, value.shape[axis]):
            return value
        inside, self.build.scope = self.build.scope, self.scope
        found: Value = self.build.slice(value, dim=axis, start=start, end=end)
        self.build.scope = inside
        return found

    def delayed(self, frames: Frames, delay: int, name: str) -> Frames:
        """The same frames later."""
        if delay == frames.delay:
            return frames
        late = self.with_earlier(frames, delay - frames.delay, name)
        return replace(frames, value=self.part(late, frames.axis, 0, frames.count), delay=delay)

    def windowed(self, frames: Frames, window: Window, node: Node) -> Frames:
        """What a window slides over in a step, without zeros; all but ``value`` speaks of what it gives."""
        if frames.count % window.stride:
            raise PassError(
                f"{node.label} takes one of {window.stride} frames, but a step has {frames.count}: let chunk be a "
                "multiple of all strides together"
            )
        delay = max(0, (frames.delay + window.reach - window.before) // window.stride)
        kept = delay * window.stride + window.before - frames.delay
        value = self.with_earlier(frames, kept, node.name)
        needed, given = frames.count - window.stride + window.reach + 1, kept + frames.count
        if given - needed >= window.stride:  # fewer at the end make no window
            value = self.part(value, frames.axis, 0, needed)
        return replace(moved(frames, window, node), value=value, delay=delay)


def moved(frames: Frames, window: Window, node: Node) -> Frames:
    """The counts of frames behind a window; all else as it was."""
    lost = window.reach - window.before
    total = max(0, (frames.total + window.after - lost - 1) // window.stride + 1)
    reached = max(0, min(total, (frames.reached - lost - 1) // window.stride + 1))
    edge = frames.edge or (node.label if reached < total else "")
    return replace(frames, total=total, reached=reached, edge=edge)
