"""Attention is put together wherever its scale, its mask and its shared heads are written, or is left with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn, randn

import regauge
from assembling import WAYS, assembled, counts, exported
from onnx_oracle import runtime_outputs
from regauge.ir.graph import Graph, Node
from regauge.ir.rewriting.rewrite import rewrite_graph
from regauge.ir.running.interpret import run
from regauge.passes.simplify.assemble_attention import RULES

LENGTH, HEADS, DEPTH = 5, 4, 6
Scores = Callable[["Attention", torch.Tensor, torch.Tensor], torch.Tensor]


class Attention(nn.Module):
    """Projections, heads, and what ``weigh`` makes of them."""

    def __init__(self, weigh: Scores, shared: int = HEADS, repeat: bool = True) -> None:
        super().__init__()
        width = HEADS * DEPTH
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, shared * DEPTH), nn.Linear(width, shared * DEPTH)
        self.weigh, self.shared, self.repeat = weigh, shared, repeat
        self.register_buffer("causal", torch.ones(8, 8).tril()[None, None] > 0)
        self.bias = nn.Embedding(8, HEADS)
        self.drop = nn.Dropout(0.1)

    def heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        x = x.view(x.shape[0], x.shape[1], count, DEPTH).transpose(1, 2)
        if count == HEADS:
            return x
        if not self.repeat:
            return x.repeat_interleave(HEADS // count, dim=1)
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, HEADS // count, s, d).reshape(b, HEADS, s, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(self.q(x), HEADS), self.heads(self.k(x), self.shared), self.heads(self.v(x), self.shared)
        mixed = self.drop(torch.softmax(self.weigh(self, q, k), -1)) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], HEADS * DEPTH))


def causal_slice(layer: Attention, q: torch.Tensor) -> torch.Tensor:
    return layer.causal[:, :, : q.shape[2], : q.shape[2]]


def relative(layer: Attention, q: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(q.shape[2])
    return layer.bias((positions[:, None] - positions[None]).clamp(-3, 3) + 3).permute(2, 0, 1)[None]


def gpt(layer: Attention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(DEPTH)
    return torch.where(causal_slice(layer, q), scores, torch.finfo(scores.dtype).min)


SCALE = DEPTH**-0.5
WEIGHINGS: list[tuple[str, bool, Scores]] = [
    ("no scale", False, lambda m, q, k: q @ k.transpose(-1, -2)),
    ("scale behind", False, lambda m, q, k: q @ k.transpose(-1, -2) * SCALE),
    ("divided", False, lambda m, q, k: torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(DEPTH)),
    ("scale of q", False, lambda m, q, k: (q * SCALE) @ k.transpose(-1, -2)),
    ("scale of k", False, lambda m, q, k: q @ (k * SCALE).transpose(-1, -2)),
    ("split scale", False, lambda m, q, k: (q * SCALE**0.5) @ (k.transpose(-1, -2) * SCALE**0.5)),
    ("relative bias", True, lambda m, q, k: q @ k.transpose(-1, -2) + relative(m, q)),
    ("lowest number", True, gpt),
    (
        "filled",
        True,
        lambda m, q, k: (q @ k.transpose(-1, -2) * SCALE).masked_fill(~causal_slice(m, q), float("-inf")),
    ),
    (
        "bias and mask",
        True,
        lambda m, q, k: (q @ k.transpose(-1, -2) + relative(m, q)).masked_fill(~causal_slice(m, q), float("-inf")),
    ),
    (
        "added mask",
        True,
        lambda m, q, k: q @ k.transpose(-1, -2) * SCALE + (1 - causal_slice(m, q).float()) * torch.finfo().min,
    ),
]


def attention(graph: Graph) -> Node:
    return next(node for node in graph.nodes if node.op == "attention")


@pytest.mark.parametrize(("masked", "weigh"), [w[1:] for w in WEIGHINGS], ids=[w[0] for w in WEIGHINGS])
def test_scales_and_masks_of_torch_modules(masked: bool, weigh: Scores) -> None:
    module, x = Attention(weigh).eval(), randn(2, LENGTH, HEADS * DEPTH)
    graph = regauge.capture(module, (x,))
    result = assembled(graph, (x,))
    assert counts(result, "attention", "softmax", "matmul") == {"attention": 1, "softmax": 0, "matmul": 0}
    node = attention(result)
    assert (len(node.inputs) > 3) == masked
    unscaled = weigh in (WEIGHINGS[0][2], WEIGHINGS[6][2], WEIGHINGS[9][2])
    assert node.attributes["scale"] == pytest.approx(1.0 if unscaled else SCALE)
    assert sizes(result) == sizes(graph)
    emitted = result.to_torch()
    torch.testing.assert_close(emitted(x), module(x), rtol=1e-5, atol=1e-5)


def sizes(graph: Graph) -> list[int]:
    return sorted(group.size for group in graph.groups() if group.free)


@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("shared", [1, 2])
def test_repeated_heads_are_shared(shared: int, repeat: bool) -> None:
    module, x = Attention(gpt, shared, repeat).eval(), randn(2, LENGTH, HEADS * DEPTH)
    graph = regauge.capture(module, (x,))
    result = assembled(graph, (x,))
    node = attention(result)
    assert node.attributes["enable_gqa"] and [v.shape[1] for v in node.inputs[:3]] == [HEADS, shared, shared]  # type: ignore[union-attr]
    assert counts(result, "expand", "repeat_interleave") == {"expand": 0, "repeat_interleave": 0}
    assert sizes(result) == sizes(graph)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "weigh", [WEIGHINGS[i][2] for i in (1, 5, 6, 7, 8)], ids=[WEIGHINGS[i][0] for i in (1, 5, 6, 7, 8)]
)
def test_attention_of_exporters(way: str, weigh: Scores, tmp_path: Path) -> None:
    module, x = Attention(weigh, 2), randn(2, LENGTH, HEADS * DEPTH)
    result = assembled(exported(module, (x,), way, tmp_path), (x,))
    assert counts(result, "attention", "softmax") == {"attention": 1, "softmax": 0}
    assert attention(result).attributes["enable_gqa"]


class Whole(nn.Module):
    """What torch has as one operator, and exporters take apart."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.inner, self.masked = nn.MultiheadAttention(8, 2, batch_first=True), masked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.reshape(2, -1, 2, 4).transpose(1, 2)
        keep = (x[:, None, :, :1] > 0).transpose(-1, -2) if self.masked else None
        y = F.scaled_dot_product_attention(q, q + 1, q, attn_mask=keep)
        return self.inner(x, x, x, need_weights=False)[0] + y.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "script13"])  # opset 13 has no form of it
