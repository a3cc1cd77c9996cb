"""Training with fake quantization: what is emitted is what was trained, and what of it gets better."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, digits, train
from regauge.backends.onnx_model.audit import kernels_of
from regauge.training import NMSparsity, Qat

WIDTH = 32


class Encoder(nn.Module):
    """A block of attention and one of two layers, behind norms, on rows of 32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(self.ln1(x)).chunk(3, -1)]
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.ln2(x))))


def encoder(*, dynamic: bool = False) -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    batches = [torch.randn(8, 6, WIDTH) for _ in range(4)]
    return regauge.capture(Encoder(), (batches[0],), dynamic={0: {0: "batch"}} if dynamic else None), batches


@cache
def trained() -> nn.Module:
    model = convolutional()
    train(model, 150)
    return model


def trained_digits() -> tuple[nn.Module, Any]:
    model = copy.deepcopy(trained())
    torch.manual_seed(0)  # whether it was trained just now
    return model, captured(model.eval())


def fit(qat: Qat, graph: Any, batches: list[torch.Tensor], steps: int = 20, rate: float = 1e-3) -> None:
    """Train towards what the graph gives."""
    wanted = [graph.run(x)[0] for x in batches]
    optimizer = torch.optim.Adam(qat.module.parameters(), lr=rate)
    for step in range(steps):
        x, y = batches[step % len(batches)], wanted[step % len(batches)]
        (qat.module(x) - y).square().mean().backward()
        optimizer.step()
        qat.step()
        optimizer.zero_grad()


def error(graph: Any, small: Any, x: torch.Tensor) -> float:
    y = graph.run(x)[0]
    return float((small.run(x)[0] - y).square().sum() / y.square().sum())


