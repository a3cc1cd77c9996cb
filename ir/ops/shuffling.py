"""Entries of one axis in the order in which a shuffle of channels puts them: group by group becomes place by place."""

from __future__ import annotations

from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.graph import Node
from regauge.ir.operator import Symmetry, operator, sample
from regauge.ir.sizes.expressions import floor_divide


def _shuffle_rule(call: Call) -> Axes:
    """``(g n) -> (n g)`` along one axis."""
    shape, dim, groups = call.node.outputs[0].shape, call["dim"], call["groups"]
    apart = call.reshape(call.operand(0), (*shape[:dim], groups, floor_divide(shape[dim], groups), *shape[dim + 1 :]))
    call.derive(groups=apart[dim])
    return call.reshape([*apart[:dim], apart[dim + 1], apart[dim], *apart[dim + 2 :]], shape)


def shuffled_places(size: int, groups: int) -> torch.Tensor:
    """Where each entry of a shuffled axis was."""
    return torch.arange(size).reshape(groups, -1).t().reshape(-1)


def groups_of(table: torch.Tensor, size: int) -> int:
    """Into how many groups an axis was divided whose entries a table reads shuffled; 1 where it does not."""
    groups = size // int(table[1]) if table.shape == (size,) and size > 1 and int(table[1]) > 1 else 1
    return groups if size % groups == 0 and torch.equal(shuffled_places(size, groups).to(table), table) else 1


def _spell_shuffle(onnx: Any, node: Node) -> Any:
    """Every entry is looked up where it was; along an axis of dynamic size it is taken apart and put together again."""
    shape, dim, groups = node.outputs[0].shape, node.attributes["dim"], node.attributes["groups"]
    size = shape[dim]
    if isinstance(size, int):
        return onnx.Gather(onnx.operand(0), onnx.constant(shuffled_places(size, groups), torch.int32), axis=dim)
    apart = (*shape[:dim], groups, floor_divide(size, groups), *shape[dim + 1 :])
    split = onnx.Reshape(onnx.operand(0), onnx.target(apart, shape[:dim]))
    turned = onnx.Transpose(split, perm=[*range(dim), dim + 1, dim, *range(dim + 2, len(apart))])
    return onnx.Reshape(turned, onnx.target(shape, shape[:dim]))


@operator(
    rule=_shuffle_rule,
    spell=_spell_shuffle,
    samples=lambda: [sample(randn(2, 6, 4), groups=2, dim=1), sample(randn(12, 3), groups=3, dim=0)],
    symmetry=Symmetry.LAYOUT,
)
def shuffle(x: torch.Tensor, *, groups: int, dim: int) -> torch.Tensor:
    """``dim`` is counted from the front."""
    return torch.unflatten(x, dim, (groups, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)
