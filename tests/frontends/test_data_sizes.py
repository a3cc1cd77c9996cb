"""Sizes that data decides: hits of a mask, pieces of computed sizes, numbers read off tensors; torch.vmap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from regauge.backends.torch_module.runtime import source_of
from regauge.frontends.capture import capture
from regauge.ir.graph import Graph, Parameter
from regauge.ir.running.interpret import run
from regauge.optimize import optimize

Inputs = tuple[torch.Tensor, ...]


class Network(nn.Module):
    """``first`` to 16 hidden units, a function of the module and its inputs, and two layers for it to use."""

    def __init__(self, function: Callable[..., Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.experts = nn.Parameter(torch.randn(3, 16, 16))
        self.inner = inner
        self.function = function

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> Any:
        return self.function(self, x, n)


class Inner(nn.Module):
    """A module whose own results show the sizes it needs; ``function`` gets its layer and what it was given."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.function = function

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(self.layer, *given)
        return result


def example() -> Inputs:
    return torch.randn(6, 8), torch.tensor([1, 2, 3])


def other() -> Inputs:
    return torch.randn(6, 8), torch.tensor([3, 0, 3])


def checked(model: nn.Module) -> tuple[Graph, nn.Module]:
    """The graph and the emitted module, which give what the model gives, also where data decides otherwise."""
    model.eval()
    graph = capture(model, example(), verify=False)
    emitted = graph.to_torch()
    for inputs in (example(), other()):
        with torch.no_grad():
            expected = model(*inputs)
        torch.testing.assert_close(emitted(*inputs), expected)
        expected = expected if isinstance(expected, tuple) else (expected,)
        torch.testing.assert_close(tuple(run(graph, inputs)), expected)
    return graph, emitted


def hidden_left(graph: Graph) -> int:
    """How many of the 16 hidden units are left at a ratio of a half."""
    small = optimize(graph, "prune{ratio=0.5}")
    value = next(parameter for parameter in small.all_parameters() if parameter.name == "first.weight")
    assert isinstance(value, Parameter)
    small.to_torch()(*other())
    return int(value.shape[0])


def mixture(model: Network, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    parts = model.first(x).split(n.tolist(), dim=0)
    return model.second(torch.cat([nn.functional.linear(p, model.experts[i]) for i, p in enumerate(parts)]))


def test_pieces_of_computed_sizes_leave_the_other_axes_free() -> None:
    graph, _ = checked(Network(mixture))
    assert [node.op for node in graph.nodes].count("split_computed") == 1
    assert not any(node.op == "torch_call" for node in graph.nodes)
    assert hidden_left(graph) == 8


def masked(model: Network, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return model.second(model.first(x)[x[:, 0] > 0].relu())


def masked_inside(model: Network, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = model.first(x).reshape(2, 3, 16)
    return model.second(h[:, x[:3, 0] > 0] * 2), model.second(h[x[:, 1].reshape(2, 3) > 0])


@pytest.mark.parametrize("function", [masked, masked_inside])
def test_a_mask_leaves_the_other_axes_free(function: Callable[..., Any]) -> None:
    graph, _ = checked(Network(function))
    assert any(node.op == "nonzero" for node in graph.nodes)
    assert hidden_left(graph) == 8


def with_own_hits(layer: nn.Module, h: torch.Tensor) -> torch.Tensor:
    hits = h[h[:, 0] > 0]
    return layer(hits).reshape(hits.shape[0], 4, 4).flatten(1) + torch.ones(hits.shape[0], 16)


def test_a_size_is_read_off_an_earlier_result_of_the_same_module() -> None:
    model = Network(lambda m, x, n: m.second(m.inner(m.first(x))), Inner(with_own_hits))
    _, emitted = checked(model)
    assert "self.inner(x)" in source_of(emitted)  # no size is passed in as a number


def with_foreign_size(layer: nn.Module, h: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    hits = h[h[:, 0] > 0]
    return layer(hits).reshape(hits.shape[0], 4, 4).flatten(1) + columns.sum() * columns.shape[0]


def test_sizes_from_inside_and_from_outside_meet_in_one_module() -> None:
    def function(m: Network, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return m.second(m.inner(m.first(x), x[x[:, 1] > 0][:, 0]))

    checked(Network(function, Inner(with_foreign_size)))


def up_to(model: Network, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.second(model.first(x)), (torch.arange(n.max()) < n[:, None]).float()


def arithmetic(model: Network, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    longest = n.max().item()
    torch._check(longest >= 2)
    return model.second(model.first(x)), torch.zeros(2, (7 + longest * 4 - 1) // 2 % 5 + 1)


@pytest.mark.parametrize("function", [up_to, arithmetic])
def test_numbers_read_off_a_tensor_are_sizes(function: Callable[..., Any]) -> None:
    graph, emitted = checked(Network(function))
    assert ".item()" in source_of(emitted)
    assert hidden_left(graph) == 8


def attention(m: Network, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    i = torch.arange(x.shape[0])
    mask = torch.vmap(lambda q: torch.vmap(lambda k: k <= q)(i))(i)
    h = m.first(x).relu()
    return m.second(torch.softmax((h @ h.T).masked_fill(~mask, -1e9), -1) @ h)


def written_attention(m: Network, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.mul_(2)
    return attention(m, x, n)


@pytest.mark.parametrize("function", [attention, written_attention])
def test_functions_mapped_by_vmap_are_decomposed(function: Callable[..., Any]) -> None:
    graph, _ = checked(Network(function))
    assert hidden_left(graph) == 8
