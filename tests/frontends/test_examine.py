"""examine: what is unsupported and where, before anything is converted."""

import torch
from torch import nn

from regauge.frontends.examine import examine


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i1(self.fc(x))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_nothing_to_report() -> None:
    assert examine(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)) == []


def test_opaque_operators_with_their_line() -> None:
    (finding,) = examine(Odd(), torch.randn(2, 4))
    assert finding.operator == "aten.special_i1.default" and finding.count == 1
    assert finding.source.startswith("test_examine.py:")
    assert "no operator record" in finding.reason and "first at test_examine.py" in str(finding)


def test_what_cannot_be_captured() -> None:
    (finding,) = examine(Branching(), torch.randn(2))
    assert finding.operator == "capture" and "test_examine.py" in finding.reason
