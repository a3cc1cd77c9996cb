"""``stream``: what the steps give is what whole signals give, of modules, random networks and ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import regauge
from regauge.ir.edit import Builder
from regauge.ir.errors import GraphError, PassError
from regauge.ir.graph import Graph, Value
from regauge.ir.states import carried
from regauge.passes.streaming.signals import STREAM


class Block(nn.Module):
    """A causal convolution beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int, stride: int = 1) -> None:
        super().__init__()
        self.before = (kernel - 1) * dilation
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, stride=stride)
        self.norm, self.beside = nn.BatchNorm1d(outputs), nn.Conv1d(inputs, outputs, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(F.pad(x, (self.before, 0))))) + self.beside(x)


class Causal(nn.Module):
    """Dilated and strided blocks, a pool, a norm of channels, and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(4, 8, 3, 1), Block(8, 8, 3, 2), Block(8, 8, 5, 4, 2), nn.AvgPool1d(2))
        self.norm, self.lstm = nn.LayerNorm(8), nn.LSTM(8, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(self.norm(self.blocks(x).transpose(1, 2)))[0]


class Valid(nn.Module):
    """Convolutions without zeros beside the signal, and a shortcut that waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 5, dilation=2), nn.Conv1d(4, 4, 3)
        self.beside = nn.Conv1d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.second(torch.tanh(self.first(x)))) + self.beside(x)[:, :, 5:-5]


class Chomped(nn.Module):
    """Zeros on both sides, of whose results those that read behind the end are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 5, dilation=2, padding=8), nn.Conv1d(4, 4, 3, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x)[:, :, :-8]))[..., :-2] + x)


class Spectrum(nn.Module):
    """Images with time along the last axis; zeros beside the other one stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(1, 8, 3, padding=(1, 0), stride=(2, 1)), nn.MaxPool2d((1, 2))
        self.second, self.head = nn.Conv2d(8, 4, (2, 3)), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.pool(torch.relu(self.first(F.pad(x.unsqueeze(1), (2, 0))))))
        return self.head(y.flatten(1, 2).transpose(1, 2))


class Odd(nn.Module):
    """Gates, a sigmoid of zeros in front, strided slices, joined channels, a GRU beside the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 8, 4, stride=2), nn.Conv1d(4, 4, 3)
        self.gru = nn.GRU(4, 3, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.glu(self.first(F.pad(x, (3, 0))), 1)
        z = torch.softmax(self.second(torch.sigmoid(F.pad(y, (2, 0)))), 1)
        return torch.cat([z, z * torch.tanh(x[..., 1::2])], 1)[..., 3:], self.gru(y.transpose(1, 2))[0].mean(-1)


class Decoder(nn.Module):
    """Strides down and up again; what transposed convolutions give behind the end is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(4, 6, 4, stride=4), nn.ConvTranspose1d(6, 4, 8, stride=4)
        self.sparse, self.last = nn.ConvTranspose1d(4, 4, 2, stride=3, groups=2), nn.Conv1d(4, 2, 5, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(torch.relu(self.down(x)))[..., :-4])
        return self.last(self.sparse(y + x)[..., : 3 * x.shape[-1] - 1])


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 4, 5, padding=2), nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))) + x


def streamed(graph: Graph, options: str) -> Graph:
    return regauge.optimize(graph, f"stream{{{options}}}")


def differences(graph: Graph, steps: Graph, x: torch.Tensor, most_late: int = 0) -> list[float]:
    """The greatest difference of each output; ``most_late`` frames at the end need not have come."""
    found = []
    form = steps.metadata[STREAM]
    for wanted, got, axis in zip(graph.run(x), regauge.run_stream(steps, x), form.output_axes, strict=True):
        count = min(wanted.shape[axis], got.shape[axis])
        assert count >= wanted.shape[axis] - most_late > 0
        found.append(float((wanted.narrow(axis, 0, count) - got.narrow(axis, 0, count)).abs().max()))
    return found


NETWORKS = [
    (Causal, (4, 8), 0),
    (Valid, (1, 8), 0),
    (Chomped, (1, 3, 16), 0),
    (Spectrum, (2, 4), 0),
    (Odd, (2, 8), 2),
    (Decoder, (4, 12), 0),
]


@pytest.mark.parametrize(("network", "chunks", "late"), NETWORKS)
def test_steps_give_what_whole_signals_give(network: Any, chunks: tuple[int, ...], late: int) -> None:
    x = torch.randn(2, 4, 48, dtype=torch.float64)
    graph = regauge.capture(network().double().eval(), (x,), dynamic={0: {0: "batch"}})
    for chunk in chunks:
        assert max(differences(graph, streamed(graph, f"chunk={chunk}"), x, late)) < 1e-12


