"""What depends on constants alone is computed now, within a budget of bytes; what shifts or reorders a weight alone
goes into the weight.

    add(constant, mul(constant, 2))      constant
    linear(x, permute(weight))           linear(x, weight), stored the other way round

Constants count as in :mod:`regauge.ir.folding.fold`. A trained weight takes in what training would not miss: moves of
its entries, and linear maps of each. What is random, stateful, training or opaque (quantized, say) is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, TypeAlias

import torch

from regauge.ir.axis_rules.rules import broadcast_rule
from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder, remove_dead, remove_node, replace_uses
from regauge.ir.folding.fold import computed, is_fill, is_table
from regauge.ir.folding.limits import NODE_BYTES
from regauge.ir.folding.purity import is_pure
from regauge.ir.graph import Graph, Kind, Node, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.simplify.limits import Limits, bytes_of, count_of, held_values, scopes, size_of, total_bytes

Known: TypeAlias = Callable[[Parameter, Container[Value]], bool]

# -- constants ---------------------------------------------------------------------------------------------------------


def fold_constants(graph: Graph, limits: Limits) -> int:
    """Replace what depends on constants alone by constants, in regions too; returns how many nodes went."""
    return _fold_all(graph, limits, is_table)


def _fold_all(graph: Graph, limits: Limits, is_known: Known) -> int:
    spare, count = limits.most_bytes - total_bytes(graph), 0
    for owner, build in scopes(graph):
        folding = _Folding(owner, build, spare, limits.file_bytes, is_known)
        count += folding.run()
        spare = folding.spare
    return count


class _Folding:
    """Computes all that can be, then decides from the results backward what is kept as a constant."""

    def __init__(self, graph: Graph, build: Builder, spare: int, file_bytes: int, is_known: Known) -> None:
        self.is_known = is_known
        self.graph = graph
        self.build = build
        self.spare = spare
        self.file_bytes = file_bytes
        self.held = held_values(graph)
        self.states = {state.before for state in graph.states}
        self.known: dict[Value, torch.Tensor] = {}
        self.going: set[Node] = set()
        self.trained: set[Value] = set()  # what depends on trained parameters

    def run(self) -> int:
        foldable: list[Node] = []
        for node in self.graph.nodes:
            results = computed(node, self.known, self.states, self.is_known)
            if results is not None:
                self.known.update(zip(node.outputs, results, strict=True))
                foldable.append(node)
                if any(
                    v in self.trained or isinstance(v, Parameter) and v.kind == "parameter" for _, v in node.operands()
                ):
                    self.trained.update(node.outputs)
        for node in reversed(foldable):
            if self._goes(node):
                self.going.add(node)
            else:
                self._fold(node)
        if not self.going:
            return 0
        before = len(self.graph)
        remove_dead(self.graph)
        return before - len(self.graph)

    def _goes(self, node: Node, also: Container[Node] = ()) -> bool:
        """Whether nothing that stays reads the node, where the nodes of ``also`` go too."""
        return all(v not in self.held and self._unread(v, also) for v in node.outputs)

    def _unread(self, value: Value, also: Container[Node]) -> bool:
        return all(user in self.going or user in also for user, _ in value.uses)

    def _fold(self, node: Node) -> None:
        """Put constants in the place of a node's results, if the budget allows; its operands come next otherwise."""
        if is_fill(node) or is_part(node) or any(value in self.held for value in node.outputs):
            return
        read = [value for value in node.outputs if any(user not in self.going for user, _ in value.uses)]
        new = sum(self.known[value].numel() * self.known[value].element_size() for value in read)
        stored, computed = self._freed(node)
        growth = new - stored - NODE_BYTES
        if growth > max(self.spare, 0) and not (
            # The file will hold the constants that it computes so far, unless they go.
            growth - computed <= max(self.spare, 0) and growth <= self.spare + self.file_bytes
        ):
            return
        self.spare -= growth
        self.going.add(node)
        for value in read:
            name, tensor = self.build.unique(value.name), self.known[value].contiguous()
            trained = value in self.trained
            kind: Kind = "parameter" if trained else "constant"
            replace_uses(self.graph, value, self.build.parameter(name, tensor, kind, persistent=trained))

    def _freed(self, node: Node) -> tuple[int, int]:
        """Bytes of the constants that only this node and what goes with it read: stored ones, and computed ones."""
        seen: set[Value] = set()
        going, stack, stored, computed = {node}, [node], 0, 0
        while stack:
            for _, value in stack.pop().operands():
                source = value.producer
                if source is not None and source not in going and self._goes(source, going):
                    going.add(source)
                    stack.append(source)
                elif isinstance(value, Parameter) and self.is_known(value, self.states) and value not in self.held:
                    if value not in seen and self._unread(value, going):
                        stored += bytes_of(value)
                        computed += size_of(value) - bytes_of(value)
                        seen.add(value)
        return stored, computed


