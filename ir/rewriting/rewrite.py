"""Rewriting: rules as values, and the driver that applies them to a graph until none fits.

    drop = RewriteRule("relu-twice", lambda op, x: op.relu(op.relu(x)), lambda build, x: build.relu(x))
    log = rewrite_graph(graph, RuleSet([drop]))

The driver keeps a worklist of nodes: a node is looked at once, and again only when something near it has changed, so
that a fixed point is reached in time that grows with the graph and with the number of rewrites, not with their product.
What a rule did, how long it took and where it nearly fitted is told in the :class:`RewriteLog`.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NoReturn, TypeAlias

from regauge.ir.bonds import hand_bonds_on
from regauge.ir.collection import without_collection
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.errors import PatternError
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.rewriting.matcher import Match, Miss, match, may_match
from regauge.ir.rewriting.patterns import Pattern, call_of, parse_pattern
from regauge.ir.sizes.expressions import may_be_same, same
from regauge.ir.storage.weight_edits import settle_successors

Samples: TypeAlias = Callable[[], Iterable[dict[str, Any]]]


class Refusal(Exception):
    """Raised by a condition or a replacement: the pattern fits, and the rewrite is still not right or does not pay."""

    near = True


class Difference(Refusal):
    """Raised where a pattern is wider than its rule: what it found is nothing of the rule's kind."""

    near = False


def refuse(reason: str) -> NoReturn:
    """Leave a match as it is, for a reason that the report tells: ``return refuse("its padding is not zero")``."""
    raise Refusal(reason)


def differs(reason: str) -> NoReturn:
    """Leave a match as it is that a user would not expect to be rewritten: no near miss, and not in the report."""
    raise Difference(reason)


@dataclass(frozen=True)
class RewriteRule:
    """A pattern, what takes its place, and when.

    ``replacement(build, ...)`` and ``where(...)`` name the variables and nodes of the pattern that they want, or
    ``match`` for all of it. A replacement builds nodes and returns a value for each root; both may :func:`refuse`.
    ``samples`` are operands for the variables of the pattern, from which the rule's own test is made
    (:mod:`regauge.ir.rewriting.equivalence`). With ``shared`` inner nodes of a match may have other readers, and stay
    for them. Raises PatternError for a malformed pattern.
    """

    name: str
    pattern_function: Callable[..., Any]
    replacement: Callable[..., Any]
    where: Callable[..., Any] | None = None
    samples: Samples | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        self.pattern  # noqa: B018  reading it tells whoever makes the rule what is malformed about it

    @cached_property
    def pattern(self) -> Pattern:
        return parse_pattern(self.pattern_function)

    def build(self, build: Builder, found: Match) -> Any:
        """Build the replacement of a match; raises PatternError where the replacement computes with values."""
        try:
            return self.replacement(build, **self.bind(self.replacement, found))
        except TypeError as error:
            if "operand type" not in str(error):
                raise
            raise PatternError(
                f"the replacement of rule {self.name} fails with {error}: write calls, as in build.mul(x, 2), not signs"
            ) from error

    def bind(self, function: Callable[..., Any], found: Match) -> dict[str, Any]:
        """The arguments that a condition or a replacement asks for by name; a replacement's first is the builder."""
        known = {**found.bindings, "match": found}
        names = _parameters(function)[1 if function is self.replacement else 0 :]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise PatternError(
                f"rule {self.name}: {unknown[0]!r} is no variable and no node of its pattern, which has "
                f"{', '.join(known)}"
            )
        return {name: known[name] for name in names}


@lru_cache(maxsize=4096)
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def rule(
    pattern: Callable[..., Any],
    *,
    name: str = "",
    where: Callable[..., Any] | None = None,
    samples: Samples | None = None,
    shared: bool = False,
) -> Callable[[Callable[..., Any]], RewriteRule]:
    """Decorator form of :class:`RewriteRule`: the decorated function is the replacement."""

    def make(replacement: Callable[..., Any]) -> RewriteRule:
        return RewriteRule(name or replacement.__name__.replace("_", "-"), pattern, replacement, where, samples, shared)

    return make


@dataclass(frozen=True)
class RuleSet:
    """Rules in order of preference; sets add. ``ruleset - names`` leaves rules out."""

    rules: tuple[RewriteRule, ...] = ()

    def __init__(self, rules: Iterable[RewriteRule] = ()) -> None:
        object.__setattr__(self, "rules", tuple(rules))
        names = [r.name for r in self.rules]
        if len(names) != len(set(names)):
            raise PatternError(f"two rules are called {next(n for n in names if names.count(n) > 1)!r}")

    def __add__(self, other: RuleSet) -> RuleSet:
        return RuleSet(dict.fromkeys((*self.rules, *other.rules)))

    def __iter__(self) -> Iterator[RewriteRule]:
        return iter(self.rules)

    @cached_property
    def by_operator(self) -> dict[str, list[RewriteRule]]:
        """Rules by the operators that their first root may be."""
        table: dict[str, list[RewriteRule]] = {}
        for entry in self.rules:
            for op in dict.fromkeys(op for anchor in entry.pattern.anchors for op in call_of(anchor).ops):
                table.setdefault(op, []).append(entry)
        return table