def test_signals_of_any_length() -> None:
    x = torch.randn(2, 4, 48, dtype=torch.float64)
    graph = regauge.capture(Causal().double().eval(), (x,), dynamic={0: {0: "batch", 2: "time"}})
    steps = streamed(graph, "chunk=4")
    assert max(differences(graph, steps, x)) < 1e-12
    assert max(differences(graph, steps, torch.randn(1, 4, 80, dtype=torch.float64))) < 1e-12


def test_every_step_is_right_when_it_comes() -> None:
    x = torch.randn(1, 4, 32)
    graph = regauge.capture(Causal().eval(), (x,))
    steps = regauge.Steps(streamed(graph, "chunk=4"))
    (wanted,) = graph.run(x)
    for place in range(8):
        (got,) = steps(x[..., 4 * place : 4 * place + 4])
        assert (got - wanted[:, place : place + 1]).abs().max() < 1e-5


def test_torch_module_and_onnx_file_take_states(tmp_path: Path) -> None:
    import onnxruntime

    x = torch.randn(1, 4, 32)
    graph = regauge.capture(Causal().eval(), (x,))
    steps = streamed(graph, "chunk=8")
    (wanted,) = graph.run(x)
    module = steps.to_torch()
    assert isinstance(module.get_submodule("blocks.0.conv"), nn.Conv1d)
    path = steps.to_onnx(tmp_path / "steps.onnx")
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    states = [state.before.name for state in carried(steps)]
    assert names == ["x", *states]
    assert [value.name for value in session.get_outputs()][1:] == [f"{name}.next" for name in states]

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(result) for result in session.run(None, given)]

    for one in (module, run):
        walk = regauge.Steps(steps, one)
        got = torch.cat([walk(part)[0] for part in x.split(8, 2)], 1)
        assert (got - wanted).abs().max() < 1e-5


def test_a_file_becomes_steps(tmp_path: Path) -> None:
    x = torch.randn(1, 4, 48)
    regauge.capture(Valid().eval(), (x,)).to_onnx(tmp_path / "whole.onnx")
    loaded = regauge.load(tmp_path / "whole.onnx")
    steps = streamed(loaded, "chunk=4")
    steps.to_onnx(tmp_path / "steps.onnx")
    assert max(differences(loaded, steps, x)) < 1e-5


