"""What layers lose on data by another weight, as factors, shared weights and latents are fitted to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, matrices_of
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import Quadratic, change_of_output, least_error, least_through

RIDGE = 1e-4  # share of the mean square of a column
ENOUGH_ROWS = 8  # for each column: with less data, weights would be fitted to it rather than to the layer


def errors_of(layer: Layer, moments: Sequence[Moments]) -> list[Quadratic]:
    """Of each block the error against the targets that its moments have.

    Without targets, or with less data than weights could be fitted to, it is the change of the layer's own output.
    """
    free, found = _is_free(layer), []
    for own, weight, bias in zip(moments, matrices_of(layer), _biases(layer), strict=True):
        enough = own.outputs > 0 and own.rows >= ENOUGH_ROWS * layer.columns
        solve = least_error if enough else change_of_output
        found.append(solve(own, weight, bias, RIDGE, free=free))
    return found


def fit_through(layer: Layer, moments: Moments, rows: torch.Tensor) -> tuple[torch.Tensor, Quadratic]:
    """Of a layer of one block the U with which U ``rows`` [rank, columns] gives most of the targets in its moments.

    With less data than U could be fitted to, it is what gives most of the layer's own output.
    """
    scarce = moments.rows < ENOUGH_ROWS * len(rows)
    return least_through(moments, matrices_of(layer)[0], _biases(layer)[0], rows, free=_is_free(layer), own=scarce)


def set_matrices(graph: Graph, layer: Layer, matrices: torch.Tensor, errors: Sequence[Quadratic], *, by: str) -> None:
    """Give a layer matrices [blocks, outputs, columns], and the best bias beside them where it can take a constant."""
    if _is_free(layer):
        wanted = torch.cat([own.bias(matrix) for own, matrix in zip(errors, matrices, strict=True)])
        shifted = layer.shifted(wanted - _biases(layer).flatten())
        if shifted is not None:
            set_weight(graph, *shifted, by=by)
    set_weight(graph, layer.weight, layer.from_matrices(matrices), by=by)


def _biases(layer: Layer) -> torch.Tensor:
    """[blocks, outputs]"""
    if layer.bias is None:
        return torch.zeros(layer.blocks, layer.outputs, dtype=torch.float64)
    return layer.bias.tensor.detach().double().reshape(layer.blocks, layer.outputs)


def _is_free(layer: Layer) -> bool:
    """Whether a constant can be added to what the layer gives."""
    return layer.bias is not None or layer.norm is not None
