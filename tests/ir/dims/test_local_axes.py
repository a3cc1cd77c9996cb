"""The axes of one node by itself: where a vector over an axis of a result or an operand stands along a weight."""

import torch

from regauge.ir.dims.extents import Product
from regauge.ir.dims.local_axes import LocalAxes, lay_along
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Node


def grouped_convolution() -> tuple[Builder, Node]:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4, 5), torch.float64)
    y = build.conv(x, build.parameter("w", torch.zeros(6, 2, 3).double()), groups=2)
    return build, y.producer


def test_channels_of_a_grouped_convolution_are_laid_along_its_weight() -> None:
    _, conv = grouped_convolution()
    axes = LocalAxes(conv)
    outputs = axes.spread(1, axes.results[0][1])
    inputs = axes.spread(1, axes.operands[0][1])
    assert outputs is not None and inputs is not None
    assert outputs(torch.arange(6.0)).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    laid = inputs(torch.arange(4.0))
    assert laid.shape == (6, 2, 1) and laid[:, :, 0].tolist() == [[0, 1]] * 3 + [[2, 3]] * 3
    assert axes.spread(1, axes.operands[0][2]) is None  # a spatial axis is none of the weight


def test_axes_are_followed_through_the_node_behind() -> None:
    """Two heads of three channels: a vector over the second factor is repeated along the first."""
    build, conv = grouped_convolution()
    split = build.reshape(conv.output, shape=(2, 2, 3, 3)).producer
    axes = LocalAxes(conv)
    behind = LocalAxes(split, {0: axes.results[0]}).results[0]
    channel = axes.results[0][1]
    inner, both = lay_along([channel], behind[2]), lay_along([channel], Product([behind[2], behind[1]]))
    assert inner is not None and both is not None
    assert inner(torch.tensor([7.0, 8.0, 9.0])).tolist() == [7, 8, 9, 7, 8, 9]
    assert both(torch.arange(6.0)).tolist() == [0, 2, 4, 1, 3, 5]
    assert lay_along([channel], behind[3]) is None


def test_factors_that_cut_across_groups_are_laid_nowhere() -> None:
    build, conv = grouped_convolution()
    split = build.reshape(conv.output, shape=(2, 3, 2, 3)).producer
    axes = LocalAxes(conv)
    behind = LocalAxes(split, {0: axes.results[0]}).results[0]
    assert lay_along([axes.results[0][1]], behind[2]) is None
