"""EliteKV: one latent of keys and values for all heads, beside a few pairs of each that are rotated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from regauge.ir.cost import item_size
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import Amount
from regauge.passes.allocation.knapsack import BINS, Table
from regauge.passes.attention.sites import attention_sites
from regauge.passes.base import GIVE_DATA, Context, Cut
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.layer_errors import errors_of, set_matrices
from regauge.passes.calibration.layer_moments import moments_of, visit_moments
from regauge.passes.calibration.layers import matrices_of
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.calibration.sensitivity import output_metrics
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.decoding.cache_bytes import in_words
from regauge.passes.decoding.elite_pairs import best_pairs, left_out, rotation_losses, score_changes
from regauge.passes.decoding.elite_rewrite import write_elite
from regauge.passes.decoding.elite_seats import Seat, seated, seats_of
from regauge.passes.factorization.metric_svd import Factored, factored

_MOST_COUNTS = 16  # numbers of pairs that are weighed
Metrics = Mapping[str, torch.Tensor]


def elite_latents(
    original: Graph, context: Context, budget: Amount, pairs: int | None, seed: int, *, by: str
) -> Graph | None:
    """The graph with latents, or None where no attention can have one."""
    if context.data is None:
        raise PassError(f"{by}: method=elitekv needs data, to choose the pairs that are rotated: {GIVE_DATA}")
    original, changed = original.copy(), original.copy()
    seats = list(seats_of(attention_sites(original), context.left))
    if not seats:
        context.left["no attention is understood"] += not context.left
        return None
    found = list(seats_of(attention_sites(changed), Counter()))
    seated(original, seats, by=by)
    seated(changed, found, by=by)
    batches = calibration_batches(original, context)
    options = _options(original, seats, batches, pairs, seed)
    chosen = _chosen(seats, options, budget, by)
    kept = {own: option.kept for own, option in zip(found, chosen, strict=True)}
    ranks = {own: option.rank for own, option in zip(found, chosen, strict=True)}
    for seat in found:
        seat.rotate_only(changed, kept[seat], by=by)
        many = len(seat.key.pairs)
        if many:
            name = f"{seat.key.layer.weight.name}: rotated pairs of a head"
            context.cuts.append(Cut(name, many, kept[seat].shape[1]))
    metrics = _metrics(changed, found, batches, seed)
    for seat, (up, down) in _fitted(original, changed, seats, kept, ranks, batches, metrics, by).items():
        write_elite(changed, seat, kept[seat], up, down, by=by)
    remove_dead(changed)
    context.cuts += [Cut(f"{seat.name}, rank of the latent", _rows(seat, kept[seat]), ranks[seat]) for seat in found]
    context.note(f"fitted on {sum(map(examples_in, batches))} examples")
    after = sum(seat.bytes(kept[seat].shape[1], ranks[seat]) for seat in found)
    before = sum(seat.whole for seat in found)
    context.note(f"{in_words(before)} -> {in_words(after)} of keys and values for each position of a sequence")
    return changed


def _rows(seat: Seat, kept: torch.Tensor) -> int:
    """The channels of keys and values that the latent makes."""
    return len(seat.still(kept)) + seat.site.parts[2].channels.numel()


@dataclass(frozen=True)
class _Option:
    """The pairs that are ``kept`` rotated [heads, pairs], the rank of the latent, its bytes and what it loses."""

    kept: torch.Tensor
    rank: int
    bytes: float
    loss: float


def _options(
    graph: Graph, seats: Sequence[Seat], batches: Sequence[Any], pairs: int | None, seed: int
) -> list[list[_Option]]:
    """Of each seat all ranks, with each of some numbers of pairs that stay rotated."""
    rotary = [seat for seat in seats if seat.turned]
    changes = score_changes(graph, rotary, batches) if rotary else {}
    losses = rotation_losses(graph, rotary, batches, seed) if rotary else {}
    metrics = _metrics(graph, seats, batches, seed)
    inputs = {
        layer.node: errors_of(layer, [moments])[0].hessian
        for layer, moments in visit_moments(graph, [seat.key.layer for seat in seats], batches)
    }
    found = []
    for seat in seats:
        key, value = (matrices_of(part.layer)[0] for part in seat.site.parts[1:3])
        own = list[_Option]()
        for count in _counts(seat, pairs):
            kept = best_pairs(changes[seat], count) if seat.turned else torch.zeros(seat.key.count, 0).long()
            lost = left_out(losses[seat], kept) if seat in losses else 0.0
            tail = joint(seat, kept, key, value, inputs[seat.key.layer.node], metrics).tail.tolist()
            own += [_Option(kept, r, seat.bytes(count, r), lost + tail[r]) for r in range(1, len(tail))]
        found.append(own)
    return found


def _counts(seat: Seat, pairs: int | None) -> list[int]:
    """How many pairs of each head may stay rotated."""
    most = len(seat.key.pairs)
    if pairs is not None or not most:
        return [min(pairs or 0, most)]
    return sorted({round(place) for place in np.linspace(0, most, min(most, _MOST_COUNTS) + 1)})


def _chosen(seats: Sequence[Seat], options: Sequence[list[_Option]], budget: Amount, by: str) -> list[_Option]:
    """Of each seat that option with which least is lost within the budget."""
    allowed = budget.of(sum(seat.whole for seat in seats))
    unit = max(min(item_size(seat.key.layer.weight.dtype) for seat in seats), allowed / BINS)
    costs = [np.ceil(np.array([option.bytes for option in own]) / unit - 1e-9).astype(np.int64) for own in options]
    bins = int(allowed / unit + 1e-9)
    places = Table(costs, [np.array([option.loss for option in own]) for own in options], bins).solution(bins)
    if places is None:
        least = sum(min(option.bytes for option in own) for own in options)
        raise PassError(f"{by}: the budget of bytes cannot be met: rotated pairs and latents take {in_words(least)}")
    return [own[place] for own, place in zip(options, places, strict=True)]


def _metrics(graph: Graph, seats: Sequence[Seat], batches: Sequence[Any], seed: int) -> Metrics:
    names = {part.layer.weight.name for seat in seats for part in seat.site.parts[1:3]}
    return {name: own[0] for name, own in output_metrics(graph, names, batches, seed).items()}


def joint(
    seat: Seat, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: torch.Tensor, metrics: Metrics
) -> Factored:
    """J-LRD: the factors of what is not rotated of keys, and of values, one above the other."""
    rows, columns = seat.still(kept), seat.site.parts[2].channels.flatten()
    of_key, of_value = (metrics[part.layer.weight.name] for part in seat.site.parts[1:3])
    metric = torch.block_diag(of_key[rows][:, rows], of_value[columns][:, columns])  # type: ignore[no-untyped-call]
    return factored(torch.cat([key[rows], value[columns]]), inputs, metric)


def _fitted(
    original: Graph,
    changed: Graph,
    seats: Sequence[Seat],
    kept: Mapping[Seat, torch.Tensor],
    ranks: Mapping[Seat, int],
    batches: Sequence[Any],
    metrics: Metrics,
    by: str,
) -> dict[Seat, tuple[torch.Tensor, torch.Tensor]]:
    """The factors that give, of what the changed graph computes, most of what the original does; written as products.

    The layers behind attention are fitted to what they gave.
    """
    found: dict[Seat, tuple[torch.Tensor, torch.Tensor]] = {}
    first = {part.layer.node: pair for pair in zip(seats, kept, strict=True) for part in pair[1].site.parts[1:3]}
    outputs = {seat.site.parts[3].layer.node: seat for seat in kept}
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        if node in outputs:
            layer = outputs[node].site.parts[3].layer
            (error,) = errors_of(layer, moments_of(layer, run.inputs(layer), run.targets(layer, was)))
            set_matrices(changed, layer, error.optimum[None], [error], by=by)
        elif node in first and first[node][1] not in found:
            before, seat = first[node]
            errors = _errors(run, before, seat)
            key, value = (error.optimum.clone() for error in errors)
            up, down = joint(seat, kept[seat], key, value, errors[0].hessian, metrics).of_rank(ranks[seat])
            rows, columns = seat.still(kept[seat]), seat.site.parts[2].channels.flatten()
            key[rows], value[columns] = (up @ down)[: len(rows)], (up @ down)[len(rows) :]
            for part, matrix, error in zip(seat.site.parts[1:3], (key, value), errors, strict=True):
                set_matrices(changed, part.layer, matrix[None], [error], by=by)
            found[seat] = up, down
    return found


def _errors(run: SideBySide, before: Seat, seat: Seat) -> list[Quadratic]:
    """Of the layers of keys and of values, at the first of them: the other is run ahead of its turn."""
    found = []
    for was, part in zip(before.site.parts[1:3], seat.site.parts[1:3], strict=True):
        run.before.execute(was.layer.node)
        targets = list(run.before.values(was.layer.node.output))
        found += errors_of(part.layer, moments_of(part.layer, run.inputs(part.layer), targets))
    return found
