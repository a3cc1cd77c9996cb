"""What BatchNorms say of channels: their gains, and what they scale the rows of the weight before them by.

A network scores alike before and after BatchNorms are folded: rows of a weight count as the norm behind it scales them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from regauge.ir.dims.extents import leaves
from regauge.ir.dims.groups import Group
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.batch_norms import gain_of
from regauge.passes.pruning.scores import Axis, Scores, accumulate

_WEIGHT_AXIS = {"conv": (1, 0), "linear": (1, 0), "matmul": (1, -1)}  # operand and axis of a layer's output channels


def batch_norm_scales(graph: Graph) -> dict[Axis, np.ndarray]:
    """|gamma| / sqrt(var + eps) for the output axis of each weight whose result a BatchNorm alone reads."""
    scales: dict[Axis, np.ndarray] = {}
    for node in graph.nodes:
        axis = _normalised_weight(node)
        if axis is None:
            continue
        scales[axis] = gain_of(node).abs().cpu().numpy()
    return scales


def _normalised_weight(node: Node) -> Axis | None:
    """The weight axis whose rows a BatchNorm scales, where the result is the same as folding it into the weight."""
    if node.op != "batch_norm" or node.attributes.get("training") or len(node.inputs) < 5:
        return None
    x, gain, variance = node.inputs[0], node.inputs[1], node.inputs[4]
    if not isinstance(variance, Parameter) or not (gain is None or isinstance(gain, Parameter)):
        return None
    if not isinstance(x, Value) or x.producer is None or len(x.uses) != 1 or x.producer.op not in _WEIGHT_AXIS:
        return None
    operand, axis = _WEIGHT_AXIS[x.producer.op]
    weight = x.producer.inputs[operand]
    if not isinstance(weight, Parameter) or len(weight.uses) != 1 or weight.rank < 2:
        return None
    axis %= weight.rank
    return (weight, axis) if weight.shape[axis] == variance.shape[0] else None


def _vector(parameter: object) -> np.ndarray:
    assert isinstance(parameter, Parameter)
    return parameter.tensor.detach().cpu().double().numpy()


def batch_norm_gains(graph: Graph, groups: Sequence[Group]) -> Scores:
    """Sums of |gamma| over the BatchNorms of each Dim that has one."""
    wanted = {group.dim for group in groups}
    totals: Scores = {}
    for _, node in graph.walk():
        gain = node.inputs[1] if node.op == "batch_norm" and len(node.inputs) > 1 else None
        if not isinstance(gain, Parameter):
            continue
        extent = graph.axes.of[gain][0]
        sums = {dim: np.zeros(int(dim.size)) for dim in leaves(extent) if dim in wanted}
        accumulate(extent, np.abs(_vector(gain)), sums)
        for dim, values in sums.items():
            totals[dim] = totals.get(dim, 0) + values
    return totals
