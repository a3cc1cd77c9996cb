"""H^-1 of few rows without the matrix, sketches of many outputs, and refits to fewer rows than columns."""

import numpy as np
import pytest
import torch
from torch import nn

from regauge.frontends.capture import capture
from regauge.passes.calibration.layers import layer_of
from regauge.passes.calibration.moments import Halves, Moments, inverse, least_squares
from regauge.passes.pruning import surgeon
from regauge.passes.pruning.inverse_hessian import DenseInverse, InverseOfRows, inverse_hessian
from regauge.passes.pruning.refit import fitted, judged
from regauge.passes.pruning.surgeon import Share, taken_apart


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both_forms() -> tuple[InverseOfRows, DenseInverse]:
    moments = Moments(40)
    moments.add(rows(9, 40) + 0.5)
    few = inverse_hessian(moments, 0.1, torch.float64)
    assert isinstance(few, InverseOfRows) and len(few) == 40
    return few, DenseInverse(inverse(moments, 0.1))


def test_the_inverse_of_few_rows_is_that_of_the_matrix() -> None:
    few, matrix = both_forms()
    some, pairs = torch.arange(3, 33), torch.tensor([[0, 5], [7, 2]])
    for one, other in ((few, matrix), (few.at(some), matrix.at(some)), (few.matrix_at(some), matrix.at(some))):
        torch.testing.assert_close(one.diagonal(), other.diagonal())
        torch.testing.assert_close(one.blocks(pairs), other.blocks(pairs))
    assert isinstance(few.at(some), InverseOfRows) and isinstance(few.at(some[:4]), DenseInverse)


def test_columns_of_few_rows_are_removed_as_from_the_matrix() -> None:
    few, matrix = both_forms()
    weights, gone = rows(5, 40, seed=1), torch.tensor([1, 4, 9])
    for _ in range(2):  # the second removal starts from what the first has left
        left = torch.tensor([column for column in range(len(few)) if column not in gone.tolist()])
        wanted = few.removal(gone, left).made_up(weights)
        torch.testing.assert_close(matrix.removal(gone, left).made_up(weights), wanted)
        one, other = weights.t().contiguous(), weights.t().contiguous()
        few.take_out(gone, one)
        matrix.take_out(gone, other)
        torch.testing.assert_close(one[left].t(), wanted)
        torch.testing.assert_close(other[left].t(), wanted)
        few, matrix, weights = few.at(left), matrix.at(left), wanted
        torch.testing.assert_close(few.diagonal(), matrix.diagonal())


def test_a_sketch_of_many_outputs_has_the_squares_of_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 2000)).eval()
    x = torch.randn(100, 24)
    graph = capture(model, (x,))
    layer = layer_of(graph.nodes[-1])
    assert layer is not None
    (dim,) = [group.dim for group in graph.groups() if group.free]
    hidden = torch.relu(model[0](x)).detach().double()
    moments = Moments(256)
    moments.add(hidden)
    share = Share.of(graph, dim, [layer], {layer: torch.ones(1, 2000, dtype=torch.float64)}, 0, moments)
    exact = taken_apart([share], 256, None)[0]
    every = torch.arange(256)
    whole = model[2].weight.detach().double().square().sum(0)
    torch.testing.assert_close(share.part(every, share.inverse()).weights.square().sum(1), whole)
    monkeypatch.setattr(surgeon, "_DOUBLE", 200)
    part = share.part(every, share.inverse())
    assert part.weights.shape == (256, 768) and share.bytes(256) == 4 * 256 * (2 * 100 + 768)
    ratio = part.weights.square().sum(1).double() / whole
    assert abs(float(ratio.mean()) - 1) < 0.01 and 0.03 < float(ratio.std()) < 0.08
    sketched = taken_apart([share], 256, None)[0]
    y, lost = hidden @ model[2].weight.detach().double().t(), []
    for scores in (sketched, exact, np.random.default_rng(0).random(256)):
        kept = hidden[:, np.argsort(scores)[100:].copy()]
        found = Moments(156, 2000)
        found.add(kept, y)
        solved = least_squares(found, torch.zeros(2000, 157, dtype=torch.float64), 1e-2, bias=True)
        lost.append(found.error(solved[:, :-1], solved[:, -1]))
    assert lost[0] < 1.05 * lost[1] < lost[2], lost


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_refit_to_fewer_rows_than_columns_is_the_least_squares_one(free: bool, dtype: torch.dtype) -> None:
    x, weight = rows(60, 8) @ rows(8, 100, seed=1), rows(7, 100, seed=2).to(dtype)
    x += 0.3 * rows(60, 100, seed=5)
    y = (x @ weight.double().t() + x[:, :30] @ rows(30, 7, seed=3) + 1).to(dtype)
    x = x.to(dtype)
    bias = rows(7, seed=4)
    halves, same = Halves(100, 7), Halves(100, 7)
    for part in (halves, same):
        for start in (0, 15, 30, 45):
            part.add(x[start : start + 15], y[start : start + 15])
    both = torch.cat([weight.double(), bias[:, None]], 1)
    share = judged(same, both, bias=free)
    assert share is not None
    found = same.together()
    solved = least_squares(found, both, share, bias=free)
    result = fitted(halves, weight, bias, free)
    assert result is not None and result[0].dtype == dtype
    close = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(result[0].double(), solved[:, :-1], rtol=close, atol=close)
    torch.testing.assert_close(result[1].double(), solved[:, -1], rtol=close, atol=4 * close)
    assert found.error(*result) < 1.02 * found.error(solved[:, :-1], solved[:, -1]) + 1e-9 < found.error(weight, bias)
