"""Bad input: each gives one line on stderr that says what to do, exit status 2, and no output file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import regauge
from regauge.cli import main

MANY = 100_000


def gemm(name: str, x: str, y: str, weight: str) -> onnx.NodeProto:
    return helper.make_node("Gemm", [x, weight], [y], name=name, transB=1)


def model(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph(nodes, "net", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def weight(name: str = "w", rows: int = 4, columns: int = 4) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32), name)


def good() -> onnx.ModelProto:
    return model([gemm("first", "x", "h", "w"), gemm("second", "h", "y", "v")], [weight("w", 8), weight("v", 4, 8)])


def truncated(path: Path) -> None:
    onnx.save(good(), path)
    path.write_bytes(path.read_bytes()[:-100])


def text_file(path: Path) -> None:
    path.write_text("this is not a model")


def missing_external_data(path: Path) -> None:
    onnx.save(good(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (path.parent / "weights.bin").unlink()


def escaping_external_data(path: Path) -> None:
    onnx.save(good(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    loaded = onnx.load(path, load_external_data=False)
    for tensor in loaded.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    path.write_bytes(loaded.SerializeToString())


def cycle(path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
        helper.make_node("Relu", ["b"], ["y"], name="third"),
    ]
    path.write_bytes(model(nodes, []).SerializeToString())


def duplicate_names(path: Path) -> None:
    nodes = [gemm("first", "x", "y", "w"), gemm("second", "x", "y", "w")]
    path.write_bytes(model(nodes, [weight()]).SerializeToString())


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "bad.onnx"),
    "text file": (text_file, "bad.onnx"),
    "missing external data": (missing_external_data, "weights.bin"),
    "external data outside the folder": (escaping_external_data, "weights.bin"),
    "cycle": (cycle, "cycle"),
    "duplicate names": (duplicate_names, "y"),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    status = main(arguments)
    return status, [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]


@pytest.mark.parametrize("fault", FILES)
def test_a_bad_file_is_refused(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, named = FILES[fault]
    write(tmp_path / "bad.onnx")
    before = (tmp_path / "bad.onnx").read_bytes()
    output = tmp_path / "out.onnx"
    status, lines = run(
        capsys, "optimize", str(tmp_path / "bad.onnx"), "-o", str(output), "--passes", "prune{ratio=0.5}"
    )
    assert status == 2 and len(lines) == 1, lines
    assert named in lines[0]
    assert not output.exists() and list(tmp_path.glob("out*")) == []
    assert (tmp_path / "bad.onnx").read_bytes() == before


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = run(capsys, "inspect", str(tmp_path / "absent.onnx"))
    assert status == 2 and len(lines) == 1 and "absent.onnx" in lines[0]


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ("prune{ration=0.5}", "ratio"),
        ("prun{ratio=0.5}", "prune"),
        ("prune{ratio=1.5}", "ratio"),
        ("prune{ratio=-1}", "ratio"),
        ("prune{ratio=half}", "ratio"),
        ("prune{ratio=0.5,macs=0.5}", "a ratio, or budgets"),
        ("prune{ratio=0.5,score=magic}", "score"),
    ],
)
def test_wrong_options_are_refused(passes: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(good(), tmp_path / "good.onnx")
    output = tmp_path / "out.onnx"
    status, lines = run(capsys, "optimize", str(tmp_path / "good.onnx"), "-o", str(output), "--passes", passes)
    assert status == 2 and len(lines) == 1 and says in lines[0], lines
    assert not output.exists()


def test_an_unknown_dim_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(good(), tmp_path / "good.onnx")
    for command in (
        ["explain", str(tmp_path / "good.onnx"), "w:7"],
        ["groups", str(tmp_path / "good.onnx"), "--of", "z:0"],
    ):
        status, lines = run(capsys, *command)
        assert status == 2 and len(lines) == 1 and command[-1] in lines[0], lines


def test_an_output_folder_that_is_absent_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(good(), tmp_path / "good.onnx")
    output = tmp_path / "absent" / "out.onnx"
    status, lines = run(
        capsys, "optimize", str(tmp_path / "good.onnx"), "-o", str(output), "--passes", "prune{ratio=0.5}"
    )
    assert status == 2 and len(lines) == 1 and "absent" in lines[0], lines


@pytest.mark.sweep
def test_a_hundred_thousand_nodes_are_read_and_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [gemm("first", "x", "h0", "w")]
    nodes += [helper.make_node("Relu", [f"h{i}"], [f"h{i + 1}"], name=f"relu{i}") for i in range(MANY)]
    nodes += [gemm("last", f"h{MANY}", "y", "v")]
    onnx.save(model(nodes, [weight("w", 8), weight("v", 4, 8)]), tmp_path / "long.onnx")
    status, lines = run(
        capsys,
        "optimize",
        str(tmp_path / "long.onnx"),
        "-o",
        str(tmp_path / "out.onnx"),
        "--passes",
        "prune{ratio=0.5}",
    )
    assert status == 0, lines
    kept = onnx.load(tmp_path / "out.onnx")
    assert {i.name: list(i.dims) for i in kept.graph.initializer} == {"w": [4, 4], "v": [4, 4]}


def test_names_that_no_input_has_are_told() -> None:
    graph = regauge.capture(torch.nn.Linear(3, 2), (torch.randn(2, 3),))
    with pytest.raises(regauge.RegaugeError, match="no value is given for the graph input 'input', but for x"):
        graph.run({"x": torch.randn(2, 3)})
