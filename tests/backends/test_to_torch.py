"""Emission of hand-built graphs: hierarchy, shared and interleaved modules, ties, sizes, source."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch

from regauge.backends.to_torch import emit, to_torch, write
from regauge.backends.torch_module.runtime import source_of
from regauge.ir.dims.resize import resize
from regauge.ir.edit import Builder
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol

ROOT = ("", "Net")


def _agrees(graph: Graph, *inputs: torch.Tensor) -> torch.nn.Module:
    """The emitted module, which computes what the interpreter computes and has the graph's names."""
    module = to_torch(graph)
    found = module(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    for ours, expected in zip(found, run(graph, list(inputs)), strict=True):
        torch.testing.assert_close(ours, expected)
    names = {name for p in graph.parameters.values() if p.persistent and p.kind != "constant" for name in p.names}
    assert set(module.state_dict()) == names
    return module


def _linear(build: Builder, path: str, x, width: int, *, scope=True, bias=True):
    size = x.shape[-1]
    weight = build.parameter(f"{path}.weight", torch.randn(width, size))
    shift = build.parameter(f"{path}.bias", torch.randn(width)) if bias else None
    before = build.scope
    if scope:
        build.scope = (*before, (path, "Linear"))
    result = build.linear(x, weight, shift)
    build.scope = before
    return result


def _start(shape=(2, 6)) -> tuple[Graph, Builder, object]:
    graph = Graph(name="net")
    build = Builder(graph)
    build.scope = (ROOT,)
    return graph, build, build.input("x", shape, torch.float32)


def test_equal_blocks_share_one_class_in_a_sequential():
    graph, build, x = _start()
    for i in range(3):
        build.scope = (ROOT, ("blocks", "Sequential"), (f"blocks.{i}", "Block"))
        h = build.relu(_linear(build, f"blocks.{i}.up", x, 8))
        x = build.add(x, _linear(build, f"blocks.{i}.down", h, 6))
    graph.outputs = [x]
    module = _agrees(graph, torch.randn(2, 6))
    source = source_of(module)
    assert source.count("class ") == 2
    assert "self.blocks = nn.Sequential(*[Block() for _ in range(3)])" in source
    assert "self.up = nn.Linear(6, 8)" in source


def test_module_called_twice_is_one_module():
    graph, build, x = _start()
    weight = build.parameter("same.fc.weight", torch.randn(6, 6))
    for call in ("same", "same@1"):
        build.scope = (ROOT, (call, "Block"), (call.replace("same", "same.fc"), "Linear"))
        x = build.linear(x, weight)
        build.scope = (ROOT, (call, "Block"))
        x = build.relu(x)
    graph.outputs = [x]
    module = _agrees(graph, torch.randn(2, 6))
    assert source_of(module).count("self.same(") == 2


def test_second_call_that_does_something_else_is_inlined():
    graph, build, x = _start()
    weight = build.parameter("same.weight", torch.randn(6, 6))
    for call, op in (("same", "relu"), ("same@1", "tanh")):
        build.scope = (ROOT, (call, "Block"))
        x = build(op, build.linear(x, weight))
    graph.outputs = [x]
    module = _agrees(graph, torch.randn(2, 6))
    assert "F.linear(" in source_of(module) and "self.same.weight" in source_of(module)


def test_interleaved_modules_run_in_a_valid_order():
    graph, build, x = _start()
    build.scope = (ROOT, ("a", "A"))
    first = build.relu(x)
    build.scope = (ROOT, ("b", "B"))
    second = build.tanh(first)
    build.scope = (ROOT, ("a", "A"))
    third = build.add(second, first)
    build.scope = (ROOT, ("b", "B"))
    graph.outputs = [build.mul(third, second)]
    _agrees(graph, torch.randn(2, 6))


def test_modules_that_only_look_interleaved_stay_whole():
    graph, build, x = _start()
    build.scope = (ROOT, ("a", "A"))
    first = build.relu(x)
    build.scope = (ROOT, ("b", "B"))
    second = build.tanh(x)
    build.scope = (ROOT, ("a", "A"))
    third = build.mul(first, first)
    build.scope = (ROOT, ("b", "B"))
    graph.outputs = [build.add(second, second), third]
    source = source_of(_agrees(graph, torch.randn(2, 6)))
    assert "self.a(x)" in source and "self.b(x)" in source


def test_tied_weights_are_one_parameter_under_both_names():
    graph, build, x = _start()
    weight = build.parameter("first.weight", torch.randn(6, 6), aliases=("head.weight",))
    build.scope = (ROOT, ("first", "Linear"))
    h = build.linear(x, weight)
    build.scope = (ROOT, ("head", "Linear"))
    graph.outputs = [build.linear(h, weight)]
    module = _agrees(graph, torch.randn(2, 6))
    assert module.first.weight is module.head.weight
    assert "self.head = nn.Linear(6, 6, bias=False)" in source_of(module)


def test_parameter_of_another_branch_is_passed_in():
    graph, build, x = _start()
    weight = build.parameter("table.weight", torch.randn(6, 6))
    build.scope = (ROOT, ("table", "Holder"))
    h = build.relu(build.linear(x, weight))
    build.scope = (ROOT, ("user", "User"))
    graph.outputs = [build.tanh(build.linear(h, weight))]
    _agrees(graph, torch.randn(2, 6))


def test_parameter_named_below_another_lives_where_it_is_used():
    graph, build, x = _start()
    weight = build.parameter("b.weight", torch.randn(6, 6))
    scaled = build.parameter("b.weight.scaled", torch.randn(6))
    graph.outputs = [build.mul(build.linear(x, weight), scaled)]
    module, data = to_torch(graph), torch.randn(2, 6)
    assert set(module.state_dict()) == {"b.weight", "scaled"}
    torch.testing.assert_close(module(data), run(graph, (data,))[0])


def test_functional_use_of_a_childs_parameters_becomes_the_standard_layer():
    graph, build, x = _start()
    build.scope = (ROOT, ("block", "Block"))
    graph.outputs = [build.relu(_linear(build, "block.fc", x, 4, scope=False))]
    assert "self.fc = nn.Linear(6, 4)" in source_of(_agrees(graph, torch.randn(2, 6)))


def test_parameters_that_are_no_standard_layer_are_used_functionally():
    graph, build, x = _start()
    build.parameter("fc.extra", torch.randn(3))
    graph.outputs = [_linear(build, "fc", x, 4)]
    module = _agrees(graph, torch.randn(2, 6))
    assert "F.linear(x, self.weight, self.bias)" in source_of(module)


def test_dynamic_sizes_are_read_off_the_arguments():
    graph = Graph(name="net")
    build = Builder(graph)
    batch, length = symbol("batch"), symbol("length")
    graph.symbols = {batch: (1, None), length: (1, None)}
    x = build.input("x", (batch, length, 12), torch.float32)
    build.scope = (ROOT, ("attention", "Attention"))
    h = build.permute(build.reshape(x, shape=(batch, length, 3, 4)), dims=(0, 2, 1, 3))
    build.scope = (ROOT, ("attention", "Attention"), ("attention.merge", "Merge"))
    h = build.reshape(build.permute(h, dims=(0, 2, 1, 3)), shape=(batch * length, 12))
    graph.outputs = [h]
    module = _agrees(graph, torch.randn(2, 5, 12))
    assert "x.shape[0]" in source_of(module)
    dynamic = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(module, (torch.randn(2, 5, 12),), dynamic_shapes=dynamic)
    other = torch.randn(3, 7, 12)
    torch.testing.assert_close(exported.module()(other), module(other))


def test_size_that_no_argument_shows_is_passed_as_a_number():
    graph = Graph(name="net")
    build = Builder(graph)
    batch = symbol("batch")
    x = build.input("x", (batch, 2, 3), torch.float32)
    build.scope = (ROOT,)
    flat = build.reshape(x, shape=(batch * 2, 3))
    build.scope = (ROOT, ("inner", "Inner"))
    graph.outputs = [build.relu(build.reshape(flat, shape=(batch, 6)))]
    _agrees(graph, torch.randn(4, 2, 3))


def test_constants_live_where_they_are_used_and_are_not_in_the_state():
    graph, build, x = _start()
    build.scope = (ROOT, ("mask", "Mask"))
    table = build.constant(torch.arange(6.0))
    graph.outputs = [build.relu(build.mul(x, table))]
    module = _agrees(graph, torch.randn(2, 6))
    assert "mask.constant" in dict(module.named_buffers())
    assert not module.state_dict()


def test_dropout_follows_the_mode():
    graph, build, x = _start()
    build.scope = (ROOT, ("drop", "Dropout"))
    h = build.dropout(x, p=0.5, training=False)
    build.scope = (ROOT,)
    graph.outputs = [build.dropout(build.relu(h), p=0.5, training=False)]
    module = _agrees(graph, torch.randn(2, 6))
    source = source_of(module)
    assert "nn.Dropout(" in source and "self.training" in source
    module.train()
    assert (module(torch.ones(2, 600).expand(2, 600)[:, :6] + 1) == 0).sum() >= 0
    assert not torch.equal(module(torch.ones(100, 6)), module(torch.ones(100, 6)))


def test_cond_becomes_torch_cond_with_local_functions():
    graph, build, x = _start()
    branches = []
    for op in ("relu", "tanh"):
        region = Graph(name=op)
        inner = Builder(region)
        region.outputs = [inner(op, inner.input("y", (2, 6), torch.float32))]
        branches.append(region)
    test = build.gt(build.sum(x, dims=(0, 1)), 0.0)
    graph.outputs = [build("cond", test, x, regions=branches, results=[((2, 6), torch.float32)])]
    module = to_torch(graph)
    assert "torch.cond(" in source_of(module)
    for sign in (1, -1):
        inputs = [torch.rand(2, 6) * sign]
        torch.testing.assert_close(module(*inputs), run(graph, inputs)[0])


def test_onnx_call_is_refused_by_name():
    graph, build, x = _start()
    graph.outputs = [
        build("onnx_call", x, name="strange", **_onnx_call_attributes(), results=[((2, 6), torch.float32)])
    ]
    with pytest.raises(EmitError, match="strange"):
        to_torch(graph)


def _onnx_call_attributes():
    from regauge.ir.operator import get_operator

    return {
        name: "" for name, default in get_operator("onnx_call").attributes.items() if default is inspect.Parameter.empty
    }


def _small() -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    graph, build, x = _start()
    h = build.relu(_linear(build, "up", x, 8))
    graph.outputs = [_linear(build, "down", h, 3)]
    return graph, torch.randn(2, 6)


def test_the_module_owns_its_tensors():
    graph, _ = _small()
    module = to_torch(graph)
    with torch.no_grad():
        module.up.weight.zero_()
    assert graph.parameters["up.weight"].tensor.abs().sum() > 0


def test_a_cut_graph_is_emitted_in_its_new_sizes():
    graph, x = _small()
    dim = next(group.dim for group in graph.groups() if group.free)
    module = to_torch(resize(graph, {dim: [0, 2, 5]}))
    assert module.up.weight.shape == (3, 6) and module.down.in_features == 3
    assert module(x).shape == (2, 3)


def test_gradients_flow():
    graph, x = _small()
    module = to_torch(graph)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_copies_and_pickles_compute_the_same():
    graph, x = _small()
    module = to_torch(graph)
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), module(x))


