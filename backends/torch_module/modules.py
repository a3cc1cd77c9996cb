"""From the code of every module to classes: constructors, containers, and one class for all equal blocks."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence

import torch

from regauge.backends.torch_module.code import Code
from regauge.backends.torch_module.families import Draft, Family, families
from regauge.backends.torch_module.forward import Forward
from regauge.backends.torch_module.naming import named_lines
from regauge.backends.torch_module.places import Places
from regauge.backends.torch_module.signature import result_expression, signature
from regauge.backends.torch_module.source import INDENT, indented, is_plain_name, quoted
from regauge.backends.torch_module.tensors import parameter_text, tensor_line
from regauge.ir.graph import Graph
from regauge.ir.node_order import IN_ORDER

_LIBRARY_NAMES = frozenset({"F", "nn", "torch", "math", "Sequential", "ModuleList", "ModuleDict", *keyword.kwlist})


class Classes:
    """Writes the classes of one graph; ``texts`` holds them from the inside out, the root's last."""

    def __init__(self, graph: Graph, forward: Forward, root: Code) -> None:
        self.graph = graph
        self.forward = forward
        self.places: Places = forward.places
        self.codes: dict[str, Code] = {**forward.modules, "": root}
        self.existing = _prefixes([*forward.modules, *(n.rpartition(".")[0] for n in self.places.tensors)])
        # Without a state_dict, modules that only hold tied tensors have no place of their own: they go where they run.
        names = graph.metadata.get("torch", {}).get("state_names") or list(graph.parameters)
        self.position = {name: i for i, name in enumerate(names)}
        self.built: dict[str, str] = {}  # path of each module with a class of its own -> how it is made
        self.reserved = {*forward.helpers.sources, *forward.functions.texts}
        self.names: set[str] = set(self.reserved)
        self.known: dict[str, list[str]] = {}  # class name -> its constructor's parameters
        self.texts: list[str] = []
        self.imports: set[str] = set()
        for paths in self._levels():
            self._write_level(paths)
        self.root = self.built[""].partition("(")[0]

    # -- constructors ---------------------------------------------------------------------------------------------

    def _construct(self, path: str) -> str:
        """The expression that builds the module at a path."""
        kind = self._kind(path)
        if kind == "class":
            return self.built[path]
        if kind == "layer":
            return str(self.codes[path].layer)
        children = self._children(path)
        if kind == "nn.ParameterList":
            return f"nn.ParameterList([{', '.join(parameter_text(p) for p in self.places.own(path).values())}])"
        if kind == "nn.ModuleDict":
            items = [f"{quoted(child)}: {self._construct(_join(path, child))}" for child in children]
            return "nn.ModuleDict({" + ", ".join(items) + "})"
        return f"{kind}({_listed(self._filled(path, children), star=kind == 'nn.Sequential')})"

    def _kind(self, path: str) -> str:
        """What the module at a path becomes: ``layer``, a container of torch's, or a ``class`` of its own."""
        code, own = self.codes.get(path), self.places.own(path)
        if code is not None:
            if code.layer is not None:
                return "layer"
            return "nn.Sequential" if path and code.chain and not own and self._is_sequence(path, code) else "class"
        if self.places.is_parameter_list(path):
            return "nn.ParameterList"
        if not own and self.places.is_list(path):
            return "nn.ModuleList"
        children = self._children(path)
        return "nn.ModuleDict" if not own and children and not any(map(_is_taken, children)) else "class"

    def _children(self, path: str) -> list[str]:
        """Names of the modules below a path: those with tensors in the order of these, others where they are called."""
        code = self.codes.get(path)
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
        names = [_join(path, name) for name in self.places.below(path)]
        aliases = {alias for parameter in self.places.below(path).values() for alias in parameter.aliases}
        known = [
            self.position.get(name, len(self.position))
            for name in names
            if name in self.position or name not in aliases
        ]
        return min(known, default=-1)

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

    # -- classes --------------------------------------------------------------------------------------------------

    def _levels(self) -> list[list[str]]:
        """Paths with a class of their own, those without such modules inside first."""
        height: dict[str, int] = {}

        def visit(path: str) -> int:
            below = max((visit(_join(path, child)) for child in self._children(path)), default=0)
            if self._kind(path) != "class":
                return 0 if self._kind(path) == "layer" else below
            height[path] = below
            return below + 1

        visit("")
        levels: list[list[str]] = [[] for _ in range(max(height.values()) + 1)]
        for path, level in height.items():
            levels[level].append(path)
        return levels

    def _write_level(self, paths: Sequence[str]) -> None:
        """Write one class for all modules that differ in numbers only."""
        drafts = [self._draft(path) for path in paths]
        groups: dict[str, list[Draft]] = {}
        for draft in drafts:
            groups.setdefault(draft.skeleton, []).append(draft)
        for group in groups.values():
            for shared in families(group, self.known):
                name = self._class_name(shared.drafts[0])
                self.known[name] = shared.parameters
                self.texts.append(self._written(name, shared))
                for draft in shared.drafts:
                    self.built[draft.path] = f"{name}({shared.arguments(draft)})"

    def _draft(self, path: str) -> Draft:
        children, code = self._children(path), self.codes.get(path)
        is_list = self.places.is_list(path)
        arguments = _listed(self._filled(path, children), star=True) if is_list else ""
        init = [f"super().__init__({arguments})"]
        if not is_list:
            init.extend(_assignment(child, self._construct(_join(path, child))) for child in children)
        init.extend(
            tensor_line(name, parameter, self.places.is_trained(parameter))
            for name, parameter in self.places.own(path).items()
        )
        if not path:
            init.extend(self._ties())
            assert code is not None
            returned = [result_expression(self.graph, code.returned, self.imports)]
            code.chain = code.chain and returned == code.returned
            code.returned = returned
        return Draft(path, "nn.Sequential" if is_list else "nn.Module", init, code)

    def _written(self, name: str, shared: Family) -> str:
        first = shared.drafts[0]
        lines = [f"class {name}({first.base}):"]
        init = shared.init_lines()
        if len(init) > 1 or first.base != "nn.Module":
            head = f"def __init__({', '.join(['self', *shared.parameters])}):"
            lines += [*indented([head], 1), *indented(init, 2)]
        if first.code is None:
            return "\n".join(lines if len(lines) > 1 else [*lines, f"{INDENT}pass"])
        if not first.path and self._inherits_forward(first.code):
            return "\n".join(lines)
        parameters, body = self._forward_lines(first.path, shared.code())
        lines += [""] * (len(lines) > 1)
        lines += [*indented([f"def forward({', '.join(['self', *parameters])}):"], 1), *indented(body, 2)]
        return "\n".join(lines)

    def _inherits_forward(self, root: Code) -> bool:
        """True where the forward of nn.Sequential, whose argument is called ``input``, does it."""
        form = signature(self.graph)
        return root.chain and self._is_sequence("", root) and form.parameters == ["input"] and not form.prologue

    def _forward_lines(self, path: str, code: Code) -> tuple[list[str], list[str]]:
        reserved, releases = self.reserved, IN_ORDER in self.graph.metadata
        if path:
            return named_lines(code, {}, reserved, releases=releases)
        form = signature(self.graph)
        _, body = named_lines(code, dict(enumerate(form.names)), reserved, releases=releases)
        return form.parameters, [*form.prologue, *body]

    def _ties(self) -> list[str]:
        """Assignments that make tied tensors one tensor, and modules that have all of them in common one module."""
        lines, tied = [], list[str]()
        for names in self.places.names.values():
            for alias in names[1:]:
                if not any(alias.startswith(f"{path}.") for path in tied):
                    path, source = self._tied_module(alias, names[0]) or (alias, names[0])
                    tied.append(path)
                    lines.append(self.places.assignment(path, self.places.access("", source)))
        return lines

    def _tied_module(self, alias: str, name: str) -> tuple[str, str] | None:
        """The outermost module with a class of its own around a tied tensor that is another one, and that other one."""
        parts = alias.split(".")
        for depth in range(1, len(parts)):
            path, rest = ".".join(parts[:depth]), "." + ".".join(parts[depth:])
            source = name.removesuffix(rest)
            if source in (name, path) or not {source, path} <= self.built.keys():
                continue
            if self.places.below(path) == self.places.below(source) and self.built[path] == self.built[source]:
                return path, source
        return None

    def _class_name(self, draft: Draft) -> str:
        name = re.sub(r"\W", "_", (draft.code.class_name if draft.code is not None else "").rpartition(".")[2])
        if not name or name in _LIBRARY_NAMES:
            words = re.split(r"[._]", draft.path) if draft.path else ["model"]
            name = "".join(word[:1].upper() + word[1:] for word in words[-2:] if word)
        name = name if name[:1].isalpha() or name[:1] == "_" else f"Block{name}"
        candidate, count = name, 1
        while candidate in self.names or candidate in _LIBRARY_NAMES:
            count += 1
            candidate = f"{name}{count}" if not name[-1].isdigit() else f"{name}_{count}"
        self.names.add(candidate)
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
    if is_plain_name(name):
        return f"self.{name} = {constructor}"
    return f"self.add_module({quoted(name)}, {constructor})"


def _is_taken(name: str) -> bool:
    """Whether nn.ModuleDict refuses a key, having an attribute of that name."""
    return hasattr(torch.nn.ModuleDict, name)
