"""From what a search found to nodes: contractions become linear maps and matmuls, the rest elementwise operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size, product, same
from regauge.passes.deriving.expressions import Axes, Axis, Index, Range
from regauge.passes.deriving.layouts import Laid, has_whole, is_weight
from regauge.passes.deriving.sources import (
    Contracted,
    Convolved,
    Gathered,
    Leaf,
    Products,
    Shifted,
    Source,
    Tensor,
    Unfolded,
    biases,
    range_of,
)
from regauge.passes.deriving.window_lowering import convolved, is_image, pointwise, shifted, unfolded


class Lowering:
    """Builds the nodes of one expression; what several terms read is built once."""

    def __init__(self, build: Builder, result: Axes) -> None:
        self.build = build
        self.order = {index: place for place, index in enumerate(i for axis in result for i in axis)}
        self.result = result
        self._made: dict[Source, Laid] = {}
        self._biases: dict[Source, Tensor] = {}

    def root(self, terms: Products, shape: Sequence[Size]) -> Value:
        """The value of all terms together, in the shape of the result."""
        terms = self._without_biases(terms)
        parts = [self._term(scale, tensors) for scale, tensors in terms]
        total = parts[0]
        for part in parts[1:]:
            total = self._joined("add", total, part)
        value = self.arranged(total, self.result)
        if not all(map(same, value.shape, shape)):
            value = self.build.expand(value, shape=tuple(shape))
        return value

    def _without_biases(self, terms: Products) -> Products:
        """The terms without those that are a bias of others, which are laid out with them."""
        gone = set()
        for place, other in biases(terms).items():
            (whole,), (bias,) = terms[place][1], terms[other][1]
            assert isinstance(whole.source, Contracted | Convolved)
            names = dict(zip(whole.indices, whole.source.kept, strict=True))
            self._biases[whole.source] = Tensor(bias.source, tuple(names[index] for index in bias.indices))
            self.tensor(whole)
            if self._biases.pop(whole.source, None) is None:
                gone.add(other)
        return tuple(term for place, term in enumerate(terms) if place not in gone)

    def _term(self, scale: float, tensors: tuple[Tensor, ...]) -> Laid:
        (tensor,) = tensors
        laid = self.tensor(tensor)
        return laid if scale == 1 else Laid(self.build.mul(laid.value, scale), laid.axes)

    def tensor(self, tensor: Tensor) -> Laid:
        """A tensor; of a source that others read along other indices the same value."""
        source = tensor.source
        own = source.kept if not isinstance(source, Leaf) else tuple(i for axis in source.axes for i in axis)
        if source not in self._made:
            self._made[source] = self._source(source)
        new = dict(zip(own, tensor.indices, strict=True))
        laid = self._made[source]
        return Laid(laid.value, tuple(tuple(new[index] for index in axis) for axis in laid.axes))

    def _source(self, source: Source) -> Laid:
        if isinstance(source, Leaf):
            assert isinstance(source.value, Value)  # a range is part of what it is contracted with
            return Laid(source.value, source.axes)
        if isinstance(source, Gathered):
            return self._gathered(source)
        if isinstance(source, Convolved):
            return convolved(self, source, self.tensor(source.left), self.tensor(source.right))
        if isinstance(source, Shifted):
            return shifted(self, source, self.tensor(source.left))
        if isinstance(source, Unfolded):
            return unfolded(self, source, self.tensor(source.left))
        if source.right is None:
            return self.summed(self.tensor(source.left), source.kept)
        found = range_of(source.right)
        if found is not None:
            return self._in_range(self.tensor(source.left), found, *source.right.indices)
        return self._contracted(source, self.tensor(source.left), self.tensor(source.right))

    def _in_range(self, laid: Laid, found: Range, wide: Index, narrow: Index) -> Laid:
        """A part of what has the wide index, or zeros around what has the narrow one."""
        old, new = (wide, narrow) if wide in laid.flat else (narrow, wide)
        if not has_whole(laid.axes, (old,)):
            axes = tuple((index,) for index in laid.flat)
            laid = Laid(self.arranged(laid, axes), axes)
        dim = laid.axes.index((old,))
        if old is wide:
            value = self.build.slice(laid.value, dim=dim, start=found.start, end=found.start + found.narrow, step=1)
        else:
            pads = [(0, 0)] * len(laid.axes)
            pads[dim] = (found.start, found.wide - found.narrow - found.start)
            value = self.build.pad(laid.value, pads=tuple(pads))
        return Laid(value, (*laid.axes[:dim], (new,), *laid.axes[dim + 1 :]))

    def bias(self, source: Source, columns: Axis) -> Value | None:
        """The bias of a product, where it has one that lies as its columns do; repeated along those that it lacks."""
        found = self._biases.get(source)
        if found is None or found.indices != tuple(index for index in columns if index in found.indices):
            return None
        del self._biases[source]
        laid = self.tensor(found)
        if found.indices == _of_several(columns):
            return self._shaped(laid.value, (columns,))
        axes = tuple((index,) for index in columns)
        whole = self.build.expand(self.arranged(laid, axes), shape=tuple(index.size for index in columns))
        return self._shaped(whole, (columns,))

    # -- sums and elementwise products -------------------------------------------------------------------------------

    def _gathered(self, source: Gathered) -> Laid:
        """The sum of the parts, one after the other, each times its scale."""
        total: Laid | None = None
        for scale, tensor in source.parts:
            part = self.tensor(tensor)
            if total is None:
                total = part
            elif scale == -1:
                total = self._joined("sub", total, part)
            else:
                part = part if scale == 1 else Laid(self.build.mul(part.value, scale), part.axes)
                total = self._joined("add", total, part)
        assert total is not None
        return total

    def _joined(self, op: str, first: Laid, second: Laid) -> Laid:
        """An elementwise operator of both, along the axes of the larger one where that has all indices."""
        if set(first.flat) >= set(second.flat):
            axes = first.axes if has_whole(first.axes, second.flat) else tuple((i,) for i in first.flat)
        elif set(second.flat) >= set(first.flat) and has_whole(second.axes, first.flat):
            axes = second.axes
        else:
            every = dict.fromkeys((*first.flat, *second.flat))
            axes = tuple((index,) for index in sorted(every, key=lambda index: self.order.get(index, len(self.order))))
        kept = [tuple(a if set(a) <= set(laid.flat) else () for a in axes) for laid in (first, second)]
        left, right = (self.arranged(laid, own) for laid, own in zip((first, second), kept, strict=True))
        return Laid(self.build(op, left, right), axes)

    def summed(self, laid: Laid, kept: Iterable[Index]) -> Laid:
        """Sum over all indices but those that are kept."""
        gone = set(laid.flat) - set(kept)
        if not gone:
            return laid
        if not has_whole(laid.axes, gone):
            laid = Laid(self.arranged(laid, tuple((i,) for i in laid.flat)), tuple((i,) for i in laid.flat))
        dims = tuple(place for place, axis in enumerate(laid.axes) if axis and gone.issuperset(axis))
        rest = tuple(axis for place, axis in enumerate(laid.axes) if place not in dims)
        return Laid(self.build.sum(laid.value, dims=dims), rest)

    # -- contractions ------------------------------------------------------------------------------------------------

    def _contracted(self, source: Contracted, left: Laid, right: Laid) -> Laid:
        """The product of two tensors: elementwise where nothing is summed, else a linear map or a matmul."""
        kept, shared = set(source.kept), set(left.flat) & set(right.flat)
        left, right = (self.summed(laid, kept | shared) for laid in (left, right))
        if not shared - kept:
            return self._joined("mul", left, right)
        if self._swapped(left, right, shared - kept):
            left, right = right, left
        summed = tuple(index for index in right.flat if index in shared and index not in kept)
        batch = tuple(index for index in left.flat if index in shared and index in kept)
        rows = tuple(index for index in left.flat if index not in shared)
        columns = tuple(index for index in right.flat if index not in shared)
        if batch:
            return self._batched(left, right, batch, rows, columns, summed)
        if columns and is_image(left, right, summed):
            return pointwise(self, source, left, right, columns)
        lead = _groups(left.axes, rows)
        x = self.arranged(left, (*lead, summed))
        ends = (*lead, columns) if columns else lead
        if columns and right.flat == (*columns, *summed):
            return Laid(self.build.linear(x, self.arranged(right, (columns, summed)), self.bias(source, columns)), ends)
        return Laid(self.build.matmul(x, self.arranged(right, (summed, columns) if columns else (summed,))), ends)

    def _swapped(self, left: Laid, right: Laid, summed: set[Index]) -> bool:
        """Whether the right one should stand left.

        A weight stands right. Else what is summed should lie last in the left one, and first or last in the right one;
        and rows come before columns in the result.
        """
        weights = [is_weight(laid.value) for laid in (left, right)]
        if weights[0] != weights[1]:
            return weights[0]

        def turned(x: Laid, y: Laid) -> int:
            ends = [set(laid.flat[-len(summed) :]) == summed for laid in (x, y)]
            return (not ends[0]) + (not ends[1] and set(y.flat[: len(summed)]) != summed)

        last = len(self.order)
        first = [min((self.order[i] for i in laid.flat if i in self.order), default=last) for laid in (left, right)]
        return (turned(right, left), first[1]) < (turned(left, right), first[0])

    def _batched(self, left: Laid, right: Laid, batch: Axis, rows: Axis, columns: Axis, summed: Axis) -> Laid:
        axes = tuple((index,) for index in sorted(batch, key=lambda index: self.order.get(index, len(self.order))))
        x = self.arranged(left, (*axes, rows, summed))
        y = self.arranged(right, (*axes, summed, columns))
        return Laid(self.build.matmul(x, y), (*axes, rows, columns))

    # -- layout ------------------------------------------------------------------------------------------------------

    def arranged(self, laid: Laid, axes: Axes) -> Value:
        """The value with these axes, by at most a reshape, a permute and a reshape; () is an axis of size 1.

        Indices that it does not have are axes of size 1.
        """
        has = set(laid.flat)
        wanted = tuple(axis if has.issuperset(axis) else () for axis in axes)
        if laid.axes == wanted:
            return laid.value
        value, order = laid.value, tuple(index for axis in wanted for index in axis)
        if _of_several(order) != _of_several(laid.flat):
            before, after = _pieces(laid.axes, wanted), _pieces(wanted, laid.axes)
            value = self._shaped(value, before)
            value = self.build.permute(value, dims=tuple(before.index(piece) for piece in after))
        return self._shaped(value, wanted)

    def _shaped(self, value: Value, axes: Axes) -> Value:
        shape = tuple(product(index.size for index in axis) for axis in axes)
        fits = value.rank == len(shape) and all(map(same, value.shape, shape))
        result: Any = value if fits else self.build.reshape(value, shape=shape)
        return result  # type: ignore[no-any-return]


def _of_several(indices: Axis) -> Axis:
    """Indices without those of size 1, which lie anywhere."""
    return tuple(index for index in indices if not same(index.size, 1))


def _groups(axes: Axes, indices: Axis) -> Axes:
    """The axes that are made of these indices; each index for itself where some axis has others, too."""
    if has_whole(axes, indices):
        return tuple(axis for axis in axes if axis and set(indices) >= set(axis))
    return tuple((index,) for index in indices)


def _pieces(axes: Axes, other: Axes) -> Axes:
    """Parts of axes, in order, that are together in one axis of the other layout, too."""
    place = {index: (number, at) for number, axis in enumerate(other) for at, index in enumerate(axis)}
    pieces: list[list[Index]] = []
    for axis in axes:
        for at, index in enumerate(axis):
            number, position = place[index]
            if at and place[axis[at - 1]] == (number, position - 1):
                pieces[-1].append(index)
            else:
                pieces.append([index])
    return tuple(map(tuple, pieces))
