"""Which nodes of a graph are one expression: what is read once is put into what reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from regauge.ir.folding.purity import is_pure
from regauge.ir.graph import Node, Value
from regauge.passes.deriving.expressions import Expression, Outside, Term, leaf
from regauge.passes.deriving.readers import READERS, has_ranges


def is_read(node: Node) -> bool:
    """Whether a node may be part of an expression."""
    floating = len(node.outputs) == 1 and isinstance(node.output.dtype, torch.dtype)
    return floating and node.op in READERS and is_pure(node) and node.output.dtype.is_floating_point  # type: ignore[union-attr]


class Reading:
    """The expressions of a node, none where it is no sum of products, and the nodes that they stand for, in order.

    There are two where windows that lie side by side can be read as an index that is split, too. ``cut`` are nodes
    where other expressions end, of which this one reads the result; ``outside`` says why a node is no sum of products.
    """

    def __init__(self, root: Node, goes_on: Callable[[Value], bool]) -> None:
        self.root, self.goes_on = root, goes_on
        self.expressions: list[Expression] = []
        self.outside, self.split = "", False
        self.nodes: list[Node] = []
        self.cut: list[Node] = []
        for self.ranges in (True, False):  # reshapes split axes that are read, but not where their ranges are others
            if self._whole(split=False):
                nodes, cut = self.nodes, self.cut
                if self._whole(split=True) and (self.nodes != nodes or _factors(self.expressions) == 1):
                    self.expressions.pop()
                self.nodes, self.cut = nodes, cut
                return
        given = [value for _, value in root.operands() if value.producer is not None and goes_on(value)]
        self.cut = [value.producer for value in given if value.producer is not None and is_read(value.producer)]

    def _whole(self, *, split: bool) -> bool:
        """Read the expression of the root; whether it is one."""
        self.split = split
        self.nodes, self.cut = [], []
        try:
            self.expressions.append(self._of(self.root))
        except Outside as error:
            self.outside = str(error)
            return False
        return True

    def _of(self, node: Node) -> Expression:
        count, cut = len(self.nodes), len(self.cut)
        try:
            found = READERS[node.op](node, self)
        except Outside:
            del self.nodes[count:], self.cut[cut:]
            raise
        self.nodes.append(node)
        return found

    def __call__(self, operand: Any, /) -> Expression:
        """The expression of an operand: of the node that gives it, where nothing else reads it, or of itself."""
        if not isinstance(operand, Value):
            if isinstance(operand, bool) or not isinstance(operand, int | float):
                raise Outside("not a number")
            return Expression((), (Term(float(operand)),))
        if operand.dtype != self.root.output.dtype or not operand.ranked:
            raise Outside("another type")
        node = operand.producer
        if node is not None and is_read(node) and self.goes_on(operand):
            if has_ranges(node) and not self.ranges:
                self.cut.append(node)
                return leaf(operand)
            try:
                return self._of(node)
            except Outside:
                self.cut.append(node)
        return leaf(operand)


def _factors(expressions: list[Expression]) -> int:
    """How many numbers of factors expressions have: those with one and the same say the same."""
    return len({sum(len(term.factors) for term in expression.terms) for expression in expressions})
