"""``examine``: what is unsupported in a model and where it was called, before anything is converted.

for finding in examine(model, (images,)):
    print(finding)        # aten.special_i0.default (2x), first at net.py:31 in forward: it has no operator record; ...
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regauge.frontends.capture import import_traced, trace_program
from regauge.ir.errors import CaptureError, RegaugeError, RegaugeWarning
from regauge.ir.graph import Graph

KEPT = "it is kept as it is; the axes it touches are not cut"


@dataclass(frozen=True)
class Finding:
    """One kind of thing that is not fully supported: how often, where first, why, and what happens with it."""

    operator: str
    count: int
    source: str
    reason: str
    effect: str

    def __str__(self) -> str:
        place = f", first at {self.source}" if self.source else ""
        return f"{self.operator} ({self.count}x){place}: {self.reason}; {self.effect}"


def examine(obj: Any, example_inputs: Any = None, kwargs: Mapping[str, Any] | None = None) -> list[Finding]:
    """List what is unsupported in a torch module, ExportedProgram or ONNX model (path, ModelProto or onnx_ir model).

    An empty list means that everything has an operator record whose axis rule fits. A model that cannot be captured at
    all gives one finding that says so.
    """
    if _is_onnx(obj):
        return list(importlib.import_module("regauge.frontends.examine_onnx").examine_onnx(obj))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RegaugeWarning)
        try:
            traced = trace_program(obj, example_inputs, kwargs)
            imported = import_traced(traced)
        except RegaugeError as error:
            if not isinstance(error, CaptureError):
                raise
            return [Finding("capture", 1, "", str(error), "the model is not captured")]
    reasons = {refusal.operator: refusal.reason for refusal in reversed(imported.trail.refusals)}
    findings = [*opaque_findings(imported.graph, reasons), *rule_findings(imported.graph)]
    findings += [
        Finding("input", 1, "", str(w.message), "the graph is less general than asked for") for w in _ours(caught)
    ]
    return findings


def _is_onnx(obj: Any) -> bool:
    return isinstance(obj, str | Path) or type(obj).__module__.partition(".")[0] in ("onnx", "onnx_ir")


def _ours(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    return [w for w in caught if issubclass(w.category, RegaugeWarning)]


def opaque_findings(graph: Graph, reasons: Mapping[str, str]) -> list[Finding]:
    """One finding per operator that stayed opaque; ``reasons`` says why, by the path of the operator."""
    sources: dict[str, list[str]] = {}
    for _, node in graph.walk():
        if node.op == "torch_call":
            sources.setdefault(node.attributes["target"], []).append(node.source)
    return [
        Finding(target, len(found), found[0], reasons.get(target, "it has no operator record"), KEPT)
        for target, found in sources.items()
    ]


def rule_findings(graph: Graph) -> list[Finding]:
    """Nodes whose axis rule did not fit them."""
    return [Finding("axis rule", 1, "", problem, KEPT) for problem in graph.axes.problems]
