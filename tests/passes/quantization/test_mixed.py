"""``quantize{scheme=mixed}``: bytes that are met, and better spent than on the same bits everywhere."""

import platform
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import regauge
from regauge.backends.onnx_model.audit import kernels_of
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.timing import Timing
from regauge.passes.base import Context
from regauge.passes.calibration.losses import Labelled
from regauge.passes.calibration.probe import Probe
from regauge.passes.calibration.weight_gradients import hessian_traces
from regauge.passes.quantization.mixed import Mixed, _by_bisection, stored_bytes
from regauge.passes.quantization.quantize import Quantize
from regauge.passes.quantization.schemes import integers
from regauge.passes.quantization.weight_formats import WeightFormats

WIDTH = 32


class Branches(nn.Module):
    """Residual branches of which each adds a third of what the one before added, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for place, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            x = x + 3.0**-place * down(up(x).relu())
        return self.head(x)


@cache
def branches() -> Graph:
    torch.manual_seed(0)
    return regauge.capture(Branches().eval(), (torch.zeros(2, 4, WIDTH),), dynamic={0: {0: "batch"}})


def examples(seed: int = 1) -> torch.Tensor:
    return torch.randn(64, 4, WIDTH, generator=torch.Generator().manual_seed(seed))


def data() -> list[tuple[torch.Tensor]]:
    return [(part,) for part in examples().split(16)]


def quantized(options: str) -> Graph:
    return regauge.optimize(branches(), f"quantize{{target=reference,{options}}}", data=data())


def error(small: Graph) -> float:
    """The squared error of the outputs as a share of their squares, on examples not seen."""
    (a,), (b,) = (graph.run((examples(9),)) for graph in (branches(), small))
    return float((a - b).square().sum() / a.square().sum())


def bytes_in(small: Graph) -> int:
    return figures(small).bytes


@cache
def uniform() -> tuple[float, int]:
    """The error and the bytes of 3 bits in all layers."""
    step = Quantize(scheme="w3", target="reference")
    graph = branches()
    layers = step.layers_of(graph, Counter())
    forms = [integers(WeightFormats(step, graph).wanted(layer, 3)) for layer in layers]
    saved = (x.weight.tensor.nbytes - stored_bytes(x, form, zeros=False) for x, form in zip(layers, forms, strict=True))
    return error(quantized("scheme=w3")), int(figures(graph).bytes - sum(saved))


@pytest.mark.parametrize(
    ("way", "most"), [("loss", 0.2), ("gradient", 0.2), ("hessian", 0.2), ("entropy", 0.2), ("lim", 0.3)]
)
def test_the_bytes_of_three_bits_are_better_spent(way: str, most: float) -> None:
    same, budget = uniform()
    small = quantized(f"scheme=mixed,bytes={budget},sensitivity={way}")
    assert 0.9 * budget < bytes_in(small) <= budget
    assert error(small) < most * same
    assert sum(f"; {way} by bits 2: " in note for note in small.report.passes[0].notes) == 8


def test_without_data_layers_are_told_by_their_weights() -> None:
    budget = uniform()[1]
    small = regauge.optimize(branches(), f"quantize{{scheme=mixed,bytes={budget},target=reference}}")
    assert 0.9 * budget < bytes_in(small) <= budget
    assert any("zd by bits" in note for note in small.report.passes[0].notes)


def test_accuracy_is_kept_with_few_bytes() -> None:
    """The tighter bound takes more bytes, and both fewer than 8 bits in all layers."""
    eight, sizes = bytes_in(quantized("scheme=w8")), []
    (wanted,) = branches().run((examples(),))
    for share in (0.99, 0.9):
        small = quantized(f"scheme=mixed,accuracy={share}")
        (found,) = small.run((examples(),))
        assert float((found.argmax(-1) == wanted.argmax(-1)).double().mean()) >= share - 0.02
        sizes.append(bytes_in(small))
    assert sizes[1] < sizes[0] < eight and sizes[1] < 0.7 * eight


def test_bisection_asks_seldom() -> None:
    """Of 64 layers and 3 forms at most 3 (log 64 + 1) times; what cannot take a form is not tried in a smaller one."""
    names, asked = [f"layer{place}" for place in range(64)], []

    def meets(picked: dict[str, int]) -> bool:
        asked.append(picked)
        sizes = Counter(picked.values())
        return sizes[0] <= 7 and sizes[0] + sizes[1] <= 30 and sizes[3] >= 4

    picked = _by_bisection(3, lambda form: names, meets)
    assert Counter(picked.values()) == {0: 7, 1: 23, 2: 30, 3: 4} and len(asked) <= 21
    assert {picked[name] for name in names[:7]} == {0} and {picked[name] for name in names[-4:]} == {3}


def test_a_file_holds_blocks_of_four_and_eight_bits(tmp_path: Path) -> None:
    """Whole rows of one block, too, are two to a byte; weights in the file are as large as the budget says."""
    budget = int(0.25 * figures(branches()).bytes)
    small = regauge.optimize(branches(), f"quantize{{scheme=mixed,bytes={budget}}}", data=data())
    small.to_onnx(tmp_path / "small.onnx")
    held = onnx.load(tmp_path / "small.onnx").graph.initializer
    kinds = Counter(i.data_type for i in held)
    assert kinds[onnx.TensorProto.UINT4] and kinds[onnx.TensorProto.INT8]
    assert 0.9 * budget < sum(len(i.raw_data) for i in held) <= budget
    assert kernels_of(tmp_path / "small.onnx")[0]["MatMulNBits"] == 8


def test_tables_of_vectors_count_with_the_bytes() -> None:
    """They take 8 bits in any case, and a scale for each vector; layers get the rest."""
    model = nn.Sequential(nn.Embedding(40, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8)).eval()
    graph = regauge.capture(model, (torch.arange(8).reshape(2, 4),), dynamic={0: {0: "batch"}})
    for share in (0.3, 0.4):
        budget = int(share * figures(graph).bytes)
        small = regauge.optimize(graph, f"quantize{{scheme=mixed,bytes={budget},target=reference}}")
        assert 0.85 * budget < bytes_in(small) <= budget


OVERHEAD = 0.5  # milliseconds of a run, of one layer or of all, in the runtime that tests make up


def in_a_slow_memory(graphs: Sequence[Graph], _: Any) -> list[Timing]:
    """A runtime in which a run takes as long as it takes to read the weights."""
    return [Timing(OVERHEAD + figures(graph).bytes / 1e4, 0.0, "a slow memory") for graph in graphs]


@pytest.mark.parametrize("asked", ["0.7", "1.6ms"])
def test_a_latency_is_met_by_the_forms_that_lose_least(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is measured by itself, and all together: what the times of layers do not tell is corrected."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (whole,) = in_a_slow_memory([branches()], None)
    wanted = 0.7 * whole.milliseconds if asked == "0.7" else float(asked.removesuffix("ms"))
    context = Context(data=data(), measure=in_a_slow_memory)
    small = Quantize(scheme="mixed", latency=asked).call(branches(), context)
    (found,) = in_a_slow_memory([small], None)
    assert 0.95 * wanted < found.milliseconds <= 1.02 * wanted
    bits = [note.split(": ")[1].split(";")[0] for note in context.notes if " by bits " in note]
    assert len(bits) == 8 and len(set(bits)) > 1
    assert f"measured in a slow memory, {wanted:.3g} ms asked" in next(n for n in context.notes if "latency: " in n)
    with pytest.raises(
        PassError, match="with the fastest forms of all layers .* ms of .* are left, and 0.1 ms are wanted"
    ):
        Quantize(scheme="mixed", latency="0.1ms").call(branches(), Context(data=data(), measure=in_a_slow_memory))


def test_a_latency_is_predicted_where_nothing_is_measured() -> None:
    """By a roofline, of layers so large that reading their weights is what takes time."""
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
    graph = regauge.capture(model, (torch.zeros(1, 512),))
    context = Context()
    small = Quantize(scheme="mixed", latency=0.27, target="ort-arm").call(graph, context)
    kinds = {parameter.dtype for name, parameter in small.parameters.items() if name.endswith("quantized")}
    (told,) = (note for note in context.notes if note.startswith("latency: "))
    predicted, whole = (float(number) for number in re.findall(r"([\d.]+) ms", told)[:2])
    assert kinds == {torch.int8, torch.uint8} and "nothing was measured" in told
    assert 0.2 * whole < predicted <= 0.27 * whole


def test_what_dependent_layers_lose_together_is_measured() -> None:
    """Every choice in a block by itself, as if its layers were replaced at once; blocks are neighbours."""
    step, graph = Quantize(scheme="mixed", bytes=0.2, target="reference"), branches()
    layers = step.layers_of(graph, Counter())
    forms = {x.weight.name: [integers(WeightFormats(step, graph).wanted(x, bits)) for bits in (2, 4)] for x in layers}
    mixed = Mixed(graph, layers, forms, "entropy", [Labelled(batch, None, None) for batch in data()], False)
    assert sorted(name for block in mixed.blocks for name in block.names) == sorted(forms)
    block = max(mixed.blocks, key=lambda block: len(block.names))
    assert 2 <= len(block.names) <= 4 and len(block.choices) == 3 ** len(block.names)
    names, probe = block.names[:2], Probe(graph, data())
    together = probe.change({**mixed.tried[names[0]][0].data, **mixed.tried[names[1]][0].data})
    rest = (2,) * (len(block.names) - 2)
    known = dict(zip(block.choices, block.losses, strict=True))
    assert known[0, 0, *rest] == pytest.approx(together) and known[2, 2, *rest] == 0
    assert mixed.losses[names[0]][0] == known[0, 2, *rest]
    assert abs(together - known[0, 2, *rest] - known[2, 0, *rest]) > 1e-3 * together


@pytest.mark.parametrize("labels", [False, True])
def test_traces_of_the_hessian(labels: bool) -> None:
    """Against the whole Hessian of a linear classifier."""
    torch.manual_seed(0)
    weight, x, classes = torch.randn(3, 4), torch.randn(32, 4), torch.randint(0, 3, (32,))
    model = nn.Linear(4, 3, bias=False)
    model.weight.data = weight
    graph = regauge.capture(model, (x,))
    (parameter,) = graph.all_parameters()

    def loss(w: torch.Tensor) -> torch.Tensor:
        if labels:
            return nn.functional.cross_entropy(x @ w.t(), classes)
        return (x @ w.t() - x @ weight.t()).square().sum() / 2 / len(x)

    exact = float(torch.func.hessian(loss)(weight).reshape(12, 12).trace())
    batch = Labelled((x,), classes if labels else None, None)
    found = hessian_traces(graph, [parameter], [batch], draws=400)[parameter]
    assert abs(found - exact) < 0.1 * exact


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("scheme=mixed", "takes one of bytes, latency and accuracy"),
        ("scheme=w4,bytes=0.3", "bytes does nothing with scheme=w4"),
        ("scheme=mixed,bytes=0.3,accuracy=0.9", "takes one of bytes, latency and accuracy"),
        ("scheme=mixed,bytes=0.3,latency=0.9", "takes one of bytes, latency and accuracy"),
        ("scheme=mixed,latency=40", "latency=40 is neither a share, which is at most 1, nor a time"),
        ("scheme=w8,latency=0.5", "latency does nothing with scheme=w8"),
        ("scheme=mixed,accuracy=0.9", "needs data for accuracy"),
        ("scheme=mixed,bytes=0.3,sensitivity=entropy", "needs data for sensitivity=entropy"),
        ("scheme=mixed,bytes=0.3,sensitivity=hessian", "needs data for sensitivity=hessian"),
        ("scheme=mixed,bytes=0.02", "take at least"),
        ("scheme=mixed,bytes=0.3,bits=9", "bits"),
    ],
)
def test_what_is_refused(options: str, words: str) -> None:
    with pytest.raises(PassError, match=words):
        regauge.optimize(branches(), f"quantize{{{options}}}")
