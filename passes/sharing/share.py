"""``share``: repeated blocks that have weights in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch

from regauge.ir.cost import figures
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.sensitivity import layers_by_name, output_metrics
from regauge.passes.factorization.on_data import Sensitivity, problems_on_data, refitted
from regauge.passes.factorization.problems import Problem, plain_problems
from regauge.passes.name_patterns import check_patterns
from regauge.passes.options import option
from regauge.passes.sharing.alignment import aligned
from regauge.passes.sharing.central import centrals
from regauge.passes.sharing.codebook import codebooks
from regauge.passes.sharing.dictionary import dictionaries
from regauge.passes.sharing.fitting import Start
from regauge.passes.sharing.grouping import Grouping
from regauge.passes.sharing.sites import Item, Problems, Site, sites_of
from regauge.passes.sharing.structure import Repeated, repeated
from regauge.passes.sharing.tied import TieLosses
from regauge.passes.sharing.writing import tie_rest

Kind: TypeAlias = Literal["tie", "dictionary", "central", "codebook"]
Names: TypeAlias = Sequence[Sequence[str]]  # of the own weights of blocks, in corresponding order

_BY_SIZE: Mapping[str, Callable[[Sequence[Site], Problems, float], Sequence[Item]]] = {
    "central": centrals,
    "codebook": codebooks,
}


@dataclass(frozen=True, kw_only=True)
class Share(Pass):
    """Let blocks of one structure have weights in common.

    before  y0 = linear(x0, w0)    y1 = linear(x1, w1)
    tie     y0 = linear(x0, w) + linear(linear(x0, down0), up0)    y1 = linear(x1, w) + ...    w: one weight, read twice
    dictionary    y0 = linear(x0, c00 a0 + c01 a1)    y1 = linear(x1, c10 a0 + c11 a1)         a0, a1: read by all
    central       y0 = last0(c(first0(x0)))    y1 = last1(c(first1(x1)))      c: read by all, others small
    codebook      y0 = linear(x0, t[k0])    y1 = linear(x1, t[k1])    t: one table of short vectors, k: codes of bytes

    Blocks are found from the graph alone, and first brought into one basis: hidden channels and heads in one order,
    heads in one basis, which changes nothing of what they compute. Which of them share, and how large the residuals
    are, is chosen by what is lost; residuals cost multiplications. With data losses are measured by how much the
    outputs of the model move, and layers are fitted one after the other with the inputs that those before give. Norms
    and biases stay each block's own.
    """

    name: ClassVar[str] = "share"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    kind: Kind = option(
        "tie",
        "blocks in groups that share one set of weights; every layer a mixture of a few matrices (dictionary), a "
        "matrix product operator whose central tensor is common to all blocks (central), or codes for vectors of one "
        "table (codebook), which count as parameters by their bytes",
    )
    params: float | str | None = option(None, "parameters kept: a share (0.5) or a number (1.2M)")
    blocks: int | None = option(
        None, "sets of weights that are kept of blocks of one structure; of a dictionary, its matrices", at_least=1
    )
    rank: int | None = option(
        None, "rank of the residuals of tied layers; if not given 8, or as params allows", at_least=0
    )
    groups: Grouping = option("adjacent", "which blocks are tied: neighbours, every so many, or those most alike")
    init: Start = option(
        "fit", "what tied blocks share: the best fit, the mean, blocks at equal distances, or the first"
    )
    align: bool = option(True, "bring blocks into one basis first")
    whole: bool = option(False, "norms and biases are tied, too: a block is one module that is used several times")
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")
    seed: int = option(0, "seed of the directions of gradients", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.params is None and self.blocks is None:
            raise PassError("share: say how much is kept: share{blocks=2} or share{params=0.5}")
        if self.params is not None:
            parse_amount(self.params, "params")
        if self.whole and (self.kind != "tie" or self.rank != 0 or self.params or self.include or self.exclude):
            raise PassError("share: of whole blocks nothing is chosen: write share{blocks=2,rank=0,whole=true}")
        if self.kind != "tie":
            given = [name for name in ("rank", "groups", "init") if name in self.given_options()]
            if given:
                raise PassError(f"share: {given[0]} is for tied blocks: leave it out, or write kind=tie")
        if self.kind in _BY_SIZE and (self.params is None or self.blocks is not None):
            raise PassError(f"share: these are chosen by size alone: write share{{kind={self.kind},params=0.5}}")

    def call(self, graph: Graph, context: Context) -> Graph:
        found = self._found(graph, context)
        if not found:
            context.left["no blocks of one structure were found"] += not context.left
            return graph
        sites = list(found.values())
        batches = None
        if context.data is not None:
            batches = calibration_batches(graph, context)
            context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        allowed = self._allowed(graph, sites)
        names = [[[weight.name for weight in own] for own in structure.weights] for structure in found]
        start = self._aligned(graph, names)
        problems = self._problems(start, sites, batches)
        groups, items = list[Names](), list[Item]()
        every = [site for own in sites for site in own]
        if self.kind == "dictionary":
            items += dictionaries(every, problems, self.blocks, allowed)
        elif self.kind in _BY_SIZE:
            assert allowed is not None
            items += _BY_SIZE[self.kind](every, problems, allowed)
        else:
            plan = TieLosses(sites, problems).plan(self.blocks, self.rank, self.groups, allowed)
            for structure, own, chosen in zip(found, names, plan.groups, strict=True):
                shown = " ".join("+".join(structure.names[block] for block in group) for group in chosen)
                context.note(f"tied: {shown}")
                groups += [[own[block] for block in group] for group in chosen if len(group) > 1]
            if self.init in ("fit", "average") and self.align:
                start = self._aligned(start, groups)
                problems = self._problems(start, sites, batches)
            items += plan.items(sites, problems, self.init)
        rest = sum(len(s.names) for own in sites for s in own) - sum(len(i.names) for i in items)
        context.left["shared it would be no smaller, or lose more than others"] += rest
        return self._written(start, items, groups, problems, batches, context) if items else graph

    def _found(self, graph: Graph, context: Context) -> dict[Repeated, list[Site]]:
        """The layers that may be shared, of each set of blocks of one structure."""
        every = [name for parameter in graph.all_parameters() for name in parameter.names]
        check_patterns("include", self.include, every)
        check_patterns("exclude", self.exclude, every)
        found = {}
        for structure in repeated(graph):
            own = sites_of(structure, self.include, self.exclude, context.left)
            if own:
                found[structure] = own
                context.note(str(structure))
        return found

    def _allowed(self, graph: Graph, sites: Sequence[Sequence[Site]]) -> float | None:
        """The most parameters that all sites together may have."""
        if self.params is None:
            return None
        whole = figures(graph).parameters
        own = sum(len(site.names) * site.size for each in sites for site in each)
        return parse_amount(self.params, "params").of(whole) - (whole - own)

    def _aligned(self, graph: Graph, groups: Sequence[Names]) -> Graph:
        for names in groups if self.align else ():
            graph = aligned(graph, names, by=self.name)
        return graph

    def _problems(
        self, graph: Graph, sites: Sequence[Sequence[Site]], batches: Sequence[Any] | None
    ) -> dict[str, Problem]:
        names = [name for own in sites for site in own for name in site.names]
        layers = layers_by_name(graph, names)
        if batches is None:
            return {name: plain_problems(layer)[0] for name, layer in layers.items()}
        found = problems_on_data(graph, list(layers.values()), batches, self._sensitivity(graph, names, batches))
        return {problem.layer.weight.name: problem for (problem,) in found}

    def _sensitivity(self, graph: Graph, names: Sequence[str], batches: Sequence[Any]) -> Sensitivity:
        """How much the outputs of the model move with those of each layer, half of it the same in all directions.

        To first order alone errors would be pushed into directions that hardly count while they are small; what tying
        loses is not.
        """
        found = output_metrics(graph, names, batches, self.seed)
        for metric in found.values():
            diagonal = metric.diagonal(dim1=1, dim2=2)
            diagonal.add_(float(diagonal.mean()))
        return Sensitivity(found)

    def _written(
        self,
        start: Graph,
        items: Sequence[Item],
        groups: Sequence[Names],
        problems: Mapping[str, Problem],
        batches: Sequence[Any] | None,
        context: Context,
    ) -> Graph:
        result = start.copy()
        by_name = {name: item for item in items for name in item.names}
        layers = layers_by_name(result, by_name)

        def matrix(own: Sequence[Problem]) -> torch.Tensor:
            (problem,) = own  # of layers of one block
            return by_name[problem.layer.weight.name].matrix(problem)[None]

        if batches is None or self.whole:
            for name in by_name:
                matrix([problems[name]])
        else:
            metrics = {name: own[None] for name in by_name if (own := problems[name].outputs) is not None}
            given = batches, Sensitivity(metrics)
            deque(refitted(start, result, list(layers.values()), matrix, *given, by=self.name), 0)
        for item in items:
            before = sum(layers[name].weight.tensor.numel() for name in item.names)
            context.cuts.append(Cut(f"{' '.join(item.names)}: parameters", before, item.parameters))
            item.write(result, [layers[name] for name in item.names], by=self.name)
        for group in groups if self.whole else ():
            tie_rest(result, group, by=self.name)
        remove_dead(result)
        return result
