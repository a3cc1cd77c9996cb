"""``fuse-blocks``: what a block gave is in its neighbours' weights, exactly where it can be; what it refuses."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from layered_networks import Decoder, ids, redrawn
from linear_branch import LinearBranch
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph


def linear_blocks() -> tuple[nn.Sequential, Graph]:
    """Blocks in other channels each: (I + W)(I + R) = I + W + R."""
    torch.manual_seed(0)
    blocks = {"front": LinearBranch(slice(0, 4)), "back": LinearBranch(slice(4, 8))}
    model = nn.Sequential(OrderedDict(blocks)).eval()
    return model, capture(model, (torch.randn(2, 8),), dynamic={0: {0: "batch"}})


def decoder(blocks: int = 3) -> Graph:
    return capture(redrawn(Decoder(blocks)), (ids(),), dynamic={0: {0: "batch"}})


def text(batches: int = 4, count: int = 16) -> list[tuple[torch.Tensor]]:
    return [(ids(count, seed),) for seed in range(1, 1 + batches)]


def error(graph: Graph, other: Graph, *x: Any) -> float:
    """The squared error of the outputs, as a share of their squares."""
    (y,), (z,) = graph.run(*x), other.run(*x)
    return float((y - z).square().sum() / y.square().sum())


@pytest.mark.parametrize("gone", ["front", "back"])
def test_a_block_whose_sum_with_the_other_is_the_whole_is_absorbed(gone: str) -> None:
    """Coefficients of 1, which have rank 1."""
    model, graph = linear_blocks()
    torch.manual_seed(1)
    data, x = [torch.randn(64, 8) for _ in range(4)], torch.randn(32, 8)
    options = f"rank=1,steps=400,compensate=false,include={gone}"
    small = regauge.optimize(graph, f"fuse-blocks{{{options}}}", data=data)
    bare = regauge.optimize(graph, f"fuse-blocks{{{options.replace('400', '0')}}}", data=data)
    assert error(graph, bare, x) > 1e-2
    assert error(graph, small, x) < 1e-5
    (left,) = [weight for name, weight in small.parameters.items() if name.endswith("fc.weight")]
    torch.testing.assert_close(left.tensor, model[0].fc.weight + model[1].fc.weight, rtol=0, atol=5e-3)


def test_fused_is_nearer_to_the_original_than_refitted() -> None:
    graph, data, x = decoder(), text(), ids(32, seed=9)
    fused, refitted = (regauge.optimize(graph, f"fuse-blocks{{steps={steps}}}", data=data) for steps in (100, 0))
    assert error(graph, fused, x) < error(graph, refitted, x)
    assert "error of the groups on the last batch" in str(fused.report)
    assert fused.parameters.keys() == refitted.parameters.keys() < graph.parameters.keys()


def test_without_steps_it_is_depth() -> None:
    graph, data, x = decoder(), text(), ids(4, seed=9)
    refitted = regauge.optimize(graph, "fuse-blocks{steps=0,include=blocks.1}", data=data)
    depth = regauge.optimize(graph, "depth{blocks=1,include=blocks.1}", data=data)
    torch.testing.assert_close(refitted.run(x)[0], depth.run(x)[0])


def test_coefficients_that_help_nothing_are_left_out() -> None:
    """A rate that is far too great."""
    graph, data, x = decoder(), text(), ids(4, seed=9)
    wild = regauge.optimize(graph, "fuse-blocks{steps=3,rate=1000,include=blocks.1}", data=data)
    refitted = regauge.optimize(graph, "fuse-blocks{steps=0,include=blocks.1}", data=data)
    assert "not fused" in str(wild.report)
    torch.testing.assert_close(wild.run(x)[0], refitted.run(x)[0])


def test_two_blocks_the_last_one_too_and_blocks_in_one_basis() -> None:
    graph, data, x = decoder(4), text(), ids(32, seed=9)
    for options in ("blocks=2,group=2", "blocks=1,include=blocks.3,align=true", "blocks=2,group=3,exclude=blocks.0"):
        fused, refitted = (
            regauge.optimize(graph, f"fuse-blocks{{{options},steps={steps}}}", data=data) for steps in (60, 0)
        )
        assert error(graph, fused, x) <= error(graph, refitted, x)


def test_out_to_onnx_and_torch(tmp_path: Path) -> None:
    graph, x = decoder(), ids(5, seed=9)
    fused = regauge.optimize(graph, "fuse-blocks{steps=10}", data=text())
    wanted = fused.run(x)[0]
    fused.to_onnx(tmp_path / "fused.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "fused.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fused.to_torch().eval()(x), wanted, rtol=1e-5, atol=1e-5)


def test_what_it_refuses() -> None:
    graph = decoder()
    with pytest.raises(PassError, match="needs data"):
        regauge.optimize(graph, "fuse-blocks")
    with pytest.raises(PassError, match="asks for 4 blocks, but there are 3"):
        regauge.optimize(graph, "fuse-blocks{blocks=4}", data=text())
    with pytest.raises(PassError, match="block of a structure that repeats"):
        regauge.optimize(graph, "fuse-blocks{include=none.*}", data=text())
    with pytest.raises(PassError, match="option 'blocks' of fuse-blocks must be at least 1, not 0"):
        regauge.optimize(graph, "fuse-blocks{blocks=0}", data=text())
