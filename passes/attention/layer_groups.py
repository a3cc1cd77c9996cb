"""Attention layers that share keys and values: who reads whose, and the weights with which all of them come closest.

    k_f ~ P x_l     the keys of a later layer as far as the inputs of the first one tell, by least squares

Then the heads of the later layers are heads on the first one's inputs, and one joint head of each serves all layers
(:mod:`regauge.passes.attention.joint`). Which head of one layer goes with which of another is an assignment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from regauge.ir.graph import Value
from regauge.passes.attention.fewer import parted, per_head, takes_shift, with_bias
from regauge.passes.attention.joint import JointHeads
from regauge.passes.attention.sharing import Projection
from regauge.passes.attention.site_moments import RIDGE, ridge
from regauge.passes.attention.sites import Heads, Site
from regauge.passes.calibration.moments import Moments, least_squares

Kind: TypeAlias = Literal["joint", "first", "mean"]

Rows = dict[Value, torch.Tensor]
"""Of what each projection reads the same positions, [rows, columns]."""


@dataclass(frozen=True)
class Follower:
    """What a layer becomes that reads the keys and values of another: its queries, output, and the output's shift."""

    query: Projection
    output: torch.Tensor
    shift: torch.Tensor | None = None


@dataclass(frozen=True)
class Fitted:
    """Keys and values that a group of layers has in common, and what each layer becomes."""

    key: Projection
    value: Projection
    layers: list[Follower]


class LayerGroup:
    """Layers of which the first gives keys and values to all; ``ordered`` says whether heads may change places."""

    def __init__(self, sites: Sequence[Site], rows: Rows, *, ordered: bool) -> None:
        self.sites, self.ordered = sites, ordered
        self.count = sites[0].parts[1].count
        self.shifts = all(takes_shift(site.parts[3]) for site in sites)
        rotary = len(sites[0].parts[1].pairs) > 0
        self.keys = self._joint(1, rows, constant=rotary, readers=lambda site: _asked(site, rows))
        self.values = self._joint(2, rows, constant=not self.shifts, readers=_read)
        self.rows = rows

    def _joint(self, part: int, rows: Rows, *, constant: bool, readers: Callable[[Site], torch.Tensor]) -> JointHeads:
        """The heads of all layers, one layer after the other, on the inputs of the first; layers weigh the same."""
        first = self.sites[0].parts[part]
        x = rows[first.x].double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if constant else x - x.mean(0)
        metric = x.T @ x / len(x)
        ridge(metric)
        weights, read = [], []
        for site in self.sites:
            heads = site.parts[part]
            own = _on_first(heads, first, rows, constant=constant)
            reader = per_head(readers(site), heads)
            energy = torch.einsum("hij,hjc,cd,hid->", reader, own, metric, own)
            weights.append(own)
            read.append(reader / energy.clamp_min(1e-30))
        return JointHeads(torch.cat(weights), torch.cat(read), metric, first.pairs)

    def matched(self) -> list[list[int]]:
        """For each layer which of its heads takes the place of each head of the first one."""
        from scipy.optimize import linear_sum_assignment

        found = [list(range(self.count))]
        for layer in range(1, len(self.sites)):
            loss = torch.zeros(self.count, self.count)
            for a in range(self.count):
                for b in range(self.count):
                    pair = (a, layer * self.count + b)
                    loss[a, b] = self.keys.lost(pair) + self.values.lost(pair)
            found.append(linear_sum_assignment(loss.numpy())[1].tolist() if self.ordered else found[0])
        return found

    def fitted(self, kind: Kind) -> Fitted:
        """Keys and values that all have in common; queries and outputs by least squares."""
        order = [list(range(self.count))] * len(self.sites) if kind == "mean" else self.matched()
        slots = [[layer * self.count + own[slot] for layer, own in enumerate(order)] for slot in range(self.count)]
        keys, values = self._shared(1, self.keys, slots, kind), self._shared(2, self.values, slots, kind)
        key, value = self.sites[0].parts[1:3]
        stays = value.bias if kind == "first" and self.shifts else None
        layers = [self._layer(layer, order[layer], keys, values, stays) for layer in range(len(self.sites))]
        return Fitted(parted(keys, key), parted(values, value), layers)

    def _shared(self, part: int, heads: JointHeads, slots: Sequence[Sequence[int]], kind: Kind) -> torch.Tensor:
        """[heads, size, columns]"""
        if kind == "joint":
            return torch.stack([heads.joined(slot).weight for slot in slots])
        if kind == "first":
            return heads.weights[: self.count]
        constant = heads.weights.shape[-1] > self.sites[0].parts[part].layer.columns
        return torch.stack([_own(site.parts[part], constant) for site in self.sites]).mean(0)

    def _layer(
        self,
        layer: int,
        order: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        stays: torch.Tensor | None,
    ) -> Follower:
        """A layer with its heads in this order; ``stays`` is a bias of the values that ``values`` do not have."""
        query, _, value, output = self.sites[layer].parts
        head_of = value.head_of.tolist()
        places = [head for own in order for head, used in enumerate(head_of) if used == own]
        slot = [order.index(head_of[head]) for head in places]  # of each query head in its new place
        backs = []
        for heads, shared in ((self.keys, keys), (self.values, values)):
            maps = [heads.read_off(layer * self.count + order[at], shared[at]) for at in range(self.count)]
            backs.append(torch.stack(maps)[slot])
        read = backs[1].mT @ output.weight[places]
        shift = None
        if self.shifts:
            mean, given = (self.rows[site.parts[2].x].double().mean(0) for site in (self.sites[layer], self.sites[0]))
            before = value.weight @ mean + (0 if value.bias is None else value.bias)
            shift = torch.einsum("hd,hdo->o", before[value.head_of], output.weight)
            after = values @ given + (0 if stays is None else stays)
            shift -= torch.einsum("hd,hdo->o", after[slot], read)
        return Follower(parted(backs[0].mT @ with_bias(query)[places], query), read, shift)


