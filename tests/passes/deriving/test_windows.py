"""Convolutions in ``derive``: every way to compute one is the same function, and those are chosen that gain."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regauge
from regauge.ir.cost import smallest_sizes
from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.roofline import DEVICES
from regauge.passes.base import Context
from regauge.passes.deriving.costs import Costs
from regauge.passes.deriving.derive import _Derivation
from regauge.passes.deriving.libraries import LIBRARIES
from regauge.passes.deriving.lowering import Lowering
from regauge.passes.deriving.reading import Reading
from regauge.passes.deriving.search import Limit, Search
from regauge.passes.deriving.sources import rules_of

F = torch.nn.functional
ADDED, OTHER, ORDER = "taps of a product added up", "a convolution over other axes", "products in another order"


def add_ways(graph: Graph, most: int = 30) -> list[set[str]]:
    """Add as outputs of a graph its last value computed in all ways that steps lead to; gives the rules of each."""
    copy, found = graph.nodes[-1], []
    reading = Reading(copy, lambda value: len(list(value.uses)) == 1 and value not in graph.outputs)
    for expression in reading.expressions:
        costs = Costs(DEVICES["cpu"], LIBRARIES["torch"], smallest_sizes(graph))
        search = Search(expression, costs, torch.float64, Limit(1, 1.0))
        states, seen, ends = [search.start], set[Any](), 0
        while states and ends < most:
            state = states.pop(0)
            key = search._key(state)
            if key in seen:
                continue
            seen.add(key)
            if search._done(state):
                lowering = Lowering(Builder(graph), expression.axes)
                graph.outputs.append(lowering.root(state.terms, copy.output.shape))
                found.append(set(rules_of(state.terms)))
                ends += 1
            else:
                states += search.steps.after(state)
    return found


def whole(shape: tuple[int, ...], number: int) -> torch.Tensor:
    """Small integers in float64: sums of products of them are exact."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(-3, 4, shape, generator=generator).double()


