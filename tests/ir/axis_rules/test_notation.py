"""The rule notation: what parses prints back, and what does not says where."""

import pytest

from regauge.ir.axis_rules.notation import parse_rule
from regauge.ir.errors import AxisError, RuleSyntaxError
from regauge.ir.operator import all_operators

GOOD = [
    "... i, o i, o? -> ... o",
    "n (g i) s..., (g o) i k..., (g o)? -> n (g o) t... ; window s k t ; groups = g",
    "... c..., c...?, c...? -> ... c... ; normalise c ; normalized_shape = c",
    "..., v e -> ... e ; indexed v",
    "b (a + c) -> b a, b c",
    "k, k -> ",
    "x ((a b) + c) 1 -> a b",
]


@pytest.mark.parametrize("text", GOOD)
def test_rules_print_back(text: str) -> None:
    rule = parse_rule(text)
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "reason", "column"),
    [
        ("a b", "expected '->'", 3),
        ("a -> b ; wibble a", "unknown annotation 'wibble'", 9),
        ("a... b... c... -> a", "two runs of axes at most", 15),
        ("(a b + c) -> a", "may not be mixed", 7),
        ("() -> a", "empty parentheses", 3),
        ("a & b -> a", "does not belong", 2),
        ("... whole n -> ... n", "'whole' names a role, not an axis", 4),
        ("(g scan) -> g", "'scan' names a role, not an axis", 3),
        ("a -> b ; window c", "no operand or result has the axis 'c'", 16),
        ("a -> b ; k = cc ; whole b", "k = cc: no operand or result has the axis", 13),
    ],
)
def test_faults_point_at_their_place(text: str, reason: str, column: int) -> None:
    with pytest.raises(RuleSyntaxError, match=reason) as caught:
        parse_rule(text)
    assert str(caught.value).splitlines()[-1].index("^") - 2 == column


@pytest.mark.parametrize("name", sorted(all_operators()))
def test_every_stated_rule_prints_back(name: str) -> None:
    rule = all_operators()[name].rule
    if isinstance(rule, str):
        assert parse_rule(str(parse_rule(rule))) == parse_rule(rule)


def test_a_rule_that_does_not_fit_says_what_it_wanted() -> None:
    import torch

    from regauge.ir.dims.axes import analyse
    from regauge.ir.edit import Builder
    from regauge.ir.graph import Graph

    graph = Graph()
    build = Builder(graph)
    x = build.parameter("x", torch.zeros(3))
    weight = build.parameter("w", torch.zeros(4, 2, 5))
    build("linear", x, weight, results=[((4,), torch.float32)])
    with pytest.raises(AxisError, match="operand 1 has 3 axes, but the rule .* wants 'o i'"):
        analyse(graph, strict=True)
    assert "does not fit" in graph.axes.of[x][0].pins[0].reason  # type: ignore[union-attr]
