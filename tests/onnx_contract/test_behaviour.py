"""Lines 16 to 25 of the contract under ``simplify``: growth, sizes, failure, determinism, reasons, hostile input."""

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import regauge
from onnx_simplified import assert_equal_runs, normal, operators, padded_network, parsed, props, simplified
from regauge.backends.run_onnxruntime import Session
from regauge.ir.errors import EmitError, LoadError, PassError

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


# -- growth (16) -------------------------------------------------------------------------------------------------------


def test_a_fold_bomb_stays_small(tmp_path: Path) -> None:
    """Twenty-eight bytes of shape stand for 64 MiB."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    bomb (float[4] x) => (float[4096, 4096] t, float[4] y) {
      shape = Constant <value = int64[2] {4096, 4096}> ()
      ones = ConstantOfShape (shape)
      repeats = Constant <value = int64[2] {1, 1}> ()
      t = Tile (ones, repeats)
      y = Identity (x)
    }
    """
    model = parsed(text)
    small = simplified(model, tmp_path)
    assert len(small.SerializeToString()) < len(model.SerializeToString()) + 400


@pytest.mark.parametrize("name", [path.name for path in sorted(LIGHT.glob("*.onnx"))])
def test_light_models_keep_their_size_and_run(name: str, tmp_path: Path) -> None:
    """Their weights are filled tensors, which folding would write out: up to 500 MB. They are of IR version 3."""
    source = LIGHT / name
    model = onnx.load(source)
    small = simplified(model, tmp_path)
    assert len(small.graph.node) < len(model.graph.node)
    assert (tmp_path / "small.onnx").stat().st_size < 1.1 * source.stat().st_size + 4096
    Session(tmp_path / "small.onnx")


# -- sizes (18) --------------------------------------------------------------------------------------------------------

DYNAMIC = """
<ir_version: 8, opset_import: ["" : 17]>
dynamic (float[batch, time, 6] x) => (float[batch, time, 6] y, float[rows, 6] flat, float[batch, time, 6] e) {
  s = Shape (x)
  zero = Constant <value = int64 {0}> ()
  one = Constant <value = int64 {1}> ()
  axis = Constant <value = int64[1] {0}> ()
  b = Gather (s, zero)
  t = Gather (s, one)
  bt = Mul (b, t)
  b1 = Unsqueeze (b, axis)
  t1 = Unsqueeze (t, axis)
  bt1 = Unsqueeze (bt, axis)
  six = Constant <value = int64[1] {6}> ()
  rows = Concat <axis = 0> (bt1, six)
  flat = Reshape (x, rows)
  full = Concat <axis = 0> (b1, t1, six)
  h = MatMul (flat, w)
  y = Reshape (h, full)
  e = Expand (v, full)
}
"""


def test_dynamic_sizes_stay_dynamic(tmp_path: Path) -> None:
    model = parsed(DYNAMIC, w=normal(6, 6), v=normal(6))
    small = simplified(model, tmp_path)
    assert operators(small)["Reshape"] <= 2 and operators(small).total() < operators(model).total()
    feeds = [{"x": normal(b, t, 6)} for b, t in ((1, 1), (3, 5), (1, 7), (4, 1))]
    assert_equal_runs(model, small, *feeds)


# -- failure (19) ------------------------------------------------------------------------------------------------------


