"""Of which entries of one value those of another are made: layouts, products with tables and pairwise sums followed.

    q = reshape(y)                     each entry is one of y
    q = y cos + half-rotated(y) sin    each entry is two of y, by factors of two tables

Entries are numbered and laid out by the nodes in between, each evaluated on the numbers. Factors come from tables
(rotary positions, gains), whose own nodes are evaluated on the parameters; what is computed from inputs of the graph,
or by a product that would cost something, is a random number there, the same one wherever it stands: factors that are
found to be equal are equal for all inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.rewriting.rewrite import refuse
from regauge.ir.sizes.expressions import evaluate, prime_hints, symbols_in

_SAME = {"cast", "identity", "dropout", "feature_dropout"}
_NORMS = {"rms_norm", "layer_norm"}
_FOLLOWED = {*_SAME, *_NORMS, "neg", "index_select", "add", "sub", "mul", "div", "view_as_complex", "view_as_real"}
_MOST_TERMS = 2
_EVALUATION_ERRORS = (RegaugeError, RuntimeError, ValueError, IndexError)


@dataclass(frozen=True)
class Entries:
    """Entries of a value as sums of entries of another one by factors.

    ``sources`` [terms, *shape] counts the entries of the other value from one, row by row; zero stands for none.
    ``factors`` has the same shape, in double precision, complex where the value is.
    """

    sources: torch.Tensor
    factors: torch.Tensor

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Entries:
        """Each term moved in the same way."""
        return Entries(
            *(torch.stack([change(term) for term in part.unbind()]) for part in (self.sources, self.factors))
        )

    def times(self, factor: Any) -> Entries:
        factors = self.factors * factor
        return Entries(self.sources.expand(factors.shape), factors)


@dataclass
class Trace:
    """What was met between two values: ``entries``; the ``nodes`` that were followed, in their order; the ``norms``.

    ``found`` are the entries of every value in between. ``norms`` are nodes that multiply entries by what is computed
    from themselves, some by gains too, which entries do not have. ``joined`` says that entries of other values were
    laid beside them (those of a cache).
    """

    entries: Entries
    found: dict[Value, Entries]
    nodes: list[Node] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    joined: bool = False


def followed(node: Node) -> bool:
    """Whether entries are traced through a node, as far as its operator says."""
    return node.op in _FOLLOWED or symmetry_of(node) is Symmetry.LAYOUT


class Tracer:
    """Traces entries through one graph; tables that are read in many places are evaluated once."""

    def __init__(self, graph: Graph) -> None:
        shapes = [value.shape for node in graph.nodes for value in node.outputs]
        self.hints = prime_hints(symbols_in([*shapes, *(value.shape for value in graph.inputs)]), avoid=2)
        self._place = {node: place for place, node in enumerate(graph.nodes)}
        self._nodes = graph.nodes
        self._numbers: dict[Value, Any] = {}
        self._random = torch.Generator().manual_seed(0)

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of a value with a small prime in place of each dynamic size."""
        return tuple(evaluate(value.shape, self.hints))

    def trace(self, source: Value, target: Value) -> Trace:
        """The entries of ``target`` as those of ``source``; Refusal where it is more than such sums, saying why."""
        shape = self.shape(source)
        start = torch.arange(1, int(torch.Size(shape).numel()) + 1).reshape(1, *shape)
        found = {source: Entries(start, torch.ones(start.shape, dtype=torch.float64))}
        trace = Trace(found[source], found)
        below = self._descendants(source, target)
        for node in _between(source, target, below, self._place):
            if not followed(node):
                refuse(f"{node.op} stands between")
            try:
                results = self._through(node, found, below, trace)
            except _EVALUATION_ERRORS as error:
                refuse(f"{node.op} cannot be followed: {error}")
            found.update(zip(node.outputs, results, strict=True))
            trace.nodes.append(node)
        if target not in found:
            refuse("nothing of the layer arrives")
        trace.entries = found[target]
        return trace

    def _descendants(self, source: Value, target: Value) -> set[Value]:
        start = 0 if source.producer is None else self._place[source.producer] + 1
        end = len(self._nodes) if target.producer is None else self._place[target.producer] + 1
        found = {source}
        for node in self._nodes[start:end]:
            if any(value in found for _, value in node.operands()):
                found.update(node.outputs)
        return found

    # -- one node ------------------------------------------------------------------------------------------------------

    def _through(self, node: Node, found: dict[Value, Entries], below: set[Value], trace: Trace) -> Sequence[Entries]:
        traced = [found.get(o) if isinstance(o, Value) else None for o in node.inputs]
        x = next(entries for entries in traced if entries is not None)
        if node.op in _SAME:
            return [x]
        if node.op in _NORMS:
            return [self._normed(node, x, trace)]
        if node.op in ("add", "sub"):
            return [self._added(node, traced)]
        if node.op == "neg":
            return [x.times(-1)]
        if node.op == "index_select":
            return [self._chosen(node, traced)]
        if node.op in ("mul", "div"):
            return [self._scaled(node, traced, below, trace)]
        if node.op == "view_as_complex":
            return [_summed([x.mapped(lambda term: term[..., 0]), x.mapped(lambda term: term[..., 1]).times(1j)])]
        if node.op == "view_as_real":
            parted = torch.view_as_real(x.factors.to(torch.complex128))
            return [Entries(x.sources[..., None].expand(parted.shape), parted)]
        return self._laid_out(node, traced, trace)

    def _normed(self, node: Node, x: Entries, trace: Trace) -> Entries:
        if len(node.attributes.get("normalized_shape", (1,))) != 1:
            refuse(f"{node.op} goes over several axes")
        trace.norms.append(node)  # with its gain, which pairs behind it would not be rotations with
        return x

    def _added(self, node: Node, traced: Sequence[Entries | None]) -> Entries:
        if any(entries is None for entries in traced):
            refuse(f"{node.op} adds something else")
        first, second = (entries for entries in traced if entries is not None)
        return _summed([first, second.times(-1) if node.op == "sub" else second])

    def _chosen(self, node: Node, traced: Sequence[Entries | None]) -> Entries:
        x, index, dim = traced[0], node.inputs[1], node.attributes["dim"]
        if x is None or not isinstance(index, Parameter):
            refuse(f"{node.label} takes what is computed")
        return x.mapped(lambda term: node.operator.evaluate(term, index.tensor, dim=dim))

    def _scaled(self, node: Node, traced: Sequence[Entries | None], below: set[Value], trace: Trace) -> Entries:
        slot = 0 if traced[0] is not None else 1
        other, x = node.inputs[1 - slot], traced[slot]
        if node.op == "div" and (slot == 1 or node.attributes.get("rounding_mode")):
            refuse(f"{node.op} is no product")
        if other in below:
            trace.norms.append(node)
        factor = self.numbers(other)
        assert x is not None
        return x.times(1 / factor if node.op == "div" else factor)

    def _laid_out(self, node: Node, traced: Sequence[Entries | None], trace: Trace) -> Sequence[Entries]:
        attributes = evaluate_all(node, self.hints)
        held = [entries for entries in traced if entries is not None]
        terms = max(len(entries.sources) for entries in held)
        others = [o for o, entries in zip(node.inputs, traced, strict=True) if entries is None and isinstance(o, Value)]
        trace.joined |= bool(others)

        def results(part: Callable[[Entries], torch.Tensor], term: int) -> Sequence[torch.Tensor]:
            operands = []
            for operand, entries in zip(node.inputs, traced, strict=True):
                if entries is None:
                    none = isinstance(operand, Value)
                    operands.append(torch.zeros(self.shape(operand)).to(part(held[0])) if none else operand)  # type: ignore[arg-type]
                else:
                    own = part(entries)
                    operands.append(own[term] if term < len(own) else torch.zeros_like(own[0]))
            made = node.operator.evaluate(*operands, **attributes)
            return list(made) if isinstance(made, tuple | list) else [made]

        sources = [results(lambda e: e.sources, term) for term in range(terms)]
        factors = [results(lambda e: e.factors, term) for term in range(terms)]
        pairs = zip(zip(*sources, strict=True), zip(*factors, strict=True), strict=True)
        return [Entries(torch.stack(places), torch.stack(by)) for places, by in pairs]

    # -- tables --------------------------------------------------------------------------------------------------------

    def numbers(self, operand: Any) -> Any:
        """An operand as numbers: a table as it is, or random numbers for what inputs and products decide."""
        if not isinstance(operand, Value):
            return evaluate(operand, self.hints)
        if operand not in self._numbers:
            if isinstance(operand, Parameter):
                held = operand.tensor.detach()
                self._numbers[operand] = held.double() if held.dtype.is_floating_point else held
            else:
                self._compute(operand)
        return self._numbers[operand]

    def _compute(self, value: Value) -> None:
        node = value.producer
        if node is not None and node.operator.macs is None and not node.operator.random and not node.regions:
            try:
                operands = [self.numbers(o) for o in node.inputs]
                made = node.operator.evaluate(*operands, **evaluate_all(node, self.hints))
                results = made if isinstance(made, tuple | list) else (made,)
                self._numbers.update(zip(node.outputs, results, strict=True))
                return
            except _EVALUATION_ERRORS:  # an index beyond a table, say
                pass
        self._numbers[value] = self._stand_in(value)

    def _stand_in(self, value: Value) -> torch.Tensor:
        shape, dtype = self.shape(value), value.dtype
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point and not dtype.is_complex:
            return torch.randint(0, 2, shape, generator=self._random).to(dtype)
        found = torch.rand(shape, generator=self._random, dtype=torch.float64) + 0.5
        is_complex = isinstance(dtype, torch.dtype) and dtype.is_complex
        return torch.polar(torch.ones_like(found), found) if is_complex else found


