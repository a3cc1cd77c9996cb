"""What adversarial models showed: each was wrong, or stopped the pass, before."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import onnx_simplified
import regauge
from onnx_simplified import assert_equal_runs, normal, parsed


def simplified(model: nn.Module, *inputs: torch.Tensor) -> torch.nn.Module:
    graph = regauge.capture(model.eval(), inputs)
    return regauge.optimize(graph, "simplify").to_torch()


class _SharedHeads(nn.Module):
    """Keys and values are repeated and then laid out anew: no shared heads."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k.repeat_interleave(2, dim=1).reshape(2, 8, 3, 4)
        v = v.repeat_interleave(2, dim=1).reshape(2, 8, 3, 4)
        return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v


def test_repeated_heads_that_are_laid_out_anew_are_not_shared() -> None:
    inputs = torch.randn(2, 8, 5, 4), torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4)
    torch.testing.assert_close(simplified(_SharedHeads(), *inputs)(*inputs), _SharedHeads()(*inputs))


class _Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor([200, 3], dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) * (self.scale * 2)
        return result


def test_integers_wrap_before_they_scale() -> None:
    model, x = _Bytes(), torch.randn(4, 3)
    torch.testing.assert_close(simplified(model, x)(x), model(x))


class _Zeros(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / torch.full((6,), 0.0), x / torch.full((6,), -0.0)


def test_zeros_of_different_signs_are_not_one() -> None:
    x = torch.ones(2, 6)
    above, below = simplified(_Zeros(), x)(x)
    assert bool((above == torch.inf).all()) and bool((below == -torch.inf).all())


class _DividedByZero(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return torch.softmax((q @ q.transpose(-1, -2)) / 0.0, -1) @ q


class _HalfBound(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x, torch.tensor(-1e6))


def test_numbers_without_a_place_in_an_operator_are_refused_not_raised() -> None:
    q = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(simplified(_DividedByZero(), q)(q), _DividedByZero()(q), equal_nan=True)
    x = torch.randn(3).half()
    torch.testing.assert_close(simplified(_HalfBound(), x)(x), _HalfBound()(x))


CHAINS = [
    "{ h = Relu(x)  k = Mul(h, b)  y = Mul(k, two) }",
    "{ k = Add(x, b)  y = Add(k, two) }",
    "{ h = Relu(x)  k = Mul(h, b)  y = Mul(k, c) }",
]


@pytest.mark.parametrize("body", CHAINS)
def test_a_node_that_a_rule_built_anew_takes_the_place_of_the_old_one(body: str, tmp_path: Path) -> None:
    header = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 6] x) => (float[N, 6] y) '
    model = onnx.parser.parse_model(header + body)
    weights = {
        "b": np.array([1, 2, 3, -4, 5, 6], np.float32),
        "two": np.array(2, np.float32),
        "c": np.full(6, 3, np.float32),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items() if name in body
    )
    path = tmp_path / "simple.onnx"
    regauge.optimize(regauge.load(model), "simplify").to_onnx(path, verify=False)
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(m, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for m in (model.SerializeToString(), str(path))
    )
    np.testing.assert_allclose(after, before, rtol=1e-6)


class _Rotated(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c = x.split((1, 2, 1))
        return torch.cat([b, c, a]), b.relu()


def test_pieces_with_other_readers_are_not_cut_out_once_more() -> None:
    graph = regauge.capture(_Rotated(), (torch.randn(4, 4),))
    after = regauge.optimize(graph, "simplify")
    assert [node.op for node in after.nodes] == [node.op for node in graph.nodes]


def test_a_clip_of_numbers_is_one_in_old_opsets_too(tmp_path: Path) -> None:
    """Before opset 8, Max and Min do not broadcast."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 6, opset_import: ["" : 7]>
        g (float[2, 3] x) => (float[2, 3] y) {
            h = Transpose<perm = [1, 0]>(x)
            c = Clip<min = -0.5, max = 0.25>(h)
            y = Transpose<perm = [1, 0]>(c)
        }
        """
    )
    after = onnx.load(regauge.optimize(regauge.load(model), "simplify").to_onnx(tmp_path / "small.onnx"))
    assert [node.op_type for node in after.graph.node] == ["Clip"]


HEADER = '<ir_version: 8, opset_import: ["" : 17]> g '
BOUNDS = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2])}


def test_a_slice_that_took_the_place_of_an_equal_one_stays_while_it_is_read(tmp_path: Path) -> None:
    """Its first reader is spelled anew, and with that lost, before the reader of the other one is connected to it."""
    text = """(float[2] x) => (float[3] y) {
      a = Slice (x, zero, one, zero)  b = Slice (x, one, two, zero)  c = Slice (x, zero, one, zero)
      d = Relu (c)  y = Concat <axis = 0> (a, b, d)
    }"""
    model = parsed(HEADER + text, **BOUNDS)
    small = onnx_simplified.simplified(model, tmp_path)
    assert [node.op_type for node in small.graph.node] == ["Slice", "Relu", "Concat"]
    assert_equal_runs(model, small, {"x": normal(2)})


def test_a_node_that_took_the_place_of_an_output_stays_while_its_first_reader_goes(tmp_path: Path) -> None:
    text = """(float[2, 3] x) => (float[2, 3] y, float[3, 2] q) {
      a = Transpose <perm = [1, 0]> (x)  b = Mul (a, w)  y = Transpose <perm = [1, 0]> (b)
      q = Transpose <perm = [1, 0]> (x)
    }"""
    model = parsed(HEADER + text, w=normal(2))
    small = onnx_simplified.simplified(model, tmp_path)
    assert onnx_simplified.operators(small)["Transpose"] == 1
    assert_equal_runs(model, small, {"x": normal(2, 3)})


def test_operands_without_entries_lie_beside_the_one_that_is_selected_from(tmp_path: Path) -> None:
    text = """(float[2, 5] x, float[2, 0] e, float[2, 1] w) => (float[2] y) {
      c = Concat <axis = 1> (x, e, w)  y = Gather <axis = 1> (c, five)
    }"""
    model = parsed(HEADER + text, five=np.array(5))
    small = onnx_simplified.simplified(model, tmp_path, "simplify{only=[select-of-concat]}")
    assert "Concat" not in onnx_simplified.operators(small)
    assert_equal_runs(model, small, {"x": normal(2, 5), "e": normal(2, 0), "w": normal(2, 1)})
