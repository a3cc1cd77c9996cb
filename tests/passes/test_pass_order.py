"""Pipelines whose order matters: passes behind ``quantize`` lose what they lose before it, and reports say the rest."""

from functools import cache
from pathlib import Path

import pytest
import torch

import regauge
from digits_training import captured, convolutional, digits, train
from regauge.ir.graph import Graph
from regauge.ir.storage.quantized_layers import quantized_layers
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
    return signal_to_noise(wanted or network(), found, digits()[2])


def optimized(*passes: str) -> Graph:
    return regauge.optimize(network(), list(passes), data=batches())


@pytest.mark.parametrize("scheme", ["w8", "w8a8", "w4"])
def test_prune_behind_quantize_refits_as_before_it(scheme: str) -> None:
    """Codes were cut as if nothing behind them could be refitted: 7 decibels where the other order has 29."""
    quantize = f"quantize{{scheme={scheme}}}"
    behind, before = optimized(quantize, "prune{macs=0.6}"), optimized("prune{macs=0.6}", quantize)
    assert decibels(behind) == pytest.approx(decibels(before), abs=0.01)
    assert decibels(behind) > 20
    notes = behind.report.passes[-1].notes
    assert any(note.startswith("layers refitted on 256 examples: ") for note in notes)
    codes = 3 if scheme == "w8" else 4  # the small first weight is in half precision
    again = f"{report_text(scheme)} rounded them again: let quantize come last"
    assert f"it had {codes} weights as floats, {again}" in notes
    assert behind.report.after == before.report.after and behind.report.after.bytes < 0.2 * network_bytes()
    assert [cut.after for cut in behind.report.passes[-1].cuts] == [cut.after for cut in before.report.passes[0].cuts]
    assert codes_in(behind) == codes_in(before) == codes
    assert len(quantized_layers(behind)) == len(quantized_layers(before))


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_in_another_pipeline_floats_are_those_that_codes_stand_for(scheme: str) -> None:
    quantize = f"quantize{{scheme={scheme}}}"
    behind = regauge.optimize(optimized(quantize), "prune{macs=0.6}", data=batches())
    assert decibels(behind) > decibels(optimized("prune{macs=0.6}", quantize)) - 2.5
    assert behind.report.after.bytes < 0.2 * network_bytes()


def test_without_refits_codes_are_cut_as_they_are() -> None:
    whole = optimized("quantize{scheme=w4}")
    cut = regauge.optimize(whole, "prune{ratio=0.4,compensate=false}")
    codes, before = (graph.parameters["0.weight_quantized"].tensor.flatten(1).tolist() for graph in (cut, whole))
    assert len(codes) < len(before) and all(row in before for row in codes)
    assert not any("rounded" in note for note in cut.report.passes[0].notes)


def test_codes_that_are_cut_are_those_of_floats_that_would_be() -> None:
    """Codes counted for nothing: channels were chosen by biases and scales, 4 decibels where the other order had 7."""
    plain = "prune{ratio=0.4,compensate=false}"
    whole = optimized("quantize{scheme=w8,target=reference}")
    floats, codes = regauge.optimize(network(), plain), regauge.optimize(whole, plain)
    assert decibels(codes, floats) > 35
    behind, before = optimized("quantize{scheme=w8}", plain), optimized(plain, "quantize{scheme=w8}")
    assert decibels(behind) == pytest.approx(decibels(before), abs=0.01)


def report_text(scheme: str) -> str:
    return "quantize" if scheme == "w8a8" else f"quantize{{scheme={scheme}}}"


def network_bytes() -> int:
    return sum(p.tensor.numel() * p.tensor.element_size() for p in network().parameters.values())


@pytest.mark.parametrize(("one", "least"), [("factorize{params=0.6}", 25), ("sparsify{pattern=2:4}", 18)])
def test_what_solves_for_weights_does_so_behind_quantize(one: str, least: float) -> None:
    """All layers were left alone: "no linear layer, but read by dequantize"."""
    behind = optimized("quantize{scheme=w8}", one)
    assert not any("dequantize" in reason for reason in behind.report.passes[-1].left)
    assert least < decibels(behind) < 58  # it did something
    assert decibels(behind) == pytest.approx(decibels(optimized(one, "quantize{scheme=w8}")), abs=0.01)
    assert codes_in(behind) >= 3


@pytest.mark.parametrize("scheme", ["w8", "w8a8", "w4"])
def test_quantize_keeps_the_zeros_of_sparsify(scheme: str) -> None:
    """What makes up for rounding filled them: 2:4 held in none of the layers."""
    small = optimized("sparsify{pattern=2:4}", f"quantize{{scheme={scheme}}}")
    assert "sparsify's 2:4 holds in 3 of 3 layers" in small.report.passes[-1].notes
    codes = regauge.optimize(small, "dequantize").parameters["8.weight"].tensor
    assert int((codes.reshape(10, 8, 4) != 0).sum(2).max()) <= 2
    assert decibels(small) > decibels(optimized("sparsify{pattern=2:4}")) - 2


@pytest.mark.parametrize(
    ("one", "held"), [("simplify", 3), ("equalize", 3), ("factorize{params=0.6}", 2), ("prune{macs=0.6}", 1)]
)
def test_reports_say_where_zeros_are_lost(one: str, held: int) -> None:
    """Products and refitted layers have other entries: at most so many layers hold the pattern behind them."""
    small = optimized("sparsify{pattern=2:4}", one)
    (note,) = (note for note in small.report.passes[-1].notes if note.startswith("sparsify's"))
    count = int(note.split(" of ")[0].rpartition(" ")[2])
    assert note == f"sparsify's 2:4 holds in {count} of 3 layers"
    assert count == 3 if held == 3 else count <= held


def test_exact_passes_say_that_quantize_comes_last() -> None:
    behind = optimized("quantize{scheme=w8}", "equalize")
    assert any("3 weights are integers, which equalize takes as they are: let quantize come last" in note
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


def test_dequantize_leaves_no_codes_of_biases() -> None:
    """Those of products of matrices are in steps of input times weight: such biases stayed codes, and layers whole."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)
    )
    data = [torch.randn(64, 32) for _ in range(4)]
    graph = regauge.capture(model.eval(), (data[0],), dynamic={0: {0: "batch"}})
    whole = regauge.optimize(graph, "quantize", data=data)
    floats = regauge.optimize(whole, "dequantize")
    assert [node.op for node in floats.nodes] == ["layer_norm", "linear", "gelu", "linear"]
    small = regauge.optimize(whole, "factorize{params=0.8}", data=data)
    other = regauge.optimize(graph, "factorize{params=0.8},quantize", data=data)
    assert small.report.after.bytes == pytest.approx(other.report.after.bytes, rel=0.1)
    assert signal_to_noise(graph, small, data[0]) > signal_to_noise(graph, other, data[0]) - 1


def signal_to_noise(graph: Graph, found: Graph, x: torch.Tensor) -> float:
    (a,), (b,) = graph.run((x,)), found.run((x,))
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


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
