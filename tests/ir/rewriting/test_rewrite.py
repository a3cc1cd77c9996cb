"""The rewrite engine: patterns, matches and near misses, the driver, and proofs of rules."""

import pytest
import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.errors import EquivalenceError, PatternError
from regauge.ir.graph import Graph
from regauge.ir.rewriting.equivalence import prove_rule
from regauge.ir.rewriting.matcher import Match, Miss, is_number, match, may_match, number_of
from regauge.ir.rewriting.pattern_instances import Weight
from regauge.ir.rewriting.patterns import parse_pattern
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, refuse, rewrite_graph
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol
from regauge.ir.verify import verify

RELU_TWICE = RewriteRule("relu-twice", lambda op, x: op.relu(op.relu(x)), lambda build, x: build.relu(x))


def chain(length: int) -> Graph:
    graph = Graph()
    build = Builder(graph)
    value = build.input("x", (2, 3), torch.float64)
    for _ in range(length):
        value = build.relu(value)
    graph.outputs = [value]
    return graph


def test_a_rule_is_applied_until_it_fits_no_more_and_names_stay() -> None:
    graph = chain(50)
    name = graph.outputs[0].name  # type: ignore[union-attr]
    log = rewrite_graph(graph, RuleSet([RELU_TWICE]))
    assert log.counts == {"relu-twice": 49} and len(graph) == 1
    assert graph.outputs[0].name == name  # type: ignore[union-attr]
    assert graph.nodes[0].metadata["regauge.added_by"] == "relu-twice"
    verify(graph)


def test_what_something_else_reads_is_a_near_miss() -> None:
    graph = chain(2)
    graph.outputs.append(graph.nodes[0].output)
    log = rewrite_graph(graph, RuleSet([RELU_TWICE]))
    assert not log.total and str(log.misses["relu-twice"]) == (
        "relu = relu: an output of the graph reads it too (after 2 matching nodes)"
    )


def test_shared_rules_leave_what_others_read() -> None:
    graph = chain(2)
    graph.outputs.append(graph.nodes[0].output)
    shared = RewriteRule("relu-twice", RELU_TWICE.pattern_function, RELU_TWICE.replacement, shared=True)
    assert rewrite_graph(graph, RuleSet([shared])).total == 1
    assert len(graph) == 2 and not any(
        v.producer.op == "relu" for n in graph.nodes for _, v in n.operands() if v.producer
    )


def gated() -> Graph:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    graph.outputs = [build.mul(build.sigmoid(x), x), build.mul(x, build.sigmoid(x))]
    return graph


def test_commutative_operators_match_in_both_orders() -> None:
    rule = RewriteRule("silu", lambda op, x: op.mul(x, op.sigmoid(x)), lambda build, x: build.silu(x))
    graph = gated()
    expected = run(graph, [torch.arange(6.0).reshape(2, 3).double()])
    assert rewrite_graph(graph, RuleSet([rule])).total == 2
    assert [node.op for node in graph.nodes] == ["silu", "silu"]
    for a, b in zip(run(graph, [torch.arange(6.0).reshape(2, 3).double()]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_pattern_with_two_roots_is_found_through_what_they_share() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4), torch.float64)
    a, b = (build.parameter(name, randn(3, 4).double()) for name in "ab")
    graph.outputs = [build.relu(build.linear(x, a)), build.linear(x, b)]
    both = RewriteRule(
        "merge",
        lambda op, x, a, b: (op.linear(x, a), op.linear(x, b)),
        lambda build, x, a, b: build.split(
            build.linear(x, build.computed("ab", lambda a, b: torch.cat([a, b]), a, b, shape=(6, 4))),
            sizes=(3, 3),
            dim=1,
        ),
    )
    expected = run(graph, [torch.ones(2, 4).double()])
    assert rewrite_graph(graph, RuleSet([both])).total == 1
    assert sorted(node.op for node in graph.nodes) == ["linear", "relu", "split"]
    assert list(graph.parameters) == ["ab"]
    for one, other in zip(run(graph, [torch.ones(2, 4).double()]), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_attributes_that_are_not_written_have_their_default() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (1, 3, 8, 8), torch.float64)
    w = build.parameter("w", randn(4, 3, 3, 3).double())
    graph.outputs = [build.conv(x, w, stride=(2, 2), padding=(1, 1), dilation=(1, 1))]
    strict = parse_pattern(lambda op, x, w: op.conv(x, w, stride=(2, 2), padding=(0, 0), dilation=(1, 1)))
    found = match(strict, graph.nodes[0])
    assert isinstance(found, Miss) and found.reason == "its padding is (1, 1), not (0, 0)"
    free = parse_pattern(lambda op, x, w, p: op.conv(x, w, stride=..., padding=p, dilation=..., name="conv"))
    matched = match(free, graph.nodes[0])
    assert isinstance(matched, Match) and matched["p"] == (1, 1) and matched["conv"] is graph.nodes[0]


