"""One class for modules that differ in numbers only: the numbers that differ become its constructor's parameters.

before   class Block: nn.Linear(64, 128) ...          class Block2: nn.Linear(64, 96) ...
after    class Block: def __init__(self, out_features): ... nn.Linear(64, out_features) ...
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from regauge.backends.torch_module.code import Code

MOST_PARAMETERS = 8  # a class with more reads worse than one class each
_TOKEN = re.compile(r"""("[^"]*"|'[^']*'|[A-Za-z_]\w*)|(\d+\.\d*(?:e[-+]?\d+)?|\d+e[-+]?\d+|\d+)""")
_MODULE_NAMES = frozenset(dir(nn.Module()))  # a parameter may be kept as an attribute
_PLAIN_NAMES = {"normalized_shape": "width", "num_features": "width", "size": "size"}


@dataclass(eq=False)
class Draft:
    """The class of one module before it is shared: constructor lines and forward code, numbers in place."""

    path: str
    base: str
    init: list[str]
    code: Code | None

    @cached_property
    def text(self) -> str:
        return "\n".join([*self.init, _FORWARD, self.code.key() if self.code is not None else ""])

    @cached_property
    def numbers(self) -> list[str]:
        return [match[2] for match in _TOKEN.finditer(self.text) if match[2]]

    @property
    def skeleton(self) -> str:
        """The text without its numbers; a root shares its class with nothing."""
        name = self.code.class_name if self.code is not None else ""
        return "\n".join([self.path and "module", self.base, name, _TOKEN.sub(lambda m: m[1] or "#", self.text)])


_FORWARD = "-- forward --"
Known = Mapping[str, Sequence[str]]
"""The constructor parameters of the classes written so far."""


