"""``depth``: remove whole blocks, or single residual branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from regauge.ir.cost import Metric, figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Parameter
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.base import GIVE_DATA, Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.noise import noise_batches
from regauge.passes.depth.blocks import repeated_blocks
from regauge.passes.depth.branches import residual_branches
from regauge.passes.depth.choice import Goal, alone, iterated, without_nested
from regauge.passes.depth.healing import heal
from regauge.passes.depth.parts import Order, Part, Unit, trained
from regauge.passes.depth.removal import removable, without
from regauge.passes.depth.scores import Criterion, Judge
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option

_BUDGETS: dict[str, Metric] = {"params": "parameters", "macs": "macs"}
_MADE_UP = 4  # examples where there is no data


@dataclass(frozen=True, kw_only=True)
class Depth(Pass):
    """Remove whole blocks of a network, or single residual branches, and let the layers that are left make up for them.

    before  x1 = x0 + attention(norm(x0))    x2 = x1 + mlp(norm(x1))    y = head(x2)
    after   y = head(x0)

    A branch is what is computed from a value and added to it; a block is what repeats along the network, from one value
    to another of the same shape, or a residual branch that nothing repeats. Both are found from the graph alone, so
    encoders, decoders and residual convolutional networks are all the same. What others read as well stays: masks,
    rotary tables, norms that two branches share.

    Give exactly one of blocks, ratio, params and macs; params and macs are what is kept. With data the layers behind a
    removed part, and the last one that writes into the stream in front of it, are refitted by least squares so that the
    stream comes back, without gradients. Parts are then chosen by what is lost after that, which refits once per part
    on a few examples; score=similarity looks at the data once for all parts. Without data, parts are chosen by how far
    the outputs move on inputs that are made up (images, normal numbers, random indices, masks of ones).
    """

    name: ClassVar[str] = "depth"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    blocks: int | None = option(None, "how many blocks, or branches, are removed", at_least=0)
    ratio: float | None = option(None, "share of the blocks, or branches, that is removed", at_least=0, at_most=1)
    params: float | str | None = option(None, "parameters kept: a share (0.5) or a number (1.2M)")
    macs: float | str | None = option(None, "multiply-accumulates kept: a share or a number (300M)")
    unit: Unit | None = option(
        None, "whole blocks or single residual branches; blocks where their number or share is given, else branches"
    )
    score: Criterion = option(
        "distortion",
        "what a part is worth: squared change of the outputs without it; 1 - cosine of the outputs with it and without "
        "(macro); 1 - cosine of what it reads and what it gives (similarity)",
    )
    iterative: bool = option(True, "measure again after each removal; else each alone, and a knapsack of the losses")
    compensate: bool | None = option(None, "refit the layers that are left on data; true where data is given")
    include: tuple[str, ...] = option((), "globs on names of parts, modules or parameters: remove nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of parts, modules or parameters: these stay")
    limit: int | None = option(None, "remove only the first so many parts (to find one that does harm)", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("blocks", "ratio", *_BUDGETS) if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise PassError(
                f"depth takes exactly one of blocks, ratio, params and macs, but {found}: write depth{{blocks=1}}"
            )
        for name in _BUDGETS:
            if getattr(self, name) is not None:
                parse_amount(getattr(self, name), name)

    def call(self, graph: Graph, context: Context) -> Graph:
        if self.compensate and context.data is None:
            raise PassError(f"depth needs data for compensate: {GIVE_DATA}")
        candidates = self._candidates(graph, context)
        goal = self._goal(graph, candidates)
        goal.check(candidates, self._unit, context.left)
        if goal.met([]):
            return graph
        batches = calibration_batches(graph, context) if context.data is not None else noise_batches(graph, _MADE_UP)
        healed = context.data is not None and self.compensate is not False
        judge = Judge(graph, batches, self.score, healed=healed, by=self.name)
        choose = iterated if self.iterative else alone
        chosen = choose(judge, candidates, goal)[: self.limit]
        if not chosen:
            return graph
        return self._remove(graph, chosen, batches if healed else None, judge, context)

    @property
    def _unit(self) -> Unit:
        return self.unit or ("branch" if self.blocks is None and self.ratio is None else "block")

    def _candidates(self, graph: Graph, context: Context) -> list[Part]:
        order = Order(graph)
        branches = residual_branches(order, context.left)
        parts = branches if self._unit == "branch" else repeated_blocks(order, branches)
        names = {part: _names(part) for part in parts}
        for option_name, patterns in (("include", self.include), ("exclude", self.exclude)):
            every = {name for found in names.values() for name in found}
            listed = f"there are {', '.join(sorted(every)[:6])} ..."
            check_patterns(option_name, patterns, every, what="part that can be removed", otherwise=listed)
        found = []
        for part in parts:
            reason = removable(order, part)
            if self.include and not _included(part, self.include):
                reason = "not included"
            elif matches(names[part], self.exclude):
                reason = "excluded"
            if reason is None:
                found.append(part)
            else:
                context.left[reason] += 1
        return found

    def _goal(self, graph: Graph, candidates: Sequence[Part]) -> Goal:
        if self.blocks is not None:
            return Goal(graph, self.blocks, None, str(self))
        if self.ratio is not None:
            return Goal(graph, round(self.ratio * len(without_nested(candidates))), None, str(self))
        name = next(name for name in _BUDGETS if getattr(self, name) is not None)
        whole = getattr(figures(graph), _BUDGETS[name])
        return Goal(graph, whole - parse_amount(getattr(self, name), name).of(whole), _BUDGETS[name], str(self))

    def _remove(
        self,
        graph: Graph,
        chosen: Sequence[tuple[Part, float]],
        batches: Sequence[Any] | None,
        judge: Judge,
        context: Context,
    ) -> Graph:
        parts = [part for part, _ in chosen]
        for part, loss in chosen:
            context.cuts.append(Cut(part.name, 1, 0, f"{part.name}: removed, {_WORDS[self.score]} {loss:.3g}"))
        result, moved = without(graph, parts, by=self.name)
        error = judge.error(result)
        if batches is None:
            context.note(f"error, squared and as a share of the squares of the outputs: {error:.3g}")
            return result
        count = heal(graph, result, moved, batches, by=self.name)
        context.note(
            f"layers refitted on {sum(map(examples_in, batches))} examples: {count}; error, squared and as a share of "
            f"the squares of the outputs: {error:.3g} -> {judge.error(result):.3g}"
        )
        return result


_WORDS = {"distortion": "error", "macro": "macro influence", "similarity": "block influence"}


def _names(part: Part) -> set[str]:
    """The part's own name, those of its weights, and of the modules that hold them."""
    weights = {name for parameter in trained(part.nodes) for name in parameter.names}
    modules = {name.rpartition(".")[0] for name in weights}
    modules |= {node.scope[-1][0] for node in part.nodes if node.scope and _reads_weights(node)}
    return {part.name} | weights | modules - {""}


def _reads_weights(node: Node) -> bool:
    return any(isinstance(value, Parameter) for _, value in node.operands())


def _included(part: Part, patterns: Sequence[str]) -> bool:
    """Whether the patterns name the part itself, or all weights that are in it alone."""
    own = part.weights
    return matches([part.name], patterns) or bool(own) and all(matches(weight.names, patterns) for weight in own)
