"""Are two graphs the same function? Proof on random integers where that can be had, float64 elsewhere.

Both graphs are run on small random integers, in float64, which holds sums and products of them exactly; so where all
intermediate values are integers, equal results are equal to the last bit, and two different polynomials agree on random
points only with a probability of about their degree over the number of points (Schwartz and Zippel). That is the
argument of Mirage (Wu et al., OSDI 2025, section 5), which uses finite fields; the integers need no kernels of their
own. Functions of one index that are no polynomials are first *uninterpreted*: any fixed scramble of integers stands for
them, the same for the same operator and attributes. What holds for a scramble holds for every function.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import EquivalenceError
from regauge.ir.graph import Graph, Node, Value, is_real
from regauge.ir.interpret import Interpreter
from regauge.ir.matcher import Miss
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.patterns import EVERY, CallPattern, Either, Pattern, ResultPattern, Variable, call_of
from regauge.ir.rewrite import RewriteRule, RuleSet, rewrite_graph
from regauge.ir.rules import broadcast_rule

Proof: TypeAlias = Literal["any function", "integers", "float64"]
"""How an equality was shown: with functions uninterpreted, on integers to the last bit, or to float64 tolerance."""

Choices: TypeAlias = dict[Either, int]
"""Which option of each alternative of a pattern is taken."""

LARGEST = 8  # integers are drawn from -LARGEST..LARGEST
TRIALS = 3
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Weight:
    """A sample's operand that is a trained parameter of the graph."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Constant:
    """A sample's operand that is a constant of the graph."""

    tensor: torch.Tensor


def prove_rule(rule: RewriteRule) -> list[Proof]:
    """Prove a rewrite rule on each of its samples; raises EquivalenceError where it does not fire or is wrong.

    A sample serves all operators that the first root may be, unless it says which one by ``"name.op"``.
    """
    if rule.samples is None:
        raise EquivalenceError(f"rule {rule.name} has no samples: give operands on which it can be tested")
    proofs: list[Proof] = []
    tried: set[str] = set()
    for number, sample in enumerate(rule.samples()):
        for taken in _choices(rule.pattern, sample):
            anchor = call_of(_resolved(rule.pattern.roots[0], taken))
            what = f"rule {rule.name}, sample {number}" + (f", spelling {_spelled(anchor, taken)}" if taken else "")
            chosen = sample.get(f"{anchor.name}.op")
            for op in anchor.ops if chosen is None else (chosen,):
                proofs.append(_prove_sample(rule, sample, op, taken, what))
                tried.add(op)
    missing = [op for anchor in rule.pattern.anchors for op in call_of(anchor).ops if op not in tried]
    if missing:
        raise EquivalenceError(f"rule {rule.name} has no sample for {missing[0]}: give one")
    return proofs


def _choices(pattern: Pattern, sample: Mapping[str, Any]) -> Iterator[Choices]:
    """Every way to take one of the alternatives of each ``either`` that is reached; a sample may fix some by name."""
    open_choices: list[Choices] = [{}]
    while open_choices:
        taken = open_choices.pop()
        undecided = next((u for root in pattern.roots for u in _undecided(root, taken)), None)
        if undecided is None:
            yield taken
            continue
        numbers = [sample[undecided.name]] if undecided.name in sample else range(len(undecided.options))
        open_choices += [{**taken, undecided: number} for number in reversed(numbers)]


def _undecided(part: Any, taken: Choices) -> Iterator[Either]:
    if isinstance(part, Either):
        if part in taken:
            yield from _undecided(part.options[taken[part]], taken)
        else:
            yield part
    elif isinstance(part, CallPattern | ResultPattern):
        for operand in call_of(part).operands:
            yield from _undecided(operand, taken)


def _resolved(part: Any, taken: Choices) -> Any:
    return _resolved(part.options[taken[part]], taken) if isinstance(part, Either) else part


def _spelled(part: Any, taken: Choices) -> str:
    """A pattern with the alternatives that are taken, for messages."""
    part = _resolved(part, taken)
    if not isinstance(part, CallPattern | ResultPattern):
        return str(part)
    return f"{'|'.join(call_of(part).ops)}({', '.join(_spelled(operand, taken) for operand in call_of(part).operands)})"


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