@dataclass
class RewriteLog:
    """What a run of the driver did: rewrites and seconds per rule, and each idle rule's nearest miss."""

    counts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    misses: dict[str, Miss] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, other: RewriteLog) -> None:
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for name, miss in other.misses.items():
            self.miss(name, miss)

    def miss(self, name: str, miss: Miss) -> None:
        if self.came_nearer(name, miss.matched):
            self.misses[name] = miss

    def came_nearer(self, name: str, matched: int) -> bool:
        """Whether more nodes matched than at the nearest miss of a rule that is known."""
        known = self.misses.get(name)
        return known is None or matched > known.matched


def rewrite_graph(
    graph: Graph,
    rules: RuleSet,
    *,
    nodes: Iterable[Node] | None = None,
    aliases: bool = False,
    strict: bool = False,
) -> RewriteLog:
    """Apply the rules to a graph and its regions, in place, until none fits any more.

    Outputs that are values of their own stay so, unless ``aliases`` allows them to become inputs or one another. A
    replacement of another shape or type leaves the match as it is, since a constant may have widened what was matched;
    with ``strict`` it raises PatternError, for rules that nothing has proved yet.
    """
    with without_collection():
        return _Driver(graph, rules, aliases, strict).run(nodes)


class _Driver:
    def __init__(self, graph: Graph, rules: RuleSet, aliases: bool = False, strict: bool = False) -> None:
        self.graph = graph
        self.strict = strict
        self.aliases = aliases
        self.rules = rules
        self.log = RewriteLog()
        self.owner: dict[Node, Graph] = {}
        self.builders: dict[Graph, Builder] = {}
        self.held: dict[Value, list[Graph]] = {}
        self.read: dict[Parameter, None] = {}  # parameters that removed nodes read
        self._enter(graph, Builder(graph))
        self.size = len(self.owner)
        self.most = 1000 + 20 * self.size

    def _enter(self, graph: Graph, build: Builder) -> None:
        self.builders[graph] = build
        build.held = self.held
        for value in graph.outputs:
            if isinstance(value, Value):
                self.held.setdefault(value, []).append(graph)
        for state in graph.states:
            for value in (state.before, state.after):
                self.held.setdefault(value, []).append(graph)
        for node in graph.nodes:
            self.owner[node] = graph
            for region in node.regions:
                self._enter(region, build.region(region))

    def run(self, nodes: Iterable[Node] | None) -> RewriteLog:
        queue = deque(self.owner if nodes is None else nodes)
        waiting = set(queue)
        while queue:
            node = queue.popleft()
            waiting.discard(node)
            if node not in self.owner:
                continue
            for near in self._visit(node):
                if near not in waiting and near in self.owner:
                    waiting.add(near)
                    queue.append(near)
        self._remove_unread()
        return self.log

    def _check_end(self, entry: RewriteRule) -> None:
        """A rule that fits what it makes would be applied without an end."""
        if self.log.counts.get(entry.name, 0) > self.most:
            raise PatternError(
                f"rule {entry.name} was applied {self.most} times to a graph of {self.size} nodes: "
                f"its replacement fits its own pattern {entry.pattern}"
            )

    def _remove_unread(self) -> None:
        """Remove the parameters that only removed nodes read."""
        unread = [p for p in self.read if not p.uses and p not in self.held]
        for graph in dict.fromkeys([self.graph, *self.owner.values()]):
            for parameter in unread:
                if graph.parameters.get(parameter.name) is parameter:
                    del graph.parameters[parameter.name]
                    graph.version += 1

    def _visit(self, node: Node) -> list[Node]:
        """Try the rules at a node; the nodes to look at again where one fitted."""
        for entry in self.rules.by_operator.get(node.op, ()):
            if not may_match(entry.pattern, node) and self._has_missed(entry):
                continue
            start = time.perf_counter()
            found = match(entry.pattern, node, shared=entry.shared, held=self.held)
            touched = self._apply(entry, found) if isinstance(found, Match) else None
            self.log.seconds[entry.name] = self.log.seconds.get(entry.name, 0.0) + time.perf_counter() - start
            if isinstance(found, Miss):
                self.log.miss(entry.name, found)
            if touched is not None:
                self._check_end(entry)
                self.log.counts[entry.name] = self.log.counts.get(entry.name, 0) + 1
                return touched
        return []

    def _has_missed(self, entry: RewriteRule) -> bool:
        """Whether a miss is known that came as far as one where only the first node fits."""
        known = self.log.misses.get(entry.name)
        return known is not None and known.matched >= 1

    def _apply(self, entry: RewriteRule, found: Match) -> list[Node] | None:
        graph = self.owner[found.root]
        build = self.builders[graph]
        build.by, build.added, build.made = entry.name, [], []
        try:
            for node in found.nodes.values():
                if is_fixed(node):
                    raise Refusal(f"{node.label} must stay: {is_fixed(node)}")
            if entry.where is not None:
                verdict = entry.where(**entry.bind(entry.where, found))
                if isinstance(verdict, str) or verdict is False:
                    raise Refusal(verdict or "its condition does not hold")
            with build.at(found.root):
                results = entry.build(build, found)
            news = tuple(results) if isinstance(results, tuple | list) else (results,)
            _check_results(entry, found, news, self.strict)
            self._check_outputs(found, news, build)
            if lost := hand_bonds_on(found.nodes.values(), found.roots, news, build.added):
                raise Refusal(lost)
        except Refusal as refusal:
            build.take_back()
            if self.log.came_nearer(entry.name, len(found.nodes)):
                miss = Miss(len(found.nodes), found.root.label, str(refusal), refused=refusal.near)
                self.log.miss(entry.name, miss)
            return None
        return self._commit(graph, build, found, news)

    def _check_outputs(self, found: Match, news: Sequence[Any], build: Builder) -> None:
        """Outputs and states that were values of their own stay so."""
        made = {value for node in build.added for value in node.outputs}
        given: set[Value] = set()
        for old, new in zip(found.roots, news, strict=True):
            if old not in self.held or self.aliases:
                continue
            if new in given or (new not in made and (new.producer is None or new in self.held)):
                refuse(f"{old.name} is an output, and would be the same value as {new.name}")
            given.add(new)

    def _commit(self, graph: Graph, build: Builder, found: Match, news: Sequence[Any]) -> list[Node]:
        self.owner.update(dict.fromkeys(build.added, graph))
        near: dict[Node, None] = dict.fromkeys(build.added)
        outputs = {old for old in found.roots if old in self.held}
        for old, new in zip(found.roots, news, strict=True):
            near.update(dict.fromkeys(old.consumers()))
            if new is not None:
                self._replace(graph, old, new)
        doomed = [node for node in found.nodes.values()]
        near.update(dict.fromkeys(v.producer for n in doomed for _, v in n.operands() if v.producer is not None))
        for new in news:
            if isinstance(new, Value) and new.producer is not None:
                near[new.producer] = None
        names, added = {old: old.name for old in found.roots}, set(build.added)
        replaced = ", ".join(dict.fromkeys(node.metadata.get("regauge.replaces") or node.name for node in doomed))
        for node in build.added:
            node.metadata["regauge.replaces"] = replaced
        self._remove(doomed)
        for old, new in zip(found.roots, news, strict=True):
            made = new is not None and new.producer in added
            if (made or (old in outputs and new is not None and new.producer)) and old.producer not in self.owner:
                new.name = names[old]
        settle_successors(graph, build)
        return [node for node in near if node in self.owner]

    def _replace(self, graph: Graph, old: Value, new: Any) -> None:
        for holder in dict.fromkeys([graph, *self.held.pop(old, ())]):
            replace_uses(holder, old, new)
            if isinstance(new, Value) and any(output is new for output in holder.outputs):
                self.held.setdefault(new, []).append(holder)

    def _remove(self, doomed: Sequence[Node]) -> None:
        """Remove matched nodes that nobody reads any more, and then what only they read."""
        stack = list(doomed)
        while stack:
            node = stack.pop()
            if node not in self.owner or any(value.uses or value in self.held for value in node.outputs):
                continue
            read = [value for _, value in node.operands()]
            remove_node(self.owner.pop(node), node)
            stack.extend(value.producer for value in read if value.producer is not None)
            self.read.update(dict.fromkeys(value for value in read if isinstance(value, Parameter)))


def _check_results(entry: RewriteRule, found: Match, news: Sequence[Any], strict: bool) -> None:
    """A replacement has the shapes and types of what it replaces; refused where dynamic sizes cannot be compared."""
    if len(news) != len(found.roots):
        raise PatternError(f"rule {entry.name} replaces {len(found.roots)} results by {len(news)}")
    for old, new in zip(found.roots, news, strict=True):
        if new is None and found.unread(old):
            continue
        if not isinstance(new, Value):
            raise PatternError(f"rule {entry.name} replaces {old} by {new!r}: return a value")
        if new.rank != old.rank or new.dtype != old.dtype or not all(map(may_be_same, new.shape, old.shape)):
            if strict:
                raise PatternError(f"rule {entry.name} replaces {old} by {new}: shapes and types must be the same")
            refuse(f"it would replace {old} by {new}: shapes and types must be the same")
        if not all(map(same, new.shape, old.shape)):
            refuse(f"the sizes of {new} cannot be compared with those of {old}")
