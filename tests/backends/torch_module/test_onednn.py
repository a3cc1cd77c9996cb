"""Emitted modules on kernels of oneDNN: the same results and names, and plain layers where the kernels cannot run."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from regauge.backends.torch_module.onednn import PackedConv2d, PackedLinear
from regauge.ir.errors import EmitError

ACTIVATIONS = {
    "relu": nn.ReLU(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(), "silu": nn.SiLU(), "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "none": nn.Identity(),
}  # fmt: skip


class Network(nn.Module):
    """Convolutions of all kinds, and products that are worth a kernel for 8 rows and more."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.deep = nn.Conv2d(64, 64, 5, padding=2, groups=64)
        self.point = nn.Conv2d(64, 128, 1)
        self.up, self.down = nn.Linear(128, 1024), nn.Linear(1024, 64, bias=False)
        self.act = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = self.act(self.point(self.act(self.deep(self.act(self.stem(x))))))
        return self.down(self.act(self.up(image.flatten(2).transpose(1, 2))))


def emitted(activation: str = "gelu") -> tuple[Network, torch.Tensor, regauge.Graph]:
    torch.manual_seed(0)
    network, x = Network(ACTIVATIONS[activation]).eval(), torch.randn(2, 3, 24, 20)
    return network, x, regauge.capture(network, (x,), dynamic={0: {0: "batch"}})


def kinds(module: nn.Module) -> dict[str, type]:
    return {name: type(part) for name, part in module.named_modules() if name}


def runs_kernels(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a run goes through kernels of oneDNN with weights laid out."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        module(x)
    return {"mkldnn._linear_pointwise.default", "mkldnn._convolution_pointwise.default"} <= seen.names


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layers_with_their_activations_give_the_same(activation: str) -> None:
    network, x, graph = emitted(activation)
    module = graph.to_torch(kernels="onednn")
    packed = {name: kind.__name__ for name, kind in kinds(module).items() if hasattr(kind, "pack")}
    linear, conv = PackedLinear.__name__, PackedConv2d.__name__
    assert packed == {"stem": conv, "deep": conv, "point": conv, "up": linear, "down": linear}
    assert module.up.activation == (None if activation == "none" else activation)
    assert module.down.activation is None
    assert list(module.state_dict()) == list(network.state_dict())
    with torch.no_grad():
        for inputs in (x, torch.randn(3, 3, 24, 20)):
            torch.testing.assert_close(module(inputs), network(inputs), rtol=1e-4, atol=1e-5)
        assert runs_kernels(module, x)


def test_changed_weights_are_laid_out_anew() -> None:
    network, x, graph = emitted()
    module = graph.to_torch(kernels="onednn")
    with torch.no_grad():
        module(x)
        for parameter in network.parameters():
            parameter.mul_(1.5)
        module.load_state_dict(network.state_dict())
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)
        module.up.weight.data = torch.zeros_like(module.up.weight)
        network.up.weight.zero_()
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_run_and_lay_out_weights_of_their_own() -> None:
    _, x, graph = emitted()
    module = graph.to_torch(kernels="onednn")
    with torch.no_grad():
        wanted = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.testing.assert_close(other(x), wanted, rtol=0, atol=0)
            other.down.weight.zero_()
            assert not other(x).any()
        torch.testing.assert_close(module(x), wanted, rtol=0, atol=0)


def test_gradients_exports_and_double_precision_take_plain_layers() -> None:
    network, x, graph = emitted()
    module = graph.to_torch(kernels="onednn")
    wanted = network(x)
    module(x).square().sum().backward()
    network(x).square().sum().backward()
    for own, other in zip(module.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), wanted, rtol=1e-4, atol=1e-5)
        assert not runs_kernels(module.double(), x.double())
        torch.testing.assert_close(module(x.double()).float(), wanted, rtol=1e-4, atol=1e-5)


def test_without_the_operators_of_torch_layers_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, graph = emitted()
    module = graph.to_torch(kernels="onednn")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    with torch.no_grad():
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)


def test_few_rows_are_left_to_torch() -> None:
    network = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU()).eval()
    x = torch.randn(1, 2048)
    module = regauge.capture(network, (x,), dynamic={0: {0: "batch"}}).to_torch(kernels="onednn")
    with torch.no_grad():
        assert torch.equal(module(x), network(x))


def test_what_is_read_twice_keeps_its_activation_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.two(x)
            return self.one(self.one(x).relu()) + y.relu() + y

    torch.manual_seed(0)
    network, x = Tied().eval(), torch.randn(512, 8)
    module = regauge.capture(network, (x,)).to_torch(kernels="onednn")
    assert kinds(module)["one"] is nn.Linear and module.two.activation is None
    with torch.no_grad():
        torch.testing.assert_close(module(x), network(x))


def test_written_source_needs_torch_alone(tmp_path: Path) -> None:
    network, x, graph = emitted()
    folder = graph.write(tmp_path / "net", kernels="onednn")
    assert "import regauge" not in (folder / "model.py").read_text()
    spec = importlib.util.spec_from_file_location("written_net", folder / "model.py")
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    module = source.load()
    with torch.no_grad():
        torch.testing.assert_close(module(x), network(x), rtol=1e-4, atol=1e-5)
        assert runs_kernels(module, x)
    with pytest.raises(EmitError, match="no kernels 'mkl'"):
        graph.to_torch(kernels="mkl")  # type: ignore[arg-type]
