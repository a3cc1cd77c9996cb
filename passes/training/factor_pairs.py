"""Which layers bonds stand between: pairs, and kernels between two maps of single places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regauge.ir.graph import Graph, Parameter
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.training.bond_sparsifier import Bond


@dataclass(frozen=True, eq=False)
class Chain:
    """The layers that a weight is factorized into; ``core`` is None for a matrix, whose core lies in one of the others.

    ``sizes`` are how many directions there is room for on the side of outputs and of inputs: of a matrix the same.
    """

    down: Layer
    core: Layer | None
    up: Layer

    @property
    def sizes(self) -> tuple[int, int]:
        return int(self.up.columns), int(self.down.outputs)


def chains(bonds: Sequence[Bond], graph: Graph, left: Counter[str]) -> dict[tuple[Bond, Bond], Chain]:
    """The layers beside one bond, or two that share a kernel, by the bonds of outputs and of inputs.

    Bonds that are neither are counted in ``left``.
    """
    layers = {layer.weight: layer for layer in map(layer_of, graph.nodes) if layer is not None}
    ends = {bond: own for bond in bonds if (own := _ends(bond, layers)) is not None}
    left["a bond is more than one layer without bias on each side"] += len(bonds) - len(ends)
    by_first = {first.weight: bond for bond, (first, _) in ends.items()}
    inner = {by_first[last.weight] for _, last in ends.values() if last.weight in by_first}
    found: dict[tuple[Bond, Bond], Chain] = {}
    for bond, (first, last) in ends.items():
        if bond in inner:
            continue
        behind = by_first.get(last.weight)
        if behind is None and last.taps == 1:
            found[bond, bond] = Chain(first, None, last)
        elif behind is not None and first.taps == 1 and ends[behind][1].taps == 1:
            found[behind, bond] = Chain(first, last, ends[behind][1])
        else:
            left["a chain of factors is neither a pair nor a kernel between two"] += 1
    return found


def _ends(bond: Bond, layers: Mapping[Parameter, Layer]) -> tuple[Layer, Layer] | None:
    """The layer that writes a bond and the one that reads it, where these are all; a bias would be a second writer."""
    if bond.frame.majors or bond.size < 2 or any(len(side) != 1 for side in bond.sides):
        return None
    (first,), (last,) = bond.sides
    writer, reader = layers.get(first.parameter), layers.get(last.parameter)
    return None if writer is None or reader is None else (writer, reader)
