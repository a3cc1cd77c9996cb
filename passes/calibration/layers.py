"""Layers as linear maps: a node that contracts its input with a trained weight, as one matrix on one set of rows.

    linear     y = x W' + b            rows: all leading axes; columns: input features
    matmul     y = x W                 the same, the weight stored the other way round
    conv       y = W * x + b           rows: places of the output; columns: channels by places of the kernel (im2col)

Whatever looks at a layer's input as vectors (Gram matrices, least squares, Hessians) goes through here, so that a
convolution is no special case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from regauge.ir.errors import AxisError
from regauge.ir.extents import Dim, Extent, Product, leaves, resolve, size_of
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.ops.windows import per_axis

_CONTRACTED = {"linear": 1, "conv": 1, "matmul": 0}  # the axis of the weight that the input shares


@dataclass(frozen=True)
class Layer:
    """A node with a trained weight of its own; ``matrix`` is [outputs, columns], rows of the input have the columns."""

    node: Node
    weight: Parameter
    bias: Parameter | None

    @property
    def contracted(self) -> int:
        """The axis of the weight that is contracted with the input."""
        return _CONTRACTED[self.node.op]

    @property
    def taps(self) -> int:
        """Columns per input channel: the places of the kernel."""
        return int(np.prod([int(size) for size in self.weight.shape[2:]])) if self.node.op == "conv" else 1

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return int(np.prod(self.weight.shape)) // self.outputs

    @property
    def outputs(self) -> int:
        """Rows of the matrix."""
        return int(self.weight.shape[1 if self.node.op == "matmul" else 0])

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of this layer as [outputs, columns]."""
        return weight.t() if self.node.op == "matmul" else weight.flatten(1)

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix in the shape and type in which the layer stores its weight."""
        found = matrix.t() if self.node.op == "matmul" else matrix
        return found.reshape([int(size) for size in self.weight.shape]).to(self.weight.tensor.dtype).contiguous()

    def rows_of_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input as [rows, columns]."""
        return _patches(x, self.node, self.weight) if self.node.op == "conv" else x.reshape(-1, x.shape[-1])

    def rows_of_output(self, y: torch.Tensor) -> torch.Tensor:
        """The output, or anything of its shape, as [rows, outputs]."""
        axis = 1 if self.node.op == "conv" else y.dim() - 1
        return y.movedim(axis, -1).reshape(-1, y.shape[axis])

    @property
    def norm(self) -> Node | None:
        """The batch norm in inference that alone reads the result, and takes a shift of it into its running mean."""
        users = list(self.node.output.uses)
        if len(users) != 1 or users[0][0].op != "batch_norm" or users[0][1] != 0:
            return None
        norm = users[0][0]
        mean = norm.inputs[3] if len(norm.inputs) > 3 else None
        own = isinstance(mean, Parameter) and len(mean.uses) == 1
        return norm if own and not norm.attributes.get("training") else None

    def shifted(self, shift: torch.Tensor) -> tuple[Parameter, torch.Tensor] | None:
        """The parameter that adds a shift [outputs] to the result, and its new data: the bias or a running mean."""
        norm = self.norm
        taker = self.bias if self.bias is not None else norm.inputs[3] if norm is not None else None
        if not isinstance(taker, Parameter):
            return None
        before = taker.tensor.detach()
        signed = shift if taker is self.bias else -shift
        return taker, (before.double() + signed).to(before.dtype)

    def columns_of(self, graph: Graph, dim: Dim) -> np.ndarray:
        """The columns that each index of a Dim owns, [indices, columns each]; none where it is not contracted."""
        extent = graph.axes.of[self.weight][self.contracted]
        if leaves(extent).count(dim) != 1:
            return np.zeros((int(dim.size), 0), dtype=np.int64)
        positions = _positions(extent, dim)
        return (positions[:, :, None] * self.taps + np.arange(self.taps)).reshape(len(positions), -1)


def layer_of(node: Node) -> Layer | None:
    """The layer that a node is; None for other operators, grouped convolutions, and weights that others read too."""
    if node.op not in _CONTRACTED or len(node.inputs) < 2:
        return None
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if not _is_own(weight) or not (bias is None or _is_own(bias)):
        return None
    assert isinstance(weight, Parameter)
    if node.op == "conv" and (node.attributes["groups"] != 1 or not isinstance(node.inputs[0], Value)):
        return None
    if node.op == "conv" and node.inputs[0].rank != weight.rank:  # type: ignore[union-attr]
        return None
    if node.op != "conv" and weight.rank != 2:
        return None
    return Layer(node, weight, bias if isinstance(bias, Parameter) else None)


def _is_own(value: object) -> bool:
    if not isinstance(value, Parameter) or value.kind != "parameter" or len(value.uses) != 1:
        return False
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point


def _positions(extent: Extent, dim: Dim) -> np.ndarray:
    """The positions on an axis that each index of a Dim owns, [indices, positions each]; the Dim occurs once in it."""
    found = resolve(extent)
    if isinstance(found, Dim):
        return np.arange(int(dim.size))[:, None]
    if isinstance(found, Product):
        grid = np.arange(int(size_of(found))).reshape([int(size_of(factor)) for factor in found.factors])
        place = next(p for p, factor in enumerate(found.factors) if dim in leaves(factor))
        inner = _positions(found.factors[place], dim)
        rows: np.ndarray = np.moveaxis(grid, place, 0).reshape(grid.shape[place], -1)[inner]
        return rows.reshape(len(inner), -1)
    offset = 0
    for segment in found.segments:
        if dim in leaves(segment):
            return _positions(segment, dim) + offset
        offset += int(size_of(segment))
    raise AxisError(f"{dim} is not on the axis {found}")


def _patches(x: torch.Tensor, node: Node, weight: Parameter) -> torch.Tensor:
    """im2col: for each place of the output the entries of the input that the kernel meets, channels first."""
    rank = weight.rank - 2
    kernel = [int(size) for size in weight.shape[2:]]
    stride, padding, dilation = (per_axis(node.attributes[n], rank) for n in ("stride", "padding", "dilation"))
    x = F.pad(x, [side for amount in reversed(padding) for side in (amount, amount)])
    for axis in range(rank):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, window, stride[axis])[..., :: dilation[axis]]
    places = range(2, 2 + rank)
    return x.permute(0, *places, 1, *range(2 + rank, 2 + 2 * rank)).reshape(-1, x.shape[1] * int(np.prod(kernel)))
