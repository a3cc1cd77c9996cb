"""The pass that keeps keys and values in fewer numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from regauge.ir.cost import item_size
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.allocation.knapsack import BINS, Table
from regauge.passes.attention.assembled import assembled
from regauge.passes.attention.sites import attention_sites
from regauge.passes.base import Context, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.layer_errors import errors_of
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import matrices_of
from regauge.passes.calibration.sensitivity import output_metrics
from regauge.passes.decoding.cache_bytes import in_words
from regauge.passes.decoding.elitekv import elite_latents
from regauge.passes.decoding.latent_fit import fitted_factors, own_factors
from regauge.passes.decoding.latent_layers import split_layers
from regauge.passes.decoding.latent_parts import Part, forms_of
from regauge.passes.decoding.latent_ranks import RankChoice, rank_choices
from regauge.passes.decoding.latent_rewrite import write_latents
from regauge.passes.decoding.recognised import refuse_caches
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class KvLatent(Pass):
    """Make keys and values from latents of low rank, which take less room in a cache.

    before   k, v = W_k x, W_v x;            y = W_o attention(W_q x, k, v)
    after    k, v = A_k x, A_v x (smaller);  y = (W_o B_v) attention((B_k' W_q) x, k, v)

    Palu (Chang et al. 2024) with a latent for each head, in exact metrics: of inputs their second moments, of outputs
    the gradients of the graph's outputs (without data W_o and W_q alone); ranks by the knapsack of what they lose.
    Nothing is computed anew where nothing but layout lies between layers and attention. Rotated (or normalised) keys
    have one latent for all heads, from which they are computed at every step; that costs as many multiplications for
    each past position as the heads have channels, times the rank. Heads of one attention have one rank, or with
    ``widths=2`` two, each head that which suits it (CLOVER, Meng et al. 2024, where each has its own): heads of a rank
    are computed together, with an attention and caches of their own. Values, and keys that are not rotated, have either
    form, whichever loses less at its bytes: the knapsack weighs both (``joint`` asks for one of them; ``joint=false``
    saves the multiplications). A layer that makes queries, keys and values is split into three before. With data each
    layer is fitted to what it gave, on what the changed layers before it give, and so is the layer behind attention.
    Deviations: no Hadamard rotation of latents, which paid off for none without outliers; a latent for each head or for
    all where Palu has one for four, since the weights of outputs would grow. ``kv-cache`` afterwards keeps the latents.
    Exact at full rank.

    ``method=elitekv`` (Zhou et al. 2025): of rotated keys each head keeps those pairs rotated without which its scores
    would change most; all other channels of keys, and the values, come from one latent for all heads, which queries and
    the output read in place of them (J-LRD). Nothing is computed anew; a head of attention is as wide as the latent.
    Needs data. Fitted as above, not trained on, which the paper does.
    """

    name = "kv-latent"
    solves = True

    bytes: float | int | str = option(0.5, "bytes per position: share of those of all keys and values, or 512, 2kB")
    joint: bool | None = option(
        None, "values, and keys that are not rotated, from one latent of all heads; if not given, where that loses less"
    )
    widths: int = option(
        1, "how many different ranks the heads of an attention may have; heads of each are computed apart", at_least=1
    )
    method: Literal["palu", "elitekv"] = option(
        "palu", "palu: latents of keys and of values; elitekv: one of both, beside the pairs of keys that stay rotated"
    )
    pairs: int | None = option(
        None, "of elitekv: pairs of each head that stay rotated; if not given, a quarter of the bytes", at_least=0
    )
    seed: int = option(0, "seed of the directions of gradients", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_amount(self.bytes, "bytes", "bytes")

    def call(self, graph: Graph, context: Context) -> Graph:
        refuse_caches(graph, self.name)
        original = split_layers(assembled(graph))
        if self.method == "elitekv":
            budget = parse_amount(self.bytes, "bytes", "bytes")
            found = elite_latents(original, context, budget, self.pairs, self.seed, by=self.name)
            return graph if found is None else found
        forms = list(forms_of(attention_sites(original), context.left, joint=self.joint))
        if not forms:
            context.left["no attention is understood"] += not context.left
            return graph
        batches, metrics = None, dict[str, torch.Tensor]()
        if context.data is not None:
            batches = calibration_batches(original, context)
            names = {own[0].heads.layer.weight.name for own in forms}
            found_metrics = output_metrics(original, names, batches, self.seed)
            metrics = {name: own[0] for name, own in found_metrics.items()}
        choices = self._choices(_rank_choices(original, forms, batches, metrics, self.widths))
        changed = original.copy()
        found = forms_of(attention_sites(changed), Counter(), joint=self.joint)
        parts = [
            (own[ways.index(choice.part)], choice) for own, ways, choice in zip(found, forms, choices, strict=True)
        ]
        picked = {part: choice.ranks for part, choice in parts if choice.ranks != part.whole}
        if not picked:
            context.left["keys and values fit whole"] += len(parts)
            return graph
        if batches is None:
            factors = own_factors(changed, picked, by=self.name)
        else:
            factors = fitted_factors(original, changed, picked, batches, metrics, by=self.name)
            context.note(f"fitted on {sum(map(examples_in, batches))} examples")
        write_latents(changed, factors, by=self.name)
        remove_dead(changed)
        context.cuts += [_cut(part, ranks) for part, ranks in picked.items()]
        before, after = sum(part.bytes(part.whole) for part, _ in parts), sum(choice.bytes for choice in choices)
        context.note(f"{in_words(before)} -> {in_words(after)} of keys and values for each position of a sequence")
        return changed

    def _choices(self, ways: list[list[RankChoice]]) -> list[RankChoice]:
        """Of each the form and the ranks, so that least is lost within the budget."""
        whole = sum(own[0].part.bytes(own[0].part.whole) for own in ways)
        allowed = parse_amount(self.bytes, "bytes", "bytes").of(whole)
        # in numbers of the smallest kind where there are bins for them, so that the last of the budget can be used
        smallest = min(item_size(own[0].part.heads.layer.weight.dtype) for own in ways)
        unit = max(smallest, allowed / BINS)
        bins = int(allowed / unit + 1e-9)
        costs = [np.ceil(np.array([choice.bytes for choice in own]) / unit - 1e-9).astype(np.int64) for own in ways]
        found = Table(costs, [np.array([choice.loss for choice in own]) for own in ways], bins).solution(bins)
        if found is None:
            least = sum(min(choice.bytes for choice in own) for own in ways)
            raise PassError(f"kv-latent: bytes={self.bytes} cannot be met: the smallest latents take {in_words(least)}")
        return [own[place] for own, place in zip(ways, found, strict=True)]


def _rank_choices(
    graph: Graph, forms: list[list[Part]], batches: list[Any] | None, metrics: Mapping[str, torch.Tensor], widths: int
) -> list[list[RankChoice]]:
    """Of the forms of each what is lost at every rank; without data as shares of the part."""
    layers = {own[0].heads.layer.weight.name: own[0].heads.layer for own in forms}
    inputs = dict[str, torch.Tensor]()
    if batches is not None:
        for layer, moments in visit_moments(graph, layers.values(), batches):
            inputs[layer.weight.name] = errors_of(layer, [moments])[0].hessian

    def choices(part: Part) -> list[RankChoice]:
        name, layer = part.heads.layer.weight.name, part.heads.layer
        maps = part.factored(matrices_of(layer)[0], inputs.get(name), metrics.get(name))
        return rank_choices(part, [one.tail for one in maps], widths, share=batches is None)

    return [[choice for part in own for choice in choices(part)] for own in forms]


def _cut(part: Part, ranks: tuple[int, ...]) -> Cut:
    """What the report says of a part: the ranks of its heads one by one where they differ."""
    rank = max(ranks)
    if min(ranks) == rank:
        return Cut(f"{part.name}, rank", part.most, rank)
    words = f"{part.name}, ranks: {part.most} -> {' '.join(map(str, ranks))}"
    return Cut(f"{part.name}, ranks", part.most, rank, words)
