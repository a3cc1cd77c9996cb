"""A decoder over all positions made one over the new ones, with what it needs of the past handed in as states.

    k, v = f(x), g(x)                       k, v = concat(past_k, f(x)), concat(past_v, g(x))
    attention(q, k, v, is_causal)    ->     attention(q, k, v, places of q >= places of k)

Every axis of positions of a value is asked for in one of two spans: NEW, the positions of this run, or ALL, with those
of former runs. What treats positions one by one asks its operands for the span that it is asked for; what ends an axis
of positions (attention its keys, a product of weights and values the latter) asks for ALL. A value that is computed
from inputs is cut there (:mod:`regauge.passes.decoding.cuts`): ALL of it are a state and what is new. A value that only
depends on how many positions there are (masks, angles, places) is computed for the span, by counting from the number
of past ones, or for ALL and then cut, where an operator runs along positions.
"""

from __future__ import annotations

from typing import Any

import sympy

from regauge.ir.edit import Builder, remove_dead, replace_uses, set_input
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Operand, Value
from regauge.ir.sizes.expressions import replaced, simplify, symbol, symbols_in
from regauge.ir.states import carry, forget_origin
from regauge.passes.decoding.cuts import Cuts
from regauge.passes.decoding.positions import ATTENTIONS, Courses, Positions, courses
from regauge.passes.decoding.recent import recent_of
from regauge.passes.decoding.recent_steps import RecentSteps, only_for_recent

NEW, ALL = "new", "all"
Spans = tuple[str, ...]
"""Of each axis of a value NEW or ALL, or nothing where it is no axis of positions."""


