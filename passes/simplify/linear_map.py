"""One linear map, whatever its operator: its slots, its axes, and another map in its place.

    linear(x, w, b)    conv(x, w, b)    conv_transpose(x, w, b)    matmul(x, w) with a weight of two axes

Which axes of a weight a vector runs along is read off the operator's axis rule, through a reshape or a permutation that
stands next to the map too, so that one rule serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.axis_rules.rules import Axes
from regauge.ir.cost import local_figures
from regauge.ir.dims.extents import Extent, Product
from regauge.ir.dims.local_axes import LocalAxes, Spread, lay_along, local_axes
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.rewrite import refuse
from regauge.ir.sizes.expressions import same
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, itself, new_weight, number, successor

MAPS = ("linear", "conv", "conv_transpose", "matmul")
LAYOUTS = ("permute", "reshape", "unsqueeze", "squeeze")
X, W, BIAS = 0, 1, 2  # the operand slots of a linear map


def axes_of(node: Node, x: Axes | None = None) -> LocalAxes:
    """The axes of a node, given those of its first operand; refuses where its rule does not fit."""
    found = local_axes(node, None if x is None else {X: x})
    return found if found is not None else refuse(f"the axis rule of {node.op} does not fit")


def own_weight(build: Builder, node: Node) -> Parameter:
    """The weight of a linear map that nothing else reads; refuses otherwise."""
    weight = node.inputs[W]
    if not isinstance(weight, Parameter) or not weight.stored:
        return refuse("its weight is computed")
    real = isinstance(weight.dtype, torch.dtype) and weight.dtype.is_floating_point
    if fixed(build, weight) is None or not real or weight.dtype != node.output.dtype:
        return refuse(f"its weight {weight.name} is read or written by more than nodes, or of another type")
    if len(weight.uses) > 1:
        return refuse(f"its weight {weight.name} has other readers")
    if build.graph.parameters.get(weight.name) is not weight:
        return refuse(f"its weight {weight.name} belongs to an enclosing graph")
    if node.op == "matmul" and weight.rank != 2:
        return refuse(f"its weight {weight.name} has {weight.rank} axes, not two")
    bias = bias_of(node)
    if bias is not None and not (isinstance(bias, Parameter) and fixed(build, bias)):
        return refuse("its bias is computed")
    return weight


def bias_of(node: Node) -> Operand:
    return node.inputs[BIAS] if len(node.inputs) > BIAS else None


def channel_axis(node: Node) -> int:
    """The axis of the result that the bias of a linear map runs along; the first one without batch axes."""
    weight = node.inputs[W]
    assert isinstance(weight, Value)
    return node.output.rank - 1 if node.op in ("linear", "matmul") else node.output.rank - weight.rank + 1


def input_axis(node: Node) -> int:
    """The axis of its operand that a linear map contracts."""
    x, weight = node.inputs[X], node.inputs[W]
    assert isinstance(x, Value) and isinstance(weight, Value)
    return x.rank - 1 if node.op in ("linear", "matmul") else x.rank - weight.rank + 1


def channels(node: Node) -> int:
    """How many output channels a linear map has."""
    size = node.output.shape[channel_axis(node)]
    return size if isinstance(size, int) else refuse("its number of output channels is dynamic")


def has_zero_padding(node: Node) -> bool:
    """Whether zeros are put around the input of a convolution."""
    padding = node.attributes.get("padding", 0)
    return any(padding) if isinstance(padding, tuple) else bool(padding)


@dataclass(frozen=True)
class Factor:
    """A number, or one number per index of an extent, by which something is multiplied or to which it is added."""

    value: Fixed
    extent: Extent

    def along(self, axes: Axes, what: str) -> Fixed:
        """The factor as a tensor that broadcasts against one with these axes; refuses where it runs along others."""
        lay: Spread | None = lay_along(axes, self.extent)
        if lay is None:
            return refuse(f"what it is combined with does not run along {what} alone")
        return combined(lambda vector: lay(vector.reshape(-1)), self.value)


def factor(build: Builder, operand: Operand, axes: Axes, function: Any = lambda t: t) -> Factor:
    """``function`` of an operand that is broadcast against a value with these axes; refuses where it is computed."""
    value = fixed(build, operand)
    if value is None:
        return refuse(f"{operand} is computed from inputs")
    shape = operand.shape if isinstance(operand, Value) else ()
    offset = len(axes) - len(shape)
    if offset < 0:
        return refuse(f"{operand} has more axes than what it is combined with")
    extent = Product([axes[offset + axis] for axis, size in enumerate(shape) if not same(size, 1)])
    return Factor(combined(function, value), extent)


def rebuilt(build: Builder, node: Node, weight: Parameter, bias: Operand, x: Operand | None = None) -> Value:
    """The linear map with other weights, in the place of the old one; the bias of a matmul is added behind it."""
    given = node.inputs[X] if x is None else x
    with build.at(node):
        if node.op == "matmul":
            result: Value = build.matmul(given, weight)
            return result if bias is None else build.add(result, bias)
        result = build(node.op, given, weight, bias, name=node.name, **node.attributes)
    return result


def old_bias(node: Node) -> Fixed:
    """The bias of a linear map, zero where there is none."""
    bias = bias_of(node)
    return itself(bias) if isinstance(bias, Parameter) else number(0.0)


def placed_bias(build: Builder, node: Node, value: Fixed, size: int | None = None) -> Parameter:
    """``value`` as the bias of a linear map, in place of its old one where nothing else reads that."""
    size = channels(node) if size is None else size
    whole = combined(lambda tensor: tensor.expand(size), value)
    old = bias_of(node)
    if isinstance(old, Parameter) and len(old.uses) == 1 and build.graph.parameters.get(old.name) is old:
        return successor(build, old, whole, (size,))
    weight = node.inputs[W]
    assert isinstance(weight, Parameter)
    stem = weight.name.removesuffix("weight").removesuffix(".")
    return new_weight(build, f"{stem}.bias" if stem else "bias", weight, whole, (size,))


def must_pay(build: Builder, before: Sequence[Node]) -> None:
    """Refuse where what was built in place of some nodes has more parameters or needs more MACs than they, or
    weights of more entries that are not zero."""
    old, new = (local_figures(nodes, build.graph) for nodes in (before, build.added))
    if new.parameters > old.parameters or new.macs > old.macs:
        refuse(
            f"merged they would have {new.parameters} parameters and {new.macs} MACs, "
            f"not {old.parameters} and {old.macs}"
        )
    entries, others = (_entries(nodes) for nodes in (before, build.added))
    if others > entries:
        refuse(f"merged their weights would have {others} entries that are not zero, not {entries}")


def _entries(nodes: Sequence[Node]) -> int:
    """How many entries of the weights of nodes are not zero: products of sparse matrices are less sparse than they."""
    weights = dict.fromkeys(value for node in nodes for _, value in node.operands() if value.rank > 1)
    return sum(int(own.tensor.count_nonzero()) for own in weights if isinstance(own, Parameter))


def must_fit(new: Value, old: Value) -> Value:
    """Refuse where a replacement cannot be seen to have the shape of what it replaces."""
    if new.rank != old.rank or new.dtype != old.dtype or not all(map(same, new.shape, old.shape)):
        return refuse(f"merged they would give {new.signature}, not {old.signature}")
    return new
