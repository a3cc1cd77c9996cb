"""``smooth``: range moved from what layers read into their weights, or the other way round; the same function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.base import Context, Contract, Need, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Gram, Statistics
from regauge.passes.options import option
from regauge.passes.quantization.activation_aware import Magnitude, Read, clipped
from regauge.passes.quantization.grid import Grid
from regauge.passes.quantization.preparation import prepared
from regauge.passes.quantization.smoothing import Readers, Room, Smoothing, best_exponent, smoothing_of, whole_room
from regauge.passes.quantization.smoothing_moves import linear_misfit, readers_of, smooth_all


@dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """Scale the channels that layers read, so that rounding to few bits loses less.

    before  h = norm(x) * g        y = h w1'       z = h w2'
    after   h = norm(x) * g / s    y = h (w1 s)'   z = h (w2 s)'

    All layers that read a value share its scales. These go into whatever writes the value: gains and shifts of norms,
    layers behind heads, gates and sums; ``nodes`` adds a multiplication where nothing takes them. ``quantize`` does
    ``method=error`` by itself with activations; before weights of few bits alone, ``method=awq`` helps.

    smoothquant   s = max|x_j|^a / max|w_j|^(1-a), the best exponent for each value, or ``alpha``
    awq           s = mean|x_j|^a, the exponent that loses least of what the layers give with rounded weights
    error         the scales and shifts of least expected error, by descent
    """

    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"data"})

    method: Literal["smoothquant", "awq", "error"] = option("error", "how scales are found")
    alpha: float | None = option(None, "exponent of smoothquant; if not given, the best", at_least=0, at_most=1)
    bits: int | None = option(None, "of the weights: 8, with awq 4", at_least=2, at_most=8)
    group: int | None = option(None, "of awq: neighbouring inputs that share a scale; 32", at_least=2)
    clip: bool = option(False, "of awq: cut off weights where that loses less, too: another function")
    nodes: bool = option(False, "add a multiplication where nothing takes scales, if it is worth one")
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = [] if self.method == "smoothquant" else ["alpha"]
        idle += [] if self.method == "awq" else ["group", "clip"]
        given = [name for name in idle if name in self.given_options()]
        if given:
            raise PassError(f"smooth: {given[0]} does nothing with method={self.method}: leave it out")
        if self.clip:
            object.__setattr__(self, "contract", "approximate")

    def call(self, graph: Graph, context: Context) -> Graph:
        result = prepared(graph).copy()
        layers = chosen_layers(result, self.include, self.exclude, context.left, linear_misfit)
        batches = calibration_batches(result, context)
        found = readers_of(result, layers, batches)
        if not found:
            return graph
        if self.method == "awq":
            count = self._activation_aware(result, found, batches)
        else:
            count = smooth_all(result, found, self._choice, nodes=self.nodes, by=self.name)
        context.note(f"{count} of {len(found)} values smoothed")
        return result

    def _choice(self, readers: Readers, room: Room | None) -> Smoothing:
        activations, weights = Grid(8, symmetric=False), Grid(self.bits or 8)
        if self.method == "smoothquant" and self.alpha is None:
            return best_exponent(readers, activations, weights, room)
        return smoothing_of(readers, activations, weights, self.alpha, room)

    def _activation_aware(self, graph: Graph, found: Sequence[Readers], batches: Sequence[Any]) -> int:
        grid = Grid(self.bits or 4, symmetric=False)

        def look() -> dict[str, Read]:
            statistics = Statistics(graph)
            seen = {
                layer.node.name: Read(
                    readers.layers,
                    statistics.register(layer.node.inputs[0], Magnitude(-1)),  # type: ignore[arg-type]
                    statistics.register(layer.node.inputs[0], Gram(-1)),  # type: ignore[arg-type]
                    grid,
                    self._group(layer),
                )
                for readers in found
                for layer in readers.layers[:1]
            }
            statistics.collect(batches)
            return seen

        reads = look()

        def choose(readers: Readers, room: Room | None) -> Smoothing:
            read = reads[readers.layers[0].node.name]
            return read.best(room or whole_room(len(read.magnitude.mean)))

        count = smooth_all(graph, found, choose, nodes=self.nodes, by=self.name)
        for read in look().values() if self.clip else ():
            for layer in read.layers:
                weight = clipped(layer, grid, self._group(layer), read.products)
                set_weight(graph, layer.weight, layer.stored(weight), by=self.name)
        return count

    def _group(self, layer: Layer) -> int:
        wanted = self.group or 32
        return layer.columns if layer.columns % wanted else wanted
