"""The two bonds of a site of attention: values with outputs, and queries with keys, in each head that is shared or not.

    y = sum of  W_o,h p_h W_v,g x        per key-value head g, with the output projections of its query heads h stacked
    s = (W_q,h x)' (W_k,g x')            per key head g, with its query heads stacked

Where positions are rotated, indices that a rotation mixes take a complex number for each pair instead,

    z = q_i + i q_j      z -> z / conj(c) for queries, z -> c z for keys

since the rotations of pairs differ: c makes both sides equally large, and turns the direction in which both vary most
onto the first index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.attention.sites import Heads, Site
from regauge.passes.factorization.balance import balancing


def misfit(site: Site, name: str) -> str | None:
    """Why the ``value`` or ``key`` bond of a site cannot be changed; None where it can."""
    first, second = (site.value, site.output) if name == "value" else (site.key, site.query)
    if first is None or second is None:
        return "; ".join(dict.fromkeys(site.missing.values()))
    parts = (first, second)
    if any(part.norms for part in parts):
        return "a norm between a projection and attention fixes the basis"
    if any(part.cached for part in parts):
        return "what lies in a cache is in its basis"
    if not all(part.alone for part in parts):
        return "something else reads heads of attention too"
    if not all(part.even for part in parts):
        return "a table multiplies the indices of heads"
    if not torch.equal(first.pairs, second.pairs) or second.head_of.tolist() != list(range(second.count)):
        return "heads do not correspond"
    return None


def moments_of_heads(graph: Graph, sites: Sequence[Site], batches: Sequence[Any]) -> dict[Heads, torch.Tensor]:
    """Second moments on all batches."""
    parts = [part for site in sites for part in (site.query, site.key, site.output) if part is not None]
    reading: dict[Any, list[Heads]] = {}
    for part in parts:
        reading.setdefault(part.layer.node, []).append(part)
    run, found = Lockstep(graph, batches), dict[Heads, torch.Tensor]()
    for node in run.steps():
        if node not in reading:
            continue
        run.execute(node)
        for part in reading[node]:
            found[part] = sum((_moments(part, run, place) for place in range(len(run))), torch.zeros(()))
    return found


def _moments(part: Heads, run: Lockstep, place: int) -> torch.Tensor:
    layer = part.layer
    if part.is_output:
        rows = layer.rows_of_input(run.values(layer.node.inputs[0])[place])
    else:
        rows = layer.rows_of_output(run.values(layer.node.output)[place])
    heads = rows.double()[:, part.channels]  # [rows, heads, size]
    return torch.einsum("nhi,nhj->hij", heads, heads)


def balance_heads(graph: Graph, site: Site, name: str, moments: Mapping[Heads, torch.Tensor], *, by: str) -> None:
    """Bring the ``value`` or ``key`` bond of a site into singular form in the graph, which may be a copy of the site's.

    ``moments`` [heads, size, size] are those of what the output projection reads, and of queries and keys, on data.
    """
    first, second = (site.value, site.output) if name == "value" else (site.key, site.query)
    assert first is not None and second is not None
    groups = torch.zeros(first.count, second.count, dtype=torch.float64)
    groups[first.head_of, torch.arange(second.count)] = 1
    if name == "value":  # what the output reads takes the map of the values; only its weight takes the other
        writers = _grouped(groups, moments[second]) if second in moments else _gram(first)
        readers = _grouped(groups, _gram(second))
    else:
        writers = moments.get(first, _gram(first))
        readers = _grouped(groups, moments.get(second, _gram(second)))
    maps = torch.eye(first.size, dtype=torch.float64).repeat(first.count, 1, 1)
    i, j = first.pairs.T
    plain = torch.tensor([at for at in range(first.size) if at not in first.pairs.flatten().tolist()], dtype=torch.long)
    if len(plain):
        maps[:, plain[:, None], plain] = balancing(*(side[:, plain[:, None], plain] for side in (writers, readers)))
    if len(i):
        number = _turning(*(_of_pairs(side, first.pairs) for side in (writers, readers)))
        maps[:, i, i] = maps[:, j, j] = number.real
        maps[:, j, i], maps[:, i, j] = number.imag, -number.imag
    write_map(graph, first, maps, by=by)
    write_map(graph, second, torch.linalg.inv(maps).mT[first.head_of], by=by)


def write_map(graph: Graph, part: Heads, maps: torch.Tensor, *, by: str) -> None:
    """Multiply what each head gives, or what the output projection reads of it, by a matrix [heads, size, size]."""
    weight = graph.parameters[part.layer.weight.name]
    set_weight(graph, weight, part.put(weight.tensor.detach(), maps @ part.weight), by=by)
    if part.bias is not None and part.layer.bias is not None:
        bias = graph.parameters[part.layer.bias.name]
        held = bias.tensor.detach().clone()
        held[part.channels] = (maps @ part.bias[..., None])[..., 0].to(held)
        set_weight(graph, bias, held, by=by)


def _gram(part: Heads) -> torch.Tensor:
    weight = part.weight if part.bias is None else torch.cat([part.weight, part.bias[..., None]], -1)
    return weight @ weight.mT


def _grouped(groups: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    return torch.einsum("gh,hij->gij", groups, moments)


def _of_pairs(moments: torch.Tensor, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each pair as a complex number z, [heads, pairs]: the sums of |z|^2 and of z^2."""
    i, j = pairs.T
    ii, jj, ij = moments[:, i, i], moments[:, j, j], moments[:, i, j]
    return ii + jj, torch.complex(ii - jj, 2 * ij)


def _turning(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The complex number c, [heads, pairs], that each pair of the first side is multiplied by."""
    (size, squares), (other_size, other_squares) = first, second
    usable = (size > 0) & (other_size > 0)
    ratio = torch.where(usable, (other_size / size.clamp(min=1e-300)) ** 0.25, 1)
    together = squares * ratio**2 + other_squares / ratio**2
    return torch.polar(ratio, -together.angle() / 2)
