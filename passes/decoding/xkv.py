"""xKV (Chang et al. 2025): keys, and values, of adjacent layers from one latent of the group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import Amount
from regauge.passes.attention.sites import attention_sites
from regauge.passes.base import GIVE_DATA, Context, Cut
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.layer_errors import errors_of, fit_through, set_matrices
from regauge.passes.calibration.layer_moments import moments_of, visit_moments
from regauge.passes.calibration.moments import factor_of
from regauge.passes.calibration.sensitivity import output_metrics
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.decoding.cache_bytes import in_words
from regauge.passes.decoding.group_chains import Chain, ChainProblem, chains_within
from regauge.passes.decoding.group_seats import Group, groups_of, seated, write_group


def group_latents(
    original: Graph, context: Context, budget: Amount, layers: int, seed: int, *, by: str
) -> Graph | None:
    """The graph with latents of groups of so many ``layers``, or None where nothing is changed."""
    if context.data is None:
        raise PassError(f"{by}: method=xkv needs data, to see what the inputs of layers have in common: {GIVE_DATA}")
    original, changed = original.copy(), original.copy()
    groups = groups_of(attention_sites(original), context.left, layers)
    if not groups:
        context.left["no attention is understood"] += not context.left
        return None
    found = groups_of(attention_sites(changed), Counter(), layers)
    seated(original, groups, by=by)
    seated(changed, found, by=by)
    batches = calibration_batches(original, context)
    problems = _problems(original, groups, batches, seed)
    before = sum(group.whole * group.entry for group in groups)
    chosen = chains_within(problems, budget.of(before), by)
    picked = {own: chain for own, chain in zip(found, chosen, strict=True) if sum(chain.ranks) < own.whole}
    if not picked:
        context.left["keys and values fit whole"] += len(groups)
        return None
    ups = _fitted(original, changed, picked, batches, by)
    for group, chain in picked.items():
        write_group(changed, group, chain.downs, ups[group], by=by)
        ranks = " ".join(map(str, chain.ranks))
        words = f"{group.name}, ranks: {group.whole} -> {ranks}"
        context.cuts.append(Cut(f"{group.name}, ranks", group.whole, sum(chain.ranks), words))
    remove_dead(changed)
    context.note(f"fitted on {sum(map(examples_in, batches))} examples")
    after = sum(problem.bytes(chain) for problem, chain in zip(problems, chosen, strict=True))
    context.note(f"{in_words(before)} -> {in_words(after)} of keys and values for each position of a sequence")
    return changed


def _problems(graph: Graph, groups: Sequence[Group], batches: Sequence[Any], seed: int) -> list[ChainProblem]:
    """What the layers of each group are on data: moments of all inputs, and weights in the metrics of their outputs."""
    layers = [layer for group in groups for layer in group.layers]
    metrics = output_metrics(graph, {layer.weight.name for layer in layers}, batches, seed)
    last = {group.layers[-1].node.inputs[0]: group.layers[-1] for group in groups}  # keys and values read the same
    grams = {
        layer.node.inputs[0]: (moments.gram[:-1, :-1], moments.centred().double())
        for layer, moments in visit_moments(graph, last.values(), batches)
    }
    found = []
    for group in groups:
        maps = []
        for part, layer in zip(group.parts, group.layers, strict=True):
            own = layer.matrix(layer.weight.tensor.detach()).double()[:, -part.heads.layer.columns :]
            maps.append(factor_of(metrics[layer.weight.name][0], 0.0).T @ own)
        free = all(layer.bias is not None for layer in group.layers)
        found.append(ChainProblem(grams[group.layers[-1].node.inputs[0]][free], maps, group.entry))
    return found


def _fitted(
    original: Graph, changed: Graph, picked: Mapping[Group, Chain], batches: Sequence[Any], by: str
) -> dict[Group, list[torch.Tensor]]:
    """Of each layer the weight by which it reads the latents so far, which gives most of what it gave; the products
    are written, and the layers behind attention fitted to what they gave."""
    ups: dict[Group, list[torch.Tensor]] = {group: [] for group in picked}
    owner = {layer.node: (group, place) for group in picked for place, layer in enumerate(group.layers)}
    sites = [part.site for group in picked for part in group.parts]
    outputs = {site.output.layer.node: site.output.layer for site in sites if site.output is not None}
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        if node in outputs:
            layer = outputs[node]
            (error,) = errors_of(layer, moments_of(layer, run.inputs(layer), run.targets(layer, was)))
            set_matrices(changed, layer, error.optimum[None], [error], by=by)
        elif node in owner:
            group, place = owner[node]
            layer = group.layers[place]
            rows = torch.block_diag(*picked[group].downs[: place + 1])  # type: ignore[no-untyped-call]
            (moments,) = moments_of(layer, run.inputs(layer), run.targets(layer, was))
            up, error = fit_through(layer, moments, rows)
            set_matrices(changed, layer, (up @ rows)[None], [error], by=by)
            ups[group].append(up)
    return ups
