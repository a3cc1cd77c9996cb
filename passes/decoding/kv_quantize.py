"""The pass that keeps keys and values as integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from regauge.ir.edit import record
from regauge.ir.graph import Graph, Value
from regauge.passes.base import Context, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.decoding.cache_bytes import cache_bytes, in_words
from regauge.passes.decoding.incremental import Incremental
from regauge.passes.decoding.positions import find_positions
from regauge.passes.decoding.quantized_cache import Channels, balanced, write_quantized
from regauge.passes.decoding.recognised import refuse_caches
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class KvQuantize(Pass):
    """Round what a cache keeps of keys and values to integers of few bits, which share bytes.

    before   attention(q, k, v)
    after    attention(q, back(codes of k, ranges of k), back(codes of v, ranges of v))

    Rounded is whatever ``kv-cache`` would keep: keys and values as attention reads them, or latents; run it in front
    of ``kv-cache``, which keeps codes and ranges then. Each position has a range (lowest number and step, in half
    precision) for each ``group`` of neighbouring channels, as values have in KIVI (Liu et al. 2024). Keys have no
    ranges over positions, as they have there, since these need a window of positions that are not rounded yet; instead
    channels are centred and balanced by statistics of data: ranges against what an error in them changes.
    """

    name = "kv-quantize"

    bits: Literal[8, 4, 2] = option(4, "bits of a number")
    group: int | None = option(
        None, "channels that share a range; all of a head, or of a latent, as a rule", at_least=2
    )
    axis: str | None = option(None, "name of the dynamic size that counts positions, where attention does not tell")
    seed: int = option(0, "seed of the directions of gradients", at_least=0)

    def call(self, graph: Graph, context: Context) -> Graph:
        refuse_caches(graph, self.name)
        names, before = self._kept(graph)
        result = graph.copy()
        values = [value for value in map(result.find, names) if self._fits(value, context)]
        if not values:
            context.left["nothing mixes positions: there is nothing to keep"] += not names
            return graph
        known: Mapping[str, Channels] = {}
        if context.data is not None:
            batches = calibration_batches(graph, context)
            known = _statistics(graph, [graph.find(value.name) for value in values], batches, self.seed)
            context.note(f"statistics of {sum(map(examples_in, batches))} examples")
        for value in values:
            channels = int(value.shape[-1])
            write_quantized(result, value, self.bits, self.group or channels, known.get(value.name), by=self.name)
        record(result, self.name, f"{len(values)} values of {self.bits} bits")
        context.note(
            f"{in_words(before)} -> {in_words(self._kept(result)[1])} of caches for each position of a sequence"
        )
        return result

    def _kept(self, graph: Graph) -> tuple[list[str], float]:
        """The names of the values that a cache would keep, and its bytes for each position."""
        trial = graph.copy()
        rewrite = Incremental(trial, find_positions(trial, self.axis), by=self.name)
        rewrite.run()
        return [value.name for value in rewrite.kept], cache_bytes(trial)

    def _fits(self, value: Value, context: Context) -> bool:
        if not (isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point):
            context.left["a cache that holds no floating point numbers"] += 1
        elif value.producer is None or not isinstance(value.shape[-1], int):
            context.left["a cache whose last axis holds no channels"] += 1
        elif self.group is not None and value.shape[-1] % self.group:
            context.left[f"{self.group} channels do not divide {value.shape[-1]}"] += 1
        else:
            return True
        return False


@dataclass
class _Sums:
    """Over all positions of all examples, of each channel."""

    count: int = 0
    total: list[torch.Tensor] = field(default_factory=list)

    def add(self, tensor: torch.Tensor, gradient: torch.Tensor, axes: list[int]) -> None:
        own = [part.double().sum(axes, keepdim=True) for part in (tensor, tensor.square(), gradient.square())]
        self.total = own if not self.total else [a + b for a, b in zip(self.total, own, strict=True)]
        self.count += tensor.numel() // own[0].numel()

    def channels(self) -> Channels:
        mean, square, gradient = (total / self.count for total in self.total)
        return balanced(mean, (square - mean.square()).clamp(min=0).sqrt(), gradient.sqrt())


def _statistics(graph: Graph, values: list[Value], batches: list[object], seed: int) -> dict[str, Channels]:
    """Of each value that gradients reach the statistics of its channels: what it has behind axes of dynamic sizes."""
    sums = {value: _Sums() for value in values}

    def visit(value: Value, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        sums[value].add(tensor, gradient, [axis for axis, size in enumerate(value.shape) if not isinstance(size, int)])

    visit_gradients(graph, batches, values, visit, seed=seed)
    return {value.name: own.channels() for value, own in sums.items() if own.count}