def test_another_process_can_load_it(tmp_path):
    graph, x = _small()
    module = to_torch(graph)
    torch.save((module, x, module(x)), tmp_path / "module.pt")
    program = (
        "import torch\n"
        f"module, x, y = torch.load({str(tmp_path / 'module.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(module(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_source_can_be_inspected():
    graph, _ = _small()
    module = to_torch(graph)
    assert inspect.getsource(type(module)).startswith("class Net(nn.Module):")
    assert "self.up(x)" in inspect.getsource(module.forward)


def test_the_same_graph_gives_the_same_class():
    graph, _ = _small()
    assert type(to_torch(graph)) is type(to_torch(graph))


def test_written_folder_runs_without_regauge(tmp_path):
    graph, x = _small()
    folder = write(graph, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["model.py", "model.safetensors"]
    torch.save((x, to_torch(graph)(x)), tmp_path / "io.pt")
    program = (
        "import sys, torch\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "import model\n"
        "assert not [name for name in sys.modules if name.startswith('regauge')]\n"
        f"x, y = torch.load({str(tmp_path / 'io.pt')!r})\n"
        "torch.testing.assert_close(model.load()(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_is_written_when_it_fails(tmp_path):
    graph, build, x = _start()
    graph.outputs = [build("onnx_call", x, **_onnx_call_attributes(), results=[((2, 6), torch.float32)])]
    with pytest.raises(EmitError):
        write(graph, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_source_is_clean(tmp_path):
    pytest.importorskip("ruff")
    graph, _ = _small()
    (tmp_path / "model.py").write_text(emit(graph).source)
    subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(tmp_path)], check=True)