def is_part(node: Node) -> bool:
    """Whether a node is read by another that stands for the same node of a file.

    A file's own OneHot is one node and here several: to fold a part would mean to spell out all the others.
    """
    return node.origin is not None and any(user.origin is node.origin for v in node.outputs for user in v.consumers())


def fold_initializers(graph: Graph, limits: Limits) -> int:
    """Replace what depends on stored tensors alone, in a graph that was loaded from ONNX: nothing there is trained."""
    if "onnx" not in graph.metadata:
        return 0
    return _fold_all(graph, limits, is_stored)


def is_stored(parameter: Parameter, states: Container[Value]) -> bool:
    return parameter not in states and isinstance(parameter.dtype, torch.dtype)


# -- weights -----------------------------------------------------------------------------------------------------------


def fold_into_weights(graph: Graph, limits: Limits) -> int:
    """Let weights hold what is made of them before they are read; returns how many nodes went."""
    spare, count = limits.most_bytes - total_bytes(graph), 0
    for owner, build in scopes(graph):
        held = held_values(owner)
        for node in list(owner.nodes):
            growth = _growth(node, held, "onnx" in graph.metadata)
            if growth is not None and (growth <= 0 or growth <= spare):
                _fold_into_weight(owner, build, node)
                spare -= growth
                count += 1
    return count


def _growth(node: Node, held: Container[Value], merged: bool) -> int | None:
    """Bytes by which the graph grows where a node is folded into its weight; None where it may not be.

    With ``merged`` one weight may be made of several, and of any function of them.
    """
    weights = [value for _, value in node.operands()]
    if not weights or len(node.outputs) != 1 or node.output in held or not is_pure(node) or node.regions:
        return None
    if is_part(node):
        return None
    result = node.output
    if not isinstance(result.dtype, torch.dtype) or not all(isinstance(size, int) for size in result.shape):
        return None
    own: list[Parameter] = []
    for value in weights:
        if not isinstance(value, Parameter) or value in held or not isinstance(value.dtype, torch.dtype):
            return None
        if not is_table(value, held):
            own.append(value)
    if not own or any(len(value.uses) > 1 for value in own) or not _takes_in(node, merged):
        return None
    if len(own) > 1 and not merged:
        return None
    if not merged and any(value.dtype != result.dtype for value in own):
        return None  # a weight that is cast to fewer bits is trained with all of them
    if any(v.trainable and not is_real(result.dtype) for v in own) or count_of(result.shape) > count_of(own[0].shape):
        return None
    gone = {v for v in weights if isinstance(v, Parameter) and len(v.uses) == 1 and (v in own or v.kind == "constant")}
    return bytes_of(result) - sum(map(bytes_of, gone))


def _takes_in(node: Node, anything: bool) -> bool:
    """Whether a weight may hold a node's result: moved entries, or a linear map of each (any function of each)."""
    symmetry = symmetry_of(node)
    if symmetry is Symmetry.LAYOUT:
        return True
    if node.operator.rule is not broadcast_rule:
        return False
    return anything or symmetry in (Symmetry.LINEAR, Symmetry.PRODUCT)


def _fold_into_weight(graph: Graph, build: Builder, node: Node) -> None:
    """The node is run on the weight in its own precision, so that the numbers are those it gave so far."""
    weights = list(dict.fromkeys(value for _, value in node.operands() if isinstance(value, Parameter)))
    weights.sort(key=lambda value: value.kind == "constant")  # the first is the one whose name the result takes
    inputs, attributes, evaluate = node.inputs, node.attributes, node.operator.evaluate

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        given = {w: t.to(w.dtype) for w, t in zip(weights, tensors, strict=True)}
        operands: list[Any] = [given[o] if isinstance(o, Parameter) else o for o in inputs]
        result: torch.Tensor = evaluate(*operands, **attributes)
        return result

    result = node.output
    dtype = result.dtype
    assert isinstance(dtype, torch.dtype)
    shape = [int(size) for size in result.shape]
    new = build.folded(weights[0], run, *weights[1:], shape=shape, dtype=dtype)
    new.trainable = new.trainable and is_real(dtype)
    replace_uses(graph, result, new)
    remove_node(graph, node)
    for weight in weights[1:]:
        if weight.kind != "buffer" and not weight.uses and graph.parameters.get(weight.name) is weight:
            del graph.parameters[weight.name]
    settle_successors(graph, build)
