"""The axes of one node by itself: which axis of a weight makes which axis of the result, whatever the operator.

Rewrite rules ask here instead of knowing that the output channels of a convolution are axis 0 of its weight and those
of a transposed one axis 1; the answer comes from the operator's axis rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.axes import RegionCall, apply_rule
from regauge.ir.dims.extents import Concat, Dim, Extent, Product, fresh, leaves, resolve, size_of
from regauge.ir.errors import AxisError
from regauge.ir.graph import Node, Value

Spread = Callable[[torch.Tensor], torch.Tensor]


class LocalAxes:
    """Extents of the operands and of the results of one node, as if nothing else were known.

    ``given`` are extents of operands by slot: those of the results of a node before it tell what becomes of them here.
    """

    def __init__(self, node: Node, given: Mapping[int, Axes] | None = None) -> None:
        self.node = node
        known = given or {}
        axes: list[Axes | None] = [
            None
            if operand is None
            else known.get(slot, [fresh(size) for size in operand.shape])
            if isinstance(operand, Value)
            else []
            for slot, operand in enumerate(node.inputs)
        ]
        self.call = call = RegionCall(node, axes) if node.regions else Call(node, axes)
        self.results: list[Axes] = apply_rule(node.operator, call)
        self.operands: list[Axes] = [own or [] for own in axes]
        self.roles = {dim: role for role, extent in call.roles for dim in leaves(extent)}

    def axis_of(self, slot: int, extent: Extent) -> int | None:
        """The axis of an operand that has exactly these indices."""
        wanted = leaves(extent)
        found = [axis for axis, own in enumerate(self.operands[slot]) if wanted and leaves(own) == wanted]
        return found[0] if len(found) == 1 else None

    def spread(self, slot: int, extent: Extent) -> Spread | None:
        """How a vector over an extent is laid along an operand; see :func:`lay_along`."""
        return lay_along(self.operands[slot], extent)


def lay_along(axes: Axes, extent: Extent) -> Spread | None:
    """How a vector over an extent is laid along these axes: a function from the vector to a tensor that broadcasts.

    For a grouped convolution and its input channels ``(g i)`` the weight has g in axis 0 and i in axis 1; the
    vector is repeated along what else these axes hold. None where the axes lack some of the indices.
    """
    own = [leaves(axis) for axis in axes]
    dims = leaves(extent)
    if len(set(dims)) != len(dims) or any(sum(axis.count(dim) for axis in own) != 1 for dim in dims):
        return None
    sizes = [size for dim in dims if isinstance(size := dim.size, int)]
    touched = [any(dim in axis for dim in dims) for axis in own]
    flat: list[Dim | None] = [dim for axis, hit in zip(own, touched, strict=True) for dim in (axis if hit else [None])]
    if len(sizes) != len(dims) or any(_laid_end_to_end(e) for e in (extent, *axes)):
        return None
    order = [dims.index(dim) for dim in flat if dim in dims]
    narrow = [dim.size if dim in dims else 1 for dim in flat]
    wide = [1 if dim is None else dim.size for dim in flat]
    shape = [size_of(e) if hit else 1 for e, hit in zip(axes, touched, strict=True)]

    def lay(vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(sizes).permute(order).reshape(narrow).expand(wide).reshape(shape)

    return lay


def _laid_end_to_end(extent: Extent) -> bool:
    found = resolve(extent)
    if isinstance(found, Product):
        return any(_laid_end_to_end(factor) for factor in found.factors)
    return isinstance(found, Concat) and bool(found.segments)


def local_axes(node: Node, given: Mapping[int, Axes] | None = None) -> LocalAxes | None:
    """The axes of a node by its rule alone; None where the rule does not fit."""
    try:
        return LocalAxes(node, given)
    except AxisError:
        return None


def unrelated(axes: Axes, copies: dict[Dim, Dim]) -> Axes:
    """The same extents of Dims that nothing is known of; ``copies`` receives Dim -> its copy."""
    return [_unrelated(extent, copies) for extent in axes]


def _unrelated(extent: Extent, copies: dict[Dim, Dim]) -> Extent:
    found = resolve(extent)
    if isinstance(found, Dim):
        return copies.setdefault(found, Dim(found.size, found.name))
    if isinstance(found, Product):
        return Product([_unrelated(factor, copies) for factor in found.factors]) if found.factors else found
    return Concat([_unrelated(segment, copies) for segment in found.segments])
