"""The modules around a node as torch's ONNX exporter notes them on it: read by the frontend, written by the backend."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from regauge.ir.graph import Node

if TYPE_CHECKING:
    import onnx_ir

PATHS = "pkg.torch.onnx.name_scopes"
CLASSES = "pkg.torch.onnx.class_hierarchy"


def noted_scope(notes: Mapping[str, str]) -> tuple[tuple[str, str], ...] | None:
    """Path and class of each module from the root down; None where nothing is noted, () where it cannot be read."""
    paths, classes = notes.get(PATHS), notes.get(CLASSES)
    if not paths or not classes:
        return None
    try:
        pairs = list(zip(_listed(paths), _listed(classes), strict=True))
    except (ValueError, SyntaxError):
        return ()
    return tuple((str(path), str(name).rpartition(".")[2]) for path, name in pairs[:-1])


def says_places(nodes: Iterable[onnx_ir.Node]) -> bool:
    """Whether a file tells of any node where it is: by notes, or by a name as torch's older exporter gives it.

    In any other file places are guessed by the names of weights, and would be again.
    """
    return any(PATHS in node.metadata_props or (node.name or "").startswith("/") for node in nodes)


def scope_notes(node: Node) -> dict[str, str]:
    """What ``noted_scope`` reads the scope of a node from; the last entry of a list is the node itself, as torch's."""
    if not node.scope:
        return {}
    paths, classes = zip(*node.scope, strict=True)
    return {PATHS: str([*paths, node.name]), CLASSES: str([*classes, node.op])}


def _listed(text: str) -> list[Any]:
    """A list of texts as Python shows it."""
    if text.startswith("['") and text.endswith("']") and "\\" not in text and '"' not in text:
        return text[2:-2].split("', '")
    found: list[Any] = ast.literal_eval(text)
    return found
