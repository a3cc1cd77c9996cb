"""``regauge simplify``: what it prints, what it checks before it writes, and how it fails."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import regauge.backends.onnx_model.emit
from onnx_simplified import normal, operators, padded_network, parsed, props
from regauge.backends.onnx_model.proof import Proof
from regauge.backends.run_onnxruntime import Inputs, Optimisation, Session
from regauge.cli import main
from regauge.frontends.from_onnx import load
from regauge.ir.errors import EmitError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    onnx.save(padded_network(idle=True), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def table(shown: str) -> dict[str, tuple[int, int]]:
    rows = [line.split() for line in shown.splitlines()]
    return {row[0]: (int(row[1]), int(row[2])) for row in rows if row and row[0] in ("nodes", "bytes", "MACs")}


def test_it_writes_a_smaller_model_and_says_what_it_did(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("small.onnx")
    assert run("simplify", source, "-o", target) == 0
    shown = capsys.readouterr().out
    found = table(shown)
    assert found["nodes"] == (5, 3) and found["MACs"] == (8 * 8 * 9 * 3 * 4,) * 2
    assert found["bytes"] == (source.stat().st_size, target.stat().st_size)
    assert "batch-norm-into-weights: 1" in shown and "left alone" not in shown
    assert operators(onnx.load(target)) == {"Add": 1, "Conv": 1, "Relu": 1}


def test_near_misses_are_told_on_request(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simplify", source, "-o", source.with_name("small.onnx"), "--explain") == 0
    assert "scale-or-shift-before-map: a shift is not moved through zero padding" in capsys.readouterr().out


def test_rules_are_chosen_by_name(source: Path) -> None:
    target = source.with_name("small.onnx")
    assert run("simplify", source, "-o", target, "--skip", "affine,branches", "--skip", "chains") == 0
    assert operators(onnx.load(target)) == {"Add": 1, "Conv": 1, "BatchNormalization": 1, "Relu": 1}
    assert run("simplify", source, "-o", target, "--only", "batch-norm-into-weights") == 0
    assert operators(onnx.load(target)) == {"Add": 1, "Conv": 1, "Identity": 1, "Relu": 1}


def test_nothing_to_simplify(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once, twice = source.with_name("once.onnx"), source.with_name("twice.onnx")
    run("simplify", source, "-o", once)
    capsys.readouterr()
    assert run("simplify", once, "-o", twice) == 0
    assert capsys.readouterr().out.splitlines()[0] == "nothing to simplify"
    assert twice.read_bytes() == once.read_bytes()


def test_overridable_initializers_are_frozen_on_request(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[n, 4] x, float[4] scale) => (float[n, 3] y) { s = Mul (x, scale)  y = MatMul (s, w) }
    """
    onnx.save(parsed(text, scale=normal(4), w=normal(4, 3)), tmp_path / "m.onnx")
    for option, count in ((), 2), (("--freeze",), 1):
        assert run("simplify", tmp_path / "m.onnx", "-o", tmp_path / "small.onnx", *option) == 0
        assert operators(onnx.load(tmp_path / "small.onnx")).total() == count
    assert "frozen: scale" in props(onnx.load(tmp_path / "small.onnx"))["regauge.notes"]


def test_it_is_checked_on_data_where_data_is_given(source: Path) -> None:
    good, bad, target = (source.with_name(name) for name in ("good.npz", "bad.npz", "small.onnx"))
    np.savez(good, x=normal(2, 3, 8, 8))
    np.savez(bad, pixels=normal(2, 3, 8, 8))
    assert run("simplify", source, "-o", target, "--data", bad) == 2 and not target.exists()
    assert run("simplify", source, "-o", target, "--data", good) == 0 and target.exists()


