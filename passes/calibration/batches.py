"""Batches as passes take them: inputs of the graph, whatever the data holds beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.base import Context


def calibration_batches(graph: Graph, context: Context) -> list[Any]:
    """The batches of a pass's data, each a tuple or mapping of the graph's inputs.

    Labels behind the inputs are left out. Raises PassError where there is no batch, or no example in any.
    """
    found = list(context.inputs(graph))
    check_examples(found)
    return found


def check_examples(batches: Sequence[Any]) -> None:
    """Raise PassError where batches of inputs hold no example: what is measured on them would say nothing."""
    arrays = (x for batch in batches for x in (batch.values() if isinstance(batch, Mapping) else batch))
    if all(0 in getattr(x, "shape", ()) for x in arrays):
        raise PassError("data holds no example: every array in it is empty")


def examples_in(batch: Any) -> int:
    """How many examples a batch holds: the size of the first axis of its first input."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    shape = tuple(getattr(first, "shape", ()))
    return int(shape[0]) if shape else 1
