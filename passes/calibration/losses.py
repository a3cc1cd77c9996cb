"""Losses that gradient-based scores differentiate: the user's own, cross-entropy where batches have labels, or neither.

Without labels the outputs themselves are the measure. Scores that square gradients take v'y with v normal, whose
squared gradients are those of |y - y0|^2 (:mod:`regauge.passes.calibration.gradients`); all others take |y|^2 / 2,
since the mean of v'y over draws is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import LABELS, inputs_of
from regauge.passes.base import Context
from regauge.passes.calibration.batches import part_of

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""``loss(outputs, batch)``: of the graph's outputs (one tensor where there is one) and a batch as the data gives it."""


class Labelled(NamedTuple):
    """A batch: what the graph is run on, what the data holds beside that, and all of it as it was given."""

    inputs: Any
    labels: Any
    given: Any


def labelled_batches(graph: Graph, context: Context) -> list[Labelled]:
    """The batches of a pass's data, each :func:`labelled`; the report notes inputs brought to another type."""
    return [labelled(graph, batch, context) for batch in context.batches()]


def labelled(graph: Graph, batch: Any, context: Context | None = None) -> Labelled:
    """A batch taken apart: labels are what a tuple holds behind the inputs, or ``labels`` of a mapping."""
    context = Context() if context is None else context
    if isinstance(batch, Mapping):
        names = {value.name for value in graph.inputs}
        labels = next((batch[name] for name in LABELS if name in batch and name not in names), None)
        return Labelled(context.taken(graph, batch), labels, batch)
    inputs = inputs_of(graph, batch)
    behind = tuple(batch)[len(inputs) :]
    return Labelled(context.taken(graph, inputs), behind[0] if behind else None, batch)


def example_slices(batch: Labelled, examples: int) -> list[Labelled]:
    """The examples of a batch, each a batch of one: tensors of that many rows are cut, all else is shared."""
    places = [slice(place, place + 1) for place in range(examples)]
    return [Labelled(*(part_of(part, place, examples) for part in batch)) for place in places]


def loss_of(
    outputs: Sequence[Any], batch: Labelled, own: Loss | None, *, squared: bool, generator: torch.Generator
) -> torch.Tensor | None:
    """The loss of a batch, the mean over its examples; None where no output is a real number that weights move.

    Raises PassError where a loss of one's own gives no number.
    """
    real = [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]
    if own is not None:
        found = own(outputs[0] if len(outputs) == 1 else list(outputs), batch.given)
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            raise PassError("loss must give one number, a tensor without axes: loss(outputs, batch)")
        return found.reshape(()) if found.requires_grad else None
    moved = [y for y in real if y.requires_grad]
    if not moved:
        return None
    if are_logits(real[0], batch.labels):
        classes = 1 if real[0].dim() == 2 else real[0].dim() - 1
        return F.cross_entropy(real[0].movedim(classes, 1), batch.labels)
    examples = max(1, int(moved[0].shape[0]) if moved[0].dim() else 1)
    if squared:
        parts = [(y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in moved]
    else:
        parts = [0.5 * y.square().sum() for y in moved]
    return torch.stack([part.double() for part in parts]).sum() / (1 if squared else examples)


def are_logits(y: torch.Tensor, labels: Any) -> bool:
    """Whether labels are class numbers for the last axis of the first output."""
    if not isinstance(labels, torch.Tensor) or labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        return False
    fits = y.dim() >= 2 and tuple(labels.shape) == tuple(y.shape[:-1])
    return fits and bool(labels.numel()) and int(labels.max()) < y.shape[-1]
