"""``derive``: sums of products computed another way, where a search finds one that takes less time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from regauge.ir.cost import node_macs, smallest_sizes
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.errors import EquivalenceError, PassError
from regauge.ir.folding.purity import is_pure
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.graph_copy import copy_nodes
from regauge.ir.memory.activations import read_from_around, returned
from regauge.ir.printing.tables import short
from regauge.ir.rewriting.equivalence import prove_equal
from regauge.ir.roofline import Device, local_seconds
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.allocation.latency import device_of
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.deriving.expressions import RANGES, READERS, Expression, Outside, Term, leaf
from regauge.passes.deriving.lowering import Lowering
from regauge.passes.deriving.search import Found, Limit, Search
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Derive(Pass):
    """Compute sums of products of tensors in another order, where several steps together take less time.

    before  k = reshape(linear(linear(c, v), u))   s = matmul(reshape(linear(x, q)), permute(k))
    after   a = matmul(reshape(linear(x, q)), u')   s = matmul(a, permute(linear(c, v)))

    Chains of matmuls, linear maps, einsums, convolutions with one tap, sums, products, reshapes and permutes are read
    as one expression over indices, after the rules of OLLIE (Zheng et al., OSDI 2023): iterators are split and merged
    where reshapes do so, stages are merged to one and split again by contracting two tensors at a time, in any order,
    common factors are taken out of sums, and what comes of that is matched to linear maps, matmuls and elementwise
    operators. Ranges are relaxed and tightened where they are in the graph, as zeros around a tensor and as slices:
    these go before or behind a product, or to its other factor. OLLIE also relaxes ranges of convolutions with several
    taps and generates kernels: that is not done here.

    The search goes from the cheapest state on, by a roofline of the ``device``, every dynamic size at its least or as
    in the first batch of data. What is read more than once is computed once, and weights are not multiplied ahead:
    ``simplify`` does that where it makes the model smaller, ``unfactorize`` where it is faster. Each result is proved
    equal on integers, to the last bit where no other numbers occur.
    """

    name: ClassVar[str] = "derive"
    contract: ClassVar[Contract] = "exact"

    budget: int | str = option(2000, "states that each search may look at, or a time for all of them (5s)")
    device: str | Mapping[str, int | float] = option(
        "cpu", "whose time is predicted: cpu, gpu or {flops=5e10,bandwidth=1e10,overhead=2e-6,multiple=8}"
    )
    gain: float = option(0.05, "share of the predicted time of an expression that has to be saved", at_least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._limit()
        device_of(self.device)

    def _limit(self) -> Limit:
        if isinstance(self.budget, int):
            if self.budget < 1:
                raise PassError(f"option 'budget' of derive must be at least 1, not {self.budget}")
            return Limit(self.budget, float("inf"))
        return Limit(sys.maxsize, time.perf_counter() + parse_amount(self.budget, "budget", "time").value / 1e3)

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        work = _Derivation(result, device_of(self.device), self._limit(), self.gain, context)
        for node in list(result.nodes):
            if node in result._nodes:
                work.visit(node)
        return result if work.count else graph


class _Derivation:
    def __init__(self, graph: Graph, device: Device, limit: Limit, gain: float, context: Context) -> None:
        self.graph, self.device, self.limit, self.gain = graph, device, limit, gain
        self.context = context
        at = context.sizes(graph)
        self.at, self.bound = at, smallest_sizes(graph, at)
        regions = [region for node in graph.nodes for region in node.regions]
        self.read_inside = set[Value]().union(*map(read_from_around, regions))
        self.held = {*returned(graph), *self.read_inside}
        self.count = 0

    def visit(self, node: Node) -> None:
        """Compute the expression that ends in a node another way, where that is cheaper, and those that it reads."""
        if not _is_read(node) or self.goes_on(node.output):
            return
        ends = [node]
        while ends:
            reading = _Reading(self, ends.pop())
            self._derive(reading)
            ends += reading.cut

    def _derive(self, reading: _Reading) -> None:
        node, expression = reading.root, reading.expression
        if expression is None or not _may_gain(expression) or node.output in self.read_inside:
            return
        before = local_seconds(reading.nodes, self.graph, self.device, self.at)
        search = Search(expression, self.bound, self.device, node.output.dtype, self.limit)
        found = search.run(before * (1 - self.gain))
        if found is None:
            return
        self._replace(node, reading.nodes, expression, found, before)

    def goes_on(self, value: Value) -> bool:
        """Whether a value is read once, by a node that is read as an expression, too: it is part of that one."""
        users = list(value.uses)
        return len(users) == 1 and value not in self.held and _is_read(users[0][0])

    def _replace(self, node: Node, nodes: Sequence[Node], expression: Expression, found: Found, before: float) -> None:
        build, old = Builder(self.graph, by="derive"), node.output
        with build.at(node):
            new = Lowering(build, expression.axes).root(found.terms, old.shape)
        after = local_seconds(build.added, self.graph, self.device, self.at)
        if new.producer not in build.added or after > before * (1 - self.gain):
            build.take_back()
            self.context.left["what a search found costs as much as before once it is laid out"] += 1
            return
        added = list(build.added)
        _prove(self.graph, (nodes, old), (added, new))
        macs = [sum(node_macs(n, self.bound) for n in part) for part in (nodes, added)]
        replace_uses(self.graph, old, new)
        for gone in reversed(nodes):
            remove_node(self.graph, gone)
        if old in self.held:
            self.held.add(new)
        new.name = old.name
        for made in added:
            made.metadata["regauge.replaces"] = ", ".join(n.name for n in nodes)
        self.count += 1
        self.context.note(
            f"{old.name}: {len(nodes)} nodes as {len(added)}, {short(macs[0])} -> {short(macs[1])} MACs, predicted "
            f"{before * 1e6:.1f} -> {after * 1e6:.1f} us; {found.states} states"
            + ("" if found.complete else ", stopped by the budget")
        )


def _is_read(node: Node) -> bool:
    floating = len(node.outputs) == 1 and isinstance(node.output.dtype, torch.dtype)
    return floating and node.op in READERS and is_pure(node) and node.output.dtype.is_floating_point  # type: ignore[union-attr]


class _Reading:
    """The expression of a node, None where it is no sum of products, and the nodes that it stands for, in order.

    ``cut`` are nodes where other expressions end, of which this one reads the result.
    """

    def __init__(self, work: _Derivation, root: Node) -> None:
        self.work, self.root = work, root
        self.expression: Expression | None = None
        for self.ranges in (True, False):  # reshapes split axes that are read, but not where their ranges are others
            self.nodes: list[Node] = []
            self.cut: list[Node] = []
            try:
                self.expression = self._of(root)
                break
            except Outside:
                continue
        if self.expression is None:
            given = [value for _, value in root.operands() if value.producer is not None and work.goes_on(value)]
            self.cut = [value.producer for value in given if value.producer is not None and _is_read(value.producer)]

    def _of(self, node: Node) -> Expression:
        count, cut = len(self.nodes), len(self.cut)
        try:
            found = READERS[node.op](node, self._read)
        except Outside:
            del self.nodes[count:], self.cut[cut:]
            raise
        self.nodes.append(node)
        return found

    def _read(self, operand: Any) -> Expression:
        """The expression of an operand: of the node that gives it, where nothing else reads it, or of itself."""
        if not isinstance(operand, Value):
            if isinstance(operand, bool) or not isinstance(operand, int | float):
                raise Outside("not a number")
            return Expression((), (Term(float(operand)),))
        if operand.dtype != self.root.output.dtype or not operand.ranked:
            raise Outside("another type")
        node = operand.producer
        if node is not None and _is_read(node) and self.work.goes_on(operand):
            if node.op in RANGES and not self.ranges:
                self.cut.append(node)
                return leaf(operand)
            try:
                return self._of(node)
            except Outside:
                self.cut.append(node)
        return leaf(operand)


def _may_gain(expression: Expression) -> bool:
    """Whether there is anything to choose: an order of contractions, or a factor that two terms share."""
    if any(len(term.factors) > 2 for term in expression.terms):
        return True
    products = [term for term in expression.terms if len(term.factors) == 2]
    values = [factor.value for term in products for factor in {f.value: f for f in term.factors}.values()]
    return len(set(values)) < len(values)


def _prove(graph: Graph, before: tuple[Sequence[Node], Value], after: tuple[Sequence[Node], Value]) -> None:
    """Run both on the same small integers; raises EquivalenceError where the results differ."""
    graphs = []
    made = {value for node in before[0] for value in node.outputs}
    leaves = list(dict.fromkeys(v for node in before[0] for _, v in node.operands() if v not in made))
    for nodes, result in (before, after):
        part = Graph("expression", symbols=dict(graph.symbols))
        inner = Builder(part)
        to_new = {value: inner.input(value.name, value.shape, value.dtype) for value in leaves}
        copy_nodes(nodes, part, to_new)
        part.outputs = [to_new[result]]
        graphs.append(part)
    try:
        prove_equal(graphs[0], graphs[1])
    except EquivalenceError as error:
        raise EquivalenceError(f"derive: {before[1].name} was derived wrongly: {error}") from error