class Incremental:
    """Rewrites ``graph``, which must be a copy, in place; see the module docstring."""

    def __init__(self, graph: Graph, positions: Positions, *, by: str) -> None:
        self.graph, self.positions = graph, positions
        self.build = Builder(graph, by=by)
        self.cuts = Cuts(positions)
        self.past: Any = _unused_symbol(graph, "past")
        self.recent = self._recent_steps()
        self.total = simplify(positions.length + self.past)
        self.made: dict[tuple[Value, Spans], Value] = {}
        self.kept: dict[Value, tuple[Value, Value]] = {}  # what is kept of it: the state handed in, and handed out
        self.names: dict[Value, str] = {}
        self._read = {node: node.inputs for node in graph.nodes}  # before the first of them reads anything else
        self._replaced: dict[Value, Value] = {}
        self._mask: Value | None = None
        self._cut: frozenset[Value] | None = None  # what is kept for the value that is being computed for all positions

    def run(self) -> None:
        """Raises PassError where positions are mixed in a way that cannot be continued from a state."""
        _, high = self.graph.symbols.get(self.positions.length, (1, None))
        nodes = list(self.graph.nodes)
        passed = only_for_recent(nodes)
        for node in nodes:
            if node not in passed and any(value in self.positions.streamed for value in node.outputs):
                self._continue(node)
        self.graph.outputs = [self._as_new(output) for output in self.graph.outputs]
        for size in symbols_in(self.past):
            self.graph.symbols[size] = (0, high)
        forget_origin(self.graph)
        taken = {value.name for value in self.graph.values()}
        for before, after in [*self.kept.values(), *(self.recent.kept if self.recent else ())]:
            carry(self.graph, before, after, taken)
        remove_dead(self.graph)

    def _recent_steps(self) -> RecentSteps | None:
        """Where keys and values are rounded in blocks, the past positions are those of full blocks, and a rest."""
        for node in self.graph.nodes:
            recent = recent_of(node)
            if recent is not None:
                blocks, rest = (_unused_symbol(self.graph, name) for name in ("blocks", "rest"))
                found = RecentSteps(self.build, recent, blocks, rest, self.positions.length, self._computed_from)
                self.past = found.past
                return found
        return None

    def _computed_from(self, value: Value, source: Value, given: Value) -> Value:
        """The value at all positions where its source at these is what is given."""
        before, self._cut = dict(self.made), frozenset({source})
        spans = [self._spans(own, dict.fromkeys(range(own.rank), ALL)) for own in (source, value)]
        self.made[source, spans[0]] = given
        found = self._anew(value, spans[1])
        positional = {key: made for key, made in self.made.items() if key[0] in self.positions.positional}
        self.made, self._cut = {**before, **positional}, None
        if found is None:
            raise PassError(f"{value} is computed from {source} in a way that is not understood")
        return found

    # -- nodes that compute something of the new positions -----------------------------------------------------------

    def _continue(self, node: Node) -> None:
        """Let a node whose results have the new positions read what it needs of all of them."""
        if any(len(self.positions.axes(value)) > 1 for value in node.outputs):
            return  # scores: made for the spans in which they are read
        recent = recent_of(node)
        if recent is not None and self.recent is not None:
            with self.build.at(node):
                self._replace(node, self.recent.write(node, recent, (_below(node, "keys"), _below(node, "values"))))
            return
        found = self._courses(node)
        counted = isinstance(query := node.inputs[0], Value) and query.rank - 2 in self.positions.axes(query)
        causal = node.op in ATTENTIONS and node.attributes["is_causal"] and counted
        if node.op in ATTENTIONS:
            self._name_caches(node)
        elif found.mixing & set(found.kept.values()):
            raise PassError(f"{node.label} mixes positions, and is no attention: it cannot run step by step")
        operands = self._operands(node, found)
        if causal:
            self._with_mask(node, operands)
            return
        for slot, operand in enumerate(operands):
            if operand is not node.inputs[slot]:
                set_input(node, slot, operand, self.graph)

    def _operands(self, node: Node, found: Courses) -> list[Operand]:
        """Of what the node reads all positions where an axis of them ends here, else the new ones."""
        operands = list(node.inputs)
        with self.build.at(node):
            for slot, value in node.operands():
                ended = {axis: ALL for s, axis in found.ended if s == slot}
                operands[slot] = self.get(value, self._spans(value, ended))
        return operands

    def _spans(self, value: Value, known: dict[int, str]) -> Spans:
        """The spans of a value's axes; those of positions that nothing is known of are NEW."""
        own = self.positions.axes(value)
        return tuple(known.get(axis, NEW) if axis in own else "" for axis in range(value.rank))

    def _courses(self, node: Node) -> Courses:
        found = courses(node, self.positions)
        if found is None:
            raise PassError(f"nothing is known of how {node.label} treats positions")
        return found

    def _with_mask(self, node: Node, operands: list[Operand]) -> None:
        """The same attention with a mask in place of ``is_causal``, which counts both its axes from 0."""
        if len(operands) > 3 and operands[3] is not None:
            raise PassError(f"{node.label} is causal and has a mask as well: write one mask")
        if self._mask is None:
            queries = self.build.unsqueeze(self.build.arange(start=self.past, end=self.total), dim=1)
            self._mask = self.build.ge(queries, self.build.unsqueeze(self.build.arange(end=self.total), dim=0))
        attributes = {**node.attributes, "is_causal": False}
        with self.build.at(node):
            result = self.build(node.op, *operands[:3], self._mask, name=node.op, **attributes)
        result.producer.metadata.update(node.metadata)
        self._replace(node, result)

    def _replace(self, node: Node, result: Value) -> None:
        replace_uses(self.graph, node.output, result)
        self._replaced[node.output] = result
        self.positions.streamed.add(result)

    def _as_new(self, output: Operand) -> Operand:
        if not isinstance(output, Value):
            return output
        spans = self._spans(output, {})
        if spans.count(NEW) > 1:
            raise PassError(f"the output {output} has two axes of positions: leave it out")
        return self.get(output, spans)

    # -- values in spans ---------------------------------------------------------------------------------------------

    def get(self, value: Value, spans: Spans) -> Value:
        """The value with the positions that are asked for on each axis."""
        value = self._replaced.get(value, value)
        if (value, spans) not in self.made:
            self.made[value, spans] = self._make(value, spans)
        return self.made[value, spans]

    def _make(self, value: Value, spans: Spans) -> Value:
        asked = [span for span in spans if span]
        if value in self.positions.positional:
            return self._whole(value) if NEW not in asked else self._placed(value, spans)
        if value not in self.positions.streamed or asked in ([], [NEW]):
            return value
        made = self._everywhere(value, spans) if asked == [ALL] else self._anew(value, spans)
        if made is None:
            raise PassError(f"{value} has more than one axis of positions in a way that is not understood")
        return made

    def _everywhere(self, value: Value, spans: Spans) -> Value | None:
        """All positions of what is computed from inputs: kept, or computed anew from what is kept for it."""
        asked = self._cut is None
        if asked:
            self._cut = self.cuts.of(value)
        assert self._cut is not None
        found = self._cached(value) if value in self._cut else self._anew(value, spans)
        if asked:
            self._cut = None
        return found

    def _cached(self, value: Value) -> Value:
        """The value of former runs, a state, and that of this one behind it."""
        axis = self.positions.axes(value)[0]
        shape = [self.past if place == axis else size for place, size in enumerate(value.shape)]
        node = value.producer or value.consumers()[0]
        before = self.build.input(self.names.get(value) or _below(node, "cache"), shape, value.dtype)
        with self.build.at(node):
            after: Value = self.build.concat(before, value, dim=axis)
        self.kept[value] = before, after
        return after

    def _anew(self, value: Value, spans: Spans) -> Value | None:
        """The node that made the value once more, on operands of these spans; None where that is not the same."""
        node = value.producer
        found = None if node is None or node.regions else courses(node, self.positions)
        if node is None or found is None or found.merged:
            return None
        if any(spans[axis] == NEW for axis in found.mixing):
            return None
        attributes = self._resized(node.attributes, value, spans)
        if attributes is None:
            return None
        operands = list(self._read.get(node, node.inputs))
        for slot, operand in enumerate(operands):
            if not isinstance(operand, Value):
                continue
            known = {axis: spans[to] for (s, axis), to in found.kept.items() if s == slot}
            known |= {axis: ALL for s, axis in found.ended if s == slot}
            if NEW in spans and not self.positions.plain(operand):
                return None
            operands[slot] = self.get(operand, self._spans(operand, known))
        return self._call(node, operands, attributes, value.index)

    def _call(self, node: Node, operands: list[Operand], attributes: dict[str, Any], index: int) -> Value:
        with self.build.at(node):
            made = self.build(node.op, *operands, **attributes)
        results = made if isinstance(made, tuple) else (made,)
        for old, new in zip(node.outputs, results, strict=True):
            if old in self.positions.positional:
                self.positions.positional.add(new)
            elif old in self.positions.streamed:
                self.positions.streamed.add(new)
        found: Value = results[index]
        return found

    def _resized(self, attributes: dict[str, Any], value: Value, spans: Spans) -> dict[str, Any] | None:
        """Attributes for these spans: sizes of axes one by one, others only where all positions are asked for."""
        found = dict(attributes)
        for name, attribute in attributes.items():
            if self.positions.length not in symbols_in(attribute):
                continue
            if NEW not in spans:
                found[name] = self._for_all(attribute)
            elif name == "shape" and len(attribute) == value.rank:
                found[name] = tuple(
                    self._for_all(s) if span == ALL else s for s, span in zip(attribute, spans, strict=True)
                )
            else:
                return None
        return found

    def _for_all(self, attribute: Any) -> Any:
        if isinstance(attribute, tuple | list):
            return tuple(map(self._for_all, attribute))
        return replaced(attribute, {self.positions.length: self.total})

    # -- values that depend on the number of positions alone -----------------------------------------------------------

    def _whole(self, value: Value) -> Value:
        """As if all positions were computed in one run."""
        node = value.producer
        assert node is not None
        if node.regions:
            raise PassError(f"{node.label} depends on the number of positions, and has branches or a loop")
        operands = [
            self.get(operand, self._spans(operand, dict.fromkeys(range(operand.rank), ALL)))
            if isinstance(operand, Value)
            else self._for_all(operand)
            for operand in self._read.get(node, node.inputs)
        ]
        attributes = {name: self._for_all(attribute) for name, attribute in node.attributes.items()}
        return self._call(node, operands, attributes, value.index)

    def _placed(self, value: Value, spans: Spans) -> Value:
        """Some of its axes only for the new positions."""
        counted = self._counted(value)
        found = counted if counted is not None else self._anew(value, spans)
        if found is None:
            found = self.get(value, tuple(ALL if span else "" for span in spans))
            for axis, span in enumerate(spans):
                if span == NEW:
                    found = self.build.slice(found, dim=axis, start=self.past, end=self.total)
            self.positions.positional.add(found)
        return found

    def _counted(self, value: Value) -> Value | None:
        """Numbers, or rows of a table, counted from the past ones on; None where the value is something else."""
        node = value.producer
        assert node is not None
        attributes = dict(node.attributes)
        counts = node.op == "arange" and self.positions.axes(value) == [0]
        rows = node.op == "slice" and attributes["step"] == 1 and attributes["dim"] in self.positions.axes(value)
        static = rows and not any(operand in self.positions.positional for operand in node.inputs)
        if not (counts or static) or self.positions.length in symbols_in(attributes["start"]):
            return None
        attributes["start"] = simplify(attributes["start"] + self.past * attributes["step"])
        attributes["end"] = self._for_all(attributes["end"])
        return self._call(node, list(node.inputs), attributes, value.index)

    # -- names -------------------------------------------------------------------------------------------------------

    def _name_caches(self, node: Node) -> None:
        """What is kept for keys and for values of an attention is called after its module."""
        for operand, label in zip(node.inputs[1:3], ("keys", "values"), strict=True):
            if isinstance(operand, Value) and operand in self.positions.streamed:
                for kept in self.cuts.of(operand):
                    self.names.setdefault(kept, _below(node, label))


def _below(node: Node, label: str) -> str:
    """A name in the module of a node."""
    path = node.scope[-1][0] if node.scope else ""
    return f"{path}.{label}" if path else label


def _unused_symbol(graph: Graph, name: str) -> sympy.Symbol:
    taken, number, candidate = {str(s) for s in graph.symbols}, 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return symbol(candidate)
