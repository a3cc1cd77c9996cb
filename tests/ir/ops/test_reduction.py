"""Reductions and orderings: a reduced axis may be cut, one whose positions are results may not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import randn

from cutting import free_sizes
from onnx_node import check_node, normal, operators
from regauge.frontends.capture import capture
from regauge.ir.dims.groups import find_group
from regauge.ir.dims.resize import resize
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import sample
from regauge.ir.running.interpret import run
from regauge.spelling import check_sample


def projected(width: int = 8) -> tuple[Graph, Builder, Value]:
    """x (2, 3) -> (2, width) through a weight called ``a``."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float32)
    return graph, build, build.linear(x, build.parameter("a", randn(width, 3)))


def test_a_mean_over_an_axis_that_is_cut_is_the_mean_of_what_is_left() -> None:
    graph, build, h = projected()
    graph.outputs = [build.mean(h, dims=(1,))]
    assert free_sizes(graph) == {"a:0": 8}
    x = randn(2, 3)
    kept = resize(graph, {find_group(graph, "a:0").dim: [1, 4, 6]})
    expected = (x @ graph.parameters["a"].tensor[[1, 4, 6]].T).mean(1)
    torch.testing.assert_close(run(kept, [x])[0], expected)


@pytest.mark.parametrize("op", ["argmax", "argmin", "sort", "topk", "cumsum", "cumprod"])
def test_positions_pin_their_axis(op: str) -> None:
    graph, build, h = projected()
    options = {"topk": {"k": 2}}.get(op, {})
    result = build(op, h, dim=1, **options)
    graph.outputs = [result[0] if isinstance(result, tuple) else result]
    assert free_sizes(graph) == {}
    reasons = {str(pin) for pin in find_group(graph, "a:0").pins}
    assert any(op in reason for reason in reasons)


def test_positions_along_one_axis_leave_the_others_free() -> None:
    graph, build, h = projected()
    peak = build.cast(build.argmax(build.unsqueeze(h, dim=2), dim=2), dtype=torch.float32)
    graph.outputs = [build.linear(peak, build.parameter("b", randn(4, 8)))]
    assert free_sizes(graph) == {"a:0": 8}


def test_kept_axes_have_size_one() -> None:
    graph, build, h = projected()
    assert build.sum(h, dims=None, keepdim=True).shape == (1, 1)
    assert build.sum(h, dims=(), keepdim=False).shape == ()
    assert build.amax(h, dims=None).shape == ()
    assert build.prod(h, dims=(0, 1), keepdim=True).shape == (1, 1)
    graph.outputs = [h]
    assert graph.axes.problems == []


TORCH = {
    "mean": lambda x: (x.mean(), x.mean(1), x.mean((1, -1), keepdim=True), x.mean(-1, dtype=torch.float64)),
    "sum": lambda x: (x.sum(), x.sum(1), (x > 0).sum(1), x.sum(dim=[]), torch.count_nonzero(x, 1)),
    "extremes": lambda x: (x.amax(1), x.amin((1, 2), True), x.max(), x.min(), *x.max(1), *x.min(1, True)),
    "both extremes": lambda x: (*torch.aminmax(x, dim=1), x.prod(1), x.prod()),
    "truth": lambda x: ((x > 0).any(), (x > 0).all(1), (x > 0).any(-1, True), (x > 0).all(), (x > 0).any((1, 2))),
    "variance": lambda x: (x.var(), x.var(1), x.var(False), *torch.var_mean(x, (1, 2), correction=0, keepdim=True)),
    "deviation": lambda x: (x.std(), x.std((1, 2), unbiased=False), *torch.std_mean(x), x.std(1, keepdim=True)),
    "norm": lambda x: (x.norm(), x.norm(1), x.norm(1, 2, True), x.norm(p="fro", dim=1), torch.linalg.norm(x, dim=1)),
    "unit vectors": lambda x: (torch.nn.functional.normalize(x, dim=1), torch.cosine_similarity(x, x + 1, 1)),
    "logsumexp": lambda x: (torch.logsumexp(x, 1), torch.logsumexp(x, (1, 2), True)),
    "orders": lambda x: (*x.sort(1), *torch.sort(x, stable=True, dim=1, descending=True), x.argsort(1), *x.topk(2, 1)),
    "scans": lambda x: (x.cumsum(1), x.cumsum(1, dtype=torch.float64), x.cumprod(1), torch.logcumsumexp(x, 1)),
    "counts": lambda x: (torch.histc(x, 5), torch.bucketize(x, torch.tensor([0.0, 1.0]))),
    "small integers": lambda x: (x.int().cumsum(1, dtype=torch.int32), x.int().sum(1, dtype=torch.int32)),
    "entries": lambda x: (*x.median(1), *x.kthvalue(2, 1, True), *x.cummax(1), *x.int().mode(1)),
    "distances": lambda x: (torch.cdist(x, x + 1, 1.0), torch.nn.functional.pairwise_distance(x, x + 1)),
    "positions": lambda x: (x.argmax(), x.argmin(1, True), x.argmax(-1)),
}  # fmt: skip


