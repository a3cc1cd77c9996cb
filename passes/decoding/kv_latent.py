"""The pass that keeps keys and values in fewer numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from regauge.ir.cost import item_size
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node
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
from regauge.passes.decoding.latent_ranks import RankChoice, bytes_now, larger_than_now, rank_choices
from regauge.passes.decoding.latent_rewrite import write_latents
from regauge.passes.decoding.latent_turned import TurnedMoments, seat, turned_moments
from regauge.passes.decoding.recognised import refuse_caches
from regauge.passes.decoding.xkv import group_latents
from regauge.passes.options import option


@dataclass
class _Measured:
    """What data shows: by the names of layers the metrics of what they read, and of errors in what they give; and of
    keys behind their rotation."""

    batches: list[Any]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    turned: dict[Part, TurnedMoments] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class KvLatent(Pass):
    """Make keys and values from latents of low rank, which take less room in a cache.

    before   k, v = W_k x, W_v x;            y = W_o attention(W_q x, k, v)
    after    k, v = A_k x, A_v x (smaller);  y = (W_o B_v) attention((B_k' W_q) x, k, v)

    Palu (Chang et al. 2024) with a latent for each head, in exact metrics: of inputs their second moments, of outputs
    the gradients of the graph's outputs (without data W_o and W_q alone); ranks by the knapsack of what they lose.
    Nothing is computed anew where nothing but layout lies between layers and attention. Rotated (or normalised) keys
    have one latent for all heads, from which they are computed at every step, which costs as many multiplications for
    each past position as the heads have channels, times the rank; or, with data, a latent for each head behind the
    rotation, onto which queries are projected, too, where that loses less. Heads of one attention have one rank, or
    with ``widths=2`` two, each head that which suits it (CLOVER, Meng et al. 2024, where each has its own): heads of a
    rank are computed together, with an attention and caches of their own. Values, and keys that are not rotated, have
    either form, whichever loses less at its bytes: the knapsack weighs both (``joint`` asks for one of them;
    ``joint=false`` saves the multiplications). A layer that makes queries, keys and values is split into three before.
    With data each layer is fitted to what it gave, on what the changed layers before it give, and so is the layer
    behind attention. Deviations: no Hadamard rotation of latents, which paid off for none without outliers; a latent
    for each head or for all where Palu has one for four, since the weights of outputs would grow. ``kv-cache``
    afterwards keeps the latents.
    Exact at full rank.

    ``method=elitekv`` (Zhou et al. 2025): of rotated keys each head keeps those pairs rotated without which its scores
    would change most; all other channels of keys, and the values, come from one latent for all heads, which queries and
    the output read in place of them (J-LRD). Nothing is computed anew; a head of attention is as wide as the latent.
    How many pairs an attention rotates is weighed with the rank, where the paper has one number for all. Needs data.
    Fitted as above, and not trained on, which the paper does, and which few rotated pairs need.

    ``method=matryoshka`` (Lin et al. 2024, MatryoshkaKV): latents of each head alone, whose indices are in the order of
    what they carry, so that any first of them are a cache. With ``bytes=1.0`` all are kept: ``regauge.resize`` or
    ``elastic`` then cut one set of weights to any rank, and ``regauge.training.Supernet`` trains them to be cut, as the
    paper does. Projections need not be orthogonal here, since queries and the output take the inverse.

    ``method=xkv`` (Chang et al. 2025): the keys of ``layers`` adjacent attentions, as they are before their rotation,
    have one latent together, and so have their values. The paper decomposes the caches of such a group side by side
    once a prompt was read, into one basis of its tokens and a factor for each layer; this is its counterpart for
    weights, which are decomposed in the moments of what data gives the layers. They read different states of the
    residual stream, and none can read what a later one adds, so that the latent grows from layer to layer: c_m = A_m
    x_m, and k_m = B_m [c_1 ... c_m]. What is saved is in the cache: what earlier layers keep serves the later ones,
    too, which add only what does not follow from it, or nothing. How much each adds is found by what is lost; weights
    become no smaller for it, and keys and values are computed at every step, as from a latent of all heads. Needs data.
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
    method: Literal["palu", "elitekv", "matryoshka", "xkv"] = option(
        "palu",
        "palu: latents of keys and of values; elitekv: one of both, beside the pairs of keys that stay rotated; "
        "matryoshka: those of each head in the order of what they carry, to be cut further; "
        "xkv: one latent for the keys of adjacent layers, and one for their values",
    )
    layers: int = option(2, "of xkv: how many adjacent attentions have a latent in common", at_least=1)
    pairs: int | None = option(
        None, "of elitekv: pairs of each head that stay rotated; if not given, as many as lose least", at_least=0
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
            elite = elite_latents(original, context, budget, self.pairs, self.seed, by=self.name)
            return graph if elite is None else elite
        if self.method == "xkv":
            budget = parse_amount(self.bytes, "bytes", "bytes")
            grouped = group_latents(original, context, budget, self.layers, self.seed, by=self.name)
            return graph if grouped is None else grouped
        forms = self._forms(original, context.left, data=context.data is not None)
        if not forms:
            context.left["no attention is understood"] += not context.left
            return graph
        given = (
            None if context.data is None else self._measured(original, forms, calibration_batches(original, context))
        )
        choices = self._choices(_rank_choices(forms, given, self.widths))
        original, changed = original.copy(), original.copy()
        found = [self._forms(own, Counter(), data=given is not None) for own in (original, changed)]
        # the parts of both graphs, and what was chosen for them
        parts = [
            (was[ways.index(choice.part)], own[ways.index(choice.part)], choice)
            for was, own, ways, choice in zip(*found, forms, choices, strict=True)
        ]
        every = self.method == "matryoshka"
        larger = [] if every else larger_than_now(choices)
        picked = {
            part: choice.ranks
            for _, part, choice in parts
            if every or (choice.ranks != part.whole and not any(choice is one for one in larger))
        }
        context.left["it comes from a latent already that is no larger than what the budget leaves"] += len(larger)
        if not picked:
            context.left["keys and values fit whole"] += len(parts) - len(larger)
            return graph
        seats = dict[Part, Node]()
        if given is None:
            factors = own_factors(changed, picked, by=self.name)
        else:
            behind = [(was, own, choice.part) for was, own, choice in parts if own in picked and own.turned]
            for was, own, _ in behind:
                seat(original, was, by=self.name)
                seats[own] = seat(changed, own, by=self.name)
            turned = {seats[own]: (own, given.turned[part]) for _, own, part in behind}
            factors = fitted_factors(original, changed, picked, given.batches, given.outputs, turned, by=self.name)
            context.note(f"fitted on {sum(map(examples_in, given.batches))} examples")
        write_latents(changed, factors, seats, by=self.name)
        remove_dead(changed)
        context.cuts += [_cut(part, ranks) for part, ranks in picked.items()]
        before = bytes_now(choices)
        after = bytes_now(larger) + sum(choice.bytes for choice in choices if not any(choice is own for own in larger))
        context.note(f"{in_words(before)} -> {in_words(after)} of keys and values for each position of a sequence")
        return changed

    def _forms(self, graph: Graph, left: Counter[str], *, data: bool) -> list[list[Part]]:
        of_heads = self.method == "matryoshka"
        joint = False if of_heads else self.joint
        turned = data and (of_heads or joint is None)
        return list(forms_of(attention_sites(graph), left, joint=joint, turned=turned))

    def _measured(self, graph: Graph, forms: list[list[Part]], batches: list[Any]) -> _Measured:
        parts = [part for own in forms for part in own]
        names = {part.heads.layer.weight.name for part in parts if not part.turned}
        found = _Measured(batches)
        found.outputs = {name: own[0] for name, own in output_metrics(graph, names, batches, self.seed).items()}
        found.turned = turned_moments(graph, [part for part in parts if part.turned], batches, self.seed)
        layers = {part.heads.layer.weight.name: part.heads.layer for part in parts if not part.turned}
        for layer, moments in visit_moments(graph, layers.values(), batches):
            found.inputs[layer.weight.name] = errors_of(layer, [moments])[0].hessian
        return found

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


def _rank_choices(forms: list[list[Part]], given: _Measured | None, widths: int) -> list[list[RankChoice]]:
    """Of the forms of each what is lost at every rank; without data as shares of the part."""

    def choices(part: Part) -> list[RankChoice]:
        name, layer = part.heads.layer.weight.name, part.heads.layer
        if given is None:
            maps = part.factored(matrices_of(layer)[0], None, None)
        elif part.turned:
            maps = given.turned[part].factored()
        else:
            maps = part.factored(matrices_of(layer)[0], given.inputs[name], given.outputs.get(name))
        return rank_choices(part, [one.tail for one in maps], widths, share=given is None)

    return [[choice for part in own for choice in choices(part)] for own in forms]


def _cut(part: Part, ranks: tuple[int, ...]) -> Cut:
    """What the report says of a part: the ranks of its heads one by one where they differ."""
    rank = max(ranks)
    if min(ranks) == rank:
        return Cut(f"{part.name}, rank", part.most, rank)
    words = f"{part.name}, ranks: {part.most} -> {' '.join(map(str, ranks))}"
    return Cut(f"{part.name}, ranks", part.most, rank, words)
