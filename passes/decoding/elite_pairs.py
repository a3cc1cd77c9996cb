"""RoPElite: which pairs of each head to rotate, so that its scores change least (Zhou et al. 2025, EliteKV).

With d_j the scores of a pair with its rotation less those without, scores change by the sum of d_j over the pairs that
are not rotated, and the square of that is a form in the products of all d_j with one another: data is read once.
Pairs are taken one by one, each time that which brings the scores nearest. Deviations: squares in place of absolute
values; heads that share keys share their pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Value
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.decoding.elite_seats import Seat

_DRAWS = 4
_SAME_LENGTH = 1e-3
_MOST_QUERIES = 64  # positions of queries of a sequence that are looked at
_MOST_SCORES = 1 << 24  # of all pairs of a head at once


def score_changes(graph: Graph, seats: Sequence[Seat], batches: Sequence[Any]) -> dict[Seat, torch.Tensor]:
    """For each seat that the graph has, [heads of keys, pairs, pairs]: products of what rotations change of scores."""
    wanted: dict[Value, list[Seat]] = {}
    for seat in seats:
        for value in (*seat.turned, *seat.plain):
            wanted.setdefault(value, []).append(seat)
    held: dict[Value, Sequence[torch.Tensor]] = {}
    found: dict[Seat, torch.Tensor] = {}
    run = Lockstep(graph, batches)
    for node in run.steps():
        run.execute(node)
        for value in node.outputs:
            if value not in wanted:
                continue
            held[value] = list(run.values(value))
            for seat in wanted[value]:
                if all(own in held for own in (*seat.turned, *seat.plain)):
                    parts = [held.pop(own) for own in (*seat.turned, *seat.plain)]
                    _check_lengths(seat, "queries", parts[0], parts[2])
                    _check_lengths(seat, "keys", parts[1], parts[3])
                    found[seat] = sum(
                        (_products(seat, *own) for own in zip(*parts, strict=True)),
                        torch.zeros((), dtype=torch.float64),
                    )
    return found


def rotation_losses(graph: Graph, seats: Sequence[Seat], batches: Sequence[Any], seed: int) -> dict[Seat, torch.Tensor]:
    """For each seat that the graph has, [heads x pairs, heads x pairs]: what outputs change by without rotations.

    A form in which of them are left out, to first order: the squared change of the graph's outputs per example.
    """
    wanted = {value: seat for seat in seats for value in (*seat.turned, *seat.plain)}
    held: dict[Value, tuple[torch.Tensor, torch.Tensor]] = {}
    found: dict[Seat, torch.Tensor] = {}

    def visit(value: Value, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        held[value], seat = (tensor, gradient), wanted[value]
        values = (*seat.turned, *seat.plain)
        if not all(own in held for own in values):
            return
        parts = [held.pop(own) for own in values]
        change = torch.zeros(())
        for (turned, slope), (plain, _) in zip(parts[:2], parts[2:], strict=True):
            own = (slope * (plain - turned)).flatten(0, -4).double().sum(-2)  # [examples, heads, size]
            change = change + own.reshape(len(own), seat.key.count, -1, own.shape[-1]).sum(2)[..., seat.key.pairs].sum(
                -1
            )
        rows = change.flatten(1)
        found[seat] = found.get(seat, torch.zeros(())) + rows.T @ rows

    visit_gradients(graph, batches, list(wanted), visit, draws=_DRAWS, seed=seed)
    examples = max(1, sum(map(examples_in, batches)))
    return {seat: total / (_DRAWS * examples) for seat, total in found.items()}


def left_out(losses: torch.Tensor, kept: torch.Tensor) -> float:
    """What it loses to rotate only the pairs ``kept`` [heads, pairs]."""
    heads = len(kept)
    out = torch.ones(heads, len(losses) // heads, dtype=torch.float64)
    out.scatter_(1, kept, 0)
    return float(out.flatten() @ losses @ out.flatten())


def _check_lengths(seat: Seat, what: str, turned: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> None:
    """Raise PassError where more is done than to rotate: without that queries and keys would have another size."""
    now, was = (sum(float(own.double().square().sum()) for own in part) for part in (turned, plain))
    if abs(now - was) > _SAME_LENGTH * was:
        raise PassError(f"{seat.site.node.label}: its {what} are scaled besides rotating them: use method=palu")


def _products(seat: Seat, *values: torch.Tensor) -> torch.Tensor:
    """Of one batch of rotated queries and keys, and of queries and keys without rotation."""
    heads, pairs = seat.key.head_of, seat.key.pairs
    places = torch.linspace(0, values[0].shape[-2] - 1, min(_MOST_QUERIES, values[0].shape[-2])).long()
    later = torch.arange(values[1].shape[-2]) <= places[:, None]  # a key of each query's past
    found = torch.zeros(seat.key.count, len(pairs), len(pairs), dtype=torch.float64)
    laid = [value.flatten(0, -4)[..., pairs].double() for value in values]  # [examples, heads, length, pairs, 2]
    some = max(1, _MOST_SCORES // max(1, len(pairs) * later.numel()))
    for head, own in enumerate(heads.tolist()):
        at = [head if part.shape[1] == len(heads) else own for part in laid]
        turned_q, turned_k, q, k = (part[:some, place] for part, place in zip(laid, at, strict=True))
        change = torch.einsum("nlpi,nspi->npls", turned_q[:, places], turned_k)
        change -= torch.einsum("nlpi,nspi->npls", q[:, places], k)
        rows = (change * later).movedim(1, 0).flatten(1)
        found[own] += rows @ rows.T
    return found


def best_pairs(products: torch.Tensor, count: int) -> torch.Tensor:
    """[heads, count]: the pairs to rotate, in order; ``products`` as :func:`score_changes` gives them."""
    return torch.tensor([_of_head(own, count) for own in products], dtype=torch.long).reshape(len(products), count)


def _of_head(products: torch.Tensor, count: int) -> list[int]:
    left, kept = list(range(len(products))), list[int]()
    for _ in range(count):
        own = products[left][:, left]
        without = own.sum() - 2 * own.sum(1) + own.diagonal()
        kept.append(left.pop(int(without.argmin())))
    return kept
