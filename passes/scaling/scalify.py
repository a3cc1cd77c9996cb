"""``scalify``: the whole graph as pairs of data and scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from regauge.ir.dtypes import is_real
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter, Value
from regauge.ir.scales.scaling import node_scaling
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.statistics import Statistics
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option
from regauge.passes.scaling.held import WIDE, Plan
from regauge.passes.scaling.magnitudes import Magnitudes
from regauge.passes.scaling.rewriting import Scaler, is_layer, stays_as_it_is

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FLOAT8 = {"float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True)
class Scalify(Pass):
    """Hold every value as data times a power of two, so that narrow types neither overflow nor underflow.

    before   y = relu(linear(x, w, b)) + x
    after    y' = relu(linear(x, w', b')) + x * 2^-k          y = y' * 2^k, where somebody needs y

    Scales go through the graph by the rules of Scalify (Balança et al. 2024): sums and choices take the greatest
    scale, products multiply, layers divide by the root of what they add up, zeros adopt any. A weight that one layer
    reads is stored at the scale that its result is to have. All scales are powers of two, so that nothing is rounded
    while the type stays as it is. Unlike there, convolutions are scaled as matrix products are, and a root of an odd
    power of two takes a factor of two into the data.

    Where scales are set anew, by ``rescale`` and for float8, norms are measured on data; without data, in training and
    with ``dynamic`` they are taken in every run. In float16 and
    bfloat16, what scales do not go through (exp, softmax, norms) is computed as it was. With float8, operands of layers
    are rounded to it, as in FP8 mixed precision (Noune et al. 2022; AMAX and CSCALE: Perez et al. 2023): weights are
    stored so, and the rest stays as it is. ``gradients`` makes a module to be trained: weights stay as they are and are
    rounded in every run, gradients of layers are scaled and rounded on their way back.
    """

    name: ClassVar[str] = "scalify"
    contract: ClassVar[Contract] = "exact"

    dtype: Literal["float16", "bfloat16", "float8_e4m3", "float8_e5m2"] | None = option(
        None, "what data is held in; as it is if not given, which is exact"
    )
    rescale: Literal["max", "l1", "l2"] | None = option(
        None, "norm brought to 1 behind layers and functions; if not given, l2 in float16 and bfloat16 on data"
    )
    dynamic: bool = option(False, "norms are taken in every run, also where there is data")
    at: tuple[str, ...] = option((), "globs on names of values or modules: norms are brought to 1 only there")
    rule: Literal["amax", "cscale"] = option("amax", "exponents of float8: by the greatest entry, or one for all")
    margin: int | None = option(
        None, "powers of two that amax leaves above the greatest entry; 0 if not given", at_least=0
    )
    bias: int | None = option(None, "the exponent of cscale; 0 if not given")
    gradients: Literal["float8_e4m3", "float8_e5m2"] | None = option(
        None, "to be trained with float8: the type of gradients, best float8_e5m2"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype is not None:
            object.__setattr__(self, "contract", "approximate")
        idle = {
            "margin": self.margin is not None and (self.rule != "amax" or self.dtype not in FLOAT8),
            "bias": self.bias is not None and (self.rule != "cscale" or self.dtype not in FLOAT8),
            "rule": self.rule != "amax" and self.dtype not in FLOAT8,
            "gradients": self.gradients is not None and self.dtype not in FLOAT8,
            "at": bool(self.at) and self.rescale is None and self.dtype not in HALVES,
        }
        for name, unused in idle.items():
            if unused:
                raise PassError(f"scalify: {name} does nothing without {_NEEDED[name]}: leave it out")

    def call(self, graph: Graph, context: Context) -> Graph:
        result = graph.copy()
        plan = self._plan(result, context)
        Scaler(result, plan, context.left, by=self.name).run()
        return result

    def _plan(self, graph: Graph, context: Context) -> Plan:
        narrow = HALVES.get(self.dtype or "")
        float8 = FLOAT8.get(self.dtype or "")
        on_data = context.data is not None and not self.dynamic and self.gradients is None
        norm = self.rescale or ("l2" if narrow is not None and (on_data or self.dynamic) else None)
        places = list(_places(graph, narrow))
        points = frozenset(self._chosen(places) if norm is not None else ())
        operands = _layer_operands(graph) if float8 is not None and self.rule == "amax" else []
        wanted = list(dict.fromkeys([*points, *operands]))
        measured = _measured(graph, wanted, context) if on_data and wanted else {}
        if points:
            where = "on data" if measured else "in every run"
            context.note(f"{len(points)} values are brought to 1 by their {norm} norm, taken {where}")
        return Plan(
            narrow=narrow,
            float8=float8,
            norm=norm or "max",
            points=points,
            measured=measured,
            margin=self.margin or 0,
            bias=(self.bias or 0) if self.rule == "cscale" else None,
            gradients=FLOAT8.get(self.gradients or ""),
        )

    def _chosen(self, places: list[Value]) -> list[Value]:
        if not self.at:
            return places
        check_patterns("at", self.at, [name for value in places for name in _names(value)], what="value or module")
        return [value for value in places if matches(_names(value), self.at)]


_NEEDED = {
    "margin": "rule=amax and a float8 dtype",
    "bias": "rule=cscale and a float8 dtype",
    "rule": "a float8 dtype",
    "gradients": "a float8 dtype",
    "at": "rescale",
}


def _names(value: Value) -> list[str]:
    """The name of a value, and that of the module it is computed in."""
    scope = value.producer.scope if value.producer is not None else ()
    return [value.name, *([scope[-1][0]] if scope and scope[-1][0] else [])]


def _places(graph: Graph, narrow: torch.dtype | None) -> Iterator[Value]:
    """Where scales may be set: inputs, results of layers and what is computed on values as they were."""
    yield from (value for value in graph.inputs if value.dtype in WIDE)
    for node in graph.nodes:
        scaling = node_scaling(node)
        if is_layer(node, scaling) or stays_as_it_is(node, scaling, narrow):
            yield from (value for value in node.outputs if value.dtype in WIDE)


def _layer_operands(graph: Graph) -> list[Value]:
    """The computed operands of layers."""
    found = []
    for node in graph.nodes:
        scaling = node_scaling(node)
        if is_layer(node, scaling):
            slots = {slot for joint in scaling.joints for slot in joint.slots}
            computed = [(slot, value) for slot, value in node.operands() if not isinstance(value, Parameter)]
            found += [value for slot, value in computed if slot in slots]
    return found


def _measured(graph: Graph, values: list[Value], context: Context) -> dict[Value, Magnitudes]:
    batches = calibration_batches(graph, context)
    statistics = Statistics(graph)
    found = {value: statistics.register(value, Magnitudes()) for value in values if is_real(value.dtype)}
    statistics.collect(batches)
    context.note(f"norms taken on {sum(map(examples_in, batches))} examples")
    return found
