"""What passes learn from data: layers as matrices, moments, runs side by side, gradients."""

import pytest
import torch
from torch import nn

from regauge.frontends.capture import capture
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.layers import layer_of
from regauge.passes.calibration.moments import Moments, least_squares


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.Linear(6, 4, bias=False), (5, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, stride=2), (2, 3, 7, 8)),
        (nn.Conv2d(3, 4, (3, 2), dilation=(1, 2), padding=(0, 1), bias=False), (2, 3, 7, 8)),
        (nn.Conv1d(3, 4, 5, padding=2), (2, 3, 9)),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5)),
    ],
)
def test_a_layer_is_its_matrix_on_the_rows_of_its_input(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    graph = capture(module, (x,))
    layer = next(found for node in graph.nodes if (found := layer_of(node)) is not None)
    y = layer.rows_of_input(x) @ layer.matrix(layer.weight.tensor).t()
    y = y if layer.bias is None else y + layer.bias.tensor
    torch.testing.assert_close(y, layer.rows_of_output(module(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.stored(layer.matrix(layer.weight.tensor)), layer.weight.tensor)


def test_what_is_no_matrix_of_its_own_is_no_layer() -> None:
    graph = capture(nn.Conv2d(4, 4, 3, groups=2), (images(1, 4, 5, 5),))
    assert [layer_of(node) for node in graph.nodes] == [None]


def test_the_columns_of_an_index_are_those_of_its_place_in_the_axis() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3)), (images(1, 3, 5, 5),))
    layer = layer_of(graph.nodes[1])
    (dim,) = [group.dim for group in graph.groups() if group.free]
    assert layer is not None
    assert layer.columns_of(graph, dim).tolist() == [list(range(9 * j, 9 * j + 9)) for j in range(4)]


def test_least_squares_finds_the_map_and_its_bias() -> None:
    x, weight, bias = images(200, 5).double(), images(3, 5).double(), torch.tensor([1.0, -2.0, 3.0]).double()
    found = Moments(5, 3)
    for part in x.split(60):
        found.add(part, part @ weight.t() + bias)
    before = torch.zeros(3, 6, dtype=torch.float64)
    solved = least_squares(found, before, 1e-9, bias=True)
    torch.testing.assert_close(solved, torch.cat([weight, bias[:, None]], 1), rtol=1e-4, atol=1e-4)
    known = torch.cat([before[:, :-1], bias[:, None]], 1)
    torch.testing.assert_close(least_squares(found, known, 1e-9, bias=False)[:, :-1], weight, rtol=1e-4, atol=1e-4)


def test_directions_that_the_data_does_not_show_keep_their_weight() -> None:
    x = images(50, 4).double() * torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = Moments(4, 2)
    found.add(x, x[:, :2])
    before = images(2, 5).double()
    solved = least_squares(found, before, 1e-6, bias=True)
    torch.testing.assert_close(solved[:, 2:4], before[:, 2:4])


def test_a_run_side_by_side_gives_what_single_runs_give() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    graph = capture(model, (images(2, 3, 5, 5),), dynamic={0: {0: "batch"}})
    batches = [(images(n, 3, 5, 5),) for n in (2, 3)]
    run = Lockstep(graph, batches)
    found: list[torch.Tensor] = []
    for node in run.steps():
        if node is graph.nodes[-1]:
            run.execute(node)
            found = run.values(node.output)
    for y, batch in zip(found, batches, strict=True):
        torch.testing.assert_close(y, graph.run(batch)[0])


def test_squared_gradients_are_those_of_the_jacobian() -> None:
    graph = Graph("scaled")
    build = Builder(graph)
    x = build.input("x", (1, 3), torch.float32)
    hidden = build.relu(x)
    graph.outputs = [build.linear(hidden, build.parameter("w", torch.tensor([[1.0, 2.0, 0.0], [2.0, 0.0, 3.0]])))]
    total = torch.zeros(3)
    draws = 4000

    def visit(value: object, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        total.add_(gradient[0].square() / draws)

    visit_gradients(graph, [(torch.ones(1, 3),)], [hidden], visit, draws=draws)
    torch.testing.assert_close(total, torch.tensor([5.0, 4.0, 9.0]), rtol=0.1, atol=0.0)


def test_columns_of_heads_and_of_sizes_inside_them() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 8, batch_first=True).eval()
    graph = capture(layer, (images(2, 5, 12),))
    output = next(found for node in graph.nodes if (found := layer_of(node)) and "out_proj" in found.weight.name)
    heads, sizes = graph.dims(output.node.inputs[0])[-1]
    assert output.columns_of(graph, heads).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert output.columns_of(graph, sizes).tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
