"""What torch's exporter knows of operators is kept between exports, and forgotten when there is more to know."""

from pathlib import Path

import onnx
import pytest
import torch
from torch.export import exported_program
from torch.onnx._internal.exporter import _registration

import regauge
from regauge.backends.onnx_model.registry import kept_registry


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + x


def operators(graph: regauge.Graph, path: Path) -> list[str]:
    graph.to_onnx(path)
    return [node.op_type for node in onnx.load(path).graph.node]


def test_translations_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = regauge.capture(Doubled(), (torch.randn(2, 3),))
    first = operators(graph, tmp_path / "first.onnx")
    read = _registration.onnxscript_apis.get_torchlib_ops
    calls = []
    monkeypatch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", lambda: [calls.append(1), *read()][1:])
    assert operators(graph, tmp_path / "second.onnx") == first == ["Relu", "Add"]
    assert not calls
    with torch.library._scoped_library("regauge_test_registry", "DEF") as library:
        library.define("more(Tensor x) -> Tensor")  # an operator that a translation may be waiting for
        assert operators(graph, tmp_path / "third.onnx") == first
    assert calls == [1]


def test_what_one_export_adds_no_other_sees() -> None:
    target = torch.ops.aten.relu.default
    with kept_registry():
        first = _registration.ONNXRegistry.from_torchlib(opset_version=20)
        known = len(first.get_decomps(target))
        first.register_op(target, lambda x: x)
        again = _registration.ONNXRegistry.from_torchlib(opset_version=20)
        assert len(first.get_decomps(target)) == known + 1
        assert (len(again.get_decomps(target)), again.opset_version) == (known, 20)
    plain = _registration.ONNXRegistry.from_torchlib(opset_version=20)
    assert {name: len(found) for name, found in plain.functions.items()} == {
        name: len(found) for name, found in again.functions.items()
    }


def test_operators_composed_of_others_are_listed_once_until_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    collect = exported_program._collect_all_valid_cia_ops
    monkeypatch.setattr(exported_program, "_collect_all_valid_cia_ops", lambda: [asked.append(1), collect()][1])
    with kept_registry(), torch.library._scoped_library("regauge_test_composed", "FRAGMENT") as library:
        listed = exported_program._collect_all_valid_cia_ops
        first = listed()
        asked.clear()
        assert listed() == first == collect() and not asked
        library.define("composed(Tensor x) -> Tensor")
        assert listed() == first
        library.impl("composed", lambda x: x + x, "CompositeImplicitAutograd")
        assert listed() - first == {torch.ops.regauge_test_composed.composed.default}
