"""Latents of keys and values written into a graph: attention reads them, or what is computed of them once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from regauge.ir.bonds import keep_bond
from regauge.ir.edit import Builder, record, replace_uses, set_input
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.passes.attention.sites import Heads, Site
from regauge.passes.calibration.layers import Layer
from regauge.passes.decoding.latent_fit import Factors
from regauge.passes.decoding.latent_parts import Part
from regauge.passes.decoding.latent_turned import write_turned

Maps = Sequence[tuple[torch.Tensor, torch.Tensor]]


def write_latents(graph: Graph, factors: Factors, turned: Mapping[Part, Node], *, by: str) -> None:
    """Put them into ``graph``, in whose weights their products stand; ``turned`` keys have seats in it."""
    sites: dict[Site, dict[str, Maps]] = {}
    for part, maps in factors.items():
        if part.turned:
            write_turned(graph, turned[part], part, maps, by=by)
            continue
        if part.joint:
            _through_latent(graph, part, maps, by=by)
        else:
            sites.setdefault(part.site, {})[part.kind] = maps
        ranks = [len(down) for _, down in maps]
        record(graph, by, f"{part.name} of rank {' '.join(map(str, ranks if len(set(ranks)) > 1 else ranks[:1]))}")
    for site, own in sites.items():
        SiteRewrite(graph, site, by).run(own)


def _through_latent(graph: Graph, part: Part, maps: Maps, *, by: str) -> None:
    """y = B (A x) + b for all heads together, or for those of each group; B's rows in the order of the layer's."""
    layer, build = part.heads.layer, Builder(graph, by=by)
    down, order = torch.cat([down for _, down in maps]), torch.cat(part.maps)
    with build.at(layer.node):
        latent = build.linear(apart(part.heads.x), weight_beside(build, layer, "latent", down))
        keep_bond(latent, f"{part.name} in a cache")
        if len(maps) == 1:
            rows = maps[0][0][order.argsort()]
            whole = build.linear(latent, weight_beside(build, layer, "heads", rows), layer.bias)
        else:
            whole = _of_groups(build, layer, latent, torch.stack([up.T for up, _ in maps]))
            if not torch.equal(order, order.sort().values):
                places = build.constant(order.argsort(), "channels")
                whole = build.index_select(whole, places, dim=whole.rank - 1)
            whole = whole if layer.bias is None else build.add(whole, layer.bias)
        put(build, layer.node.output, whole)


def _of_groups(build: Builder, layer: Layer, latent: Value, up: torch.Tensor) -> Value:
    """[..., groups * channels] of latents [..., groups * rank], by ``up`` [groups, rank, channels].

    One batched product: as a matrix the maps side by side would be zeros but for a block of each group.
    """
    groups, rank, channels = up.shape
    parted = build.reshape(latent, shape=(*latent.shape[:-1], groups, rank))
    order = _swapped(latent.rank)
    made = build.matmul(build.permute(parted, dims=order), weight_beside(build, layer, "heads", up))
    found: Value = build.reshape(build.permute(made, dims=order), shape=(*latent.shape[:-1], groups * channels))
    return found


def apart(x: Value) -> Value:
    """The same rows where sequences and positions have an axis each, if a reshape made one axis of them.

    Of a latent that has them on one axis a cache could keep nothing.
    """
    while x.producer is not None and x.producer.op == "reshape":
        before = x.producer.inputs[0]
        if not isinstance(before, Value) or before.rank <= x.rank or before.shape[-1] != x.shape[-1]:
            break
        x = before
    return x


def put(build: Builder, result: Value, other: Value) -> None:
    """Let ``other``, the same rows with axes as :func:`apart` gives them, be read in place of a layer's ``result``."""
    graph = build.graph
    if other.rank != result.rank:
        for node, slot in [use for use in result.uses if use[0].op == "reshape"]:
            set_input(node, slot, other, graph)
        other = build.reshape(other, shape=result.shape)
    replace_uses(graph, result, other)