def unfitted(site: Site) -> Follower:
    """A layer whose queries and output stay as they are."""
    query, *_, output = site.parts
    return Follower(Projection(query.weight, query.bias), output.weight)


def means(sites: Sequence[Site], part: int) -> Projection:
    """The mean of the keys (1) or values (2) of several layers."""
    weights = torch.stack([with_bias(site.parts[part]) for site in sites]).mean(0)
    return parted(weights, sites[0].parts[part])


def distance(one: Site, other: Site, rows: Rows) -> float:
    """Between the keys and values of two layers, before positions are put in, averaged and flattened (KVSharer).

    The paper averages over texts alone, here positions are averaged as well.
    """
    found = 0.0
    for part in (1, 2):
        given = []
        for site in (one, other):
            heads = site.parts[part]
            x = rows[heads.x].double().mean(0)
            given.append(heads.weight @ x + (0 if heads.bias is None else heads.bias))
        found += float((given[0] - given[1]).square().sum())
    return math.sqrt(found)


def _on_first(heads: Heads, first: Heads, rows: Rows, *, constant: bool) -> torch.Tensor:
    """[heads, size, columns of the first layer's inputs]: a layer's heads as far as those inputs tell."""
    if heads is first:
        return _own(heads, constant)
    weight = with_bias(heads).flatten(0, 1)
    x = rows[heads.x].double()
    wanted = x @ weight[:, : x.shape[1]].T + (weight[:, -1] if heads.bias is not None else 0)
    given = rows[first.x].double()
    moments = Moments(given.shape[1], wanted.shape[1])
    moments.add(given, wanted)
    start = torch.zeros(wanted.shape[1], given.shape[1] + 1, dtype=torch.float64)
    found = least_squares(moments, start, RIDGE, bias=True).double()
    return (found if constant else found[:, :-1]).reshape(heads.count, heads.size, -1)


def _own(heads: Heads, constant: bool) -> torch.Tensor:
    """The weight of heads, with the bias as one more column where there is a ``constant``."""
    if not constant or heads.bias is not None:
        return with_bias(heads) if constant else heads.weight
    return torch.cat([heads.weight, torch.zeros_like(heads.weight[..., :1])], -1)


def _asked(site: Site, rows: Rows) -> torch.Tensor:
    """Second moments of the queries, [query heads, size, size]."""
    query = site.parts[0]
    x = rows[query.x].double()
    asked = torch.einsum("hdc,nc->hdn", query.weight, x) + (0 if query.bias is None else query.bias[..., None])
    return asked @ asked.mT / len(x)


def _read(site: Site) -> torch.Tensor:
    """Squares of the output's weights, [query heads, size, size]."""
    output = site.parts[3]
    return output.weight @ output.weight.mT
