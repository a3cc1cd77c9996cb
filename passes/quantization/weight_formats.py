"""In which format each weight is stored: that of the scheme, or where it is free what takes or loses less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.on_floats import SPARSE
from regauge.passes.quantization.chosen import Chosen
from regauge.passes.quantization.formats import Format
from regauge.passes.quantization.halves import Half, holds, takes_little_more
from regauge.passes.quantization.learned_codes import Learned
from regauge.passes.quantization.levels import ENOUGH
from regauge.passes.quantization.mirrored import table_of
from regauge.passes.quantization.placement import reads_blocks
from regauge.passes.quantization.schemes import Wanted
from regauge.passes.quantization.targets import TARGETS
from regauge.passes.quantization.weights import group_of, rows_of

if TYPE_CHECKING:
    from regauge.passes.quantization.quantize import Quantize


@dataclass(frozen=True)
class WeightFormats:
    """Formats of the weights of a graph's layers, stored alone, as ``options`` ask for them."""

    options: Quantize
    graph: Graph

    def group(self, layer: Layer, bits: int) -> int:
        """Columns that share a scale: those of a row where no kernel reads blocks, if nobody asks for groups."""
        group = group_of(layer, self.options.block, self.options.group)
        asked = bits < 8 or self.options.group is not None or self.options.per == "group"
        read = asked or reads_blocks(self.graph, layer, TARGETS[self.options.target], group, bits)
        return group if read else layer.columns

    def wanted(self, layer: Layer, bits: int) -> Wanted:
        """What is asked of the form of integers."""
        return Wanted(
            bits=bits,
            group=self.group(layer, bits),
            shared=self.options.per == "tensor",
            symmetric=True if TARGETS[self.options.target].centred else self.options.symmetric,
            statistic=self.options.statistic,
            rows=1 if self.options.per == "row" else self.options.group,
        )

    def free(self, layer: Layer) -> bool:
        """Whether floats are made of a layer's 8 bits at load, whose form is then free."""
        options, scheme = self.options, self.options.full_scheme
        asked = any(option is not None for option in (options.per, options.group, options.symmetric)) or options.packed
        asked = asked or options.method in get_args(Learned)
        if asked or not Chosen(options).stores or not scheme.alone or scheme.bits != 8:
            return False
        sparse = not self.graph.metadata.get(SPARSE, {}).keys().isdisjoint(layer.weight.names)
        return not sparse and not reads_blocks(self.graph, layer, TARGETS[options.target], self.group(layer, 8), 8)

    def of(self, layer: Layer, bits: int) -> Format:
        """That of the scheme; where it is free a table's, of a weight that is large enough, or half precision."""
        make = self.options.full_scheme.make
        assert make is not None
        if self.free(layer):
            if layer.entries >= ENOUGH:
                return table_of(rows_of(layer), layer.weight.shape, layer.made)
            if takes_little_more(layer.entries, layer.columns) and holds(layer.weight.tensor.detach()):
                return Half()
        return make(self.wanted(layer, bits))
