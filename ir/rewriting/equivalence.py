"""Are two graphs the same function? Proof on random integers where that can be had, float64 elsewhere.

Both graphs are run on small random integers, in float64, which holds sums and products of them exactly; so where all
intermediate values are integers, equal results are equal to the last bit, and two different polynomials agree on random
points only with a probability of about their degree over the number of points (Schwartz and Zippel). That is the
argument of Mirage (Wu et al., OSDI 2025, section 5), which uses finite fields; the integers need no kernels of their
own. Functions of one index that are no polynomials are first *uninterpreted*: any fixed scramble of integers stands for
them, the same for the same operator and attributes. What holds for a scramble holds for every function.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch

from regauge.ir.axis_rules.rules import broadcast_rule
from regauge.ir.cost import smallest_sizes
from regauge.ir.dtypes import is_real
from regauge.ir.errors import EquivalenceError
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.rewriting.matcher import Miss
from regauge.ir.rewriting.pattern_instances import Choices, Constant, Weight, choices, instance, resolved, spelled
from regauge.ir.rewriting.patterns import call_of
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, rewrite_graph
from regauge.ir.running.interpret import Interpreter

Proof: TypeAlias = Literal["any function", "integers", "float64"]
"""How an equality was shown: with functions uninterpreted, on integers to the last bit, or to float64 tolerance."""

LARGEST = 8  # integers are drawn from -LARGEST..LARGEST
TRIALS = 3
TOLERANCE = 1e-9


def prove_rule(rule: RewriteRule) -> list[Proof]:
    """Prove a rewrite rule on each of its samples; raises EquivalenceError where it does not fire or is wrong.

    A sample serves all operators that the first root may be, unless it says which one by ``"name.op"``.
    """
    if rule.samples is None:
        raise EquivalenceError(f"rule {rule.name} has no samples: give operands on which it can be tested")
    proofs: list[Proof] = []
    tried: set[str] = set()
    for number, sample in enumerate(rule.samples()):
        for taken in choices(rule.pattern, sample):
            anchor = call_of(resolved(rule.pattern.roots[0], taken))
            what = f"rule {rule.name}, sample {number}" + (f", spelling {spelled(anchor, taken)}" if taken else "")
            chosen = sample.get(f"{anchor.name}.op")
            for op in anchor.ops if chosen is None else (chosen,):
                proofs.append(_prove_sample(rule, sample, op, taken, what))
                tried.add(op)
    missing = [op for anchor in rule.pattern.anchors for op in call_of(anchor).ops if op not in tried]
    if missing:
        raise EquivalenceError(f"rule {rule.name} has no sample for {missing[0]}: give one")
    return proofs


def _prove_sample(rule: RewriteRule, sample: Mapping[str, Any], op: str, taken: Choices, what: str) -> Proof:
    before, after, miss = _rewritten(rule, sample, op, taken)
    if after is None:
        raise EquivalenceError(f"{what}, does not fire: {miss}")
    _compare(before, after, what)
    pairs = [_rewritten(rule, _whole(sample, seed), op, taken) for seed in range(TRIALS)]
    if any(found is None for _, found, _ in pairs):
        return "float64"  # a condition on values, which integers do not meet
    for proof, scrambled in (("any function", True), ("integers", False)):
        if all(found is not None and _equal(was, found, scrambled) for was, found, _ in pairs):
            return proof  # type: ignore[return-value]
    return "float64"


def _rewritten(
    rule: RewriteRule, sample: Mapping[str, Any], op: str, taken: Choices
) -> tuple[Graph, Graph | None, Miss | None]:
    """The pattern as a graph, the graph after the rule (None where it does not fire), and the nearest miss."""
    before = instance(rule.pattern, sample, op, taken)
    after = before.copy()
    log = rewrite_graph(after, RuleSet([rule]), aliases=True)
    return before, after if log.total else None, log.misses.get(rule.name)


def _whole(sample: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The sample with small random integers for all real tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(given: Any) -> Any:
        if isinstance(given, Weight | Constant):
            return type(given)(draw(given.tensor))
        if isinstance(given, torch.Tensor) and given.is_floating_point():
            return torch.randint(-LARGEST, LARGEST + 1, given.shape, generator=generator).to(given.dtype)
        return given

    return {name: draw(given) for name, given in sample.items()}


class _NotWhole(Exception):
    """Some value is no integer: equality would not be exact."""


class _OnIntegers(Interpreter):
    """Runs a graph on integers held in float64; functions of one index are scrambled where asked."""

    scrambled = False

    def run_node(self, node: Node, environment: dict[Value, Any], bindings: Mapping[Any, int]) -> tuple[Any, ...]:
        if self.scrambled and _is_function(node):
            operands = [self.read(operand, environment, bindings) for operand in node.inputs]
            return (_scramble(node, operands),)
        results = super().run_node(node, environment, dict(bindings))
        for result in results:
            if isinstance(result, torch.Tensor) and result.is_floating_point() and not _is_whole(result):
                raise _NotWhole
        return results


def _is_function(node: Node) -> bool:
    """Whether a node is a function of one tensor, index by index, and no polynomial of it."""
    tensors = [value for _, value in node.operands()]
    return (
        node.operator.rule is broadcast_rule
        and len(tensors) == 1
        and is_real(tensors[0].dtype)
        and is_real(node.output.dtype)  # a comparison is no scramble: something chooses by it
        and symmetry_of(node) not in (Symmetry.LINEAR, Symmetry.PRODUCT, Symmetry.LAYOUT)
    )


def _scramble(node: Node, operands: list[Any]) -> torch.Tensor:
    """Integers that depend on the operand's entries, on the operator and on all else that it is given."""
    (tensor,) = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    others = [operand for operand in operands if not isinstance(operand, torch.Tensor)]
    key = zlib.crc32(repr((node.op, others, sorted(node.attributes.items()))).encode()) % 1009
    return torch.remainder((tensor + key) * (tensor + 3 * key + 1), 61) - 30


