"""Convolutions as sums of products: their windows are factors of ones and zeros, or no factors where they need none.

    taps over nothing but zeros around         a range of the kernel, which lacks them
    one tap, one step                          the index of the operand is that of the result
    one window over the whole axis             the index of the operand is the tap
    windows side by side, where read is split  the index of the operand is (window, tap)
    others                                     x[wide] w[tap] Window[wide, out, tap], summed over wide and tap

The same of transposed convolutions, with operand and result exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from regauge.ir.graph import Node, Value
from regauge.ir.ops.windows import per_axis
from regauge.ir.sizes.expressions import same
from regauge.passes.deriving.expressions import (
    Axis,
    Expression,
    Factor,
    Index,
    Outside,
    Read,
    Window,
    few,
    in_range,
    matched,
    plus,
    regrouped,
    times,
    unified,
)


@dataclass
class _Product:
    """A kernel and what it is moved over, channels known to be the same; windows that are found are collected."""

    x: Expression
    kernel: Expression
    split: bool

    def __post_init__(self) -> None:
        self.factors: list[Factor] = []
        self.results: list[Axis] = []

    def axis(self, dim: int, tap_dim: int, window: Any, *, spread: bool) -> None:
        """One axis that windows slide over: dimension ``dim`` of the operand, ``tap_dim`` of the kernel."""
        ones = ((window.stride, 1), (window.start, 0), (window.taps, 1), (window.wide, window.out))
        if all(same(*pair) for pair in ones):
            self.results.append(self.x.axes[dim])
            return
        if not all(isinstance(size, int) for size in (window.wide, window.out, window.taps)):
            raise Outside("windows over a dynamic size")
        if not spread:
            window = self._without_idle(tap_dim, window)
            if window.wide == window.out == 1:
                self.results.append(self.kernel.axes[tap_dim])
                return
        dense = window.start == 0 and window.dilation == 1
        if not spread and dense and window.out == 1 and window.taps == window.wide:
            self._unify(matched(self.x.axes[dim], self.kernel.axes[tap_dim]))
            self.results.append(())
        elif self.split and dense and window.stride == window.taps and window.wide == window.out * window.taps:
            self._side_by_side(dim, tap_dim, window, spread=spread)
        else:
            self._window(dim, tap_dim, window, spread=spread)

    def _without_idle(self, tap_dim: int, window: Window) -> Window:
        """The window with a kernel without taps that only ever meet zeros: those at the ends, more than is read."""
        live = [tap for tap, (_, low, high) in enumerate(window.parts(spread=False)) if low < high]
        if not live:
            raise Outside("windows over nothing but zeros")
        count = live[-1] - live[0] + 1
        if count == window.taps:
            return window
        self.kernel = in_range(self.kernel, tap_dim, live[0], count, wider=False, one=True)
        return replace(window, start=window.start + window.dilation * live[0], taps=count)

    def _unify(self, new: dict[Index, Axis]) -> None:
        self.x, self.kernel = self.x.with_indices(new), self.kernel.with_indices(new)
        self.results = [tuple(i for index in axis for i in new.get(index, (index,))) for axis in self.results]

    def _side_by_side(self, dim: int, tap_dim: int, window: Window, *, spread: bool) -> None:
        if spread:
            self.results.append((*self.x.axes[dim], *self.kernel.axes[tap_dim]))
            return
        out: Axis = (Index(window.out),) if window.out > 1 else ()
        new = matched(self.x.axes[dim], (*out, *self.kernel.axes[tap_dim]))
        self._unify(new)
        self.results.append(tuple(i for index in out for i in new.get(index, (index,))))

    def _window(self, dim: int, tap_dim: int, window: Window, *, spread: bool) -> None:
        own, tap = self.x.axes[dim], self.kernel.axes[tap_dim]
        made = (Index(window.wide if spread else window.out),)
        if len(own) != 1 or len(tap) > 1 or same(made[0].size, 1):
            raise Outside("windows over an axis of several indices, or of one entry")
        for part, axis in ((self.x, own), (self.kernel, tap)):
            if any(not term.indices.issuperset(axis) for term in part.terms):
                raise Outside("windows over what is the same along the axis")
        self.factors.append(Factor(window, (made, own, tap) if spread else (own, made, tap)))
        self.results.append(made)

    def result(self, channels: Axis) -> Expression:
        """The sum over channels, taps and what windows read."""
        terms = [replace(term, factors=(*term.factors, *self.factors)) for term in self.x.terms]
        few(terms)
        return times(replace(self.x, terms=tuple(terms)), self.kernel, (self.x.axes[0], channels, *self.results))


def convolution(node: Node, read: Read) -> Expression:
    """A convolution: a product over channels and taps, of what windows read."""
    return _convolution(node, read, spread=False)


def transposed_convolution(node: Node, read: Read) -> Expression:
    """A transposed convolution: products over channels, added up where windows of the result lie."""
    return _convolution(node, read, spread=True)


def _convolution(node: Node, read: Read, *, spread: bool) -> Expression:
    """Either; a transposed one has its input channels before its output channels in the kernel, and wide results."""
    x, kernel, geometry = _operands(node, read)
    groups = node.attributes["groups"]
    given, made_of = (0, 1) if spread else (1, 0)  # axes of the kernel, in each group
    if groups == 1:
        x, kernel = unified(x, kernel, lambda a, b: [(a[1], b[given])])
    else:
        x, kernel = _grouped(node, x, kernel, groups)
        x, kernel = unified(x, kernel, lambda a, b: [(a[1], b[0]), (a[2], b[1 + given])])
    made, first = _Product(x, kernel, read.split), 2 if groups == 1 else 3
    for place, (size, out, taps, stride, padding, dilation) in enumerate(geometry):
        wide, narrow = (out, size) if spread else (size, out)
        window = Window(stride, dilation, -padding, wide, narrow, taps)
        made.axis(first + place, first + place, window, spread=spread)
    axes = made.kernel.axes
    return _biased(node, read, made.result(axes[made_of] if groups == 1 else (*axes[0], *axes[1 + made_of])))


def _operands(node: Node, read: Read) -> tuple[Expression, Expression, Sequence[tuple[Any, ...]]]:
    x, weight = node.inputs[:2]
    if not isinstance(x, Value) or not isinstance(weight, Value) or x.rank != weight.rank:
        raise Outside("a convolution without a batch")
    count = x.rank - 2
    options = [per_axis(node.attributes[name], count) for name in ("stride", "padding", "dilation")]
    geometry = list(zip(x.shape[2:], node.output.shape[2:], weight.shape[2:], *options, strict=True))
    return read(x), read(weight), geometry


def _grouped(node: Node, x: Expression, kernel: Expression, groups: int) -> tuple[Expression, Expression]:
    """Both with an axis of groups before that of channels."""
    shapes = [value.shape for value in node.inputs[:2] if isinstance(value, Value)]
    each = [(groups, shape[dim] // groups) for shape, dim in zip(shapes, (1, 0), strict=True)]
    x = regrouped(x, (shapes[0][0], *each[0], *shapes[0][2:]))
    return x, regrouped(kernel, (*each[1], *shapes[1][1:]))


def _biased(node: Node, read: Read, result: Expression) -> Expression:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return result
    bias = read(node.inputs[2])
    return plus(result, replace(bias, axes=(*bias.axes, *((),) * (len(result.axes) - 2))))