SCHEMES = [
    ("w8a8", {"dynamic": True}), ("w4a8", {}), ("w2a8", {"scales": "fixed"}), ("w3a8", {"scales": "statistics"}),
    ("w4a8", {"target": "reference"}), ("w8", {}), ("w2", {"symmetric": True}), ("w3", {"scales": "statistics"}),
    ("w4", {"dynamic": True, "group": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options"), SCHEMES, ids=lambda value: str(value))
def test_what_is_emitted_is_what_was_trained(scheme: str, options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit where weights alone are rounded, else but for single steps of an activation that lies half way between
    two; and the file passes the audit. What it was trained from stays."""
    options = dict(options)
    graph, batches = encoder(dynamic=(dynamic := options.pop("dynamic", False)))
    before = graph.run(batches[0])[0].clone()
    qat = Qat(graph, scheme, data=batches, **options)
    fit(qat, graph, batches, steps=5)
    small = qat.finish()
    most = 1e-6 if "a8" in scheme else 0
    for x in batches:
        wanted = qat.module(x)
        assert float((small.run(x)[0] - wanted).square().sum()) <= most * float(wanted.square().sum())
    assert torch.equal(graph.run(batches[0])[0], before)
    small.to_onnx(tmp_path / "small.onnx")
    if "a8" in scheme and "target" not in options:
        kernels, stray = kernels_of(tmp_path / "small.onnx")
        assert kernels["MatMulIntegerToFloat" if dynamic else "QGemm"] == 4 and not stray


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_convolutions_that_hand_integers_on(scheme: str, tmp_path: Path) -> None:
    _, graph = trained_digits()
    images, _, others, _ = digits()
    qat = Qat(graph, scheme, data=iter(images[:256].split(64)))
    train(qat.module, 5, optimizer=torch.optim.Adam(qat.module.parameters(), lr=1e-4), after=qat.step)
    small = qat.finish()
    wanted = qat.module(others)
    assert float((small.run(others)[0] - wanted).square().sum()) <= 1e-6 * float(wanted.square().sum())
    small.to_onnx(tmp_path / "small.onnx")
    kernels, _ = kernels_of(tmp_path / "small.onnx")
    assert kernels["QLinearConv"] == 2 and kernels["QGemm"] == 2


@pytest.mark.parametrize("scales", ["learned", "fixed", "statistics"])
def test_two_bits_get_better(scales: Any) -> None:
    graph, batches = encoder()
    qat = Qat(graph, "w2", scales=scales)
    before = error(graph, qat.finish(), batches[0])
    fit(qat, graph, batches, steps=60, rate=3e-4)
    assert error(graph, qat.finish(), batches[0]) < 0.6 * before


def test_digits_in_two_bits() -> None:
    """What 2 bits lose of the accuracy is won back."""
    model, graph = trained_digits()
    qat = Qat(graph, "w2", target="reference")
    before = accuracy(qat.finish().to_torch())
    train(qat.module, 100, optimizer=torch.optim.Adam(qat.module.parameters(), lr=1e-3), after=qat.step)
    after = accuracy(qat.finish().to_torch())
    assert before < accuracy(model) - 0.05 and after > accuracy(model) - 0.02, (before, after, accuracy(model))


def test_it_begins_where_quantize_ends() -> None:
    """With its layers and codes, chosen on data where there is any."""
    graph, batches = encoder()
    options = {"include": ("qkv*", "up*"), "exclude": ("up*",)}
    chosen = "include=[qkv*,up*],exclude=[up*],embeddings=false"
    for data in (None, batches):
        small = Qat(graph, "w4", data=data, **options).finish()
        same = regauge.optimize(graph, f"quantize{{scheme=w4,{chosen}}}", data=data)
        assert str(small) == str(same)
        torch.testing.assert_close(small.run(batches[0])[0], same.run(batches[0])[0])
    assert dict(small.report.passes[0].left) == dict(same.report.passes[0].left)


def test_the_module_is_a_plain_one() -> None:
    """A copy computes the same, the state_dict loads into another one, and it compiles in one piece."""
    graph, batches = encoder()
    qat, other = (Qat(graph, "w4a8", data=batches) for _ in range(2))
    fit(qat, graph, batches)
    expected = qat.module(batches[0])
    assert torch.equal(copy.deepcopy(qat.module)(batches[0]), expected)
    other.module.load_state_dict(qat.module.state_dict())
    other.load_state_dict(qat.state_dict())
    assert torch.equal(other.finish().run(batches[0])[0], qat.finish().run(batches[0])[0]) and other.steps == qat.steps
    assert {name for name, _ in qat.module.named_parameters() if not name.endswith("log_scale")} == {
        name for name, _ in Encoder().named_parameters()
    }
    assert torch.equal(torch.compile(qat.module, backend="eager", fullgraph=True)(batches[0]), expected)


def test_confident_weights_no_longer_move() -> None:
    """With statistics as scales, only what lies beside a boundary moves, whatever the momentum of the optimizer."""
    graph, batches = encoder()
    qat = Qat(graph, "w2", scales="statistics")
    fit(qat, graph, batches)
    weight = qat.module.up.weight
    was, step = weight.detach().clone(), 4 * weight.detach().abs().mean(1, keepdim=True) / 4
    qat.anneal(0.05)
    fit(qat, graph, batches, steps=1)
    moved, ratio = weight != was, was / step  # boundaries lie at -1, 0 and 1
    near = torch.stack([(ratio - place).abs() for place in (-1, 0, 1)]).amin(0) <= 0.05
    assert bool(moved.any()) and torch.equal(moved, near & moved) and int(moved.sum()) > 0.9 * int(near.sum())


def test_zeros_stay_zeros() -> None:
    """2:4 first, then 4 bits: of every four codes in a row two stand for zero."""
    model, graph = trained_digits()
    sparsifier = NMSparsity(model, graph, exclude=("0.*",))
    train(model, 20, sparsifier)
    qat = Qat(sparsifier.finish(), "w4", keep_zeros=True, symmetric=True, target="reference")
    train(qat.module, 20, optimizer=torch.optim.Adam(qat.module.parameters(), lr=1e-3), after=qat.step)
    small = qat.finish()
    for name in ("6.weight", "8.weight"):
        codes = small.find(f"{name}_quantized").tensor
        assert int((codes.reshape(-1, 4) != 0).sum(1).max()) == 2


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w5", {}, "scheme='w5' is unknown: write w8, w4, w3 or w2"),
        ("w8", {"scales": "statistics"}, "which 8 bits does not go with"),
        ("w4", {"scales": "statistics", "keep_zeros": True}, "which keep_zeros does not go with"),
        ("w4a8", {"group": 32}, "group does nothing"),
        ("w4", {"include": ("ln1.*",)}, "Qat finds no layer to quantize"),
    ],
)
def test_what_is_refused(scheme: str, options: dict[str, Any], message: str) -> None:
    graph, batches = encoder()
    with pytest.raises(regauge.RegaugeError, match=message):
        Qat(graph, scheme, data=batches, **options)


def test_salient_weights_are_frozen_in_rounds() -> None:
    """At their codes, the same ones to the end and through a checkpoint; the rest makes up for it."""
    graph, batches = encoder()
    qat = Qat(graph, "w2", scales="fixed", partial=True)
    before = error(graph, qat.finish(), batches[0])
    held: dict[str, Any] = {}
    for share in (0.5, 0.75, 1.0):
        fit(qat, graph, batches, steps=20, rate=3e-4)
        qat.freeze(share)
        for name, mask in qat.state_dict()["salient"]["frozen"].items():
            assert int(mask.sum()) == round(share * mask.numel())
            tensor = qat.module.get_parameter(name)
            old, values = held.get(name, (mask, tensor))
            assert torch.equal(tensor[old], values[old]) and bool((mask | ~old).all())
            held[name] = mask, tensor.detach().clone()
    assert error(graph, qat.finish(), batches[0]) < 0.95 * before
    other = Qat(graph, "w2", scales="fixed", partial=True)
    other.module.load_state_dict(qat.module.state_dict())
    other.load_state_dict(qat.state_dict())
    fit(other, graph, batches, steps=2)
    assert all(torch.equal(other.module.get_parameter(name), values) for name, (_, values) in held.items())


def test_rounds_need_saliencies_and_scales_that_stay() -> None:
    graph, _ = encoder()
    with pytest.raises(regauge.RegaugeError, match="goes with scales='fixed'"):
        Qat(graph, "w2", partial=True)
    with pytest.raises(regauge.RegaugeError, match="write Qat"):
        Qat(graph, "w2").freeze(0.5)
    with pytest.raises(regauge.RegaugeError, match="share=2 is out of range"):
        Qat(graph, "w2", scales="fixed", partial=True).freeze(2)
    qat = Qat(graph, "w2", scales="fixed", partial=True)
    with pytest.raises(regauge.RegaugeError, match="between optimizer.step\\(\\) and optimizer.zero_grad\\(\\)"):
        qat.freeze(0.5)
    tensor = qat.module.get_parameter(next(iter(qat.state_dict()["salient"]["frozen"])))
    tensor.grad = torch.full_like(tensor, torch.inf)
    qat.step()  # a scaler of losses has left the step out
    assert not any(square.any() for square in qat.state_dict()["salient"]["squares"].values())
