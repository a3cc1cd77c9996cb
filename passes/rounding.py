"""Keeping the sizes of axes multiples of a number, where an axis is a product or a sum of several Dims.

    group_norm of 4 groups over 32 channels, axis (4 8), multiple of 16     32 = 4 x 8  ->  16 = 4 x 4

A Dim alone need not be a multiple: it is enough that its axis is. How much is asked of a Dim depends on the others of
its axes, so Dims are decided one after the other, minor ones (the fastest index) first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from regauge.ir.dims.extents import Concat, Dim, Extent, Product, leaves, resolve, size_of
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import product, total


class Rounding:
    """What a graph's axes ask of its Dims when each must be a multiple of ``multiple``.

    The axes are those of trained parameters; of a Dim that none has, those of buffers and constants.
    """

    def __init__(self, graph: Graph, multiple: int) -> None:
        self.multiple = multiple
        self._axes: dict[Dim, list[Extent]] = {}
        self._minors: dict[Dim, int] = {}
        for extent, trained in _axes(graph) if multiple > 1 else ():
            for place, dim in enumerate(reversed(leaves(extent))):
                if trained or dim not in self._minors:
                    self._axes.setdefault(dim, []).append(extent)
                if trained:
                    self._minors[dim] = max(place, self._minors.get(dim, 0))

    def ordered(self, dims: Sequence[Dim]) -> list[Dim]:
        """The Dims in the order in which they are to be decided: minor before major."""
        return sorted(dims, key=lambda dim: self._minors.get(dim, 0))

    def needed(self, dim: Dim, decided: Mapping[Dim, int]) -> int:
        """What the size of a Dim must be a multiple of, when those decided have a size with the given divisors.

        The rest of each axis counts as it is. Where a Dim cannot meet that it must keep its size.
        """
        asked = (_asked(extent, dim, self.multiple, decided) for extent in self._axes.get(dim, ()))
        return math.lcm(*asked)


def _axes(graph: Graph) -> Iterator[tuple[Extent, bool]]:
    """The axes of parameters that hold several Dims or one, each once; trained parameters come first."""
    for parameter in sorted(graph.all_parameters(), key=lambda p: p.kind != "parameter"):
        for extent in graph.axes.of[parameter]:
            yield resolve(extent), parameter.kind == "parameter"


def _asked(extent: Extent, dim: Dim, multiple: int, decided: Mapping[Dim, int]) -> int:
    if isinstance(extent, Dim):
        return multiple if extent is dim else 1
    if isinstance(extent, Concat):
        return math.lcm(*(_asked(segment, dim, multiple, decided) for segment in extent.segments))
    asked = 1
    for place, factor in enumerate(extent.factors):
        if dim in leaves(factor):
            others = product(_size(f, dim, decided) for i, f in enumerate(extent.factors) if i != place)
            asked = math.lcm(asked, _asked(factor, dim, multiple // math.gcd(multiple, int(others)), decided))
    return asked


def _size(extent: Extent, dim: Dim, decided: Mapping[Dim, int]) -> int:
    """The size of a factor as decided so far; where the Dim in question occurs again nothing is known of it."""
    if isinstance(extent, Dim):
        return 1 if extent is dim else decided.get(extent, int(size_of(extent)))
    parts = extent.factors if isinstance(extent, Product) else extent.segments
    sizes = [_size(part, dim, decided) for part in parts]
    return int(product(sizes) if isinstance(extent, Product) else total(sizes))
