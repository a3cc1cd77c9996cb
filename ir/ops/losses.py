"""Losses of classes: what a model is trained by, one number for each label."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, randint, randn

from regauge.ir import scalars
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, operator, sample
from regauge.ir.ops.layout import holds_no_sizes
from regauge.ir.scalars import Scalar

NO_LABEL = -100
"""The label that torch ignores where none is given."""


def _element(x: Scalar, target: Scalar, weight: Scalar | None = None, *, ignore_index: int) -> Scalar:
    """log sum exp(x) - x[target]; the greatest number is taken off both, so that a small loss keeps its digits."""
    classes = (0, -1)
    peak = scalars.shift(x, classes)
    total = scalars.log(scalars.sum_(scalars.exp(x - peak), classes))
    own = scalars.sum_(scalars.where(scalars.eq(scalars.index(classes), target), x, 0.0), classes)
    loss = total - (own - peak)
    if weight is not None:
        loss = scalars.picked(weight, 0, target) * loss
    return scalars.where(scalars.eq(target, float(ignore_index)), 0.0, loss)


def _classes_last(build: Builder, x: Value) -> Value:
    """Of [n, classes, ...] the classes as the last axis; they are that already of one row, and of rows."""
    return x if x.rank <= 2 else build.permute(x, dims=(0, *range(2, x.rank), 1))


_REDUCTIONS = ("none", "mean", "sum")


def _cross_entropy_loss(
    build: Builder, x: Value, target: Value, weight: Value | None = None, reduction: int = 1,
    ignore_index: int = NO_LABEL, label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    if isinstance(target.dtype, torch.dtype) and target.dtype.is_floating_point:
        return _of_probabilities(build, x, target, weight, _REDUCTIONS[reduction], label_smoothing)
    x = _classes_last(build, x)
    losses = build.cross_entropy(x, target, weight, ignore_index=ignore_index)
    if label_smoothing:
        spread = build.where(build.ne(target, ignore_index), _of_each_class(build, x, weight), 0.0)
        losses = build.add(build.mul(losses, 1.0 - label_smoothing), build.mul(spread, label_smoothing))
    return reduced(build, losses, target, weight, _REDUCTIONS[reduction], ignore_index)


def _of_each_class(build: Builder, x: Value, weight: Value | None) -> Value:
    """The mean of the losses of all labels that there could be (Szegedy et al. 2016, section 7)."""
    classes = (x.rank - 1,)
    if weight is None:
        return build.sub(build.logsumexp(x, dims=classes), build.mean(x, dims=classes))  # type: ignore[no-any-return]
    parts = build.mul(build.log_softmax(x, dim=x.rank - 1), weight)
    return build.neg(build.mean(parts, dims=classes))  # type: ignore[no-any-return]


def reduced(build: Builder, losses: Value, target: Value, weight: Value | None, way: str, ignore_index: int) -> Any:
    """The sum of losses, or their mean: over all labels but the ignored ones, by the weight of each where classes have
    weights."""
    if way == "none":
        return losses
    total = build.sum(losses, dims=None)
    if way == "sum":
        return total
    there = build.ne(target, ignore_index)
    if weight is None:
        counted = build.cast(there, dtype=losses.dtype)
    else:
        own = build.index_select(weight, build.where(there, target, 0), dim=0)
        counted = build.where(there, own, 0.0)
    return build.div(total, build.sum(counted, dims=None))


def _of_probabilities(
    build: Builder, x: Value, target: Value, weight: Value | None, way: str, label_smoothing: float
) -> Any:
    """Labels that are a probability of each class."""
    x, target = _classes_last(build, x), _classes_last(build, target)
    if label_smoothing:
        share = label_smoothing / x.shape[-1]
        target = build.add(build.mul(target, 1.0 - label_smoothing), share)
    target = target if weight is None else build.mul(target, weight)
    parts = build.mul(build.log_softmax(x, dim=x.rank - 1), target)
    losses = build.neg(build.sum(parts, dims=(x.rank - 1,)))
    if way == "none":
        return losses
    total = build.sum(losses, dims=None)
    if way == "sum" or x.rank == 1:
        return total
    rows = losses.shape[0]
    for size in losses.shape[1:]:
        rows = rows * size
    return build.div(total, rows)


def _onnx_loss(build: Builder, call: Any) -> Any:
    """SoftmaxCrossEntropyLoss(scores, labels, weights); its second result is what the first is read from."""
    x, target, weight = call.operand(0), call.operand(1), call.operand(2) if call.has(2) else None
    ignored, way = call.attribute("ignore_index"), call.attribute("reduction", "mean")
    way = way.decode() if isinstance(way, bytes) else way
    ignored = torch.iinfo(torch.int64).min if ignored is None else int(ignored)
    target = target if target.dtype == torch.int64 else build.cast(target, dtype=torch.int64)
    losses = build.cross_entropy(_classes_last(build, x), target, weight, ignore_index=ignored)
    loss = reduced(build, losses, target, weight, way, ignored)
    return (loss, build.log_softmax(x, dim=1)) if call.wanted(1) else loss


def _spell(onnx: Any, node: Node) -> Any:
    """Written out: runtimes for inference have no kernel of SoftmaxCrossEntropyLoss."""
    target, weight = onnx.operand(1), onnx.operand(2) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    ignored = node.attributes["ignore_index"]
    dtype = node.outputs[0].dtype
    rank = node.inputs[0].rank  # type: ignore[union-attr]
    below = onnx.LogSoftmax(onnx.operand(0), axis=rank - 1)
    gone = onnx.Equal(target, onnx.constant(torch.tensor(ignored)))
    there = onnx.Where(gone, onnx.constant(torch.tensor(0)), target)
    own = onnx.GatherElements(below, onnx.unsqueeze(there, rank - 1), axis=rank - 1)
    loss = onnx.Neg(onnx.squeeze(own, rank - 1))
    if weight is not None:
        loss = onnx.Mul(onnx.Gather(weight, there, axis=0), loss)
    return onnx.Where(gone, onnx.constant(torch.tensor(0.0), dtype), loss)


@operator(
    rule="a... c, a..., c? -> a... ; indexed c",
    aten={"cross_entropy_loss": _cross_entropy_loss},
    onnx={"SoftmaxCrossEntropyLoss": OnnxForm(read=_onnx_loss, write=holds_no_sizes)},
    element=_element,
    spell=_spell,
    samples=lambda: [
        sample(randn(3, 5), torch.tensor([4, 0, -100])),
        sample(randn(2, 3, 5), randint(0, 5, (2, 3)), torch.rand(5) + 0.5, ignore_index=1),
        sample(randn(4, 6), torch.tensor([5, -100, 2, 0]), torch.rand(6) + 0.5),
        sample(randn(7), torch.tensor(3)),
    ],
    macs=lambda call: call.count(0),
)
def cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int = -100) -> Tensor:
    """The loss of each label, zero of an ignored one; classes are the last axis of ``x``."""
    there = target != ignore_index
    labels = torch.where(there, target, 0)
    # Not F.cross_entropy: below autograd torch 2.13 takes losses of a dynamic number of rows for one number.
    losses = -F.log_softmax(x, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if weight is not None:
        losses = losses * weight.take(labels)
    return torch.where(there, losses, 0.0)
