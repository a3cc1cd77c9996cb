"""Batches as passes take them: inputs of the graph, whatever the data holds beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regauge.ir.graph import Graph
from regauge.passes.base import Context


def calibration_batches(graph: Graph, context: Context) -> list[Any]:
    """The batches of a pass's data, each a tuple or mapping of the graph's inputs; raises PassError where none is.

    A DataLoader of examples with labels gives these behind the inputs: what a tuple holds more than the graph has
    inputs is left out.
    """
    count = len(graph.inputs)
    return [batch if isinstance(batch, Mapping) else tuple(batch)[:count] for batch in context.batches()]


def examples_in(batch: Any) -> int:
    """How many examples a batch holds: the size of the first axis of its first input."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    shape = tuple(getattr(first, "shape", ()))
    return int(shape[0]) if shape else 1
