"""A user's own rule as a pass: it is named, told about, and held to its contract."""

import pytest
import torch

import regauge
from regauge.ir.errors import EquivalenceError, PatternError
from simplifying import made, ops

SILU = regauge.rewrite(lambda op, x: op.mul(x, op.sigmoid(x)), lambda build, x: build.silu(x), name="silu")


def gate(build: regauge.Builder, x: object) -> object:
    return build.add(build.mul(build.sigmoid(x), x), 0.0)


def test_a_rule_runs_beside_built_in_passes_and_is_told_about() -> None:
    graph = made(gate, x=(2, 3))
    after = regauge.optimize(graph, [SILU, "simplify"])
    assert ops(after) == ["silu"] and ops(graph) == ["sigmoid", "mul", "add"]
    assert "silu: 1" in str(after.report)
    assert [edit.by for edit in after.history] == ["silu", "simplify"]


def test_nothing_to_do_is_the_same_graph() -> None:
    graph = made(lambda build, x: build.tanh(x), x=(2, 3))
    assert SILU.call(graph, regauge.Context()) is graph


def test_a_wrong_rule_is_found_out() -> None:
    wrong = regauge.rewrite(lambda op, x: op.sigmoid(x), lambda build, x: build.tanh(x), name="wrong")
    with pytest.raises(EquivalenceError, match="wrong promises to be exact, but outputs differ"):
        regauge.optimize(made(gate, x=(2, 3)), [wrong])
    meant = regauge.rewrite(lambda op, x: op.sigmoid(x), lambda build, x: build.tanh(x), contract="approximate")
    assert ops(regauge.optimize(made(gate, x=(2, 3)), [meant])) == ["tanh", "mul", "add"]


def test_conditions_refuse_in_words() -> None:
    picky = regauge.rewrite(
        lambda op, x: op.sigmoid(x),
        lambda build, x: build.tanh(x),
        name="picky",
        where=lambda x: x.dtype == torch.float32 or f"it computes with {x.dtype}",
    )
    after = regauge.optimize(made(gate, x=(2, 3)), [picky])
    assert "picky: it computes with torch.float64 (sigmoid = sigmoid)" in str(after.report)
    shy = regauge.rewrite(lambda op, x: op.sigmoid(x), lambda build, x: regauge.refuse("not today"))
    assert "rewrite: not today" in str(regauge.optimize(made(gate, x=(2, 3)), [shy]).report)


def test_a_malformed_rule_says_so_when_it_is_made() -> None:
    with pytest.raises(PatternError, match="relu has no attribute 'dim'"):
        regauge.rewrite(lambda op, x: op.relu(x, dim=1), lambda build, x: x)
    with pytest.raises(PatternError, match="relu has no attribute 'dim'"):
        regauge.RewriteRule("r", lambda op, x: op.either(op.neg(x), op.relu(x, dim=1)), lambda build, x: x)
    with pytest.raises(PatternError, match="return a call"):
        regauge.rewrite(lambda op, x: op.either(op.relu(x), x), lambda build, x: x)
    narrower = regauge.rewrite(lambda op, x: op.sigmoid(x), lambda build, x: build.sum(x), name="narrower")
    with pytest.raises(PatternError, match="shapes and types must be the same"):
        regauge.optimize(made(gate, x=(2, 3)), [narrower])


def test_a_rule_that_fits_nowhere_says_where_it_came_nearest() -> None:
    graph = regauge.capture(torch.nn.SiLU(), (torch.randn(2, 3),))
    rule = regauge.rewrite(lambda op, x: op.silu(op.tanh(x)), lambda build, x: build.silu(x), name="near")
    report = str(regauge.optimize(graph, [rule]).report)
    assert "near: its operand %input: f32[2,3] is not computed by tanh" in report


def test_signs_in_place_of_calls_are_told_with_the_call_to_write() -> None:
    with pytest.raises(PatternError, match=r"write calls, as in op.mul\(x, 2\)"):
        regauge.rewrite(lambda op, x: x * op.sigmoid(x), lambda build, x: build.silu(x))
    own = regauge.rewrite(lambda op, x: op.relu(x), lambda build, x: x * 2, contract="approximate")
    graph = regauge.capture(torch.nn.ReLU(), (torch.randn(3),))
    with pytest.raises(PatternError, match=r"write calls, as in build.mul\(x, 2\)"):
        regauge.optimize(graph, own)


def test_a_variable_in_no_call_is_refused() -> None:
    with pytest.raises(PatternError, match="the variable z of the pattern <lambda> is in none of its calls"):
        regauge.rewrite(lambda op, x, z: op.relu(x), lambda build, x: x)


def test_a_rule_that_matches_nothing_says_so() -> None:
    own = regauge.rewrite(lambda op, x: op.gelu(x), lambda build, x: build.relu(x))
    graph = regauge.capture(torch.nn.ReLU(), (torch.randn(3),))
    assert "nothing matched" in str(regauge.optimize(graph, own).report)
