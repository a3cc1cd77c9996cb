"""A sample of a layer's rows: what least squares needs of large images, without writing out every patch of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from regauge.ir.ops.windows import per_axis
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments


def add_sample(
    found: Moments, layer: Layer, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], rows: int
) -> None:
    """Add at most about ``rows`` rows of inputs and wanted outputs to ``found``, drawn over all batches alike.

    The draw is the same for the same number of rows.
    """
    totals = [y.numel() // layer.outputs for y in outputs]
    for x, y, total in zip(inputs, outputs, totals, strict=True):
        wanted = min(total, -(-rows * total // max(1, sum(totals))))
        if wanted == total:
            found.add(layer.rows_of_input(x), layer.rows_of_output(y))
            continue
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(total))[:wanted].sort().values
        found.add(_rows_at(layer, x, y, drawn), layer.rows_of_output(y)[drawn])


def _rows_at(layer: Layer, x: torch.Tensor, y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The rows of the input for some rows of the output; of a convolution only their patches are made."""
    if layer.node.op != "conv":
        return layer.rows_of_input(x)[places]
    node, rank = layer.node, layer.weight.rank - 2
    stride, padding, dilation = (per_axis(node.attributes[n], rank) for n in ("stride", "padding", "dilation"))
    x = F.pad(x, [side for amount in reversed(padding) for side in (amount, amount)])
    for axis, size in enumerate(layer.weight.shape[2:]):
        x = x.unfold(2 + axis, dilation[axis] * (int(size) - 1) + 1, stride[axis])[..., :: dilation[axis]]
    found = torch.unravel_index(places, (len(x), *x.shape[2 : 2 + rank]))
    return x.movedim(1, 1 + rank)[found].flatten(1)
