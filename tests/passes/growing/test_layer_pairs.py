"""``coalesce{of=depth}``: neighbours of one structure become one block, and come back as copies of it."""

from __future__ import annotations

import pytest
import torch

import regauge
from layered_networks import GroupedDecoder, ids, redrawn
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.growing.coalesce import coalesce
from small_graphs import multilayer_perceptron, residual_network


def decoder(blocks: int) -> tuple[GroupedDecoder, Graph]:
    torch.manual_seed(0)
    model = redrawn(GroupedDecoder(blocks)).double().eval()
    return model, capture(model, (ids(),), dynamic={0: {0: "batch"}})


def test_one_block_stands_for_two_with_the_mean_of_their_weights() -> None:
    model, graph = decoder(4)
    small = regauge.optimize(graph, "coalesce{of=depth}")
    assert "layers.0 + layers.1, layers.2 + layers.3" in str(small.report)
    state = model.state_dict()
    half = GroupedDecoder(2).double().eval()
    means = {
        name: (state[f"layers.{2 * int(name.split('.')[1])}.{name.split('.', 2)[2]}"]
               + state[f"layers.{2 * int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}"]) / 2
        if name.startswith("layers.") else state[name]
        for name in half.state_dict()
    }  # fmt: skip
    half.load_state_dict(means)
    with torch.no_grad():
        torch.testing.assert_close(small.run((ids(5, 3),))[0], half(ids(5, 3)), rtol=0, atol=1e-12)


def test_both_of_a_pair_come_back_as_copies_and_mix_with_what_they_were() -> None:
    _, graph = decoder(4)
    found = coalesce(graph, of="depth")
    back, mixed = found.back(), found.back(share=0.25)
    for name, old in graph.parameters.items():
        if old.kind != "parameter":
            continue
        other = name.replace("layers.1.", "layers.0.").replace("layers.3.", "layers.2.")
        copy = found.graph.parameters[other].tensor
        torch.testing.assert_close(back.parameters[name].tensor, copy, rtol=0, atol=0)
        torch.testing.assert_close(mixed.parameters[name].tensor, 0.25 * copy + 0.75 * old.tensor)
    assert back.run((ids(5, 3),))[0].isfinite().all()


def test_equal_blocks_become_one_and_are_found_again() -> None:
    """Half of the width and of the depth: on the way back nothing is lost where neighbours and copies were equal."""
    model, _ = decoder(2)
    model.layers[1].load_state_dict(model.layers[0].state_dict())
    graph = capture(model, (ids(),), dynamic={0: {0: "batch"}})
    wide = regauge.optimize(graph, "grow{split=even}")
    small = coalesce(wide, of="both")
    assert sum(p.tensor.numel() for p in small.graph.all_parameters()) < 0.2 * sum(
        p.tensor.numel() for p in wide.all_parameters()
    )
    back = small.back()
    torch.testing.assert_close(back.run((ids(5, 3),))[0], graph.run((ids(5, 3),))[0], rtol=0, atol=1e-12)


def test_statistics_of_batch_norms_are_means_and_come_back() -> None:
    graph = residual_network()
    found = coalesce(graph, of="depth")
    first, second = (graph.parameters[f"block{place}.second.bn.var"].tensor for place in (0, 1))
    torch.testing.assert_close(found.graph.parameters["block0.second.bn.var"].tensor, (first + second) / 2)
    back = found.back(share=0.5)
    torch.testing.assert_close(back.parameters["block1.second.bn.var"].tensor, (first + second) / 2)
    assert back.run((torch.randn(2, 3, 8, 8).double(),))[0].isfinite().all()


def test_what_is_left_is_told() -> None:
    _, odd = decoder(3)
    small = regauge.optimize(odd, "coalesce{of=depth}")
    assert "1 x blocks that have no partner behind them" in str(small.report)
    kept = regauge.optimize(odd, "coalesce{of=depth,exclude=[layers.0]}")
    assert "layers.1 + layers.2" in str(kept.report)
    whole = multilayer_perceptron(6, 8, 9, 3)
    assert coalesce(whole, of="depth").graph is whole
    with pytest.raises(PassError, match="no block or weight of one"):
        regauge.optimize(odd, "coalesce{of=depth,exclude=[nothing]}")
    with pytest.raises(PassError, match="of=depth and of=width"):
        regauge.optimize(odd, "coalesce{of=both,exclude=[layers.0]}")
