"""Gradients of regions as graphs: in double precision they are torch's, and what is no kernel is told."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from kernel_contract import drawn
from kernel_forms import FORMS, form_graph
from random_regions import regions
from regauge.backends.to_torch import to_torch
from regauge.ir.derivatives import GRADIENTS
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion import legality
from regauge.ir.fusion.fuse import fuse
from regauge.ir.fusion.fused import body_of
from regauge.ir.fusion.gradients import SHARED, Gradients, all_gradients, gradients_of
from regauge.ir.fusion.legality import WIDEST_TOTALS
from regauge.ir.fusion.tracing import trace
from regauge.ir.fusion.wide_gradients import products_of
from regauge.ir.graph import Graph, Value
from regauge.ir.scalars import PRIMITIVES, REDUCTIONS


def body_and_tensors(graph: Graph) -> tuple[Graph, list[torch.Tensor]]:
    """A graph as a region that reads weights, too, and what it reads."""
    tensors = drawn(graph)
    node = fuse(Builder(graph), trace(graph.nodes, graph.outputs), "fused")  # type: ignore[arg-type]
    return body_of(node), [tensors[value] for value in node.inputs]  # type: ignore[index]


def by_torch(body: Graph, tensors: Sequence[torch.Tensor], of: Sequence[int], seeds: Sequence[torch.Tensor]) -> Any:
    leaves = [tensor.clone().requires_grad_(number in of) for number, tensor in enumerate(tensors)]
    found = to_torch(body)(*leaves)
    pairs = zip([found] if isinstance(found, torch.Tensor) else list(found), seeds, strict=True)
    results, given = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    return torch.autograd.grad(results, [leaves[number] for number in of], given)


def seeds_of(body: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn([*v.shape], generator=generator, dtype=torch.float64) for v in body.outputs]  # type: ignore[union-attr]


def check(graph: Graph) -> tuple[list[int], dict[str, str]]:
    """Hold all gradients of a region to those of torch; how many results its kernels have, and what they leave."""
    body, tensors = body_and_tensors(graph)
    seeds = seeds_of(body)
    found = gradients_of(body)
    for one in found.kernels:
        of = [numbers[0] for numbers in one.of if numbers]
        given = [tensors[number] for number in one.reads] + [seeds[number] for number in one.given]
        results = one.graph.run(given)
        own = [result for result, entries in zip(results, one.entries, strict=True) if not entries]
        close(own, by_torch(body, tensors, of, seeds) if own else [])
        for result, entries in zip(results, one.entries, strict=True):
            for at in entries:
                rows, numbers = result.reshape(-1, result.shape[-1]), tensors[at.numbers].flatten()
                in_table = torch.zeros_like(tensors[at.table]).index_add(0, numbers, rows)
                close([in_table], by_torch(body, tensors, [at.table], seeds))
    for number, result in found.passed.items():
        close([seeds[result]], by_torch(body, tensors, [number], seeds))
    return [len(one.of) for one in found.kernels], dict(found.left)


def close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()) + 1e-14)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were kernels in double precision."""
    monkeypatch.setattr(legality, "FLOATS", (torch.float64,))


RESULTS = {
    "swiglu": [2], "geglu": [2], "broadcast": [3], "mish_batch_norm": [1], "softmax": [1], "masked_softmax": [1],
    "softmax_of_columns": [1], "log_softmax": [1], "layer_norm": [3], "gated_rms_norm": [3], "add_rms_norm": [2],
    "plain_rms_norm": [1], "group_norm_silu": [1], "instance_norm_relu": [1], "written_out_norm": [3], "total": [1],
    "turned": [2], "rotary": [1, 1, 2], "joined": [1, 1, 1], "rotary_inside": [1], "embedded_norm": [3],
    "cross_entropy": [1], "smooth_cross_entropy": [1],
}  # fmt: skip
"""Of forms: how many results each kernel of their gradients has."""


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("name", RESULTS)
def test_gradients_of_forms_are_those_of_torch(name: str) -> None:
    results, left = check(form_graph(name, torch.float64))
    several = ("embedded_norm", "group_norm_silu", "instance_norm_relu")  # rows share positions, or channels of groups
    others = {"it would reduce over different axes"} if name in several else set()
    assert results == RESULTS[name] and set(left.values()) <= {SHARED, *others}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("depthwise", "the derivative of conv is not stated"),
        ("scores", "matmul_mul_where: the gradients of products are products of their own"),
    ],
)
def test_what_has_no_gradient_as_a_graph_is_told(name: str, reason: str) -> None:
    assert name in FORMS
    body, _ = body_and_tensors(form_graph(name, torch.float64))
    with pytest.raises(FusionError, match=f"^{reason}$"):
        gradients_of(body)


@pytest.mark.usefixtures("doubles")
def test_gradients_of_wide_heads_are_those_of_torch() -> None:
    assert check(form_graph("wide_attention", torch.float64)) == ([3], {})


