"""``simplify``: the same function with fewer nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.collection import without_collection
from regauge.ir.folding.limits import BYTES_BEFORE, FILE_ROOM
from regauge.ir.graph import Graph
from regauge.ir.rewriting.rewrite import RewriteLog, RuleSet, rewrite_graph
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.options import option
from regauge.passes.rewriting import tell
from regauge.passes.simplify.borders import crop_borders
from regauge.passes.simplify.carrying import carry_back
from regauge.passes.simplify.catalog import before_others, by_default, choose, described, summary
from regauge.passes.simplify.constants import fold_constants, fold_initializers, fold_into_weights
from regauge.passes.simplify.control_flow import inline_decided
from regauge.passes.simplify.dead_code import drop_orphans, remove_dead_code
from regauge.passes.simplify.gates import spread_gates
from regauge.passes.simplify.guards import threshold_weights
from regauge.passes.simplify.heads import join_heads
from regauge.passes.simplify.limits import Limits, limits_of, total_bytes
from regauge.passes.simplify.merging import merge_equal_nodes, tie_equal_weights
from regauge.passes.simplify.partitions import split_partitions
from regauge.passes.simplify.pooling import pool_means
from regauge.passes.simplify.projections import join_projections
from regauge.passes.simplify.residuals import free_residuals
from regauge.passes.simplify.rows import flatten_rows
from regauge.passes.simplify.sequences import put_positions_first

STEPS: Mapping[str, Callable[[Graph, Limits], int]] = {
    "dead-code": remove_dead_code,
    "control-flow": inline_decided,
    "constants": fold_constants,
    "ties": tie_equal_weights,
    "merging": merge_equal_nodes,
    "weights": fold_into_weights,
    "initializers": fold_initializers,
    "partitions": split_partitions,
    "carrying": carry_back,
    "borders": crop_borders,
    "pools": pool_means,
    "heads": join_heads,
    "rows": flatten_rows,
    "projections": join_projections,
    "gates": spread_gates,
    "guards": threshold_weights,
    "sequences": put_positions_first,
    "residuals": free_residuals,
}
FILE_STEPS = {
    "dead-code",
    "control-flow",
    "constants",
    "ties",
    "merging",
}  # done to ONNX files too
# Rules may do without what these would change; heads are joined last, when their maps have taken in all they can.
AFTER_RULES = (
    "weights",
    "initializers",
    "partitions",
    "carrying",
    "borders",
    "pools",
    "heads",
    "rows",
    "projections",
    "gates",
    "guards",
    "sequences",
)
FOR_RUNTIMES = (
    "rows",
    "projections",
    "gates",
    "guards",
    "sequences",
)  # how a file is spelled best, which hides whole operators
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
    runtime of that file may lack the operator, and the file would have to spell it out again. Steps that spell a file
    for its runtime (``rows``, ``projections``, ``gates``, ``guards``,
    ``sequences``, ``residuals``) are left out where operators are put together.
    """

    name: ClassVar[str] = "simplify"
    contract: ClassVar[Contract] = "exact"

    only: tuple[str, ...] = option((), "rules, rule sets or steps to apply: none of the others")
    skip: tuple[str, ...] = option((), "rules, rule sets or steps to leave out")
    growth: float = option(
        0.01,
        "part by which folding may make the model larger, of a file once more for what it computes; of a module 64 KiB "
        "if that is more",
        at_least=0,
    )
    tie: bool = option(False, "tie equal trained weights and equal vectors, too")
    also: tuple[str, ...] = option((), "rules or rule sets that are off by default: merges, separable")
    assemble: Literal["auto", "always", "never"] = option(
        "auto",
        "put whole operators together: auto does in graphs that were not loaded from ONNX, or as 'only' names it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self.only, self.skip, tuple(STEPS), self.also)

    @classmethod
    def details(cls) -> list[tuple[str, str]]:
        return [*((name, summary(step).partition(";")[0]) for name, step in STEPS.items()), *described()]

    def _assembles(self, graph: Graph) -> bool:
        if self.assemble == "auto":
            return "onnx" not in graph.metadata or bool(self.only)
        return self.assemble == "always"

    def call(self, graph: Graph, context: Context) -> Graph:
        with without_collection():
            return self._simplified(graph, context)

    def _simplified(self, graph: Graph, context: Context) -> Graph:
        assembles = self._assembles(graph)
        rules, steps = choose(self.only, self.skip, tuple(STEPS), self.also, assemble=assembles)
        steps = [step for step in steps if step in self.only or not (assembles and step in FOR_RUNTIMES)]
        result, log, counts = graph.copy(), RewriteLog(), dict.fromkeys(steps, 0)
        limits, usual = limits_of(graph, self.growth, self.tie, folds_file="constants" in steps), by_default(rules)
        _to_fixed_point(result, _stages(usual, steps), limits, log, counts)
        if usual != rules:  # when all else is done: a wide map takes in no batch norm of a part any more
            _to_fixed_point(result, _stages(rules, steps), limits, log, counts)
        drop_orphans(graph, result)
        tell(log, context, counts)
        result.metadata.setdefault(BYTES_BEFORE, total_bytes(graph))
        if "onnx" in graph.metadata:
            result.metadata[FILE_ROOM] = limits.most_bytes + limits.file_bytes - total_bytes(result)
        before, folds = set(graph.metadata.get("onnx_fold", ())), FILE_STEPS & set(steps)
        if "onnx" in graph.metadata and not folds <= before:
            result.metadata["onnx_fold"] = tuple(sorted(before | folds))
            return result
        return result if log.total or any(counts.values()) else graph


def _to_fixed_point(
    graph: Graph, stages: Sequence[str | RuleSet], limits: Limits, log: RewriteLog, counts: dict[str, int]
) -> None:
    """Go through the stages until none finds anything to do; what they did is added to the log and the counts."""
    for _ in range(MOST_ROUNDS):
        start = log.total + sum(counts.values())
        for stage in stages:
            if isinstance(stage, RuleSet):
                log.add(rewrite_graph(graph, stage))
            else:
                counts[stage] += STEPS[stage](graph, limits)
        if log.total + sum(counts.values()) == start:
            return


def _stages(rules: RuleSet, steps: Sequence[str]) -> list[str | RuleSet]:
    """What a round does, in order.

    Whole operators are put together first, and once more when equal nodes are one: a part that two of them share keeps
    both from being found, and so do parts that are computed twice in a formula that says it once. What rows leave
    unread hides projections of one value from one another: they would cost another round.
    """
    first = before_others(rules)
    assembly: list[str | RuleSet] = [first] if first.rules else []
    early = [step for step in steps if step not in (*AFTER_RULES, "merging")]
    merging = [step for step in steps if step == "merging"]
    late = [step for step in steps if step in AFTER_RULES]
    if "dead-code" in steps and "rows" in late:
        late.insert(late.index("rows") + 1, "dead-code")
    return [*early, *assembly, *merging, *assembly, rules, *late]
