"""From the code of every module to classes: constructors, containers, and one class for all equal blocks."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

import torch

from regauge.backends.torch_code import Code
from regauge.backends.torch_forward import Forward
from regauge.backends.torch_naming import named_lines
from regauge.backends.torch_places import Places
from regauge.backends.torch_signature import result_expression, signature
from regauge.backends.torch_source import INDENT, indented
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Parameter

_LIBRARY_NAMES = frozenset({"F", "nn", "torch", "math", "Sequential", "ModuleList", "ModuleDict", *keyword.kwlist})


class Classes:
    """Writes the classes of one graph; ``texts`` holds them from the inside out, the root's last."""

    def __init__(self, graph: Graph, forward: Forward, root: Code) -> None:
        self.graph = graph
        self.forward = forward
        self.places: Places = forward.places
        self.names: dict[str, str] = {}  # what a class does -> its name
        self.texts: list[str] = []
        self.imports: set[str] = set()
        self.position = {parameter: i for i, parameter in enumerate(graph.parameters.values())}
        self.existing = _prefixes([*forward.modules, *(n.rpartition(".")[0] for n in self.places.tensors)])
        self.root = self._class("", root)

    def _construct(self, path: str) -> str:
        """The expression that builds the module at a path."""
        code = self.forward.modules.get(path)
        if code is not None and code.layer is not None:
            return code.layer
        children = self._children(path, code)
        own = self.places.own(path)
        if code is not None:
            if code.chain and not own and self._is_sequence(path, code):
                return f"nn.Sequential({_listed(self._filled(path, children), star=True)})"
            return f"{self._class(path, code)}()"
        if self.places.is_parameter_list(path):
            return f"nn.ParameterList([{', '.join(_parameter_text(p) for p in own.values())}])"
        if not own and self.places.is_list(path):
            return f"nn.ModuleList({_listed(self._filled(path, children), star=False)})"
        if not own and children and all(_is_plain_key(child) for child in children):
            items = [f'"{child}": {self._construct(_join(path, child))}' for child in children]
            return "nn.ModuleDict({" + ", ".join(items) + "})"
        return f"{self._class(path, None)}()"

    def _children(self, path: str, code: Code | None) -> list[str]:
        """Names of the modules below a path: those with tensors in the order of these, others where they are called."""
        calls = [call[len(path) :].lstrip(".").partition(".")[0] for call in code.calls] if code is not None else []
        names = [name for name in self.places.children(path) if _join(path, name) in self.existing]
        called = {name: i for i, name in reversed(list(enumerate(calls)))}
        first = {name: self._first_tensor(_join(path, name)) for name in names}
        rank: dict[str, tuple[float, float]] = {}
        latest = -1.0
        for name in sorted(names, key=lambda n: (called.get(n, len(calls)), first[n])):
            latest = first[name] if first[name] >= 0 else latest
            rank[name] = (latest, called.get(name, len(calls)))
        return sorted(names, key=lambda name: rank[name])

    def _first_tensor(self, path: str) -> float:
        return min((self.position.get(p, len(self.position)) for p in self.places.below(path).values()), default=-1)

    def _is_sequence(self, path: str, code: Code) -> bool:
        """True where running the children in the order of their numbers is what the code does."""
        if not self.places.is_list(path):
            return False
        called = [call[len(path) :].lstrip(".") for call in code.calls]
        present = [name for name in self.places.children(path) if _join(path, name) in self.existing]
        numbers = [int(name) for name in called if name.isdigit()]
        return numbers == sorted(set(numbers)) and len(numbers) == len(called) == len(present)

    def _filled(self, path: str, children: Sequence[str]) -> list[str]:
        """Constructors by number; a number without a module gets an Identity, so that the others keep theirs."""
        present = {int(child): self._construct(_join(path, child)) for child in sorted(children, key=int)}
        return [present.get(i, "nn.Identity()") for i in range(max(present, default=-1) + 1)]

    def _class(self, path: str, code: Code | None) -> str:
        """The name of the class of a module, written now if no equal class is."""
        children = self._children(path, code)
        is_list = self.places.is_list(path)
        arguments = _listed(self._filled(path, children), star=True) if is_list else ""
        init = [f"super().__init__({arguments})"]
        if not is_list:
            init.extend(_assignment(child, self._construct(_join(path, child))) for child in children)
        init.extend(_tensor_line(name, parameter) for name, parameter in self.places.own(path).items())
        if not path:
            init.extend(self._ties())
        key = "\n".join([str(is_list), *init, code.key() if code is not None else ""])
        if path and key in self.names:
            return self.names[key]
        name = self._class_name(path, code)
        self.names[key] = name
        base = "nn.Sequential" if is_list else "nn.Module"
        self.texts.append(self._written(name, base, init, path, code))
        return name

    def _written(self, name: str, base: str, init: list[str], path: str, code: Code | None) -> str:
        lines = [f"class {name}({base}):"]
        if len(init) > 1 or base != "nn.Module":
            lines += [f"{INDENT}def __init__(self):", *indented(init, 2)]
        if code is None:
            return "\n".join(lines if len(lines) > 1 else [*lines, f"{INDENT}pass"])
        parameters, body = self._forward_lines(path, code)
        lines += [""] * (len(lines) > 1)
        lines += [*indented([f"def forward({', '.join(['self', *parameters])}):"], 1), *indented(body, 2)]
        return "\n".join(lines)

    def _forward_lines(self, path: str, code: Code) -> tuple[list[str], list[str]]:
        reserved = self.forward.helpers.sources
        if path:
            return named_lines(code, {}, reserved)
        form = signature(self.graph)
        code.returned = [result_expression(self.graph, code.returned, self.imports)]
        _, body = named_lines(code, dict(enumerate(form.names)), reserved)
        return form.parameters, [*form.prologue, *body]

    def _ties(self) -> list[str]:
        """Assignments that make tied tensors one tensor."""
        lines = []
        for names in self.places.names.values():
            for alias in names[1:]:
                lines.append(f"{self.places.access('', alias)} = {self.places.access('', names[0])}")
        return lines

    def _class_name(self, path: str, code: Code | None) -> str:
        name = re.sub(r"\W", "_", (code.class_name if code is not None else "").rpartition(".")[2])
        if not name or name in _LIBRARY_NAMES:
            words = re.split(r"[._]", path) if path else ["model"]
            name = "".join(word[:1].upper() + word[1:] for word in words[-2:] if word)
        name = name if name[:1].isalpha() or name[:1] == "_" else f"Block{name}"
        taken = set(self.names.values()) | set(self.forward.helpers.sources)
        candidate, count = name, 1
        while candidate in taken or candidate in _LIBRARY_NAMES:
            count += 1
            candidate = f"{name}{count}" if not name[-1].isdigit() else f"{name}_{count}"
        return candidate


