"""What all structured sparsifiers stand on: the module with dead slices at zero computes what the cut graph does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import regauge
from regauge.demo import DigitsNetwork
from regauge.ir.dims.extents import Concat, Dim, Product
from regauge.passes.training.places import contracted_axes, laid_along, sums_by_index
from regauge.training import GradualGroups, Target


class Dense(nn.Module):
    """Concatenations, a grouped convolution, a gate in two halves and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.grow = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.gate = nn.Conv2d(16, 24, 1)
        self.back = nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(16 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.stem(x))
        x = torch.cat([x, F.relu(self.grow(x))], 1)
        x = F.relu(self.norm(self.grouped(x)))
        value, gate = self.gate(x).chunk(2, 1)
        x = x + self.back(value * torch.sigmoid(gate))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Grouped(nn.Module):
    """Attention of four query heads on two key heads, with rotary places, and a square map beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, size) for size in (32, 16, 16, 16))
        self.o = nn.Linear(32, 16)
        self.square = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)
        angles = torch.arange(6)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = (f(x).reshape(n, t, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (part.repeat_interleave(2, 1) for part in (self.rotated(k), v))
        x = x + self.o(F.scaled_dot_product_attention(self.rotated(q), k, v).transpose(1, 2).reshape(n, t, 32))
        return self.head(x + self.square(x))


CASES = {
    "dense": (Dense, (2, 1, 8, 8)),
    "grouped": (Grouped, (2, 6, 8)),
    "depthwise": (DigitsNetwork, (2, 1, 8, 8)),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(6, 9)), nn.SiLU(), weight_norm(nn.Linear(9, 8)), nn.Linear(8, 4)),
        (3, 6),
    ),
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 4)), (3, 6)),
}


def case(name: str) -> tuple[nn.Module, torch.Tensor, regauge.Graph]:
    torch.manual_seed(0)
    make, shape = CASES[name]
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model, x, regauge.capture(model, (x,))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_module_with_zeros_is_the_cut_graph(name: str, seed: int) -> None:
    model, x, graph = case(name)
    sparsifier = GradualGroups(model, graph, Target(ratio=0.5), every=1, updates=1)
    generator = np.random.default_rng(seed)
    for alive in sparsifier.alive.values():
        alive[generator.permutation(len(alive))[: len(alive) // 2]] = False
    whole = model(x)
    sparsifier.steps = 1
    small = sparsifier.finish()
    masked = model(x)
    assert not torch.allclose(masked, whole)
    torch.testing.assert_close(small.run(x)[0], masked, rtol=1e-10, atol=1e-10)


def test_more_than_a_few_dims_are_in_it() -> None:
    assert {name: len(GradualGroups(*case(name)[::2], Target(ratio=0.5)).dims) for name in CASES} == {
        "dense": 5,
        "grouped": 5,
        "depthwise": 4,
        "weight norm": 1,
        "perceptron": 1,
    }


def test_a_square_map_reads_on_one_axis_and_makes_on_the_other() -> None:
    _, _, graph = case("grouped")
    read = {(member.parameter.name, member.axis) for member in contracted_axes(graph)}
    weights = ("embed", "q", "k", "v", "o", "square", "head")
    assert read == {(f"{name}.weight", 1) for name in weights}


def test_factors_and_sums_on_axes_of_several_dims() -> None:
    """On a product of Dims factors multiply; of a Dim that occurs twice the sums of both places add up."""
    group, channel = Dim(2, "group"), Dim(3, "channel")
    product, twice = Product((group, channel)), Concat((channel, channel))
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])
    torch.testing.assert_close(laid_along(product, {group: one, channel: two}), torch.outer(one, two).flatten())
    torch.testing.assert_close(laid_along(twice, {channel: two}), torch.cat([two, two]))
    assert laid_along(twice, {group: one}) is None
    values = torch.arange(6.0)
    assert sums_by_index(product, values, group).tolist() == [3, 12]
    assert sums_by_index(product, values, channel).tolist() == [3, 5, 7]
    assert sums_by_index(twice, values, channel).tolist() == [3, 5, 7]
