"""Source text: long statements broken as a formatter would, quotes, imports, and the order of a module."""

from __future__ import annotations

import io
import json
import keyword
import re
import tokenize
from collections.abc import Iterable, Mapping

WIDTH = 100
INDENT = "    "
_OPEN, _CLOSE = "([{", ")]}"


def quoted(text: str) -> str:
    """A string literal in double quotes, whatever the text holds."""
    return json.dumps(text, ensure_ascii=False)  # every escape of JSON is one of Python's


def is_plain_name(text: str) -> bool:
    """Whether Python can read an attribute of this name as ``owner.name``."""
    return text.isidentifier() and not keyword.iskeyword(text)


def indented(lines: Iterable[str], depth: int) -> list[str]:
    """Statements at a depth, each broken over several lines where it is too long."""
    result: list[str] = []
    for line in lines:
        own = len(line) - len(line.lstrip())
        result.extend(broken(_spaced(double_quoted(line.strip())), INDENT * depth + " " * own))
    return result


def _spaced(text: str) -> str:
    """Powers of plain operands without spaces, as formatters write them: ``x**2``."""
    return text if '"' in text else re.sub(r"(?<![\w.)\]])([\w.]+) \*\* ([\w.]+)(?![\w.(\[])", r"\1**\2", text)


def broken(text: str, indent: str) -> list[str]:
    """One statement as lines of at most WIDTH characters where its brackets allow it."""
    if len(indent) + len(text) <= WIDTH:
        return [(indent + text).rstrip()]
    for start, end in _bracket_pairs(text):
        inner = text[start + 1 : end]
        if not inner.strip() or text[end + 1 :].strip("),:]} "):
            continue
        body = _body(inner, indent + INDENT)
        return [indent + text[: start + 1], *body, indent + text[end:]]
    return [indent + text]


def _body(inner: str, indent: str) -> list[str]:
    """What is inside a pair of brackets: on one line if it fits, else an item per line."""
    items = _split(inner)
    if len(indent) + len(inner) <= WIDTH or len(items) == 1:
        return broken(inner, indent)
    lines: list[str] = []
    for item in items:
        pieces = broken(item, indent)
        pieces[-1] += ","
        lines.extend(pieces)
    return lines


def _bracket_pairs(text: str) -> list[tuple[int, int]]:
    """Outermost bracket pairs, the last one first: its content is what people break."""
    pairs: list[tuple[int, int]] = []
    depth, start, quote = 0, 0, ""
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[at - 1] != "\\" else quote
        elif character in "\"'":
            quote = character
        elif character in _OPEN:
            start = at if depth == 0 else start
            depth += 1
        elif character in _CLOSE:
            depth -= 1
            if depth == 0:
                pairs.append((start, at))
    return pairs[::-1]


def _split(text: str) -> list[str]:
    """The comma-separated items of a bracket's content; a comprehension is one, whatever its targets."""
    items: list[str] = []
    depth, start, quote = 0, 0, ""
    for at, character in enumerate(text):
        if quote:
            quote = "" if character == quote and text[at - 1] != "\\" else quote
        elif character in "\"'":
            quote = character
        elif character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif depth == 0 and text.startswith(" for ", at):
            return [text.strip()]
        elif character == "," and depth == 0:
            items.append(text[start:at].strip())
            start = at + 1
    items.append(text[start:].strip())
    return [item for item in items if item]


def double_quoted(text: str) -> str:
    """Strings in double quotes where they hold none."""
    if "'" not in text:
        return text
    result: list[str] = []
    at = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING and token.string.startswith("'") and '"' not in token.string:
            result.append(text[at : token.start[1]] + '"' + token.string[1:-1] + '"')
            at = token.end[1]
    return "".join(result) + text[at:]


def assemble(title: str, helpers: Mapping[str, str], classes: Iterable[str], imports: Iterable[str] = ()) -> str:
    """A whole module: docstring, the imports its text needs, helper functions, classes from the inside out."""
    parts = [_formatted(text) for text in helpers.values()] + list(classes)
    text = "\n\n\n".join(parts)
    known = {
        "math": "import math",
        "torch": "import torch",
        "F": "import torch.nn.functional as F",
        "nn": "from torch import nn",
    }
    used = [line for name, line in known.items() if re.search(rf"(?<![\w.]){name}\.", text)]
    standard = [line for line in used if line == "import math"]
    others = sorted({*used, *imports} - {"import math"}, key=lambda line: (line.startswith("from"), line))
    blocks = ["\n".join(block) for block in (standard, others) if block]
    return f'"""{title}"""\n\n' + "\n\n".join(blocks) + f"\n\n\n{text}\n"


def _formatted(source: str) -> str:
    lines: list[str] = []
    for line in source.splitlines():
        own = len(line) - len(line.lstrip())
        lines.extend(broken(_spaced(double_quoted(line.strip())), " " * own) if line.strip() else [""])
    return "\n".join(lines)
