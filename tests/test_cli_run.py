"""``regauge run``: what it computes, shows and saves, and how it fails."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import regauge
from regauge.cli import main
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import symbol


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with one fused region and dynamic rows."""
    rows = symbol("rows")
    graph = Graph("gate", symbols={rows: (2, None)})
    build = Builder(graph)
    torch.manual_seed(0)
    x = build.input("x", (rows, 16), torch.float32)
    gate, up = (build.linear(x, build.parameter(name, torch.randn(8, 16))) for name in ("gate", "up"))
    graph.outputs = [build.mul(build.silu(gate), up), build.argmax(gate, dim=1)]
    path = tmp_path_factory.mktemp("run") / "gate.onnx"
    regauge.optimize(graph, "fuse").to_onnx(path, functions=True)
    return path


def run(*arguments: object) -> int:
    return main(["run", *(str(argument) for argument in arguments)])


def test_results_are_shown_and_saved(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    for options in ([], ["--kernels"]):
        assert run(file, "--inputs", tmp_path / "x.npz", "-o", tmp_path / "out.npz", *options) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[1:3] for line in shown[1:3]] == [["f32", "5x8"], ["i64", "5"]]
        assert shown[-1] == f"wrote {tmp_path / 'out.npz'}"
        found = np.load(tmp_path / "out.npz")
        for name, wanted in zip(found.files, regauge.load(file).run(torch.from_numpy(x)), strict=True):
            np.testing.assert_allclose(found[name], wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_optimize_writes_functions_where_asked(file: Path, tmp_path: Path) -> None:
    for options, count in (([], 0), (["--functions"], 1)):
        arguments = ["optimize", str(file), "-o", str(tmp_path / "out.onnx"), "--passes", "unfuse,fuse", *options]
        assert main(arguments) == 0
        assert len(onnx.load(tmp_path / "out.onnx").functions) == count


def test_inputs_may_be_made_up(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(file) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "inputs were made up: give --inputs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "moon"], "there is no device 'moon': give cpu or cuda"),
        (["--device", "cuda:99"], f"torch sees {torch.cuda.device_count()} CUDA devices here, not 'cuda:99'"),
        (["-o", "results.txt"], "results.txt would be a .txt file: give it the suffix .npz"),
        (["-o", "results"], "results would be a file without a suffix: give it the suffix .npz"),
        (["-o", "none/results.npz"], "cannot write none/results.npz: the folder none does not exist, make it first"),
        (["--inputs", "none.npz"], "there is no file none.npz"),
    ],
)
def test_mistakes_are_told_in_one_line(
    file: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(file, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"regauge: {message}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_results_are_the_same(file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((5, 16), np.float32))
    for device, name in (("cpu", "a.npz"), ("cuda", "b.npz")):
        assert run(file, "--device", device, "--kernels", "--inputs", tmp_path / "x.npz", "-o", tmp_path / name) == 0
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    for key in a.files:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-3)
