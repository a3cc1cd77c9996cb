"""Capturing torch models: what comes in, what comes out, and that nothing of the user's changes."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from own_operators import registered
from regauge.backends.compare import compare
from regauge.frontends.capture import capture
from regauge.ir.errors import CaptureError, RegaugeWarning
from regauge.ir.graph import Graph, Parameter
from regauge.ir.running.interpret import Interpreter, run
from regauge.ir.verify import verify


class Call(nn.Module):
    """A module whose forward is a function of its sub-modules and inputs."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Any) -> Any:
        return self.function(self.parts, x)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.norm(self.conv(x)))
        return self.drop(self.head(h.mean((2, 3))))


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def same_results(graph: Graph, module: nn.Module, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*inputs))
    for actual, wanted in zip(run(graph, list(inputs)), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_whole_operators_names_and_places() -> None:
    model = Small()
    graph = capture(model, torch.randn(2, 3, 6, 6))
    verify(graph, axes=True)
    assert operators(graph) == ["conv", "batch_norm", "relu", "mean", "linear", "dropout"]
    assert graph.name == "Small"
    assert set(graph.parameters) == set(model.state_dict())
    conv = graph.nodes[0]
    assert conv.scope == (("", "Small"), ("conv", "Conv2d"))
    assert conv.source.startswith("test_capture.py:") and conv.source.endswith("in forward")
    assert graph.parameters["conv.weight"].tensor.data_ptr() == model.conv.weight.data_ptr()
    assert graph.metadata["torch"]["input_names"] == ["x"]


def test_modes_and_statistics_are_the_users() -> None:
    model = Small().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture(model, torch.randn(2, 3, 6, 6))
    assert model.training and not model.norm.training and model.drop.training
    with pytest.warns(RegaugeWarning, match="dropout draws random numbers"):
        graph = capture(model, torch.randn(2, 3, 6, 6), train=True)
    assert graph.metadata["torch"]["training"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_training_statistics_are_not_touched_by_runs() -> None:
    model = Call(lambda parts, x: parts[0](x), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = capture(model, torch.randn(8, 4), train=True)
    run(graph, [torch.randn(8, 4)])
    assert graph.nodes[-1].attributes["training"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_tied_weights_are_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    graph = capture(Tied(), torch.arange(3))
    (parameter,) = graph.parameters.values()
    assert parameter.names == ("embed.weight", "head.weight")
    assert {node.op for node in parameter.consumers()} == {"embedding", "linear"}


def test_modules_called_twice_are_told_apart() -> None:
    graph = capture(Call(lambda parts, x: parts[0](parts[0](x)), nn.Linear(4, 4)), torch.randn(2, 4))
    assert [node.scope[-1][0] for node in graph.nodes] == ["parts.0", "parts.0@1"]


def test_nested_inputs_and_outputs() -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor, cache: Any = None, *, scale: float = 1.0, **more: Any) -> Any:
            total = x * scale + cache[0]["k"] + more["extra"]
            return {"sum": total, "rest": (None, 3, [cache[0]["k"] * 2])}

    tensors = [torch.randn(2, 3) for _ in range(3)]
    cache = [{"k": tensors[1], "n": 4}]
    graph = capture(Nested(), (tensors[0], cache), {"scale": 2.0, "extra": tensors[2]})
    assert [value.name for value in graph.inputs] == ["x", "cache.0.k", "extra"]
    assert graph.outputs[1:3] == [None, 3]
    meta = graph.metadata["torch"]
    restored = pytree.tree_unflatten(run(graph, tensors), meta["out_spec"])
    torch.testing.assert_close(restored["sum"], tensors[0] * 2 + tensors[1] + tensors[2])
    assert restored["rest"][1] == 3
    assert dict(meta["leaves"])["scale"] == 2.0 and meta["kwargs"] == ("scale", "extra")


def test_buffers_that_are_written_become_states() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return x * self.seen

    model = Counter()
    graph = capture(model, torch.ones(3))
    (state,) = graph.states
    assert state.name == "seen" and isinstance(state.before, Parameter)
    interpreter = Interpreter(graph)
    assert torch.equal(interpreter.run([torch.ones(3)])[0], torch.ones(3))
    assert interpreter.states["seen"] == 1 and model.seen == 0


def test_wrapped_regions_are_inlined() -> None:
    from torch.utils.checkpoint import checkpoint

    def forward(parts: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = parts[0](x)
        with torch.autocast("cpu", enabled=False):
            x = x.float() * 2
        return checkpoint(parts[0], x, use_reentrant=False)

    model = Call(forward, nn.Linear(4, 4))
    graph = capture(model, torch.randn(2, 4))
    assert operators(graph) == ["linear", "mul", "linear"]


def test_control_flow_becomes_regions() -> None:
    def forward(parts: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda a: parts[0](a).relu(), lambda a: a - 1, (x,))

    model = Call(forward, nn.Linear(4, 4))
    graph = capture(model, torch.randn(3, 4))
    verify(graph)
    (node,) = [node for node in graph.nodes if node.op == "cond"]
    assert [operators(region) for region in node.regions] == [["linear", "relu"], ["sub"]]
    for sign in (1.0, -1.0):
        same_results(graph, model, torch.full((3, 4), sign))


def test_unknown_operators_stay_opaque_with_one_warning() -> None:
    model = Call(lambda parts, x: torch.special.i1(parts[0](x)) + torch.special.i1(x), nn.Linear(4, 4))
    with pytest.warns(RegaugeWarning, match=r"aten\.special_i1\.default \(2x first at test_capture\.py:\d+") as caught:
        graph = capture(model, torch.randn(2, 4))
    assert len(caught) == 1
    assert operators(graph).count("torch_call") == 2
    same_results(graph, model, torch.randn(2, 4))


def bessel(x: torch.Tensor) -> torch.Tensor:
    return torch.special.i1(x)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("a b c -> a b c", "operand 0 has 2 axes, but the rule"),
        ("a a -> a a", "axes of sizes 2 and 4 cannot be the same"),
        (lambda call: call.operand(0)[5], "its rule fails with IndexError: list index out of range"),
    ],
)
def test_a_rule_that_does_not_fit_gives_one_warning(rule: Any, reason: str) -> None:
    model = Call(lambda parts, x: torch.special.i1(torch.special.i1(parts[0](x))), nn.Linear(4, 4))
    with registered(bessel, rule, aten={"special_i1": None}):
        with pytest.warns(RegaugeWarning, match="axis rule does not fit") as caught:
            graph = capture(model, torch.randn(2, 4))
        assert len(caught) == 1
        message = str(caught[0].message)
        assert f"bessel = bessel: {reason}" in message and "bessel_1 = bessel" in message
        assert operators(graph) == ["linear", "bessel", "bessel"]
        assert not [group for group in graph.groups() if group.free and group.name == "parts.0.weight:0"]


def test_a_wrong_record_is_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    from regauge.ir import operator

    record, _ = operator.find_aten("relu") or (None, None)
    monkeypatch.setitem(operator._BY_ATEN, "relu", (record, lambda build, x: build.sigmoid(x)))
    model = Call(lambda parts, x: parts[0](x).relu(), nn.Linear(4, 4))
    with pytest.warns(RegaugeWarning, match="computes something else"):
        graph = capture(model, torch.randn(2, 4))
    same_results(graph, model, torch.randn(2, 4))


def test_an_adapter_with_another_shape_is_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    from regauge.ir import operator

    record, _ = operator.find_aten("relu") or (None, None)
    monkeypatch.setitem(operator._BY_ATEN, "relu", (record, lambda build, x: build.unsqueeze(x, dim=0)))
    with pytest.warns(RegaugeWarning, match=r"is f32\[1,2,4\], but torch gives"):
        graph = capture(Call(lambda parts, x: x.relu()), torch.randn(2, 4), verify=False)
    assert operators(graph) == ["torch_call"]


def test_static_tables_become_constants() -> None:
    def forward(parts: Any, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])
        mask = positions[:, None] >= positions[None]
        return x.masked_fill(~mask, 0.0)

    graph = capture(Call(forward), torch.randn(2, 4, 4))
    assert "arange" not in operators(graph) and any(p.kind == "constant" for p in graph.parameters.values())


def test_fx_graphs_and_exported_programs() -> None:
    model = Small().eval()
    x = torch.randn(2, 3, 6, 6)
    traced = capture(torch.fx.symbolic_trace(model), x)
    assert "conv" in operators(traced)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})
    graph = capture(program)
    assert graph.name == "Small" and [value.name for value in graph.inputs] == ["x"]
    assert not isinstance(graph.inputs[0].shape[0], int)
    same_results(graph, model, torch.randn(5, 3, 6, 6))
    same_results(capture(program.run_decompositions({}), (x,)), model, x)


