"""Assigns each tensor of a graph its place in the emitted module: the path of its owner and its name there.

Trained tensors live where their names say (tied ones at several places); constants live in the module that uses them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

from regauge.backends.torch_module.frames import Frame, inside, module_path, scope_of
from regauge.backends.torch_module.source import is_plain_name, quoted
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.storage.weights import Weight

LARGEST_COMPARED = 1 << 22  # elements
_RESERVED = frozenset(dir(torch.nn.Module()))


class Places:
    """Names and owners of the parameters of one graph."""

    def __init__(self, graph: Graph, root: Frame) -> None:
        self.called = {module_path(path) for node in graph.nodes for path, _ in scope_of(node)}
        self.names: dict[Parameter, tuple[str, ...]] = {}
        self.tensors: dict[str, Parameter] = {}
        self._below: dict[str, dict[str, Parameter]] = {}
        self._children: dict[str, dict[str, None]] = {}
        self.statistics = set(_statistics(graph))
        constants: list[Parameter] = []
        tensors = {name for parameter in graph.all_parameters() for name in parameter.names}
        traced = "torch" in graph.metadata  # the names of a module are paths, whatever characters are in them
        for parameter in dict.fromkeys(graph.all_parameters()):
            named = traced or _is_path(parameter.name)
            if parameter.kind == "constant" or not named or _is_inside(parameter, tensors):
                constants.append(parameter)
            else:
                self._place(parameter, parameter.names)
        for path in self.called:
            self._note_children(path)
        homes = _homes(root)
        for output in graph.outputs:
            if isinstance(output, Parameter):
                homes[output] = ""
        shared: dict[tuple[object, ...], str] = {}
        for parameter in constants:
            if parameter in homes:
                self._place_constant(parameter, homes[parameter], shared)

    def _place(self, parameter: Parameter, names: Iterable[str]) -> None:
        self.names[parameter] = tuple(names)
        for name in names:
            self.tensors[name] = parameter
            parts = name.split(".")
            self._note_children(name.rpartition(".")[0])
            for depth in range(len(parts)):
                self._below.setdefault(".".join(parts[:depth]), {})[".".join(parts[depth:])] = parameter

    def _place_constant(self, parameter: Parameter, home: str, shared: dict[tuple[object, ...], str]) -> None:
        """Equal constants of one module are one: two calls of the module then run the same code."""
        key = (home, parameter.shape, parameter.dtype, _content(parameter.weight))
        name = shared.get(key) or self._free_name(home, parameter.name)
        shared[key] = name
        self._place(parameter, (name,))

    def _free_name(self, home: str, name: str) -> str:
        base = re.sub(r"(_?\d+)+$", "", re.split(r"[./:]", name)[-1])
        base = re.sub(r"\W", "_", base).strip("_") or "constant"
        prefix = home + "." if home else ""
        candidate, count = base, 0
        while candidate in _RESERVED or self._taken(prefix + candidate):
            count += 1
            candidate = f"{base}_{count}"
        return prefix + candidate

    def _taken(self, name: str) -> bool:
        return name in self.tensors or name in self._below or name in self.called

    def is_trained(self, parameter: Parameter) -> bool:
        """True for what becomes an ``nn.Parameter``; running statistics never do, whatever a file calls them."""
        return parameter.kind == "parameter" and parameter not in self.statistics

    def _note_children(self, path: str) -> None:
        while path:
            parent, _, child = path.rpartition(".")
            self._children.setdefault(parent, {})[child] = None
            path = parent

    def children(self, path: str) -> list[str]:
        """Names of the modules directly below a path, whether or not they end up as modules of their own."""
        return list(self._children.get(path, ()))

    def own(self, path: str) -> dict[str, Parameter]:
        """The tensors directly at a path, by name."""
        return {name: parameter for name, parameter in self.below(path).items() if "." not in name}

    def is_list(self, path: str) -> bool:
        """True where the children are numbered, so that ``nn.ModuleList`` or ``nn.Sequential`` can hold them."""
        children = self.children(path)
        if not children or self.own(path) or not all(child.isdigit() for child in children):
            return False
        return max(int(child) for child in children) < 2 * len(children) + 8

    def is_parameter_list(self, path: str) -> bool:
        names = list(self.below(path))
        return bool(names) and not self.children(path) and names == [str(i) for i in range(len(names))]

    def access(self, path: str, name: str) -> str:
        """Source that reads a module or tensor from inside the module at ``path``: ``self.layers[0].weight``."""
        text, at = "self", path
        for part in filter(None, name[len(path) :].split(".")):
            if is_plain_name(part):
                text += f".{part}"
            elif self.is_list(at) or self.is_parameter_list(at):
                text += f"[{part}]"
            else:
                text = f"getattr({text}, {quoted(part)})"
            at = f"{at}.{part}" if at else part
        return text

    def assignment(self, name: str, source: str) -> str:
        """A statement of the root module that puts a tensor at the place of this name."""
        owner, _, leaf = name.rpartition(".")
        target = self.access("", name)
        return (
            f"setattr({self.access('', owner)}, {quoted(leaf)}, {source})"
            if target.endswith(")")
            else f"{target} = {source}"
        )

    def below(self, path: str) -> dict[str, Parameter]:
        """Every tensor at or below a path, by its name relative to the path."""
        return self._below.get(path, {})

    def name_under(self, parameter: Parameter, path: str) -> str | None:
        """A name of the parameter that can be reached from the module at ``path``."""
        for name in self.names.get(parameter, ()):
            if inside(name, path):
                return name
        return None

    def owner(self, parameter: Parameter, path: str) -> str | None:
        """The path of the module that owns the parameter, seen from ``path``."""
        name = self.name_under(parameter, path)
        return None if name is None else name.rpartition(".")[0]


def _is_path(name: str) -> bool:
    return all(re.fullmatch(r"\w+", part) for part in name.split("."))


def _is_inside(parameter: Parameter, tensors: set[str]) -> bool:
    """True for a name such as ``fc.weight.scaled`` beside ``fc.weight``: no module can be where a tensor is."""
    parts = [name.split(".") for name in parameter.names]
    return any(".".join(path[:depth]) in tensors for path in parts for depth in range(1, len(path)))


def _content(weight: Weight) -> object:
    """What makes two constants one; a large constant is compared by identity."""
    tensor = weight.load()
    if not isinstance(tensor, torch.Tensor):  # of a type that torch lacks
        return id(weight)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() > LARGEST_COMPARED:
        return id(weight)
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _statistics(graph: Graph) -> Iterator[Parameter]:
    """Running means and variances: an ONNX file keeps them among the weights."""
    for _, node in graph.walk():
        for slot, operand in enumerate(node.inputs):
            names = node.operator.slots
            if isinstance(operand, Value) and slot < len(names) and names[slot] in ("mean", "var"):
                yield from _sources(operand)


def _sources(value: Value) -> Iterator[Parameter]:
    """The parameter a value is, or those it is computed from and from nothing else."""
    if isinstance(value, Parameter):
        yield value
    elif value.producer is not None:
        for _, operand in value.producer.operands():
            yield from _sources(operand)


def _homes(root: Frame) -> dict[Parameter, str]:
    """The innermost module path around all uses of each parameter; also of the parameters of regions."""
    homes: dict[Parameter, str] = {}

    def visit(frame: Frame, parent: str) -> None:
        for item in frame.items:
            if isinstance(item, Frame):
                visit(item, frame.path)
                continue
            # What a single node reads is given to it from outside, so that it can become a standard layer.
            home = parent if len(frame.items) == 1 else frame.path
            for parameter in _parameters_of(item):
                homes[parameter] = _common(homes.get(parameter, home), home)

    visit(root, "")
    return homes


def _parameters_of(node: Node) -> list[Parameter]:
    found = [operand for operand in node.inputs if isinstance(operand, Parameter)]
    for region in node.regions:
        for inner in region.nodes:
            found.extend(_parameters_of(inner))
        found.extend(output for output in region.outputs if isinstance(output, Parameter))
    return found


def _common(left: str, right: str) -> str:
    parts = []
    for a, b in zip(left.split("."), right.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)
