"""The module hierarchy of an ONNX model: from what exporters note on nodes, from node names, and from weight names.

torch's exporters note the module that a node was called in, but their optimizer merges nodes: a convolution that took
a batch norm in carries the module of the norm, while its weight is named by the convolution. The weight is right.
"""

from __future__ import annotations

import re

import onnx_ir

from regauge.ir.graph import Graph, Node, Parameter
from regauge.ir.onnx_places import noted_scope

Scope = tuple[tuple[str, str], ...]
_MODULE_PATH = re.compile(r"\w+(\.\w+)+")
_WEIGHTS = ("weight", "bias", "mean", "var")


def recorded_scope(node: onnx_ir.Node, *, by_torch: bool) -> Scope:
    """The modules around a node from the root down, as torch's exporters note them; empty where nothing is noted."""
    noted = noted_scope(node.metadata_props)
    if noted is not None:
        return noted
    return _scope_of_name(node.name or "") if by_torch else ()


def _scope_of_name(name: str) -> Scope:
    """``/layer1/layer1.0/conv1/Conv`` of torch's TorchScript exporter as the paths layer1, layer1.0, layer1.0.conv1.

    An element repeats the name of the container it is in: one that begins with the element before it is its child, any
    other (``blocks.0`` of a ModuleList, which nobody calls) belongs to the module around.
    """
    elements = name.split("/")
    if len(elements) < 3 or elements[0]:
        return ()
    paths: list[str] = [""]
    before = ""
    for element in elements[1:-1]:
        inner = element.removeprefix(before + ".") if before else element
        paths.append(f"{paths[-1]}.{inner}" if paths[-1] else inner)
        before = element
    return tuple((path, "") for path in paths)


def place_by_weights(graph: Graph) -> None:
    """Put every layer into the module that its weight is named by, where that is not the module it was noted in."""
    classes = {path: name for _, node in graph.walk() for path, name in node.scope if name}
    for _, node in graph.walk():
        owner = _owner(node)
        if owner is not None and not _is_around(owner, node):
            node.scope = _scope_of_owner(node, owner, classes)


def _owner(node: Node) -> str | None:
    """The module that the weights of a layer are named by; None where they are shared, or named by several modules."""
    if node.operator.layer is None:
        return None
    slots = node.operator.slots
    owners = set()
    for position, operand in node.operands():
        if slots[min(position, len(slots) - 1)] not in _WEIGHTS:
            continue
        if not isinstance(operand, Parameter) or len(operand.consumers()) > 1 or not is_module_path(operand.name):
            return None
        owners.add(operand.name.rpartition(".")[0])
    return owners.pop() if len(owners) == 1 else None


def is_module_path(name: str) -> bool:
    """True for the names torch gives to tensors of modules below the root, such as ``layer1.0.weight``."""
    return _MODULE_PATH.fullmatch(name) is not None


def _is_around(owner: str, node: Node) -> bool:
    """True where a node was noted inside the owner: a weight that a module hands to its child stays with the child."""
    return any(re.sub(r"@\d+", "", path) == owner for path, _ in node.scope)


def _scope_of_owner(node: Node, owner: str, classes: dict[str, str]) -> Scope:
    parts = owner.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    noted = {re.sub(r"@\d+", "", path): path for path, _ in node.scope}  # keeps the number of the call
    assert node.operator.layer is not None
    layer = (node.operator.layer(node) or "").partition("(")[0].removeprefix("nn.")
    inner = [(noted.get(path, path), classes.get(path, "")) for path in paths[:-1]]
    return (("", classes.get("", "")), *inner, (owner, classes.get(owner, layer)))
