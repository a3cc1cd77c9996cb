"""Keys and values of attentions as maps of low rank: what may be made smaller, what that loses, and what it saves.

values          W_v = B A, head by head: A x is kept, and the output's weight reads it: W_o' = W_o B
keys            the same, and the queries' weight reads it: W_q' = B' W_q
rotated keys    W_k = B A for all heads together: A x is kept, B (A x) is computed and rotated at every step; or
                B A = 1 head by head behind the rotation R: A R W_k x is kept, and queries are B' R W_q x
in groups       W = B A for the heads of each group together: B (A x) is computed at every step, group by group
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from regauge.ir.cost import item_size
from regauge.ir.errors import PassError
from regauge.ir.graph import Value
from regauge.passes.attention.sites import Heads, Site
from regauge.passes.calibration.layers import layer_of
from regauge.passes.factorization.metric_svd import Factored, factored


@dataclass(frozen=True, eq=False)
class Part:
    """The keys or the values of a site: one map of low rank for each head, or a ``joint`` one for all of them.

    Where ``group`` is given a joint map is that of so many adjacent heads, which divide their number. Those of
    ``turned`` keys are behind their rotation, from keys to keys.
    """

    site: Site
    kind: str  # "keys" or "values"
    heads: Heads
    joint: bool
    turned: bool = False
    group: int | None = None

    @property
    def name(self) -> str:
        return f"{self.heads.layer.weight.name}: {self.kind}"

    @property
    def maps(self) -> list[torch.Tensor]:
        """The channels of the layer that each map makes, in the order of heads."""
        if not self.joint:
            return list(self.heads.channels)
        groups = self.heads.count // (self.group or self.heads.count)
        return list(self.heads.channels.reshape(groups, -1))

    @property
    def most(self) -> int:
        """The rank of each map from which on nothing is saved."""
        return len(self.maps[0])

    @property
    def whole(self) -> tuple[int, ...]:
        """The ranks of maps that are not made smaller."""
        return (self.most,) * len(self.maps)

    @property
    def latent(self) -> Value | None:
        """The narrower result of another layer that this one reads, a latent that a cache keeps in its place."""
        read = self.heads.layer.node.inputs[0]
        producer = read.producer if isinstance(read, Value) else None
        if not isinstance(read, Value) or producer is None or layer_of(producer) is None:
            return None
        size = read.shape[-1]
        return read if isinstance(size, int) and size < self.heads.channels.numel() else None

    @property
    def divisible(self) -> bool:
        """Whether heads can be parted into groups with an attention each: keys and values are shared alike."""
        key, value, query = self.site.key, self.site.value, self.site.query
        if self.joint or self.turned or key is None or value is None or query is None:
            return False
        return torch.equal(key.head_of, value.head_of) and torch.equal(key.head_of, key.head_of.sort().values)

    def bytes(self, ranks: Sequence[int]) -> float:
        """What a position takes in the cache."""
        return sum(ranks) * item_size(self.heads.layer.weight.dtype)

    def factored(
        self, matrix: torch.Tensor, inputs: torch.Tensor | None, outputs: torch.Tensor | None
    ) -> list[Factored]:
        """The best factors of each map of the layer's ``matrix`` [outputs, columns], in metrics of the whole layer."""
        own = self.metric() if outputs is None else outputs
        return [factored(matrix[rows], inputs, own[rows][:, rows]) for rows in self.maps]

    def metric(self) -> torch.Tensor:
        """[outputs, outputs]: what the weights that read keys or values make of an error in them, without data.

        That of values is W_o' W_o of the heads that use them; that of keys W_q W_q', over all angles by which a
        rotation may turn one against the other: there only the two entries of a pair count together, equally.
        """
        reader = self.site.output if self.kind == "values" else self.site.query
        assert reader is not None
        weights = reader.weight  # [query heads, size, others]
        found = torch.eye(self.heads.layer.outputs, dtype=torch.float64) * 1e-6
        for head, rows in enumerate(self.heads.channels):
            own = weights[self.site.group(self.heads, head)]
            gram = torch.einsum("hic,hjc->ij", own, own)
            found[rows[:, None], rows] += _over_angles(gram, self.heads.pairs) if len(self.heads.pairs) else gram
        return found


