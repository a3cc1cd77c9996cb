"""New weights in the place of old ones: a rewrite that folds something into a weight makes one and names its ancestor.

Where the ancestor has no other reader it goes, and the new weight takes its names, so that a folded network keeps the
keys of its state_dict; where it has, both stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from regauge.ir.graph import Graph, Parameter
from regauge.ir.storage.weights import DenseWeight, KeptWeight, LazyWeight, Weight, is_resident

if TYPE_CHECKING:
    from regauge.ir.edit import Builder


def computed_weight(
    function: Callable[..., torch.Tensor], sources: Sequence[Parameter], shape: Sequence[int], dtype: torch.dtype
) -> Weight:
    """``function`` of the sources' tensors in float64, rounded once to ``dtype``.

    It is computed now where all sources are dense, once where they lie in memory, else whenever it is read, so that
    files are streamed.
    """
    weights = [source.weight for source in sources]

    def read() -> torch.Tensor:
        with torch.no_grad():
            result = function(*(_wide(weight.load()) for weight in weights))
        return result.to(dtype).reshape(tuple(shape)).contiguous()

    if all(isinstance(weight, DenseWeight) for weight in weights):
        return DenseWeight(read())
    if all(map(is_resident, weights)):
        return KeptWeight(tuple(shape), dtype, read)
    return LazyWeight(tuple(shape), dtype, read)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def settle_successors(graph: Graph, build: Builder) -> None:
    """After a rewrite: old weights that nobody reads go, and their successors take their names."""
    for old, new in build.take_successors():
        held = any(s.before is old or s.after is old for s in graph.states)
        if old.uses or held or any(output is old for output in graph.outputs):
            continue
        if graph.parameters.get(old.name) is old and new.name in graph.parameters:
            del graph.parameters[new.name]
            new.name, new.aliases = old.name, old.aliases
            if old.kind == "parameter" and (old.dtype, old.shape) == (new.dtype, new.shape):
                new.origin = old.origin  # it can take its place in the loaded file
            graph.parameters[old.name] = new
            graph.version += 1
