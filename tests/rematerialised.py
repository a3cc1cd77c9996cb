"""Graphs that hold values over their peak, and inputs for them: a training step, and an hourglass with skips."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import regauge
from regauge.ir.graph import Graph


def training_step(layers: int, width: int) -> tuple[Graph, list[torch.Tensor]]:
    """The gradients of a chain of layers, as one captured graph, and inputs: the weights and a batch."""
    inputs = [*(torch.randn(width, width) / width**0.5 for _ in range(layers)), torch.randn(8 * width, width)]

    def loss(weights: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = torch.relu(x @ weight)
        return x.square().mean()

    def step(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.func.grad(loss)(list(given[:-1]), given[-1]))

    traced = make_fx(step)(*inputs)
    return regauge.optimize(regauge.capture(traced, tuple(inputs)), "simplify"), inputs


class _Hourglass(torch.nn.Module):
    """Down twice, wide in the middle, and up twice; each way up gets what was there on the way down."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, c, 3, padding=1)
        self.down = torch.nn.Conv2d(c, 2 * c, 3, padding=1, stride=2)
        self.bottom = torch.nn.Conv2d(2 * c, 4 * c, 3, padding=1, stride=2)
        self.wide, self.narrow = torch.nn.Conv2d(4 * c, 32 * c, 1), torch.nn.Conv2d(32 * c, 4 * c, 1)
        self.up = torch.nn.ConvTranspose2d(4 * c, 2 * c, 2, stride=2)
        self.top = torch.nn.ConvTranspose2d(4 * c, c, 2, stride=2)
        self.last = torch.nn.Conv2d(2 * c, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.first(x))
        down = torch.relu(self.down(first))
        bottom = self.narrow(torch.relu(self.wide(torch.relu(self.bottom(down)))))
        up = torch.cat([self.up(bottom), down], 1)
        result: torch.Tensor = self.last(torch.cat([self.top(up), first], 1))
        return result


def hourglass(channels: int = 8, side: int = 64) -> tuple[Graph, list[torch.Tensor]]:
    """The network as a graph, and an image."""
    image = torch.randn(1, 3, side, side)
    return regauge.capture(_Hourglass(channels).eval(), (image,)), [image]
