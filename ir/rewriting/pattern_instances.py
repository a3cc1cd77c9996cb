"""Graphs that are a pattern: what a rule's samples say of its variables, attributes and alternatives, built as nodes.

A sample gives operands and attributes by the names of variables, and ``"node.attribute"`` or ``"node.op"`` where the
pattern leaves a choice; for ``...`` among the operands ``"node.operands"``, a function of the builder and of those
operands that it names. A variable may stand for a computed value: it is given as such a function, of other operands
that the sample has under names of their own. Plain tensors become inputs of the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.rewriting.patterns import EVERY, CallPattern, Either, Pattern, ResultPattern, Variable, call_of

Choices: TypeAlias = dict[Either, int]
"""Which option of each alternative of a pattern is taken."""


@dataclass(frozen=True)
class Weight:
    """A sample's operand that is a trained parameter of the graph."""

    tensor: torch.Tensor


@dataclass(frozen=True)
class Constant:
    """A sample's operand that is a constant of the graph."""

    tensor: torch.Tensor


def choices(pattern: Pattern, sample: Mapping[str, Any]) -> Iterator[Choices]:
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


def resolved(part: Any, taken: Choices) -> Any:
    return resolved(part.options[taken[part]], taken) if isinstance(part, Either) else part


def spelled(part: Any, taken: Choices) -> str:
    """A pattern with the alternatives that are taken, for messages."""
    part = resolved(part, taken)
    if not isinstance(part, CallPattern | ResultPattern):
        return str(part)
    return f"{'|'.join(call_of(part).ops)}({', '.join(spelled(operand, taken) for operand in call_of(part).operands)})"


def instance(pattern: Pattern, sample: Mapping[str, Any], op: str, taken: Choices) -> Graph:
    """A graph that is the pattern, with ``op`` for its anchor and the alternatives ``taken``."""
    making = _Instance(pattern, sample, op, taken)
    making.graph.outputs = [value for root in pattern.roots for value in making.results(resolved(root, taken))]
    return making.graph


class _Instance:
    def __init__(self, pattern: Pattern, sample: Mapping[str, Any], op: str, taken: Choices) -> None:
        self.sample, self.op, self.taken = sample, op, taken
        self.graph = Graph("sample", metadata={"sample_inputs": {}})
        self.build = Builder(self.graph)
        self.anchor = call_of(resolved(pattern.roots[0], taken))
        self.made: dict[CallPattern, Any] = {}
        variables = {name: given for name, given in sample.items() if "." not in name}
        self.values = {n: self._given(n, given) for n, given in variables.items() if not inspect.isfunction(given)}
        self.values.update({n: self._called(given) for n, given in variables.items() if inspect.isfunction(given)})

    def _given(self, name: str, given: Any) -> Any:
        if isinstance(given, Weight):
            return self.build.parameter(f"{name}.weight", given.tensor)
        if isinstance(given, Constant):
            return self.build.constant(given.tensor, name)
        if isinstance(given, torch.Tensor):
            self.graph.metadata["sample_inputs"][name] = given
            return self.build.input(name, tuple(given.shape), given.dtype)
        return given

    def _called(self, function: Any) -> Any:
        """``function(build, ...)`` with those values that it names."""
        wanted = [name for name in inspect.signature(function).parameters if name in self.values]
        return function(self.build, **{name: self.values[name] for name in wanted})

    def results(self, root: CallPattern | ResultPattern) -> list[Any]:
        found = self._call(call_of(root)) if root.index == EVERY else self._operand(root)
        return list(found) if isinstance(found, tuple) else [found]

    def _operand(self, part: Any) -> Any:
        part = resolved(part, self.taken)
        if isinstance(part, Variable):
            return self.values.get(part.name)
        if isinstance(part, CallPattern | ResultPattern):
            result = self._call(call_of(part))
            return result[part.index] if isinstance(result, tuple) else result
        return part

    def _call(self, call: CallPattern) -> Any:
        if call not in self.made:
            chosen = self.op if call is self.anchor else self.sample.get(f"{call.name}.op", call.ops[0])
            more = self.sample.get(f"{call.name}.operands") if call.variadic else None
            operands = [*map(self._operand, call.fixed), *(() if more is None else self._called(more))]
            self.made[call] = self.build(chosen, *operands, **self._attributes(call))
        return self.made[call]

    def _attributes(self, call: CallPattern) -> dict[str, Any]:
        """What the pattern says, what the sample says where the pattern leaves it open, and nothing else."""
        found = dict(self.sample.get(f"{call.name}.attributes", {})) if call.free else {}
        for name, wanted in call.attributes.items():
            key = wanted.name if isinstance(wanted, Variable) else f"{call.name}.{name}"
            if isinstance(wanted, Variable) or (wanted is ... and key in self.sample):
                found[name] = self.sample[key]
            elif wanted is not ...:
                found[name] = wanted
        return found
