"""Scalify: the de-scaled result is the original, bit for bit where the type stays, and narrow types do not overflow."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regauge
from random_networks import networks
from regauge.ir.edit import Builder
from regauge.ir.errors import EmitError, PassError
from regauge.ir.graph import Graph
from regauge.ir.running.sample_inputs import sample_inputs
from regauge.settings import using
from small_graphs import multilayer_perceptron, residual_network


def scalified(graph: Graph, text: str = "scalify", data: Any = None) -> Graph:
    with using(verify="structure"):  # what the pass promises is checked here, and more strictly
        return regauge.optimize(graph, text, data=data)


@given(networks(), st.sampled_from(["", "rescale=max", "rescale=l1", "rescale=l2"]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_same_numbers_come_out_bit_for_bit(graph: Graph, options: str, with_data: bool) -> None:
    inputs = sample_inputs(graph)
    data = [sample_inputs(graph, seed=1)] if with_data else None
    result = scalified(graph, f"scalify{{{options}}}", data)
    for found, expected in zip(result.run(inputs), graph.run(inputs), strict=True):
        assert torch.equal(found, expected)


@given(networks(), st.booleans(), st.sampled_from(["float16", "bfloat16"]))
@settings(max_examples=15, deadline=None)
def test_half_precision_is_as_near_as_the_type_is_fine(graph: Graph, with_data: bool, dtype: str) -> None:
    inputs = sample_inputs(graph)
    result = scalified(graph, f"scalify{{dtype={dtype}}}", [inputs] if with_data else None)
    fine = torch.finfo(getattr(torch, dtype)).eps
    for found, expected in zip(result.run(inputs), graph.run(inputs), strict=True):
        assert found.dtype == expected.dtype
        assert float((found - expected).norm() / expected.norm()) < 40 * fine


def wide_network(std: float) -> torch.nn.Module:
    """Layers with weights so large that activations leave the range of float16, and a norm that brings them back."""

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (
                torch.nn.Linear(*sizes) for sizes in ((32, 128), (128, 128), (128, 8))
            )
            for layer in (self.first, self.second):
                torch.nn.init.normal_(layer.weight, std=std)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(self.first(x))
            hidden = hidden + torch.relu(self.second(hidden))
            found: torch.Tensor = self.last(hidden) / hidden.abs().amax(-1, keepdim=True)
            return found

    torch.manual_seed(0)
    return Wide().eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("options", "with_data"), [("", False), ("", True), (",dynamic=true", False)])
def test_what_overflows_float16_works_in_it(options: str, with_data: bool) -> None:
    model = wide_network(std=100.0)
    x = torch.randn(16, 32)
    expected = model(x).detach()
    assert not model.half()(x.half()).isfinite().all()
    graph = regauge.capture(model.float(), (x,))
    result = scalified(graph, f"scalify{{dtype=float16{options}}}", [x] if with_data else None)
    largest: dict[str, float] = {}

    def note(node: Any, results: Any) -> None:
        for value in results:
            if value.dtype == torch.float16:
                largest[node.name] = float(value.abs().max())

    (found,) = result.run(x, hook=note)
    assert relative_error(found, expected) < 2e-3
    assert len(largest) >= 6 and max(largest.values()) < 100
    assert result.find("first.weight").dtype == torch.float16


def test_weights_are_stored_at_the_scale_that_results_have() -> None:
    graph = multilayer_perceptron(
        64, 256, 256, 3
    )  # normal weights: entries of the result grow with sqrt(64), sqrt(256)
    result = scalified(graph)
    weight = result.parameters["layer0.weight"].tensor
    assert torch.equal(weight * 8, graph.parameters["layer0.weight"].tensor)
    sizes: dict[str, float] = {}
    result.run(sample_inputs(graph), hook=lambda node, results: sizes.update({node.name: float(results[0].std())}))
    assert 0.5 < sizes["linear"] < 2 and 0.25 < sizes["linear_1"] < 2


def test_a_weight_with_two_readers_is_one_weight_with_one_scale() -> None:
    graph = Graph("tied")
    build = Builder(graph)
    x = build.input("x", (4, 6), torch.float64)
    weight = build.parameter("w", 5 * torch.randn(8, 6, dtype=torch.float64))
    graph.outputs = [build.matmul(build.relu(build.linear(x, weight)), weight, name="y")]
    result = scalified(graph)
    assert list(result.parameters) == ["w"] and result.parameters["w"].tensor.std() < 1.5
    (found,), (expected,) = result.run(sample_inputs(graph)), graph.run(sample_inputs(graph))
    assert torch.equal(found, expected) and result.outputs[0].name == "y"


def test_masks_and_zeros_adopt_the_scale_of_what_they_are_added_to() -> None:
    graph = Graph("masked")
    build = Builder(graph)
    x = build.linear(build.input("x", (4, 6), torch.float32), build.parameter("w", 1e4 * torch.randn(5, 6)))
    mask = build.constant(torch.tensor([0.0, 0.0, -torch.inf, -3.4e38, 0.0]))
    zero = build.parameter("zero", torch.zeros(5))
    graph.outputs = [build.softmax(build.mul(build.add(build.add(x, mask), zero), 1e-5), dim=-1)]
    result = scalified(graph, "scalify{dtype=float16}")
    (found,), (expected,) = result.run(sample_inputs(graph)), graph.run(sample_inputs(graph))
    assert relative_error(found, expected) < 2e-3
    assert float(found[:, 2:4].abs().max()) == 0


def test_weights_stay_in_range_where_results_cancel() -> None:
    graph = Graph("cancels")
    build = Builder(graph)
    x = build.input("x", (4, 2), torch.float32)
    graph.outputs = [build.linear(x, build.parameter("w", torch.tensor([[1.0, -1.0]])), name="y")]
    base = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat([base, base * (1 - 2.0**-20)], 1)
    result = scalified(graph, "scalify{dtype=float16}", [inputs])
    assert result.parameters["w"].tensor.abs().max() == 256  # and not 2^20, which float16 does not hold
    assert bool(result.run(inputs)[0].isfinite().all())


def test_a_convolutional_network_in_every_type() -> None:
    graph = residual_network(dtype=torch.float32)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (expected,) = graph.run(x)
    bounds = {"float16": 2e-3, "bfloat16": 2e-2, "float8_e4m3": 0.1, "float8_e5m2": 0.2}
    for dtype, bound in bounds.items():
        for data in (None, [x]):
            result = scalified(graph, f"scalify{{dtype={dtype}}}", data)
            assert relative_error(result.run(x)[0], expected) < bound, dtype
    assert result.find("block0.first.weight").dtype == torch.float8_e5m2  # stored so


def test_amax_uses_the_range_of_float8_and_cscale_one_exponent() -> None:
    graph = multilayer_perceptron(16, 32, 4)
    x = 1000 * torch.randn(4, 16, dtype=torch.float64)
    for options, largest in (("", 448), (",margin=2", 112)):
        codes = scalified(graph, f"scalify{{dtype=float8_e4m3{options}}}", [x]).parameters["layer0.weight"].tensor
        assert largest / 2 < float(codes.float().abs().max()) <= largest
    result = scalified(graph, "scalify{dtype=float8_e4m3,rule=cscale,bias=3}")
    codes = result.parameters["layer0.weight"].tensor.double()
    torch.testing.assert_close(codes / 8, graph.parameters["layer0.weight"].tensor, rtol=0.07, atol=1e-3)
    clipped = next(node for node in result.nodes if node.op == "clamp")  # inputs of 1000 leave the range of bias 3
    assert clipped.inputs[1:] == (-448.0, 448.0)


def test_a_module_trains_in_float8() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    x = torch.randn(256, 8)
    y = x[:, :2].sum(1, keepdim=True).tanh()
    graph = regauge.capture(model, (x[:4],), dynamic={0: {0: "batch"}})
    module = scalified(graph, "scalify{dtype=float8_e4m3,gradients=float8_e5m2}").to_torch().train()
    torch.testing.assert_close(module.state_dict(), model.state_dict())  # scales are no part of what is trained

    def gradients(one: torch.nn.Module, loss_scale: float) -> list[torch.Tensor]:
        one.zero_grad()
        ((one(x) - y).square().mean() * loss_scale).backward()
        return [parameter.grad / loss_scale for parameter in one.parameters() if parameter.grad is not None]

    # 2^-40 is far below what float8_e5m2 holds: gradients are scaled on their way
    for loss_scale in (1.0, 2.0**-40):
        for found, expected in zip(gradients(module, loss_scale), gradients(model, loss_scale), strict=True):
            assert relative_error(found, expected) < 0.2
    constant = scalified(graph, "scalify{dtype=float8_e4m3,gradients=float8_e5m2,rule=cscale}").to_torch().train()
    assert all(float(g.abs().max()) == 0 for g in gradients(constant, 2.0**-40)[:1])

    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.04 < 0.2 < float((model(x) - y).square().mean().detach())


def test_a_captured_backward_pass_is_scaled_too() -> None:
    """Gradients of 1e-9 are zero in float16, but for their scale."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def loss(first: torch.Tensor, second: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x @ first) @ second).square().mean() * 1e-9

    def step(first: torch.Tensor, second: torch.Tensor, x: torch.Tensor) -> Any:
        return torch.func.grad(loss, argnums=(0, 1))(first, second, x)

    torch.manual_seed(0)
    inputs = (torch.randn(8, 16), torch.randn(16, 4), torch.randn(5, 8))
    graph = regauge.capture(make_fx(step)(*inputs), inputs)
    expected = graph.run(inputs)
    assert all(float(g.abs().max()) < 2.0**-24 for g in expected)
    for options, data in (("", [inputs]), (",dynamic=true", None)):
        result = scalified(graph, f"scalify{{dtype=float16{options}}}", data)
        halves = [node for node in result.nodes if node.op == "matmul" and node.output.dtype == torch.float16]
        assert len(halves) == 5  # two forward, three backward
        for found, wanted in zip(result.run(inputs), expected, strict=True):
            assert relative_error(found, wanted) < 5e-3
        for found, again in zip(result.to_torch()(*inputs), result.run(inputs), strict=True):
            torch.testing.assert_close(found, again)


