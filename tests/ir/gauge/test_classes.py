"""Gauge classes of what may lie between two layers: insert a map, undo it in the consumer.

Each case is a producer ``W``, an operator between, and a consumer ``V`` over one Dim. The analysis says which maps the
Dim admits; a map that is admitted must leave the function unchanged, one that is not must change it.
"""

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from own_operators import registered
from regauge.ir.dims.groups import find_group
from regauge.ir.edit import Builder
from regauge.ir.gauge.classes import Gauge, gauges
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import Symmetry
from regauge.ir.running.interpret import run

WIDTH = 6
Between = Callable[[Builder, Value], Value]


def swiglu(build: Builder, up: Value) -> Value:
    gate = build.linear(build.graph.inputs[0], build.parameter("gate", torch.randn(WIDTH, 5, dtype=torch.float64)))
    return build.mul(build.silu(gate), up)


NOTHING = Gauge.PERMUTE | Gauge.SIGN | Gauge.SCALE | Gauge.ORTHOGONAL | Gauge.GENERAL
TABLE: dict[str, tuple[Between, Gauge]] = {
    "nothing": (lambda build, x: x, NOTHING),
    "reshape": (lambda build, x: build.reshape(x, shape=(4, 1, WIDTH)), NOTHING),
    "times a number": (lambda build, x: build.mul(x, 3.0), NOTHING),
    "residual add": (lambda build, x: build.add(x, x), NOTHING),
    "plus a number": (lambda build, x: build.add(x, 3.0), Gauge.PERMUTE),
    "rms_norm": (lambda build, x: build.rms_norm(x, normalized_shape=(WIDTH,), eps=1e-6),
                 Gauge.PERMUTE | Gauge.SIGN | Gauge.ORTHOGONAL),
    "relu": (lambda build, x: build.relu(x), Gauge.PERMUTE | Gauge.SCALE),
    "leaky_relu": (lambda build, x: build.leaky_relu(x, negative_slope=0.1), Gauge.PERMUTE | Gauge.SCALE),
    "tanh": (lambda build, x: build.tanh(x), Gauge.PERMUTE | Gauge.SIGN),
    "gelu": (lambda build, x: build.gelu(x), Gauge.PERMUTE),
    "silu": (lambda build, x: build.silu(x), Gauge.PERMUTE),
    "softmax": (lambda build, x: build.softmax(x, dim=-1), Gauge.PERMUTE),
    "layer_norm": (lambda build, x: build.layer_norm(x, normalized_shape=(WIDTH,), eps=1e-6), Gauge.PERMUTE),
    "swiglu": (swiglu, Gauge.PERMUTE),
}  # fmt: skip
FLAGS = [Gauge.PERMUTE, Gauge.SIGN, Gauge.SCALE, Gauge.ORTHOGONAL, Gauge.GENERAL]


def network(between: Between) -> Graph:
    torch.manual_seed(0)
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (4, 5), torch.float64)
    hidden = build.linear(x, build.parameter("producer", torch.randn(WIDTH, 5, dtype=torch.float64)))
    hidden = between(build, hidden)
    graph.outputs = [build.linear(hidden, build.parameter("consumer", torch.randn(3, WIDTH, dtype=torch.float64)))]
    return graph


