"""Finds tensors of a traced program that share memory, so that writes into them become new values.

    y = x[:, 0]          select                     y  = select(x, dim=1, index=0)
    y.fill_(1)     ->    a write through a view     y1 = full_like(y, 1);  x1 = select_scatter(x, y1, dim=1, index=0)
    use(x)               reads what was written     use(x1)

Only programs that write at all pay for this. A view kind whose inverse is not known raises NeedsDecomposition: torch's
own functionalisation then does the whole program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from regauge.frontends.aten_call import target_name
from regauge.ir.errors import RegaugeError

# The schema of these says "may share memory": only the traced storages tell.
_UNDECIDED = {"reshape", "contiguous", "to", "flatten", "unflatten", "type_as", "_to_copy", "float", "expand_as"}


class NeedsDecomposition(RegaugeError):
    """The program writes in a way that only torch's own functionalisation undoes."""


def writes(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """The arguments a node writes into; raises NeedsDecomposition for lists of tensors."""
    found: list[fx.Node] = []
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(value, fx.Node):
            found.append(value)
        elif value is not None:
            raise NeedsDecomposition(f"{node.target} writes into a list of tensors")
    return found


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = next((part for part in value if isinstance(part, torch.Tensor)), None)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


class Aliases:
    """The families of nodes of one fx graph that share memory, and the order of writes into them."""

    def __init__(self, graph: fx.Graph) -> None:
        self.active = any(writes(node) for node in graph.nodes)
        self.parent: dict[fx.Node, fx.Node] = {}
        self.children: dict[fx.Node, list[fx.Node]] = {}
        self.stamp: dict[fx.Node, int] = {}
        self.version: dict[fx.Node, int] = {}
        self.last_read: dict[fx.Node, int] = {}
        self.now = 0
        if self.active:
            for position, node in enumerate(graph.nodes):
                self._enter(position, node)

    def _enter(self, position: int, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            self.last_read[source] = position
        if node.op == "call_function":
            parent = self._base(node)
            if parent is not None:
                self.parent[node] = parent
                self.children.setdefault(parent, []).append(node)

    def _base(self, node: fx.Node) -> fx.Node | None:
        """The argument whose memory a node's result shares."""
        schema = getattr(node.target, "_schema", None)
        storage = _storage(node)
        shared = [source for source in node.all_input_nodes if storage is not None and _storage(source) == storage]
        if schema is None:
            # An entry of a split looks into what was split; other targets here are higher-order operators.
            return self.parent.get(shared[0], shared[0]) if shared else None
        aliased = [
            source
            for argument, source in zip(schema.arguments, node.args, strict=False)
            if argument.alias_info is not None and isinstance(source, fx.Node)
        ]
        if not aliased or not any(result.alias_info is not None for result in schema.returns):
            return None
        undecided = target_name(node.target).partition(".")[0] in _UNDECIDED
        return aliased[0] if aliased[0] in shared or not undecided else None

    def root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def stale(self, node: fx.Node) -> bool:
        """Whether something was written into the memory of a node since its value was made."""
        return self.active and self.stamp.get(node, 0) < self.version.get(self.root(node), 0)

    def fresh(self, node: fx.Node) -> None:
        self.stamp[node] = self.version.get(self.root(node), 0)

    def write(self, node: fx.Node, scatter: Callable[[fx.Node, fx.Node], None]) -> None:
        """Account for a new value of ``node``; ``scatter(parent, child)`` carries it into parents read later."""
        path = [node]
        while path[-1] in self.parent:
            path.append(self.parent[path[-1]])
        root = path[-1]
        for child, parent in zip(path, path[1:], strict=False):
            if not self._read_outside(root, child):
                path = path[: path.index(parent)]
                break
            scatter(parent, child)
        self.version[root] = self.version.get(root, 0) + 1
        for member in path:
            self.stamp[member] = self.version[root]

    def _read_outside(self, root: fx.Node, child: fx.Node) -> bool:
        """Whether memory of the family is read later other than through ``child``."""
        if root.op == "placeholder":
            return True  # buffers and inputs keep what is written into them
        below = set(self._subtree(child))
        return any(self.last_read.get(m, -1) > self.now for m in self._subtree(root) if m not in below)

    def _subtree(self, node: fx.Node) -> Iterator[fx.Node]:
        stack = [node]
        while stack:
            current = stack.pop()
            yield current
            stack.extend(self.children.get(current, ()))


def _inverse_of_entry(view: fx.Node, base: Any, value: Any) -> tuple[Any, tuple[Any, ...]]:
    """One entry of a split, chunk or unbind, put back where it was cut out."""
    whole, index = view.args
    if not isinstance(whole, fx.Node) or not isinstance(index, int) or not hasattr(whole.target, "_schema"):
        raise NeedsDecomposition(f"a write through {view}")
    name = target_name(whole.target).partition(".")[0]
    if name == "unbind":
        dim = whole.args[1] if len(whole.args) > 1 else whole.kwargs.get("dim", 0)
        return torch.ops.aten.select_scatter.default, (base, value, dim, index)
    if name not in ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk"):
        raise NeedsDecomposition(f"a write through {view}")
    dim = whole.args[2] if len(whole.args) > 2 else whole.kwargs.get("dim", 0)
    sizes = [part.shape[dim] for part in whole.meta["val"]]
    start = sum(sizes[:index])
    return torch.ops.aten.slice_scatter.default, (base, value, dim, start, start + sizes[index])


def inverse_view(
    view: fx.Node, base: Any, value: Any, base_shape: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]] | None:
    """The call that puts ``value`` back where ``view`` looked into ``base``: (operator, arguments); None: "all of it".

    The arguments of the view are taken from its node, except the first; raises NeedsDecomposition for other views.
    """
    aten = torch.ops.aten
    if view.target is operator.getitem:
        return _inverse_of_entry(view, base, value)
    if not hasattr(view.target, "_schema"):
        raise NeedsDecomposition(f"a write through {view.target}")
    name = target_name(view.target).partition(".")[0]
    rest = view.args[1:]
    if name in ("alias", "detach", "detach_", "lift_fresh", "to", "contiguous") or writes(view):
        return None
    if name == "slice":
        return aten.slice_scatter.default, (base, value, *rest)
    if name == "select":
        return aten.select_scatter.default, (base, value, *rest)
    if name == "diagonal":
        return aten.diagonal_scatter.default, (base, value, *rest)
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"):
        return aten.reshape.default, (value, list(base_shape))
    if name == "transpose":
        return aten.transpose.int, (value, *rest)
    if name == "permute":
        dims = [int(d) % len(base_shape) for d in rest[0]]  # type: ignore[union-attr,arg-type]
        return aten.permute.default, (value, [dims.index(i) for i in range(len(dims))])
    if name == "t":
        return aten.t.default, (value,)
    raise NeedsDecomposition(f"a write through {view.target}")
