"""Budgets in time, with a clock of the test's own: calibration, correction, noise, and what the report says."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from regauge.ir.cost import cost, figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.roofline import Calibrated, Device, Roofline, roofline
from regauge.ir.timing import Timing
from regauge.passes.allocation.latency import device_of
from regauge.passes.pipeline import run_passes
from regauge.passes.pruning.prune import Prune
from small_graphs import multilayer_perceptron, residual_network

Clock = Callable[[Graph], float]


class FakeRuntime:
    """Measures by a function of the graph; counts how often, and with which inputs."""

    def __init__(self, clock: Clock, noise: float = 0.0) -> None:
        self.clock, self.noise, self.calls = clock, noise, list[tuple[int, Any]]()
        self.draws = np.random.default_rng(0)

    def __call__(self, graphs: Sequence[Graph], inputs: Any) -> list[Timing]:
        self.calls.append((len(graphs), inputs))
        factors = 1 + self.noise * self.draws.standard_normal(len(graphs))
        return [Timing(self.clock(g) * f, self.noise, "a fake") for g, f in zip(graphs, factors, strict=True)]


def mostly_overhead(graph: Graph) -> float:
    """Milliseconds that are far from what any model of arithmetic says: a constant and a root."""
    return 2.0 + (figures(graph).macs / 1e4) ** 0.7


def pruned(graph: Graph, runtime: FakeRuntime | None, data: Any = None, **options: Any) -> Graph:
    return run_passes(graph, [Prune(**{"compensate": False, **options})], data, measure=runtime)


@pytest.mark.parametrize(
    ("scope", "share", "width"),
    [("uniform", 0.8, 64), ("uniform", 0.4, 64), ("global", 0.8, 64), ("global", 0.4, 64), ("knapsack", 0.6, 32)],
)
def test_what_is_measured_is_within_one_percent_of_the_budget(scope: str, share: float, width: int) -> None:
    graph, runtime = residual_network(width, 2), FakeRuntime(mostly_overhead)
    small = pruned(graph, runtime, latency=share, scope=scope)
    assert mostly_overhead(small) / mostly_overhead(graph) == pytest.approx(share, rel=0.01)
    assert 2 <= len(runtime.calls) <= 8
    assert runtime.calls[0] == (4, None), "the original and three versions calibrate the model"
    (note,) = [note for note in small.report.passes[0].notes if note.startswith("latency")]
    assert "measured in a fake" in note and "predicted" in note and "nearer" not in note


def test_absolute_times() -> None:
    graph = residual_network(64, 3)
    small = pruned(graph, FakeRuntime(mostly_overhead), latency="20ms")
    assert mostly_overhead(small) == pytest.approx(20, rel=0.01)
    assert "20 ms asked" in str(small.report)


def test_what_is_fast_enough_stays_whole() -> None:
    graph = residual_network(16)
    small = pruned(graph, FakeRuntime(mostly_overhead), latency="50s", compensate=True, examples=4, steps=1)
    assert small.report.passes[0].notes == () or "nothing has to go for it" in str(small.report)
    assert not small.report.passes[0].cuts and "nearer" not in str(small.report)


def test_inputs_that_the_pass_made_up_are_not_what_is_timed() -> None:
    """They are many, whatever a run will get; and the budget is one of measured time all the same."""
    graph, runtime = residual_network(8), FakeRuntime(mostly_overhead)
    small = pruned(graph, runtime, latency="5ms", compensate=None, examples=4, steps=1)
    assert "inputs are made up" in str(small.report)
    assert all(inputs is None for _, inputs in runtime.calls)
    assert mostly_overhead(small) == pytest.approx(5, rel=0.1) and mostly_overhead(graph) > 5.6


def test_with_noise_it_stays_near_and_says_how_much() -> None:
    graph = residual_network(64, 3)
    small = pruned(graph, FakeRuntime(mostly_overhead, noise=0.02), latency=0.5)
    assert mostly_overhead(small) / mostly_overhead(graph) == pytest.approx(0.5, rel=0.06)
    assert "noise 2.8%" in str(small.report)


def test_other_budgets_are_met_beside_latency() -> None:
    graph = residual_network(64, 3)
    small = pruned(graph, FakeRuntime(mostly_overhead), latency=0.6, params=0.2)
    assert 0.99 * 0.2 <= figures(small).parameters / figures(graph).parameters <= 0.2
    assert mostly_overhead(small) < 0.6 * mostly_overhead(graph)


def test_what_cannot_be_met_is_named() -> None:
    with pytest.raises(PassError, match=r"cannot be met: .* in latency are left, and .* ms are wanted"):
        pruned(residual_network(16), FakeRuntime(lambda graph: 5.0 + figures(graph).macs / 1e9), latency=0.5)


def test_without_measuring_the_model_is_taken_at_its_word() -> None:
    graph = residual_network(32, 2)
    for small in (
        pruned(graph, None, latency=0.6),
        pruned(graph, FakeRuntime(mostly_overhead), latency=0.6, measure=False),
    ):
        predicted = [roofline(g, Device()).original for g in (small, graph)]
        assert predicted[0] / predicted[1] == pytest.approx(0.6, rel=0.03)
        assert "as predicted, nothing was measured" in str(small.report)


def test_the_first_batch_is_measured_and_binds_dynamic_sizes() -> None:
    graph, runtime = residual_network(16, 2), FakeRuntime(mostly_overhead)
    batches = [(torch.randn(5, 3, 8, 8, dtype=torch.float64),), (torch.randn(2, 3, 8, 8, dtype=torch.float64),)]
    pruned(graph, runtime, iter(batches), latency=0.7, score="l2", compensate=False)
    assert all(inputs[0] is batches[0][0] for _, inputs in runtime.calls)


def test_counts_are_multiples_of_what_the_device_prefers() -> None:
    graph, device = residual_network(64, 2), {"multiple": 16}
    small = pruned(graph, None, latency=0.5, round_to="device", device=device)
    assert all(cut.after % 16 == 0 for cut in small.report.passes[0].cuts)
    one = Prune(latency=0.5, round_to="device", device=device)
    assert str(one) == "prune{latency=0.5,round_to=device,device={multiple=16}}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 5}, r"latency=5 is neither a share, .* nor a time: write latency=5ms"),
        (
            {"latency": "5MB"},
            r"latency=5MB is not an amount: write a share .*, or a number such as 5ms or 800us",
        ),
        ({"latency": "0ms"}, r"latency=0ms is out of range"),
        ({"latency": 0.5, "device": "tpu"}, r"device=tpu is unknown: say cpu or gpu, or give figures"),
        ({"latency": 0.5, "device": {"speed": 3}}, r"device has no figure 'speed': it has flops, bandwidth"),
        ({"latency": 0.5, "device": {"flops": 0}}, r"device: flops=0 must be above 0"),
        ({"latency": 0.5, "device": {"multiple": 2.5}}, r"device: multiple=2.5 must be a whole number"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        Prune(**options)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_a_node_waits_for_arithmetic_or_for_memory() -> None:
    graph = multilayer_perceptron(16, 16, 16)  # f64, batch 4: linear, relu, linear
    fast = roofline(graph, Device(flops=1e30, bandwidth=1e3, overhead=1e-3, multiple=1))
    activation, weight = 8 * 4 * 16, 8 * 16 * 16
    assert fast.original == pytest.approx(3e-3 + (2 * (2 * activation + weight) + 2 * activation) / 1e3)
    slow = roofline(graph, Device(flops=1e3, bandwidth=1e30, overhead=1e-3, multiple=1))
    assert slow.original == pytest.approx(3e-3 + 2 * 2 * 4 * 16 * 16 / 1e3)


def test_axes_that_shrink_are_computed_in_blocks() -> None:
    graph = multilayer_perceptron(16, 64, 16)
    meter = roofline(graph, Device(flops=1e3, bandwidth=1e30, multiple=8))
    (dim,) = (group.dim for group in graph.groups() if group.free)
    assert meter.with_size(dim, 33) == meter.with_size(dim, 40) < meter.with_size(dim, 41)


def test_step_by_step_it_is_the_same_as_at_once() -> None:
    graph = residual_network(16, 2)
    sizes = {group.dim: group.dim.size // 2 for group in graph.groups() if group.free}
    one, other = (Roofline(cost(graph), Device()) for _ in range(2))
    for dim, size in sizes.items():
        expected = other.with_size(dim, size)
        assert other.set_sizes({dim: size}) == pytest.approx(expected)
    assert one.set_sizes(sizes) == pytest.approx(other.total)


def test_calibration_goes_through_what_was_measured_and_never_falls() -> None:
    graph = multilayer_perceptron(16, 64, 16)
    meter = roofline(graph, Device())
    found = Calibrated(meter, [(4.0, 9.0), (1.0, 3.0), (2.0, 5.0)])
    assert [found.milliseconds(x) for x in (1, 1.5, 2, 3, 4, 5)] == [3, 4, 5, 7, 9, 11]
    noisy = Calibrated(meter, [(1.0, 3.0), (2.0, 5.2), (3.0, 5.0), (4.0, 9.0)])
    assert noisy.milliseconds(2.5) == pytest.approx(5.1)
    said = [noisy.milliseconds(x) for x in np.linspace(0, 6, 50)]
    assert all(a <= b for a, b in zip(said, said[1:], strict=False))
    assert Calibrated(meter, [(2.0, 5.0)]).milliseconds(1.0) == 2.5


def test_devices_by_name_and_by_figures() -> None:
    assert device_of(None) == device_of("cpu") == Device()
    assert device_of("gpu").multiple == 64
    assert device_of({"flops": 1e9, "multiple": 4}) == Device(flops=1e9, multiple=4)
