"""Pipelines whose order matters: passes behind ``quantize`` lose what they lose before it, and reports say the rest."""

from functools import cache
from pathlib import Path

import pytest
import torch

import regauge
from digits_training import captured, convolutional, digits, train
from regauge.ir.graph import Graph
from regauge.ir.quantized_layers import quantized_layers
from regauge.passes.on_floats import codes_in


@cache
def network() -> Graph:
    model = convolutional()
    train(model, 150)
    found: Graph = captured(model.eval())
    return found


def batches() -> list[torch.Tensor]:
    return list(digits()[0][:256].split(128))


def decibels(found: Graph, wanted: Graph | None = None) -> float:
    """Signal to noise on images that were not calibrated on."""
    (y,), (x,) = (graph.run((digits()[2],)) for graph in (wanted or network(), found))
    return float(10 * torch.log10(y.square().sum() / (x - y).square().sum()))


def optimized(*passes: str) -> Graph:
    return regauge.optimize(network(), list(passes), data=batches())


@pytest.mark.parametrize("scheme", ["w8", "w8a8", "w4"])
def test_prune_behind_quantize_refits_as_before_it(scheme: str) -> None:
    """Codes were cut as if nothing behind them could be refitted: 7 decibels where the other order has 29."""
    quantize = f"quantize{{scheme={scheme}}}"
    behind, before = optimized(quantize, "prune{macs=0.6}"), optimized("prune{macs=0.6}", quantize)
    assert decibels(behind) > decibels(before) - 2.5
    assert decibels(behind) > 20
    report = behind.report.passes[-1]
    assert any(
        note.startswith(("layers refitted on 256 examples: 2", "layers refitted on 256 examples: 3"))
        for note in report.notes
    )
    assert (
        f"it had 4 weights as floats, {report_text(scheme)} rounded them again: let quantize come last" in report.notes
    )
    assert behind.report.after.bytes < 0.2 * network_bytes()
    assert codes_in(behind) == codes_in(before) == 4
    assert len(quantized_layers(behind)) == len(quantized_layers(before))


def report_text(scheme: str) -> str:
    return "quantize" if scheme == "w8a8" else f"quantize{{scheme={scheme}}}"


def network_bytes() -> int:
    return sum(p.tensor.numel() * p.tensor.element_size() for p in network().parameters.values())


@pytest.mark.parametrize(
    ("one", "least"), [("factorize{params=0.6}", 25), ("sparsify{pattern=2:4}", 18), ("sparsify{pattern=block}", 8)]
)
def test_what_solves_for_weights_does_so_behind_quantize(one: str, least: float) -> None:
    """All layers were left alone: "no linear layer, but read by dequantize"."""
    behind = optimized("quantize{scheme=w8}", one)
    assert not any("dequantize" in reason for reason in behind.report.passes[-1].left)
    assert least < decibels(behind) < 58  # it did something
    assert decibels(behind) > decibels(optimized(one, "quantize{scheme=w8}")) - 2.5
    assert codes_in(behind) >= 4


def test_exact_passes_say_that_quantize_comes_last() -> None:
    behind = optimized("quantize{scheme=w8}", "equalize")
    assert any("4 weights are integers, which equalize takes as they are: let quantize come last" in note
               for note in behind.report.passes[-1].notes)  # fmt: skip


@pytest.mark.parametrize(
    "options", ["scheme=w8", "scheme=w4", "scheme=ternary,target=reference", "scheme=w8,packed=true,target=reference"]
)
def test_dequantize_computes_the_same(options: str) -> None:
    whole = optimized(f"quantize{{{options}}}")
    floats = regauge.optimize(whole, "dequantize")
    assert decibels(floats, whole) > 100
    assert not codes_in(floats) and {"0.weight", "3.weight", "6.weight", "8.weight"} <= floats.parameters.keys()
    assert [node.op for node in floats.nodes] == ["conv", "relu", "conv", "relu", "reshape", "linear", "relu", "linear"]


@pytest.mark.parametrize("options", ["scheme=w8a8", "activations=dynamic,target=torch-cpu"])
def test_dequantize_rounds_activations_no_more(options: str) -> None:
    whole = optimized(f"quantize{{{options}}}")
    floats = regauge.optimize(whole, "dequantize")
    assert decibels(floats) > decibels(whole) + 3
    assert [node.op for node in floats.nodes] == ["conv", "relu", "conv", "relu", "reshape", "linear", "relu", "linear"]


def test_a_quantized_file_is_pruned_between_dequantize_and_quantize(tmp_path: Path) -> None:
    optimized("quantize{scheme=w8a8}").to_onnx(tmp_path / "whole.onnx")
    loaded = regauge.load(tmp_path / "whole.onnx")
    as_it_is = regauge.optimize(loaded, "prune{macs=0.6}", data=batches())
    assert any("put dequantize before it, and quantize behind it" in note for note in as_it_is.report.passes[0].notes)
    again = regauge.optimize(loaded, "dequantize,prune{macs=0.6},quantize{scheme=w8a8}", data=batches())
    assert decibels(again) > max(20, decibels(as_it_is) + 10)


def test_tables_of_vectors_are_floats_again() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 16)).eval()
    graph = regauge.capture(model, (torch.arange(6)[None],), dynamic={0: {0: "batch"}})
    whole = regauge.optimize(graph, "quantize{scheme=w8}")
    floats = regauge.optimize(whole, "dequantize")
    assert [node.op for node in floats.nodes] == ["embedding", "linear"]
    x = torch.randint(0, 50, (4, 6))
    assert torch.allclose(floats.run((x,))[0], whole.run((x,))[0], atol=1e-6)
