"""``prune`` with data on every kind of layer: refitted it is nearer to the original than masked, by a factor."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.graph import Graph

MIX = torch.randn(6, 3, generator=torch.Generator().manual_seed(5))


def images(count: int, seed: int) -> torch.Tensor:
    """Six channels that are three smooth ones mixed, and a little noise: some channels can stand in for others."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.avg_pool2d(torch.randn(count, 3, 10, 10, generator=generator), 3, 1, 1)
    return torch.einsum("oc,nchw->nohw", MIX, smooth) + 0.05 * torch.randn(count, 6, 10, 10, generator=generator)


def words(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 50, (count, 7), generator=torch.Generator().manual_seed(seed))


class Experts(nn.Module):
    """Three perceptrons as two batches of matrices; their results are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(3, 6, 24) / 6**0.5)
        self.out = nn.Parameter(torch.randn(3, 24, 6) / 24**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(2).transpose(1, 2).reshape(-1, 6)[None].expand(3, -1, -1)
        return torch.bmm(torch.relu(torch.bmm(rows, self.into)), self.out).mean(0)


class Shared(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x.mean((2, 3))))
        return self.last(torch.relu(self.middle(torch.relu(self.middle(x)))))


class HalfPrecision(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 48), nn.GELU(), nn.Linear(48, 6)).to(dtype)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.flatten(2).transpose(1, 2).to(self.dtype)).float()


class Embedded(nn.Module):
    """The Dim that is cut is made by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(50, 8) @ torch.randn(8, 32) + 0.05 * torch.randn(50, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.table(x))


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU(), nn.Conv2d(24, 4, 1)
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, 16, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, groups=2),
    )  # fmt: skip


