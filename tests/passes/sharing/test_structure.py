"""Blocks of one structure: found wherever they lie, with the weights that stand for each other."""

from __future__ import annotations

import torch
from torch import nn

from layered_networks import Decoder, ResidualNetwork, ids, images
from regauge.frontends.capture import capture
from regauge.passes.sharing.structure import repeated


class Branch(nn.Module):
    def __init__(self, width: int, *, turned: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.turned = nn.Linear(8, width), nn.Linear(width, 8), turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.tanh(self.up(x)))
        return y + x if self.turned else x + y


class Towers(nn.Module):
    """Two inputs through blocks of their own, some with the addends exchanged, one of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([Branch(6), Branch(6, turned=True)])
        self.right = nn.ModuleList([Branch(6, turned=True), Branch(5)])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for one, other in zip(self.left, self.right, strict=True):
            x, y = one(x), other(y)
        return x * y


def test_blocks_of_two_towers_are_one_structure() -> None:
    (found,) = repeated(capture(Towers().eval(), (torch.randn(2, 8), torch.randn(2, 8))))
    assert sorted(found.names) == ["left.0", "left.1", "right.0"]
    for part, weights in zip(found.parts, found.weights, strict=True):
        assert [w.name for w in weights] == [
            f"{part.name}.{w}" for w in ("up.weight", "up.bias", "down.weight", "down.bias")
        ]


def test_blocks_of_a_decoder_have_their_weights_and_no_others() -> None:
    (found,) = repeated(capture(Decoder().eval(), (ids(),)))
    assert found.names == ["blocks.0", "blocks.1", "blocks.2"]
    names = [sorted(weight.name.split(".", 2)[2] for weight in own) for own in found.weights]
    assert names[0] == names[1] == names[2] and len(names[0]) == 12
    assert all(w.name.startswith(f"blocks.{block}.") for block, own in enumerate(found.weights) for w in own)


def test_stages_of_another_width_are_another_structure() -> None:
    (found,) = repeated(capture(ResidualNetwork().eval(), (images(),)))
    assert found.names == ["blocks.0", "blocks.1", "blocks.2"]
    assert {weight.kind for weight in found.weights[0]} == {"parameter", "buffer"}  # statistics of norms as well


def test_tied_weights_belong_to_no_block() -> None:
    model = Decoder(blocks=2)
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    (found,) = repeated(capture(model.eval(), (ids(),)))
    assert len(found.weights[0]) == 11 and not any("fc1.weight" in w.name for own in found.weights for w in own)
