"""Pipelines as text: ``prune{ratio=0.5,exclude=[head.*]},fold-constants``, parsed and printed.

    pipeline = stage , ...          stage = name or name{option=value, ...}
    value    = number | true | false | none | word | "quoted text" | [value, ...] | {name=value, ...}

A word is anything without spaces, quotes, commas, equals signs and brackets: ``l2``, ``conv1.*:0``, ``1.2M``, ``5MB``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from regauge.ir.errors import PipelineError

_TOKEN = re.compile(r'\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>[^\s"\[\]{},=]+)|(?P<mark>[\[\]{},=]))')
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "none": None}
_MOST_NESTED = 20


class Stage(NamedTuple):
    """One stage of a pipeline text: the name of a pass and its options as written."""

    name: str
    options: dict[str, Any]


class _Token(NamedTuple):
    kind: str  # "word", "quoted", "mark" or "end"
    text: str
    position: int


def parse_pipeline(text: str) -> list[Stage]:
    """The stages of a pipeline text; raises PipelineError with the position of what is wrong under a caret."""
    return _Parser(text).pipeline()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokens()
        self.at = 0

    def _tokens(self) -> list[_Token]:
        tokens, position = [], 0
        end = len(self.text.rstrip())
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None:
                start = position + len(self.text[position:]) - len(self.text[position:].lstrip())
                raise self._error("this quotation mark is never closed", start)
            kind = str(match.lastgroup)
            tokens.append(_Token(kind, match.group(kind), match.start(kind)))
            position = match.end()
        return [*tokens, _Token("end", "", end)]

    def _error(self, reason: str, position: int) -> PipelineError:
        place = f"pass pipeline, column {position + 1}: {reason}"
        return PipelineError(f"{place}\n    {self.text}\n    {' ' * position}^")

    def _unexpected(self, expected: str) -> PipelineError:
        token = self.tokens[self.at]
        found = "the text ends" if token.kind == "end" else f"{token.text!r} stands there"
        return self._error(f"expected {expected}, but {found}", token.position)

    def _next_is(self, mark: str) -> bool:
        token = self.tokens[self.at]
        return token.kind == "mark" and token.text == mark

    def _take(self, mark: str) -> bool:
        if not self._next_is(mark):
            return False
        self.at += 1
        return True

    def _name(self, what: str) -> str:
        token = self.tokens[self.at]
        if token.kind == "quoted" and what == "a name":
            self.at += 1
            return self._quoted(token)
        if token.kind != "word" or (what != "a name" and not _NAME.fullmatch(token.text)):
            raise self._unexpected(what)
        self.at += 1
        return token.text

    def pipeline(self) -> list[Stage]:
        stages = [self._stage()]
        while self._take(","):
            stages.append(self._stage())
        if self.tokens[self.at].kind != "end":
            raise self._unexpected("',' and another pass, or the end")
        return stages

    def _stage(self) -> Stage:
        name = self._name("the name of a pass")
        options: dict[str, Any] = {}
        if self._take("{"):
            options = self._entries("the name of an option", 0)
        return Stage(name, options)

    def _entries(self, what: str, depth: int) -> dict[str, Any]:
        """``name=value, ...}`` after the opening brace."""
        entries: dict[str, Any] = {}
        while not self._take("}"):
            position = self.tokens[self.at].position
            name = self._name(what)
            if name in entries:
                raise self._error(f"{name} is given twice", position)
            if not self._take("="):
                raise self._unexpected("'='")
            entries[name] = self._value(depth)
            if not self._take(",") and not self._next_is("}"):
                raise self._unexpected("',' or '}'")
        return entries

    def _value(self, depth: int) -> Any:
        token = self.tokens[self.at]
        if depth > _MOST_NESTED:
            raise self._error("values are nested too deeply", token.position)
        if self._take("["):
            return self._items(depth + 1)
        if self._take("{"):
            return self._entries("a name", depth + 1)
        if token.kind not in ("word", "quoted"):
            raise self._unexpected("a value")
        self.at += 1
        return self._quoted(token) if token.kind == "quoted" else _word_value(token.text)

    def _quoted(self, token: _Token) -> str:
        try:
            return str(json.loads(token.text))
        except ValueError:
            raise self._error('quoted text knows \\" and \\\\ and the other escapes of JSON', token.position) from None

    def _items(self, depth: int) -> list[Any]:
        items = []
        while not self._take("]"):
            items.append(self._value(depth))
            if not self._take(",") and not self._next_is("]"):
                raise self._unexpected("',' or ']'")
        return items


def _word_value(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if not _NUMBER.fullmatch(word):
        return word
    return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)


def format_pipeline(stages: Sequence[Stage]) -> str:
    """Text that :func:`parse_pipeline` reads back."""
    return ",".join(format_stage(stage.name, stage.options) for stage in stages)


def format_stage(name: str, options: Mapping[str, Any]) -> str:
    if not options:
        return name
    return f"{name}{{{','.join(f'{key}={format_value(value)}' for key, value in options.items())}}}"


def format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = re.fullmatch(r'[^\s"\[\]{},=]+', value) is not None and _word_value(value) == value
        return value if plain else json.dumps(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{format_value(str(k))}={format_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return str(value)
