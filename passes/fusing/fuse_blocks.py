"""``fuse-blocks``: remove a block, and fuse its weights into its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Value
from regauge.passes.base import GIVE_DATA, Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.depth.choice import Goal, iterated
from regauge.passes.depth.healing import heal
from regauge.passes.depth.parts import Order, Part
from regauge.passes.depth.removal import removable, without
from regauge.passes.depth.scores import Criterion, Judge
from regauge.passes.fusing.distilling import Distillation, Fused, Share, ending_in
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option
from regauge.passes.sharing.alignment import aligned
from regauge.passes.sharing.structure import Repeated, repeated


@dataclass(frozen=True, kw_only=True)
class FuseBlocks(Pass):
    """Remove blocks, and fuse their weights into the neighbours of the same structure (FuseGPT, Pei et al. 2024).

    before  x1 = block(x0, w0)    x2 = block(x1, w1)    x3 = block(x2, w2)
    after   x3 = block(block(x0, w0 + c0 * w1), w2 + c2 * w1)        c0, c2: low rank, elementwise

    The blocks whose removal changes the outputs least go (macro influence). The layers that are left are refitted by
    least squares, as ``depth`` does; then the coefficients are learned so that the group of blocks around each removed
    one gives what it gave, by gradients on the data, without labels. They are kept where that lessens the error on the
    last batch, which they do not learn from when there are others. Afterwards they are multiplied out: the blocks have
    the sizes that they had.

    Written from a summary of the paper and not compared with the authors' code; the default size of a group is a guess
    at theirs. Known deviations: the refit, and that all groups are trained at once, against the original. On a
    character model what is gained comes from the training: equal numbers in place of the removed weights, and blocks in
    one basis (``align``), give the same within 0.02 of perplexity, one seed each (docs/benchmarks.md).
    """

    name: ClassVar[str] = "fuse-blocks"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    blocks: int = option(1, "how many blocks are removed", at_least=1)
    group: int = option(
        7, "blocks in a row, the removed one in the middle, that are trained to stand for them", at_least=2
    )
    rank: int = option(8, "of the coefficients of each matrix", at_least=1)
    steps: int = option(100, "of gradients, a batch each; 0: only the refit", at_least=0)
    rate: float = option(0.03, "of learning, at the first step", above=0)
    compensate: bool = option(True, "refit the layers that are left by least squares first")
    align: bool = option(False, "bring blocks into one basis first")
    score: Criterion = option(
        "macro",
        "what a block is worth: 1 - cosine of the outputs with it and without (macro); squared change of the outputs "
        "(distortion); 1 - cosine of what it reads and what it gives (similarity)",
    )
    include: tuple[str, ...] = option((), "globs on names of blocks: remove no others")
    exclude: tuple[str, ...] = option((), "globs on names of blocks: these stay")
    seed: int = option(0, "of the coefficients", at_least=0)

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None:
            raise PassError(f"fuse-blocks needs data: {GIVE_DATA}")
        batches = calibration_batches(graph, context)
        structures = repeated(graph)
        if self.align:
            for structure in structures:
                names = [[weight.name for weight in own] for own in structure.weights]
                graph = aligned(graph, names, by=self.name)
            structures = repeated(graph)
        chosen = self._chosen(graph, structures, batches, context)
        result, moved = without(graph, list(chosen), by=self.name)
        for part, loss in chosen.items():
            context.cuts.append(Cut(part.name, 1, 0, f"{part.name}: removed, {_WORDS[self.score]} {loss:.3g}"))
        if self.compensate:
            count = heal(graph, result, moved, batches, by=self.name)
            context.note(f"layers refitted on {sum(map(examples_in, batches))} examples: {count}")
        self._fuse(graph, result, moved, _groups(structures, chosen, self.group), batches, context)
        return result

    def _chosen(
        self, graph: Graph, structures: Sequence[Repeated], batches: Sequence[Any], context: Context
    ) -> dict[Part, float]:
        """The blocks that go, and what each adds to the loss."""
        order = Order(graph)
        parts = [part for structure in structures for part in structure.parts]
        every = [part.name for part in parts]
        listed = f"there are {', '.join(every[:6])} ..."
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            check_patterns(name, patterns, every, what="block of a structure that repeats", otherwise=listed)
        candidates = []
        for part in parts:
            reason = removable(order, part)
            if self.include and not matches([part.name], self.include):
                reason = "not included"
            elif matches([part.name], self.exclude):
                reason = "excluded"
            if reason is None:
                candidates.append(part)
            else:
                context.left[reason] += 1
        goal = Goal(graph, self.blocks, None, str(self))
        goal.check(candidates, "block", context.left)
        judge = Judge(graph, batches, self.score, healed=False, by=self.name)
        return dict(iterated(judge, candidates, goal))

    def _fuse(
        self,
        graph: Graph,
        result: Graph,
        moved: Mapping[Value, Value],
        groups: Sequence[_Group],
        batches: Sequence[Any],
        context: Context,
    ) -> None:
        weights = self._weights(result, groups)
        if not weights or not self.steps:
            return
        ends = list(dict.fromkeys(group.end for group in groups))
        run = Distillation(ending_in(graph, ends), ending_in(result, [moved[end] for end in ends]), weights)
        seen, held = batches[:-1] or batches, batches[-1]
        with torch.no_grad():
            before = float(run.error(held))
        run.train(seen, self.steps, self.rate)
        with torch.no_grad():
            after = float(run.error(held))
        if not after < before:
            context.note(f"not fused: the error of the groups on the last batch went from {before:.3g} to {after:.3g}")
            return
        context.note(
            f"fused into {len(weights)} weights: error of the groups on the last batch {before:.3g} -> {after:.3g}"
        )
        for name, own in weights.items():
            set_weight(result, result.parameters[name], own.tensor().detach(), by=self.name)

    def _weights(self, result: Graph, groups: Sequence[_Group]) -> dict[str, Fused]:
        generator = torch.Generator().manual_seed(self.seed)
        found: dict[str, Fused] = {}
        for group in groups:
            for name, removed in group.pairs:
                weight = result.parameters[name].tensor.detach()
                own = found.setdefault(name, Fused(weight, []))
                own.shares.append(Share.none(removed, self.rank, generator))
        return found


_WORDS = {"distortion": "error", "macro": "macro influence", "similarity": "block influence"}


@dataclass(frozen=True)
class _Group:
    """Around one removed block: names of the weights that are left, each with the removed one of its role."""

    end: Value
    pairs: tuple[tuple[str, torch.Tensor], ...]


def _groups(structures: Sequence[Repeated], removed: Mapping[Part, float], size: int) -> list[_Group]:
    found = []
    for structure in structures:
        count = len(structure.parts)
        for place, part in enumerate(structure.parts):
            if part not in removed:
                continue
            first = max(0, min(place - (size - 1) // 2, count - size))
            window = range(first, min(count, first + size))
            pairs = [
                (weight.name, taken.tensor.detach())
                for block in window
                if structure.parts[block] not in removed
                for weight, taken in zip(structure.weights[block], structure.weights[place], strict=True)
                if weight.kind == "parameter" and weight.tensor.is_floating_point()
            ]
            found.append(_Group(structure.parts[window[-1]].result, tuple(pairs)))
    return found
