"""Biases before a residual sum, moved into the norm whose result is the other summand, in ONNX files.

    z = norm(y, gain, shift)                 z' = norm(y, gain, shift + b)
    u = linear(z, v, c)                      u  = linear(z', v, c - v b)
    s = add(linear(x, w, b), z)              s  = add(linear(x, w), z')

Blocks that normalise behind their sums (post-norm, as in BERT) read a norm's result as the residual, and in linear
maps, which take the shift back. Then a sum is all that stands behind the product, and both are one Gemm with the
residual in the place of the bias: a pass over all rows less.
"""

from __future__ import annotations

from dataclasses import dataclass

from regauge.ir.edit import Builder, remove_node, replace_uses, set_input
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.rewriting.rewrite import Refusal, refuse
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.fixed_values import combined, fixed, itself, successor
from regauge.passes.simplify.kernels import MATRICES, kernel
from regauge.passes.simplify.laid_factors import rounds
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.linear_map import BIAS, X, channels, own_weight, rebuilt

SHIFT = 2  # the operand slot of a layer norm


def free_residuals(graph: Graph, limits: Limits) -> int:
    """Move biases before a residual sum into the norm that gives the residual, in a graph that was loaded from ONNX;
    returns how many."""
    if "onnx" not in graph.metadata:
        return 0
    owners, count = list(scopes(graph)), 0
    held = set().union(*(held_values(owner) for owner, _ in owners))
    for owner, build in owners:
        build.by, build.held = "residuals", held
        for node in list(owner.nodes):
            count += node.op == "add" and not is_fixed(node) and not is_part(node) and _free(owner, build, node)
    return count


def _free(graph: Graph, build: Builder, total: Node) -> bool:
    build.added, build.made = [], []
    for slot in (0, 1):
        try:
            moved = _Moved(build, total, slot)
            moved.check()
            moved.write(graph)
            return True
        except Refusal:
            build.take_back()
    return False


@dataclass(frozen=True)
class _Biased:
    """A linear map with a bias that nothing else reads, which ``node`` adds: itself, or a sum behind a product."""

    map: Node
    node: Node
    slot: int

    @property
    def bias(self) -> Parameter:
        bias = self.node.inputs[self.slot]
        assert isinstance(bias, Parameter)
        return bias


def _biased(build: Builder, map: Node) -> _Biased:
    """A map and its bias; refuses where it has none of its own."""
    if map.op not in MATRICES or is_fixed(map) or map.output in build.held:
        return refuse(f"{map.label} is no linear map of rows")
    own_weight(build, map)
    found = _Biased(map, map, BIAS)
    if map.op == "matmul":
        readers = map.output.consumers()
        if len(readers) != 1 or readers[0].op != "add" or is_fixed(readers[0]) or readers[0].output in build.held:
            return refuse(f"{map.label} has no bias")
        found = _Biased(map, readers[0], int(readers[0].inputs[0] is map.output))
    if len(found.node.inputs) <= found.slot or not _is_own(build, found.node.inputs[found.slot], channels(map)):
        return refuse(f"{map.label} has no bias of its own")
    return found


def _is_own(build: Builder, operand: Operand, size: int) -> bool:
    """Whether an operand is a stored vector of this size that nothing else reads."""
    own = isinstance(operand, Parameter) and operand.stored and build.graph.parameters.get(operand.name) is operand
    return own and len(operand.uses) == 1 and operand.shape == (size,) and fixed(build, operand) is not None  # type: ignore


class _Moved:
    """A sum of a biased map, operand ``slot``, and of the result of a norm."""

    def __init__(self, build: Builder, total: Node, slot: int) -> None:
        self.build, self.total = build, total
        biased, residual = total.inputs[slot], total.inputs[1 - slot]
        if not isinstance(biased, Value) or not isinstance(residual, Value) or biased.rank != 2:
            raise Refusal("it is no sum of rows")
        last, norm = biased.producer, residual.producer
        if last is None or norm is None or norm.op != "layer_norm" or is_fixed(norm) or is_part(norm):
            raise Refusal("its other summand is the result of no norm")
        maps = [last] if last.op in MATRICES else [value.producer for _, value in last.operands()]
        self.source = _biased(build, next(filter(None, maps), last))
        self.norm, self.residual = norm, residual
        if self.source.node is not last or list(biased.uses) != [(total, slot)] or biased in build.held:
            raise Refusal("its summand is no biased map, or read elsewhere")

    def check(self) -> None:
        """Refuses where a shift of the residual would show."""
        size, dtype = channels(self.source.map), self.residual.dtype
        if self.residual.shape != self.total.output.shape or dtype != self.total.output.dtype:
            refuse("its residual is broadcast, or cast")
        if self.residual in self.build.held or not _is_own(self.build, self.norm.inputs[SHIFT], size):
            refuse(f"{self.norm.label} has no shift of its own, or is an output")
        if self.source.bias.dtype != dtype or rounds(self.source.bias.tensor, dtype):
            refuse("so large a bias rounds what it is added to")
        others = [(node, slot) for node, slot in self.residual.uses if node is not self.total]
        if len(self.residual.uses) != len(others) + 1 or any(slot != X for _, slot in others):
            refuse("its residual is read by others than maps")
        self.readers = [_biased(self.build, node) for node, _ in others]
        if any(reader.map is self.source.map for reader in self.readers):
            refuse("its map reads the residual")

    def write(self, graph: Graph) -> None:
        build, source, total = self.build, self.source, self.total
        shift, bias = self.norm.inputs[SHIFT], itself(source.bias)
        assert isinstance(shift, Parameter)
        moved = successor(build, shift, combined(lambda old, b: old + b, itself(shift), bias))
        corrected = [
            successor(
                build,
                reader.bias,
                combined(lambda old, w, b: old - w @ b, itself(reader.bias), kernel(build, reader.map), bias),
            )
            for reader in self.readers
        ]
        set_input(self.norm, SHIFT, moved, graph)
        for reader, new in zip(self.readers, corrected, strict=True):
            set_input(reader.node, reader.slot, new, graph)
        plain = source.map.output if source.map is not source.node else None
        if plain is None:
            plain = rebuilt(build, source.map, own_weight(build, source.map), None)
        with build.at(total):
            build.origin = None  # a product and its sum are written as one
            result = build.add(plain, self.residual)
        names = [total.metadata.get("regauge.replaces") or total.name, source.node.name]
        result.producer.metadata["regauge.replaces"] = ", ".join(names)
        name, gone = total.output.name, source.bias
        replace_uses(graph, total.output, result)
        remove_node(graph, total)
        remove_node(graph, source.node)
        build.release([name])
        result.name = build.unique(name)
        settle_successors(graph, build)
        if not gone.uses and graph.parameters.get(gone.name) is gone:
            del graph.parameters[gone.name]
            graph.version += 1
