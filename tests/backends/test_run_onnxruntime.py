"""Sessions take any form of a model, and say in one line what is wrong."""

from pathlib import Path

import onnx.parser
import onnx_ir
import pytest
import torch

from onnx_models import PERCEPTRON, PERCEPTRON_WEIGHTS, model_of, save
from regauge.backends.run_onnxruntime import Session, latency
from regauge.ir.errors import RegaugeError

MODEL = model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)
INPUTS = {"x": torch.ones(2, 6), "unused": torch.zeros(2)}


def test_every_form_of_a_model_gives_the_same(tmp_path: Path) -> None:
    path = save(MODEL, tmp_path / "m.onnx")
    forms = [path, str(path), path.read_bytes(), MODEL, onnx_ir.from_proto(MODEL)]
    results = [Session(form, optimisation="off").run(INPUTS) for form in forms]
    for result in results:
        torch.testing.assert_close(result, results[0])
    (y,) = results[0]
    assert y.shape == (2, 3)
    torch.testing.assert_close(Session(path).run(list(INPUTS.values())), results[0])


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    session = Session(MODEL)
    cases = [
        (lambda: Session(tmp_path / "nothing.onnx"), "there is no file"),
        (lambda: Session(b"nonsense"), "onnxruntime cannot load the model"),
        (lambda: Session(3), "int is no ONNX model"),
        (lambda: Session(MODEL, optimisation="some"), "say 'off' or 'all'"),  # type: ignore[arg-type]
        (lambda: session.run([torch.ones(2, 6)]), "takes 2 inputs"),
        (lambda: session.run({"x": torch.ones(2, 6)}), "inputs differ in 'unused'"),
        (lambda: session.run([torch.ones(2, 7), torch.zeros(2)]), "onnxruntime failed on inputs"),
    ]
    for call, message in cases:
        with pytest.raises(RegaugeError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_latency_is_a_median_per_session() -> None:
    sessions = {"off": Session(MODEL, optimisation="off", threads=1), "all": Session(MODEL, threads=1)}
    found = latency(sessions, INPUTS, repeats=5, warmup=1)
    assert set(found) == {"off", "all"} and all(0 < value < 1000 for value in found.values())


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_types_that_numpy_lacks_go_in_and_come_out(kind: str) -> None:
    dtype, name = getattr(torch, kind), kind.replace("float8_e", "float8e")
    text = f"""
    <ir_version: 9, opset_import: ["" : 19]>
    short ({name}[3] x) => (float[3] y, {name}[3] z) {{ y = Cast <to = 1> (x) z = CastLike (y, x) }}
    """
    x = torch.tensor([1.0, -2.0, 0.5]).to(dtype)
    y, z = Session(onnx.parser.parse_model(text)).run([x])
    assert y.tolist() == [1.0, -2.0, 0.5]
    assert z.dtype == dtype and z.float().tolist() == y.tolist()
