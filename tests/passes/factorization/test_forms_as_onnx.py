"""ONNX files of layers in every form: they run in onnxruntime, and nothing is reshaped around convolutions."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from layer_kinds import KINDS, drawn, layer_in
from regauge.frontends.capture import capture
from regauge.ir.edit import remove_dead
from regauge.passes.factorization.blocks import links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import write_chain
from regauge.passes.factorization.problems import plain_problems

ORDER = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}


BY_DAY = ("linear", "conv2d", "grouped")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in BY_DAY else [pytest.mark.sweep]) for k in KINDS])
def test_every_form_runs_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    build, shape = KINDS[kind]
    torch.manual_seed(0)
    x = drawn(*shape).float()
    graph = capture(build(), (x,))
    for name, form in FORMS.items():
        layer = layer_in(graph)
        if form.misfit(layer) is not None:
            continue
        changed = graph.copy()
        own = layer_in(changed)
        write_chain(changed, own, links_of(form, plain_problems(own), form.lossless(own)[-1])[0], by="test")
        remove_dead(changed)
        path = changed.to_onnx(tmp_path / f"{name}.onnx")
        (wanted,) = changed.run(x)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4), name
        nodes = [node.op_type for node in onnx.load(path).graph.node]
        if layer.node.op in ("conv", "conv_transpose"):
            assert not ORDER & set(nodes), (name, nodes)
            assert 2 <= len(nodes) <= 5, (name, nodes)
        else:
            assert sum(node in ("MatMul", "Gemm") for node in nodes) <= 4, (name, nodes)
