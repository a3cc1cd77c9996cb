"""``parallelize``: let branches of the residual stream read what the branch before them reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from regauge.ir.edit import record, set_input
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph
from regauge.passes.base import GIVE_DATA, Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.depth.branches import residual_branches
from regauge.passes.depth.healing import heal
from regauge.passes.depth.parts import Order, Part, alike
from regauge.passes.depth.scores import Judge
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option

_SHORTLIST = 4  # branches that are measured again after each choice: those that were best before


@dataclass(frozen=True, kw_only=True)
class Parallelize(Pass):
    """Let branches that follow one another run beside one another, on the same input.

    before  x1 = x0 + attention(x0)    x2 = x1 + ffn(x1)
    after   x1 = x0 + attention(x0)    x2 = x1 + ffn(x0)

    That is how parallel transformers are built (Wang and Komatsuzaki 2021, GPT-J), and what FFN Fusion makes of rows of
    hidden layers (Bercovich et al. 2025, section 3): two branches of which none waits for the other, whose first layers
    may be one, as their last ones. Branches are chosen one after the other, always the one that moves the outputs
    least; several in a row all read what the first of them does. Then the layers behind are refitted by least squares,
    without gradients: those of the branch to give what they gave, as far as the earlier input tells, and those that
    write into the stream to add what is missing. The report has the error of the outputs before and after.
    """

    name: ClassVar[str] = "parallelize"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    branches: int = option(1, "how many branches read what the one before them reads", at_least=1)
    compensate: bool = option(True, "refit the layers behind by least squares")
    include: tuple[str, ...] = option((), "globs on names of branches: only these no longer wait for the one before")
    exclude: tuple[str, ...] = option((), "globs on names of branches: these still wait")

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None:
            raise PassError(f"parallelize needs data: {GIVE_DATA}")
        batches = calibration_batches(graph, context)
        pairs = self._candidates(graph, context.left)
        if len(pairs) < self.branches:
            raise PassError(
                f"{self} asks for {self.branches} branches, but {len(pairs)} can read what the one before them reads: "
                "ask for fewer, or exclude less"
            )
        judge = Judge(graph, batches, "distortion", healed=False, by=self.name)
        chosen = _least(judge, graph, pairs, self.branches, self.name)
        result, moved, changed = rewired(graph, chosen, by=self.name)
        before = judge.error(result)
        if self.compensate:
            count = heal(graph, result, moved, batches, by=self.name, changed=changed)
            context.note(f"layers refitted on {sum(map(examples_in, batches))} examples: {count}")
        after = f", {judge.error(result):.3g} once refitted" if self.compensate else ""
        context.note(f"error of the outputs, as a share of their squares: {before:.3g}{after}")
        for part in chosen:
            context.note(f"{part.name}: reads {_start(chosen, part).name}, not {part.source.name}")
        return result

    def _candidates(self, graph: Graph, left: Counter[str]) -> dict[Part, Part]:
        """Branches that may read what another one reads, which comes before them."""
        order = Order(graph)
        parts = residual_branches(order, left)
        every = [part.name for part in parts]
        check_patterns("include", self.include, every, what="branch of the residual stream")
        check_patterns("exclude", self.exclude, every, what="branch of the residual stream")
        ending = {part.result: part for part in parts}
        found = {}
        for part in parts:
            before = ending.get(part.source)
            reason = None if before is not None else "no branch comes before it"
            if before is not None:
                reason = _misfit(order, before, part)
                if self.include and not matches([part.name], self.include):
                    reason = "not included"
                elif matches([part.name], self.exclude):
                    reason = "excluded"
            if reason is None and before is not None:
                found[part] = before
            else:
                left[str(reason)] += 1
        return found


def _misfit(order: Order, before: Part, part: Part) -> str | None:
    if part.source in order.held:
        return "what it reads is an output"
    if not alike(before.source, part.source):
        return "what the branch before it reads has another shape"
    inside = set(part.nodes)
    reads = [node for node, _ in part.source.uses if node in inside and node is not part.nodes[-1]]
    return None if reads else "it reads the stream through what others read, too"


Chosen = dict[Part, Part]  # branches with the one before each


def _start(chosen: Chosen, part: Part) -> Value:
    """What a branch reads: what the first of its row reads."""
    while part in chosen:
        part = chosen[part]
    return part.source


def rewired(graph: Graph, chosen: Chosen, *, by: str) -> tuple[Graph, dict[Value, Value], Collection[Value]]:
    """A copy of a graph in which branches read what the first of their row does.

    Also for each value of ``graph`` what it is in the copy, and the values of the copy that are computed otherwise.
    """
    moved: dict[Value, Value] = {}
    result = copy_graph(graph, moved)
    changed = set[Value]()
    for part in chosen:
        inside = {moved[value].producer for node in part.nodes for value in node.outputs}
        end, old, new = moved[part.result].producer, moved[part.source], moved[_start(chosen, part)]
        for node, slot in list(old.uses):
            if node in inside and node is not end:
                set_input(node, slot, new, result)
                changed.update(node.outputs)
        record(result, by, f"{part.name}: reads {new.name}")
    return result, moved, changed


def _least(judge: Judge, graph: Graph, pairs: Chosen, count: int, by: str) -> Chosen:
    """So many branches, one after the other that which adds least to the error of the outputs."""

    def error(parts: Sequence[Part]) -> float:
        return judge.error(rewired(graph, {part: pairs[part] for part in parts}, by=by)[0])

    known = {part: error([part]) for part in pairs}
    chosen: list[Part] = []
    while len(chosen) < count:
        best = sorted((part for part in pairs if part not in chosen), key=known.__getitem__)
        if chosen:
            best = best[:_SHORTLIST]
            known.update({part: error([*chosen, part]) for part in best})
            best.sort(key=known.__getitem__)
        chosen.append(best[0])
    return {part: pairs[part] for part in pairs if part in chosen}
