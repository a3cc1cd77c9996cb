"""Random small networks for property tests: convolutions, skips, concatenations, shuffles, gates, attention, tying.

Weights are float64 and drawn so that every path matters; each value occurs once, so that what a pass kept can be read
off the values themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value

SIDE = 4  # of the images, in pixels


class Drawn:
    """A network in the making: the values that later layers may read, by number of channels."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.graph = Graph("random")
        self.build = Builder(self.graph)
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
        self.count = 0
        self.maps: list[Value] = []

    def weight(self, *shape: int, positive: bool = False) -> Value:
        self.count += 1
        fan_in = max(1, torch.Size(shape).numel() // shape[0])
        tensor = torch.randn(shape, generator=self.generator, dtype=torch.float64) * 1.3 / fan_in**0.5
        return self.build.parameter(f"p{self.count}", tensor.abs() + 0.1 if positive else tensor)

    def choose(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def any_map(self) -> Value:
        return self.draw(st.sampled_from(self.maps))

    def convolution(self) -> Value:
        x, outputs = self.any_map(), self.choose(4, 6, 8)
        inputs = int(x.shape[1])
        groups = self.choose(*[g for g in (1, 2, 3) if inputs % g == 0 and outputs % g == 0])
        kernel = self.choose(1, 3)
        weight = self.weight(outputs, inputs // groups, kernel, kernel)
        bias = self.weight(outputs) if self.choose(True, False) else None
        return self.build.conv(x, weight, bias, padding=kernel // 2, groups=groups)

    def depthwise(self) -> Value:
        x = self.any_map()
        channels = int(x.shape[1])
        return self.build.conv(x, self.weight(channels, 1, 3, 3), padding=1, groups=channels)

    def batch_norm(self) -> Value:
        x = self.any_map()
        c = int(x.shape[1])
        gain, bias, mean = self.weight(c), self.weight(c), self.weight(c)
        return self.build.batch_norm(x, gain, bias, mean, self.weight(c, positive=True))

    def pointwise(self) -> Value:
        return self.build(self.choose("relu", "sigmoid", "silu", "tanh", "gelu"), self.any_map())

    def skip(self) -> Value:
        x = self.any_map()
        y = self.draw(st.sampled_from([m for m in self.maps if m.shape == x.shape]))
        return self.build(self.choose("add", "mul", "sub"), x, y)

    def concatenation(self) -> Value:
        x, y = self.any_map(), self.any_map()
        return self.build.concat(x, y, dim=1) if x.shape[1] + y.shape[1] <= 16 else self.build.relu(x)

    def piece(self) -> Value:
        x = self.any_map()
        c = int(x.shape[1])
        start = self.draw(st.integers(0, max(0, c - 2)))
        return self.build.slice(x, dim=1, start=start, end=self.draw(st.integers(start + 1, c)), step=1)

    def shuffle(self) -> Value:
        x, build = self.any_map(), self.build
        c = int(x.shape[1])
        if c % 2:
            return build.relu(x)
        split = build.permute(build.reshape(x, shape=(2, 2, c // 2, SIDE, SIDE)), dims=(0, 2, 1, 3, 4))
        return build.reshape(split, shape=(2, c, SIDE, SIDE))

    def gate(self) -> Value:
        x, build = self.any_map(), self.build
        c = int(x.shape[1])
        squeezed = build.relu(
            build.linear(build.mean(x, dims=(2, 3), keepdim=False), self.weight(5, c), self.weight(5))
        )
        scale = build.sigmoid(build.linear(squeezed, self.weight(c, 5)))
        return build.mul(x, build.reshape(scale, shape=(2, c, 1, 1)))

    def padded(self) -> Value:
        x = self.any_map()
        return self.build.pad(x, pads=((0, 0), (0, 2), (0, 0), (0, 0)), mode="constant", value=0)

    def attention(self) -> Value:
        """Self-attention of two heads over the pixels."""
        x, build = self.any_map(), self.build
        c, size = int(x.shape[1]), self.choose(2, 3)
        pixels = build.permute(build.reshape(x, shape=(2, c, SIDE * SIDE)), dims=(0, 2, 1))
        fused = build.linear(pixels, self.weight(3 * 2 * size, c))
        parts = build.permute(build.reshape(fused, shape=(2, SIDE * SIDE, 3, 2, size)), dims=(2, 0, 3, 1, 4))
        q, k, v = (build.select(parts, dim=0, index=index) for index in range(3))
        logits = build.mul(build.matmul(q, build.permute(k, dims=(0, 1, 3, 2))), 0.5)
        heads = build.permute(build.matmul(build.softmax(logits, dim=-1), v), dims=(0, 2, 1, 3))
        joined = build.linear(build.reshape(heads, shape=(2, SIDE * SIDE, 2 * size)), self.weight(c, 2 * size))
        return build.reshape(build.permute(joined, dims=(0, 2, 1)), shape=(2, c, SIDE, SIDE))

    def tied(self) -> Value:
        """Into a hidden width and back through the same weight, transposed."""
        x, build = self.any_map(), self.build
        pixels = build.permute(x, dims=(0, 2, 3, 1))
        weight = self.weight(5, int(x.shape[1]))
        hidden = build.tanh(build.linear(pixels, weight))
        return build.permute(build.matmul(hidden, weight), dims=(0, 3, 1, 2))

    def head(self) -> Value:
        x, build = self.any_map(), self.build
        if self.choose(True, False):
            flat = build.mean(x, dims=(2, 3), keepdim=False)
        else:
            flat = build.reshape(x, shape=(2, int(x.shape[1]) * SIDE * SIDE))
        hidden = build.relu(build.linear(flat, self.weight(7, int(flat.shape[1])), self.weight(7)))
        return build.linear(hidden, self.weight(3, 7))


_LAYERS = ("convolution", "depthwise", "batch_norm", "pointwise", "skip", "concatenation", "piece", "shuffle", "gate",
           "padded", "attention", "tied", "convolution")  # fmt: skip


@st.composite
def networks(draw: Callable[[Any], Any]) -> Graph:
    """A graph from an image f64[2,3,4,4] to one or two results f64[2,3]."""
    network = Drawn(draw)
    image = network.build.input("image", (2, 3, SIDE, SIDE), torch.float64)
    network.maps = [image]
    network.maps.append(network.convolution())
    network.maps.remove(image)  # what reads the image keeps its channels, and there should be something to cut
    for layer in draw(st.lists(st.sampled_from(_LAYERS), min_size=1, max_size=7)):
        network.maps.append(getattr(network, layer)())
    network.graph.outputs = [network.head() for _ in range(draw(st.integers(1, 2)))]
    return network.graph