def evaluate_all(node: Node, hints: Any) -> dict[str, Any]:
    """The attributes of a node with numbers in place of dynamic sizes."""
    return {name: evaluate(attribute, hints) for name, attribute in node.attributes.items()}


def _between(source: Value, target: Value, below: set[Value], place: dict[Node, int]) -> Iterator[Node]:
    """The nodes through which ``target`` is made of ``source``, in the order in which they run; tables left out."""
    found: set[Node] = set()
    waiting = [target]
    while waiting:
        value = waiting.pop()
        node = value.producer
        if value is source or node is None or node in found or value not in below:
            continue
        found.add(node)
        if not followed(node):
            break
        computed = [operand for _, operand in node.operands() if operand in below]
        # of a product the factor that is followed is the one that is made by steps that can be
        if node.op in ("mul", "div") and len(computed) > 1:
            computed = [operand for operand in computed if _leads(operand, source, below)][:1]
        waiting += computed
    yield from sorted(found, key=place.__getitem__)


def _leads(value: Value, source: Value, below: set[Value]) -> bool:
    """Whether a value is made of ``source`` by steps that can be followed alone."""
    seen: set[Value] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value is source or value in seen:
            continue
        seen.add(value)
        if value.producer is None or not followed(value.producer):
            return False
        waiting += [operand for _, operand in value.producer.operands() if operand in below]
    return True


def _summed(parts: Sequence[Entries]) -> Entries:
    """The sum of entries, terms with equal sources as one; Refusal where more than a pair comes together."""
    shape = np.broadcast_shapes(*(part.sources.shape[1:] for part in parts))
    sources = torch.cat([part.sources.expand(-1, *shape) for part in parts])
    dtype = torch.promote_types(parts[0].factors.dtype, parts[1].factors.dtype)
    factors = torch.cat([part.factors.to(dtype).expand(-1, *shape) for part in parts])
    for first in range(len(sources)):
        for second in range(first + 1, len(sources)):
            same = (sources[first] == sources[second]) & (sources[first] > 0)
            factors[first] += torch.where(same, factors[second], 0)
            sources[second][same] = 0
    order = torch.argsort((sources == 0).long(), dim=0, stable=True)
    sources, factors = sources.gather(0, order), factors.gather(0, order)
    terms = max(1, int((sources > 0).sum(0).max()))
    if terms > _MOST_TERMS:
        refuse("more than two entries come together")
    return Entries(sources[:terms], factors[:terms])
