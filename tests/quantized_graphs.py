"""A gated layer with a residual, quantized, and tensors for what its kernels read."""

from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Parameter, Value
from regauge.optimize import optimize

WIDTH, HIDDEN = 64, 96


def gated_layer(rows: Any = 4) -> Graph:
    """x + down(silu(gate(x)) * up(x))"""
    graph = Graph("gated")
    build = Builder(graph)
    generator = torch.Generator().manual_seed(0)
    x = build.input("x", (rows, WIDTH), torch.float32)
    shapes = {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
    gate, up, down = (
        build.parameter(f"{name}.weight", torch.randn(shape, generator=generator) / 8) for name, shape in shapes.items()
    )
    hidden = build.mul(build.silu(build.linear(x, gate)), build.linear(x, up))
    graph.outputs = [build.add(x, build.linear(hidden, down))]
    return graph


def quantized(scheme: str, rows: int = 4) -> Graph:
    """The layer with weights, and activations too, of few bits, as kernels of a GPU would read them."""
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(rows, WIDTH, generator=generator) for _ in range(4)]
    return optimize(gated_layer(rows), f"quantize{{scheme={scheme},target=torch-cuda}}", data=data)


def random_tensor(value: Value) -> torch.Tensor:
    """A weight as it is, and else random numbers of its type."""
    if isinstance(value, Parameter):
        return value.tensor.detach()
    numbers = torch.randn([int(size) for size in value.shape])
    assert isinstance(value.dtype, torch.dtype)
    return numbers.to(value.dtype) if value.dtype.is_floating_point else (numbers * 40).clamp(-127, 127).to(value.dtype)
