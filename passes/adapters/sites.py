"""Places for adapters: a node that multiplies by a weight, or looks one up, and the weight as matrices.

    linear, matmul, conv, conv_transpose, grouped_mm    the layers of :mod:`regauge.passes.calibration.layers`
    embedding                                           outputs: the entries of a row; columns: the rows

Every form of adapter is a matrix [outputs, columns] to be added (of several blocks one for each), in nodes of the
graph; how a weight stores that, and what a chain of two layers for it looks like, is said here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.name_patterns import matches


@dataclass(frozen=True)
class Site:
    """A node and its weight: ``blocks`` matrices [outputs, columns]."""

    node: Node
    weight: Parameter
    layer: Layer | None  # None: an embedding

    @property
    def slot(self) -> int:
        """The operand of the node that the weight is."""
        return 0 if self.layer is None else 1

    @property
    def blocks(self) -> int:
        return 1 if self.layer is None else self.layer.blocks

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[1]) if self.layer is None else self.layer.outputs

    @property
    def columns(self) -> int:
        return int(self.weight.shape[0]) if self.layer is None else self.layer.columns

    @property
    def taps(self) -> int:
        return 1 if self.layer is None else self.layer.taps

    @property
    def made(self) -> int:
        """The axis of the stored weight that the outputs are on, where there is one block."""
        return 1 if self.layer is None else self.layer.made

    @property
    def stem(self) -> str:
        """What the names of the adapter's parameters begin with."""
        whole, _, leaf = self.weight.name.rpartition(".")
        # A tensor of the root may not be called as a module is.
        return (f"{whole}." if whole else "") + (f"{leaf}_" if leaf != "weight" or not whole else "")

    @property
    def has_layers(self) -> bool:
        """Whether two factors can be two layers beside the node, rather than a change of its weight."""
        return self.node.op in ("linear", "conv", "embedding") or (self.node.op == "matmul" and self.blocks == 1)

    def matrices(self) -> torch.Tensor:
        """The weight [blocks, outputs, columns] in double precision."""
        tensor = self.weight.tensor.detach().double()
        return tensor.t()[None] if self.layer is None else self.layer.matrices(tensor)

    def stored(self, matrices: torch.Tensor) -> torch.Tensor:
        """[blocks, outputs, columns] as the node stores its weight."""
        if self.layer is not None:
            return self.layer.from_matrices(matrices)
        assert isinstance(self.weight.dtype, torch.dtype)
        return matrices[0].t().to(self.weight.dtype).contiguous()

    def as_stored(self, build: Builder, matrix: Value) -> Value:
        """A value [outputs, columns], or one for each block, in the shape in which the node stores its weight."""
        sizes = tuple(int(size) for size in self.weight.shape)
        if self.node.op in ("matmul", "grouped_mm", "embedding"):
            axes = (*range(matrix.rank - 2), matrix.rank - 1, matrix.rank - 2)
            return shaped(build, build.permute(matrix, dims=axes), sizes)
        if self.node.op == "conv_transpose":
            split = (self.blocks, self.outputs, self.columns // self.taps, self.taps)
            return shaped(build, build.permute(shaped(build, matrix, split), dims=(0, 2, 1, 3)), sizes)
        return shaped(build, matrix, sizes)

    # -- two layers beside the node ----------------------------------------------------------------------------------

    def down_shape(self, rank: int) -> tuple[int, ...]:
        """The shape in which the first of two layers stores [blocks, rank, columns]."""
        if self.node.op == "conv":
            return (self.blocks * rank, self.columns // self.taps, *(int(size) for size in self.weight.shape[2:]))
        return (self.columns, rank) if self.layer is None else (rank, self.columns)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        """The shape in which the second stores [blocks, outputs, rank]."""
        if self.node.op == "conv":
            return (self.blocks * self.outputs, rank, *(1 for _ in self.weight.shape[2:]))
        return (self.outputs, rank)

    def beside(self, build: Builder, down: Value, up: Value) -> Value:
        """What two layers, whose weights have these shapes, give of the node's input."""
        node = self.node
        if self.layer is None:
            narrow = build.embedding(down, node.inputs[1], name=f"{node.name}_down", **node.attributes)
        elif node.op == "conv":
            narrow = build.conv(node.inputs[0], down, name=f"{node.name}_down", **node.attributes)
            single = {name: (n,) * (up.rank - 2) for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))}
            wide: Value = build.conv(narrow, up, name=f"{node.name}_up", groups=self.blocks, **single)
            return wide
        else:
            narrow = build.linear(node.inputs[0], down, name=f"{node.name}_down")
        result: Value = build.linear(narrow, up, name=f"{node.name}_up")
        return result


def shaped(build: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    return value if value.shape == shape else build.reshape(value, shape=shape)


def sites(graph: Graph, include: Sequence[str], exclude: Sequence[str], left: Counter[str]) -> list[Site]:
    """Layers, and of embeddings those that ``include`` names; ``left`` counts the others by reason."""
    tables = [site for site in _embeddings(graph) if include and matches(site.weight.names, include)]
    tables = [site for site in tables if not matches(site.weight.names, exclude)]
    apart = [site.weight for site in tables]
    layers = chosen_layers(graph, include, exclude, left, lambda layer: None, blocks=True, apart=apart)
    return [*tables, *(Site(layer.node, layer.weight, layer) for layer in layers)]


def _embeddings(graph: Graph) -> list[Site]:
    nodes = [node for node in graph.nodes if node.op == "embedding"]
    pairs = [(node, node.inputs[0]) for node in nodes]
    return [Site(n, w, None) for n, w in pairs if isinstance(w, Parameter) and w.rank == 2 and len(w.uses) == 1]
