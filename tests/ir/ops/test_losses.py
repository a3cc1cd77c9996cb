"""Losses as they are captured and as ONNX files have them: what torch, or the reference of ONNX, says."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import regauge
from regauge.backends.run_onnxruntime import Session
from regauge.ir.fusion.plan import plan_fusion

WEIGHT = torch.linspace(0.5, 2, 7)


class Loss(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, target, **self.options)


OPTIONS: list[dict[str, Any]] = [{}, {"weight": WEIGHT, "ignore_index": 6}, {"label_smoothing": 0.2}]
OPTIONS.append({"weight": WEIGHT, "label_smoothing": 0.2})
INPUTS = [
    (torch.randn(4, 7), torch.tensor([3, -100, 6, 0])),
    (torch.randn(2, 7, 3, 2), torch.randint(0, 6, (2, 3, 2))),
    (torch.randn(7), torch.tensor(2)),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_are_captured(options: dict[str, Any], reduction: str) -> None:
    for x, target in INPUTS:
        inputs = (x, target.where(target >= 0, options.get("ignore_index", -100)))
        module = Loss(reduction=reduction, **options)
        graph = regauge.capture(module, inputs)
        assert "torch_call" not in [node.op for node in graph.nodes]
        torch.testing.assert_close(graph.run(inputs)[0], module(*inputs))
        torch.testing.assert_close(graph.to_torch()(*inputs), module(*inputs))


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_losses_are_written(options: dict[str, Any], tmp_path: Path) -> None:
    x, target = INPUTS[1]
    module = Loss(**options)
    regauge.capture(module, (x, target)).to_onnx(tmp_path / "loss.onnx", verify=False)
    found = Session(tmp_path / "loss.onnx").run((x, target))[0]
    torch.testing.assert_close(found, module(x, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_losses_of_any_number_of_rows_are_written(reduction: str, tmp_path: Path) -> None:
    """torch's exporter fails at losses of rows whose number is dynamic, and what it writes at none of them."""
    module = Loss(reduction=reduction)
    graph = regauge.capture(module, INPUTS[0], dynamic={0: {0: "rows"}, 1: {0: "rows"}})
    for functions in (False, True):
        regauge.optimize(graph, "fuse").to_onnx(tmp_path / "loss.onnx", functions=functions)
        for rows in (0, 1, 5):
            x, target = torch.randn(rows, 7), torch.arange(rows)
            found = Session(tmp_path / "loss.onnx").run((x, target))[0]
            torch.testing.assert_close(found, module(x, target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT, "label_smoothing": 0.2}], ids=str)
def test_labels_that_are_probabilities(options: dict[str, Any], reduction: str) -> None:
    for x in (torch.randn(4, 7), torch.randn(2, 7, 3), torch.randn(7)):
        target = torch.softmax(torch.randn(x.shape), 1 if x.dim() > 1 else 0)
        module = Loss(reduction=reduction, **options)
        torch.testing.assert_close(regauge.capture(module, (x, target)).run((x, target))[0], module(x, target))


def test_a_loss_is_one_kernel_and_the_mean_of_losses_one() -> None:
    inputs = (torch.randn(512, 1000), torch.randint(0, 1000, (512,)))
    plan = plan_fusion(regauge.capture(Loss(), inputs))
    first, *_, last = plan.kernels
    assert len(plan.kernels) == 3
    assert first.kind == "row reduction" and [node.op for node in first.nodes][0] == "cross_entropy"  # type: ignore[union-attr]
    assert plan.kernels_before == 6 and plan.bytes < 1.02 * inputs[0].nbytes
    assert [node.op for node in last.nodes][-1] == "div"  # type: ignore[union-attr]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("attributes", [{}, {"reduction": "none"}, {"reduction": "sum", "ignore_index": 2}], ids=str)
def test_losses_of_files(attributes: dict[str, Any], weighted: bool, tmp_path: Path) -> None:
    names = ["x", "labels", *(["weight"] if weighted else [])]
    node = helper.make_node("SoftmaxCrossEntropyLoss", names, ["loss", "logs"], **attributes)
    shapes = {"x": (TensorProto.FLOAT, [3, 5, 2]), "labels": (TensorProto.INT64, [3, 2]), "weight": (1, [5])}
    inputs = [helper.make_tensor_value_info(name, *shapes[name]) for name in names]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("loss", "logs")]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "loss.onnx")
    tensors = {"x": torch.randn(3, 5, 2), "labels": torch.randint(0, 5, (3, 2)), "weight": torch.rand(5) + 0.5}
    given = [tensors[name] for name in names]
    wanted = ReferenceEvaluator(model).run(None, {name: tensors[name].numpy() for name in names})
    for own, other in zip(regauge.load(tmp_path / "loss.onnx").run(given), wanted, strict=True):
        np.testing.assert_allclose(own.numpy(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weights_of_classes_in_a_file_are_not_trained(reduction: str, tmp_path: Path) -> None:
    """The emitted module could not run where gradients are kept: torch has none of these weights."""
    node = helper.make_node("SoftmaxCrossEntropyLoss", ["x", "labels", "weight"], ["loss"], reduction=reduction)
    inputs = [helper.make_tensor_value_info(*one) for one in (("x", 1, [3, 5]), ("labels", TensorProto.INT64, [3]))]
    weight = onnx.numpy_helper.from_array(np.arange(1, 6, dtype=np.float32), "weight")
    outputs = [helper.make_tensor_value_info("loss", 1, [3] if reduction == "none" else [])]
    model = helper.make_graph([node], "g", inputs, outputs, [weight])
    onnx.save(helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "loss.onnx")
    module = regauge.load(tmp_path / "loss.onnx").to_torch()
    x, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([4, 0, 2])
    wanted = F.cross_entropy(x, labels, torch.arange(1.0, 6.0), reduction=reduction)
    torch.testing.assert_close(module(x, labels), wanted)
    assert not list(module.parameters())
    module(x, labels).sum().backward()
    assert x.grad is not None
