"""Kernels in Triton's interpreter at the ends of what there is: no rows, no numbers, infinite ones, other types and
devices. test_kernel.py runs these tests in a process of their own."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

import triton_interpreter
from decoder_block import decoder_block
from kernel_contract import check_kernel, drawn, evaluated
from kernel_forms import form_graph
from regauge.backends.torch_module.kernels import with_kernels
from regauge.backends.triton_kernels.kernel import Form, triton_kernel
from regauge.ir.edit import Builder
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import symbol

triton_interpreter.repair()


@pytest.mark.parametrize("form", ["attention", "split"])
@pytest.mark.parametrize("op", ["attention", "capped_attention"])
def test_a_query_without_any_key_gets_what_its_operator_says(op: str, form: Form) -> None:
    """Zero of attention, and of one that is written out what is not a number; minus infinity is as good as a mask."""
    graph = Graph("g")
    build = Builder(graph)
    q, k, v = (build.input(name, (2, size, 16), torch.float32) for name, size in (("q", 3), ("k", 70), ("v", 70)))
    mask = build.input("mask", (3, 70), torch.float32)
    graph.outputs = [build(op, q, k, v, mask, scale=0.5, **({"softcap": 2.0} if op.startswith("capped") else {}))]
    tensors = dict(drawn(graph))
    tensors[mask][1] = float("-inf")
    tensors[mask][2, :69] = float("-inf")
    check_kernel(graph, tensors, form=form)
    (row,) = {float(number) for number in evaluated(graph, tensors)[graph.outputs[0]][:, 1].nan_to_num(7).flatten()}
    assert row == (0 if op == "attention" else 7)


@pytest.mark.parametrize("op", ["sum", "mean", "logsumexp"])
def test_rows_without_any_number_are_reduced_to_what_torch_says(op: str) -> None:
    rows, columns = symbol("rows"), symbol("columns")
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (rows, columns), torch.float32)
    double = build.mul(x, 2.0)
    graph.outputs = [build.mul(build(op, double, dims=(1,)), 0.5), build.neg(double)]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    for form in kernel.forms:
        for shape in ((3, 0), (0, 4), (0, 0)):
            check_kernel(graph, {x: torch.empty(shape)}, form=form)


def test_a_batch_of_none_is_summed_to_zero() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (symbol("rows"), symbol("columns")), torch.float32)
    graph.outputs = [build.mul(build.sum(build.exp(x), dims=None), 0.5)]
    for shape in ((0, 5), (3, 0)):
        check_kernel(graph, {x: torch.empty(shape)})


def test_a_number_of_no_entry_reads_nothing() -> None:
    graph = Graph("g")
    build = Builder(graph)
    table, numbers = build.parameter("table", torch.ones(5, 3)), build.input("numbers", (4,), torch.int64)
    graph.outputs = [build.neg(build.embedding(table, numbers))]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    (found,) = kernel.launch({table: table.tensor, numbers: torch.tensor([0, 5, -1, 4])}).values()
    assert found[:, 0].tolist() == [-1, 0, 0, -1]


def test_a_label_is_compared_as_the_integer_that_it_is() -> None:
    """As floats 2 ** 24 and the number behind it are the same."""
    graph = Graph("g")
    build = Builder(graph)
    numbers, x = build.input("numbers", (3,), torch.int64), build.input("x", (3,), torch.float32)
    graph.outputs = [build.where(build.eq(numbers, 2**24), x, 0.0)]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    (found,) = kernel.launch({numbers: torch.tensor([2**24, 2**24 + 1, 7]), x: torch.ones(3)}).values()
    assert found.tolist() == [1, 0, 0]


def test_of_other_types_an_operator_gives_what_torch_does() -> None:
    """As a module that was converted to halves, or to double precision, runs on a CPU."""
    for operator in with_kernels(decoder_block(tokens=8, width=16, heads=2, hidden=24, dtype=torch.float32)).operators:
        for dtype in (torch.float64, torch.bfloat16):
            tensors = [torch.randn([int(size) for size in value.shape], dtype=dtype) for value in operator.reads]
            torch.testing.assert_close(operator.launch(*tensors), operator.body(*tensors), rtol=0, atol=0)


def test_a_kernel_runs_on_the_device_of_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one, where the second of two GPUs is asked for."""
    devices: list[torch.device] = []

    @contextlib.contextmanager
    def entered(tensor: torch.Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", entered)
    graph = form_graph("broadcast", torch.float32)
    triton_kernel(trace(graph.nodes, graph.outputs)).launch(drawn(graph))  # type: ignore[arg-type]
    assert devices == [torch.device("cpu")]


def test_not_a_number_stays_what_it_is() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (8,), torch.float32)
    graph.outputs = [build.relu(build.maximum(x, build.constant(torch.zeros(8))))]
    tensors = {**drawn(graph), x: torch.tensor([float("nan"), float("inf"), -1, 2, 0, -0.0, float("-inf"), 3])}
    check_kernel(graph, tensors)
    assert evaluated(graph, tensors)[graph.outputs[0]].isnan().sum() == 1  # type: ignore[index]


@pytest.mark.parametrize("form", ["rows", "looped"])
def test_the_logarithm_of_a_sum_is_infinite_where_its_greatest_number_is(form: Form) -> None:
    """All hidden, or one that is beyond all others: as of torch, not what is left of inf - inf."""
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (4, 37), torch.float32)
    graph.outputs = [build.logsumexp(x, dims=(1,))]
    tensor = torch.randn(4, 37)
    tensor[0], tensor[1, 20], tensor[2, 3] = float("-inf"), float("inf"), float("nan")
    check_kernel(graph, {x: tensor}, form=form)


@pytest.mark.parametrize("form", ["rows", "looped"])
@pytest.mark.parametrize("op", ["amax", "amin", "softmax"])
def test_what_is_not_a_number_is_the_greatest_and_the_least_of_its_row(op: str, form: Form) -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (4, 37), torch.float32)
    graph.outputs = [build(op, x, **({"dim": 1} if op == "softmax" else {"dims": (1,)}))]
    tensor = torch.randn(4, 37)
    tensor[0, 0], tensor[1, 20], tensor[2, 3] = float("nan"), float("nan"), float("inf")
    check_kernel(graph, {x: tensor}, form=form)