class Conditioned(nn.Module):
    """Frames scaled by what is the same for all of them, and a signal that only has zeros put in front."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv1d(4, 4, 3), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, about: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(F.pad(x, (2, 0))) * self.scale(about).unsqueeze(-1), F.pad(x, (3, 0)).relu()


def test_other_inputs_are_whole_at_every_step() -> None:
    x, about = torch.randn(2, 4, 24), torch.randn(2, 5)
    graph = regauge.capture(Conditioned().eval(), (x, about))
    steps = streamed(graph, "chunk=4,inputs=x")
    assert [output.name for output in steps.outputs[:2]] == [output.name for output in graph.outputs]
    for wanted, got in zip(graph.run((x, about)), regauge.run_stream(steps, x, about), strict=True):
        assert (wanted[..., :24] - got).abs().max() < 1e-6
    with pytest.raises(PassError, match="linear = linear in scale cannot go frame by frame"):
        streamed(graph, "chunk=4")


def test_zeros_behind_the_end_are_refused_or_replaced() -> None:
    x = torch.randn(2, 4, 64, dtype=torch.float64)
    model = Same().double().eval()
    graph = regauge.capture(model, (x,))
    with pytest.raises(PassError, match="padding=causal lets layers look back only"):
        streamed(graph, "chunk=4")
    one = regauge.capture(nn.Sequential(model.first), (x,))
    with pytest.raises(PassError, match="conv = conv in 0 reads zeros behind the end of the signal"):
        streamed(one, "chunk=4")
    signal = streamed(graph, "chunk=4,padding=signal")
    (wanted,), (got,) = graph.run(x), regauge.run_stream(signal, x)
    assert got.shape[-1] == 61 and (wanted[..., 3:58] - got[..., 3:58]).abs().max() < 1e-12
    assert (wanted - torch.cat([got, wanted[..., 61:]], -1)).abs().max() > 1e-3
    causal = streamed(graph, "chunk=4,padding=causal")
    first = F.conv1d(F.pad(x, (4, 0)), model.first.weight, model.first.bias)
    moved = F.conv1d(F.pad(first.relu(), (2, 0)), model.second.weight, model.second.bias) + x
    assert (regauge.run_stream(causal, x)[0] - moved).abs().max() < 1e-12


def test_transposed_convolutions_that_need_the_next_frame() -> None:
    x = torch.randn(2, 4, 32, dtype=torch.float64)
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1)).double().eval()
    graph = regauge.capture(model, (x,))
    with pytest.raises(PassError, match="spreads 2 frames before the signal, which stand for nothing, into it"):
        streamed(graph, "chunk=4")
    one = regauge.capture(model[1:], (x,))
    with pytest.raises(PassError, match="conv_transpose in 1 reads zeros behind the end"):
        streamed(one, "chunk=4")
    for whole, late in ((one, 1), (graph, 5)):
        (wanted,), (got,) = whole.run(x), regauge.run_stream(streamed(whole, "chunk=4,padding=signal"), x)
        assert got.shape[-1] == 64 - late
        inner = slice(2, min(got.shape[-1], wanted.shape[-1]) - 1)
        assert (wanted[..., inner] - got[..., inner]).abs().max() < 1e-12


class Averaged(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.position


@pytest.mark.parametrize(
    ("model", "chunk", "message"),
    [
        (Averaged(), 4, "mean = mean cannot go frame by frame: for the axis of frames it is reduced"),
        (Positioned(), 4, "combines frames with %position: f32.4,32., which differs from frame to frame"),
        (
            nn.Conv1d(4, 4, 3, stride=2),
            3,
            "takes one of 2 frames, but a step has 3: let chunk be a multiple of all strides",
        ),
        (nn.Linear(32, 8), 4, "for the axis of frames it is summed over"),
    ],
)
def test_what_has_no_stream_is_refused(model: nn.Module, chunk: int, message: str) -> None:
    graph = regauge.capture(model.eval(), (torch.randn(2, 4, 32),))
    with pytest.raises(PassError, match=message):
        streamed(graph, f"chunk={chunk}")


def test_signals_are_whole_steps() -> None:
    graph = regauge.capture(Valid().eval(), (torch.randn(1, 4, 48),))
    with pytest.raises(GraphError, match="a multiple of 4 frames"):
        regauge.run_stream(streamed(graph, "chunk=4"), torch.randn(1, 4, 30))
    with pytest.raises(GraphError, match="make it with the pass stream"):
        regauge.run_stream(graph, torch.randn(1, 4, 48))


@st.composite
def networks(draw: Any) -> tuple[Graph, int]:
    """Causal layers, then layers without zeros, shortcuts cut anywhere; and the product of all strides."""
    graph = Graph("random")
    build = Builder(graph)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    value: Value = build.input("x", (2, 3, 216), torch.float64)
    strides = 1

    def conv(x: Value, kernel: int, **options: Any) -> Value:
        drawn = torch.randn(3, 3, kernel, generator=generator, dtype=torch.float64) / (3 * kernel) ** 0.5
        weight = build.parameter(build.unique("weight"), drawn)
        bias = build.parameter(build.unique("bias"), torch.randn(3, generator=generator, dtype=torch.float64))
        return build.conv(x, weight, bias, **options)

    causal = draw(st.integers(0, 3))
    for place in range(draw(st.integers(1, 6))):
        kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        stride = draw(st.sampled_from([1, 1, 2, 3])) if strides < 6 else 1
        reach = (kernel - 1) * dilation
        kind = draw(st.sampled_from(["conv", "conv", "pool", "shortcut", "sigmoid", "relu"]))
        if kind in ("sigmoid", "relu"):
            value = build(kind, value)
        elif place < causal:
            padded = build.pad(value, pads=((0, 0), (0, 0), (reach, 0)))
            made = conv(padded, kernel, dilation=(dilation,), stride=(stride,))
            beside = conv(value, 1, stride=(stride,)) if kind == "shortcut" else None
            value, strides = made if beside is None else build.add(made, beside), strides * stride
        elif kind == "pool":
            value, strides = build.max_pool(value, kernel_size=(kernel,), stride=(stride,)), strides * stride
        elif kind == "conv":
            value, strides = conv(value, kernel, dilation=(dilation,), stride=(stride,)), strides * stride
        else:
            start, size = draw(st.integers(0, reach)), int(value.shape[2]) - reach
            beside = build.slice(value, dim=2, start=start, end=start + size, step=1)
            value = build.add(conv(value, kernel, dilation=(dilation,)), beside)
    graph.outputs = [value if value.producer is not None else build.relu(value)]
    return graph, strides


@given(networks(), st.integers(1, 3))
@settings(max_examples=40)
def test_random_networks(drawn: tuple[Graph, int], steps: int) -> None:
    graph, strides = drawn
    x = torch.randn(2, 3, 216, dtype=torch.float64)
    chunk = next(c for c in range(strides * steps, 217) if 216 % c == 0 and c % strides == 0)
    made = streamed(graph, f"chunk={chunk}")
    assert differences(graph, made, x, most_late=12)[0] < 1e-10
