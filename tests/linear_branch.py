"""A residual branch of one linear layer, for tests of passes on blocks."""

from __future__ import annotations

import torch
from torch import nn


class LinearBranch(nn.Module):
    """x + W x, with weights in some of the channels only."""

    def __init__(self, channels: slice) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        mask = torch.zeros(8)
        mask[channels] = 1
        with torch.no_grad():
            self.fc.weight.mul_(mask[:, None] * mask)
            self.fc.bias.mul_(mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x)