def test_a_file_that_computes_something_else_is_not_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = regauge.backends.onnx_model.emit.fold_known

    def spoiled(graph: object, carrier: object, contents: object) -> None:
        real(graph, carrier, contents)  # type: ignore[arg-type]
        value = carrier.model.graph.initializers["shift"]  # type: ignore[attr-defined]
        value.const_value = type(value.const_value)(numpy_helper.from_array(2 * normal(3, 1, 1), "shift"))

    monkeypatch.setattr(regauge.backends.onnx_model.emit, "fold_known", spoiled)
    target = source.with_name("small.onnx")
    target.write_bytes(b"precious")
    assert run("simplify", source, "-o", target) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "computes something else: y is off by" in error
    assert target.read_bytes() == b"precious" and sorted(p.name for p in source.parent.iterdir()) == [
        "m.onnx",
        "small.onnx",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("m.pt2", "-o", "out.onnx"), "m.pt2 is no ONNX file: regauge optimize --passes simplify takes programs"),
        (("m.onnx", "-o", "out"), "out would be no ONNX file: name an .onnx file"),
        (("m.onnx", "-o", "out.onnx", "--skip", "mergin"), "did you mean 'merging'"),
        (("absent.onnx", "-o", "out.onnx"), "there is no file absent.onnx"),
    ],
)
def test_errors(
    arguments: tuple[str, ...],
    says: str,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(source.parent)
    assert run("simplify", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("regauge: ") and says in error and len(error.splitlines()) == 1
    assert [path.name for path in source.parent.iterdir()] == ["m.onnx"]


QUANTIZED = """
<ir_version: 8, opset_import: ["" : 17]>
quantized (float[n, 4] x) => (float[n, 4] y) {
  s = Mul (x, f)
  q = QuantizeLinear (s, scale, zero)
  y = DequantizeLinear (q, scale, zero)
}
"""


@pytest.mark.parametrize(("shift", "steps"), [(0.0, None), (0.6, None), (2.6, "[23]")])
def test_quantized_outputs_are_compared_in_steps_of_their_scale(
    shift: float, steps: str | None, tmp_path: Path
) -> None:
    """A shift by half a step moves some values to the next one; a larger one moves them by more, and is refused."""
    scale = np.float32(0.5)
    given = {"x": np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)}
    for name, offset in (("old", 0.0), ("new", shift)):
        model = parsed(QUANTIZED.replace("Mul", "Add"), f=np.float32(offset * scale), scale=scale, zero=np.int8(0))
        onnx.save(model, tmp_path / f"{name}.onnx")
    proof = Proof(tmp_path / "old.onnx", load(tmp_path / "old.onnx"), [given])
    if steps is None:
        proof(tmp_path / "new.onnx")
    else:
        with pytest.raises(EmitError, match=f"y is off by {steps} steps"):
            proof(tmp_path / "new.onnx")


def test_the_checker_is_asked_where_the_original_passes_it(source: Path) -> None:
    broken = onnx.load(source)
    broken.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(broken, source.with_name("broken.onnx"))
    with pytest.raises(EmitError, match="does not pass the onnx checker"):
        Proof(source, load(source))(source.with_name("broken.onnx"))


def test_what_onnxruntime_does_not_have_is_written_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "elsewhere" : 1]>
    net (float[2, 4] x) => (float[2, 4] y) { i = Identity (x)  y = elsewhere.Own (i) }
    """
    onnx.save(parsed(text), tmp_path / "m.onnx")
    assert run("simplify", tmp_path / "m.onnx", "-o", tmp_path / "small.onnx") == 0
    assert "was not compared with the original: onnxruntime runs it on no inputs" in capsys.readouterr().err
    assert operators(onnx.load(tmp_path / "small.onnx")) == {"Own": 1}


class Shifted(Session):
    """A session whose results are off where the file of this name runs with optimisations."""

    opened: ClassVar[list[tuple[str, str]]] = []
    shifts: ClassVar[dict[str, float]] = {}

    def __init__(self, model: Path, *, optimisation: Optimisation, spin: bool = True) -> None:
        super().__init__(model, optimisation=optimisation, spin=spin)
        self.opened.append((model.stem, optimisation))
        self.shift = self.shifts.get(model.stem, 0.0) if optimisation == "all" else 0.0

    def run(self, inputs: Inputs) -> list[Any]:
        return [result + self.shift for result in super().run(inputs)]


@pytest.mark.parametrize(
    ("shifts", "refused", "opened"),
    [
        ({}, False, [("m", "off"), ("new", "off"), ("new", "all")]),
        ({"m": 1.0, "new": 1.0}, False, [("m", "off"), ("new", "off"), ("new", "all"), ("m", "all")]),
        ({"new": 1.0}, True, [("m", "off"), ("new", "off"), ("new", "all"), ("m", "all")]),
    ],
)
def test_the_original_is_optimised_only_where_the_optimised_file_differs(
    shifts: dict[str, float],
    refused: bool,
    opened: list[tuple[str, str]],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("regauge.backends.onnx_model.proof.Session", Shifted)
    monkeypatch.setattr(Shifted, "opened", [])
    monkeypatch.setattr(Shifted, "shifts", shifts)
    new = source.with_name("new.onnx")
    new.write_bytes(source.read_bytes())
    with pytest.raises(EmitError, match="y is off by") if refused else nullcontext():
        Proof(source, load(source))(new)
    assert Shifted.opened == opened


def test_the_compiler_of_torch_is_left_alone(tmp_path: Path) -> None:
    """Lookups, products, pools, places of extremes and transposed convolutions of numbers need none of it."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (int64[2, 4] ids, float[1, 4, 8, 8] x)
        => (float[2, 4, 3] a, float[1, 2, 1, 1] b, int64[2, 4] c, int64[2, 1] d) {
      e = Gather (table, ids)
      d = ArgMax <axis = 1> (ids)
      a = MatMul (e, w)
      p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
      t = ConvTranspose <strides = [2, 2]> (p, k)
      b = GlobalAveragePool (t)
      c = GatherElements <axis = 1> (ids, places)
    }
    """
    weights = {"table": normal(9, 5), "w": normal(5, 3), "k": normal(4, 2, 2, 2)}
    onnx.save(parsed(text, **weights, places=np.zeros((2, 4), np.int64)), tmp_path / "m.onnx")
    arguments = ["simplify", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "small.onnx")]
    code = f"import sys; from regauge.cli import main; assert main({arguments!r}) == 0"
    loaded = (
        "print([name for name in sys.modules if name in ('torch._dynamo', 'torch.fx.experimental.symbolic_shapes')])"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}; {loaded}"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
