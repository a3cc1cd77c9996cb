"""Regauge: a compiler for neural networks that already exist.

    graph = regauge.capture(model, (images,))           # or regauge.load("model.onnx")
    small = regauge.optimize(graph, "prune{ratio=0.5}")
    small.to_torch()                                    # or small.to_onnx("small.onnx")

Everything public is listed here and loaded on first use: ``import regauge`` imports none of the libraries it stands on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from regauge.optimize import optimize as optimize

if TYPE_CHECKING:
    from regauge import settings as settings
    from regauge import sparse as sparse
    from regauge import training as training
    from regauge.backends.compare import Comparison as Comparison
    from regauge.backends.compare import compare as compare
    from regauge.backends.torch_module.lower import lower as lower
    from regauge.frontends.capture import capture as capture
    from regauge.frontends.examine import examine as examine
    from regauge.frontends.from_onnx import load as load
    from regauge.ir import scalars as scalars
    from regauge.ir.dims.resize import resize as resize
    from regauge.ir.edit import Builder as Builder
    from regauge.ir.errors import RegaugeError as RegaugeError
    from regauge.ir.errors import RegaugeWarning as RegaugeWarning
    from regauge.ir.graph import Graph as Graph
    from regauge.ir.laws.operators import check_operator as check_operator
    from regauge.ir.operator import OnnxForm as OnnxForm
    from regauge.ir.operator import Operator as Operator
    from regauge.ir.operator import Symmetry as Symmetry
    from regauge.ir.operator import operator as operator
    from regauge.ir.operator import register_operator as register_operator
    from regauge.ir.operator import sample as sample
    from regauge.ir.rewriting.rewrite import RewriteRule as RewriteRule
    from regauge.ir.rewriting.rewrite import RuleSet as RuleSet
    from regauge.ir.rewriting.rewrite import refuse as refuse
    from regauge.ir.scales.scaling import Scaling as Scaling
    from regauge.ir.states import Steps as Steps
    from regauge.passes.base import Context as Context
    from regauge.passes.base import Pass as Pass
    from regauge.passes.bisect import bisect as bisect
    from regauge.passes.elastic.elastic import elastic as elastic
    from regauge.passes.merging.matching import align as align
    from regauge.passes.merging.merge import merge as merge
    from regauge.passes.merging.stitch import stitch as stitch
    from regauge.passes.options import option as option
    from regauge.passes.rewriting import rewrite as rewrite
    from regauge.passes.streaming.signals import run_stream as run_stream

_HOME = {
    "Builder": "regauge.ir.edit",
    "Comparison": "regauge.backends.compare",
    "Context": "regauge.passes.base",
    "Graph": "regauge.ir.graph",
    "OnnxForm": "regauge.ir.operator",
    "Operator": "regauge.ir.operator",
    "Pass": "regauge.passes.base",
    "RegaugeError": "regauge.ir.errors",
    "RegaugeWarning": "regauge.ir.errors",
    "RewriteRule": "regauge.ir.rewriting.rewrite",
    "RuleSet": "regauge.ir.rewriting.rewrite",
    "Scaling": "regauge.ir.scales.scaling",
    "Steps": "regauge.ir.states",
    "Symmetry": "regauge.ir.operator",
    "align": "regauge.passes.merging.matching",
    "bisect": "regauge.passes.bisect",
    "capture": "regauge.frontends.capture",
    "check_operator": "regauge.ir.laws.operators",
    "compare": "regauge.backends.compare",
    "elastic": "regauge.passes.elastic.elastic",
    "examine": "regauge.frontends.examine",
    "load": "regauge.frontends.from_onnx",
    "lower": "regauge.backends.torch_module.lower",
    "merge": "regauge.passes.merging.merge",
    "operator": "regauge.ir.operator",
    "option": "regauge.passes.options",
    "refuse": "regauge.ir.rewriting.rewrite",
    "register_operator": "regauge.ir.operator",
    "resize": "regauge.ir.dims.resize",
    "rewrite": "regauge.passes.rewriting",
    "run_stream": "regauge.passes.streaming.signals",
    "sample": "regauge.ir.operator",
    "scalars": "regauge.ir.scalars",
    "settings": "regauge.settings",
    "sparse": "regauge.sparse",
    "stitch": "regauge.passes.merging.stitch",
    "training": "regauge.training",
}

_MODULES = {"scalars", "settings", "sparse", "training"}  # of the others, the home has a name in it

__version__ = "0.1.0"
__all__ = ["__version__", "optimize", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'regauge' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    found = module if name in _MODULES else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
