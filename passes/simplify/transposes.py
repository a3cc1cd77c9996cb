"""Pairs of permutes around pointwise operators cancel; permutes of all operands become one of the result.

permute(relu(add(permute(x), 1)), back)     relu(add(x, 1))
add(permute(x), permute(y))                 permute(add(x, y))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import broadcast_rule, is_pointwise
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.operator import all_operators, get_operator
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.rewrite import RuleSet, differs, refuse, rule
from regauge.ir.sizes.expressions import same
from regauge.passes.simplify.layout import permuted, positive_dims

Sample = dict[str, Any]
FARTHEST = 32  # nodes between two permutes that may cancel


def pointwise_of_two() -> tuple[str, ...]:
    """The names of the pointwise operators of exactly two operands."""
    return tuple(
        name
        for name, record in all_operators().items()
        if record.rule is broadcast_rule and not record.random and len(record.slots) == 2
    )


class Pulling:
    """Builds permute(value, dims) without a permute, from permutes and constants that lie behind pointwise nodes."""

    def __init__(self, build: Builder, match: Match) -> None:
        self.build = build
        self.match = match
        self.known: dict[Value, Value] = {}  # value -> the same value, permuted
        self.passed: dict[Node, None] = {match.root: None}
        self.added: dict[Node, bool] = {}  # permutes that were reached, and whether they are replaced by another

    def pull(self, operand: Operand, rank: int, dims: Sequence[int]) -> Operand:
        """An operand of a pointwise node of this rank, permuted; refuses where that takes another node."""
        if not isinstance(operand, Value) or operand.rank == 0:
            return operand
        if operand not in self.known:
            self.known[operand] = self.turned(operand, rank, dims)
        return self.known[operand]

    def turned(self, value: Value, rank: int, dims: Sequence[int]) -> Value:
        if isinstance(value, Parameter):
            return self.parameter(value, rank, dims)
        if all(same(size, 1) for size in value.shape):
            return value
        node = value.producer
        if node is None or value.rank != rank:
            return differs(f"{value.name} has no permute that would cancel")
        if node.op == "permute":
            x = node.inputs[0]
            assert isinstance(x, Value)
            result = permuted(self.build, x, [positive_dims(node)[dim] for dim in dims])
            self.added[node] = result is not x
            return result
        if not is_pointwise(node) or len(node.outputs) > 1:
            return differs(f"{node.label} needs its axes where they are")
        if len(self.passed) > FARTHEST:
            return refuse("the next permute is far away")
        self.passed[node] = None
        operands = [self.pull(operand, rank, dims) for operand in node.inputs]
        with self.build.at(node):
            return self.build(node.op, *operands, name=node.name, **node.attributes)  # type: ignore[no-any-return]

    def parameter(self, parameter: Parameter, rank: int, dims: Sequence[int]) -> Value:
        """A constant or weight, stored the other way round."""
        shape = (1,) * (rank - parameter.rank) + tuple(parameter.weight.shape)
        wide = [axis for axis, dim in enumerate(dims) if shape[dim] != 1]
        new = tuple(shape[dim] for dim in dims)[wide[0] if wide else 0 :]
        moved = [dim for dim in dims if shape[dim] != 1]
        if not wide or moved == sorted(moved) and new == tuple(parameter.weight.shape)[-len(new) :]:
            return parameter
        if len(parameter.uses) > 1 or not isinstance(parameter.dtype, torch.dtype):
            return refuse(f"{parameter.name} has other readers")
        return self.build.folded(parameter, lambda t: t.reshape(shape).permute(tuple(dims)).reshape(new), shape=new)

    def check(self) -> None:
        """Refuses where nodes are read from outside, so that they would stay beside the new ones, or nothing is won."""
        inner = [node for node in self.passed if node is not self.match.root]
        for node in inner:
            if not self.dies(node):
                refuse(f"{node.label} has other readers")
        if 1 + sum(self.dies(node) for node in self.added) <= sum(self.added.values()):
            refuse("as many permutes would be left")

    def dies(self, node: Node) -> bool:
        value = node.output
        return value not in self.match.held and all(user in self.passed for user, _ in value.uses)


def _cancelling_samples() -> Iterable[Sample]:
    def alone(build: Builder, x: Value) -> Value:
        return build.relu(build.permute(x, dims=(0, 2, 3, 1)))  # type: ignore[no-any-return]

    def chain(build: Builder, x: Value) -> Value:
        y = build.add(build.permute(x, dims=(0, 2, 3, 1)), 1.0)
        gain = build.parameter("gain", torch.arange(3.0).double())
        return build.mul(build.mul(build.sigmoid(y), y), gain)  # type: ignore[no-any-return]

    def two(build: Builder, x: Value) -> Value:
        y, z = build.permute(x, dims=(0, 2, 3, 1)), build.permute(build.tanh(x), dims=(0, 2, 3, 1))
        return build.div(y, build.exp(z))  # type: ignore[no-any-return]

    for function in (alone, chain, two):
        yield {"a": randn(2, 3, 4, 5).double(), "p.dims": (0, 3, 1, 2), "x": lambda build, a, f=function: f(build, a)}
        yield {"a": randn(2, 3, 4, 5).double(), "p.dims": (0, 1, 3, 2), "x": lambda build, a, f=function: f(build, a)}


@rule(lambda op, x: op.permute(x, dims=..., name="p"), samples=_cancelling_samples)
def permutes_cancel(build: Builder, x: Value, p: Node, match: Match) -> Value:
    """A permute whose inverse lies behind pointwise operators goes, and so does the inverse."""
    if x.producer is None or not is_pointwise(x.producer):
        return differs("no pointwise operator lies before it")
    pulling = Pulling(build, match)
    result = pulling.pull(x, x.rank, positive_dims(p))
    pulling.check()
    assert isinstance(result, Value)
    return result


def _meeting_samples() -> Iterable[Sample]:
    """For every operator an operand that its own record gives for its samples, which has the right type, twice."""
    for op in pointwise_of_two():
        draw = get_operator(op).samples
        calls = [] if draw is None else [c for c in draw() if isinstance(c.operands[0], torch.Tensor)]
        x, attributes = (calls[0].operands[0], calls[0].attributes) if calls else (randn(6).double(), {})
        x = x.reshape(2, -1, 1)
        yield {"x": x, "y": x.flip(1), "d": (1, 2, 0), "node.op": op, "node.attributes": dict(attributes)}
    yield {"x": randn(2, 3, 4).double(), "y": randn(1, 3, 1).double(), "d": (2, 0, 1), "node.op": "sub"}


@rule(
    lambda op, x, y, d: op.any_of(
        pointwise_of_two(), op.permute(x, dims=d), op.permute(y, dims=d), attributes=..., name="node"
    ),
    samples=_meeting_samples,
)
def permutes_meet(build: Builder, x: Value, y: Value, node: Node, d: tuple[int, ...]) -> Value:
    """Two operands that are permuted alike are permuted afterwards, together."""
    if x.rank != y.rank:
        return refuse("its operands have different ranks")
    return build.permute(build(node.op, x, y, **node.attributes), dims=d)  # type: ignore[no-any-return]


RULES = RuleSet([permutes_cancel, permutes_meet])
