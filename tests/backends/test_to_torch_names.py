"""Names no Python attribute can have: they survive as state_dict keys, and the source that holds them compiles."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from regauge.backends.torch_module.runtime import source_of
from regauge.frontends.capture import capture
from regauge.optimize import optimize


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).relu()


class Network(nn.Module):
    """Blocks in a ModuleDict, a parameter and a buffer, all under given names."""

    def __init__(self, blocks: tuple[str, ...], tensor: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: Block() for name in blocks})
        self.head = nn.Linear(8, 3)
        self.tensor = tensor
        if tensor:
            self.register_parameter(tensor, nn.Parameter(torch.randn(8)))
            self.register_buffer(f"{tensor}%", torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks.values():
            x = block(x)
        if self.tensor:
            x = x * getattr(self, self.tensor) + getattr(self, f"{self.tensor}%")
        return self.head(x)


CASES = [
    (("a-b", "c"), ""),
    (("class", "in"), ""),
    (("None", "True"), ""),
    (("1x1", "3x3"), ""),
    (("0", "2"), ""),
    (("a b", "ü"), ""),
    (('q"t', "it's", "back\\slash"), ""),
    (("weight", "super", "training_"), "torch"),
    (("a",), "scale-1"),
    (("a",), "lambda"),
    (("a",), 'sc"ale'),
    (("a",), "0"),
]


@pytest.mark.parametrize(("blocks", "tensor"), CASES)
def test_any_name_a_module_can_have_is_kept(blocks: tuple[str, ...], tensor: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = Network(blocks, tensor).eval(), torch.randn(2, 8)
    graph = capture(model, (x,))
    emitted = graph.to_torch()
    assert set(emitted.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(emitted(x), model(x))
    emitted.load_state_dict(model.state_dict())
    compile(source_of(emitted), "<emitted>", "exec")
    small = optimize(graph, "prune{ratio=0.5}").to_torch()
    assert set(small.state_dict()) == set(model.state_dict())
    assert small.get_submodule(f"blocks.{blocks[0]}").proj.weight.shape == (4, 8)
    graph.write(tmp_path / "written")
    assert (tmp_path / "written" / "model.py").exists()


def test_equal_blocks_under_odd_names_stay_modules() -> None:
    """``block1-0`` and ``block1-1``, as torchvision's RegNet calls its blocks, in a Sequential."""
    body = nn.Sequential(OrderedDict([("block1-0", Block()), ("block1-1", Block())]))
    model, x = nn.Sequential(OrderedDict([("body", body), ("head", nn.Linear(8, 3))])).eval(), torch.randn(2, 8)
    emitted = capture(model, (x,)).to_torch()
    assert list(emitted.state_dict()) == list(model.state_dict())
    assert len({type(module) for module in emitted.body.children()}) == 1  # one class for both


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("left-hand", nn.Parameter(torch.randn(4, 8)))
        self.register_parameter("right-hand", getattr(self, "left-hand"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ getattr(self, "left-hand").T @ getattr(self, "right-hand")


def test_tied_tensors_under_odd_names_stay_tied() -> None:
    model, x = Tied(), torch.randn(2, 8)
    emitted = capture(model, (x,)).to_torch()
    assert getattr(emitted, "left-hand") is getattr(emitted, "right-hand")
    assert list(emitted.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(emitted(x), model(x))


class Ordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> OrderedDict[object, torch.Tensor]:
        h = self.first(x).relu()
        keys: list[object] = ["0", "class", "a b", 3]
        return OrderedDict((key, self.second(h * (i + 1))) for i, key in enumerate(keys))


def test_an_ordered_dict_is_returned_with_whatever_keys_it_had() -> None:
    model, x = Ordered(), torch.randn(2, 8)
    result = capture(model, (x,)).to_torch()(x)
    assert type(result) is OrderedDict
    torch.testing.assert_close(dict(result), dict(model(x)))
    assert list(result) == ["0", "class", "a b", 3]