class Called(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", TORCH)
def test_torch_calls_are_read_by_records_and_compute_the_same(name: str) -> None:
    module, x = Called(TORCH[name]).eval(), randn(2, 4, 5)
    graph = capture(module, (x,))
    assert "torch_call" not in operators(graph)
    assert graph.axes.problems == []
    for actual, wanted in zip(run(graph, [x]), module(x), strict=True):
        torch.testing.assert_close(actual, wanted)


# -- ONNX --------------------------------------------------------------------------------------------------------------

X = normal(2, 4, 6, 7)
POSITIVE = np.abs(X) + 0.1
REDUCTIONS = "Mean Sum Max Min Prod L1 L2 LogSum LogSumExp SumSquare".split()


@pytest.mark.parametrize("name", REDUCTIONS)
def test_onnx_axes_as_an_attribute(name: str) -> None:
    op, opset = f"Reduce{name}", 11
    check_node(op, [POSITIVE], opset=opset, axes=[1, 3])
    check_node(op, [POSITIVE], opset=opset, axes=[-1], keepdims=0)
    check_node(op, [POSITIVE], opset=opset)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_onnx_axes_as_an_input(name: str) -> None:
    op = f"Reduce{name}"
    check_node(op, [POSITIVE, np.array([1, -1])], opset=18, constants={1})
    check_node(op, [POSITIVE], opset=18)
    assert "onnx_call" not in operators(check_node(op, [POSITIVE], opset=18, noop_with_empty_axes=1))


def test_onnx_sums_keep_the_type_of_small_integers() -> None:
    check_node("ReduceSum", [np.array([[1, 2]], np.int32), np.array([1])], opset=13, constants={1})
    check_node("ReduceMax", [np.array([[1, 2]], np.int32), np.array([1])], opset=18, constants={1})


@pytest.mark.parametrize("options", [{}, {"reverse": 1}, {"exclusive": 1}, {"reverse": 1, "exclusive": 1}])
def test_onnx_running_sums(options: dict[str, int]) -> None:
    check_node("CumSum", [X, np.int64(1)], constants={1}, **options)
    uneven = np.array([[1e-3, 1e8, 2.0, np.inf, 3.0]], np.float32)
    check_node("CumSum", [uneven, np.int64(1)], constants={1}, **options)


def test_onnx_positions() -> None:
    for op in ("ArgMax", "ArgMin"):
        check_node(op, [X])
        check_node(op, [X], axis=-1, keepdims=0)
    check_node("TopK", [X, np.array([3])], constants={1}, results=2, axis=1)
    check_node("TopK", [X, np.array([3])], constants={1}, results=2, largest=0)
    ties = np.random.default_rng(0).integers(0, 3, (4, 40)).astype(np.float32)
    for k in (1, 7, 40):  # torch gives any of equal entries, ONNX those that stand first
        check_node("TopK", [ties, np.array([k])], constants={1}, results=2)
        check_node("TopK", [ties, np.array([k])], constants={1}, results=2, largest=0, axis=0 if k == 1 else 1)


@pytest.mark.filterwarnings("ignore")
def test_onnx_last_index_of_equal_entries_stays_with_onnxruntime() -> None:
    assert operators(check_node("ArgMax", [X], select_last_index=1)) == ["onnx_call"]


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("op", ["var", "std"])
def test_the_spread_of_one_number_is_written_as_what_is_no_number(op: str) -> None:
    check_sample(op, 0, sample(randn(3, 1), dims=(1,)), 17)
    check_sample(op, 0, sample(randn(3, 2), dims=(1,), correction=3), 17)