def test_nothing_is_written_where_the_file_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parsed(DYNAMIC, w=normal(6, 6), v=normal(6))
    before = regauge.optimize(regauge.load(model), "simplify")
    monkeypatch.setattr("regauge.backends.onnx_model.emit.fold_known", _spoil)
    with pytest.raises(EmitError, match="computes something else: y is off by"):
        before.to_onnx(tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def _spoil(graph: object, carrier: object, contents: object) -> None:
    value = carrier.model.graph.initializers["w"]  # type: ignore[attr-defined]
    value.const_value = type(value.const_value)(onnx.numpy_helper.from_array(2 * normal(6, 6), "w"))
    carrier.edits += 1  # type: ignore[attr-defined]


# -- determinism (21) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DYNAMIC])
def test_same_bytes_twice_and_a_second_run_changes_nothing(text: str, tmp_path: Path) -> None:
    model = parsed(text, w=normal(6, 6), v=normal(6))
    results = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        simplified(model, tmp_path / folder)
        results.append((tmp_path / folder / "small.onnx").read_bytes())
    assert results[0] == results[1]
    (tmp_path / "again").mkdir()
    simplified(onnx.load_from_string(results[0]), tmp_path / "again")
    assert (tmp_path / "again" / "small.onnx").read_bytes() == (tmp_path / "again" / "source.onnx").read_bytes()


# -- explanation (22, 24) ----------------------------------------------------------------------------------------------


def test_near_misses_say_why(tmp_path: Path) -> None:
    report = regauge.optimize(regauge.load(padded_network()), "simplify").report
    assert "batch-norm-into-weights: 1" in str(report)
    assert "left alone: 1 x scale-or-shift-before-map: a shift is not moved through zero padding" in str(report)
    (entry,) = report.passes
    assert entry.before.macs == entry.after.macs and entry.before.bytes > entry.after.bytes


@pytest.mark.parametrize("skip", ["batch-norm-into-weights", "affine"])
def test_rules_and_sets_of_rules_can_be_left_out(skip: str, tmp_path: Path) -> None:
    small = simplified(padded_network(), tmp_path, f"simplify{{skip=[{skip}]}}")
    assert operators(small)["BatchNormalization"] == 1


@pytest.mark.parametrize(("step", "left_over"), [("dead-code", "Exp"), ("control-flow", "If")])
def test_steps_can_be_left_out_of_the_file_too(step: str, left_over: str, tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    steps (float[2, 4] x) => (float[2, 4] y) {
      dead = Exp (x)
      yes = Constant <value = bool {1}> ()
      h = If (yes) <
        then_branch = one () => (float[2, 4] a) { a = Neg (x) },
        else_branch = two () => (float[2, 4] b) { b = Abs (x) }
      >
      s = Shape (h)
      f = Cast <to = 1> (s)
      t = ReduceMax <keepdims = 0> (f)
      y = Mul (h, t)
    }
    """
    assert left_over not in operators(simplified(parsed(text), tmp_path))
    assert left_over in operators(simplified(parsed(text), tmp_path, f"simplify{{skip=[{step}]}}"))


def test_names_of_rules_are_checked() -> None:
    with pytest.raises(PassError, match="no rule, set or step called 'dead-cod': did you mean 'dead-code'"):
        regauge.optimize(regauge.load(padded_network()), "simplify{skip=[dead-cod]}")


def test_the_file_lists_the_passes_it_went_through(tmp_path: Path) -> None:
    small = simplified(padded_network(), tmp_path, "simplify{skip=[affine]},simplify")
    assert props(small)["regauge.passes"] == "simplify"


# -- hostile input (25) ------------------------------------------------------------------------------------------------


def test_dimension_expressions_are_not_evaluated(tmp_path: Path) -> None:
    model = padded_network()
    evil = f"__import__('pathlib').Path({str(tmp_path / 'owned')!r}).touch()"
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = evil
    small = simplified(model, tmp_path)
    assert small.graph.input[0].type.tensor_type.shape.dim[0].dim_param == evil
    assert not (tmp_path / "owned").exists()


def test_deep_nesting_takes_bounded_time(tmp_path: Path) -> None:
    """Twenty constant Ifs inside one another."""
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y20"])], "g20", [], [helper.make_empty_tensor_value_info("y20")]
    )
    for depth in reversed(range(20)):
        other = helper.make_graph(
            [helper.make_node("Abs", ["x"], [f"o{depth}"])], "o", [], [helper.make_empty_tensor_value_info(f"o{depth}")]
        )
        node = helper.make_node("If", ["yes"], [f"y{depth}"], then_branch=inner, else_branch=other)
        inner = helper.make_graph([node], f"g{depth}", [], [helper.make_empty_tensor_value_info(f"y{depth}")])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    y = helper.make_tensor_value_info("y0", TensorProto.FLOAT, [3])
    yes = numpy_helper.from_array(np.array(True), "yes")
    graph = helper.make_graph(inner.node, "deep", [x], [y], [yes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    start = time.perf_counter()
    small = simplified(model, tmp_path)
    assert time.perf_counter() - start < 60
    assert operators(small) == {"Neg": 1} and small.graph.node[0].output == ["y0"]


@pytest.mark.parametrize("fault", ["cycle", "duplicate", "escape"])
def test_broken_files_are_told_before_anything_is_simplified(fault: str, tmp_path: Path) -> None:
    model = padded_network()
    if fault == "cycle":
        model.graph.node[0].input[0] = "y"
    elif fault == "duplicate":
        model.graph.node[1].output[0] = "m"
    else:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../etc/passwd")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LoadError) as error:
        regauge.optimize(regauge.load(tmp_path / "m.onnx"), "simplify")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("ops", [("Neg", "Identity"), ("Neg", "Abs", "Exp", "Relu")])
def test_a_hundred_thousand_nodes_are_simplified(ops: tuple[str, ...], tmp_path: Path) -> None:
    """A node of the first two, and one of the other four, has nothing to do."""
    count = 100_000
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    nodes = [
        helper.make_node(ops[i % len(ops)], [a], [b]) for i, (a, b) in enumerate(zip(names, names[1:], strict=False))
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "many", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    start = time.perf_counter()
    small = simplified(model, tmp_path)
    assert time.perf_counter() - start < 300
    assert len(small.graph.node) <= count * (len(ops) - 1) // len(ops) + 1


@pytest.mark.filterwarnings("ignore")
def test_a_sequence_of_computed_pieces_stays(tmp_path: Path) -> None:
    """Beside a node that goes, one that is kept as it is is not spelled anew."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    pieces (float[3, 6] x, int64[2] sizes) => (float[n, 6] y) {
      same = Identity (x)
      all = SplitToSequence <axis = 0> (same, sizes)
      zero = Constant <value = int64 {0}> ()
      y = SequenceAt (all, zero)
    }
    """
    model = parsed(text)
    small = simplified(model, tmp_path)
    assert operators(small) == {"SplitToSequence": 1, "SequenceAt": 1}


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_node_models_of_the_onnx_package_keep_their_interface(tmp_path: Path) -> None:
    """Nearly two thousand models of one or a few nodes.

    Three are refused: sizes that only the contents of an input tell, a layout of LSTM that cannot be spelled.
    """
    from onnx.backend.test.case.node import collect_testcases

    failed, count = [], 0
    for case in collect_testcases(None):
        if case.model is None:
            continue
        try:
            small = simplified(case.model, tmp_path)
        except EmitError:
            failed.append(case.name)
            continue
        except LoadError:
            continue
        count += 1
        old, new = case.model.graph, small.graph
        assert [v.SerializeToString() for v in new.input] == [v.SerializeToString() for v in old.input], case.name
        assert [v.SerializeToString() for v in new.output] == [v.SerializeToString() for v in old.output], case.name
    refused = {"test_affine_grid_2d_expanded", "test_affine_grid_2d_align_corners_expanded", "test_lstm_batchwise"}
    assert set(failed) <= refused and count > 1800
