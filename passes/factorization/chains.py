"""A layer as a chain of smaller ones, each a plain operator: what stands in the graph once it is factorized.

Between operators on some of the axes that the features are split into stand reshapes and permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from regauge.ir.edit import Builder, record, replace_uses
from regauge.ir.graph import Graph, Operand, Parameter, Value
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.arrangements import Arrangement


@dataclass(frozen=True)
class Link:
    """One layer of a chain: its name behind that of the original, operator, weight as stored, and attributes.

    What it reads may be arranged ``before`` it, and what it gives ``after`` it.
    """

    name: str
    op: str
    weight: torch.Tensor
    attributes: Mapping[str, Any] = field(default_factory=dict)
    before: Arrangement | None = None
    after: Arrangement | None = None


def write_chain(graph: Graph, layer: Layer, links: Sequence[Link], *, by: str) -> list[Parameter]:
    """Put a chain in the place of a layer; the last link takes the bias over. Returns the weights of the links."""
    node, build = layer.node, Builder(graph, by=by)
    whole, _, leaf = layer.weight.name.rpartition(".")
    stem = f"{whole}." if whole else f"{leaf}_" if leaf != "weight" else ""
    if whole and not leaf.endswith("weight"):  # a module may hold several stacks of matrices
        stem = f"{whole}.{leaf}_"
    with build.at(node):
        value: Value | Any = node.inputs[0]
        leading = value.shape[:-1]
        weights = []
        for place, link in enumerate(links):
            last = place + 1 == len(links)
            weight = weight_like(build, f"{stem}{link.name}.weight", link.weight, layer.weight)
            weights.append(weight)
            bias = None
            if last and layer.bias is not None:
                bias = weight_like(build, f"{stem}{link.name}.bias", layer.bias.tensor.detach(), layer.bias)
            name = node.output.name if last else f"{node.output.name}_{link.name}"
            if link.before is not None:
                value = link.before.write(build, value, leading)
            operands: tuple[Operand, ...] = (value, weight)
            if link.op == "grouped_mm":
                operands += (node.inputs[2],)  # each matrix has the same rows as before
            elif bias is not None and link.after is None:
                operands += (bias,)
            value = build(link.op, *operands, name=name, **link.attributes)
            if link.after is not None:
                value = link.after.write(build, value, leading)
                value = value if bias is None else build.add(value, bias, name=name)
        replace_uses(graph, node.output, value)
    record(graph, by, f"{layer.weight.name}: {' '.join('x'.join(map(str, link.weight.shape)) for link in links)}")
    return weights


def weight_like(build: Builder, name: str, data: torch.Tensor, like: Parameter) -> Parameter:
    """A new weight of the type of another one, trained where that is; ``name`` is changed where it is taken."""
    assert isinstance(like.dtype, torch.dtype)
    data = data.to(like.dtype).contiguous()
    return build.parameter(build.unique(name), data, like.kind, trainable=like.trainable)
