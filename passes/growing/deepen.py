"""``deepen``: more blocks that compute nothing yet, as a start for training on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch

from regauge.ir.edit import Builder, set_input
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.graph_copy import copy_graph
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.depth.blocks import repeated_blocks
from regauge.passes.depth.branches import residual_branches
from regauge.passes.depth.parts import Order, Part, read_outside, trained
from regauge.passes.growing.silence import silenced
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Deepen(Pass):
    """Put in copies of blocks that add nothing to the residual stream yet: the same function, with more to train.

    before  x1 = x0 + f(x0, w)
    after   x1 = x0 + f(x0, w)    x2 = x1 + f(x1, w')      w': w, but that what writes into the sum is zero

    LLaMA Pro (Wu et al. 2024, section 3): the blocks are parted into as many groups in a row as blocks are put in, and
    behind each group stands a copy of its last block, whose output projections are zero and get gradients at once. On
    any network with residual blocks: of a convolution with a batch norm behind it the norm's gain and shift are zero
    (Goyal et al. 2017, section 5.1), of a branch with scales these. Blocks behind whose sum there is a norm (post-norm
    encoders) cannot do nothing, and get no copy.
    """

    name: ClassVar[str] = "deepen"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True

    blocks: int = option(1, "how many blocks are put in", at_least=1)
    include: tuple[str, ...] = option((), "globs on names of blocks: copy nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of blocks: these have no copy")

    def call(self, graph: Graph, context: Context) -> Graph:
        parts = self._copied(graph, context.left)
        moved: dict[Value, Value] = {}
        result = copy_graph(graph, moved)
        ends = {part: moved[part.result] for part in parts}
        for number in range(self.blocks):
            part = parts[((number + 1) * len(parts) - 1) // self.blocks]
            name, ends[part] = _put_behind(result, part, moved, ends[part], by=self.name)
            context.cuts.append(Cut(name, 0, 1, f"{name}: a copy of {part.name}, which adds nothing yet"))
        return result

    def _copied(self, graph: Graph, left: Counter[str]) -> list[Part]:
        """The blocks that may have copies, in the order of the graph; raises PassError where there is none."""
        order = Order(graph)
        parts = repeated_blocks(order, residual_branches(order, Counter()))
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            check_patterns(name, patterns, {part.name for part in parts}, what="block")
        found = []
        for part in parts:
            reason = _unfit(order, part)
            if self.include and not matches([part.name], self.include):
                reason = "not included"
            elif matches([part.name], self.exclude):
                reason = "excluded"
            if reason is None:
                found.append(part)
            else:
                left[reason] += 1
        if not found:
            why = "; ".join(f"{count} x {reason}" for reason, count in left.items()) or "nothing repeats in it"
            raise PassError(f"deepen found no block of {graph.name} that can have a copy: {why}")
        return found


def _unfit(order: Order, part: Part) -> str | None:
    """Why a copy of a block behind it would not compute the same, or would not be a block like it."""
    if any(node.regions for node in part.nodes):
        return "it holds branches of control flow"
    outside = [value for value in read_outside(part.nodes) if value is not part.source]
    if any(order.depends([part.source], value, stop=_has_weights) for value in outside):
        return "it reads what comes before its source, as where a shortcut skips pixels"
    if any(order.depends([value], part.source) for value in outside):
        return "others read what it computes inside"
    if any(part.result in (state.before, state.after) for state in order.graph.states):
        return "its result is a state"
    found = silenced(part)
    return found if isinstance(found, str) else None


def _put_behind(graph: Graph, part: Part, moved: Mapping[Value, Value], end: Value, *, by: str) -> tuple[str, Value]:
    """Put a copy of a block behind ``end``, its result or that of its last copy; the copy's name and its result.

    ``moved`` says for each value of the part's graph what it is in ``graph``.
    """
    build, names, zero = Builder(graph, by=by), _Names(graph, part), silenced(part)
    assert isinstance(zero, set)
    own: dict[Value, Value] = {**moved, part.source: end}
    for parameter in dict.fromkeys(v for node in part.nodes for _, v in node.operands() if isinstance(v, Parameter)):
        if parameter.kind == "constant":
            continue
        tensor = parameter.tensor.detach()
        copied = torch.zeros_like(tensor) if parameter in zero else tensor.clone()
        fields = {"trainable": parameter.trainable, "persistent": parameter.persistent}
        own[parameter] = build.parameter(build.unique(names.of(parameter.name)), copied, parameter.kind, **fields)
    readers, is_output = list(end.uses), any(output is end for output in graph.outputs)
    for node in part.nodes:
        build.scope, build.source = tuple((names.of(path), kind) for path, kind in node.scope), node.source
        operands = [own[value] if isinstance(value, Value) else value for value in node.inputs]
        results = tuple((value.shape, value.dtype) for value in node.outputs)
        build(node.op, *operands, name=node.outputs[0].name, results=results, **node.attributes)
        own.update(zip(node.outputs, build.added[-1].outputs, strict=True))
    result = own[part.result]
    for node, slot in readers:
        set_input(node, slot, result, graph)
    if is_output:  # it keeps its name
        graph.outputs = [result if output is end else output for output in graph.outputs]
        end.name, result.name = result.name, end.name
        end.origin, result.origin = result.origin, end.origin
    return names.copy, result


def _has_weights(node: Node) -> bool:
    return bool(trained([node]))


class _Names:
    """What stands in a copy of a block for the names of its modules and weights: blocks.3.fc1 -> blocks.3_1.fc1."""

    def __init__(self, graph: Graph, part: Part) -> None:
        self.prefix = "" if part.name.startswith("{") else part.name.partition(".{")[0]
        taken = {path for node in graph.nodes for path, _ in node.scope} | {*graph.parameters}
        first = self.prefix or part.name
        self._suffix = next(
            f"_{number}" for number in count(1) if not any(_below(path, f"{first}_{number}") for path in taken)
        )
        self.copy = first + self._suffix

    def of(self, path: str) -> str:
        if self.prefix and _below(path, self.prefix):
            return self.copy + path[len(self.prefix) :]
        if self.prefix or not path:
            return path
        first, dot, rest = path.partition(".")
        return first + self._suffix + dot + rest


def _below(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + ".")
