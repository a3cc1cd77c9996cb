"""``adapt``: small trainable parameters beside frozen weights."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from regauge.ir.edit import Builder, record, replace_uses, set_input, set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.adapters.channels import SELECTED, split_channels
from regauge.passes.adapters.directions import input_directions
from regauge.passes.adapters.folding import number_of
from regauge.passes.adapters.forms import (
    FORMS,
    LENGTH,
    Factors,
    Form,
    Tensors,
    brought_to_length,
    most_rank,
    with_directions,
)
from regauge.passes.adapters.sites import Site, sites
from regauge.passes.base import GIVE_DATA, Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Adapt(Pass):
    """Put small trainable parameters beside weights, and freeze all others; the function stays as it is.

    before  y = linear(x, w, b)
    after   y = linear(x, w, b) + linear(linear(x, down), up)      down: f32[8,96], up: f32[384,8], all else frozen

    ``regauge.passes.adapters.forms`` says what each form is and whose, ``channels`` beside it what s2ft is.
    ``merge-adapters`` puts what was trained into the weights. With ``init=eva`` (Paischer et al. 2024) ``down`` starts
    as the directions in which the inputs of a layer vary most on data, and ranks are shared out by the shares of
    variance that they explain.
    """

    name: ClassVar[str] = "adapt"
    contract: ClassVar[Contract] = "exact"
    wants_layers: ClassVar[bool] = True

    form: Literal[
        "lora", "svfit", "tensor-train", "lotr", "tucker", "kronecker", "compacter", "bone", "dora", "s2ft"
    ] = option("lora", "what is added to a weight, or s2ft: columns of it that train themselves")
    rank: int = option(
        8,
        "rank of an adapter, its number of terms, the width of its block, or channels that train (or heads of as many)",
        at_least=1,
    )
    init: Literal["auto", "zero", "principal", "eva"] = option(
        "auto",
        "start at zero, or with the part of the weight that the form holds best (PiSSA, SoKA, DoTA), which leaves the "
        "frozen weight, or along the inputs on data (lora): auto is zero where the form has that",
    )
    alpha: float | None = option(None, "what is added is times alpha / rank; if not given, as it is", above=0)
    include: tuple[str, ...] = option((), "globs on names of weights: only these, which may be of embeddings")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")
    seed: int = option(0, "seed of what starts at random", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "s2ft":
            if self.init != "auto" or self.alpha is not None:
                raise PassError("adapt: form=s2ft trains columns as they are: it has no init and no alpha")
            return
        form = FORMS[self.form]
        starts = ["auto", *(["zero"] if form.zero else []), *(["principal"] if form.principal else [])]
        starts += ["eva"] if self.form == "lora" else []
        if self.init not in starts:
            raise PassError(f"adapt: form={self.form} has no init={self.init}: it starts as {', '.join(starts)}")

    def call(self, graph: Graph, context: Context) -> Graph:
        if self.init == "eva" and context.data is None:
            raise PassError(f"adapt needs data for init=eva: {GIVE_DATA}")
        result, count = self._split(graph, context) if self.form == "s2ft" else self._adapted(graph, context)
        if not count:
            return graph
        trained = sum(math.prod(p.weight.shape) for p in result.all_parameters() if p.trainable)
        whole = sum(math.prod(p.weight.shape) for p in graph.all_parameters() if p.kind == "parameter")
        context.note(f"{count} adapters ({self.form}), {trained} parameters train beside {whole}")
        return result

    def _split(self, graph: Graph, context: Context) -> tuple[Graph, int]:
        chosen = [site for site in sites(graph, self.include, self.exclude, context.left) if site.layer is not None]
        names = [site.weight.name for site in chosen if site.blocks == 1]
        result, count = split_channels(graph, names, self.rank, self.seed, context.left, by=self.name)
        for parameter in result.all_parameters():
            parameter.trainable = f"{SELECTED}.weight" in parameter.name and parameter.name not in graph.parameters
        return result, count

    def _adapted(self, graph: Graph, context: Context) -> tuple[Graph, int]:
        form = FORMS[self.form]
        result = graph.copy()
        chosen = []
        for site in sites(result, self.include, self.exclude, context.left):
            reason = form.misfit(site)
            if reason is None:
                chosen.append(site)
            else:
                context.left[reason] += 1
        starts = self._starts(graph, result, form, chosen, context)
        for parameter in result.all_parameters():
            parameter.trainable = False
        common = dict[Hashable, Value]()
        for site in chosen:
            if site.weight.name in starts:
                self._insert(result, form, site, starts[site.weight.name], common)
        return result, len(starts)

    def _starts(
        self, graph: Graph, result: Graph, form: Form, chosen: list[Site], context: Context
    ) -> dict[str, Tensors]:
        """The first tensors of each adapter, by the name of its weight."""
        if self.init == "eva":
            batches = calibration_batches(graph, context)
            found = input_directions(result, chosen, batches, self.rank, context.left)
            return {
                site.weight.name: with_directions(site, found[site.weight]) for site in chosen if site.weight in found
            }
        generator = torch.Generator().manual_seed(self.seed)
        starts: dict[str, Tensors] = {}
        for site in chosen:
            rank = min(self.rank, most_rank(site))
            if form.zero is not None and self.init != "principal":
                starts[site.weight.name] = form.zero(site, rank, generator)
            elif form.principal is not None:
                matrices = site.matrices() / self._scale
                starts[site.weight.name] = form.principal(matrices if form.blocks else matrices[0], site, rank)
        return starts

    @property
    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def _insert(self, graph: Graph, form: Form, site: Site, start: Tensors, common: dict[Hashable, Value]) -> None:
        """Put the adapter in; what layers share is in ``common`` once the first of them has made it."""
        node, build = site.node, Builder(graph, by=self.name)
        with build.at(node):
            given = _parameters(build, form, site, start, common)
            change = form.change(build, site, given)
            scale = self._scale
            if isinstance(change, Factors) and site.has_layers:
                beside = _scaled(build, site.beside(build, change.down, change.up), scale)
                _add_beside(build, node, beside)
                matrices = _product(site, change)
            else:
                if isinstance(change, Factors):
                    change = build.matmul(change.up, change.down)
                matrices = number_of(change).reshape(site.blocks, site.outputs, site.columns)
                added = _scaled(build, site.as_stored(build, change), scale)
                weight = build.add(site.weight, added, name=f"{node.name}_weight")
                if LENGTH in given:
                    weight = brought_to_length(build, site, weight, given[LENGTH])
                set_input(node, site.slot, weight, graph)
        if bool(matrices.any()):
            whole = site.matrices()
            set_weight(graph, site.weight, site.stored(whole - scale * matrices), by=self.name)
        sizes = ", ".join(value.signature for value in given.values())
        record(graph, self.name, f"{site.weight.name}: {form.name} {sizes}")


def _parameters(
    build: Builder, form: Form, site: Site, start: Tensors, common: dict[Hashable, Value]
) -> dict[str, Value]:
    dtype, given = site.weight.dtype, dict[str, Value]()
    assert isinstance(dtype, torch.dtype)
    for name, tensor in start.items():
        key, shared = (name, tensor.shape, dtype), name in form.shared
        if shared and key in common:
            given[name] = common[key]
            continue
        stem = f"adapters.{name}_{'x'.join(map(str, tensor.shape))}" if shared else f"{site.stem}{name}"
        data = tensor.to(dtype).contiguous()
        given[name] = build.parameter(build.unique(stem), data, trainable=name not in form.frozen)
        if shared:
            common[key] = given[name]
    return given


def _scaled(build: Builder, value: Value, scale: float) -> Value:
    return value if scale == 1 else build.mul(value, scale)


def _product(site: Site, change: Factors) -> torch.Tensor:
    """``up`` times ``down``, [blocks, outputs, columns], of weights in the shapes of two layers."""
    down, up = number_of(change.down), number_of(change.up)
    down = down.t() if site.layer is None else down
    return up.reshape(site.blocks, site.outputs, -1) @ down.reshape(site.blocks, -1, site.columns)


def _add_beside(build: Builder, node: Node, beside: Value) -> None:
    """Let whatever reads the result of a node read its sum with another value, which takes its name over."""
    alone = node.output
    total = build.add(alone, beside, name=f"{node.name}_frozen")
    replace_uses(build.graph, alone, total)
    set_input(total.producer, 0, alone, build.graph)
    alone.name, total.name = total.name, alone.name