class Recurrent(nn.Module):
    """A stack of recurrent layers between linear ones, on rows of the images as sequences."""

    def __init__(self, kind: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.into = nn.Linear(6, 16)
        self.stack = kind(16, 20, 2, batch_first=True, **options)
        self.out = nn.Linear(40 if options.get("bidirectional") else 20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.relu(self.into(x.mean(3).transpose(1, 2)))
        return self.out(self.stack(3 * rows)[0])


def error(graph: Graph, pruned: Graph, x: torch.Tensor) -> float:
    """The squared error of the outputs, as a share of their variance."""
    (y,), (z,) = graph.run(x), pruned.run(x)
    assert bool(z.isfinite().all())
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


Make = Callable[[], nn.Module]


@pytest.mark.parametrize(
    ("make", "data", "factor"),
    [
        pytest.param(grouped, images, 0.6, id="grouped convolution"),
        pytest.param(depthwise, images, 0.1, id="depthwise convolution"),
        pytest.param(transposed, images, 0.7, id="transposed convolution"),
        pytest.param(Experts, images, 0.1, id="batch of matrices"),
        pytest.param(Shared, images, 0.1, id="shared weight"),
        pytest.param(lambda: HalfPrecision(torch.bfloat16), images, 0.1, id="bfloat16"),
        pytest.param(lambda: HalfPrecision(torch.float16), images, 0.1, id="float16"),
        pytest.param(lambda: Recurrent(nn.LSTM), images, 0.6, id="LSTM"),
        pytest.param(lambda: Recurrent(nn.GRU, bidirectional=True), images, 0.6, id="GRU in both directions"),
        pytest.param(Embedded, words, 0.1, id="behind a table"),
    ],
)
def test_refitted_layers_are_nearer_than_masked_ones(
    make: Make, data: Callable[[int, int], torch.Tensor], factor: float
) -> None:
    torch.manual_seed(0)
    x, unseen = data(64, 0), data(64, 1)
    graph = capture(make().eval(), (x,))
    masked = error(graph, regauge.optimize(graph, "prune{ratio=0.4,compensate=false}"), unseen)
    refitted = error(graph, regauge.optimize(graph, "prune{ratio=0.4,score=l2}", data=[(x,)]), unseen)
    chosen = error(graph, regauge.optimize(graph, "prune{ratio=0.4}", data=[(x,)]), unseen)
    assert refitted < factor * masked
    assert chosen < factor * masked


def test_of_a_shared_weight_that_is_refitted_nothing_is_told_as_lost() -> None:
    torch.manual_seed(0)
    x = images(64, 0)
    pruned = regauge.optimize(capture(Shared().eval(), (x,)), "prune{ratio=0.4,score=l2,compensate=true}", data=[(x,)])
    (cut,) = pruned.report.passes[0].cuts
    assert (cut.before, cut.after, cut.lost) == (24, 14, ())


class Turned(nn.Module):
    """The layers of another model as Falcon writes them."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        first, second, third = (layer.weight for layer in layers if isinstance(layer, nn.Linear))
        self.weights = nn.ParameterList([first, second, third.detach().t().contiguous()])
        self.bias = layers[-1].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third = self.weights
        return nn.functional.linear(torch.relu(torch.relu(x @ first.t()) @ second.T), third.t(), self.bias)


@pytest.mark.parametrize("options", ["ratio=0.4", "ratio=0.4,score=wanda", "params=0.6,scope=dp", "macs=0.6"])
def test_layers_whose_weights_are_turned_are_refitted_as_others(options: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(6, 24, bias=False), nn.ReLU(), nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 5)
    )
    x, unseen = (torch.randn(400, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    results, notes = [], []
    for model in (plain, Turned(plain)):
        graph = capture(model.eval(), (x,))
        pruned = regauge.optimize(graph, f"prune{{{options}}}", data=[(x,)])
        notes.append([note for note in pruned.report.passes[0].notes if note.startswith("layers refitted on 400")])
        results.append(pruned.run(unseen)[0])
        torch.testing.assert_close(pruned.to_torch()(unseen), results[-1])
    assert notes[0] and notes[0] == notes[1]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_examples_do_no_harm(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5)).eval()
    generator = torch.Generator().manual_seed(0)
    x, unseen = torch.randn(count, 20, generator=generator), torch.randn(200, 20, generator=generator)
    graph = capture(model, (torch.randn(2, 20),), dynamic={0: {0: "batch"}})
    masked = error(graph, regauge.optimize(graph, "prune{ratio=0.3,compensate=false}"), unseen)
    pruned = regauge.optimize(graph, "prune{ratio=0.3,score=l2}", data=[(x,)])
    assert error(graph, pruned, unseen) <= 1.05 * masked


def test_a_refit_that_lowers_no_error_is_not_taken() -> None:
    """Inputs that have nothing in common, fewer than columns: what a fit learns of a half is no use to the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(64, 64)).Q)
    graph = capture(model, (torch.randn(2, 64),), dynamic={0: {0: "batch"}})
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    pruned = regauge.optimize(graph, "prune{ratio=0.5,score=l2}", data=[(x,)])
    assert "refitted on 16 examples: 0; 1 stayed" in str(pruned.report)


def loop_of_layers() -> onnx.ModelProto:
    """``for 3 turns: h = relu(h a) b``, the layers inside a loop."""
    generator = np.random.default_rng(0)
    into = (generator.standard_normal((8, 4)) @ generator.standard_normal((4, 32)) / 8).astype(np.float32)
    out = (generator.standard_normal((32, 8)) / 32**0.5).astype(np.float32)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "into"], ["wide"]),
            helper.make_node("Relu", ["wide"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "out"], ["next"]),
            helper.make_node("Identity", ["going"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 8]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["batch", 8]),
        ],
    )
    body.initializer.extend([numpy_helper.from_array(into, "into"), numpy_helper.from_array(out, "out")])
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "", "x"], ["y"], body=body)],
        "loop",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(np.array(3, np.int64), "turns")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_layers_in_the_body_of_a_loop_are_scored_and_refitted() -> None:
    graph = regauge.load(loop_of_layers())
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    unseen = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    masked = error(graph, regauge.optimize(graph, "prune{ratio=0.4,compensate=false}"), unseen)
    pruned = regauge.optimize(graph, "prune{ratio=0.4,compensate=true}", data=[(x,)])
    assert "refitted on 64 examples: 2" in str(pruned.report)
    assert error(graph, pruned, unseen) < 0.5 * masked
