"""Models in a newer opset: what ``load(opset=...)`` converts, proves and refuses."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import version_converter

import regauge
from onnx_models import model_of, save
from regauge.backends.onnx_model.audit import kernels_of
from regauge.cli import main
from regauge.ir.errors import LoadError

OLD = """
<ir_version: 8, opset_import: ["" : 11], producer_name: "somebody", doc_string: "a model">
old (float[batch, 6, 4] x) => (float[batch, 6] y) {
  a = ReduceSum <axes = [2], keepdims = 1> (x)
  b = Squeeze <axes = [2]> (a)
  [hidden] e = Gemm (b, w1, b1)
  f = Relu (e)
  s = Softmax <axis = 0> (f)
  y = Gemm (s, w2, b2)
}
"""
WEIGHTS = {"w1": (6, 320), "b1": (320,), "w2": (320, 6), "b2": (6,)}
PERCEPTRON = """
<ir_version: 8, opset_import: ["" : 17]>
perceptron (float[3, 64] x) => (float[3, 8] y) {
  h = Gemm <transB = 1> (x, w1, b1)
  r = Relu (h)
  y = Gemm <transB = 1> (r, w2, b2)
}
"""
PERCEPTRON_WEIGHTS = {"w1": (32, 64), "b1": (32,), "w2": (8, 32), "b2": (8,)}


@pytest.mark.parametrize("external", [False, True])
def test_operators_are_spelled_as_the_opset_has_them(tmp_path: Path, external: bool) -> None:
    """Axes become inputs, and a Softmax over all axes from one on becomes one between two reshapes."""
    source = save(model_of(OLD, WEIGHTS), tmp_path / "old.onnx", save_as_external_data=external, size_threshold=0)
    regauge.load(source, opset=21).to_onnx(tmp_path / "new.onnx")
    before, after = onnx.load(source), onnx.load(tmp_path / "new.onnx")
    assert {o.domain: o.version for o in after.opset_import} == {"": 21} and after.ir_version == 10
    assert (after.producer_name, after.doc_string) == ("somebody", "a model")
    assert [i.name for i in after.graph.initializer][:4] == [i.name for i in before.graph.initializer]
    assert "hidden" in {node.name for node in after.graph.node}
    assert [i.name for i in after.graph.input] == ["x"]
    assert regauge.compare(source, tmp_path / "new.onnx").equal(1e-6)
    assert (tmp_path / "new.onnx.data").exists() == external


def test_weights_of_four_bits_in_a_file_of_an_older_opset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the option, and with it both layers are read by the kernel for blocks, a clamp behind one."""
    source, small = save(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS), tmp_path / "m.onnx"), tmp_path / "small.onnx"
    command = ["optimize", str(source), "-o", str(small), "--passes", "quantize{scheme=w4}"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "needs opset 21, and the model has 17: load it with opset=21, or --opset 21" in line
    assert main([*command, "--opset", "21"]) == 0
    assert kernels_of(small)[0]["MatMulNBits"] == 2


def test_the_same_opset_is_no_conversion(tmp_path: Path) -> None:
    source = save(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS), tmp_path / "m.onnx")
    regauge.load(source, opset=17).to_onnx(tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx").read_bytes() == source.read_bytes()


def test_an_older_opset_is_refused(tmp_path: Path) -> None:
    source = save(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS), tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="has opset 17, and models are converted to newer ones only, not to 13"):
        regauge.load(source, opset=13)


def test_a_conversion_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, opset: int) -> Any:
        converted = convert(model, opset)
        converted.graph.node[1].op_type = "Tanh"
        return converted

    convert = version_converter.convert_version
    monkeypatch.setattr(version_converter, "convert_version", wrong)
    with pytest.raises(LoadError, match="in opset 21, as onnx converts it, it computes something else"):
        regauge.load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS), opset=21)


def test_a_program_of_torch_has_no_opset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.pt2").write_bytes(b"")
    assert main(["optimize", str(tmp_path / "m.pt2"), "-o", str(tmp_path / "m.onnx"), "--opset", "21"]) == 2
    assert "leave --opset out" in capsys.readouterr().err