def _over_angles(gram: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The mean of R' M R over rotations R of pairs; entries in no pair are met by each other alone."""
    i, j = pairs.T
    mean = gram.clone()
    for own in (i, j):
        mean[own], mean[:, own] = 0, 0
    together = (gram[i, i] + gram[j, j]) / 2
    mean[i, i], mean[j, j] = together, together
    return mean


def forms_of(
    sites: Sequence[Site],
    left: Counter[str],
    *,
    joint: bool | None,
    turned: bool = False,
    group: int | None = None,
) -> Iterator[list[Part]]:
    """Of keys and of values that can be kept in fewer numbers the forms of their latents, that of each head first.

    One latent for all heads (``joint``) is a form wherever they have a layer of their own. Keys whose latents attention
    cannot read have a form for each head behind their rotation where ``turned`` asks for it (which needs data). Where
    both are, ``joint`` may ask for one. ``group`` has a joint latent for each so many adjacent heads. ``left`` counts
    the reasons why others cannot be kept so.

    Raises:
        PassError: heads cannot be parted into groups of ``group``.
    """
    for site in sites:
        for kind, heads in (("keys", site.key), ("values", site.value)):
            behind = turned and kind == "keys" and _is_turned(site)
            reason = None if behind else _misfit(site, kind, heads)
            if reason is not None or heads is None:
                left[f"{kind}: {reason}"] += 1
                continue
            ways = [Part(site, kind, heads, joint=False)] if is_absorbed(site, kind) else []
            if behind and not ways:
                ways.append(Part(site, kind, heads, joint=False, turned=True))
            if _misfit(site, kind, heads) is None and fills_layer(heads):
                _check_group(heads, kind, group)
                ways.append(Part(site, kind, heads, joint=True, group=group))
            asked = [way for way in ways if joint is None or way.joint == joint]
            yield asked or ways


def _check_group(heads: Heads, kind: str, group: int | None) -> None:
    if group is not None and heads.count % group:
        fit = [str(own) for own in range(1, heads.count + 1) if heads.count % own == 0]
        raise PassError(
            f"{heads.layer.weight.name} makes {kind} of {heads.count} heads, which are no groups of {group}: "
            f"give group={' or '.join(fit)}, or none for a latent of all"
        )


def _is_turned(site: Site) -> bool:
    """Whether queries and keys can be projected in front of attention: their layout there is one of heads."""
    key, query = site.key, site.node.inputs[0]
    read = site.node.inputs[1]
    if key is None or key.cached or not site.keeps_scale or not isinstance(query, Value) or not isinstance(read, Value):
        return False
    many, even = len(key.head_of), torch.equal(key.head_of, key.head_of.sort().values)
    return even and min(query.rank, read.rank) > 3 and query.shape[-3] == many and read.shape[-3] in (key.count, many)


def _misfit(site: Site, kind: str, heads: Heads | None) -> str | None:
    """Why keys or values stay as they are, or None."""
    if heads is None:
        return site.missing["key" if kind == "keys" else "value"]
    if heads.layer.node.op not in ("linear", "matmul"):
        return "a convolution makes them"
    if heads.cached or not heads.in_order or not heads.alone:
        return "something else reads them, or they are cached already"
    if is_absorbed(site, kind):
        return None
    if not fills_layer(heads):
        return "their layer makes something else, too, and what lies between them and attention is no layout"
    return None


def fills_layer(heads: Heads) -> bool:
    """Whether their layer makes nothing else."""
    return len(heads.channels.flatten()) == heads.layer.outputs


def is_absorbed(site: Site, kind: str) -> bool:
    """Whether what reads keys or values can read the latent instead: nothing but layout lies in between."""
    heads, reader = (site.key, site.query) if kind == "keys" else (site.value, site.output)
    if heads is None or reader is None or not (heads.is_layout and reader.is_layout) or reader.layer.taps != 1:
        return False
    if kind == "keys" and not (site.keeps_scale and reader.alone and reader.layer.node.op in ("linear", "matmul")):
        return False
    even = torch.arange(len(heads.head_of)) // max(1, len(heads.head_of) // heads.count)
    apart = site.node.output.rank > 2 and site.node.output.shape[-3] == len(heads.head_of)
    return apart and torch.equal(heads.head_of, even) and reader.in_order