def test_a_malformed_pattern_says_so() -> None:
    with pytest.raises(PatternError, match="relu has no attribute 'dim'"):
        parse_pattern(lambda op, x: op.relu(x, dim=1))
    with pytest.raises(PatternError, match="softmax needs the attribute 'dim': give a value, a variable or ..."):
        parse_pattern(lambda op, x: op.softmax(x))
    with pytest.raises(PatternError, match="return a call"):
        parse_pattern(lambda op, x: x)
    with pytest.raises(PatternError, match="shares nothing"):
        parse_pattern(lambda op, x, y: (op.relu(x), op.relu(y)))


def test_a_refusal_leaves_no_trace() -> None:
    graph = chain(2)
    text = str(graph)

    def no(build: Builder, x: object) -> object:
        build.constant(torch.ones(3))
        build.relu(x)  # type: ignore[arg-type]
        return refuse("not today")

    log = rewrite_graph(graph, RuleSet([RewriteRule("no", RELU_TWICE.pattern_function, no)]))
    assert log.misses["no"].refused and log.misses["no"].reason == "not today"
    assert str(graph) == text


def test_a_weight_with_another_reader_keeps_its_name() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    w = build.parameter("w", randn(3, 3).double())
    graph.outputs = [build.mul(build.linear(x, w), 2.0), build.linear(x, w)]
    fold = RewriteRule(
        "double",
        lambda op, x, w: op.mul(op.linear(x, w), 2.0),
        lambda build, x, w: build.linear(x, build.folded(w, lambda t: 2 * t)),
    )
    assert rewrite_graph(graph, RuleSet([fold])).total == 1
    assert list(graph.parameters) == ["w", "w_folded"] and graph.parameters["w"] is w


def test_a_wrong_rule_is_refuted_and_one_that_never_fires_too() -> None:
    wrong = RewriteRule(
        "wrong", lambda op, x, w: op.relu(op.linear(x, w)), lambda build, x, w: build.linear(x, w),
        samples=lambda: [{"x": randn(9, 3).double(), "w": Weight(randn(9, 3).double())}],
    )  # fmt: skip
    with pytest.raises(EquivalenceError, match="rule wrong, sample 0: the results differ"):
        prove_rule(wrong)
    idle = RewriteRule(
        "idle", RELU_TWICE.pattern_function, lambda build, x: refuse("never"), samples=lambda: [{"x": randn(2)}]
    )
    with pytest.raises(EquivalenceError, match="does not fire: .*never"):
        prove_rule(idle)


def test_what_proofs_are_worth() -> None:
    """Moving a reshape over any function of one index; a distributive law; and relu(relu(x)), true of relu only."""
    moved = RewriteRule(
        "move", lambda op, x, s: op.gelu(op.reshape(x, shape=s), attributes=...),
        lambda build, x, s: build.reshape(build.gelu(x), shape=s),
        samples=lambda: [{"x": randn(2, 6).double(), "s": (3, 4)}],
    )  # fmt: skip
    distributed = RewriteRule(
        "distribute", lambda op, x, y, z: op.add(op.mul(x, z), op.mul(y, z)),
        lambda build, x, y, z: build.mul(build.add(x, y), z),
        samples=lambda: [{name: randn(4, 5).double() for name in "xyz"}],
    )  # fmt: skip
    relu = RewriteRule(
        "relu", RELU_TWICE.pattern_function, RELU_TWICE.replacement, samples=lambda: [{"x": randn(5).double()}]
    )
    assert [prove_rule(rule) for rule in (moved, distributed, relu)] == [
        ["any function"],
        ["any function"],
        ["integers"],
    ]


