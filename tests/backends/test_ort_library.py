"""The library of onnxruntime operators: it loads, and without a driver models run by the bodies of their functions."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from decoder_block import decoder_block
from regauge.backends import ort_library
from regauge.backends.ort_library import build_library, manifest, missing
from regauge.backends.triton_kernels.files import Written, write_kernels
from regauge.backends.triton_kernels.kernel import numbers
from regauge.backends.triton_kernels.loops import strides_of
from regauge.cli import main
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import symbol

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
buildable = pytest.mark.skipif(bool(missing()) or not HAS_TRITON, reason=missing() or "Triton is not installed")
COLUMNS = 48


def gated_softmax() -> Graph:
    """softmax(silu(x) * y) over 48 columns, for any number of rows."""
    rows = symbol("rows")
    graph = Graph("g", symbols={rows: (1, None)})
    build = Builder(graph)
    x, y = (build.input(name, (rows, COLUMNS), torch.float32) for name in "xy")
    graph.outputs = [build.softmax(build.mul(build.silu(x), y), dim=1)]
    return graph


def model_of(name: str, path: Path, last: str = "Softmax") -> Path:
    """A call of a function of that name, whose body computes the same, where its last node is a Softmax."""
    body = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["silu"]),
        helper.make_node("Mul", ["silu", "y"], ["gated"]),
        helper.make_node(last, ["gated"], ["z"], **({"axis": 1} if last == "Softmax" else {})),
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("regauge.kernels", 1)]
    function = helper.make_function("regauge.kernels", name, ["x", "y"], ["z"], body, opsets[:1])
    values = [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["rows", COLUMNS]) for value in "xyz"]
    call = helper.make_node(name, ["x", "y"], ["z"], domain="regauge.kernels")
    graph = helper.make_graph([call], "g", values[:2], values[2:])
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("kernels")
    (one,) = write_kernels(gated_softmax(), folder, ["sm_90"], {symbol("rows"): 4096})
    return one


@pytest.fixture(scope="module")
def library(written: Written) -> Path:
    return build_library(written.path.parent, [written])[0]


def run(model: Path, library: Path, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x, "y": y})
    return np.asarray(found)


@buildable
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_body_runs(written: Written, library: Path, tmp_path: Path) -> None:
    model = model_of(written.operator.name, tmp_path / "model.onnx")
    x, y = np.random.default_rng(0).standard_normal((2, 7, COLUMNS), dtype=np.float32)
    expected = torch.softmax(torch.nn.functional.silu(torch.from_numpy(x)) * torch.from_numpy(y), 1)
    np.testing.assert_allclose(run(model, library, x, y), expected.numpy(), rtol=1e-5, atol=1e-6)


@buildable
def test_a_driver_is_given_what_python_would_give_it(written: Written, library: Path, tmp_path: Path) -> None:
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", str(HERE / "fake_driver.cc"), "-o", str(driver)], check=True)
    model = model_of(written.operator.name, tmp_path / "model.onnx")
    passed = [argument for argument in written.build.arguments if argument.fixed is None]
    letters = "".join({"*": "p", "i32": "i", "i64": "l"}[a.type if a.type[0] == "i" else "*"] for a in passed)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "REGAUGE_ORT_PROVIDER": "CPUExecutionProvider",
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_ARGUMENTS": letters,
    }
    script = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "options = ort.SessionOptions(); options.register_custom_ops_library(sys.argv[2])\n"
        "session = ort.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        f"x = np.ones((100, {COLUMNS}), np.float32)\n"
        "print(session.run(None, {'x': x, 'y': x})[0][0, 0])\n"
    )
    command = [sys.executable, "-c", script, str(model), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 42  # the fake one's result, and not the body's
    build = written.build
    source, tensor = build.source, torch.empty(100, COLUMNS)
    region = written.operator.kernel.region
    sizes = dict(zip(region.loops, (100, COLUMNS), strict=True))
    steps = {one: strides_of(one, tensor, sizes) for one in source.tensors}
    given = numbers(source, sizes, [], steps)
    behind = build.arguments[len(source.tensors) :]
    expected = [number for number, argument in zip(given, behind, strict=True) if argument.fixed is None]
    programs = -(-100 // build.launch.constants["ROWS"])
    head = [source.name, programs, 1, 1, 32 * build.launch.warps, written.metadata["shared"], 0]
    assert (tmp_path / "log").read_text().split() == [str(word) for word in (*head, *expected, 1)]


@buildable
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_kernel_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the CPU provider, on copies: whether onnxruntime was built for the GPU or not."""
    monkeypatch.setenv("REGAUGE_ORT_PROVIDER", "CPUExecutionProvider")
    found = write_kernels(gated_softmax(), tmp_path, ["sm_80", "sm_90"], {symbol("rows"): 4096})
    model = model_of(found[0].operator.name, tmp_path / "model.onnx", last="Neg")  # so that it is not the body's
    x, y = np.random.default_rng(0).standard_normal((2, 100, COLUMNS), dtype=np.float32)
    expected = torch.softmax(torch.nn.functional.silu(torch.from_numpy(x)) * torch.from_numpy(y), 1)
    np.testing.assert_allclose(
        run(model, build_library(tmp_path, found)[0], x, y), expected.numpy(), rtol=1e-4, atol=1e-6
    )


@needs_triton
def test_kernels_that_read_elsewhere_are_left_to_their_bodies(tmp_path: Path) -> None:
    found = write_kernels(decoder_block(tokens=64, width=64, heads=2, hidden=96), tmp_path, ["sm_90"])
    lines, left = manifest(found)
    assert [line.split()[2].rpartition("_")[0] for line in lines.splitlines() if line.startswith("kernel ")] == [
        "add_rms_norm",
        "silu_mul",
    ]
    (reason,) = left
    assert re.fullmatch("neg_concat_mul_add_matmul_softmax_.* reads at places of its own.*", reason)


@needs_triton
def test_open_sizes_are_passed_and_follow_from_shapes(written: Written) -> None:
    by_name = {argument.name: argument for argument in written.build.arguments}
    assert by_name["size_i0"].type == "i64" and not by_name["size_i0"].divisible
    assert by_name["size_r0"].divisible and by_name["x_r0"].fixed == 1
    lines = manifest([written])[0].splitlines()
    assert lines[0] == f"kernel 90 {written.operator.name}" and "size a 1 0 0" in lines and "size n 48" in lines
    assert lines.count("read 1 4 2 1 0 1 1") == 2 and lines[-1].startswith("grid ")


@needs_triton
def test_what_is_missing_is_told(
    written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort_library, "INCLUDES", ())
    monkeypatch.delenv("CPLUS_INCLUDE_PATH", raising=False)
    with pytest.raises(FusionError, match="cannot be built: there is no .*: install libonnxruntime-dev"):
        build_library(tmp_path, [written])
    assert main(["kernels", "model.onnx", "-o", str(tmp_path), "--library"]) == 2
    assert "--library: there is no onnxruntime_c_api.h" in capsys.readouterr().err
    monkeypatch.setattr(ort_library.shutil, "which", lambda _: None)
    assert missing() == "there is no g++" and not list(tmp_path.iterdir())


@needs_triton
def test_what_the_compiler_says_is_told(written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime_c_api.h").write_text("#error this is no header\n")
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", str(tmp_path))
    with pytest.raises(FusionError, match="operators cannot be built: "):
        build_library(tmp_path, [written])
