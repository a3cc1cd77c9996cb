"""The law of scales: where a record says how scales go through its operator, scaled operands give scaled results.

Scales are drawn among all that what the record says leaves free, one for each part of the operands: as the sample has
them, and again with each axis of each operand in two segments. A range that the record states holds of the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from regauge.ir.cost import item_size
from regauge.ir.dtypes import is_real
from regauge.ir.graph import Value
from regauge.ir.scales.cells import Cell
from regauge.ir.scales.scaling import node_scaling
from regauge.ir.scales.variables import Collector

if TYPE_CHECKING:
    from regauge.ir.laws.cases import Case

_ADVICE = "state its scaling (ir/scales/scaling.py), or claim a weaker symmetry"


def check_scales(case: Case) -> None:
    """Check the law on one sample; raises LawError. Floats of 8 bits are rounded by what scales them: they are left."""
    values = [*(value for _, value in case.node.operands()), *case.node.outputs]
    if any(is_real(value.dtype) and item_size(value.dtype) == 1 for value in values):
        return
    _check_range(case)
    for arranged in (case, *_segmented(case)):
        _check_scales(arranged)


def _check_range(case: Case) -> None:
    within = node_scaling(case.node).within
    for result in case.results if within is not None else ():
        assert within is not None
        if is_real(result.dtype) and bool(((result < within[0]) | (result > within[1])).any()):
            raise case.broken("scales", f"a result is not between {within[0]:g} and {within[1]:g}", "correct `within`")


def _segmented(case: Case) -> Iterator[Case]:
    """The sample with an axis of an operand in two segments, for each axis in turn that is long enough."""
    for slot, value in case.node.operands():
        if is_real(value.dtype):
            for axis, size in enumerate(value.shape):
                if isinstance(size, int) and size > 3:  # segments of one index have no Dim
                    yield replace(case, joined=(slot, axis))


def _check_scales(case: Case) -> None:
    collector = Collector(case.analysis)
    collector.visit(case.node)
    drawn = _Drawn(collector)
    operands = list(case.operands)
    for slot, value in case.node.operands():
        if is_real(value.dtype):
            operands[slot] = drawn.scaled(value, operands[slot])
    scaling = node_scaling(case.node)
    for slot in scaling.numbers:
        operands[slot] = operands[slot] * drawn.common(case.node.inputs[scaling.joints[0].slots[0]])
    expected = [
        drawn.scaled(value, result) if is_real(value.dtype) else result
        for value, result in zip(case.node.outputs, case.results, strict=True)
    ]
    actual = case.evaluate(operands, case.node.attributes, "scales")
    case.expect_same(
        actual, expected, "scales" if case.joined is None else f"scales of segments {case.joined}", _ADVICE
    )


class _Drawn:
    """A scale for each part of the values of one node, among those that its relations allow."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        scales = collector.scales
        cells = [cell for layout in collector.layouts.values() for cell in layout.cells]
        roots = dict.fromkeys(scales.find(cell)[0] for cell in cells)
        ways = scales.freedom(roots, lambda _: False)
        self.logs: dict[Cell, Fraction] = {}
        for number, way in enumerate(ways.values()):
            amount = Fraction((number * 5 + 3) % 7 - 3 or 2, 2)
            for root, power in way.items():
                self.logs[root] = self.logs.get(root, Fraction(0)) + amount * power

    def _scale(self, cell: Cell) -> float:
        root, power = self.collector.scales.find(cell)
        return float(2.0 ** float(self.logs.get(root, Fraction(0)) * power))

    def common(self, value: object) -> float:
        """The scale of a value that has a single part, which numbers beside it take."""
        assert isinstance(value, Value)
        return self._scale(self.collector.layout(value).cells[0])

    def scaled(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with each part multiplied by its scale."""
        result = tensor.clone()
        layout = self.collector.layout(value)
        for cell in layout.cells:
            part = result
            for axis, positions in layout.places(cell):
                part = part.narrow(axis, positions.start, positions.stop - positions.start)
            part *= self._scale(cell)
        return result
