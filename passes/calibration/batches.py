"""Batches as passes take them: inputs of the graph, whatever the data holds beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

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


def part_of(batch: Any, rows: slice, examples: int) -> Any:
    """Some of the examples of a batch: rows of every tensor that has so many of them, all else as it is."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return batch[rows] if batch.ndim and batch.shape[0] == examples else batch
    if isinstance(batch, Mapping):
        return {name: part_of(inner, rows, examples) for name, inner in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(part_of(inner, rows, examples) for inner in batch)
    return batch


def in_folds(graph: Graph, batches: Sequence[Any], count: int) -> list[list[Any]] | None:
    """The batches dealt out to so many lists; where they are too few, the examples of each, if the graph takes that.

    None where there are not two parts.
    """
    least = min(map(examples_in, batches), default=0)
    free = bool(graph.inputs and graph.inputs[0].shape) and not isinstance(graph.inputs[0].shape[0], int)
    if len(batches) >= count or not free or least < 2:
        count = min(count, len(batches))
        return [list(batches[place::count]) for place in range(count)] if count > 1 else None
    count = min(count, least)
    return [[_dealt(batch, place, count) for batch in batches] for place in range(count)]


def _dealt(batch: Any, place: int, count: int) -> Any:
    examples = examples_in(batch)
    return part_of(batch, slice(place * examples // count, (place + 1) * examples // count), examples)
