"""A pass made of rewrite rules: ``regauge.rewrite(pattern, replacement)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from regauge.ir.graph import Graph
from regauge.ir.rewriting.rewrite import RewriteLog, RewriteRule, RuleSet, rewrite_graph
from regauge.passes.base import Context, Contract, Pass


@dataclass(frozen=True, kw_only=True)
class Rewrite(Pass):
    """Apply rewrite rules until none fits any more."""

    rules: ClassVar[RuleSet] = RuleSet()

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        log = rewrite_graph(result, self.rules, strict=True)
        if not log.total:
            context.note("nothing matched")
        tell(log, context, every_miss=not log.total)
        return result if log.total else graph


def rewrite(
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    *,
    name: str = "",
    where: Callable[..., Any] | None = None,
    contract: Contract = "exact",
) -> Pass:
    """A pass of one rule: ``replacement(build, ...)`` takes the place of ``pattern(op, ...)``, if ``where(...)`` holds.

        square = regauge.rewrite(lambda op, x: op.mul(x, x), lambda build, x: build.pow(x, 2))
        graph = regauge.optimize(graph, [square, "simplify"])

    Replacement and condition take by name what they want of the pattern's variables and named nodes; a condition that
    gives False or a text leaves the match alone, and so does ``regauge.refuse("reason")``. How patterns are written:
    :mod:`regauge.ir.rewriting.patterns`. With the contract ``exact`` the results are compared before and after. Raises
    PatternError for a malformed pattern, and where a replacement has another shape or type.
    """
    given = getattr(replacement, "__name__", "")
    called = name or ("rewrite" if given in ("", "<lambda>") else given.replace("_", "-"))
    rule = RewriteRule(called, pattern, replacement, where)
    summary = f"{rule.pattern} by a rule of the user's own"
    fields = {"name": called, "contract": contract, "rules": RuleSet([rule]), "__doc__": f"Replace {summary}."}
    own: type[Rewrite] = dataclass(frozen=True, kw_only=True)(type("Rewrite", (Rewrite,), fields))
    return own()


def tell(
    log: RewriteLog, context: Context, counts: Mapping[str, int] | None = None, *, every_miss: bool = False
) -> None:
    """Note what was done, most first, and near misses: matches that a rule refused, or all."""
    for name, count in sorted({**log.counts, **(counts or {})}.items(), key=lambda entry: -entry[1]):
        if count:
            context.note(f"{name}: {count}")
    for name, miss in log.misses.items():
        if miss.refused or every_miss:
            context.left[f"{name}: {miss.reason} ({miss.where})"] += 1