class SiteRewrite:
    """An attention whose keys or values, or both, are latents of the heads.

    Attention computes heads of one width together. Heads of other ranks are groups with an attention each, whose
    results the output's layer reads side by side: nothing is laid out with zeros, neither in caches nor in products,
    and each group is attention as any other. Padding to the largest rank in place of this would need one attention,
    but copy the whole cache at every step, or keep zeros in it.
    """

    def __init__(self, graph: Graph, site: Site, by: str) -> None:
        self.graph, self.site = graph, site
        self.build = Builder(graph, by=by)
        self.shared = bool(site.node.attributes["enable_gqa"])
        query, key = site.node.inputs[:2]
        assert isinstance(query, Value) and isinstance(key, Value)
        self._query, self._key = query, key

    def run(self, maps: Mapping[str, Maps]) -> None:
        groups = self._groups(maps)
        results = [self._attention(maps, own) for own in groups]
        if "values" in maps:
            self.output(results, maps["values"], groups)
            return
        result = results[0]
        if len(results) > 1:
            with self.build.at(self.site.node):
                apart = self.build.concat(*results, dim=result.rank - 3)
                order = torch.tensor([head for own in groups for head in self._readers(own)]).argsort()
                result = self._some(apart, order.tolist())
        replace_uses(self.graph, self.site.node.output, result)

    def _groups(self, maps: Mapping[str, Maps]) -> list[list[int]]:
        """The heads of keys and values that have the same ranks, those of each group in order."""
        ranks = [tuple(len(down) for _, down in own) for own in maps.values()]
        found: dict[tuple[int, ...], list[int]] = {}
        for head, own in enumerate(zip(*ranks, strict=False)):
            found.setdefault(own, []).append(head)
        if len(found) > 1:
            return list(found.values())
        heads = self.site.key if "keys" in maps else self.site.value
        assert heads is not None
        return [list(range(heads.count))]

    def _readers(self, group: list[int]) -> list[int]:
        """The query heads that use the heads of a group."""
        heads = self.site.key or self.site.value
        assert heads is not None
        return [place for place, own in enumerate(heads.head_of.tolist()) if own in group]

    def _attention(self, maps: Mapping[str, Maps], group: list[int]) -> Value:
        """The result of one group [..., query heads, length, size of values], which may be of all heads."""
        site, operands = self.site, list(self.site.node.inputs)
        if "keys" in maps:
            assert site.query is not None and site.key is not None
            # what biases of keys add to scores is the same for all keys, and softmax takes it away
            down = torch.stack([maps["keys"][head][1] for head in group])
            operands[1] = self.heads(site.key, down, None, "latent_keys")
            readers = self._readers(group)
            up = torch.stack([maps["keys"][head][0] for head in site.key.head_of[readers].tolist()])
            bias = None if site.query.bias is None else torch.einsum("hd,hdr->hr", site.query.bias[readers], up)
            weight = torch.einsum("hdr,hdc->hrc", up, site.query.weight[readers])
            operands[0] = self.heads(site.query, weight, bias, "latent_queries")
        if "values" in maps:
            assert site.value is not None
            down = torch.stack([maps["values"][head][1] for head in group])
            operands[2] = self.heads(site.value, down, None, "latent_values")
        for slot, heads in enumerate((site.query, site.key, site.value)):
            if operands[slot] is site.node.inputs[slot]:
                operands[slot] = self._as_it_is(operands[slot], slot, heads, maps, group)
        if len(operands) > 3:
            operands[3] = self._part(operands[3], None, group)
        with self.build.at(site.node):
            result: Value = self.build("attention", *operands, name=site.node.name, **site.node.attributes)
        assert result.producer is not None
        result.producer.metadata.update(site.node.metadata)
        return result

    def _as_it_is(
        self, operand: Operand, slot: int, heads: Heads | None, maps: Mapping[str, Maps], group: list[int]
    ) -> Operand:
        """The heads of a group of queries, keys or values that are no latents."""
        # what lies in between may not be understood: then the fused layer stays for it
        if heads is not None and self._is_fused(heads, maps) and heads.is_layout:
            own = self._readers(group) if slot == 0 else group
            bias = None if heads.bias is None else heads.bias[own]
            return self.heads(heads, heads.weight[own], bias, ("queries", "keys", "values")[slot])
        return self._part(operand, heads, group)

    def _part(self, operand: Operand, heads: Heads | None, group: list[int]) -> Operand:
        """The heads of a group out of an operand of attention, which may be a mask that is the same for some."""
        own, others = self._readers(group), self.site.key or self.site.value
        assert others is not None
        if not isinstance(operand, Value) or operand.rank < 3 or len(own) == len(others.head_of):
            return operand
        many, repeats = operand.shape[-3], 1 if heads is None else len(heads.head_of) // heads.count
        if heads is None and many == 1:
            return operand
        with self.build.at(self.site.node):
            if many != len(others.head_of):
                return self._some(operand, group)
            if repeats == 1:
                return self._some(operand, own)
            once = self._some(operand, own[::repeats])  # a cache has each head once
            return self.build.repeat_interleave(once, repeats=repeats, dim=once.rank - 3)

    def _some(self, value: Value, heads: list[int]) -> Value:
        """Some heads of a value [..., heads, length, size], in the order given."""
        axis, start = value.rank - 3, heads[0]
        if heads == list(range(start, start + len(heads))):
            if len(heads) == value.shape[axis]:
                return value
            found: Value = self.build.slice(value, dim=axis, start=start, end=start + len(heads))
        else:
            found = self.build.index_select(value, self.build.constant(torch.tensor(heads), "heads"), dim=axis)
        return found

    def _is_fused(self, heads: Heads, maps: Mapping[str, Maps]) -> bool:
        """Whether the layer makes keys or values, too, which are latents now."""
        replaced = [own for own, kind in ((self.site.key, "keys"), (self.site.value, "values")) if kind in maps]
        return any(own is not None and own.layer.node is heads.layer.node for own in replaced)

    def heads(self, heads: Heads, weight: torch.Tensor, bias: torch.Tensor | None, label: str) -> Operand:
        """[..., heads, length, size] of what the layer reads, by a weight [heads, size, inputs]."""
        count, size, _ = weight.shape
        x, layer = heads.x, heads.layer
        with self.build.at(layer.node):
            made = self.build.linear(
                x,
                weight_beside(self.build, layer, label, weight.flatten(0, 1)),
                None if bias is None else weight_beside(self.build, layer, label, bias.flatten(), "bias"),
            )
        with self.build.at(self.site.node):
            *batch, _, length, _ = self._query.shape if heads is self.site.query else self._key.shape
            parted = self.build.reshape(made, shape=(*batch, length, count, size))
            found: Value = self.build.permute(parted, dims=_swapped(parted.rank - 1))
            repeats = len(heads.head_of) // heads.count
            if repeats > 1 and not self.shared:
                found = self.build.repeat_interleave(found, repeats=repeats, dim=found.rank - 3)
        return found

    def output(self, results: Sequence[Value], maps: Maps, groups: list[list[int]]) -> None:
        """What reads attention reads latents [..., query heads, length, rank]; it takes the bias of values over."""
        site = self.site
        assert site.output is not None and site.value is not None
        layer, weight = site.output.layer, site.output.weight  # [query heads, size, outputs]
        bias = None if layer.bias is None else layer.bias.tensor.detach().double()
        if site.value.bias is not None:
            added = torch.einsum("hd,hdo->o", site.value.bias[site.value.head_of], weight)
            bias = added if bias is None else bias + added
        rows, absorbed = [], []
        for mixed, own in zip(results, groups, strict=True):
            readers = self._readers(own)
            up = torch.stack([maps[head][0] for head in site.value.head_of[readers].tolist()])
            absorbed.append(torch.einsum("hdr,hdo->hro", up, weight[readers]).flatten(0, 1))
            apart = self.build.permute(mixed, dims=_swapped(mixed.rank - 1))
            rows.append(self.build.reshape(apart, shape=(*site.output.x.shape[:-1], len(absorbed[-1]))))
        x = rows[0] if len(rows) == 1 else self.build.concat(*rows, dim=rows[0].rank - 1)
        with self.build.at(layer.node):
            result = self.build.linear(
                x,
                weight_beside(self.build, layer, "latent", torch.cat(absorbed).T),
                None if bias is None else weight_beside(self.build, layer, "latent", bias, "bias"),
            )
        replace_uses(self.graph, layer.node.output, result)


def _swapped(rank: int) -> tuple[int, ...]:
    """The order that changes places of heads and positions; ``rank`` is that of a value in front of its parting."""
    return (*range(rank - 2), rank - 1, rank - 2, rank)


def weight_beside(build: Builder, layer: Layer, label: str, data: torch.Tensor, leaf: str = "weight") -> Parameter:
    """A weight as that of the layer, beside it in the same module."""
    stem, _, _ = layer.weight.name.rpartition(".")
    data = data.to(layer.weight.tensor.dtype).contiguous()
    name = f"{stem}.{label}.{leaf}" if stem else f"{label}.{leaf}"
    return build.parameter(build.unique(name), data, layer.weight.kind, trainable=layer.weight.trainable)
