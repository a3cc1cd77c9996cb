"""``smooth``: the same function; scales go into any writers of a value; errors of rounded networks in decibels."""

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.errors import PassError
from regauge.ir.gauge.frames import find_frames
from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.layers import layer_of
from regauge.passes.calibration.statistics import Range, Spread
from regauge.passes.quantization.activation_aware import clipped, rounded_in_groups
from regauge.passes.quantization.grid import Grid
from regauge.passes.quantization.smoothing import Readers
from regauge.passes.quantization.smoothing_moves import room_of
from rounded_networks import in_few_bits, relative


class Gated(nn.Module):
    """A block of attention whose four query heads share two of keys and values, and one of a gated hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norms = nn.Embedding(50, 32), nn.ModuleList(nn.RMSNorm(32) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(32, n, bias=False) for n in (32, 16, 16, 32))
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((32, 64), (32, 64), (64, 32)))
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return self.head(self.norms[2](x))


def gated() -> tuple[Graph, list[tuple[torch.Tensor]]]:
    """Some channels of norms, values and the hidden layer are ten times as large as others, and read as the others."""
    torch.manual_seed(0)
    model = Gated()
    with torch.no_grad():
        model.table.weight.mul_(4)
        for norm in model.norms:
            norm.weight[[3, 9]] = 10.0
        model.v.weight[::5] *= 10
        model.up.weight[::9] *= 10
    batches = [(torch.randint(0, 50, (8, 12)),) for _ in range(3)]
    return regauge.capture(model.eval(), batches[0]), batches


OPTIONS = ["", "method=smoothquant", "method=smoothquant,alpha=0.5", "method=awq,group=16", "nodes=true"]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_function_stays_and_no_node_is_added(options: str) -> None:
    """Of the five values that layers read the frames take all: norms, heads of values, a gate's other factor."""
    graph, batches = gated()
    plain = regauge.optimize(graph, "simplify")
    found = regauge.optimize(graph, f"smooth{{{options}}}", data=batches)
    assert relative(graph, found, batches[0]) < 1e-5
    assert len(found) == len(plain)
    assert found.report.passes[0].notes == ("5 of 5 values smoothed",)


def test_heads_that_share_values_share_scales() -> None:
    graph, _ = gated()
    graph = regauge.optimize(graph, "simplify")
    (output,) = [node for node in graph.nodes if node.op == "linear" and node.inputs[1].name == "o.weight"]  # type: ignore[union-attr]
    layer, value = layer_of(output), output.inputs[0]
    assert layer is not None and isinstance(value, Value)
    room = room_of(graph, find_frames(graph), Readers(value, [layer], Range(-1), Spread(-1)))
    assert room is not None and room.count == 16
    first = torch.arange(8)
    assert torch.equal(room.numbers, torch.cat([first, first, first + 8, first + 8]))


def test_less_is_lost_in_eight_bits() -> None:
    """One scale for what a layer reads, one for each row of weights: 27 dB, 36 with smoothing, 35 with one exponent."""
    graph, batches = gated()
    names = ["simplify", "smooth", "smooth{method=smoothquant}", "smooth{method=smoothquant,alpha=0.5}"]
    plain, error, best, half = (
        in_few_bits(regauge.optimize(graph, name, data=batches), batches[0], 8) for name in names
    )
    assert error > plain + 7 and best > plain + 7 and error > half


def test_less_is_lost_in_weights_of_three_bits_alone() -> None:
    """Rounded to the nearest in ranges that ``quantize`` chooses: 13 dB, 17 after AWQ, 16 with clipping as well."""
    graph, batches = gated()

    def error(passes: str) -> float:
        weights = "quantize{scheme=w3,method=nearest,embeddings=false,group=16,target=reference}"
        small = regauge.optimize(graph, f"{passes},{weights}", data=batches)
        (a,), (b,) = graph.run(batches[1]), small.run(batches[1])
        return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))

    options = "method=awq,bits=3,group=16"
    found = [error(p) for p in ("simplify", f"smooth{{{options}}}", f"smooth{{{options},clip=true}}")]
    assert found[1] > found[0] + 3 and found[2] > found[0] + 2


def test_clipping_loses_less_where_whole_ranges_are_rounded() -> None:
    """The loss that it looks at: that of the layer on data, with one scale over all of each group."""
    torch.manual_seed(0)
    graph = regauge.capture(nn.Linear(32, 24, bias=False), (torch.randn(64, 32),))
    layer = layer_of(graph.nodes[0])
    assert layer is not None
    x, weight, grid = torch.randn(64, 32).double(), layer.weight.tensor.double(), Grid(3, symmetric=False)
    cut = clipped(layer, grid, 16, x.T @ x)
    before, after = (float(((rounded_in_groups(w, grid, 16) - weight) @ x.T).square().sum()) for w in (weight, cut))
    assert after < 0.85 * before


def test_options_that_do_nothing_are_refused() -> None:
    graph, batches = gated()
    with pytest.raises(PassError, match="alpha does nothing with method=error"):
        regauge.optimize(graph, "smooth{alpha=0.5}", data=batches)
    with pytest.raises(PassError, match="clip does nothing with method=smoothquant"):
        regauge.optimize(graph, "smooth{method=smoothquant,clip=true}", data=batches)
    with pytest.raises(PassError, match="needs data"):
        regauge.optimize(graph, "smooth")
