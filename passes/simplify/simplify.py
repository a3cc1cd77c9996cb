"""``simplify``: the same function with fewer nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.graph import Graph
from regauge.ir.rewrite import RewriteLog, rewrite_graph
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.options import option
from regauge.passes.simplify.catalog import choose
from regauge.passes.simplify.dead_code import remove_dead_code

STEPS: Mapping[str, Callable[[Graph], int]] = {
    "dead-code": remove_dead_code,
}
MOST_ROUNDS = 16  # each undoes what the one before made possible; more would mean that two rules undo each other


@dataclass(frozen=True, kw_only=True)
class Simplify(Pass):
    """Compute the same function with fewer nodes, by rewrite rules that are each proved on their own.

    before  h = conv(x, w, b)   n = batch_norm(h, gain, shift, mean, var)   y = relu(relu(n))
    after   n = conv(x, w', b')   y = relu(n)

    Rules and steps are applied in rounds until nothing changes any more. What random, stateful or training operators
    compute is never merged, folded or moved. ``regauge passes simplify`` lists the rules.

    Whole operators are put together from the primitive ones that exporters write (norms, activations, attention) where
    ``assemble`` says so: "auto" leaves a graph that was loaded from an ONNX file as it is spelled there, because the
    runtime of that file may lack the operator, and the file would have to spell it out again.
    """

    name: ClassVar[str] = "simplify"
    contract: ClassVar[Contract] = "exact"

    only: tuple[str, ...] = option((), "rules, rule sets or steps to apply: none of the others")
    skip: tuple[str, ...] = option((), "rules, rule sets or steps to leave out")
    assemble: Literal["auto", "always", "never"] = option(
        "auto",
        "put whole operators together: auto does in graphs that were not loaded from ONNX, or as 'only' names it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self.only, self.skip, tuple(STEPS))

    def _assembles(self, graph: Graph) -> bool:
        if self.assemble == "auto":
            return "onnx" not in graph.metadata or bool(self.only)
        return self.assemble == "always"

    def call(self, graph: Graph, context: Context) -> Graph:
        rules, steps = choose(self.only, self.skip, tuple(STEPS), assemble=self._assembles(graph))
        result, log, counts = graph.copy(), RewriteLog(), dict.fromkeys(steps, 0)
        for _ in range(MOST_ROUNDS):
            changes = 0
            for step in steps:
                found = STEPS[step](result)
                counts[step] += found
                changes += found
            round_log = rewrite_graph(result, rules)
            log.add(round_log)
            if not changes + round_log.total:
                break
        _tell(log, counts, context)
        return result if log.total or any(counts.values()) else graph


def _tell(log: RewriteLog, steps: Mapping[str, int], context: Context) -> None:
    """What was done, most first, and near misses: matches that a rule refused."""
    for name, count in sorted({**log.counts, **steps}.items(), key=lambda entry: -entry[1]):
        if count:
            context.note(f"{name}: {count}")
    for name, miss in log.misses.items():
        if miss.refused:
            context.left[f"{name}: {miss.reason} ({miss.where})"] += 1