@st.composite
def convolutions(draw: Callable[[Any], Any], *, transposed: bool) -> tuple[Graph, Callable[[torch.Tensor], Any]]:
    """A convolution of any geometry, and what torch makes of it."""
    number = st.integers
    rank, groups = draw(number(1, 3)), draw(st.sampled_from((1, 1, 2, 3)))
    width = groups * draw(number(1, 2))
    inputs = width if not transposed else groups * draw(number(1, 2))
    per_group, outputs = inputs // groups if not transposed else draw(number(1, 2)), groups * draw(number(1, 2))
    taps = tuple(draw(number(1, 3)) for _ in range(rank))
    stride, dilation = (tuple(draw(number(1, most)) for _ in range(rank)) for most in (3, 2))
    reach = tuple(d * (k - 1) for d, k in zip(dilation, taps, strict=True))
    padding = tuple(draw(number(0, min(2, most) if transposed else most)) for most in reach)
    least = [most if transposed else max(0, most - 2 * pad) for most, pad in zip(reach, padding, strict=True)]
    sizes = tuple(draw(number(low + 1, 7 - rank + low)) for low in least)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = tuple(draw(number(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    shape = (inputs, per_group, *taps) if transposed else (outputs, per_group, *taps)
    weight = whole(shape, draw(number(0, 9)))
    bias = draw(st.sampled_from((None, whole((per_group * groups if transposed else outputs,), 1))))
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (draw(number(1, 2)), inputs, *sizes), torch.float64)
    given = [build.parameter("w", weight)] + ([] if bias is None else [build.parameter("b", bias)])
    graph.outputs = [build("conv_transpose" if transposed else "conv", x, *given, **options)]
    of_torch = getattr(F, f"conv{'_transpose' if transposed else ''}{rank}d")
    return graph, lambda value: of_torch(value, weight, bias, **options)


@settings(max_examples=60, deadline=None)
@given(st.booleans().flatmap(lambda transposed: convolutions(transposed=transposed)))
def test_every_way_to_compute_a_convolution_is_that_of_torch(case: tuple[Graph, Callable[[torch.Tensor], Any]]) -> None:
    graph, of_torch = case
    add_ways(graph)
    x = whole(tuple(map(int, graph.inputs[0].shape)), 2)
    for result in graph.run([x]):
        assert torch.equal(result, of_torch(x))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_convolutions_amid_other_products_are_equal_however_they_are_computed(data: st.DataObject) -> None:
    """Sums, scales, zeros, slices, permutes, products and convolutions in a row, whatever the search puts in place."""
    graph = Graph("g")
    build = Builder(graph)
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    weight = lambda *shape: build.parameter(f"w{len(graph.parameters)}", whole(shape, number(0, 5)))  # noqa: E731
    value = build.input("x", (number(1, 2), 4, number(4, 6), number(4, 6)), torch.float64)
    for _ in range(number(1, 4)):
        kind = data.draw(st.sampled_from(("conv", "conv", "conv_transpose", "add", "mul", "pad", "slice", "permute")))
        batch, channels, height, width = map(int, value.shape)
        if kind in ("conv", "conv_transpose"):
            taps, out, groups = (number(1, 3), number(1, min(3, height))), 2 * number(1, 2), number(1, 2)
            groups = groups if channels % 2 == 0 else 1
            padding = (number(0, taps[0] // 2), number(0, taps[1] // 2))
            if taps[0] > height + 2 * padding[0] or taps[1] > width + 2 * padding[1] or height > 12:
                continue
            options: dict[str, Any] = {"stride": (number(1, 2),) * 2, "padding": padding, "dilation": (1, 1)}
            shape = (channels, out // groups) if kind == "conv_transpose" else (out, channels // groups)
            if kind == "conv_transpose":
                options["output_padding"] = (0, 0)
                if min(height, width) < 2:
                    continue
            value = build(kind, value, weight(*shape, *taps), weight(out), groups=groups, **options)
        elif kind in ("add", "mul"):
            other = data.draw(st.sampled_from(((channels, 1, 1), (height, width), tuple(map(int, value.shape)))))
            value = build(kind, value, weight(*other))
        elif kind == "pad":
            value = build.pad(value, pads=((0, 0), (0, 0), (number(0, 2), number(0, 2)), (0, number(0, 1))))
        elif kind == "slice" and height > 2:
            start = number(0, height - 2)
            value = build.slice(value, dim=2, start=start, end=number(start + 2, height), step=1)
        elif kind == "permute":
            value = build.permute(value, dims=(0, 1, 3, 2))
    graph.outputs = [value]
    result = graph.copy()
    work = _Derivation(result, DEVICES["cpu"], Limit(30, float("inf")), gain=-1e12, context=Context())
    for node in list(result.nodes):
        if node in result._nodes:
            work.visit(node)
    x = whole(tuple(map(int, graph.inputs[0].shape)), 2)
    assert torch.equal(result.run([x])[0], graph.run([x])[0])


def one(op: str, x: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Graph:
    """A graph of one convolution, of what is not said as usual."""
    rank = len(weight) - 2
    usual = {"stride": (1,) * rank, "padding": (0,) * rank, "dilation": (1,) * rank, "groups": 1}
    graph = Graph("g")
    build = Builder(graph)
    value = build.input("x", x, torch.float64)
    graph.outputs = [build(op, value, build.parameter("w", whole(weight, 0)), **{**usual, **options})]
    return graph


def test_all_ways_are_found() -> None:
    """A product with taps added up, each axis first; a convolution along one axis with taps of the other; itself."""
    ways = add_ways(one("conv", (1, 4, 6, 6), (2, 4, 3, 3), padding=(1, 1)))
    assert ways.count({ORDER, ADDED}) == 2 and ways.count({OTHER, ADDED}) == 2
    assert ways.count({OTHER, "taps as channels"}) == 2 and ways.count({OTHER}) == 1
    side_by_side = add_ways(one("conv", (1, 4, 6, 6), (5, 4, 3, 3), stride=(3, 3)))
    assert {ORDER} in side_by_side  # one linear map of patches
    spread = one("conv_transpose", (1, 4, 5, 5), (4, 3, 2, 2), stride=(2, 2), output_padding=(0, 0))
    assert {ORDER} in add_ways(spread)  # one linear map, and its results laid out beside one another
    assert add_ways(one("conv", (2, 4, 3, 3), (5, 4, 3, 3))) == [{ORDER}]  # one window: nothing else is there


def test_a_transposed_kernel_of_one_tap_may_give_more_than_it_reads() -> None:
    graph = one("conv_transpose", (1, 2, 4), (2, 3, 1), dilation=(2,), output_padding=(1,))
    add_ways(graph)
    x = whole((1, 2, 4), 1)
    assert all(torch.equal(result, graph.run([x])[0]) for result in graph.run([x]))
    assert graph.outputs[0].shape == (1, 3, 5)


def derived(module: torch.nn.Module, *shape: int, options: str = "") -> Graph:
    torch.manual_seed(0)
    x = torch.randn(shape)
    graph = regauge.capture(module.eval(), (x,))
    done = regauge.optimize(graph, f"derive{options}")
    torch.testing.assert_close(done.to_torch()(x), module(x), rtol=1e-4, atol=1e-4)
    return done


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_few_output_channels_are_a_product_whose_taps_are_added_up() -> None:
    """One channel fills no block of eight, nine taps of it fill two."""
    done = derived(torch.nn.Conv2d(64, 1, 3, padding=1), 1, 64, 40, 40)
    (conv,) = [node for node in done.nodes if node.op == "conv"]
    assert conv.inputs[1].shape == (9, 64, 1, 1) and ops(done).count("add") == 4 + 1
    (note,) = done.report.passes[0].notes
    assert ORDER in note and ADDED in note and "922K -> 922K MACs" in note and "(torch)" in note
    wide = derived(torch.nn.Conv2d(64, 8, 3, padding=1), 1, 64, 40, 40)
    assert ops(wide) == ["conv"] and "costs less" in next(iter(wide.report.passes[0].left))


@pytest.mark.parametrize("kernel", [(3, 1, 1), (1, 3, 3), (1, 1, 3)])
def test_kernels_along_some_of_three_axes_are_moved_over_two(kernel: tuple[int, ...]) -> None:
    padding = tuple(size // 2 for size in kernel)
    done = derived(torch.nn.Conv3d(32, 48, kernel, padding=padding), 2, 32, 6, 10, 10)
    (conv,) = [node for node in done.nodes if node.op == "conv"]
    assert conv.inputs[1].shape in ((48, 32, 3, 1), (48, 32, 3, 3), (48, 32, 1, 3)) and len(conv.inputs) == 3
    assert done.report.passes[0].after.macs == done.report.passes[0].before.macs


def test_kernels_along_three_axes_are_several_along_two() -> None:
    done = derived(torch.nn.Conv3d(32, 32, 3, padding=1), 1, 32, 6, 10, 10)
    (conv,) = [node for node in done.nodes if node.op == "conv"]
    assert conv.inputs[1].shape == (3 * 32, 32, 3, 3) or conv.inputs[1].shape == (32, 3 * 32, 3, 3)


def test_a_kernel_as_large_as_its_input_is_a_linear_map() -> None:
    done = derived(torch.nn.Conv2d(64, 128, 4), 32, 64, 4, 4)
    (linear,) = [node for node in done.nodes if node.op == "linear"]
    assert linear.inputs[1].shape == (128, 64 * 16) and len(linear.inputs) == 3 and "conv" not in ops(done)


def test_what_pays_in_one_library_alone_is_asked_for() -> None:
    module = torch.nn.ConvTranspose2d(128, 1, 4, stride=2, padding=1)
    assert ops(derived(module, 1, 128, 20, 20)) == ["conv_transpose"]
    done = derived(module, 1, 128, 20, 20, options="{library=torch}")
    assert ops(done) != ["conv_transpose"] and ADDED in done.report.passes[0].notes[0]
    with pytest.raises(PassError, match="library=numpy is unknown"):
        derived(module, 1, 128, 20, 20, options="{library=numpy}")


def test_a_transposed_kernel_as_large_as_its_steps_is_a_product_with_its_bias() -> None:
    """Each entry gives a patch of its own: channels and taps are columns, and the bias is repeated for the taps."""
    done = derived(torch.nn.ConvTranspose2d(64, 32, 2, stride=2), 1, 64, 24, 24, options="{library=torch}")
    (conv,) = [node for node in done.nodes if node.op == "conv"]
    assert conv.inputs[1].shape == (32 * 4, 64, 1, 1) and conv.inputs[2].shape == (32 * 4,) and "add" not in ops(done)


def test_taps_over_zeros_alone_are_left_out() -> None:
    """All but one of nine meet only what is around an image of one entry, and of one as large as the dilation."""
    for size, dilation in ((1, 1), (6, 6)):
        done = derived(torch.nn.Conv2d(256, 192, 3, padding=dilation, dilation=dilation), 1, 256, size, size)
        before, after = done.report.passes[0].before, done.report.passes[0].after
        assert after.macs * 9 == before.macs == 256 * 192 * 9 * size**2
        assert ops(done) == ["conv"] and done.parameters["weight"].shape == (192, 256, 1, 1)
    done = derived(torch.nn.Conv3d(128, 128, (3, 1, 1), padding=(1, 0, 0)), 1, 128, 1, 7, 7)
    assert done.report.passes[0].after.macs == 128 * 128 * 49


def test_a_kernel_that_others_read_is_not_cut() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(256, 256, 3, 3) / 50)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.relu(F.conv2d(x, self.weight, padding=1)) + F.relu(F.conv2d(y, self.weight))

    given = (torch.randn(1, 256, 1, 1), torch.randn(1, 256, 3, 3))
    done = regauge.optimize(regauge.capture(Model(), given), "derive")
    assert done.parameters["weight"].shape == (256, 256, 3, 3) and "slice" in ops(done)
    torch.testing.assert_close(done.to_torch()(*given), Model.forward(done.to_torch(), *given), rtol=1e-4, atol=1e-4)


def test_two_kernels_over_one_tensor_are_one() -> None:
    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, a, padding=1) + F.conv2d(x, b, padding=1)

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return function(x, a, b)

    given = (torch.randn(1, 16, 20, 20), torch.randn(16, 16, 3, 3), torch.randn(16, 16, 3, 3))
    done = regauge.optimize(regauge.capture(Model(), given), "derive")
    assert ops(done) == ["add", "conv"]
    torch.testing.assert_close(done.to_torch()(*given), function(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Conv2d(64, 64, 3, padding=1),
        torch.nn.Conv2d(3, 64, 7, stride=2, padding=3),
        torch.nn.Conv2d(3, 96, 4, stride=4),
        torch.nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        torch.nn.Conv2d(64, 64, 3, padding=1, groups=64),
        torch.nn.ConvTranspose2d(64, 32, 2, stride=2),
    ],
)
def test_what_was_measured_slower_stays(module: torch.nn.Module) -> None:
    x = torch.randn(1, module.in_channels, 32, 32)  # type: ignore[arg-type,call-overload]
    done = regauge.optimize(regauge.capture(module.eval(), (x,)), "derive")
    assert len(done.nodes) == 1 and sum(done.report.passes[0].left.values()) == 1


def test_convolutions_without_a_batch_or_of_dynamic_axes_say_why_they_stay() -> None:
    graph = regauge.capture(torch.nn.Conv2d(64, 1, 3), (torch.randn(64, 20, 20),))
    (reason,) = regauge.optimize(graph, "derive").report.passes[0].left
    assert reason.endswith("a convolution without a batch")
    dynamic = regauge.capture(torch.nn.Conv2d(64, 1, 3), (torch.randn(1, 64, 20, 20),), dynamic={0: {2: "height"}})
    (reason,) = regauge.optimize(dynamic, "derive").report.passes[0].left
    assert reason.endswith("windows over a dynamic size")