@pytest.mark.parametrize("options", ["", "rescale=max", "dtype=float16", "dtype=float8_e4m3"])
def test_onnx_files_stay_onnx_files(options: str, tmp_path: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.GELU(), torch.nn.Linear(16, 3)).eval()
    torch.onnx.export(model, (torch.randn(2, 6),), tmp_path / "a.onnx", dynamo=True, external_data=False, verbose=False)
    graph = regauge.load(tmp_path / "a.onnx")
    scalified(graph, f"scalify{{{options}}}").to_onnx(tmp_path / "b.onnx")  # checked in onnxruntime
    found = regauge.compare(tmp_path / "a.onnx", tmp_path / "b.onnx", [torch.randn(2, 6)])
    assert found.equal({"": 1e-6, "rescale=max": 1e-6, "dtype=float16": 5e-3}.get(options, 0.1))


def test_float8_is_refused_where_the_opset_of_a_file_has_none(tmp_path: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU()).eval()
    torch.onnx.export(model, (torch.randn(2, 6),), tmp_path / "a.onnx", dynamo=False, opset_version=13)
    result = scalified(regauge.load(tmp_path / "a.onnx"), "scalify{dtype=float8_e4m3}")
    with pytest.raises(EmitError, match="float8_e4m3fn needs opset 19, and the model has 13"):
        result.to_onnx(tmp_path / "b.onnx")


