"""Every score: values worked out by hand on tiny layers, gradients against finite differences, and lengths anywhere."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.losses import Labelled, labelled
from regauge.passes.calibration.weight_gradients import batch_gradients, example_gradients, hessian_products
from regauge.passes.pruning.score_table import SCORES, score
from regauge.passes.pruning.scores import normalised, reduced
from regauge.passes.pruning.weight_scores import lamp

FIRST = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]).double()
SECOND = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]]).double()  # a vector would not be scored beside a matrix
X = torch.tensor([[1.0, 1.0], [2.0, 0.0]]).double()
# hidden h = X FIRST' = [[1, 2, 7], [2, 0, 6]], y = h SECOND' = [[8.5, 0], [5, 0]]


def two_layers() -> Graph:
    """f64[2,2] -> three hidden units -> f64[2,2], without anything between."""
    graph = Graph("two")
    build = Builder(graph)
    hidden = build.linear(build.input("x", (2, 2), torch.float64), build.parameter("first", FIRST.clone()))
    graph.outputs = [build.linear(hidden, build.parameter("second", SECOND.clone()))]
    return graph


def by_sum(outputs: torch.Tensor, batch: object) -> torch.Tensor:
    return outputs.sum()


def by_square(outputs: torch.Tensor, batch: object) -> torch.Tensor:
    return 0.5 * outputs.square().sum()


def of_hidden(name: str, loss: object = by_sum, **options: object) -> list[float]:
    graph = two_layers()
    (group,) = [group for group in graph.groups() if group.free and group.size == 3]
    options = {"normalise": "none", "reduce": "sum", **options}
    found = score(graph, [group], name, batches=[labelled(graph, (X,))], loss=loss, **options)  # type: ignore[arg-type]
    return [round(float(value), 6) for value in found[group.dim]]


def test_norms() -> None:
    assert of_hidden("l1") == [2, 4, 7.5]
    assert of_hidden("l2") == [round(math.sqrt(v), 6) for v in (1 + 1, 4 + 4, 25 + 0.25)]


def test_norms_of_a_dim_of_any_gauge_are_those_of_the_product() -> None:
    """Without a function between them, one layer may grow as the other shrinks: the product of their norms stays."""
    assert of_hidden("l2", reduce=None) == [round(math.sqrt(v), 6) for v in (1 * 1, 2 * 2, 5 * 0.5)]
    assert of_hidden("l1", reduce=None) == [round(math.sqrt(v), 6) for v in (1 * 1, 2 * 2, 7 * 0.5)]


def test_members_are_reduced_as_asked() -> None:
    assert of_hidden("l1", reduce="first") == [1, 2, 7]
    assert of_hidden("l1", reduce="max") == [1, 2, 7]
    assert of_hidden("l1", reduce="prod") == [1, 4, 3.5]
    assert of_hidden("l1", reduce="mean") == [1, 2, 3.75]
    assert reduced([], "mean", 2).tolist() == [0, 0]


def test_scores_are_normalised_as_asked() -> None:
    scores = np.array([1.0, 3.0, np.nan, -4.0])
    assert normalised(scores, "none").tolist() == [1, 3, 0, -4]
    assert normalised(scores, "sum").tolist() == [0.125, 0.375, 0, -0.5]
    assert normalised(scores, "max").tolist() == [0.25, 0.75, 0, -1]
    assert normalised(scores, "minmax").tolist() == [5 / 7, 1, 4 / 7, 0]
    assert normalised(scores, "zscore").mean() == 0 and normalised(scores, "zscore").std() == pytest.approx(1)
    assert normalised(np.zeros(2), "mean").tolist() == [0, 0]


def test_distances_to_all_others() -> None:
    first = [
        math.hypot(1, 2) + math.hypot(2, 4),
        math.hypot(1, 2) + math.hypot(3, 2),
        math.hypot(2, 4) + math.hypot(3, 2),
    ]
    second = [1 + 0.5, 1 + 1.5, 0.5 + 1.5]
    assert of_hidden("fpgm") == [round(a + b, 6) for a, b in zip(first, second, strict=True)]


def test_lamp_is_the_share_of_what_is_at_least_as_large() -> None:
    assert lamp(np.array([4.0, 1.0, 5.0])).tolist() == [4 / 9, 1 / 10, 1]
    assert of_hidden("lamp") == [round(v, 6) for v in (2 / 35.25, 8 / 33.25, 1)]


def test_activations() -> None:
    assert of_hidden("activation") == [1.5, 1, 6.5]
    assert of_hidden("activation-norm") == [round(math.hypot(*v), 6) for v in ((1, 2), (2, 0), (7, 6))]


def test_wanda_is_the_square_of_weight_times_input() -> None:
    assert of_hidden("wanda") == [1 * (1 + 4) / 2, 4 * (4 + 0) / 2, 0.25 * (49 + 36) / 2]


# The loss is the sum of y. Of each member, sum w g of index i is second_i * sum over examples of h_i: [3, 4, 6.5].


def test_taylor_scores() -> None:
    assert of_hidden("taylor", reduce="first") == [3, 4, 6.5]
    assert of_hidden("taylor") == [6, 8, 13]
    # |w g| element by element: first.g = second_i * sum of x = second_i * [3, 1]
    assert of_hidden("taylor-element", reduce="first") == [3, 4, 0.5 * (9 + 4)]


def test_squares_are_taken_example_by_example() -> None:
    each = [(1**2 + 2**2) / 2, (4**2 + 0) / 2, (3.5**2 + 3**2) / 2]
    assert of_hidden("taylor-squared", reduce="first") == each
    assert of_hidden("mask-gradient") == each
    assert of_hidden("fisher") == [4 * value for value in each]  # both members say the same, and are added before


def test_the_diagonal_of_the_hessian_is_that_of_single_examples() -> None:
    # first: g = second_i * x for each example; h = second_i^2 * mean x^2 = second_i^2 * [2.5, 0.5]
    first = [0.5 * 1 * 2.5, 0.5 * 4 * 4 * 0.5, 0.5 * 0.25 * (9 * 2.5 + 16 * 0.5)]
    second = [0.5 * w**2 * (a**2 + b**2) / 2 for w, a, b in ((1, 1, 2), (2, 2, 0), (0.5, 7, 6))]
    assert of_hidden("obd") == [round(a + b, 6) for a, b in zip(first, second, strict=True)]


def test_snip_is_a_share_of_all() -> None:
    assert of_hidden("snip") == [round(v / 27, 6) for v in (6, 8, 13)]


def test_gradient_flow() -> None:
    """y = a b x has, with loss y^2 / 2, the gradient a b x^2 [b, a] and the Hessian x^2 [[b^2, 2ab], [2ab, a^2]]."""
    graph = Graph("product")
    build = Builder(graph)
    a, b = torch.tensor([[2.0], [0.0]]).double(), torch.tensor([[3.0, 0.0]]).double()
    hidden = build.linear(build.input("x", (1, 1), torch.float64), build.parameter("a", a))
    graph.outputs = [build.linear(hidden, build.parameter("b", b))]
    groups = [group for group in graph.groups() if group.free]
    batches = [Labelled((torch.ones(1, 1).double(),), None, None)]
    g = 2 * 3 * np.array([3, 2])
    product = np.array([[9, 12], [12, 4]]) @ g
    found = score(graph, groups, "grasp", batches=batches, loss=by_square, normalise="none", reduce="sum")
    assert found[groups[0].dim][0] == pytest.approx(2 * product[0] + 3 * product[1])
    found = score(graph, groups, "crop", batches=batches, loss=by_square, normalise="none", reduce="first")
    assert found[groups[0].dim][0] == pytest.approx(abs(2 * product[0]))


def test_hesso_is_the_mean_of_five_shares() -> None:
    norms = np.sqrt([2.0, 8.0, 25.25])
    product = np.array([6.0, 8.0, 13.0])
    steep = np.sqrt([10 + 2 * 9, 4 * 10 + 2 * 4, 0.25 * 10 + 2 * 169])
    cosine = 1 - product / (norms * steep)
    proxies = [norms, norms / np.sqrt(4), cosine, product, product**2]
    expected = np.mean([proxy / proxy.sum() for proxy in proxies], axis=0)
    assert of_hidden("hesso") == [round(float(value), 6) for value in expected]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_gradients_are_finite_differences() -> None:
    x, labels = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    model = network()
    graph = capture(model, (x,), dynamic={0: {0: "batch"}})
    weight = graph.parameters["0.weight"]
    batches = [labelled(graph, (x[:4], labels[:4])), labelled(graph, (x[4:], labels[4:]))]
    loss = nn.CrossEntropyLoss()

    def shifted(step: torch.Tensor) -> torch.Tensor:
        parameters = {**dict(model.named_parameters()), "0.weight": model[0].weight + step}
        return loss(torch.func.functional_call(model, parameters, (x,)), labels)

    found = batch_gradients(graph, [weight], batches, None)[weight]
    each = list(example_gradients(graph, [weight], batches, None))
    torch.testing.assert_close(torch.stack([g[weight] for g in each]).mean(0), found)
    product = hessian_products(graph, [weight], [labelled(graph, (x, labels))], None)[weight]
    step = 1e-4
    for place in ((0, 1), (3, 2)):
        unit = torch.zeros(5, 4).double()
        unit[place] = step
        expected = (shifted(unit) - shifted(-unit)) / (2 * step)
        torch.testing.assert_close(found[place], expected.detach(), rtol=1e-5, atol=1e-8)
    ahead, behind = (torch.autograd.grad(shifted(s * step * found), model[0].weight)[0] for s in (1, -1))
    torch.testing.assert_close(product, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-7)


def small_cnn() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    nn.init.uniform_(model[1].weight)
    return model, (torch.randn(2, 3, 8, 8),)


def small_transformer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True), (torch.randn(2, 5, 16),)


@pytest.mark.parametrize("make", [small_cnn, small_transformer])
@pytest.mark.parametrize("name", list(SCORES))
def test_every_score_is_finite_and_of_the_right_length(name: str, make: object) -> None:
    torch.manual_seed(0)
    model, inputs = make()  # type: ignore[operator]
    graph = capture(model.eval(), inputs)
    groups = [group for group in graph.groups() if group.free]
    found = score(graph, groups, name, batches=[labelled(graph, inputs)])
    assert groups
    for group in groups:
        assert found[group.dim].shape == (group.size,) and np.isfinite(found[group.dim]).all()
        assert group.size == 2 or found[group.dim].std() > 0, "it tells indices apart"


def test_labels_make_the_loss_a_cross_entropy() -> None:
    x = torch.randn(6, 4).double()
    graph = capture(network(), (x,), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "prune{ratio=0.4,score=fisher}", data=[(x, torch.zeros(6, dtype=torch.int64))])
    other = regauge.optimize(graph, "prune{ratio=0.4,score=fisher}", data=[(x,)])
    assert small.parameters["0.weight"].shape == other.parameters["0.weight"].shape == (3, 4)


def test_a_loss_of_ones_own_sees_outputs_and_batch() -> None:
    from regauge.passes.pruning.prune import Prune

    x, seen = torch.randn(6, 4).double(), list[object]()

    def loss(y: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.append(batch[1])
        return (y - batch[1]).square().mean()

    graph = capture(network(), (x,), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, Prune(ratio=0.4, score="taylor", loss=loss), data=[(x, torch.ones(6, 3).double())])
    assert seen and small.parameters["0.weight"].shape == (3, 4)
    with pytest.raises(PassError, match="loss must give one number"):
        regauge.optimize(graph, Prune(ratio=0.4, score="taylor", loss=lambda y, batch: y), data=[(x,)])


class Clamped(nn.Module):
    """Hardsigmoid, in operators that have second derivatives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x / 6 + 0.5, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["grasp", "crop"])
def test_an_operator_without_second_derivative_takes_differences(name: str, dtype: torch.dtype) -> None:
    """MobileNetV3's: torch has the first derivative of hardsigmoid only."""
    layers, x = [nn.Linear(4, 6), nn.Linear(6, 2)], torch.randn(3, 4).to(dtype)
    found = []
    for gate in (nn.Hardsigmoid(), Clamped()):
        graph = capture(nn.Sequential(layers[0], gate, layers[1]).to(dtype), (x,))
        groups = [group for group in graph.groups() if group.free]
        scores = score(graph, groups, name, batches=[labelled(graph, (x,))])
        found.append(torch.from_numpy(np.stack([scores[group.dim] for group in groups])))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * float(found[1].abs().max()))


def test_an_unknown_score_is_told_with_what_is_near() -> None:
    with pytest.raises(PassError, match="did you mean 'taylor'"):
        regauge.optimize(two_layers(), "prune{ratio=0.3,score=tailor}")
