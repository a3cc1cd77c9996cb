"""Stacks of terms: each term loses less, a prefix fits any budget, and one file serves them all."""

from pathlib import Path

import onnx
import pytest
import torch

import regauge
from format_network import decibels, network, share
from regauge.backends.run_onnxruntime import Session
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.passes.quantization.bitstack import stacked
from regauge.passes.quantization.universal_stack import UniversalStack


def test_each_term_is_that_of_what_the_ones_before_leave() -> None:
    weight, norms = torch.randn(24, 40).double(), torch.rand(40).double() + 0.5
    terms = stacked(weight, norms, 6, 2)
    errors = [share(weight, terms.first(count).values) for count in range(1, 7)]
    assert errors[0] < 0.4 and all(b < 0.6 * a for a, b in zip(errors, errors[1:], strict=False))
    rest = weight * terms.norms - terms.signs[0] * (terms.u[0] @ terms.v[0])
    assert torch.equal(terms.signs[1], torch.where(rest < 0, -1, 1).to(torch.int8))
    assert terms.bytes_of_a_term == 24 * 5 + (24 + 40) * 2 * 2


def test_a_budget_loads_a_prefix_of_one_file(tmp_path: Path) -> None:
    """The file is written once with data; later sizes need none. More bytes are never worse here."""
    graph, batches = network()
    whole, found = int(figures(graph).bytes), []
    path = tmp_path / "stack.safetensors"
    for share_of_bytes, data in ((0.1, batches), (0.15, None), (0.22, None)):
        step = f"quantize{{scheme=bitstack,target=reference,bytes={share_of_bytes},stack={path}}}"
        small = regauge.optimize(graph, step, data=data)
        assert share_of_bytes * whole - 12_000 < figures(small).bytes <= share_of_bytes * whole
        found.append(decibels(graph, small))
    assert found[0] > 5 and found[1] > found[0] + 4 and found[2] > found[1] + 4
    stack = UniversalStack.load(path)
    assert sum(terms.count for terms in stack.within(10**9).values()) == len(stack.order)
    with pytest.raises(PassError, match="hold no term for each of 3 weights"):
        stack.within(500)
    assert sorted(set(stack.order)) == sorted(stack.weights) and path.stat().st_size < 0.4 * whole
    other = regauge.capture(torch.nn.Linear(8, 4).eval(), (torch.randn(2, 8),))
    with pytest.raises(PassError, match="is of another model"):
        regauge.optimize(other, f"quantize{{scheme=bitstack,target=reference,stack={path}}}")
    with pytest.raises(PassError, match="less than one term of each weight and all else take"):
        regauge.optimize(graph, f"quantize{{scheme=bitstack,target=reference,bytes=0.01,stack={path}}}")


def test_terms_in_a_file(tmp_path: Path) -> None:
    graph, batches = network()
    small = regauge.optimize(graph, "quantize{scheme=bitstack,target=reference,bytes=0.15}", data=batches)
    x = torch.randn(5, 6, 6)
    (wanted,) = small.run((x,))
    assert torch.allclose(small.to_torch()(x), wanted, atol=1e-5)
    small.to_onnx(tmp_path / "small.onnx")
    (found,) = Session(tmp_path / "small.onnx").run({small.inputs[0].name: x})
    assert torch.allclose(found, wanted, atol=1e-4)
    size = sum(len(tensor.raw_data) for tensor in onnx.load(tmp_path / "small.onnx").graph.initializer)
    assert size < 0.16 * figures(graph).bytes