@dataclass
class Family:
    """Modules that share one class; ``columns`` says which numbers of the text each parameter stands for."""

    drafts: list[Draft]
    columns: dict[str, list[int]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        return list(self.columns)

    def arguments(self, draft: Draft) -> str:
        values = {name: draft.numbers[places[0]] for name, places in self.columns.items()}
        if len(values) < 3:
            return ", ".join(values.values())
        return ", ".join(f"{name}={value}" for name, value in values.items())

    def _replaced(self, text: str, start: int, prefix: str) -> str:
        """The text with the numbers that vary replaced by their parameters; ``start`` numbers came before it."""
        named = {place: prefix + name for name, places in self.columns.items() for place in places}
        place = start - 1

        def replace(match: re.Match[str]) -> str:
            nonlocal place
            if not match[2]:
                return match[0]
            place += 1
            return named.get(place, match[2])

        return _TOKEN.sub(replace, text)

    def init_lines(self) -> list[str]:
        first = self.drafts[0]
        lines, start = [], 0
        for line in first.init:
            lines.append(self._replaced(line, start, ""))
            start += _count(line)
        kept = [name for name, places in self.columns.items() if places[-1] >= start]
        return [lines[0], *(f"self.{name} = {name}" for name in kept), *lines[1:]]

    def code(self) -> Code:
        """The forward code with parameters read off the module."""
        first = self.drafts[0]
        assert first.code is not None
        if not self.columns:
            return first.code
        code = copy.copy(first.code)
        start = sum(_count(line) for line in first.init) + _count(str(len(code.arguments)))
        code.lines = []
        for line in first.code.lines:
            renamed = copy.copy(line)
            renamed.functions = []
            for text in line.functions:
                renamed.functions.append(self._replaced(text, start, "self."))
                start += _count(text)
            renamed.expression = self._replaced(line.expression, start, "self.")
            start += _count(line.expression)
            code.lines.append(renamed)
        code.returned = []
        for text in first.code.returned:
            code.returned.append(self._replaced(text, start, "self."))
            start += _count(text)
        return code


def _count(text: str) -> int:
    return sum(1 for match in _TOKEN.finditer(text) if match[2])


def families(drafts: Sequence[Draft], known: Known) -> list[Family]:
    """Drafts of one skeleton as one family with parameters, or as one family per set of numbers."""
    by_numbers: dict[tuple[str, ...], list[Draft]] = {}
    for draft in drafts:
        by_numbers.setdefault(tuple(draft.numbers), []).append(draft)
    if len(by_numbers) == 1:
        return [Family(list(drafts))]
    varying: dict[tuple[str, ...], list[int]] = {}
    for place, column in enumerate(zip(*by_numbers, strict=True)):
        if len(set(column)) > 1:
            varying.setdefault(column, []).append(place)
    if len(varying) > MOST_PARAMETERS or not _can_vary(drafts[0], varying.values()):
        return [Family(group) for group in by_numbers.values()]
    return [Family(list(drafts), _named(drafts[0], list(varying.values()), known))]


def _can_vary(draft: Draft, places: Iterable[Sequence[int]]) -> bool:
    """False where a number that varies picks a child, as in ``self.layers[0]``."""
    fixed = set()
    for place, match in enumerate(m for m in _TOKEN.finditer(draft.text) if m[2]):
        if re.search(r"self[\w.]*\[$", draft.text[: match.start()][-80:]):
            fixed.add(place)
    return not any(place in fixed for group in places for place in group)


def _named(draft: Draft, groups: list[list[int]], known: Known) -> dict[str, list[int]]:
    """A readable name per parameter, from the argument it is first given as."""
    contexts = {**_heads(draft.text), **_contexts(draft.init, known)}
    taken = _MODULE_NAMES | {name for line in draft.init for name in re.findall(r'^self\.(?:\w+\(")?(\w+)', line)}
    columns: dict[str, list[int]] = {}
    for places in groups:
        owner, argument = next((contexts[place] for place in places if place in contexts), ("", "size"))
        if contexts.get(places[1] if len(places) > 1 else -1) == (owner, argument.replace("in_", "out_")):
            argument = argument.removeprefix("in_")  # as wide out as in: channels, features
        if argument in columns and owner:
            argument = f"{owner}_{argument}"
        candidate, count = argument, 1
        while candidate in columns or candidate in taken:
            count += 1
            candidate = f"{argument}_{count}"
        columns[candidate] = places
    return columns


_SPLIT_HEADS = re.compile(r"(v__\d+__) = .*\.reshape\(.*\b(\d+), (\d+)\)\n.*\b\1\.permute\(0, 2, 1, 3\)")


def _heads(text: str) -> dict[int, tuple[str, str]]:
    """The numbers by which a class splits features into attention heads, and how they are called."""
    places = {match.start(): place for place, match in enumerate(m for m in _TOKEN.finditer(text) if m[2])}
    found = {}
    for match in _SPLIT_HEADS.finditer(text):
        found[places[match.start(2)]] = ("", "heads")
        found[places[match.start(3)]] = ("", "head_dim")
    return found


def _contexts(lines: Sequence[str], known: Known) -> dict[int, tuple[str, str]]:
    """For each number of the constructor: the child it belongs to, and the name of the argument it is given as."""
    found: dict[int, tuple[str, str]] = {}
    place = 0
    for line in lines:
        arguments = _arguments(line, known)
        target = re.match(r"self\.(\w+)", line)
        for match in _TOKEN.finditer(line):
            if match[2]:
                found[place] = (target[1] if target else "", arguments.get(match.start(), "size"))
                place += 1
    return found


def _arguments(line: str, known: Known) -> dict[int, str]:
    """The argument name of every number in a line, by its position."""
    names: dict[int, str] = {}
    for node in ast.walk(ast.parse(line)):
        if not isinstance(node, ast.Call):
            continue
        positional = _positional_names(ast.unparse(node.func), known)
        given = [(positional[i] if i < len(positional) else "size", arg) for i, arg in enumerate(node.args)]
        given += [(keyword.arg or "size", keyword.value) for keyword in node.keywords]
        for name, argument in given:
            for part in [argument, *getattr(argument, "elts", ())]:
                if isinstance(part, ast.Constant):
                    names[part.col_offset] = _PLAIN_NAMES.get(name, name)
    return names


def _positional_names(function: str, known: Known) -> list[str]:
    if function in known:
        return list(known[function])
    if function == "range":
        return ["depth"]
    layer = getattr(nn, function.removeprefix("nn."), None) if function.startswith("nn.") else None
    return list(inspect.signature(layer).parameters) if isinstance(layer, type) else []
