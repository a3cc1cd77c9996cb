"""``deepen``: copies of blocks that add nothing, where they stand, and what of them is zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regauge
from layered_networks import GroupedDecoder, ids, redrawn
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from small_graphs import residual_network


class Residual(nn.Module):
    """Two convolutions with batch norms beside a shortcut; with a stride the shortcut skips pixels."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x[:, :, :: self.stride, :: self.stride] + y)


class Scaled(nn.Module):
    """A branch with scales, laid out as the channels lie."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.gamma = (
            nn.Conv2d(width, width, 1),
            nn.Conv2d(width, width, 1),
            nn.Parameter(torch.ones(width)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma.reshape(1, -1, 1, 1) * self.fc2(F.gelu(self.fc1(x)))


class PostNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.fc(x))


def images(*blocks: nn.Module, dtype: torch.dtype = torch.float64) -> Graph:
    torch.manual_seed(0)
    model = redrawn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *blocks, nn.Flatten()))
    return capture(model.to(dtype).eval(), (torch.randn(2, 3, 8, 8, dtype=dtype),), dynamic={0: {0: "batch"}})


def copies(graph: Graph) -> list[str]:
    return [cut.dim for cut in graph.report.passes[-1].cuts]


def zeros(graph: Graph) -> set[str]:
    return {p.name for p in graph.all_parameters() if p.kind == "parameter" and not p.tensor.any()}


def test_copies_in_a_decoder_stand_behind_groups_of_blocks_and_compute_nothing_yet() -> None:
    graph, x = capture(redrawn(GroupedDecoder()).eval(), (ids(),), dynamic={0: {0: "batch"}}), ids(5, 3)
    (wanted,) = graph.run((x,))
    deep = regauge.optimize(graph, "deepen{blocks=2}")  # of three blocks: groups of one and of two
    assert copies(deep) == ["layers.1_1", "layers.2_1"]
    torch.testing.assert_close(deep.run((x,))[0], wanted)
    last = copies(deep)[0]
    assert zeros(deep) == {f"{name}.{own}.weight" for name in copies(deep) for own in ("o", "down")}
    before, after = graph.parameters[f"{last[:-2]}.q.weight"], deep.parameters[f"{last}.q.weight"]
    assert torch.equal(before.tensor, after.tensor) and before.tensor is not after.tensor

    module = deep.to_torch()
    torch.testing.assert_close(module(x), wanted)
    module(x).square().sum().backward()
    gradients = {name: own.grad for name, own in module.named_parameters()}
    assert all(gradients[name].abs().max() > 0 for name in zeros(deep))  # they learn at once


@pytest.mark.sweep
def test_a_deeper_decoder_is_written_to_a_file(tmp_path: Path) -> None:
    graph, x = capture(redrawn(GroupedDecoder()).eval(), (ids(),), dynamic={0: {0: "batch"}}), ids(5, 3)
    deep = regauge.optimize(graph, "deepen{blocks=2}")
    loaded = regauge.load(deep.to_onnx(tmp_path / "deep.onnx"))
    torch.testing.assert_close(loaded.run((x,))[0], graph.run((x,))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["", "simplify,"])
def test_a_copy_of_a_convolutional_block_has_a_norm_or_a_layer_of_zeros(first: str) -> None:
    graph = images(Residual(8), Residual(8, stride=2), Residual(8))
    deep = regauge.optimize(graph, f"{first}deepen{{blocks=2}}")
    assert copies(deep) == ["2_1", "4_1"] and deep.report.passes[-1].error == 0
    left = dict(deep.report.passes[-1].left)
    assert any("skips pixels" in reason for reason in left)
    last = ("conv2.weight", "conv2.bias") if first else ("bn2.weight", "bn2.bias")
    assert zeros(deep) == {f"{name}.{own}" for name in copies(deep) for own in last}


def test_more_copies_than_blocks_and_scales_of_branches() -> None:
    graph = images(Scaled(8), Scaled(8))
    deep = regauge.optimize(graph, "deepen{blocks=5}")
    assert copies(deep) == ["2_1", "2_2", "3_1", "3_2", "3_3"]
    assert zeros(deep) == {f"{name}.gamma" for name in copies(deep)}
    again = regauge.optimize(deep, "deepen{blocks=1,include=[2_2]}")
    assert copies(again) == ["2_2_1"]


def test_a_loaded_file_gets_copies_too(tmp_path: Path) -> None:
    source = images(Residual(8), Residual(8), dtype=torch.float32).to_onnx(tmp_path / "plain.onnx")
    graph, x = regauge.load(source), torch.randn(2, 3, 8, 8)
    deep = regauge.load(regauge.optimize(graph, "deepen{blocks=1}").to_onnx(tmp_path / "deep.onnx"))
    assert sum(node.op == "conv" for node in deep.nodes) == sum(node.op == "conv" for node in graph.nodes) + 2
    torch.testing.assert_close(deep.run((x,))[0], graph.run((x,))[0], rtol=1e-4, atol=1e-5)


def test_blocks_that_cannot_do_nothing_are_left_with_the_reason() -> None:
    model = nn.Sequential(PostNorm(8), PostNorm(8)).eval()
    with pytest.raises(PassError, match="2 x it does more than to add .* a norm stands behind the sum"):
        regauge.optimize(capture(model, (torch.randn(2, 8),)), "deepen")
    with pytest.raises(PassError, match="does more"):  # relu behind zeros: they would get no gradient
        regauge.optimize(residual_network(), "deepen")
    with pytest.raises(PassError, match="include=fc"):
        regauge.optimize(images(Residual(8), Residual(8)), "deepen{include=[fc]}")
