"""What of a graph is quantized: layers, tables of vectors, and weights that are read in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regauge.ir.graph import Graph
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.placement import (
    Table,
    find_tables,
    left_in_float,
    misfit_of_blocks,
    misfit_of_products,
    misfit_of_table,
)
from regauge.passes.quantization.schemes import Scheme
from regauge.passes.quantization.storage import Plain, plain_weights
from regauge.passes.quantization.targets import TARGETS, Target

if TYPE_CHECKING:
    from regauge.passes.quantization.quantize import Quantize


@dataclass(frozen=True)
class Chosen:
    """What the ``options`` take of graphs that are :func:`.preparation.prepared`."""

    options: Quantize

    @property
    def _scheme(self) -> Scheme:
        return self.options.full_scheme

    @property
    def _target(self) -> Target:
        return TARGETS[self.options.target]

    @property
    def stores(self) -> bool:
        """Whether weights that are read in float are stored in 8 bits."""
        asked = self.options.storage
        return self._scheme.alone and self._target.folds if asked is None else asked

    @property
    def halves(self) -> bool:
        """Whether vectors are stored in half precision: also beside activations in integers, which lose far more."""
        integers = self._scheme.activations and self._scheme.numbers is None and self._target.folds
        return self.stores or integers and self.options.storage is None

    @staticmethod
    def count_inputs(graph: Graph, left: Counter[str]) -> None:
        """Count in ``left`` the weights of an ONNX file that are inputs as well, which callers may put others for."""
        defaults = graph.metadata.get("input_defaults", {})
        if count := sum(value.name in defaults and value.ranked and value.rank > 1 for value in graph.inputs):
            left["an input with a default, which callers may put another for"] += count

    def plain(self, graph: Graph) -> list[Plain]:
        """The weights that are stored in 8 bits though they are read in float."""
        if not self.stores:
            return []
        apart = {table.parameter for table in self.tables(graph, Counter())}
        apart |= {layer.weight for layer in [*self.layers(graph, Counter()), *self.tied(graph)]}
        return plain_weights(graph, self.options.include, self.options.exclude, apart)

    def tables(self, graph: Graph, left: Counter[str], plain: Sequence[Plain] = ()) -> list[Table]:
        """The tables whose vectors are stored as integers; ``left`` counts the others, but for the ``plain``."""
        found, stored = [], {one.weight for one in plain}
        whole = self._scheme.activations and self.options.table_bits == 8
        for table in self._all_tables(graph):
            if table.parameter in graph.outputs:
                left["a table that is a result, too, stays in float"] += 1
                continue
            reason = misfit_of_table(table, self._target, activations=whole, dynamic=self._dynamic)
            if reason is None:
                found.append(table)
            elif table.parameter not in stored:
                left[reason] += 1
        return found

    def _all_tables(self, graph: Graph) -> list[Table]:
        return find_tables(graph, self.options.include, self.options.exclude) if self.options.embeddings else []

    @property
    def _dynamic(self) -> bool:
        return self.options.activations == "dynamic"

    def tied(self, graph: Graph) -> list[Layer]:
        """The layers that multiply integers of tables."""
        whole = self._scheme.activations and self._scheme.numbers is None and self.options.table_bits == 8
        if not whole:
            return []
        return [layer for table in self.tables(graph, Counter()) for layer in table.layers]

    def layers(self, graph: Graph, left: Counter[str], plain: Sequence[Plain] = ()) -> list[Layer]:
        """The layers that are quantized, of a graph as :func:`prepared`; ``left`` counts the others by reason, but for
        those whose weights are ``plain``."""
        include, exclude = self.options.include, self.options.exclude

        def against(layer: Layer) -> str | None:
            if layer.weight in graph.outputs:
                return "its weight is a result, too, and stays in float"
            if self._scheme.kind == "stacks" and layer.blocks > 1:
                return "a weight of several blocks has no stack of terms"
            if self._scheme.activations:
                floats = self._scheme.kind == "float8"
                return misfit_of_products(layer, self._target, dynamic=self._dynamic, floats=floats)
            return misfit_of_blocks(layer, self._target, self.options.block)

        apart = {table.parameter for table in self._all_tables(graph)} | {found.weight for found in plain}

        def chosen(misfit: Callable[[Layer], str | None], left: Counter[str]) -> list[Layer]:
            return chosen_layers(graph, include, exclude, left, misfit, blocks=True, apart=apart)

        if not self._scheme.activations:
            return chosen(against, left)
        floats = left_in_float(graph, chosen(against, Counter()), self._target)
        return chosen(lambda layer: against(layer) or floats.get(layer.node), left)
