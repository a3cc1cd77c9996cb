"""Lists what of an ONNX model Regauge cannot see through, and where, before anything is done with it."""

from __future__ import annotations

import warnings
from typing import Any

from regauge.frontends.examine import KEPT, Finding, rule_findings
from regauge.frontends.from_onnx import OVERRIDABLE, load
from regauge.ir.errors import LoadError, RegaugeWarning
from regauge.ir.graph import Graph


def examine_onnx(source: Any) -> list[Finding]:
    """Findings on an ONNX model: what is kept as it is, initializers that can be overridden, what had to be changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RegaugeWarning)
        try:
            graph = load(source)
        except LoadError as error:
            return [Finding("load", 1, "", str(error), "the model is not loaded")]
    return [*_kept(graph), *rule_findings(graph), *_overridable(graph), *_notes(graph)]


def _kept(graph: Graph) -> list[Finding]:
    places: dict[tuple[str, str], list[str]] = {}
    for _, node in graph.walk():
        if node.op == "onnx_call":
            key = (node.attributes["op_type"], node.attributes["reason"])
            places.setdefault(key, []).append(node.origin.name or node.name)
    return [Finding(op_type, len(found), found[0], reason, KEPT) for (op_type, reason), found in places.items()]


def _overridable(graph: Graph) -> list[Finding]:
    names = list(graph.metadata.get("input_defaults", ()))
    return [Finding("initializer", len(names), names[0], OVERRIDABLE, "it stays an input")] if names else []


def _notes(graph: Graph) -> list[Finding]:
    return [Finding("note", 1, "", note, "the loaded model differs in that") for note in graph.metadata["onnx_notes"]]