def _is_whole(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor.round()).all()) and bool((tensor.abs() < 2**50).all())


def _equal(before: Graph, after: Graph, scrambled: bool) -> bool:
    """Whether the results are equal to the last bit, all values on the way being integers."""
    try:
        results = []
        for graph in (before, after):
            interpreter = _OnIntegers(graph)
            interpreter.scrambled = scrambled
            results.append(interpreter.run(before.metadata["sample_inputs"]))
    except _NotWhole:
        return False
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def prove_equal(before: Graph, after: Graph, seed: int = 0) -> Proof:
    """Prove two graphs equal that have the same inputs and no weights; raises EquivalenceError where they differ.

    Inputs are small integers, dynamic sizes are two and a few more. Where some value is no integer, as behind a
    division by a root, results are compared to a tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    least = {symbol: max(2, low) + place for place, (symbol, (low, _)) in enumerate(before.symbols.items())}
    known = smallest_sizes(before, least)
    inputs = {}
    for value in before.inputs:
        shape = [known(size) for size in value.shape]
        inputs[value.name] = torch.randint(-LARGEST, LARGEST + 1, shape, generator=generator).double()
    for graph in (before, after):
        graph.metadata["sample_inputs"] = inputs
    if _equal(before, after, scrambled=False):
        return "integers"
    _compare(before, after, "another way")
    return "float64"


def _compare(before: Graph, after: Graph, what: str) -> None:
    inputs = before.metadata["sample_inputs"]
    for a, b in zip(Interpreter(before).run(inputs), Interpreter(after).run(inputs), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise EquivalenceError(f"{what}: a result is {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}")
        a, b = a.to(torch.complex128), b.to(torch.complex128)
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b).abs()
        scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
        error = float(difference.max()) if a.numel() else 0.0
        if not error <= TOLERANCE * (1 + scale):
            raise EquivalenceError(f"{what}: the results differ by {error:.3g}, the largest is {scale:.3g}")