def draw_map(flag: Gauge, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    if flag is Gauge.PERMUTE:
        return eye[torch.arange(WIDTH).roll(1 + seed % (WIDTH - 1))]
    if flag is Gauge.SIGN:
        return torch.diag(torch.where(torch.arange(WIDTH) % 2 == seed % 2, -1.0, 1.0).double())
    if flag is Gauge.SCALE:
        return torch.diag(0.5 + 1.5 * torch.rand(WIDTH, generator=generator, dtype=torch.float64))
    if flag is Gauge.ORTHOGONAL:
        return torch.linalg.qr(noise)[0]
    return noise + 3 * eye


@given(st.sampled_from(sorted(TABLE)), st.sampled_from(FLAGS), st.integers(0, 99))
def test_admitted_maps_change_nothing_and_others_do(case: str, flag: Gauge, seed: int) -> None:
    between, expected = TABLE[case]
    graph = network(between)
    dim = find_group(graph, "producer:0").dim
    assert gauges(graph)[dim] == expected, case
    change = draw_map(flag, seed)
    weights = {
        "producer": change @ graph.parameters["producer"].tensor,
        "consumer": graph.parameters["consumer"].tensor @ torch.linalg.inv(change),
    }
    if case == "swiglu":  # the Dim runs through the gate too, so a map of the Dim moves both
        weights["gate"] = change @ graph.parameters["gate"].tensor
    x = torch.randn(4, 5, dtype=torch.float64)
    difference = (run(graph, [x])[0] - run(graph, [x], weights=weights)[0]).abs().max()
    assert (difference < 1e-8) == (flag in expected), f"{flag} across {case}: {difference}"


def mixed(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(w @ x)


def test_an_operator_is_linear_only_where_its_symmetry_says_so() -> None:
    """The main tensor is operand 1 here, so that by its place in the rule the Dim is produced."""
    rows = torch.randn(4, 4, dtype=torch.float64)
    for symmetry, expected in [(Symmetry.POINTWISE, Gauge.PERMUTE), (Symmetry.ODD, Gauge.PERMUTE | Gauge.SIGN)]:
        with registered(mixed, "s s, ... s c -> ... s c ; whole s", symmetry=symmetry):
            graph = network(lambda build, x: build.mixed(build.parameter("mix", rows), x))
            assert gauges(graph)[find_group(graph, "producer:0").dim] == expected


def squeezed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) @ w


def test_a_contraction_is_a_bilinear_form_only_where_the_symmetry_says_so() -> None:
    with registered(squeezed, "... i, i o -> ... o"):
        graph = network(lambda build, x: build.squeezed(x, build.parameter("w", torch.randn(WIDTH, WIDTH).double())))
        assert gauges(graph)[find_group(graph, "producer:0").dim] == Gauge.PERMUTE


def test_two_factors_of_a_product_keep_diagonal_maps() -> None:
    """``(x @ w) * gain``: both w and the gain have the Dim that the rule produces."""

    def scaled(x: torch.Tensor, w: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return (x @ w) * gain

    with registered(scaled, "... i, i o, o -> ... o", symmetry=Symmetry.PRODUCT):
        graph = Graph()
        build = Builder(graph)
        x = build.input("x", (4, 5), torch.float64)
        w, gain = build.parameter("w", torch.randn(5, 6).double()), build.parameter("gain", torch.randn(6).double())
        graph.outputs = [build.linear(build.scaled(x, w, gain), build.parameter("v", torch.randn(3, 6).double()))]
        assert gauges(graph)[find_group(graph, "w:1").dim] == Gauge.PERMUTE


def test_a_residual_stream_takes_general_maps() -> None:
    """One Dim on both axes of a square weight: contracted by one, produced by the other."""
    torch.manual_seed(0)
    square = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    graph = network(lambda build, x: build.add(x, build.linear(x, build.parameter("square", square))))
    assert gauges(graph)[find_group(graph, "producer:0").dim] == NOTHING
    change = draw_map(Gauge.GENERAL, 1)
    back = torch.linalg.inv(change)
    weights = {
        "producer": change @ graph.parameters["producer"].tensor,
        "square": change @ square @ back,
        "consumer": graph.parameters["consumer"].tensor @ back,
    }
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(run(graph, [x], weights=weights), run(graph, [x]))


def test_a_computed_gain_tells_the_indices_of_a_norm_apart() -> None:
    def one_plus_gain(build: Builder, x: Value) -> Value:
        gain = build.add(build.parameter("gain", torch.randn(WIDTH, dtype=torch.float64)), 1.0)
        return build.rms_norm(x, gain, normalized_shape=(WIDTH,), eps=1e-6)  # type: ignore[no-any-return]

    graph = network(one_plus_gain)
    assert gauges(graph)[find_group(graph, "producer:0").dim] == Gauge.PERMUTE


def test_a_batch_norm_shifts_the_axes_that_its_weights_lack() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.parameter("x", torch.randn(4, 3))
    statistics = [build.parameter(n, torch.ones(3)) for n in ("gain", "shift", "mean", "var")]
    y = build.batch_norm(build.relu(x), *statistics, training=False)
    graph.outputs = [build.matmul(build.parameter("v", torch.randn(2, 4)), y)]
    graph.outputs = [build.matmul(graph.outputs[0], build.parameter("u", torch.randn(3, 2)))]
    assert gauges(graph)[find_group(graph, "x:0").dim] == Gauge.PERMUTE


def test_a_recurrent_layer_is_linear_in_what_it_reads_and_in_nothing_else() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float32)
    features = build.linear(x, build.parameter("f", torch.randn(5, 3)))
    state = build.linear(x, build.parameter("s", torch.randn(4, 3)))
    weights = [build.parameter(f"w{i}", torch.randn(*shape)) for i, shape in enumerate([(16, 5), (16, 4)])]
    hidden, _ = build.lstm_cell(features, state, state, *weights)
    graph.outputs = [build.linear(hidden, build.parameter("o", torch.randn(2, 4)))]
    assert gauges(graph)[find_group(graph, "f:0").dim] == NOTHING
    assert gauges(graph)[find_group(graph, "s:0").dim] == Gauge.PERMUTE


def test_pinned_dims_have_no_gauge() -> None:
    graph = network(lambda build, x: x)
    found = gauges(graph)
    assert found[find_group(graph, "consumer:0").dim] is Gauge.FIXED
    assert "gauge: general linear" in graph.explain("producer:0")


def test_batch_norm_leaves_diagonal_maps() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3, 5, 5), torch.float32)
    h = build.conv(x, build.parameter("conv", torch.randn(8, 3, 3, 3)))
    statistics = [build.parameter(n, torch.ones(8), k) for n, k in
                  [("gain", "parameter"), ("shift", "parameter"), ("mean", "buffer"), ("var", "buffer")]]  # fmt: skip
    h = build.batch_norm(h, *statistics, training=False, momentum=0.1, eps=1e-5)
    graph.outputs = [build.conv(h, build.parameter("next", torch.randn(4, 8, 1, 1)))]
    assert gauges(graph)[find_group(graph, "conv:0").dim] == Gauge.PERMUTE | Gauge.SIGN | Gauge.SCALE
