"""Numbers of few bits that share bytes, and codes that are looked up in tables: what weights are stored as.

unpack     digit i of a byte q of so many digits is q // base^i % base: 8 bits, 4 pairs, 2 halves, or 5 trits
codebook   w[r, c] = table[r's group, q[r, c]], the rows in as many groups of neighbours as the table has rows;
           of a table [v] w[...] = table[q[...]]
n_of_m     w[r, g m + i] = values[r, how many bits of mask[r, g] are set below i, g] where bit i is set, and else 0
bitmap     w[r, g m + i] = values[starts[r, g] + how many bits of mask[r, g] are set below i] where bit i is set, else 0

While torch exports a module to ONNX, divisions are the ONNX operators: torch's own become a dozen for signs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, randint, randn

from regauge.ir import scalars
from regauge.ir.graph import Node
from regauge.ir.operator import operator, sample


def _spell_unpack(onnx: Any, node: Node) -> Any:
    base, count = node.attributes["base"], node.attributes["count"]
    powers = torch.tensor([base**place for place in range(count)], dtype=torch.int32)
    rank = len(node.inputs[0].shape)  # type: ignore[union-attr]
    whole = onnx.unsqueeze(onnx.operand(0, torch.int32), rank)
    digits = onnx.Mod(onnx.Div(whole, onnx.constant(powers)), onnx.constant(torch.tensor(base, dtype=torch.int32)))
    shape = [*(0 for _ in range(rank - 1)), -1]
    return onnx.Reshape(onnx.cast(digits, torch.uint8), onnx.constant(torch.tensor(shape)))


@operator(
    rule="x... b -> x... (b k) ; whole k ; count = k",
    spell=_spell_unpack,
    samples=lambda: [
        sample(randint(0, 256, (3, 4)).to(torch.uint8), base=2, count=8),
        sample(randint(0, 243, (2, 3, 4)).to(torch.uint8), base=3, count=5),
        sample(randint(0, 256, (6,)).to(torch.uint8), base=16, count=2),
    ],
    coding=True,
    expands=True,
    element=lambda q, base, count: scalars.digit(q, base),
)
def unpack(q: Tensor, *, base: int, count: int) -> Tensor:
    powers = torch.tensor([base**place for place in range(count)], dtype=torch.int32, device=q.device)
    whole = q.to(torch.int32).unsqueeze(-1)
    if torch.onnx.is_in_onnx_export():
        shape = [*q.shape, count]
        shifted = torch.onnx.ops.symbolic("Div", (whole, powers), dtype=torch.int32, shape=shape)
        digits = torch.onnx.ops.symbolic(
            "Mod", (shifted, torch.full_like(powers[:1], base)), dtype=torch.int32, shape=shape
        )
        return digits.to(torch.uint8).flatten(-2)
    return (whole // powers % base).to(torch.uint8).flatten(-2)


def _codebook_rule(call: Any) -> str:
    if len(call.node.inputs[1].shape) == 1:
        return "x..., v -> x... ; indexed v"
    return "r c, 1 v -> r c ; indexed v" if call.node.inputs[1].shape[0] == 1 else "(g k) c, g v -> (g k) c ; indexed v"


def _spell_codebook(onnx: Any, node: Node) -> Any:
    if len(node.inputs[1].shape) == 1:  # type: ignore[union-attr]
        return onnx.Gather(onnx.operand(1), onnx.operand(0, torch.int32))
    q, table = onnx.operand(0, torch.int64), onnx.operand(1)
    groups = int(node.inputs[1].shape[0])  # type: ignore[union-attr]
    shape = [int(size) for size in node.outputs[0].shape]
    flat = onnx.Reshape(q, onnx.constant(torch.tensor([groups, -1])))
    return onnx.Reshape(onnx.GatherElements(table, flat, axis=1), onnx.constant(torch.tensor(shape)))


@operator(
    rule=_codebook_rule,
    spell=_spell_codebook,
    samples=lambda: [
        sample(randint(0, 5, (4, 3)).to(torch.uint8), randn(1, 5)),
        sample(randint(0, 5, (6, 4)).to(torch.uint8), randn(2, 5)),
        sample(randint(0, 5, (6, 4, 2)).to(torch.uint8), randn(5)),
    ],
    coding=True,
    expands=True,
)
def codebook(q: Tensor, table: Tensor) -> Tensor:
    if table.dim() == 1:
        return table[q.long()]
    return torch.take_along_dim(table, q.long().reshape(table.shape[0], -1), 1).reshape(q.shape)


def _spell_n_of_m(onnx: Any, node: Node) -> Any:
    of = node.attributes["of"]
    two = onnx.constant(torch.tensor(2, dtype=torch.int32))
    whole = onnx.unsqueeze(onnx.operand(1, torch.int32), 2)
    bits = onnx.Mod(onnx.Div(whole, onnx.constant(torch.tensor([2**i for i in range(of)], dtype=torch.int32))), two)
    ranks = onnx.CumSum(bits, onnx.constant(torch.tensor(2)), exclusive=1)
    last = onnx.constant(torch.tensor(node.attributes["keep"] - 1, dtype=torch.int32))
    values = onnx.GatherElements(onnx.Transpose(onnx.operand(0), perm=[0, 2, 1]), onnx.Min(ranks, last), axis=2)
    zero = onnx.cast(onnx.constant(torch.tensor(0.0)), node.output.dtype)
    found = onnx.Where(onnx.cast(bits, torch.bool), values, zero)
    return onnx.Reshape(found, onnx.constant(torch.tensor([0, -1])))


@operator(
    rule="r t g, r g -> r (g m) ; whole t ; whole m ; keep = t ; of = m",
    spell=_spell_n_of_m,
    samples=lambda: [
        sample(randn(2, 2, 3), torch.tensor([[3, 5, 10], [0, 12, 8]], dtype=torch.uint8), keep=2, of=4),
        sample(randn(1, 1, 4), torch.tensor([[1, 0, 128, 16]], dtype=torch.uint8), keep=1, of=8),
    ],
    coding=True,
    expands=True,
    element=lambda values, mask, keep, of: scalars.spread(
        mask, [scalars.moved(values, {1: scalars.Place(offset=place)}) for place in range(keep)]
    ),
)
def n_of_m(values: Tensor, mask: Tensor, *, keep: int, of: int) -> Tensor:
    bits = mask.to(torch.int32).unsqueeze(-1) >> torch.arange(of, dtype=torch.int32, device=mask.device) & 1
    ranks = (bits.cumsum(-1) - bits).clamp(max=keep - 1)
    return torch.where(bits != 0, values.transpose(1, 2).take_along_dim(ranks, 2), 0).to(values.dtype).flatten(1)


def _spell_bitmap(onnx: Any, node: Node) -> Any:
    powers = onnx.constant(torch.tensor([2**place for place in range(node.attributes["of"])]))
    whole = _positive(onnx, onnx.unsqueeze(onnx.operand(1, torch.int64), 2))
    bits = onnx.Mod(onnx.Div(whole, powers), onnx.constant(torch.tensor(2)))
    ranks = onnx.CumSum(bits, onnx.constant(torch.tensor(2)), exclusive=1)
    numbers = onnx.Mul(onnx.Add(onnx.unsqueeze(onnx.operand(2, torch.int64), 2), ranks), bits)
    zero = onnx.cast(onnx.constant(torch.tensor(0.0)), node.output.dtype)
    found = onnx.Where(onnx.cast(bits, torch.bool), onnx.Gather(onnx.operand(0), numbers), zero)
    return onnx.Reshape(found, onnx.constant(torch.tensor([0, -1])))


def _positive(onnx: Any, whole: Any) -> Any:
    """The 32 bits of a number as one that is not below zero."""
    return onnx.Mod(onnx.Add(whole, onnx.constant(torch.tensor(2**32))), onnx.constant(torch.tensor(2**32)))


@operator(
    rule="v, r g, r g -> r (g m) ; indexed v ; whole m ; of = m",
    spell=_spell_bitmap,
    samples=lambda: [
        sample(
            randn(9),
            torch.tensor([[3, 5, 10], [0, 12, 8]], dtype=torch.int32),
            torch.tensor([[0, 2, 4], [6, 6, 8]], dtype=torch.int32),
            of=4,
        ),
        sample(
            randn(20),
            torch.tensor([[-(2**31), 7], [-1431655766, 0]], dtype=torch.int32),
            torch.tensor([[0, 1], [4, 20]], dtype=torch.int32),
            of=32,
        ),
    ],
    coding=True,
    expands=True,
    element=lambda values, mask, starts, of: scalars.compact(values, mask, starts),
)
def bitmap(values: Tensor, mask: Tensor, starts: Tensor, *, of: int) -> Tensor:
    bits = mask.to(torch.int64).unsqueeze(-1) >> torch.arange(of, device=mask.device) & 1
    ranks = bits.cumsum(-1) - bits
    there = bits != 0
    numbers = torch.where(there, starts.to(torch.int64).unsqueeze(-1) + ranks, 0)
    return torch.where(there, values[numbers], 0).to(values.dtype).flatten(1)