def test_any_number_of_operands_and_every_result_of_a_call() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 6), torch.float64)
    parts = build.split(x, sizes=(1, 2, 3), dim=1)
    graph.outputs = [build.relu(parts[0]), build.relu(parts[2])]
    slices = RewriteRule(
        "slices",
        lambda op, x, s: op.split(x, sizes=s, dim=1).every_result(),
        lambda build, x, s, match: [
            None if match.unread(v) else build.slice(x, dim=1, start=sum(s[:i]), end=sum(s[: i + 1]))
            for i, v in enumerate(match.roots)
        ],
    )
    expected = run(graph, [torch.arange(12.0).reshape(2, 6).double()])
    assert rewrite_graph(graph, RuleSet([slices])).total == 1
    assert [node.op for node in graph.nodes] == ["slice", "relu", "slice", "relu"]
    for one, other in zip(run(graph, [torch.arange(12.0).reshape(2, 6).double()]), expected, strict=True):
        torch.testing.assert_close(one, other)
    joined = parse_pattern(lambda op, x: op.concat(op.relu(x), ..., dim=..., name="concat"))
    build.concat(graph.outputs[0], graph.outputs[1], dim=1)  # type: ignore[arg-type]
    assert isinstance(match(joined, graph.nodes[-1]), Match)


def test_outputs_do_not_become_inputs_or_one_another() -> None:
    drop = RewriteRule("drop", lambda op, x: op.neg(op.neg(x)), lambda build, x: x)
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2,), torch.float64)
    y = build.relu(x)
    graph.outputs = [build.neg(build.neg(x)), y, build.neg(build.neg(y))]
    log = rewrite_graph(graph, RuleSet([drop]))
    assert not log.total and log.misses["drop"].reason == "neg_1 is an output, and would be the same value as x"
    assert rewrite_graph(graph, RuleSet([drop]), aliases=True).total == 2


def test_sizes_that_cannot_be_compared_refuse_a_rewrite() -> None:
    graph = Graph()
    build = Builder(graph)
    x, y = build.input("x", (symbol("a"), 3), torch.float64), build.input("y", (symbol("b"), 3), torch.float64)
    graph.outputs = [build.tanh(build("maximum", x, y, results=[((symbol("a"), 3), torch.float64)]))]
    swap = RewriteRule("swap", lambda op, x, y: op.tanh(op.maximum(x, y)), lambda build, x, y: build.tanh(y))
    log = rewrite_graph(graph, RuleSet([swap]))
    assert (
        log.misses["swap"].reason == "the sizes of %tanh_1: f64[b,3] cannot be compared with those of %tanh: f64[a,3]"
    )
    assert [node.op for node in graph.nodes] == ["maximum", "tanh"]


def test_samples_may_choose_the_first_operator_and_must_reach_all() -> None:
    """A scale of a linear map or of a matmul: each needs its own weight."""
    samples = [{"x": randn(2, 3).double(), "w": Weight(randn(4, 3).double()), "map.op": "linear"}]
    rule = RewriteRule(
        "zero", lambda op, x, w: op.any_of(("linear", "matmul"), op.mul(x, 1.0), w, None, name="map"),
        lambda build, x, w, map: build(map.op, x, w), samples=lambda: samples,
    )  # fmt: skip
    with pytest.raises(EquivalenceError, match="rule zero has no sample for matmul: give one"):
        prove_rule(rule)
    samples.append({"x": randn(2, 3).double(), "w": Weight(randn(3, 4).double()), "map.op": "matmul"})
    assert len(prove_rule(rule)) == 2


