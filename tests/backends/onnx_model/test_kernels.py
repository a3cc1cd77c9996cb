"""Fused nodes in ONNX files: local functions that onnxruntime runs, and that are fused nodes again once loaded."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

import regauge
from decoder_block import decoder_block
from kernel_forms import FORMS, form_graph
from layered_networks import ResidualNetwork, images, redrawn
from random_regions import regions as regions_drawn
from regauge.backends.onnx_model.kernels import Calls, add_functions
from regauge.backends.run_onnxruntime import Session
from regauge.ir import operator as registry
from regauge.ir.edit import Builder, set_weight
from regauge.ir.fusion.fuse import fuse
from regauge.ir.fusion.fused import body_of, canonical, content, fused_nodes
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Value
from regauge.ir.onnx_kernels import AXES, DOMAIN, HASH, REGION, ROUNDING
from regauge.ir.operator import get_operator
from regauge.ir.running.sample_inputs import sample_inputs
from regauge.ir.sizes.expressions import symbol


def block() -> Graph:
    graph = decoder_block(tokens=16, width=32, hidden=48, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in graph.parameters.values():
        set_weight(graph, parameter, torch.randn(parameter.weight.shape, generator=generator) / 6)
    return graph


def gates(widths: tuple[int, ...] = (8, 8, 12)) -> Graph:
    """Layers behind one another, each with a gate; the rows are dynamic."""
    rows = symbol("rows")
    graph = Graph("gates", symbols={rows: (2, None)})
    build = Builder(graph)
    generator = torch.Generator().manual_seed(0)
    x = build.input("x", (rows, 16), torch.float32)
    for number, width in enumerate(widths):
        sizes = {"gate": (width, 16), "up": (width, 16), "down": (16, width)}
        weights = [build.parameter(f"{n}{number}", torch.randn(s, generator=generator) / 4) for n, s in sizes.items()]
        gate, up = (build.linear(x, weight) for weight in weights[:2])
        x = build.linear(build.mul(build.silu(gate), up), weights[2])
    graph.outputs = [build.reshape(build.relu(x), shape=(rows * 4, 4))]
    return graph


def written(graph: Graph, path: Path, **options: Any) -> onnx.ModelProto:
    graph.to_onnx(path, **options)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


def calls(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.domain == "regauge.kernels"]


def notes(function: onnx.FunctionProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in function.metadata_props}


def regions(graph: Graph) -> list[str]:
    return [content(body_of(node)) for node in fused_nodes(graph)]


def test_causal_attention_of_any_length_is_one_function(tmp_path: Path) -> None:
    """Queries and keys of the same length, and fewer queries, which see the first keys alone, or are the last ones."""
    batch, length, past = map(symbol, ("batch", "length", "past"))
    graph = Graph("causal", symbols={batch: (1, None), length: (1, None), past: (0, None)})
    build = Builder(graph)
    q = build.input("q", (batch, 4, length, 8), torch.float32)
    k, v = (build.input(name, (batch, 2, length + past, 8), torch.float32) for name in "kv")
    options = {"scale": 0.3, "is_causal": True, "enable_gqa": True}
    graph.outputs = [build.silu(build.attention(q, k, v, **options)), build.attention(k, k, v, **options)]
    graph.outputs.append(build.attention(q, k, v, lower_right=True, **options))
    fused = regauge.optimize(graph, "fuse")
    model = written(fused, tmp_path / "m.onnx", functions=True)
    assert len(calls(model)) == len(model.functions) == 3 and len(model.graph.node) == 3
    session = Session(tmp_path / "m.onnx")
    for sizes in ((1, 1, 0), (2, 5, 3)):
        tensors = [torch.randn(sizes[0], heads, n, 8) for heads, n in ((4, sizes[1]), *((2, sum(sizes[1:])),) * 2)]
        for own, other in zip(session.run(tensors), graph.run(tensors), strict=True):
            torch.testing.assert_close(own, other)


def test_regions_are_functions_of_the_highest_operators(tmp_path: Path) -> None:
    graph = regauge.optimize(block(), "fuse")
    model = written(graph, tmp_path / "m.onnx", functions=True)
    assert [[node.op_type for node in function.node] for function in model.functions][1:] == [
        ["Add", "RMSNormalization"],
        ["Sigmoid", "Mul", "Mul"],
    ]
    assert calls(model) == [function.name for function in model.functions]
    found = notes(model.functions[1])
    assert (
        found[ROUNDING] == "fused"
        and len(found[HASH]) == 10
        and found[REGION] == str(canonical(body_of(fused_nodes(graph)[1])))
    )
    assert found[AXES] == "x: i0 i1 r0, linear: i0 i1 r0, norm: r0 -> add: i0 i1 r0, rms_norm: i0 i1 r0"


def test_a_file_with_functions_gives_the_regions_back(tmp_path: Path) -> None:
    graph = regauge.optimize(block(), "fuse{rounding=eager}")
    model = written(graph, tmp_path / "m.onnx", functions=True)
    loaded = regauge.load(tmp_path / "m.onnx")
    assert regions(loaded) == regions(graph)
    assert {node.attributes["rounding"] for node in fused_nodes(loaded)} == {"eager"}
    inputs = sample_inputs(graph)
    wanted, found = graph.run(inputs)[0], loaded.run(inputs)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Session(tmp_path / "m.onnx").run(inputs)[0], wanted, rtol=1e-5, atol=1e-5)
    loaded.to_onnx(tmp_path / "again.onnx", functions=True)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    flat = written(loaded, tmp_path / "flat.onnx")
    assert not flat.functions and not calls(flat) and [entry.domain for entry in flat.opset_import] == [""]
    assert len(flat.graph.node) == len(model.graph.node) - len(model.functions) + sum(
        node.op_type != "Constant" for function in model.functions for node in function.node
    )


def test_without_functions_the_file_is_that_of_the_nodes(tmp_path: Path) -> None:
    plain = written(gates(), tmp_path / "plain.onnx")
    loaded = regauge.load(tmp_path / "plain.onnx")
    fused = regauge.optimize(loaded, "fuse")
    assert len(fused_nodes(fused)) == 3
    fused.to_onnx(tmp_path / "fused.onnx")
    assert (tmp_path / "fused.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()
    assert not plain.functions


@pytest.mark.parametrize("source", ["captured", "file"])
def test_equal_bodies_are_one_function_whatever_their_sizes(source: str, tmp_path: Path) -> None:
    graph = gates()
    if source == "file":
        graph.to_onnx(tmp_path / "plain.onnx")
        graph = regauge.load(tmp_path / "plain.onnx")
    model = written(regauge.optimize(graph, "fuse"), tmp_path / "m.onnx", functions=True)
    assert len(model.functions) == 1 and calls(model) == [model.functions[0].name] * 3
    loaded = regauge.load(tmp_path / "m.onnx")
    assert [node.output.shape[1] for node in fused_nodes(loaded)] == [8, 8, 12]
    x = torch.randn(7, 16)
    torch.testing.assert_close(Session(tmp_path / "m.onnx").run([x])[0], gates().run(x)[0], rtol=1e-5, atol=1e-5)


def test_a_function_of_equal_and_of_different_sizes_is_read_for_what_it_computes(tmp_path: Path) -> None:
    rows, columns = symbol("s"), symbol("p")
    graph = Graph("pads", symbols={rows: (1, None), columns: (1, None)})
    build = Builder(graph)
    for name, shape in (("square", (rows, rows)), ("oblong", (rows, columns))):
        padded = build.pad(build.gelu(build.input(name, shape, torch.float32)), pads=((0, 0), (0, rows)))
        graph.outputs.append(build.add(padded, 1))
    path = tmp_path / "pads.onnx"
    assert len(set(calls(written(regauge.optimize(graph, "fuse"), path, functions=True)))) == 1
    inputs = [torch.randn(5, 5), torch.randn(5, 7)]
    torch.testing.assert_close(regauge.load(path).run(inputs), graph.run(inputs))


def test_a_convolution_whose_window_is_one_entry_has_a_function(tmp_path: Path) -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1, groups=4, bias=False), torch.nn.GELU())
    graph = regauge.optimize(regauge.capture(layers.eval(), torch.randn(2, 4, 8, 8)), "fuse")
    model = written(graph, tmp_path / "m.onnx", functions=True)
    assert notes(model.functions[0])[AXES] == "input: i0 i1 x0 x1, weight: i1 -> gelu: i0 i1 i2 i3"


class Logarithms(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.log1p(torch.relu(x)) * x, torch.tanh(x.sum(0)) * 2


def test_logarithms_near_one_are_part_of_functions(tmp_path: Path) -> None:
    """No small number is lost, as it would be in log(1 + x)."""
    graph = regauge.optimize(regauge.capture(Logarithms(), torch.rand(4, 6)), "fuse")
    with warnings.catch_warnings():
        warnings.simplefilter("error", regauge.RegaugeWarning)
        assert calls(written(graph, tmp_path / "m.onnx", functions=True))
    x = torch.rand(4, 6) * 10.0 ** torch.arange(-8, 16).reshape(4, 6)
    for own, other in zip(Session(tmp_path / "m.onnx").run([x]), graph.run(x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=0)


def test_a_region_without_a_spelling_stays_nodes_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = regauge.optimize(regauge.capture(Logarithms(), torch.rand(4, 6)), "fuse")
    regions_before = len(fused_nodes(graph))
    monkeypatch.setitem(registry._BY_NAME, "log1p", replace(get_operator("log1p"), spell=None))
    reason = "1 x log1p = log1p, part of the region .*, cannot be written to ONNX: log1p has no spelling there yet"
    with pytest.warns(regauge.RegaugeWarning, match=f"^1 of {regions_before} regions are written as .*: {reason}"):
        model = written(graph, tmp_path / "m.onnx", functions=True)
    assert len(calls(model)) == regions_before - 1
    x = torch.randn(4, 6)
    for own, other in zip(Session(tmp_path / "m.onnx").run([x]), graph.run(x), strict=True):
        torch.testing.assert_close(own, other)


def test_other_passes_go_on_from_a_file_with_functions(tmp_path: Path) -> None:
    regauge.optimize(gates(), "fuse").to_onnx(tmp_path / "m.onnx", functions=True)
    loaded = regauge.load(tmp_path / "m.onnx")
    with pytest.raises(regauge.RegaugeError, match="let fuse come last, or unfuse first"):
        regauge.optimize(loaded, "prune{ratio=0.5}")
    small = regauge.optimize(loaded, "unfuse,prune{ratio=0.5,examples=4},fuse")
    model = written(small, tmp_path / "small.onnx", functions=True)
    assert len(model.functions) == 1 and len(calls(model)) == 3
    x = torch.randn(7, 16)
    torch.testing.assert_close(Session(tmp_path / "small.onnx").run([x])[0], small.run(x)[0], rtol=1e-5, atol=1e-5)


def test_what_was_changed_in_a_function_counts(tmp_path: Path) -> None:
    """Its nodes are read as those of any other function, and its note is not believed."""
    regauge.optimize(gates((8,)), "fuse").to_onnx(tmp_path / "m.onnx", functions=True)
    model = onnx.load(tmp_path / "m.onnx")
    (sigmoid,) = (node for node in model.functions[0].node if node.op_type == "Sigmoid")
    sigmoid.op_type = "Tanh"
    onnx.save(model, tmp_path / "changed.onnx")
    loaded = regauge.load(tmp_path / "changed.onnx")
    assert not fused_nodes(loaded) and [node.op for node in loaded.nodes].count("tanh") == 1
    x = torch.randn(7, 16)
    torch.testing.assert_close(Session(tmp_path / "changed.onnx").run([x])[0], loaded.run(x)[0], rtol=1e-5, atol=1e-5)


def test_a_network_with_batch_norms(tmp_path: Path) -> None:
    module = redrawn(ResidualNetwork())
    graph = regauge.optimize(regauge.capture(module, (images(),), dynamic={0: {0: "batch"}}), "fuse")
    model = written(graph, tmp_path / "m.onnx", functions=True)
    assert len(calls(model)) == 11 and len(model.functions) == 3
    assert regions(regauge.load(tmp_path / "m.onnx")) == regions(graph)
    emitted = graph.to_torch().train()
    torch.testing.assert_close(emitted(images(3)), module(images(3)))
    emitted(images(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in emitted.parameters())


def called(graph: Graph) -> tuple[Graph, onnx.ModelProto]:
    """The region that the whole graph is, and a model that only calls its function."""
    whole = graph.copy()
    outputs = [value for value in whole.outputs if isinstance(value, Value)]
    body = canonical(body_of(fuse(Builder(whole), trace(whole.nodes, outputs), "fused")))

    def typed(value: Value) -> onnx_ir.Value:
        assert isinstance(value.dtype, torch.dtype)
        kind = onnx_ir.TensorType(onnx_ir.tensor_adapters.from_torch_dtype(value.dtype))
        return onnx_ir.Value(name=value.name, type=kind, shape=onnx_ir.Shape(value.shape))

    inputs, results = ([typed(value) for value in values] for values in (body.inputs, body.outputs))  # type: ignore[union-attr]
    node = onnx_ir.Node(DOMAIN, "region", inputs, outputs=results)
    main = onnx_ir.Graph(inputs, results, nodes=[node], opset_imports={"": 23}, name="main")
    model = onnx_ir.Model(main, ir_version=10)
    add_functions(model, Calls(whole, {"region": (body, "fused")}))
    return body, onnx_ir.to_proto(model)


def readable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with floats of 8 bits cast to what onnxruntime gives to Python."""
    for output in model.graph.output:
        kind = output.type.tensor_type
        if kind.elem_type in (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2):
            kind.elem_type = onnx.TensorProto.FLOAT
            cast = onnx.helper.make_node("Cast", [output.name], [f"{output.name}_readable"], to=kind.elem_type)
            model.graph.node.append(cast)
            output.name = cast.output[0]
    return model


def check_function(graph: Graph) -> None:
    body, model = called(graph)
    onnx.checker.check_model(model, full_check=True)
    (node,) = fused_nodes(regauge.load(model))
    assert content(body_of(node)) == content(body)
    if body.inputs[0].dtype != torch.float32:
        return  # onnxruntime has not all operators in half precision
    inputs = sample_inputs(body)
    for own, wanted in zip(Session(readable(model), optimisation="off").run(inputs), body.run(inputs), strict=True):
        torch.testing.assert_close(own, wanted.to(own.dtype), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_kernels_has_a_function(name: str) -> None:
    check_function(form_graph(name, torch.float32))


@hypothesis_settings(max_examples=25)
@given(regions_drawn())
def test_random_regions_have_functions(graph: Graph) -> None:
    check_function(graph)
