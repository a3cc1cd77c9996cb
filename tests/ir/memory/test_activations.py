"""Peak memory of activations: by hand, as a run of the interpreter shows it, and step by step."""

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from random_networks import networks
from regauge.ir.cost import cost, smallest_sizes
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.graph import Graph, Node
from regauge.ir.memory.activations import PeakMemory, activation_bytes
from regauge.ir.memory.views import storages
from regauge.ir.running.sample_inputs import sample_inputs
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
    held = {value.untyped_storage()._cdata for value in [*inputs, *(p.tensor for p in graph.parameters.values())]}
    peak, steps = sum(x.nbytes for x in inputs), {node: step for step, node in enumerate(graph.nodes)}
    owner = storages(graph, smallest_sizes(graph))
    last: dict[Any, int] = {}
    for value, root in owner.items():
        reads = [steps[user] for user in value.consumers()] + [len(steps) for out in graph.outputs if out is value]
        last[root] = max([last.get(root, 0), *reads])

    def hook(node: Node, results: tuple[Any, ...]) -> None:
        nonlocal peak
        for tensor in results:
            storage = tensor.untyped_storage()
            if storage._cdata not in held and storage._cdata not in alive:
                alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, alive.pop, storage._cdata)
            del storage
        unread = [x.nbytes for v, x in zip(graph.inputs, inputs, strict=True) if last.get(v, 0) >= steps[node]]
        peak = max(peak, sum(alive.values()) + sum(unread))

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


def test_views_lie_in_the_memory_of_what_they_show() -> None:
    """A permute is a view, the reshape behind it copies, a reshape of what lies in order is a view; so are parts."""
    graph = Graph("views")
    build = Builder(graph)
    x = build.input("x", (4, 6), torch.float32)
    turned = build.permute(x, dims=(1, 0))
    copied = build.reshape(turned, shape=(24,))
    first, second = build.split(build.reshape(copied, shape=(4, 6)), sizes=(2, 2), dim=0)
    graph.outputs = [build.add(first, second)]
    owner = storages(graph, smallest_sizes(graph))
    assert owner[turned] is x and owner[copied] is copied and owner[first] is owner[second] is copied
    assert activation_bytes(graph) == (96 + 96 + 48, 96 + 96)


def test_weights_that_are_only_laid_out_take_nothing() -> None:
    graph = Graph("turned")
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float32)
    graph.outputs = [build.matmul(x, build.permute(build.parameter("w", torch.randn(5, 3)), dims=(1, 0)))]
    assert activation_bytes(graph) == (24 + 40, 24 + 40)
