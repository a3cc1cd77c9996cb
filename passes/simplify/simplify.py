"""``simplify``: the same function with fewer nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from regauge.ir.graph import Graph
from regauge.ir.rewrite import RewriteLog, rewrite_graph
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.options import option
from regauge.passes.rewriting import tell
from regauge.passes.simplify.catalog import choose, described, summary
from regauge.passes.simplify.constants import fold_constants, fold_into_weights
from regauge.passes.simplify.control_flow import inline_decided
from regauge.passes.simplify.dead_code import remove_dead_code
from regauge.passes.simplify.limits import BYTES_BEFORE, Limits, limits_of, total_bytes
from regauge.passes.simplify.merging import merge_equal_nodes, tie_equal_weights

STEPS: Mapping[str, Callable[[Graph, Limits], int]] = {
    "dead-code": remove_dead_code,
    "control-flow": inline_decided,
    "constants": fold_constants,
    "ties": tie_equal_weights,
    "merging": merge_equal_nodes,
    "weights": fold_into_weights,
}
FILE_STEPS = {
    "dead-code",
    "control-flow",
    "constants",
    "ties",
    "merging",
}  # also done to what an ONNX file has beside the graph
AFTER_RULES = {"weights"}  # rules may do without what would be folded
MOST_ROUNDS = 16  # each undoes what the one before made possible; more would mean that two rules undo each other


@dataclass(frozen=True, kw_only=True)
class Simplify(Pass):
    """Compute the same function with fewer nodes, by rewrite rules that are each proved on their own.

    before  h = conv(x, w, b)   n = batch_norm(h, gain, shift, mean, var)   y = relu(relu(n))
    after   n = conv(x, w', b')   y = relu(n)

    Rules and steps are applied in rounds until nothing changes any more. What random, stateful or training operators
    compute is never merged, folded or moved. ``regauge passes simplify`` lists the rules.
    """

    name: ClassVar[str] = "simplify"
    contract: ClassVar[Contract] = "exact"

    only: tuple[str, ...] = option((), "rules, rule sets or steps to apply: none of the others")
    skip: tuple[str, ...] = option((), "rules, rule sets or steps to leave out")
    growth: float = option(
        0.01, "part by which folding may make the model larger, or 64 KiB if that is more", at_least=0
    )
    tie: bool = option(False, "tie trained weights that are equal, too")

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self.only, self.skip, tuple(STEPS))

    @classmethod
    def details(cls) -> list[tuple[str, str]]:
        return [*((name, summary(step).partition(";")[0]) for name, step in STEPS.items()), *described()]

    def call(self, graph: Graph, context: Context) -> Graph:
        rules, steps = choose(self.only, self.skip, tuple(STEPS))
        result, log, counts = graph.copy(), RewriteLog(), dict.fromkeys(steps, 0)
        limits = limits_of(graph, self.growth, self.tie)
        for _ in range(MOST_ROUNDS):
            start = log.total + sum(counts.values())
            for step in steps:
                counts[step] += 0 if step in AFTER_RULES else STEPS[step](result, limits)
            log.add(rewrite_graph(result, rules))
            for step in steps:
                counts[step] += STEPS[step](result, limits) if step in AFTER_RULES else 0
            if log.total + sum(counts.values()) == start:
                break
        tell(log, context, counts)
        result.metadata.setdefault(BYTES_BEFORE, total_bytes(graph))
        before, folds = set(graph.metadata.get("onnx_fold", ())), FILE_STEPS & set(steps)
        if "onnx" in graph.metadata and not folds <= before:
            result.metadata["onnx_fold"] = tuple(sorted(before | folds))
            return result
        return result if log.total or any(counts.values()) else graph