def test_normalisation_that_is_trained_stays_in_single_precision() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).train()
    x = torch.randn(4, 3, 6, 6)
    graph = regauge.capture(model, (x,))
    result = scalified(graph, "scalify{dtype=float16}")
    assert relative_error(result.run(x)[0], graph.run(x)[0]) < 2e-3
    assert {p.name: p.dtype for p in result.parameters.values()} == {
        p.name: torch.float16 if p.name.startswith("0.") else p.dtype for p in graph.parameters.values()
    }


def test_regions_read_values_as_they_were() -> None:
    class Choice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.layer(x) * 64
            found = torch.cond(x.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))
            return found * h  # type: ignore[no-any-return]

    graph = regauge.capture(Choice().eval(), (torch.randn(3, 4),))
    for sign in (1, -1):
        x = sign * torch.rand(3, 4)
        assert torch.equal(scalified(graph).run(x)[0], graph.run(x)[0])
        assert relative_error(scalified(graph, "scalify{dtype=float16}").run(x)[0], graph.run(x)[0]) < 0.05


def test_points_can_be_named() -> None:
    graph = multilayer_perceptron(8, 16, 4)
    x = sample_inputs(graph)[0]
    all_points = scalified(graph, "scalify{rescale=max}", [x])
    one = scalified(graph, "scalify{rescale=max,at=[linear_1]}", [x])
    assert "3 values are brought to 1 by their max norm, taken on data" in all_points.report.passes[0].notes
    assert "1 values are brought to 1 by their max norm, taken on data" in one.report.passes[0].notes
    with pytest.raises(PassError, match="at=lineer matches no value or module: did you mean linear"):
        scalified(graph, "scalify{rescale=max,at=[lineer]}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("margin=1", "margin does nothing without rule=amax and a float8 dtype"),
        ("dtype=float8_e4m3,bias=1", "bias does nothing without rule=cscale and a float8 dtype"),
        ("dtype=float16,rule=cscale", "rule does nothing without a float8 dtype"),
        ("gradients=float8_e5m2", "gradients does nothing without a float8 dtype"),
        ("at=[a]", "at does nothing without rescale"),
    ],
)
def test_options_that_do_nothing_are_refused(options: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        scalified(multilayer_perceptron(3, 4), f"scalify{{{options}}}")


def test_what_is_promised_is_exact_only_where_the_type_stays() -> None:
    graph = multilayer_perceptron(3, 4)
    entries = [scalified(graph, text).report.passes[0] for text in ("scalify", "scalify{dtype=float16}")]
    assert [entry.contract for entry in entries] == ["exact", "approximate"]


def test_what_is_computed_as_it_was_is_counted() -> None:
    graph = multilayer_perceptron(3, 8, 8, 4, norm=True)
    assert dict(scalified(graph).report.passes[0].left) == {"layer_norm is computed on values as they were": 2}
