"""Convolutions: groups and channels are free, windows are not; padding of every form becomes numbers per side."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import randn

from cutting import cut_all, free_sizes
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import find_aten
from regauge.ir.running.interpret import run


def network(*shape: int) -> tuple[Graph, Builder, Value]:
    graph = Graph()
    build = Builder(graph)
    return graph, build, build.input("x", shape, torch.float32)


def aten(build: Builder, name: str, *args: object, **kwargs: object) -> Value:
    found = find_aten(name)
    assert found is not None and found[1] is not None
    result = found[1](build, *args, **kwargs)
    assert isinstance(result, Value)
    return result


def test_grouped_convolutions_free_groups_and_channels_per_group() -> None:
    graph, build, x = network(2, 3, 6, 6)
    h = build.conv(x, build.parameter("a", randn(8, 3, 1, 1)), build.parameter("a.bias", randn(8)))
    h = build.conv(h, build.parameter("b", randn(12, 2, 3, 3)), build.parameter("b.bias", randn(12)), groups=4)
    graph.outputs = [build.conv(h, build.parameter("c", randn(5, 12, 1, 1)))]
    small = cut_all(graph, [randn(2, 3, 6, 6)])
    assert free_sizes(graph) == {"a:0.0": 4, "a:0.1": 2, "b:0.1": 3}
    assert small.nodes[1].attributes["groups"] == 2 and small.parameters["b"].shape == (4, 1, 3, 3)


def test_depthwise_channels_are_cut_with_their_groups() -> None:
    graph, build, x = network(2, 3, 6, 6)
    h = build.conv(x, build.parameter("a", randn(8, 3, 1, 1)))
    h = build.conv(h, build.parameter("b", randn(16, 1, 3, 3)), groups=8)
    graph.outputs = [build.conv(h, build.parameter("c", randn(5, 16, 1, 1)))]
    small = cut_all(graph, [randn(2, 3, 6, 6)])
    assert free_sizes(graph) == {"a:0": 8, "b:0.1": 2}
    assert small.nodes[1].attributes["groups"] == 4


def test_transposed_convolutions_store_inputs_first() -> None:
    graph, build, x = network(2, 3, 4, 4)
    h = build.conv(x, build.parameter("a", randn(8, 3, 1, 1)))
    h = build.conv_transpose(h, build.parameter("b", randn(8, 3, 2, 2)), build.parameter("b.bias", randn(6)),
                             stride=(2, 2), groups=2)  # fmt: skip
    graph.outputs = [build.conv(h, build.parameter("c", randn(5, 6, 1, 1)))]
    small = cut_all(graph, [randn(2, 3, 4, 4)])
    assert free_sizes(graph) == {"a:0.0": 2, "a:0.1": 4, "b:1": 3}
    assert small.parameters["b"].shape == (2, 2, 2, 2) and small.nodes[1].attributes["groups"] == 1


def test_a_convolution_over_tokens_with_a_kernel_of_one_leaves_the_channels_free() -> None:
    """gMLP mixes tokens with ``conv1d(kernel_size=1)`` on the transposed sequence: its spatial axis is the width."""
    graph, build, x = network(2, 4, 3)
    h = build.linear(x, build.parameter("a", randn(8, 3)))
    h = build.conv(h, build.parameter("b", randn(4, 4, 1)), build.parameter("b.bias", randn(4)))
    graph.outputs = [build.linear(h, build.parameter("c", randn(5, 8)))]
    cut_all(graph, [randn(2, 4, 3)])
    assert free_sizes(graph) == {"a:0": 8}


def test_a_kernel_that_slides_pins_what_it_slides_over() -> None:
    graph, build, x = network(2, 4, 3)
    h = build.linear(x, build.parameter("a", randn(8, 3)))
    h = build.conv(h, build.parameter("b", randn(4, 4, 3)), padding=(1,))
    graph.outputs = [build.linear(h, build.parameter("c", randn(5, 8)))]
    assert free_sizes(graph) == {}
    assert "slides a window over it" in graph.explain("a:0")


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (4, 1), (2, 3), (1, 1)])
def test_same_padding_may_need_a_pad_before_the_convolution(kernel: int, dilation: int) -> None:
    graph, build, x = network(2, 3, 9)
    weight = build.parameter("w", randn(4, 3, kernel))
    graph.outputs = [aten(build, "conv1d.padding", x, weight, None, [1], "same", [dilation])]
    image = randn(2, 3, 9)
    with warnings.catch_warnings(action="ignore"):  # torch warns that it pads first, too
        expected = F.conv1d(image, weight.tensor, padding="same", dilation=dilation)
    torch.testing.assert_close(run(graph, [image])[0], expected)
    assert [n.op for n in graph.nodes] == (["conv"] if dilation * (kernel - 1) % 2 == 0 else ["pad", "conv"])
    assert graph.nodes[-1].attributes["stride"] == (1,) and isinstance(graph.nodes[-1].attributes["padding"], tuple)


def test_single_numbers_stand_for_every_axis() -> None:
    graph, build, x = network(2, 3, 9, 9)
    h = aten(build, "conv2d.default", x, build.parameter("w", randn(4, 3, 3, 3)), None, [2], [1])
    assert h.producer is not None
    assert h.producer.attributes == {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def test_layers_are_written_as_torch_prints_them() -> None:
    _, build, x = network(2, 4, 9, 9)
    h = build.conv(x, build.parameter("w", randn(8, 2, 3, 3)), stride=(2, 2), padding=(1, 0), groups=2)
    assert h.producer.operator.layer(h.producer) == (
        "nn.Conv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 0), groups=2, bias=False)"
    )
    t = build.conv_transpose(h, build.parameter("v", randn(8, 3, 2, 2)), build.parameter("b", randn(3)), stride=(2, 2))
    assert t.producer.operator.layer(t.producer) == "nn.ConvTranspose2d(8, 3, kernel_size=(2, 2), stride=(2, 2))"


@pytest.mark.parametrize(
    ("op", "weight", "options"),
    [
        ("conv", (6, 2, 3, 3), {"padding": (1, 1), "groups": 2}),
        ("conv_transpose", (4, 3, 3, 3), {"stride": (2, 2), "groups": 2}),
    ],
)
def test_macs_count_every_multiplication_once(op: str, weight: tuple[int, ...], options: dict[str, object]) -> None:
    """Against torch's own counter, which counts two operations per multiplication."""
    from torch.utils.flop_counter import FlopCounterMode

    from regauge.ir.operator import Cost

    _, build, x = network(2, 4, 8, 8)
    h = build(op, x, build.parameter("w", randn(*weight)), **options)
    node = h.producer
    with FlopCounterMode(display=False) as counter:
        node.operator.evaluate(randn(2, 4, 8, 8), randn(*weight), **node.attributes)
    assert 2 * node.operator.macs(Cost(node)) == counter.get_total_flops()
