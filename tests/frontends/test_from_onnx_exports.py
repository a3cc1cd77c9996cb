"""One network through three exporters: the same results as onnxruntime, the same free Dims, nothing kept opaque."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onnx_oracle import assert_equals_runtime, free_sizes, opaque

EXPORTS = ("dynamo", "raw", "torchscript")


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual, squeeze-and-excitation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.inner_norm = nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.head = nn.Linear(12 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        h = h + F.hardswish(self.inner_norm(self.inner(h)))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(h, 1))))
        h = F.adaptive_avg_pool2d(h * torch.sigmoid(gate), 2)
        return self.head(h.flatten(1))


class Shuffle(nn.Module):
    """Channels cut in halves and shuffled, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        h = torch.cat([left, self.branch(right).relu()], 1)
        n, c, height, width = h.shape
        h = h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)
        return self.head(h)


class Block(nn.Module):
    """Pre-norm attention with a fused projection, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(40, 16), nn.Embedding(32, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 40, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, time = tokens.shape
        x = self.embed(tokens) + self.position(torch.arange(time))
        q, k, v = self.qkv(self.first(x)).view(batch, time, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, 16))
        h = self.second(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


class Recurrent(nn.Module):
    """A bidirectional LSTM over a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 3, padding=1)
        self.rnn = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.conv(x).transpose(1, 2))[0])


IMAGES, TOKENS, SERIES = torch.randn(2, 3, 8, 8), torch.randint(0, 40, (2, 9)), torch.randn(2, 5, 7)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[int]]] = {
    "residual": (Residual, IMAGES, [4, 3, 5]),
    "shuffle": (Shuffle, IMAGES, [4, 4]),
    "block": (Block, TOKENS, [24, 16, 4, 4]),
    "recurrent": (Recurrent, SERIES, [8, 6]),
}


def exported(model: nn.Module, inputs: Tensor, how: str, path: Path, dynamic: bool) -> Path:
    logging.disable(logging.WARNING)
    options: dict[str, Any] = {"dynamo": False, "opset_version": 17}
    if how != "torchscript":
        options = {"dynamo": True, "optimize": how == "dynamo", "external_data": False}
    if dynamic and how == "torchscript":
        options |= {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    elif dynamic:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (inputs,), path, **options)
    logging.disable(logging.NOTSET)
    return path


def drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A network in which every weight and statistic matters."""
    torch.manual_seed(0)
    model = build().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else tensor.data
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_three_exports_have_the_same_groups(name: str, tmp_path: Path) -> None:
    build, inputs, expected = NETWORKS[name]
    model = drawn(build)
    for how in EXPORTS:
        graph = assert_equals_runtime(exported(model, inputs, how, tmp_path / f"{how}.onnx", dynamic=False))
        assert (free_sizes(graph), opaque(graph)) == (sorted(expected, reverse=True), []), how


@pytest.mark.parametrize("name", NETWORKS)
def test_dynamic_batch(name: str, tmp_path: Path) -> None:
    build, inputs, expected = NETWORKS[name]
    model = drawn(build)
    for how in ("dynamo", "torchscript"):
        path = exported(model, inputs, how, tmp_path / f"{how}.onnx", dynamic=True)
        for batch in (2, 5):
            graph = assert_equals_runtime(path, {"batch": batch, "s77": batch})
        assert not isinstance(graph.inputs[0].shape[0], int)
        assert (free_sizes(graph), opaque(graph)) == (sorted(expected, reverse=True), []), how