def instance(pattern: Pattern, sample: Mapping[str, Any], op: str, taken: Choices) -> Graph:
    """A graph that is the pattern, with ``op`` for its anchor and the alternatives ``taken``.

    Its inputs are those operands that are plain tensors.

    A sample gives operands and attributes by the names of variables, and ``"node.attribute"`` or ``"node.op"`` where
    the pattern leaves a choice; for ``...`` among the operands ``"node.operands"``, a function of the builder and of
    those operands that it names. A variable may stand for a computed value: it is given as such a function, of other
    operands that the sample has under names of their own.
    """
    graph = Graph("sample", metadata={"sample_inputs": {}})
    build = Builder(graph)
    values = {name: _operand(build, name, given) for name, given in sample.items() if _is_plain(name, given)}
    values.update({name: _called(given, build, values) for name, given in sample.items() if _is_made(name, given)})
    made: dict[CallPattern, Any] = {}
    anchor = call_of(_resolved(pattern.roots[0], taken))

    def attribute(call: CallPattern, name: str, wanted: Any) -> Any:
        if isinstance(wanted, Variable):
            return sample[wanted.name]
        return sample[f"{call.name}.{name}"] if wanted is ... else wanted

    def operand(part: Any) -> Any:
        part = _resolved(part, taken)
        if isinstance(part, Variable):
            return values.get(part.name)
        if isinstance(part, CallPattern | ResultPattern):
            call = part.call if isinstance(part, ResultPattern) else part
            result = make(call)
            return result[part.index] if isinstance(result, tuple) else result
        return part

    def results(root: CallPattern | ResultPattern) -> list[Any]:
        found = make(call_of(root)) if root.index == EVERY else operand(root)
        return list(found) if isinstance(found, tuple) else [found]

    def more(call: CallPattern) -> list[Any]:
        function = sample.get(f"{call.name}.operands")
        if not call.variadic or function is None:
            return []
        return list(_called(function, build, values))

    def make(call: CallPattern) -> Any:
        if call not in made:
            attributes = {
                name: attribute(call, name, wanted)
                for name, wanted in call.attributes.items()
                if wanted is not ... or f"{call.name}.{name}" in sample
            }
            if call.free:
                attributes.update(sample.get(f"{call.name}.attributes", {}))
            chosen = op if call is anchor else sample.get(f"{call.name}.op", call.ops[0])
            made[call] = build(chosen, *[operand(part) for part in call.fixed], *more(call), **attributes)
        return made[call]

    graph.outputs = [value for root in pattern.roots for value in results(_resolved(root, taken))]
    return graph


def _is_plain(name: str, given: Any) -> bool:
    return "." not in name and not inspect.isfunction(given)


def _is_made(name: str, given: Any) -> bool:
    return "." not in name and inspect.isfunction(given)


def _called(function: Any, build: Builder, values: Mapping[str, Any]) -> Any:
    """``function(build, ...)`` with those values that it names."""
    wanted = [name for name in inspect.signature(function).parameters if name in values]
    return function(build, **{name: values[name] for name in wanted})


def _operand(build: Builder, name: str, given: Any) -> Any:
    if isinstance(given, Weight):
        return build.parameter(f"{name}.weight", given.tensor)
    if isinstance(given, Constant):
        return build.constant(given.tensor, name)
    if isinstance(given, torch.Tensor):
        value = build.input(name, tuple(given.shape), given.dtype)
        build.graph.metadata["sample_inputs"][name] = given
        return value
    return given


class _NotWhole(Exception):
    """Some value is no integer: equality would not be exact."""


class _OnIntegers(Interpreter):
    """Runs a graph on integers held in float64; functions of one index are scrambled where asked."""

    scrambled = False

    def _run_node(self, node: Node, environment: dict[Value, Any], bindings: Mapping[Any, int]) -> tuple[Any, ...]:
        if self.scrambled and _is_function(node):
            operands = [self._read(operand, environment, bindings) for operand in node.inputs]
            return (_scramble(node, operands),)
        results = super()._run_node(node, environment, dict(bindings))
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