def squares(spelling: str, *, read_twice: bool = False) -> Graph:
    """relu(x * x) or relu(x ** 2), and dropout(relu(...)) where that is asked for."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    square = build.mul(x, x) if spelling == "mul" else build.pow(x, 2)
    root = build.dropout(build.relu(square)) if spelling == "dropout" else build.relu(square)
    graph.outputs = [root, square] if read_twice else [root]
    return graph


SQUARE = RewriteRule(
    "square",
    lambda op, x: op.either(
        op.relu(op.either(op.mul(x, x), op.pow(x, 2))), op.dropout(op.relu(op.pow(x, 2)), p=..., name="drop")
    ),
    lambda build, x, drop: build.mul(x, x),
    samples=lambda: [{"x": randn(2, 3).double(), "drop.p": 0.5}],
)


@pytest.mark.parametrize("spelling", ["mul", "pow", "dropout"])
def test_alternatives_are_tried_in_turn_at_the_root_too(spelling: str) -> None:
    graph = squares(spelling)
    rules = RuleSet([SQUARE])
    assert {op: [r.name for r in found] for op, found in rules.by_operator.items()} == {
        "relu": ["square"],
        "dropout": ["square"],
    }
    assert rewrite_graph(graph, rules).total == 1
    assert [node.op for node in graph.nodes][0] == "mul" and len(graph) == (2 if spelling == "dropout" else 1)


def test_what_something_else_reads_is_a_near_miss_in_any_alternative() -> None:
    log = rewrite_graph(squares("pow", read_twice=True), RuleSet([SQUARE]))
    assert not log.total and log.misses["square"].reason == "an output of the graph reads it too"


def test_a_rule_is_proved_in_all_its_spellings_or_in_those_a_sample_names() -> None:
    assert len(prove_rule(SQUARE)) == 3
    wrong = RewriteRule(
        "wrong", lambda op, x: op.relu(op.either(op.mul(x, x), op.pow(x, 3), name="power")),
        lambda build, x: build.mul(x, x), samples=lambda: [{"x": randn(9).double()}],
    )  # fmt: skip
    with pytest.raises(EquivalenceError, match="rule wrong, sample 0, spelling relu.*: the results differ"):
        prove_rule(wrong)
    named = RewriteRule(
        "named", wrong.pattern_function, wrong.replacement, samples=lambda: [{"x": randn(9).double(), "power": 0}]
    )
    assert len(prove_rule(named)) == 1


def test_numbers_are_read_from_constants_and_from_single_entries_of_files() -> None:
    graph = Graph()
    build = Builder(graph)
    trained = build.parameter("w", torch.ones(1))
    assert number_of(build.constant(torch.full((2, 3), 0.5))) == 0.5 and number_of(2) == 2
    assert number_of(build.constant(torch.tensor([0.5, 1.0]))) is None and number_of(trained) is None
    entry = build.constant(torch.full((1,), 4.0))
    assert (
        number_of(build.sqrt(entry)) == 2.0 and number_of(build.add(build.input("x", (1,), torch.float32), 1)) is None
    )
    size = symbol("n")
    assert (
        number_of(build.mul(entry, size)) is None
        and number_of(build.full(shape=(), value=size, dtype=torch.int64)) is None
    )
    drawn = build.dropout(entry, p=0.5, training=True)
    assert number_of(build.mul(drawn, 2)) is None
    trained.origin = "an initializer"
    assert number_of(trained) == 1.0 and is_number(trained, 1)


def test_a_rule_that_fits_its_own_result_is_stopped() -> None:
    graph = chain(3)
    again = RewriteRule("again", lambda op, x: op.relu(x), lambda build, x: build.relu(build.abs(x)))
    with pytest.raises(PatternError, match="rule again was applied 1060 times to a graph of 3 nodes: its replacement"):
        rewrite_graph(graph, RuleSet([again]))


def test_the_builder_of_a_replacement_may_have_any_name() -> None:
    graph = chain(2)
    rule = RewriteRule("relu-twice", RELU_TWICE.pattern_function, lambda b, x: b.relu(x))
    assert rewrite_graph(graph, RuleSet([rule])).total == 1
    strange = RewriteRule("strange", RELU_TWICE.pattern_function, lambda b, y: b.relu(y))
    with pytest.raises(PatternError, match="rule strange: 'y' is no variable and no node of its pattern, which has x"):
        rewrite_graph(chain(2), RuleSet([strange]))


def test_a_pattern_with_too_many_operands_is_refused() -> None:
    with pytest.raises(PatternError, match=r"mul takes 2 operands \(x, y\), got 3"):
        parse_pattern(lambda op, x: op.mul(x, op.sigmoid(x), x))


def test_a_rule_that_is_passed_over_at_a_look_is_told_as_before() -> None:
    """Its inner operator is not there: the reason is that of the full match, found once for all such nodes."""
    graph = chain(3)
    rule = RewriteRule("neg", lambda op, x: op.relu(op.neg(x)), lambda build, x: build.relu(x))
    first, *rest = graph.nodes
    assert not any(may_match(rule.pattern, node) for node in graph.nodes)
    log = rewrite_graph(graph, RuleSet([rule]))
    assert not log.total and log.misses["neg"].matched == 1
    expected = match(rule.pattern, first)
    assert isinstance(expected, Miss) and str(log.misses["neg"]) == str(expected)


def test_a_look_takes_both_orders_of_a_commutative_operator_and_every_alternative() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    left, right, neither = build.add(build.neg(x), x), build.add(x, build.tanh(x)), build.sub(x, build.neg(x))
    graph.outputs = [left, right, neither]
    pattern = parse_pattern(lambda op, x, y: op.add(op.either(op.neg(x), op.tanh(x)), y))
    assert [may_match(pattern, value.producer) for value in (left, right, neither)] == [True, True, False]
    ordered = parse_pattern(lambda op, x, y: op.sub(op.neg(x), y))
    assert not may_match(ordered, neither.producer)
    assert may_match(parse_pattern(lambda op, x, y: op.sub(x, y)), neither.producer)
