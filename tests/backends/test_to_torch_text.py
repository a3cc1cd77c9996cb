"""The text of emitted source: sizes, folded bodies, broken lines, shared classes."""

import ast

import pytest
import sympy
import torch

from regauge.backends.to_torch import to_torch
from regauge.backends.torch_module.arguments import tidy_calls
from regauge.backends.torch_module.literals import literal
from regauge.backends.torch_module.runtime import source_of
from regauge.backends.torch_module.sizes import size_expression
from regauge.backends.torch_module.source import WIDTH, broken, double_quoted
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import parse_size


@pytest.mark.parametrize(
    "text",
    ["a", "a + 1", "1 - a", "2*a*b - b", "(a - 1)//2 + 1", "a//4*3", "Min(a, 7) + Max(b, a)", "Mod(a, 3)", "a**2"],
)
def test_size_expressions_compute_their_value(text):
    size = parse_size(text)
    code = ast.unparse(size_expression(size, lambda symbol: ast.Name(str(symbol))))
    for a, b in ((1, 1), (5, 2), (12, 7)):
        bound = size.subs({symbol: {"a": a, "b": b}[str(symbol)] for symbol in size.free_symbols})
        assert eval(code, {"a": a, "b": b}) == int(bound), code


def test_ceiling_is_written_with_floor_division():
    code = ast.unparse(size_expression(sympy.ceiling(parse_size("a") / 4), lambda symbol: ast.Name(str(symbol))))
    assert [eval(code, {"a": a}) for a in (4, 5, 8)] == [1, 2, 2]


@pytest.mark.parametrize(
    "value", [1, -2, 0.5, -1e-6, float("inf"), -float("inf"), (1, (2,)), "x", True, None, torch.int8, 1j]
)
def test_literals_read_back(value):
    import math

    assert eval(ast.unparse(literal(value)), {"torch": torch, "math": math}) == value


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("F.conv2d(x, w, None, (2, 2), (1, 1), (1, 1), 4)", "F.conv2d(x, w, stride=(2, 2), padding=(1, 1), groups=4)"),
        ("x.reshape((2, 3))", "x.reshape(2, 3)"),
        ("x[(slice(None, None, None), slice(0, 8, 1))]", "x[:, :8]"),
        ("F.layer_norm(x, (4,), None, None, 1e-05)", "F.layer_norm(x, (4,))"),
        ("torch.mean(x, (2, 3), False)", "torch.mean(x, (2, 3))"),
        ("torch.sum(x, (1,), True)", "torch.sum(x, (1,), keepdim=True)"),
    ],
)
def test_calls_are_tidied(before, after):
    assert ast.unparse(tidy_calls(ast.parse(before, mode="eval").body)) == after


def test_long_lines_are_broken_at_their_arguments():
    text = f"x = F.something({', '.join(f'argument_number_{i}' for i in range(12))})"
    lines = broken(text, "        ")
    assert all(len(line) <= WIDTH for line in lines) and len(lines) > 2
    assert ast.unparse(ast.parse("\n".join(line[8:] for line in lines))) == text


def test_quotes_are_double_where_they_can_be():
    assert double_quoted("""f('a', 'say "x"', "b")""") == """f("a", 'say "x"', "b")"""


def test_modules_that_differ_in_numbers_share_a_class_with_parameters():
    graph = Graph(name="net")
    build = Builder(graph)
    x = build.input("x", (2, 4), torch.float32)
    for i, width in enumerate((6, 8, 5)):
        build.scope = (("", "Net"), (f"blocks.{i}", "Block"))
        x = build.relu(build.linear(x, build.parameter(f"blocks.{i}.fc.weight", torch.randn(width, x.shape[1]))))
        x = build.reshape(x, shape=(2, width, 1))
        x = build.reshape(x, shape=(2, width))
    graph.outputs = [x]
    module = to_torch(graph)
    inputs = torch.randn(2, 4)
    torch.testing.assert_close(module(inputs), run(graph, [inputs])[0])
    source = source_of(module)
    assert source.count("class Block") == 1
    assert "def __init__(self, in_features, out_features):" in source and "self.out_features" in source


def test_an_operators_own_source_is_folded_for_each_call():
    graph = Graph(name="net")
    build = Builder(graph)
    x = build.input("x", (1, 2, 5), torch.float32)
    graph.outputs = [
        build.conv(x, build.parameter("odd-name", torch.randn(3, 2, 3)), padding=(1,), stride=(1,), dilation=(1,))
    ]
    source = source_of(to_torch(graph))
    assert "F.conv1d(x, self.odd_name, padding=(1,))" in source or "F.conv1d(x, self.odd_name, padding=1)" in source


def test_a_sequential_keeps_the_forward_of_torch():
    pooled = [torch.nn.Conv2d(3, 8, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    model = torch.nn.Sequential(*pooled, torch.nn.Linear(8, 2))
    x = torch.randn(2, 3, 4, 4)
    module = to_torch(capture(model, (x,)))
    assert "def forward" not in source_of(module)
    torch.testing.assert_close(module(input=x), model(x))
    assert "def forward" in source_of(to_torch(capture(_Twice(*model), (x,))))


class _Twice(torch.nn.Sequential):
    """Its forward is not the one of nn.Sequential."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"twice": 2 * super().forward(x)}
