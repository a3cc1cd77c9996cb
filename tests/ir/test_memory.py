"""Peak memory of activations: by hand, as a run of the interpreter shows it, and step by step."""

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from random_networks import networks
from regauge.ir.cost import cost
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.graph import Graph, Node
from regauge.ir.memory import PeakMemory, activation_bytes
from regauge.ir.sample_inputs import sample_inputs
from small_graphs import multilayer_perceptron, residual_network


def with_skip() -> Graph:
    """x: f32[2,8] -> a: [2,16] -> b: [2,4] -> c: [2,8]; x + c, which needs x to the end; and a mask of bools."""
    graph = Graph("skip")
    build = Builder(graph)
    x = value = build.input("x", (2, 8), torch.float32)
    for name, inputs, outputs in (("a", 8, 16), ("b", 16, 4), ("c", 4, 8)):
        value = build.linear(value, build.parameter(name, torch.randn(outputs, inputs)))
    graph.outputs = [build.gt(build.add(x, value), 0)]
    return graph


def test_by_hand() -> None:
    graph = with_skip()
    x, a, b, c = (4 * 2 * width for width in (8, 16, 4, 8))
    assert activation_bytes(graph) == (x + a + b + c + x + 2 * 8, x + a + b)  # the mask has one byte per entry


def tracked_peak(graph: Graph, inputs: list[torch.Tensor]) -> int:
    """Bytes alive at the worst node of a run: its operands and results, what is still to be read, unread inputs."""
    alive: dict[int, int] = {}
    peak, steps = sum(x.nbytes for x in inputs), {node: step for step, node in enumerate(graph.nodes)}
    returned = set(graph.outputs)

    def hook(node: Node, results: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal peak
        own = tuple(result.clone() for result in results)  # no views: each value has memory of its own
        for tensor in own:
            alive[id(tensor)] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, id(tensor))
        unread = sum(
            x.nbytes
            for value, x in zip(graph.inputs, inputs, strict=True)
            if value in returned or any(steps[user] >= steps[node] for user in value.consumers())
        )
        peak = max(peak, sum(alive.values()) + unread)
        return own

    graph.run(inputs, hook=hook)
    return peak


@pytest.mark.parametrize(
    "graph",
    [with_skip(), residual_network(8), multilayer_perceptron(3, 9, 5, 7, norm=True)],
    ids=["skip", "residual", "mlp"],
)
def test_as_tracked_in_a_run(graph: Graph) -> None:
    batch = next(iter(graph.symbols), None)
    at = {batch: 3} if batch is not None else {}
    inputs = sample_inputs(graph, sizes=dict(at))
    assert activation_bytes(graph, at)[1] == tracked_peak(graph, inputs)


@given(networks())
def test_random_networks_as_tracked_in_a_run(graph: Graph) -> None:
    graph = graph.copy()
    remove_dead(graph)  # of a node that nothing reads the interpreter holds the result for one step more
    assert activation_bytes(graph)[1] == tracked_peak(graph, sample_inputs(graph))


@given(networks(), st.randoms(use_true_random=False))
def test_sizes_can_change_step_by_step(graph: Graph, random: Any) -> None:
    dims = [group.dim for group in graph.groups() if group.free]
    model = cost(graph)
    meter = PeakMemory(model)
    sizes = {}
    for dim in random.sample(dims, min(3, len(dims))):
        sizes[dim] = random.randint(1, int(dim.size))
        expected = PeakMemory(model).set_sizes(sizes)
        assert meter.with_size(dim, sizes[dim]) == expected
        assert meter.set_sizes({dim: sizes[dim]}) == expected
        assert expected <= meter.original


def test_regions_run_between_the_reading_and_the_giving_of_their_node() -> None:
    """cond(flag, x): half of relu of x twice; or x. Alive at the relu: x, the flag, two values twice as wide."""
    graph = Graph("branch")
    build = Builder(graph)
    x, flag = build.input("x", (2, 4), torch.float32), build.input("flag", (), torch.bool)
    regions = []
    for wide in (True, False):
        inner = build.region(Graph("branch"))
        y = own = inner.input("x", (2, 4), torch.float32)
        if wide:
            y = inner.slice(inner.relu(inner.concat(own, own, dim=1)), dim=1, start=0, end=4, step=1)
        inner.graph.outputs = [y]
        regions.append(inner.graph)
    graph.outputs = [build("cond", flag, x, regions=regions, results=[(x.shape, x.dtype)])]
    assert activation_bytes(graph)[1] == 32 + 1 + 64 + 64