def test_attention_that_exporters_take_apart(way: str, tmp_path: Path) -> None:
    x = randn(2, LENGTH, 8)
    result = assembled(exported(Whole(masked=False), (x,), way, tmp_path), (x,))
    assert counts(result, "attention", "softmax") == {"attention": 2, "softmax": 0}
    assert [node.attributes["scale"] for node in result.nodes if node.op == "attention"] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("way", ["dynamo", "raw"])
def test_rows_without_keys_are_zero_where_the_file_says_so(way: str, tmp_path: Path) -> None:
    """torch's exporter turns the NaN of a row without keys into zero, as its operator does."""
    x = -randn(2, LENGTH, 8).abs()
    graph = exported(Whole(masked=True), (x,), way, tmp_path)
    result = assembled(graph, (x,))
    assert counts(result, "attention", "softmax", "isnan") == {"attention": 2, "softmax": 0, "isnan": 0}
    expected = run(result, [x])[0]
    assert not expected.isnan().any()
    written = onnx.load(result.to_onnx(tmp_path / "written.onnx"))
    found = runtime_outputs(written, {graph.inputs[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    small = regauge.load(regauge.optimize(graph, "simplify").to_onnx(tmp_path / "small.onnx"))
    assert "isnan" not in [node.op for node in small.nodes]  # written as a threshold, which is the same
    assert counts(assembled(small, (x,)), "attention", "softmax") == {"attention": 2, "softmax": 0}


class Causal(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ q.transpose(-1, -2) + torch.full((LENGTH, LENGTH), -math.inf).triu(1), -1) @ q


def test_masks_that_leave_a_key_are_written_without_a_guard(tmp_path: Path) -> None:
    x = randn(2, 3, LENGTH, 8)
    result = assembled(exported(Causal(), (x,), "script17", tmp_path), (x,))
    assert counts(result, "attention") == {"attention": 1}
    written = onnx.load(result.to_onnx(tmp_path / "written.onnx"))
    assert not [node for node in written.graph.node if node.op_type == "IsNaN"]


class Masked(nn.Module):
    def __init__(self, weigh: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.weigh = weigh

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.weigh(q @ k.transpose(-1, -2), mask), -1) @ v


def masked(weigh: Callable[..., torch.Tensor], mask: torch.Tensor) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    inputs = (randn(2, 3, 5, 6), randn(2, 3, 4, 6), randn(2, 3, 4, 2), mask)
    return regauge.capture(Masked(weigh), inputs), inputs


KEEP = torch.tensor([1, 1, 0, 1]).expand(5, 4) > 0


@pytest.mark.parametrize(
    ("weigh", "mask"),
    [
        (lambda s, m: s.masked_fill(m, torch.finfo(s.dtype).min), ~KEEP),
        (lambda s, m: torch.where(m, s, -1e38), KEEP),
        (lambda s, m: s + (1.0 - m.float()) * -10000.0, KEEP.long()),
        (lambda s, m: s + (1.0 - m.float()) * -10000.0, torch.tensor([1, 0, 0, 1])),
        (lambda s, m: s + torch.where(m, torch.zeros(m.shape), torch.finfo(s.dtype).min), KEEP),
        (lambda s, m: s + (1.0 - m[None, None, None].float()) * torch.finfo(s.dtype).min, torch.tensor([1, 0, 0, 1])),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_masks_that_are_inputs(weigh: Callable[..., torch.Tensor], mask: torch.Tensor, whole: bool) -> None:
    """Numbers, however low, leave a row that is masked as a whole the mean of all values: in both forms."""
    graph, inputs = masked(weigh, mask)
    result = assembled(graph, inputs)
    assert counts(result, "attention", "softmax") == {"attention": 1, "softmax": 0}
    for all_or_none in (torch.zeros_like(mask), torch.ones_like(mask)):
        given = [*inputs[:3], all_or_none]
        torch.testing.assert_close(run(result, given)[0], run(graph, given)[0])


@pytest.mark.parametrize(
    ("weigh", "mask", "reason"),
    [
        (lambda s, m: s.masked_fill(m, -math.inf), ~KEEP, "a row may be masked as a whole"),
        (lambda s, m: torch.where(m, s, -1e4), KEEP, "-10000 in the place of masked scores is not so low"),
        (lambda s, m: s + m, randn(5, 4), "mask may mask a row as a whole"),
        (lambda s, m: s + m.log(), torch.ones(5, 4), "log may mask a row as a whole"),
        (lambda s, m: torch.where(KEEP, s, m), randn(1), "what takes the place of masked scores is computed"),
        (lambda s, m: s * m, randn(1), "its scale is computed"),
        (lambda s, m: s + m.float(), randn(5, 4).double(), "mask"),
    ],
)
def test_masks_that_may_mean_something_else(weigh: Callable[..., Any], mask: torch.Tensor, reason: str) -> None:
    graph, inputs = masked(weigh, mask)
    assert counts(assembled(graph, inputs), "attention") == {"attention": 0}
    assert reason in rewrite_graph(graph.copy(), RULES).misses["attention-assembled"].reason


class Odd(nn.Module):
    """What looks like attention and is none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.drop = kind, nn.Dropout(0.5)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        scores = q @ k.transpose(-1, -2)
        if self.kind == "other axis":
            return torch.softmax(scores, -2) @ v
        if self.kind == "weights are returned":
            weights = torch.softmax(scores, -1)
            return weights @ v, weights
        if self.kind == "scaled after the mask":
            return torch.softmax((scores + self.triangle(scores)) * 0.5, -1) @ v
        if self.kind == "wider mask":
            return torch.softmax(scores[:1] + torch.zeros(2, 1, 1, 1), -1) @ v
        return self.drop(torch.softmax(scores, -1)) @ v

    def triangle(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.ones(scores.shape[-2:]).triu()


@pytest.mark.parametrize("kind", ["other axis", "weights are returned", "scaled after the mask", "wider mask"])
def test_what_is_no_attention(kind: str) -> None:
    inputs = tuple(randn(2, 3, 4, 4) for _ in range(3))
    graph = regauge.capture(Odd(kind), inputs)
    assert counts(assembled(graph, inputs), "attention", "softmax") == {"attention": 0, "softmax": 1}


def test_dropout_in_training_stays() -> None:
    inputs = tuple(randn(2, 3, 4, 4) for _ in range(3))
    graph = regauge.capture(Odd("training").train(), inputs, train=True, verify=False)
    result = regauge.optimize(graph, "simplify")
    assert counts(result, "attention", "dropout") == {"attention": 0, "dropout": 1}


def test_sizes_that_vary() -> None:
    module, x = Attention(WEIGHINGS[1][2], 2).eval(), randn(2, LENGTH, HEADS * DEPTH)
    graph = regauge.capture(module, (x,), dynamic={"x": {0: "batch", 1: "time"}})
    result = assembled(graph, (x,))
    assert counts(result, "attention") == {"attention": 1}
    longer = randn(3, 7, HEADS * DEPTH)
    torch.testing.assert_close(run(result, [longer])[0], module(longer), rtol=1e-5, atol=1e-5)