def test_gradients_of_wide_heads_are_kernels_where_these_gain() -> None:
    """Of heads of 512 numbers they take 10 products of as many for a score, where torch takes 6 and keeps scores: half
    of them with a causal mask, behind which nothing is computed."""

    def gradients(*, causal: bool, width: int = 512) -> Gradients:
        graph = Graph("attention")
        build = Builder(graph)
        q, k, v = (build.input(name, (2, 300, width), torch.bfloat16) for name in "qkv")
        graph.outputs = [build.attention(q, k, v, scale=0.04, is_causal=causal)]
        return gradients_of(body_and_tensors(graph)[0])

    assert products_of(512, 512) == 10 * 512 and products_of(1024, 64) == 1088 + 2 * 2 * (1088 + 512) + 1024 + 64
    assert [one.of for one in gradients(causal=True).kernels] == [((0,), (1,), (2,))]
    reason = (
        "attention: kernels of the gradients of heads of 512 and values of 512 numbers would multiply 5120 numbers for "
        "a score, and take longer than to multiply 3072 and move 18 bytes of it"
    )
    with pytest.raises(FusionError, match=f"^{reason}$"):
        gradients(causal=False)
    with pytest.raises(FusionError, match="would multiply 7680 numbers for a score"):
        gradients(causal=True, width=1024)


@pytest.mark.usefixtures("doubles")
def test_what_rows_share_has_a_gradient_but_no_kernel_where_rows_are_not_whole() -> None:
    """Neither channels of images, nor rows of more columns than a program holds."""
    body, _ = body_and_tensors(form_graph("mish_batch_norm", torch.float64))
    assert set(gradients_of(body).left.values()) == {SHARED}
    body, _ = body_and_tensors(form_graph("layer_norm", torch.float64, 2, WIDEST_TOTALS + 1))
    assert set(gradients_of(body).left) == {"w", "w_1"}
    body, tensors = body_and_tensors(form_graph("layer_norm", torch.float64))
    graph, of = all_gradients(body)
    seeds = seeds_of(body)
    assert of == (0, 1, 2)
    close(graph.run([*tensors, *seeds]), by_torch(body, tensors, of, seeds))


@pytest.mark.usefixtures("doubles")
def test_a_gradient_that_is_that_of_a_result_is_passed_on() -> None:
    graph = Graph("residual")
    build = Builder(graph)
    x, y = (build.input(name, (3, 5), torch.float64) for name in "xy")
    graph.outputs = [build.add(x, build.silu(y))]
    body, _ = body_and_tensors(graph)
    found = gradients_of(body)
    assert found.passed == {1: 0} and [one.of for one in found.kernels] == [((0,),)]


def test_numbers_inside_are_wide_and_half_precision_is_rounded_once() -> None:
    body, _ = body_and_tensors(form_graph("add_rms_norm", torch.bfloat16))
    (one,) = gradients_of(body).kernels
    narrow = [node for node in one.graph.nodes if node.output.dtype == torch.bfloat16]
    assert [node.op for node in narrow] == ["cast", "cast"]  # of the stream, and of the gain, which is added up
    assert {node.output for node in narrow} == set(one.graph.outputs)


POINTS = torch.tensor([-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0, 100.0, 800.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [("relu", {}), ("abs", {}), ("hardtanh", {"min_val": 0.0, "max_val": 6.0}), ("hardswish", {}), ("hardsigmoid", {}),
     ("softshrink", {"lambd": 0.5}), ("hardshrink", {"lambd": 0.5}), ("leaky_relu", {}), ("elu", {}), ("softplus", {}),
     ("mish", {}), ("selu", {}), ("celu", {}), ("log_sigmoid", {}), ("softsign", {})],
)  # fmt: skip
def test_at_corners_and_far_out_gradients_are_those_of_torch(op: str, attributes: dict[str, Any]) -> None:
    """Also where what is not chosen is infinite."""
    graph = Graph("corner")
    build = Builder(graph)
    graph.outputs = [build(op, build.input("x", (len(POINTS),), torch.float64), **attributes)]
    (found,) = all_gradients(graph)[0].run([POINTS, torch.ones_like(POINTS)])
    (expected,) = by_torch(graph, [POINTS], [0], [torch.ones_like(POINTS)])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)  # torch has a sixth in single precision


def test_where_two_are_equal_each_has_half() -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0]).double().requires_grad_(), torch.tensor([1.0, 3.0, 2.0]).double()
    graph = Graph("maximum")
    build = Builder(graph)
    graph.outputs = [build.maximum(*(build.input(name, (3,), torch.float64) for name in "xy"))]
    found = all_gradients(graph)[0].run([x.detach(), y, torch.ones(3).double()])
    assert [gradient.tolist() for gradient in found] == [[0.5, 0, 1], [0.5, 1, 0]]
    assert torch.autograd.grad(torch.maximum(x, y).sum(), x)[0].tolist() == [0.5, 0, 1]


def test_bounds_of_clamp_have_the_gradient() -> None:
    graph = Graph("clamp")
    build = Builder(graph)
    graph.outputs = [build.clamp(build.input("x", (len(POINTS),), torch.float64), -1.0, 1.0)]
    (found,) = all_gradients(graph)[0].run([POINTS, torch.ones_like(POINTS)])
    x = POINTS.clone().requires_grad_()
    close([found], torch.autograd.grad(x.clamp(-1, 1).sum(), x))


def test_every_primitive_has_a_derivative() -> None:
    assert GRADIENTS.keys() == {*PRIMITIVES, *REDUCTIONS}


@hypothesis_settings(max_examples=25)
@given(regions())
def test_gradients_of_random_regions_are_those_of_torch(graph: Graph) -> None:
    for value in graph.values():
        if isinstance(value, Value) and value.dtype != torch.bool:
            value.dtype = torch.float64
    body, tensors = body_and_tensors(graph)
    seeds = seeds_of(body)
    gradient, of = all_gradients(body)
    wanted = [number for number in of if tensors[number].is_floating_point()]
    close(gradient.run([*tensors, *seeds]), by_torch(body, tensors, wanted, seeds))
