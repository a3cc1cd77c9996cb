"""Modules through torch's exporters and back, and how many whole operators ``simplify`` finds in them."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

import regauge
from regauge.ir.graph import Graph
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, rewrite_graph
from regauge.ir.running.interpret import run
from regauge.ir.verify import verify
from regauge.passes.simplify.simplify import Simplify

# Raw exports have an Identity for each clone, and casts to the type that is there; what removes them is none of the
# rules that put operators together.
_NOTHING = RuleSet(
    [
        RewriteRule("identity", lambda op, x: op.identity(x), lambda build, x: x),
        RewriteRule(
            "same-type", lambda op, x, t: op.cast(x, dtype=t), lambda build, x: x, where=lambda x, t: x.dtype == t
        ),
    ]
)

WAYS: dict[str, dict[str, Any]] = {
    "dynamo": {"dynamo": True},
    "raw": {"dynamo": True, "optimize": False},
    "script13": {"dynamo": False, "opset_version": 13},
    "script17": {"dynamo": False, "opset_version": 17},
}
"""The ways in which torch writes ONNX: two exporters, one of them with and without its optimizer."""


def exported(module: nn.Module, inputs: tuple[torch.Tensor, ...], way: str, folder: Path) -> Graph:
    """The module as an ONNX file, loaded."""
    path = folder / f"{way}.onnx"
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(module.eval(), inputs, str(path), verbose=False, **WAYS[way])
            return regauge.load(path)
    finally:
        logging.disable(logging.NOTSET)


def assembled(graph: Graph, inputs: tuple[torch.Tensor, ...], *, tolerance: float = 1e-5) -> Graph:
    """The graph after ``simplify``, checked: valid, the same results, and nothing left to do."""
    plain = graph.copy()
    rewrite_graph(plain, _NOTHING)
    result = regauge.optimize(plain, [Simplify(assemble="always")])
    verify(result)
    for a, b in zip(run(result, list(inputs)), run(graph, list(inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    again = regauge.optimize(result, [Simplify(assemble="always")])
    assert [node.op for node in again.nodes] == [node.op for node in result.nodes]
    return result


def counts(graph: Graph, *ops: str) -> dict[str, int]:
    """How many nodes of each operator there are."""
    found = Counter(node.op for _, node in graph.walk())
    return {op: found[op] for op in ops} if ops else dict(found)
