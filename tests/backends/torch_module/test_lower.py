"""Exported programs with kernels, lowered to operators that torch has by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from regauge.backends.torch_module.kernels import NAMESPACE


class Attention(nn.Module):
    """A norm with its activation, and causal attention: two regions of different kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.nn.functional.gelu(x))
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _exported(model: nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    graph = regauge.capture(model, (x,), dynamic={0: {0: "batch"}})
    batch = {0: torch.export.Dim("batch", min=2)}
    return torch.export.export(graph.to_torch(kernels="triton"), (x,), dynamic_shapes=(batch,))


def _namespaces(program: torch.export.ExportedProgram) -> set[str]:
    return {
        node.target.namespace
        for node in program.graph.nodes
        if node.op == "call_function" and hasattr(node.target, "namespace")
    }


def test_no_operator_of_a_kernel_is_left_and_results_are_equal(tmp_path: Path) -> None:
    model, x = Attention().eval(), torch.randn(3, 5, 32)
    program = _exported(model, x)
    assert NAMESPACE in _namespaces(program)
    lowered = regauge.lower(program)
    assert _namespaces(lowered) == {"aten"}
    other = torch.randn(7, 5, 32)  # the batch stays dynamic
    torch.testing.assert_close(lowered.module()(other), program.module()(other), rtol=0, atol=0)
    torch.testing.assert_close(lowered.module()(other), model(other))


class BiasedAttention(nn.Module):
    """Attention with a learned bias, which torch lays out otherwise in memory than it says when shapes are inferred."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(6, 6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).reshape(x.shape[0], 6, 2, 4).transpose(1, 2) for layer in self.maps)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.permute(2, 0, 1)[None])
        return y.transpose(1, 2).reshape(x.shape[0], 6, 8)


def test_results_lie_in_memory_as_those_of_kernels_do() -> None:
    """Else what is reshaped behind them is a view that does not fit once it runs."""
    model, x = BiasedAttention().eval(), torch.randn(3, 6, 8)
    lowered = regauge.lower(_exported(model, x))
    torch.testing.assert_close(lowered.module()(x), model(x))


def test_it_loads_where_there_is_no_regauge(tmp_path: Path) -> None:
    x = torch.randn(3, 5, 32)
    program = regauge.lower(_exported(Attention().eval(), x))
    torch.export.save(program, tmp_path / "anywhere.pt2")
    torch.save((x, program.module()(x).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch; p = torch.export.load('anywhere.pt2'); x, y = torch.load('expected.pt');"
        "assert 'regauge' not in sys.modules; print(float((p.module()(x) - y).abs().max()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 0


def test_a_program_without_kernels_stays() -> None:
    x = torch.randn(3, 4)
    program = torch.export.export(nn.Linear(4, 5), (x,))
    lowered = regauge.lower(program)
    assert [str(node.target) for node in lowered.graph.nodes] == [str(node.target) for node in program.graph.nodes]


def test_modules_are_refused() -> None:
    with pytest.raises(regauge.RegaugeError, match="expected what torch.export.export gives, found Linear"):
        regauge.lower(nn.Linear(2, 2))  # type: ignore[arg-type]
