"""``derive``: sums of products computed another way, where a search finds one that takes less time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from regauge.ir.cost import node_macs, smallest_sizes
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.errors import EquivalenceError, PassError
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.graph_copy import copy_nodes
from regauge.ir.memory.activations import read_from_around, returned
from regauge.ir.printing.tables import short
from regauge.ir.rewriting.equivalence import prove_equal
from regauge.ir.roofline import Device
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.allocation.latency import device_of
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.deriving.costs import Costs
from regauge.passes.deriving.expressions import Expression
from regauge.passes.deriving.layouts import cut_weights
from regauge.passes.deriving.libraries import LIBRARIES, Library, libraries_of
from regauge.passes.deriving.lowering import Lowering
from regauge.passes.deriving.readers import PRODUCTS, is_moved_kernel
from regauge.passes.deriving.reading import Reading, is_read
from regauge.passes.deriving.search import Found, Limit, Search
from regauge.passes.deriving.sources import rules_of
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Derive(Pass):
    """Compute sums of products of tensors in another order, where several steps together take less time.

    before  k = reshape(linear(linear(c, v), u))   s = matmul(reshape(linear(x, q)), permute(k))
    after   a = matmul(reshape(linear(x, q)), u')   s = matmul(a, permute(linear(c, v)))

    Chains of matmuls, linear maps, einsums, convolutions, transposed or not, sums, products, reshapes and permutes are
    read as one expression over indices, and searched by the rules of OLLIE (Zheng et al., OSDI 2023, section 4):

        split, merge        of iterators, where reshapes do so; windows side by side are one split index
        stage split, merge  stages are merged to one, and split again by contracting two tensors at a time, in any
                            order; common factors are taken out of sums
        relaxed ranges      zeros around a tensor and slices go before or behind a product, or to its other factor; taps
                            that meet nothing but zeros are left out
        variable            what windows read becomes an index of taps beside that of windows (part of a convolution's
        substitution        channels); taps of a product are added up from their places (its convolution to a product
                            and offset adds, its transposed convolution to a product and selective adds)
        data layout         axes that a kernel is not moved along become part of the batch or of one another (a kernel
        transformation      along one or two of three axes is one of two); heads, groups and phases are laid out by
                            reshapes and permutes, the fewest that a product or a convolution can read
        matching            to linear maps, matmuls, convolutions, elementwise operators, with their library's costs

    Not done: what the paper generates kernels for (its eOperators are chains of slices, pads and sums here; ``fuse``
    makes kernels of such), its products of bands (G2BMM: no operator of ours is one, so no gain can be had), and a
    dilated convolution as a dense one of phases, and a convolution with steps as one of phases as channels: these take
    as many operations or more, and dilated ones take 1.4 and 2.4 times as long so on a CPU (docs/benchmarks.md).

    The search goes from the cheapest state on, by a roofline of the ``device``, every dynamic size at its least or as
    in the first batch of data, with the shares of it that the ``library`` reaches; with ``any`` what is chosen has to
    be faster by all of them. Best-first and no equality saturation, since rules only ever join factors, so that states
    are few and no rule has to be applied to what another one made of the same: 13 of the 132 states of a chain of six
    matmuls were looked at until the cheapest was known to be, 11 of 72 of a convolution over three axes, in 0.03 s.

    What is read more than once is computed once. Weights are cut where a part is all that is read, and are not
    multiplied ahead: ``simplify`` does that where it makes the model smaller, ``unfactorize`` where it is faster. Each
    result is proved equal on integers, to the last bit where no other numbers occur. The report says what each
    expression was and is, its rules, MACs, bytes and predicted times, and how many were left alone, and why.
    """

    name: ClassVar[str] = "derive"
    contract: ClassVar[Contract] = "exact"

    budget: int | str = option(2000, "states that each search may look at, or a time for all of them (5s)")
    device: str | Mapping[str, int | float] = option(
        "cpu", "whose time is predicted: cpu, gpu or {flops=5e10,bandwidth=1e10,overhead=2e-6,multiple=8}"
    )
    library: str = option(
        "any", f"what computes convolutions: {', '.join(LIBRARIES)}; any: all that are for the device"
    )
    gain: float = option(0.05, "share of the predicted time of an expression that has to be saved", at_least=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._limit()
        device_of(self.device)
        libraries_of(self.library, self.device)

    def _limit(self) -> Limit:
        if isinstance(self.budget, int):
            if self.budget < 1:
                raise PassError(f"option 'budget' of derive must be at least 1, not {self.budget}")
            return Limit(self.budget, float("inf"))
        return Limit(sys.maxsize, time.perf_counter() + parse_amount(self.budget, "budget", "time").value / 1e3)

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        libraries = libraries_of(self.library, self.device)
        work = _Derivation(result, device_of(self.device), self._limit(), self.gain, context, libraries)
        for node in list(result.nodes):
            if node in result._nodes:
                work.visit(node)
        return result if work.count else graph


class _Derivation:
    def __init__(
        self,
        graph: Graph,
        device: Device,
        limit: Limit,
        gain: float,
        context: Context,
        libraries: Sequence[Library] = (Library(),),
    ) -> None:
        self.graph, self.limit, self.gain = graph, limit, gain
        self.context = context
        at = context.sizes(graph)
        self.at, self.bound = at, smallest_sizes(graph, at)
        self.costs = [Costs(device, library, self.bound) for library in libraries]
        regions = [region for node in graph.nodes for region in node.regions]
        self.read_inside = set[Value]().union(*map(read_from_around, regions))
        self.held = {*returned(graph), *self.read_inside}
        self.count = 0

    def visit(self, node: Node) -> None:
        """Compute the expression that ends in a node another way, where that is cheaper, and those that it reads."""
        if not is_read(node) or self.goes_on(node.output):
            return
        ends = [node]
        while ends:
            reading = Reading(ends.pop(), self.goes_on)
            self._derive(reading)
            ends += reading.cut

    def _derive(self, reading: Reading) -> None:
        node = reading.root
        if not reading.expressions and node.op in PRODUCTS:
            self.context.left[f"{node.op}, which is not read as a sum of products: {reading.outside}"] += 1
        if node.output in self.read_inside or not reading.expressions:
            return
        if not any(map(_may_gain, reading.expressions)) and not any(map(is_moved_kernel, reading.nodes)):
            return
        before = self._seconds(reading.nodes)
        ways: list[tuple[Found, Expression]] = []
        for costs in self.costs:
            for expression in reading.expressions:
                search = Search(expression, costs, node.output.dtype, self.limit)
                found = search.run(before[self.costs.index(costs)] * (1 - self.gain))
                if found is not None:
                    ways.append((found, expression))
        if not ways:
            self.context.left["no way to compute it was found that costs less"] += 1
        elif not any(self._replace(node, reading.nodes, *way, before) for way in ways):
            rules = ", ".join(dict.fromkeys(rule for found, _ in ways for rule in rules_of(found.terms)))
            self.context.left[f"{rules}: what a search found costs as much as before once it is laid out"] += 1

    def _seconds(self, nodes: Sequence[Node]) -> list[float]:
        """The seconds of nodes, by each library."""
        return [costs.nodes(nodes, self.graph, self.at) for costs in self.costs]

    def goes_on(self, value: Value) -> bool:
        """Whether a value is read once, by a node that is read as an expression, too: it is part of that one."""
        users = list(value.uses)
        return len(users) == 1 and value not in self.held and is_read(users[0][0])

    def _replace(
        self, node: Node, nodes: Sequence[Node], found: Found, expression: Expression, before: Sequence[float]
    ) -> bool:
        """Put what was found in the place of nodes, where every library is faster by what has to be gained."""
        build, old = Builder(self.graph, by="derive"), node.output
        with build.at(node):
            new = Lowering(build, expression.axes).root(found.terms, old.shape)
        after = self._seconds(build.added)
        slower = any(new > old * (1 - self.gain) for new, old in zip(after, before, strict=True))
        if slower or new.producer not in build.added:
            build.take_back()
            return False
        added = list(build.added)
        _prove(self.graph, (nodes, old), (added, new))
        macs = [sum(node_macs(n, self.bound) for n in part) for part in (nodes, added)]
        moved = [sum(self.costs[0].bytes_of(n) for n in part) for part in (nodes, added)]
        replace_uses(self.graph, old, new)
        for gone in reversed(nodes):
            remove_node(self.graph, gone)
        if old in self.held:
            self.held.add(new)
        added = cut_weights(build, added)
        new.name = old.name
        for made in added:
            made.metadata["regauge.replaces"] = ", ".join(n.name for n in nodes)
        self.count += 1
        times = ", ".join(
            f"{one * 1e6:.1f} -> {other * 1e6:.1f} us" + (f" ({costs.library.name})" if len(self.costs) > 1 else "")
            for one, other, costs in zip(before, after, self.costs, strict=True)
        )
        rules = ", ".join(rules_of(found.terms))
        self.context.note(
            f"{old.name}: {len(nodes)} nodes as {len(added)} by {rules}; {short(macs[0])} -> "
            f"{short(macs[1])} MACs, {short(moved[0])}B -> {short(moved[1])}B moved, predicted {times}; "
            f"{found.states} states" + ("" if found.complete else ", stopped by the budget")
        )
        return True


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
