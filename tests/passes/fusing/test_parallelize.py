"""``parallelize``: branches on one input, equal to networks that are built so; what the refit makes good."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from layered_networks import Decoder, ParallelBlock, ids, redrawn
from linear_branch import LinearBranch
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph


def text(batches: int = 4, count: int = 16) -> list[tuple[torch.Tensor]]:
    return [(ids(count, seed),) for seed in range(1, 1 + batches)]


def error(graph: Graph, other: Graph) -> float:
    (y,), (z,) = graph.run((ids(32, 9),)), other.run((ids(32, 9),))
    return float((y - z).square().sum() / y.square().sum())


def decoder() -> tuple[nn.Module, Graph]:
    model = redrawn(Decoder(2))
    return model, capture(model, (ids(),), dynamic={0: {0: "batch"}})


MLPS = "include=*fc1*"


def test_hidden_layers_beside_attention_are_those_of_parallel_blocks() -> None:
    model, graph = decoder()
    parallel = Decoder(2, ParallelBlock).eval()
    parallel.load_state_dict(model.state_dict())
    found = regauge.optimize(graph, "parallelize{branches=2,compensate=false," + MLPS + "}", data=text())
    torch.testing.assert_close(found.run((ids(),))[0], parallel(ids()))
    torch.testing.assert_close(found.to_torch()(ids()), parallel(ids()))


def test_the_refit_makes_good_what_the_earlier_input_tells() -> None:
    _, graph = decoder()
    found, plain = (
        regauge.optimize(graph, f"parallelize{{branches=2,{MLPS}{more}}}", data=text(8, 32))
        for more in ("", ",compensate=false")
    )
    assert error(graph, found) < 0.7 * error(graph, plain)


def test_branches_that_do_not_read_one_another_lose_nothing(tmp_path: Path) -> None:
    """Of three, that which reads what the first writes still waits for it."""
    torch.manual_seed(0)
    parts = {"one": LinearBranch(slice(0, 4)), "two": LinearBranch(slice(0, 4)), "three": LinearBranch(slice(4, 8))}
    model, x = nn.Sequential(OrderedDict(parts)).eval(), torch.randn(16, 8)
    graph = capture(model, (x,), dynamic={0: {0: "batch"}})
    found = regauge.optimize(graph, "parallelize{branches=1,compensate=false}", data=[(x,)])
    assert any(note.startswith("three: reads add,") for note in found.report.passes[0].notes)
    assert found.run((x,))[0].sub(model(x)).abs().max() < 1e-6
    session = onnxruntime.InferenceSession(str(found.to_onnx(tmp_path / "parallel.onnx")))
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_several_in_a_row_read_what_the_first_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(LinearBranch(slice(0, 8)) for _ in range(3))).eval()
    x = torch.randn(16, 8)
    graph = capture(model, (x,), dynamic={0: {0: "batch"}})
    found = regauge.optimize(graph, "parallelize{branches=2,compensate=false}", data=[(x,)])
    torch.testing.assert_close(found.run((x,))[0], x + sum(part.fc(x) for part in model))


def test_what_cannot_be_is_refused() -> None:
    _, graph = decoder()
    with pytest.raises(PassError, match="needs data"):
        regauge.optimize(graph, "parallelize")
    with pytest.raises(PassError, match="asks for 4 branches, but 3 can"):
        regauge.optimize(graph, "parallelize{branches=4}", data=text())
    with pytest.raises(PassError, match="option 'branches' of parallelize must be at least 1, not 0"):
        regauge.optimize(graph, "parallelize{branches=0}", data=text())
