"""Latents of keys and values written into a graph: attention reads them, or what is computed of them once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from regauge.ir.edit import Builder, record, replace_uses
from regauge.ir.graph import Graph, Operand, Parameter, Value
from regauge.passes.attention.sites import Heads, Site
from regauge.passes.calibration.layers import Layer
from regauge.passes.decoding.latent_fit import Factors
from regauge.passes.decoding.latent_parts import Part

Maps = Sequence[tuple[torch.Tensor, torch.Tensor]]


def write_latents(graph: Graph, factors: Factors, *, by: str) -> None:
    """Put them into ``graph``, in whose weights their products stand."""
    sites: dict[Site, dict[str, Maps]] = {}
    for part, maps in factors.items():
        if part.joint:
            _through_latent(graph, part, *maps[0], by=by)
        else:
            sites.setdefault(part.site, {})[part.kind] = maps
        record(graph, by, f"{part.name} of rank {len(maps[0][1])}")
    for site, own in sites.items():
        _SiteRewrite(graph, site, by).run(own)


def _through_latent(graph: Graph, part: Part, up: torch.Tensor, down: torch.Tensor, *, by: str) -> None:
    """y = B (A x) + b for all heads together; the rows of B in the order of the layer's channels."""
    layer, build = part.heads.layer, Builder(graph, by=by)
    rows = torch.empty_like(up)
    rows[part.maps[0]] = up
    with build.at(layer.node):
        latent = build.linear(layer.node.inputs[0], _weight(build, layer, "latent", down))
        whole = build.linear(latent, _weight(build, layer, "heads", rows), layer.bias)
    replace_uses(graph, layer.node.output, whole)


class _SiteRewrite:
    """An attention whose keys or values, or both, are latents of the heads."""

    def __init__(self, graph: Graph, site: Site, by: str) -> None:
        self.graph, self.site = graph, site
        self.build = Builder(graph, by=by)
        self.shared = bool(site.node.attributes["enable_gqa"])
        query, key = site.node.inputs[:2]
        assert isinstance(query, Value) and isinstance(key, Value)
        self._query, self._key = query, key

    def run(self, maps: Mapping[str, Maps]) -> None:
        site, operands = self.site, list(self.site.node.inputs)
        if "keys" in maps:
            assert site.query is not None and site.key is not None
            # what biases of keys add to scores is the same for all keys, and softmax takes it away
            operands[1] = self._heads(site.key, torch.stack([down for _, down in maps["keys"]]), None, "latent_keys")
            up = torch.stack([up for up, _ in maps["keys"]])[site.key.head_of]  # [query heads, size, rank]
            bias = None if site.query.bias is None else torch.einsum("hd,hdr->hr", site.query.bias, up)
            weight = torch.einsum("hdr,hdc->hrc", up, site.query.weight)
            operands[0] = self._heads(site.query, weight, bias, "latent_queries")
        if "values" in maps:
            assert site.value is not None
            down = torch.stack([down for _, down in maps["values"]])
            operands[2] = self._heads(site.value, down, None, "latent_values")
        for slot, heads in enumerate((site.query, site.key, site.value)):
            if heads is None or operands[slot] is not site.node.inputs[slot]:
                continue  # what lies in between is not understood: the fused layer stays for it, or it is a latent
            if self._is_fused(heads, maps) and heads.is_layout:
                operands[slot] = self._heads(heads, heads.weight, heads.bias, ("queries", "keys", "values")[slot])
        with self.build.at(site.node):
            result = self.build("attention", *operands, name=site.node.name, **site.node.attributes)
            result.producer.metadata.update(site.node.metadata)
            if "values" in maps:
                self._output(result, torch.stack([up for up, _ in maps["values"]]))
        if "values" not in maps:
            replace_uses(self.graph, site.node.output, result)

    def _is_fused(self, heads: Heads, maps: Mapping[str, Maps]) -> bool:
        """Whether the layer makes keys or values, too, which are latents now."""
        replaced = [own for own, kind in ((self.site.key, "keys"), (self.site.value, "values")) if kind in maps]
        return any(own is not None and own.layer.node is heads.layer.node for own in replaced)

    def _heads(self, heads: Heads, weight: torch.Tensor, bias: torch.Tensor | None, label: str) -> Operand:
        """[..., heads, length, size] of what the layer reads, by a weight [heads, size, inputs]."""
        count, size, _ = weight.shape
        x, layer = heads.x, heads.layer
        with self.build.at(layer.node):
            made = self.build.linear(
                x,
                _weight(self.build, layer, label, weight.flatten(0, 1)),
                None if bias is None else _weight(self.build, layer, label, bias.flatten(), "bias"),
            )
        with self.build.at(self.site.node):
            *batch, _, length, _ = self._query.shape if heads is self.site.query else self._key.shape
            parted = self.build.reshape(made, shape=(*batch, length, count, size))
            found: Value = self.build.permute(parted, dims=_swapped(parted.rank - 1))
            repeats = len(heads.head_of) // count
            if repeats > 1 and not self.shared:
                found = self.build.repeat_interleave(found, repeats=repeats, dim=found.rank - 3)
        return found

    def _output(self, mixed: Value, up: torch.Tensor) -> None:
        """What reads attention reads latents [..., query heads, length, rank]; it takes the bias of values over."""
        site = self.site
        assert site.output is not None and site.value is not None
        layer, weight = site.output.layer, site.output.weight  # [query heads, size, outputs]
        absorbed = torch.einsum("hdr,hdo->hro", up[site.value.head_of], weight)
        bias = None if layer.bias is None else layer.bias.tensor.detach().double()
        if site.value.bias is not None:
            added = torch.einsum("hd,hdo->o", site.value.bias[site.value.head_of], weight)
            bias = added if bias is None else bias + added
        rank = mixed.rank - 1
        apart = self.build.permute(mixed, dims=_swapped(rank))
        rows = self.build.reshape(apart, shape=(*site.output.x.shape[:-1], absorbed.shape[0] * absorbed.shape[1]))
        with self.build.at(layer.node):
            result = self.build.linear(
                rows,
                _weight(self.build, layer, "latent", absorbed.flatten(0, 1).T),
                None if bias is None else _weight(self.build, layer, "latent", bias, "bias"),
            )
        replace_uses(self.graph, layer.node.output, result)


def _swapped(rank: int) -> tuple[int, ...]:
    """The order that changes places of heads and positions; ``rank`` is that of a value in front of its parting."""
    return (*range(rank - 2), rank - 1, rank - 2, rank)


def _weight(build: Builder, layer: Layer, label: str, data: torch.Tensor, leaf: str = "weight") -> Parameter:
    """A weight as that of the layer, beside it in the same module."""
    stem, _, _ = layer.weight.name.rpartition(".")
    data = data.to(layer.weight.tensor.dtype).contiguous()
    name = f"{stem}.{label}.{leaf}" if stem else f"{label}.{leaf}"
    return build.parameter(build.unique(name), data, layer.weight.kind, trainable=layer.weight.trainable)
