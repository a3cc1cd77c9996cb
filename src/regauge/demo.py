"""The main job on a small model: train, prune on images without labels, fine-tune, save, and measure each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from regauge.backends.run_onnxruntime import Session, latency
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Graph
from regauge.ir.printing.tables import short
from regauge.optimize import optimize

PIPELINE = "prune{macs=0.5,round_to=16}"
_BATCH = 64
_SHOWN = 256  # images that pruning sees, without their labels
_TEST_IMAGES = 450  # the last quarter of the digits, in the order in which they were collected

Say = Callable[[str], None]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8 x 8 digits: images f32[n,1,8,8] scaled to 0..1, labels i64[n]."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


class Residual(nn.Module):
    """Two convolutions around which the input is carried."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = layer(width, width)
        self.second = layer(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.second(self.first(x))
        return result


class DigitsNetwork(nn.Module):
    """A small convolutional network of the parts that larger ones are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = layer(1, 32)
        self.block1 = Residual(32)
        self.depthwise = layer(32, 32, groups=32)
        self.pointwise = layer(32, 64, kernel=1, stride=2)
        self.block2 = Residual(64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.pointwise(self.depthwise(self.block1(self.stem(images))))
        logits: torch.Tensor = self.head(self.block2(x).mean((2, 3)))
        return logits


def layer(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def run_demo(*, quick: bool = False, save: Path | None = None, say: Say = print) -> list[list[str]]:
    """Train, prune and fine-tune; returns the table of figures before, between and after, a header first.

    ``quick`` trains for a few seconds only; ``save`` keeps the trained network as an ONNX file, and the fine-tuned one
    beside it (:func:`pruned_path`). Raises RegaugeError where scikit-learn, whose digits are used, is not installed.
    """
    digits = load_digits()
    torch.manual_seed(0)
    model = DigitsNetwork()
    say(f"training on {len(digits.images)} images of scikit-learn's digits ...")
    train(model, digits, epochs=2 if quick else 10, rate=3e-3)
    graph = _captured(model, digits)
    say(f"pruning with {PIPELINE} on {_SHOWN} of them, without labels ...")
    shown = digits.images[:_SHOWN].split(_BATCH)  # type: ignore[no-untyped-call]
    small = optimize(graph, PIPELINE, data=shown)
    pruned = small.to_torch()
    say("fine-tuning the smaller network ...")
    train(pruned, digits, epochs=1 if quick else 6, rate=3e-3)
    with tempfile.TemporaryDirectory() as folder:
        graphs = {"trained": graph, "pruned": small, "fine-tuned": _captured(pruned, digits)}
        models = {name: (own, own.to_onnx(Path(folder) / f"{name}.onnx")) for name, own in graphs.items()}
        rows = _measured(models, digits)
        if save is not None:
            shutil.copyfile(models["trained"][1], save)
            shutil.copyfile(models["fine-tuned"][1], pruned_path(save))
    return rows


def pruned_path(save: Path) -> Path:
    """Where the pruned network goes: ``digits.pruned.onnx`` beside ``digits.onnx``."""
    return save.with_suffix(".pruned" + save.suffix)


def load_digits() -> Digits:
    """The digits, the last quarter of them held out; raises RegaugeError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits as bundled_digits
    except ImportError:
        raise RegaugeError("the demo trains on scikit-learn's digits: pip install 'regauge[demo]'") from None
    pixels, labels = bundled_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    classes = torch.tensor(labels)
    return Digits(images[:-_TEST_IMAGES], classes[:-_TEST_IMAGES], images[-_TEST_IMAGES:], classes[-_TEST_IMAGES:])


def train(model: nn.Module, digits: Digits, *, epochs: int, rate: float) -> None:
    """Minimise the cross entropy with Adam and a rate that falls to zero.

    On one thread: layers this small gain nothing from more, and lose much where other programs want the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _train(model, digits, epochs, rate)
    finally:
        torch.set_num_threads(threads)


def _train(model: nn.Module, digits: Digits, epochs: int, rate: float) -> None:
    steps = epochs * -(-len(digits.images) // _BATCH)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.images)).split(_BATCH):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            F.cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    model.eval()


def _captured(model: nn.Module, digits: Digits) -> Graph:
    return capture(model.eval(), (digits.images[:2],), dynamic={0: {0: "batch"}})


def _measured(models: dict[str, tuple[Graph, Path]], digits: Digits) -> list[list[str]]:
    sessions = {name: Session(path, threads=1) for name, (_, path) in models.items()}
    times = latency(sessions, [digits.test_images[:_BATCH]], repeats=100, warmup=10)
    columns = []
    for name, (graph, path) in models.items():
        (logits,) = sessions[name].run([digits.test_images])
        right = float((logits.argmax(1) == digits.test_labels).float().mean())
        cost = figures(graph)
        columns.append(
            [
                name,
                f"{right:.1%}",
                short(cost.parameters),
                short(cost.macs),
                f"{path.stat().st_size / 1e3:.0f} kB",
                f"{times[name]:.2f} ms",
            ]
        )
    latency_name = f"onnxruntime, batch of {_BATCH}, one thread"
    names = ["", "accuracy on held-out images", "parameters", "MACs per image", "ONNX file", latency_name]
    return [list(row) for row in zip(names, *columns, strict=True)]
