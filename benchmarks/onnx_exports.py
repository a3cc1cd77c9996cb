"""Small networks and the ways to export them as ONNX files: what benchmarks of ONNX tools run on.

Weights, biases and statistics are redrawn, so that errors show. Files are kept in a folder of the system's temporary
one and made once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import SHARED, redraw
from benchmarks.zoo import build as build_case

FLAVOURS = ("dynamo", "raw", "dynamic", "torchscript")
FOLDER = Path(tempfile.gettempdir()) / "regauge-onnx-exports"


class Positional(nn.Module):
    """A transformers model whose inputs go by position and that gives one tensor: what all exporters take."""

    def __init__(self, model: nn.Module, names: list[str], pick: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.names, self.pick = model, names, pick

    def forward(self, *inputs: Any) -> Any:
        return self.pick(self.model(**dict(zip(self.names, inputs, strict=True))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.rnn = kind(24, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.rnn(self.embed(ids))[0])
        return result


class UNet(nn.Module):
    """Convolutions, a transposed one, a skip connection, bilinear resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.GELU())
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down(x)
        b = torch.cat([a, self.up(self.middle(a))], 1)
        return nn.functional.interpolate(self.head(b), scale_factor=2, mode="bilinear")


@dataclass(frozen=True)
class Network:
    """One network: how to make it, example inputs, and which axes of them are dynamic."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
    dynamic: dict[int, str]


def timm_network(name: str, size: int) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        case = build_case(f"timm:{name}:{size}")
        return case.model, case.args

    return make


def _transformer(family: str) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        case = build_case(f"hf:{family}")
        names = list(case.kwargs)
        return Positional(case.model, names, case.outputs), tuple(case.kwargs.values())

    return make


IMAGE, TOKENS = {0: "batch"}, {0: "batch", 1: "length"}
NETWORKS = [
    *(Network(name, timm_network(name, size), IMAGE) for name, size in [
        ("resnet18", 64), ("mobilenet_v3_small@tv", 64), ("shufflenet_v2_x0_5@tv", 64), ("densenet121", 64),
        ("efficientnet_b0", 64), ("regnety_002", 64), ("convnext_atto", 64), ("vit_tiny_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224), ("mobilevit_xxs", 128), ("repvgg_a0", 64), ("ghostnet_100", 64),
        ("mixer_s32_224", 224), ("hrnet_w18_small", 64),
    ]),
    *(Network(name, _transformer(name), TOKENS) for name in ("bert", "gpt2", "llama", "t5", "whisper", "clip")),
    Network("unet", lambda: (UNet(), (torch.randn(2, 3, 32, 32),)), IMAGE),
    Network("lstm", lambda: (Recurrent(nn.LSTM), (torch.randint(0, 50, (2, 9)),)), TOKENS),
    Network("gru", lambda: (Recurrent(nn.GRU), (torch.randint(0, 50, (2, 9)),)), TOKENS),
]  # fmt: skip


def export(network: Network, flavour: str) -> Path | None:
    """The file of a network in one flavour; None where the exporter fails. The message is kept beside it."""
    path = FOLDER / f"{network.name.replace('@', '-')}-{flavour}.onnx"
    failed = path.with_suffix(".failed")
    if path.exists():
        return path
    if failed.exists():
        return None
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, inputs = network.make()
    redraw(model.eval())
    try:
        with _quietly():
            _export(model.eval(), inputs, path, flavour, network.dynamic)
    except Exception as error:
        failed.write_text(f"{type(error).__name__}: {error}")
        return None
    return path


def _export(model: nn.Module, inputs: tuple[Any, ...], path: Path, flavour: str, dynamic: dict[int, str]) -> None:
    if flavour == "torchscript":
        torch.onnx.export(model, inputs, str(path), dynamo=False)
        return
    options: dict[str, Any] = {"optimize": False} if flavour == "raw" else {}
    if flavour == "dynamic":
        shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in dynamic if axis < x.dim()} for x in inputs)
        options["dynamic_shapes"] = (shapes,) if isinstance(model, Positional) else shapes
    torch.onnx.export(model, inputs, str(path), dynamo=True, external_data=False, verbose=False, **options)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def real_files() -> list[Path]:
    """The real ONNX files of ``shared/corpus``, where that lies beside the repository."""
    return sorted((SHARED / "corpus" / "onnx").glob("*.onnx"))


def light_files() -> list[Path]:
    """The light models of the onnx package: weights are filled when the model runs, IR version 3."""
    import onnx

    return sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx"))
