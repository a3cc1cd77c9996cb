"""Names for the variables of a forward, chosen as people do: a tensor that is only passed along keeps its name.

before   v__1__ = self.conv1(v__0__);  v__2__ = F.relu(v__1__);  return v__2__ + v__0__
after    out = self.conv1(x);  out = F.relu(out);  return out + x
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Collection, Mapping

from regauge.backends.torch_module.code import VARIABLE, Code, Line, variable

_PASSED_ALONG = ("x", "out")  # names without a meaning of their own, taken over by the next result
RESERVED = frozenset({"torch", "nn", "F", "math", "self", "super", *keyword.kwlist, *dir(builtins)})


def named_lines(
    code: Code, given: Mapping[int, str], reserved: Collection[str], *, releases: bool = False
) -> tuple[list[str], list[str]]:
    """The parameter names and the statements of a forward; ``given`` names some of the variables beforehand.

    With ``releases`` each variable is deleted behind its last reader, where its name does not hold the next result.
    """
    return _Namer(code, given, reserved, releases).run()


class _Namer:
    def __init__(self, code: Code, given: Mapping[int, str], reserved: Collection[str], releases: bool) -> None:
        self.code = code
        self.releases = releases
        self.names = dict(given)
        self.reserved = RESERVED | set(reserved)
        self.active: dict[str, int] = {}  # the variable that a name holds now
        self.last_read = self._last_reads()
        self.assigned: set[int] = set()  # by statements: arguments are held by the caller, too

    def _last_reads(self) -> dict[int, int]:
        last = {number: step for step, line in enumerate(self.code.lines) for number in line.reads()}
        for text in self.code.returned:
            last.update({int(number): len(self.code.lines) for number in VARIABLE.findall(text)})
        return last

    def run(self) -> tuple[list[str], list[str]]:
        parameters = []
        for number in range(len(self.code.arguments)):
            hint = "x" if number == 0 else self.code.hints.get(number, "")
            name = self.names.get(number) or self._unique(hint)
            self.names[number] = name
            self.active[name] = number
            parameters.append(name)
        lines: list[str] = []
        for step, line in enumerate(self.code.lines):
            lines.extend(self._line(step, line))
        self._return(lines)
        return parameters, lines

    def _line(self, step: int, line: Line) -> list[str]:
        for text in line.functions:
            self._name_locals(text)
        functions = [self._spelled(text) for text in line.functions]
        right = self._spelled(line.expression)
        dying = [n for n in dict.fromkeys(line.reads()) if self.last_read.get(n) == step]
        targets = [self._target(target, line, dying) for target in line.targets]
        if not line.targets:
            return [*functions, right]
        statements = [*functions, f"{line.left(targets)} = {right}"]
        self.assigned.update(target for target in line.targets if target is not None)
        if self.releases and step < len(self.code.lines) - 1:
            statements += self._released(line, dying, targets)
        return statements

    def _released(self, line: Line, dying: list[int], targets: list[str]) -> list[str]:
        """The statement that deletes what nothing reads any more; none where all of it was overwritten."""
        gone = [self.names[n] for n in dying if n in self.assigned and self.names[n] not in targets]
        gone += [
            name
            for number, name in zip(line.targets, targets, strict=True)
            if number is None or number not in self.last_read
        ]
        return [f"del {', '.join(dict.fromkeys(gone))}"] if gone else []

    def _target(self, number: int | None, line: Line, dying: list[int]) -> str:
        if number is None:
            return "_"
        name = self._taken_over(line, dying) if len(line.targets) == 1 else None
        for dead in dying:
            if self.active.get(self.names[dead]) == dead:
                del self.active[self.names[dead]]
        name = name or self._unique(line.hint or (self.code.hints.get(number, "") if not _is_call(line) else ""))
        self.names[number] = name
        self.active[name] = number
        if number not in self.last_read:
            del self.active[name]
        return name

    def _taken_over(self, line: Line, dying: list[int]) -> str | None:
        """The name of an operand that dies here and that the result continues."""
        for number in dying:
            name = self.names[number]
            if self.active.get(name) == number and (line.renews or re.sub(r"_\d+$", "", name) in _PASSED_ALONG):
                return None if line.hint and not line.renews and name not in _PASSED_ALONG else name
        return None

    def _name_locals(self, text: str) -> None:
        """Variables of a local function live for ever: a function may not find its names changed."""
        for number in map(int, VARIABLE.findall(text)):
            if number not in self.names:
                self.names[number] = self._unique(self.code.hints.get(number, ""))
                self.active[self.names[number]] = number

    def _unique(self, hint: str) -> str:
        hint = hint if hint.isidentifier() else ""
        choices = [hint] if hint else list(_PASSED_ALONG)
        for choice in choices:
            if choice not in self.active and choice not in self.reserved:
                return choice
        base = choices[-1] + ("_" if choices[-1] in self.reserved else "")
        name, count = base, 0
        while name in self.active or name in self.reserved:
            count += 1
            name = f"{base}_{count}".replace("__", "_")
        return name

    def _spelled(self, text: str) -> str:
        return VARIABLE.sub(lambda match: self.names[int(match[1])], text)

    def _return(self, lines: list[str]) -> None:
        """Add the return; a last line that only computes what is returned becomes the return."""
        last = self.code.lines[-1] if self.code.lines else None
        if last is not None and not last.unpacks and len(last.targets) == 1 and last.targets[0] is not None:
            if self.code.returned == [variable(last.targets[0])]:
                lines[-1] = "return " + lines[-1].partition(" = ")[2]
                return
        lines.append("return " + ", ".join(self._spelled(text) for text in self.code.returned))


def _is_call(line: Line) -> bool:
    return line.expression.startswith("self")
