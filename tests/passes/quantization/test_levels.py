"""Tables of numbers with scales of rows or columns: where evenly spaced codes lose, and what becomes of them."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import regauge
from regauge.backends.onnx_model.audit import kernels_of
from regauge.backends.run_onnxruntime import Session
from regauge.passes.quantization.grid import Form, Grid
from regauge.passes.quantization.levels import Levels, nearest_levels


def loss(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def fourier(length: int) -> torch.Tensor:
    """[2 frequencies, places]: cosines and sines under a window, as networks on sound begin."""
    n, k = torch.arange(length).double(), torch.arange(length // 2 + 1).double()
    waves = 2 * torch.pi * k[:, None] * n / length
    return torch.cat([waves.cos(), waves.sin()]) * torch.hann_window(length).double()


def test_a_windowed_fourier_basis_is_stored_as_it_is() -> None:
    """Beside the window, a scale of each column, it has 65 different magnitudes."""
    basis = fourier(256)
    found = Levels().rounded(basis)
    assert found.scale.shape == (1, 256) and loss(found.values, basis) < 1e-20
    assert loss(Form(Grid(8), 256).rounded(basis).values, basis) > 1e-5


def test_errors_are_half_of_those_of_even_steps() -> None:
    torch.manual_seed(0)
    normal = torch.randn(64, 512).double()
    assert loss(Levels().rounded(normal).values, normal) < 0.55 * loss(
        Form(Grid(8), 512).rounded(normal).values, normal
    )
    outliers = normal * torch.where(torch.rand(64, 512) < 0.01, 10.0, 1.0)
    even = loss(Form(Grid(8), 512).rounded(outliers).values, outliers)
    assert loss(Levels().rounded(outliers).values, outliers) < 0.25 * even
    by_column = normal * torch.logspace(-2, 1, 512).double()
    found = Levels().rounded(by_column)
    assert found.scale.shape == (1, 512) and loss(found.values, by_column) < 6e-5


def test_tables_are_no_worse_than_even_ones_and_keep_zeros() -> None:
    torch.manual_seed(0)
    values = torch.randn(4000).double() ** 3
    table = nearest_levels(values, torch.ones_like(values), 16)
    nearest = (values[:, None] - table).abs().amin(1)
    even = torch.linspace(float(values.min()), float(values.max()), 16).double()
    assert nearest.square().mean() < 0.1 * (values[:, None] - even).abs().amin(1).square().mean()
    sparse = torch.where(torch.rand(64, 128) < 0.5, 0.0, torch.randn(64, 128)).double()
    assert bool((Levels().rounded(sparse).values[sparse == 0] == 0).all())
    assert torch.equal(Levels().rounded(torch.full((8, 8), 0.3)).values, torch.full((8, 8), 0.3).double())


def _spectrum(path: Path) -> Path:
    """A convolution by a Fourier basis, one that is learned, and an LSTM."""
    random = np.random.default_rng(0)
    weights = {
        "basis": fourier(64).numpy()[:, None].astype(np.float32),
        "w": (random.standard_normal((64, 66, 3)) ** 3 / 40).astype(np.float32),
        "i": (random.standard_normal((1, 256, 64)) / 10).astype(np.float32),
        "r": (random.standard_normal((1, 256, 64)) / 10).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "basis"], ["a"], strides=[16]),
        helper.make_node("Conv", ["a", "w"], ["b"], pads=[1, 1]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[2, 0, 1]),
        helper.make_node("LSTM", ["c", "i", "r"], ["y"], hidden_size=64),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 1, 512]), ("y", None))
    )
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "sound", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8), path)
    return path


def test_what_is_made_floats_at_load_has_tables(tmp_path: Path) -> None:
    """Scales of vectors of hidden states were one for all of the recurrent weights."""
    source, target = _spectrum(tmp_path / "float.onnx"), tmp_path / "small.onnx"
    graph = regauge.load(source)
    small = regauge.optimize(graph, "quantize{scheme=w8}")
    assert sum(node.op == "codebook" for node in small.nodes) == 3  # the basis has fewer entries than are worth one
    assert {tuple(p.shape) for p in small.all_parameters() if p.dtype == torch.uint8} >= {(64, 66, 3), (1, 256, 64)}
    small.to_onnx(target)
    assert source.stat().st_size > 3.3 * target.stat().st_size
    kernels, stray = kernels_of(target)
    assert not stray and not {"Gather", "Mul", "Cast"} & set(kernels)
    x = torch.randn(1, 1, 512)
    (a,), (b,), (c,) = Session(source).run((x,)), Session(target).run((x,)), small.run((x,))
    even = regauge.optimize(graph, "quantize{scheme=w8,symmetric=true}").run((x,))[0]  # of the convolution
    assert torch.allclose(b, c, atol=1e-5) and loss(b, a) < 0.5 * loss(even, a)
    floats = regauge.optimize(small, "dequantize")
    assert torch.allclose(floats.run((x,))[0], c, atol=1e-6) and not any(n.op == "codebook" for n in floats.nodes)


def test_on_data_codes_of_tables_make_up_for_one_another() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv1d(64, 96, 3), torch.nn.Tanh(), torch.nn.Conv1d(96, 32, 3)).eval()
    mix = torch.randn(64, 8)
    data = [torch.einsum("cm,bmt->bct", mix, torch.randn(16, 8, 24)) for _ in range(4)]
    graph = regauge.capture(model, (data[0],), dynamic={0: {0: "batch"}})
    (y,) = graph.run((data[0],))
    nearest, fitted = (
        loss(regauge.optimize(graph, f"quantize{{scheme=w8{how}}}", data=data).run((data[0],))[0], y)
        for how in (",method=nearest", "")
    )
    assert fitted < 0.4 * nearest
