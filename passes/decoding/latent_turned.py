"""Keys projected behind their rotation, head by head: attention reads the projections of queries and keys.

    q' k = (B' q)' (A k)      B A = 1 at full rank, else the best in the metrics of keys and of what errors in them do

MatryoshkaKV (Lin et al. 2024) projects rotated keys and queries by one orthogonal matrix for each head, whose first
columns are those kept; here both sides are free, since only their product counts. A constant that is added to all keys
adds the same to all scores of a query, and softmax takes it away: only what differs from the mean is fitted.

While a graph is fitted, a product with the identity stands in front of attention (:func:`seat`), whose weight is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.edit import Builder, record, replace_uses, set_input, set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.attention.sites import Site
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.decoding.latent_parts import Part
from regauge.passes.factorization.metric_svd import Factored, factored

_RIDGE = 1e-3  # of the mean entry of a diagonal, as in metrics of outputs
_SMALL = 1e-9  # of that of moments: directions in which keys do not vary


@dataclass(frozen=True)
class TurnedMoments:
    """Of each head [heads, size, size]: ``keys``, about their mean, and ``errors``, of gradients for them."""

    keys: torch.Tensor
    errors: torch.Tensor

    def factored(self, wanted: torch.Tensor | None = None) -> list[Factored]:
        """The factors of maps from keys to keys: of the identity, or of ``wanted`` [heads, size, size]."""
        eye = torch.eye(self.keys.shape[-1], dtype=torch.float64).expand_as(self.keys)
        maps = eye if wanted is None else wanted
        return [factored(*own) for own in zip(maps, self.keys, self.errors, strict=True)]


def turned_keys(site: Site) -> Value:
    """The keys as attention reads them."""
    value = site.node.inputs[1]
    assert isinstance(value, Value)
    return value


def turned_moments(graph: Graph, parts: Iterable[Part], batches: Sequence[Any], seed: int) -> dict[Part, TurnedMoments]:
    """Of the keys of each part, in one run of the graph."""
    by_value = {turned_keys(part.site): part for part in parts}
    sums: dict[Value, list[torch.Tensor]] = {}

    def visit(value: Value, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        keys, errors = by_heads(by_value[value], tensor), _of_heads(by_value[value], gradient)
        found = [keys.mT @ keys, keys.sum(1), errors.mT @ errors, torch.tensor(float(keys.shape[1]))]
        sums[value] = [a + b for a, b in zip(sums[value], found, strict=True)] if value in sums else found

    visit_gradients(graph, batches, list(by_value), visit, seed=seed)
    examples = max(1, sum(map(examples_in, batches)))
    return {
        by_value[value]: TurnedMoments(
            _with_floor(squares - total[:, :, None] * total[:, None] / rows, _SMALL),
            _with_floor(errors / rows / examples, _RIDGE),
        )
        for value, (squares, total, errors, rows) in sums.items()
    }


def by_heads(part: Part, tensor: torch.Tensor) -> torch.Tensor:
    """[heads, rows, size]: keys [..., heads, length, size], of which some heads may be repeated."""
    laid = tensor.flatten(0, -4).double().movedim(1, 0)
    return laid[:: len(laid) // part.heads.count].flatten(1, 2)


def _of_heads(part: Part, gradient: torch.Tensor) -> torch.Tensor:
    """Of keys that are repeated the sum over their copies."""
    laid = gradient.flatten(0, -4).double().movedim(1, 0)
    return laid.reshape(part.heads.count, -1, *laid.shape[1:]).sum(1).flatten(1, 2)


def _with_floor(matrix: torch.Tensor, share: float) -> torch.Tensor:
    mean = matrix.diagonal(dim1=1, dim2=2).mean(-1)
    return matrix + (share * mean + 1e-30)[:, None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def seat(graph: Graph, part: Part, *, by: str) -> Node:
    """A product of the keys with the identity, in front of attention."""
    keys, node, build = turned_keys(part.site), part.site.node, Builder(graph, by=by)
    eye = torch.eye(part.most, dtype=torch.float64).repeat(int(keys.shape[-3]), 1, 1)
    with build.at(node):
        made: Value = build.matmul(keys, build.parameter(build.unique("projection"), eye.to(keys.dtype)))
    set_input(node, 1, made, graph)
    assert made.producer is not None
    return made.producer


def fit_seat(
    run: SideBySide, was: Node, node: Node, part: Part, moments: TurnedMoments, ranks: Sequence[int], *, by: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors of the map from keys as they are now to what they were; their product is written."""
    squares, cross = torch.zeros(()), torch.zeros(())
    total: list[torch.Tensor] = [torch.zeros(()), torch.zeros(())]
    rows = 0
    for now, before in zip(run.now.values(node.inputs[0]), run.before.values(was.output), strict=True):
        x, y = by_heads(part, now), by_heads(part, before)
        squares, cross = squares + x.mT @ x, cross + y.mT @ x
        total = [total[0] + x.sum(1), total[1] + y.sum(1)]
        rows += x.shape[1]
    keys = squares - total[0][:, :, None] * total[0][:, None] / rows
    cross = cross - total[1][:, :, None] * total[0][:, None] / rows
    floored = _with_floor(keys, _SMALL)
    wanted = torch.linalg.solve(floored, (cross + floored - keys).mT).mT
    maps = TurnedMoments(floored, moments.errors).factored(wanted)
    found = [one.of_rank(rank) for one, rank in zip(maps, ranks, strict=True)]
    weight = node.inputs[1]
    assert isinstance(weight, Parameter)
    products = torch.stack([(up @ down).T for up, down in found])
    repeats = int(weight.shape[0]) // len(products)
    set_weight(run.changed, weight, products.repeat_interleave(repeats, 0).to(weight.tensor.dtype), by=by)
    return found


def write_turned(
    graph: Graph, node: Node, part: Part, maps: Sequence[tuple[torch.Tensor, torch.Tensor]], *, by: str
) -> None:
    """Put two smaller products in place of that of the seat: one of keys, and one of queries."""
    site, build = part.site, Builder(graph, by=by)
    keys, query = node.inputs[0], site.node.inputs[0]
    assert isinstance(keys, Value) and isinstance(query, Value)
    down = torch.stack([down.T for _, down in maps])  # [heads, size, rank]
    up = torch.stack([up for up, _ in maps])[part.heads.head_of]
    with build.at(node):
        copies = int(keys.shape[-3]) // part.heads.count
        if copies > 1:  # each of them once, for a cache
            first = torch.arange(0, int(keys.shape[-3]), copies)
            keys = build.index_select(keys, build.constant(first, "heads"), dim=keys.rank - 3)
        smaller = build.matmul(keys, _weight(build, part, "turned_keys", down))
        if copies > 1:
            smaller = build.repeat_interleave(smaller, repeats=copies, dim=smaller.rank - 3)
    replace_uses(graph, node.output, smaller)
    with build.at(site.node):
        set_input(site.node, 0, build.matmul(query, _weight(build, part, "turned_queries", up)), graph)
    record(graph, by, f"{part.name} of rank {len(maps[0][1])}")


def _weight(build: Builder, part: Part, label: str, data: torch.Tensor) -> Parameter:
    stem, _, _ = part.heads.layer.weight.name.rpartition(".")
    name = f"{stem}.{label}.weight" if stem else f"{label}.weight"
    return build.parameter(build.unique(name), data.to(part.heads.layer.weight.tensor.dtype).contiguous())
