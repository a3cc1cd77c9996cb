"""Hand-built graphs that several tests use."""

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import symbol


def residual_network(width: int = 16, blocks: int = 2, *, dtype: torch.dtype = torch.float64) -> Graph:
    """An image of dynamic batch through residual blocks of two convolutions with BatchNorm, to five logits."""
    generator = torch.Generator().manual_seed(0)
    graph = Graph("residual")
    build = Builder(graph)
    batch = symbol("batch")
    graph.symbols[batch] = (1, None)

    def draw(name: str, *shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator, dtype=dtype)
        return tensor.abs() + 0.5 if name.endswith("var") else tensor * 0.3

    def layer(name: str, x: object, inputs: int, outputs: int) -> object:
        y = build.conv(x, build.parameter(f"{name}.weight", draw(name, outputs, inputs, 3, 3)), padding=1)
        gain, bias = (build.parameter(f"{name}.bn.{part}", draw(part, outputs)) for part in ("weight", "bias"))
        mean, var = (build.parameter(f"{name}.bn.{part}", draw(part, outputs), "buffer") for part in ("mean", "var"))
        return build.relu(build.batch_norm(y, gain, bias, mean, var))

    x = layer("stem", build.input("image", (batch, 3, 8, 8), dtype), 3, width)
    for block in range(blocks):
        hidden = layer(f"block{block}.first", x, width, 2 * width)
        x = build.add(x, layer(f"block{block}.second", hidden, 2 * width, width))
    pooled = build.mean(x, dims=(2, 3), keepdim=False)
    head = build.parameter("head.weight", draw("head", 5, width))
    graph.outputs = [build.linear(pooled, head, build.parameter("head.bias", draw("head", 5)), name="logits")]
    return graph


def multilayer_perceptron(*widths: int, norm: bool = False) -> Graph:
    """Linear layers with ReLU between them, f64[4,widths[0]] -> f64[4,widths[-1]]; optionally a LayerNorm each."""
    generator = torch.Generator().manual_seed(0)
    graph = Graph("perceptron")
    build = Builder(graph)
    x = build.input("x", (4, widths[0]), torch.float64)
    for place, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
        x = build.linear(x, build.parameter(f"layer{place}.weight", weight))
        if place < len(widths) - 2:
            x = build.layer_norm(x, normalized_shape=(outputs,)) if norm else x
            x = build.relu(x)
    graph.outputs = [x]
    return graph


def gated_layers() -> Graph:
    """Three layers on ``silu(x) * x``, the same region each time: the first reads the input, the others a layer."""
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (5, 16), torch.float32)
    for name in "abc":
        x = build.linear(build.mul(build.silu(x), x), build.parameter(name, torch.zeros(16, 16)))
    graph.outputs = [x]
    return graph
