"""Launches are made ready once for each shape and stride, and no launch is made ready for another's tensors."""

from __future__ import annotations

import pytest
import torch

from kernel_forms import form_graph
from regauge.backends.triton_kernels import kernel as kernels
from regauge.backends.triton_kernels.kernel import Kernel, triton_kernel
from regauge.ir.errors import FusionError
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Value

pytest.importorskip("triton")


def softmax() -> tuple[Kernel, Value]:
    graph = form_graph("softmax", torch.float32, 5, 37)
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    return kernel, kernel.source().reads[0].value


def test_what_follows_from_shapes_and_strides_is_found_once() -> None:
    kernel, x = softmax()
    first = kernel.prepared({x: torch.randn(5, 37)})
    assert kernel.prepared({x: torch.randn(5, 37)}) is first
    (call,) = first.calls
    assert (call.grid, first.numbers[0]) == ((1,), 5)


def test_other_strides_and_forms_are_launches_of_their_own() -> None:
    kernel, x = softmax()
    plain = kernel.prepared({x: torch.randn(5, 37)})
    turned = kernel.prepared({x: torch.randn(37, 5).t()})
    looped = kernel.prepared({x: torch.randn(5, 37)}, "looped")
    assert turned.numbers != plain.numbers
    assert looped.calls[0].function is not plain.calls[0].function
    assert kernel.prepared({x: torch.randn(5, 37)}) is plain


def test_what_does_not_fit_is_said_each_time() -> None:
    kernel, x = softmax()
    for _ in range(2):
        with pytest.raises(FusionError, match="has 36 indices where its kernel expects 37"):
            kernel.prepared({x: torch.randn(5, 36)})


def test_so_many_launches_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_PREPARED", 2)
    kernel, x = softmax()
    for gap in range(5):  # of rows so many entries apart
        kernel.prepared({x: torch.randn(5, 37 + gap)[:, :37]})
    assert len(kernel._prepared) <= 2
