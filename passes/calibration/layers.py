"""Layers as linear maps: a node that contracts its input with a trained weight, as matrices on sets of rows.

    linear           y = x W' + b       rows: all leading axes; columns: input features
    matmul           y = x W            the same, the weight stored the other way round; a batch of matrices is blocks
                     y = x permute(W)   and where a permute has turned it around (``turned``), as Falcon writes layers
    conv             y = W * x + b      rows: places of the output; columns: channels by places of the kernel (im2col)
    conv_transpose   the same on the input with zeros between its entries, the kernel turned around
    grouped_mm       y = x W[expert]    a block of rows for each expert

A grouped convolution is a block for each group, a depthwise one for each channel. Whatever looks at a layer's input as
vectors (Gram matrices, least squares, Hessians) goes through here, so that no kind of layer is a special case.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from regauge.ir.dims.extents import Dim, leaves, positions_on
from regauge.ir.dims.kept import numbered
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.ops.windows import per_axis

_CONVOLUTIONS = ("conv", "conv_transpose")


@dataclass(frozen=True)
class Layer:
    """A node with a trained weight: ``blocks`` matrices [outputs, columns], each on rows of its own or of its channels.

    Where there is one block, ``matrix``, ``stored``, ``rows_of_input`` and ``rows_of_output`` speak of it.
    """

    node: Node
    weight: Parameter
    bias: Parameter | None

    @property
    def turned(self) -> Node | None:
        """The permute between the weight, a matrix, and the node."""
        read = self.node.inputs[1]
        producer = read.producer if isinstance(read, Value) else None
        return producer if producer is not None and producer.op == "permute" else None

    @property
    def inputs_first(self) -> bool:
        """Whether the weight is stored as [.., columns, outputs]."""
        return (self.node.op in ("matmul", "grouped_mm")) != (self.turned is not None)

    @property
    def contracted(self) -> int:
        """The axis of the weight that is contracted with the input."""
        if self.inputs_first:
            return self.weight.rank - 2
        return 0 if self.node.op == "conv_transpose" else 1

    @property
    def made(self) -> int:
        """The axis of the weight that makes the result's, where there is one block."""
        return self.weight.rank - 1 if self.inputs_first else 1 - self.contracted

    @property
    def blocks(self) -> int:
        """How many matrices the weight is: groups, experts; usually one."""
        if self.node.op in _CONVOLUTIONS:
            return int(self.node.attributes["groups"])
        return int(self.weight.shape[0]) if self.node.op in ("matmul", "grouped_mm") and self.weight.rank == 3 else 1

    @property
    def taps(self) -> int:
        """Columns per input channel: the places of the kernel."""
        return int(np.prod([int(n) for n in self.weight.shape[2:]])) if self.node.op in _CONVOLUTIONS else 1

    @property
    def columns(self) -> int:
        """Columns of each matrix."""
        size = int(self.weight.shape[self.contracted])
        return self.taps * (size // self.blocks if self.node.op == "conv_transpose" else size)

    @property
    def outputs(self) -> int:
        """Rows of each matrix."""
        return int(np.prod(self.weight.shape)) // (self.columns * self.blocks)

    @property
    def entries(self) -> int:
        """Of the weight."""
        return self.blocks * self.outputs * self.columns

    @property
    def source(self) -> Hashable:
        """Equal for layers whose inputs are the same rows: they read one value in the same way, or share a weight."""
        if len(self.weight.uses) > 1:
            return self.weight
        names = ("stride", "padding", "dilation", "output_padding", "groups")
        node = self.node
        way = (node.op, *(str(node.attributes[n]) for n in names if n in node.attributes), *self.weight.shape[2:])
        others = tuple(operand for operand in node.inputs[2:] if node.op == "grouped_mm")
        plain = node.op == "linear" or (node.op == "matmul" and self.blocks == 1)
        return node.inputs[0], "rows" if plain else way, self.blocks, others

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of this layer as [blocks, outputs, columns]."""
        shape = (self.blocks, self.outputs, self.columns)
        if self.inputs_first:
            return weight.mT.reshape(shape)
        if self.node.op == "conv_transpose":
            channels = self.columns // self.taps
            grouped = weight.reshape(self.blocks, channels, self.outputs, self.taps)
            return grouped.transpose(1, 2).reshape(shape)
        return weight.reshape(shape)

    def from_matrices(self, matrices: torch.Tensor) -> torch.Tensor:
        """[blocks, outputs, columns] in the shape and type in which the layer stores its weight."""
        assert isinstance(self.weight.dtype, torch.dtype)
        return self.matrices_as_stored(matrices).to(self.weight.dtype).contiguous()

    def matrices_as_stored(self, matrices: torch.Tensor) -> torch.Tensor:
        """[blocks, outputs, columns] in the shape in which the layer stores its weight."""
        sizes = [int(size) for size in self.weight.shape]
        if self.inputs_first:
            return matrices.mT.reshape(sizes)
        if self.node.op == "conv_transpose":
            channels = self.columns // self.taps
            return matrices.reshape(self.blocks, self.outputs, channels, self.taps).transpose(1, 2).reshape(sizes)
        return matrices.reshape(sizes)

    def blocks_of_input(self, x: torch.Tensor, ends: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The input as [rows, columns] for each block; ``ends`` are the offsets of a ``grouped_mm``."""
        if self.node.op in _CONVOLUTIONS:
            transposed = self.node.op == "conv_transpose"
            rows = (_patches_of_transposed if transposed else _patches)(x, self.node, self.weight)
            yield from rows.reshape(len(rows), self.blocks, self.columns).unbind(1)
        else:
            yield from self._parts(x, ends)

    def blocks_of_output(self, y: torch.Tensor, ends: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The output, or anything of its shape, as [rows, outputs] for each block."""
        if self.node.op in _CONVOLUTIONS:
            rows = y.movedim(1, -1).reshape(-1, self.blocks, self.outputs)
            yield from rows.unbind(1)
        else:
            yield from self._parts(y, ends)

    def _parts(self, tensor: torch.Tensor, ends: torch.Tensor | None) -> Iterator[torch.Tensor]:
        if self.node.op == "grouped_mm":
            assert ends is not None
            bounds = [0, *ends.tolist()]
            yield from (tensor[start:end] for start, end in zip(bounds, bounds[1:], strict=False))
        elif self.blocks == 1:
            yield tensor.reshape(-1, tensor.shape[-1])
        else:
            shared = tensor.dim() < 3 or tensor.shape[-3] != self.blocks
            for block in range(self.blocks):
                own = tensor if shared else tensor.select(-3, block)
                yield own.reshape(-1, tensor.shape[-1])

    # -- layers of one block -----------------------------------------------------------------------------------------

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of this layer as [outputs, columns]."""
        return self.matrices(weight)[0]

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix in the shape and type in which the layer stores its weight."""
        return self.from_matrices(matrix[None])

    def rows_of_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input as [rows, columns]."""
        return next(self.blocks_of_input(x))

    def rows_of_output(self, y: torch.Tensor) -> torch.Tensor:
        """The output, or anything of its shape, as [rows, outputs]."""
        return next(self.blocks_of_output(y))

    # -- around the layer --------------------------------------------------------------------------------------------

    @property
    def norm(self) -> Node | None:
        """The batch norm in inference that alone reads the result, and takes a shift of it into its running mean."""
        users = list(self.node.output.uses)
        if len(users) != 1 or users[0][0].op != "batch_norm" or users[0][1] != 0:
            return None
        norm = users[0][0]
        mean = norm.inputs[3] if len(norm.inputs) > 3 else None
        own = isinstance(mean, Parameter) and len(mean.uses) == 1 and len(self.weight.uses) == 1
        return norm if own and not norm.attributes.get("training") else None

    def shifted(self, shift: torch.Tensor) -> tuple[Parameter, torch.Tensor] | None:
        """The parameter that adds a shift [blocks x outputs] to the result, and its new data: bias or running mean."""
        norm = self.norm
        taker = self.bias if self.bias is not None else norm.inputs[3] if norm is not None else None
        if not isinstance(taker, Parameter):
            return None
        before = taker.tensor.detach()
        signed = shift if taker is self.bias else -shift
        return taker, (before.double() + signed).to(before.dtype)

    def columns_of(self, graph: Graph, dim: Dim) -> np.ndarray:
        """The columns that each index of a Dim owns, [indices, columns each], the same ones in every block.

        None where it is not contracted: [indices, 0].
        """
        extent = graph.axes.of[self.weight][self.contracted]
        none = np.zeros((int(dim.size), 0), dtype=np.int64)
        if leaves(extent).count(dim) != 1:
            return none
        positions = positions_on(extent, dim)
        if self.node.op == "conv_transpose" and self.blocks > 1:
            channels = self.columns // self.taps
            own = np.sort(positions % channels, 1).reshape(len(positions), -1)
            each = own.shape[1] // self.blocks
            if each * self.blocks != own.shape[1] or (own.reshape(-1, each, self.blocks).std(2) > 0).any():
                return none  # it chooses among the groups: no group contracts it
            positions = own[:, :: self.blocks]
        return (positions[:, :, None] * self.taps + np.arange(self.taps)).reshape(len(positions), -1)

    def columns_within(self, graph: Graph, dims: Sequence[Dim], block: int) -> np.ndarray:
        """The columns of one block that each combination of indices of Dims owns, [combinations, columns each].

        The last Dim is contracted, the others are its majors. Rows are -1 for combinations that the block lacks: a
        group of a convolution has only channels of its own.
        """
        numbers = torch.from_numpy(numbered(graph.axes.of[self.weight], self.contracted, dims))
        whole = self.matrices(numbers.expand([int(size) for size in self.weight.shape]))
        found = whole[block, 0].numpy()  # the same in all outputs of a block, since these do not say which major it is
        order = np.argsort(found, kind="stable")[int((found < 0).sum()) :]
        present = np.unique(found[order])
        columns = np.full((int(np.prod([int(dim.size) for dim in dims])), len(order) // max(1, len(present))), -1)
        columns[present] = order.reshape(len(present), -1)
        return columns


def layer_of(node: Node, *, blocks: bool = False, shared: bool = False, turned: bool = False) -> Layer | None:
    """The layer that a node is; None for other operators, and for weights that others than such layers read.

    Layers of several blocks are given where ``blocks`` are asked for, layers that share their weight (and bias) with
    others of the same operator where ``shared`` ones are, and those whose weight a permute turns around, which runs
    before the layer, where ``turned`` ones are.
    """
    if node.op not in ("linear", "matmul", "grouped_mm", *_CONVOLUTIONS) or len(node.inputs) < 2:
        return None
    x, weight = node.inputs[:2]
    bias = node.inputs[2] if len(node.inputs) > 2 and node.op != "grouped_mm" else None
    within = _turned(weight, node) if turned else None
    if not isinstance(x, Value) or not (within is not None or _is_own(weight, node, 1, shared)):
        return None
    weight = weight if within is None else within
    if not (bias is None or _is_own(bias, node, 2, shared)):
        return None
    assert isinstance(weight, Parameter)
    layer = Layer(node, weight, bias if isinstance(bias, Parameter) else None)
    if node.op in _CONVOLUTIONS:
        fits = x.rank == weight.rank
    elif node.op == "matmul":
        fits = weight.rank == 2 or (weight.rank == 3 and x.rank == 3)
    else:
        fits = weight.rank == (3 if node.op == "grouped_mm" else 2)
    return layer if fits and (blocks or layer.blocks == 1) and 0 not in weight.shape else None


def matrices_of(layer: Layer) -> torch.Tensor:
    """The weight of a layer, [blocks, outputs, columns], in double precision."""
    return layer.matrices(layer.weight.tensor.detach()).double()


def contracting(graph: Graph, dims: Iterable[Dim], layers: Iterable[Layer]) -> dict[Dim, list[Layer]]:
    """Of these layers those that contract each Dim, every index of it in columns of its own."""
    found: dict[Dim, list[Layer]] = {dim: [] for dim in dims}
    for layer in layers:
        for dim in leaves(graph.axes.of[layer.weight][layer.contracted]):
            if dim in found and layer.columns_of(graph, dim).size:
                found[dim].append(layer)
    return found


def _turned(value: Any, node: Node) -> Parameter | None:
    """The trained matrix that a permute turns around for a linear layer alone."""
    permute = value.producer if isinstance(value, Value) else None
    if permute is None or permute.op != "permute" or len(value.uses) != 1 or node.op not in ("linear", "matmul"):
        return None
    weight = permute.inputs[0]
    if not isinstance(weight, Parameter) or weight.rank != 2 or not _is_own(weight, permute, 0, shared=False):
        return None
    return weight if tuple(permute.attributes["dims"]) in ((1, 0), (-1, 0), (1, -2), (-1, -2)) else None


def _is_own(value: Any, node: Node, slot: int, shared: bool) -> bool:
    """Whether a parameter is trained, and read as this node reads it, by nodes of its kind alone."""
    if not isinstance(value, Parameter) or value.kind != "parameter":
        return False
    if not shared and len(value.uses) != 1:
        return False
    if any(user.op != node.op or place != slot or user.inputs[1:2] != node.inputs[1:2] for user, place in value.uses):
        return False
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point


def _patches(x: torch.Tensor, node: Node, weight: Parameter) -> torch.Tensor:
    """im2col: for each place of the output the entries of the input that the kernel meets, channels first."""
    rank = weight.rank - 2
    kernel = [int(size) for size in weight.shape[2:]]
    stride, padding, dilation = (per_axis(node.attributes[n], rank) for n in ("stride", "padding", "dilation"))
    x = F.pad(x, [side for amount in reversed(padding) for side in (amount, amount)])
    return _windows(x, kernel, stride, dilation)


def _patches_of_transposed(x: torch.Tensor, node: Node, weight: Parameter) -> torch.Tensor:
    """For each place of a transposed convolution's output the entries that its kernel spreads there, in its order."""
    rank = weight.rank - 2
    kernel = [int(size) for size in weight.shape[2:]]
    names = ("stride", "padding", "dilation", "output_padding")
    stride, padding, dilation, extra = (per_axis(node.attributes[n], rank) for n in names)
    spread = x.new_zeros([*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True))])
    places: tuple[slice, ...] = tuple(slice(None, None, s) for s in stride)
    spread[(slice(None), slice(None), *places)] = x
    sides = []
    for size, step, inside, more in reversed(list(zip(kernel, dilation, padding, extra, strict=True))):
        before = step * (size - 1) - inside
        sides += [before, before + more]
    return _windows(F.pad(spread, sides), kernel, [1] * rank, dilation, turned=True)


def _windows(x: torch.Tensor, kernel: list[int], stride: Any, dilation: Any, *, turned: bool = False) -> torch.Tensor:
    """[places, channels x places of the kernel], the kernel's places from the last to the first where ``turned``."""
    rank = len(kernel)
    for axis in range(rank):
        window = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis if axis == 0 else 1 + axis, window, stride[axis])[..., :: dilation[axis]]
        if axis == 0:  # copies where few numbers are side by side are slow: what is copied here is smaller
            x = x.movedim(1, 1 + rank).contiguous()
    if turned:
        x = x.flip(list(range(-rank, 0)))
    return x.reshape(-1, x.shape[1 + rank] * int(np.prod(kernel)))
