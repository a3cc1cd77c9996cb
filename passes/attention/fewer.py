"""Reduces the heads of keys and values of one site: by their mean, by the norms of keys, or aligned first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch

from regauge.passes.attention.grouping import Group, best_partition, neighbours
from regauge.passes.attention.joint import JointHeads
from regauge.passes.attention.normed import NormedHeads, gain_of
from regauge.passes.attention.sharing import NewHeads, Projection
from regauge.passes.attention.site_moments import SiteMoments, metric_of
from regauge.passes.attention.sites import Heads, Site

Method: TypeAlias = Literal["aligned", "mean", "key-driven"]


def misfit(site: Site, count: int | None, method: Method) -> str | None:
    """Why a site cannot have ``count`` heads of keys and values (None: as many as it likes); None where it can."""
    for part, reason in site.missing.items():
        return f"its {part} cannot be followed: {reason}"
    query, key, value, output = site.parts
    if key.cached or value.cached:
        return "it reads a cache"
    if query.count < len(query.head_of):
        return "its query heads are not all different"
    if key.count != value.count or not torch.equal(key.head_of, value.head_of):
        return "its keys and values are shared in different ways"
    if count is not None and key.count <= count:
        return "it has no more heads of keys and values"
    if method == "aligned":
        normed = bool(query.norms or key.norms)
        if value.norms or (normed and (count is None or gain_of(query) is None or gain_of(key) is None)):
            other = "layers share no such heads" if count is None else "only their mean can be shared (method=mean)"
            return f"its queries, keys or values are normalised: {other}"
        if not torch.equal(query.pairs, key.pairs) or len(value.pairs) or len(output.pairs):
            return "its queries and keys are rotated in different ways"
        if not (normed or (query.even and key.even)) or not (value.even and output.even) or output.norms:
            return "its entries have gains of their own"
    return None


def mean_heads(site: Site, moments: SiteMoments | None, count: int) -> NewHeads:
    """The mean of neighbouring heads (Ainslie et al. 2023, GQA, section 2.1), which all their query heads use."""
    key = site.parts[1]
    return _pooled(site, neighbours(key.count, count), key.head_of.tolist())


def key_driven_heads(site: Site, moments: SiteMoments | None, count: int) -> NewHeads:
    """The mean of neighbouring heads, used by query heads in proportion to the norms of the keys.

    Khan et al. 2024 (Beyond uniform query distribution: key-driven grouped query attention) allot query heads anew in
    each forward pass, by the norms of the pooled keys between their least and their greatest; here that is done once,
    by their mean over the data, every head of keys keeping one query head at least.
    """
    assert moments is not None
    query, key, *_ = site.parts
    groups = neighbours(key.count, count)
    keys = torch.stack([with_bias(key)[list(group)].mean(0) for group in groups])
    squares = (keys @ metric_of(moments.key, bias=key.bias is not None) @ keys.mT).diagonal(dim1=1, dim2=2)
    norms = squares.sum(1).sqrt()
    spread = norms - norms.min()
    shares = spread / spread.sum() if float(spread.sum()) > 0 else torch.full_like(norms, 1 / count)
    counts = _allotted(shares.tolist(), len(query.head_of))
    return _pooled(site, groups, [head for head, many in enumerate(counts) for _ in range(many)], pooled=True)


def aligned_heads(site: Site, moments: SiteMoments | None, count: int) -> NewHeads:
    """Joint heads (:mod:`regauge.passes.attention.joint`) of the groups that lose least; queries and output undo it."""
    assert moments is not None
    keys, values = fewer_keys(site, moments), joint_values(site, moments)
    groups = best_partition(site.parts[1].count, count, lambda group: keys.lost(group) + values.lost(group))
    return aligned(site, moments, groups, keys, values)


METHODS: dict[Method, Callable[[Site, SiteMoments | None, int], NewHeads]] = {
    "aligned": aligned_heads,
    "mean": mean_heads,
    "key-driven": key_driven_heads,
}


# -- aligned -----------------------------------------------------------------------------------------------------------


def fewer_keys(site: Site, moments: SiteMoments) -> JointHeads | NormedHeads:
    """The key heads of a site, which may be normalised, as ones that can be joined."""
    query, key, *_ = site.parts
    gains = [gain_of(part) for part in (query, key)]
    if not (query.norms or key.norms) or gains[0] is None or gains[1] is None:
        return joint_keys(site, moments)
    metric = metric_of(moments.key, bias=key.bias is not None)
    return NormedHeads(with_bias(key), torch.stack([own for own in gains if own is not None]), metric, key.pairs)


def joint_keys(site: Site, moments: SiteMoments) -> JointHeads:
    """The key heads of a site as ones that can be joined, read by the queries.

    Without rotary positions what a key has besides its input, or in the mean, adds the same to all scores of a query:
    softmax takes it away.
    """
    query, key, *_ = site.parts
    asked = with_bias(query)
    readers = asked @ metric_of(moments.query, bias=query.bias is not None) @ asked.mT
    rotary = len(key.pairs) > 0
    metric = metric_of(moments.key, bias=key.bias is not None) if rotary else metric_of(moments.key, centred=True)
    return JointHeads(with_bias(key) if rotary else key.weight, per_head(readers, key), metric, key.pairs)


def joint_values(site: Site, moments: SiteMoments) -> JointHeads:
    """The value heads of a site as ones that can be joined, read by the output's weights.

    The weights of a query sum up to one, so that a bias behind the output takes the means.
    """
    _, _, value, output = site.parts
    readers = output.weight @ output.weight.mT
    free = takes_shift(output)
    metric = metric_of(moments.value, centred=True) if free else metric_of(moments.value, bias=value.bias is not None)
    return JointHeads(value.weight if free else with_bias(value), per_head(readers, value), metric, value.pairs)


def aligned(
    site: Site, moments: SiteMoments, groups: Sequence[Group], keys: JointHeads | NormedHeads, values: JointHeads
) -> NewHeads:
    """A site with the joint heads of groups."""
    query, key, value, output = site.parts
    owner = {head: place for place, group in enumerate(groups) for head in group}
    found = [(keys.joined(group), values.joined(group)) for group in groups]
    backs = [torch.empty(key.count, part.size, part.size, dtype=torch.float64) for part in (key, value)]
    for group, joints in zip(groups, found, strict=True):
        for back, joint in zip(backs, joints, strict=True):
            back[list(group)] = joint.back
    asked = backs[0][key.head_of].mT @ with_bias(query)
    read = backs[1][value.head_of].mT @ output.weight
    made = torch.stack([joint.weight for _, joint in found])
    shift = None
    if takes_shift(output):
        mean = moments.value.means().double()
        before = value.weight @ mean + (0 if value.bias is None else value.bias)
        after = made @ mean
        head_of = torch.tensor([owner[head] for head in value.head_of.tolist()])
        shift = torch.einsum("hd,hdo->o", before[value.head_of], output.weight)
        shift -= torch.einsum("hd,hdo->o", after[head_of], read)
    return NewHeads(
        parted(asked, query),
        parted(torch.stack([joint.weight for joint, _ in found]), key),
        parted(made, value),
        read,
        tuple(owner[head] for head in key.head_of.tolist()),
        shift,
    )


def with_bias(heads: Heads) -> torch.Tensor:
    """[heads, size, columns], the bias as one more column where there is one."""
    return heads.weight if heads.bias is None else torch.cat([heads.weight, heads.bias[..., None]], -1)


def parted(weight: torch.Tensor, heads: Heads) -> Projection:
    """A weight that may have the bias as its last column."""
    columns = heads.layer.columns
    return Projection(weight[..., :columns], weight[..., columns] if weight.shape[-1] > columns else None)


def per_head(readers: torch.Tensor, heads: Heads) -> torch.Tensor:
    """[heads, size, size] of [query heads, size, size]: the sum over the query heads that use each head."""
    return readers.new_zeros(heads.count, *readers.shape[1:]).index_add(0, heads.head_of, readers)


def takes_shift(output: Heads) -> bool:
    """Whether something behind the output takes a constant: its bias."""
    return output.layer.shifted(torch.zeros(output.layer.outputs, dtype=torch.float64)) is not None


# -- means -------------------------------------------------------------------------------------------------------------


def _pooled(site: Site, groups: Sequence[Group], used: Sequence[int], *, pooled: bool = False) -> NewHeads:
    """Means of groups; ``used`` says of each query head which head it uses, of the means (``pooled``) or before."""
    query, key, value, output = site.parts
    owner = {head: place for place, group in enumerate(groups) for head in group}
    means = [torch.stack([with_bias(part)[list(group)].mean(0) for group in groups]) for part in (key, value)]
    head_of = tuple(used) if pooled else tuple(owner[head] for head in used)
    asked = Projection(query.weight, query.bias)
    return NewHeads(asked, parted(means[0], key), parted(means[1], value), output.weight, head_of)


def _allotted(shares: Sequence[float], count: int) -> list[int]:
    """``count`` in parts of these shares, one each at least, by the greatest remainders."""
    exact = [share * (count - len(shares)) for share in shares]
    found = [1 + int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda place: int(exact[place]) - exact[place])
    for place in order[: count - sum(found)]:
        found[place] += 1
    return found
