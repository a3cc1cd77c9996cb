"""EliteKV: one latent of keys and values for all heads, beside a few pairs of each that are rotated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
from regauge.passes.decoding.elite_pairs import best_pairs, score_changes
from regauge.passes.decoding.elite_rewrite import write_elite
from regauge.passes.decoding.elite_seats import Seat, seated, seats_of
from regauge.passes.factorization.metric_svd import Factored, factored

_ROTATED = 0.25  # of the bytes, for what is rotated: 12 of 64 pairs at a third of the bytes in the paper's example
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
        return None
    found = list(seats_of(attention_sites(changed), Counter()))
    seated(original, seats, by=by)
    seated(changed, found, by=by)
    batches = calibration_batches(original, context)
    share = budget.of(sum(seat.whole for seat in seats)) / sum(seat.whole for seat in seats)
    changes = score_changes(original, [seat for seat in seats if seat.turned], batches)
    kept: dict[Seat, torch.Tensor] = {}
    for seat, own in zip(seats, found, strict=True):
        count = _pairs(seat, share) if pairs is None else min(pairs, len(seat.key.pairs))
        kept[own] = best_pairs(changes[seat], count) if seat in changes else torch.zeros(seat.key.count, 0).long()
        own.rotate_only(changed, kept[own], by=by)
        if len(seat.key.pairs):
            context.cuts.append(
                Cut(f"{seat.key.layer.weight.name}: rotated pairs of a head", len(seat.key.pairs), count)
            )
    names = {part.layer.weight.name for seat in found for part in seat.site.parts[1:3]}
    metrics = {name: own[0] for name, own in output_metrics(changed, names, batches, seed).items()}
    ranks = _ranks(changed, kept, batches, metrics, budget, by)
    for seat, (up, down) in _fitted(original, changed, seats, kept, ranks, batches, metrics, by).items():
        write_elite(changed, seat, kept[seat], up, down, by=by)
    remove_dead(changed)
    context.cuts += [Cut(f"{seat.name}, rank of the latent", _rows(seat, kept[seat]), ranks[seat]) for seat in found]
    context.note(f"fitted on {sum(map(examples_in, batches))} examples")
    after = sum(seat.bytes(kept[seat].shape[1], ranks[seat]) for seat in found)
    before = sum(seat.whole for seat in found)
    context.note(f"{in_words(before)} -> {in_words(after)} of keys and values for each position of a sequence")
    return changed


def _pairs(seat: Seat, share: float) -> int:
    """How many pairs of each head are rotated, where nothing is asked for."""
    numbers = share * seat.whole / item_size(seat.key.layer.weight.dtype)
    return min(max(1, round(_ROTATED * numbers / (2 * seat.key.count))), len(seat.key.pairs))


def _rows(seat: Seat, kept: torch.Tensor) -> int:
    """The channels of keys and values that the latent makes."""
    return len(seat.still(kept)) + seat.site.parts[2].channels.numel()


def _ranks(
    graph: Graph, kept: Mapping[Seat, torch.Tensor], batches: Sequence[Any], metrics: Metrics, budget: Amount, by: str
) -> dict[Seat, int]:
    """The rank of each latent, so that least is lost within the budget."""
    layers = {seat.key.layer.node: seat for seat in kept}
    tails: dict[Seat, np.ndarray] = {}
    for layer, moments in visit_moments(graph, [seat.key.layer for seat in kept], batches):
        seat = layers[layer.node]
        key, value = (matrices_of(part.layer)[0] for part in seat.site.parts[1:3])
        (error,) = errors_of(layer, [moments])
        tails[seat] = joint(seat, kept[seat], key, value, error.hessian, metrics).tail[1:].numpy()
    allowed = budget.of(sum(seat.whole for seat in kept))
    left = allowed - sum(seat.bytes(own.shape[1], 0) for seat, own in kept.items())
    unit = max(min(item_size(seat.key.layer.weight.dtype) for seat in kept), left / BINS)
    costs = [np.ceil(np.arange(1, len(tails[seat]) + 1) * seat.bytes(0, 1) / unit - 1e-9).astype(int) for seat in kept]
    bins = int(left / unit + 1e-9)
    places = Table(costs, [tails[seat] for seat in kept], bins).solution(bins) if left > 0 else None
    if places is None:
        least = sum(seat.bytes(own.shape[1], 1) for seat, own in kept.items())
        raise PassError(
            f"{by}: the budget of bytes cannot be met: rotated pairs and latents of rank 1 take {in_words(least)}"
        )
    return {seat: place + 1 for seat, place in zip(kept, places, strict=True)}


def joint(
    seat: Seat, kept: torch.Tensor, key: torch.Tensor, value: torch.Tensor, inputs: torch.Tensor, metrics: Metrics
) -> Factored:
    """J-LRD: the factors of what is not rotated of keys, and of values, one above the other."""
    rows, columns = seat.still(kept), seat.site.parts[2].channels.flatten()
    of_key, of_value = (metrics[part.layer.weight.name] for part in seat.site.parts[1:3])
    metric = torch.block_diag(of_key[rows][:, rows], of_value[columns][:, columns])
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
            key[rows], value[columns] = (up @ down).split([len(rows), len(columns)])
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
