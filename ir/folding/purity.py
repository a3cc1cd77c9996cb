"""Tells nodes that may be computed once instead of twice, or now instead of later, from those that must stay."""

from __future__ import annotations

from regauge.ir.graph import Node

OPAQUE = frozenset({"torch_call", "onnx_call"})  # what is kept as it is may draw numbers, write, or quantize
RECOMPUTED = "regauge.recomputed"  # in the metadata of a node: which other one it computes again, to save memory
FIXED = "fixed"  # in the metadata of a node: why nothing about it may change
_WHILE_TRAINING = ("training", "dropout", "dropout_p")


def is_fixed(node: Node) -> str | None:
    """Why a node must stay as it is: it is part of the body of a function that other calls share."""
    return node.metadata.get(FIXED)


def is_pure(node: Node) -> bool:
    """Whether equal operands give equal results at every run, whatever else runs; so for all nodes of its regions.

    Nodes that must stay as they are do not count as pure: to merge or to fold them would be to change them. Random
    operators do not either, not even those that rest (dropout of a model in use): they may be trained on.
    """
    if node.operator.random or node.op in OPAQUE or any(node.attributes.get(name) for name in _WHILE_TRAINING):
        return False
    if is_fixed(node):
        return False
    return all(is_pure(inner) for region in node.regions for inner in region.nodes)
