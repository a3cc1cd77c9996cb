"""Models that live on a GPU: captured, changed and emitted there, on data from either side. Skipped without a GPU."""

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.graph import Graph

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


class Attention(nn.Module):
    """One pre-norm layer with token ids in front: buffers, indices and masks are made on the GPU too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32)
        self.qkv, self.up, self.down = nn.Linear(32, 96), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).reshape(*ids.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(x)))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (count, 12), generator=torch.Generator().manual_seed(seed))


MODELS = {"residual": (Residual, images), "attention": (Attention, ids)}


@pytest.fixture(params=sorted(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[Graph, object]:
    make, draw = MODELS[request.param]
    model = make().eval().cuda()
    return capture(model, (draw(2).cuda(),), dynamic={0: {0: "batch"}}), draw


def error(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    (y,), (z,) = graph.run(x), other.run(x)
    assert y.is_cuda and z.is_cuda
    return float((z - y).double().square().sum() / y.double().square().sum())


def test_a_captured_graph_runs_and_is_emitted_on_the_gpu(case) -> None:
    graph, draw = case
    x = draw(4, 1).cuda()
    module = graph.to_torch()
    assert all(parameter.is_cuda for parameter in module.parameters())
    torch.testing.assert_close(module(x), graph.run(x)[0], rtol=1e-4, atol=1e-5)
    on_cpu = graph.to_torch(device="cpu")(x.cpu())
    torch.testing.assert_close(on_cpu, graph.run(x)[0].cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pipeline", ["simplify", "prune{ratio=0.5,compensate=false}", "prune{params=0.6},simplify"])
def test_passes_without_data(case, pipeline: str) -> None:
    graph, draw = case
    result = regauge.optimize(graph, pipeline)
    assert result.run(draw(4).cuda())[0].is_cuda
    if pipeline == "simplify":
        assert error(graph, result, draw(4).cuda()) < 1e-6


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_data_may_lie_on_either_side(case, place: str) -> None:
    graph, draw = case
    data = [(draw(64, seed).to(place),) for seed in (1, 2)]
    repaired = regauge.optimize(graph, "prune{params=0.7}", data=data)
    masked = regauge.optimize(graph, "prune{params=0.7,compensate=false,score=l2}")
    unseen = draw(64, 9).cuda()
    assert error(graph, repaired, unseen) < error(graph, masked, unseen)


def test_a_module_changed_in_place_stays_on_the_gpu() -> None:
    model = Residual().eval().cuda()
    graph = capture(model, (images(2).cuda(),))
    pruned = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}")
    pruned.apply_to(model)
    assert all(parameter.is_cuda for parameter in model.parameters())
    torch.testing.assert_close(model(images(2).cuda()), pruned.run(images(2).cuda())[0], rtol=1e-4, atol=1e-5)
