"""A rewrite rule of your own: a pattern, what takes its place, and when. It promises to be exact, and is held to it."""

import torch
from torch import nn

import regauge


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x) + x * torch.sigmoid(1.702 * x)


silu = regauge.rewrite(
    lambda op, x: op.mul(x, op.sigmoid(x)),  # either order of the factors
    lambda build, x: build.silu(x),
    name="silu",
    where=lambda x: x.dtype == torch.float32 or f"it computes with {x.dtype}",
)

model = nn.Sequential(nn.Linear(8, 16), Gate(), nn.Linear(16, 3)).eval()
graph = regauge.capture(model, (torch.randn(4, 8),))
after = regauge.optimize(graph, [silu, "simplify"])
print(after)
print(after.report)