def test_unregistered_results() -> None:
    @dataclasses.dataclass
    class Out:
        hidden: torch.Tensor
        steps: int

    class Box:
        pass

    with pytest.warns(RegaugeWarning, match="Out became a dict.*Box is left out"):
        graph = capture(Call(lambda parts, x: (Out(x + 1, 3), Box())), torch.randn(2))
    assert graph.outputs[1:] == [3, None]


@pytest.mark.parametrize(
    ("thing", "inputs", "message"),
    [
        (3, (), "capture takes an nn.Module.* not a int"),
        (nn.Linear, (), "not the class Linear"),
        (torch.jit.script(nn.Linear(4, 4)), torch.randn(2, 4), "TorchScript"),
        (Call(lambda parts, x: x if x.sum() > 0 else -x), torch.randn(2), r"at test_capture\.py:\d+ in .*torch\.cond"),
        (nn.Linear(4, 4), (torch.randn(2, 4), 3), "do not fit Linear.forward"),
        (Small(), torch.randn(2, 5, 6, 6), r"does not run.* expected input.* at test_capture\.py:\d+ in forward"),
        (nn.Linear(4, 4), torch.ones(2, 4, dtype=torch.int64), "does not run on the example inputs: .*dtype"),
        (nn.Linear(4, 4), "x.pt", "must be a tensor, a tuple"),
    ],
)  # fmt: skip
def test_errors_say_where_and_what_to_do(thing: Any, inputs: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(thing, inputs)
    assert "\n" not in str(caught.value)


def test_a_model_that_runs_differently_than_it_traces() -> None:
    model = Call(lambda parts, x: x + (1 if torch.compiler.is_exporting() else 2))
    with pytest.raises(CaptureError, match="does not compute what the model computes"):
        capture(model, torch.randn(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(model, torch.randn(3), verify=False)


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 5), torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a(x) - 2 * self.b(y)


def test_one_tensor_given_for_two_inputs_stays_two_inputs() -> None:
    model, x = TwoInputs().eval(), torch.randn(3, 4)
    other = (torch.randn(3, 4), torch.randn(3, 4))
    assert compare(model, capture(model, (x, x)), other).equal(1e-6)
    assert compare(model, capture(model, {"x": x, "y": x}), other).equal(1e-6)
