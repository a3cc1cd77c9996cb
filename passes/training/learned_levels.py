"""Differentiable quantization: which numbers weights may be is trained, not the weights (Polino et al. 2018)."""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import nn

from regauge.ir.edit import Builder, remove_dead, replace_uses, set_input
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.base import reasons
from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.preparation import prepared
from regauge.passes.quantization.quantize import Quantize
from regauge.passes.quantization.weights import group_of, rows_of
from regauge.passes.report import reported
from regauge.passes.training.bound_model import BoundModel


class LearnedLevels:
    """``module`` is trained in place of the model: the one that the graph is emitted as, with weights of layers that
    are one of 2^bits numbers times a scale; these numbers, one set for each layer, are its parameters.

    Levels begin at quantiles of the layer's weights, divided by the greatest magnitude of their group, and their
    gradients are sums over the weights that are nearest to them, times the scales (Polino et al. 2018, Model
    Compression via Distillation and Quantization, section 4). What stays in float (biases, norms) is trained as well;
    leave it out of the optimizer to train levels alone. Deviations: scaling has no offset, since levels lie anywhere;
    all layers have the same bits.

    Nothing is to be called between steps. ``finish`` gives the graph with codes, levels and scales; layers compute in
    float. Raises PassError where there is no layer.
    """

    name = "learned-levels"

    def __init__(
        self,
        graph: Graph,
        bits: int = 4,
        *,
        group: int | None = None,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        if not 1 <= bits <= 8:
            raise PassError(f"bits={bits} is out of range: write 1 to 8")
        self.graph, self.bits = graph, bits
        self.left: Counter[str] = Counter()  # layers that stay in float, by reason
        placing = Quantize(
            scheme="w4", group=group, target="reference", embeddings=False, include=include, exclude=exclude
        )
        self._training = prepared(graph).copy()
        layers = placing.layers_of(self._training, self.left)
        if not layers:
            raise PassError(f"LearnedLevels finds no layer: {', '.join(reasons(self.left)) or 'there is none'}")
        for layer in layers:
            self._insert(layer, group_of(layer, placing.block))
        remove_dead(self._training)
        self.module: nn.Module = self._training.to_torch()
        self._bound = BoundModel(self.module, self._training)

    def _insert(self, layer: Layer, group: int) -> None:
        """Let a layer read levels times scales, shaped as its weight."""
        build, name = Builder(self._training, by=self.name), layer.weight.name
        rows = rows_of(layer)
        parts = rows.reshape(len(rows), -1, group)
        scale = parts.abs().amax(2, keepdim=True)
        parts = parts / torch.where(scale > 0, scale, 1.0)
        count = 1 << self.bits
        levels = torch.quantile(_thinned(parts), (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        with build.at(layer.node):
            scaled = build.parameter(build.unique(f"{name}_scaled"), parts.float(), kind="buffer")
            learned = build.parameter(build.unique(f"{name}_levels"), levels.float())
            factor = build.parameter(build.unique(f"{name}_scale"), scale.float(), kind="buffer")
            nearest = build.nearest_level(scaled, learned)
            stored = [int(size) for size in layer.weight.shape]
            turned = layer.node.op == "matmul"
            weight = build.reshape(build.mul(nearest, factor), shape=tuple(reversed(stored) if turned else stored))
            set_input(layer.node, 1, build.permute(weight, dims=(1, 0)) if turned else weight, self._training)

    @torch.no_grad()
    def finish(self) -> Graph:
        """The graph with each weight as codes of a byte and levels, which computes what the module computes."""
        since = time.perf_counter()
        result = self._bound.trained_graph(self.name)
        build = Builder(result, by=self.name)
        for node in [node for node in result.nodes if node.op == "nearest_level"]:
            scaled, learned = node.inputs
            assert isinstance(scaled, Parameter) and isinstance(learned, Parameter)
            levels = learned.tensor.sort().values
            codes = torch.bucketize(scaled.tensor, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
            name = learned.name.removesuffix("_levels")
            with build.at(node):
                stored = build.parameter(build.unique(f"{name}_codes"), codes, trainable=False)
                table = build.parameter(build.unique(f"{name}_table"), levels[:, None].contiguous(), trainable=False)
                found: Value = build.embedding(table, build.cast(stored, dtype=torch.int64))
                replace_uses(result, node.output, build.squeeze(found, dims=(-1,)))
        remove_dead(result)
        return reported(self.graph, result, self.name, since, (), self.left)


def _thinned(entries: torch.Tensor) -> torch.Tensor:
    """As many entries as quantiles are taken of at most."""
    flat = entries.flatten()
    return flat[:: 1 + len(flat) // 1_000_000]
