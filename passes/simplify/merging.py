"""Equal nodes are computed once, and equal weights kept once.

What two outputs are stays two values; random, training and opaque nodes are not merged, however equal they look.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.dtypes import is_real
from regauge.ir.edit import remove_node, replace_uses, tie
from regauge.ir.folding.purity import RECOMPUTED, is_pure
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.storage.weights import sampled_bytes
from regauge.passes.simplify.limits import Limits, held_values, scopes

# -- nodes -------------------------------------------------------------------------------------------------------------


def merge_equal_nodes(graph: Graph, limits: Limits) -> int:
    """Of nodes with the same operator, operands and attributes in one scope keep the first; returns how many went."""
    return sum(_merge_scope(owner) for owner, _ in scopes(graph))


def _merge_scope(graph: Graph) -> int:
    held, count = held_values(graph), 0
    first: dict[Hashable, Node] = {}
    for node in list(graph.nodes):
        key = _key(node)
        if key is None:
            continue
        kept = first.setdefault(key, node)
        if kept is not node and _merge(graph, kept, node, held):
            count += 1
    return count


def _key(node: Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for those that are never merged."""
    if node.regions or not node.outputs or not is_pure(node) or RECOMPUTED in node.metadata:
        return None
    operands = [_operand_key(operand) for operand in node.inputs]
    if node.operator.commutative:
        operands.sort(key=repr)
    attributes = tuple((name, type(value).__name__, repr(value), value) for name, value in node.attributes.items())
    key = (node.op, tuple(operands), attributes, tuple(value.dtype for value in node.outputs))
    try:
        hash(key)
    except TypeError:  # an attribute that is no plain value
        return None
    return key


def _operand_key(operand: Any) -> Hashable:
    if isinstance(operand, Value):
        return "value", id(operand)
    return type(operand).__name__, repr(operand)  # 1, 1.0 and True are no equal operands, nor 0.0 and -0.0


def _merge(graph: Graph, kept: Node, node: Node, held: set[Value]) -> bool:
    pairs = list(zip(kept.outputs, node.outputs, strict=True))
    if any(a in held and b in held for a, b in pairs):
        return False
    for a, b in pairs:
        replace_uses(graph, b, a)
    remove_node(graph, node)
    for a, b in pairs:
        if b in held:
            a.name = b.name
            held.add(a)
    return True


# -- weights -----------------------------------------------------------------------------------------------------------


def tie_equal_weights(graph: Graph, limits: Limits) -> int:
    """Of weights with the same type, shape and bytes keep the first; returns how many went.

    Two sorts are tied only where the limits say so: trained weights of torch graphs, which training would tell apart,
    and vectors, which cost little and are often equal by chance (zeros), while tied axes are cut together.
    """
    loaded = "onnx" in graph.metadata
    return sum(_tie_scope(owner, limits, loaded) for owner, _ in scopes(graph))


def _tie_scope(graph: Graph, limits: Limits, loaded: bool) -> int:
    held, count = held_values(graph), 0
    alike: dict[Hashable, list[Parameter]] = {}
    for parameter in graph.parameters.values():
        if parameter not in held and parameter.uses and _may_be_tied(parameter, limits, loaded):
            kind = (parameter.dtype, parameter.weight.shape, parameter.kind, parameter.trainable)
            alike.setdefault(kind, []).append(parameter)
    for group in alike.values():
        for candidates in _sampled_alike(group):
            count += _tie_equal(graph, candidates)
    return count


def _sampled_alike(group: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """Those of several weights that a few of their bytes do not tell apart; only these are worth reading whole."""
    found: dict[bytes, list[Parameter]] = {}
    for parameter in group if len(group) > 1 else ():
        found.setdefault(sampled_bytes(_bytes_of(parameter)), []).append(parameter)
    yield from (candidates for candidates in found.values() if len(candidates) > 1)


def _may_be_tied(parameter: Parameter, limits: Limits, loaded: bool) -> bool:
    if not isinstance(parameter.dtype, torch.dtype) or parameter.kind == "buffer":
        return False
    if limits.tie_trained:
        return True
    vector = is_real(parameter.dtype) and sum(size != 1 for size in parameter.weight.shape) == 1
    return not vector and (parameter.kind == "constant" or loaded)


def _tie_equal(graph: Graph, group: Iterable[Parameter]) -> int:
    first: dict[bytes, Parameter] = {}
    count = 0
    for parameter in group:
        kept = first.setdefault(fingerprint(parameter), parameter)
        if kept is not parameter:
            tie(graph, kept, parameter)
            count += 1
    return count


def fingerprint(parameter: Parameter) -> bytes:
    """A hash of the bytes of a weight, which is read and dropped again."""
    return hashlib.blake2b(_bytes_of(parameter).data, digest_size=16).digest()


def _bytes_of(parameter: Parameter) -> np.ndarray:
    tensor = parameter.tensor.detach().cpu().contiguous().reshape(-1)
    if tensor.numel() == 1:  # torch calls it contiguous whatever its stride is, and then cannot view its bytes
        tensor = tensor.clone().as_strided((1,), (1,))
    return tensor.view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def same_bytes(a: Parameter, b: Parameter) -> bool:
    if a is b:
        return True
    alike = a.dtype == b.dtype and a.weight.shape == b.weight.shape and isinstance(a.dtype, torch.dtype)
    return alike and fingerprint(a) == fingerprint(b)