def _join(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child


def _prefixes(paths: Sequence[str]) -> set[str]:
    found = set()
    for path in paths:
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def _listed(items: Sequence[str], *, star: bool) -> str:
    """``A(), B()`` or, where all are equal, ``*[A() for _ in range(12)]``; without the star, as a list."""
    if len(items) > 2 and len(set(items)) == 1:
        return f"{'*' if star else ''}[{items[0]} for _ in range({len(items)})]"
    text = ", ".join(items)
    return text if star else f"[{text}]"


def _assignment(name: str, constructor: str) -> str:
    if name.isidentifier() and not keyword.iskeyword(name):
        return f"self.{name} = {constructor}"
    return f'self.add_module("{name}", {constructor})'


def _is_plain_key(name: str) -> bool:
    return name.isidentifier() and not hasattr(torch.nn.ModuleDict, name)


def _parameter_text(parameter: Parameter) -> str:
    options = "" if parameter.trainable else ", requires_grad=False"
    return f"nn.Parameter({_blank('torch.empty', parameter)}{options})"


def _tensor_line(name: str, parameter: Parameter) -> str:
    if parameter.kind == "parameter":
        if name.isidentifier():
            return f"self.{name} = {_parameter_text(parameter)}"
        return f'self.register_parameter("{name}", {_parameter_text(parameter)})'
    persistent = parameter.persistent and parameter.kind == "buffer"
    options = "" if persistent else ", persistent=False"
    return f'self.register_buffer("{name}", {_blank("torch.zeros", parameter)}{options})'


def _blank(function: str, parameter: Parameter) -> str:
    if not isinstance(parameter.dtype, torch.dtype):
        raise EmitError(f"{parameter} holds {parameter.dtype} values, which torch tensors cannot: use to_onnx()")
    dtype = "" if parameter.dtype == torch.float32 else f", dtype={parameter.dtype}"
    sizes = ", ".join(str(size) for size in parameter.shape) or "()"
    return f"{function}({sizes}{dtype})"
