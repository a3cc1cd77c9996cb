"""The graph: values, nodes and regions. This module is the read side; :mod:`regauge.ir.edit` alone mutates.

A Graph owns its nodes and parameters. Values are connected by identity, never by name; names are unique and only serve
people, files and tests. Nodes are kept in a set and sorted on demand, so that an edit never has to find a position.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import sympy
import torch

from regauge.ir.dtypes import Dtype, dtype_name
from regauge.ir.errors import GraphError
from regauge.ir.operator import Operator, get_operator
from regauge.ir.sizes.expressions import Size, UnknownRank, format_size, simplify
from regauge.ir.storage.weights import Weight, dense

if TYPE_CHECKING:
    from regauge.ir.dims.axes import Analysis
    from regauge.ir.dims.extents import Dim
    from regauge.ir.running.interpret import Hook

Number: TypeAlias = bool | int | float | complex
Kind: TypeAlias = Literal["parameter", "buffer", "constant"]


class Value:
    """A tensor that flows through the graph: a graph input, a parameter, or one result of a node."""

    __slots__ = ("name", "shape", "dtype", "producer", "index", "uses", "origin", "__weakref__")

    def __init__(self, *, name: str, shape: Sequence[Size], dtype: Dtype, producer: Node | None = None, index: int = 0):
        self.name = name
        plain = isinstance(shape, UnknownRank) or type(shape) is tuple and all(type(size) is int for size in shape)
        self.shape: tuple[Size, ...] = shape if plain else tuple(simplify(size) for size in shape)  # type: ignore[assignment]
        self.dtype = dtype
        self.producer = producer
        self.index = index
        self.uses: dict[tuple[Node, int], None] = {}
        self.origin: Any = None  # what the frontend needs to find its own value again

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def ranked(self) -> bool:
        """Whether the number of axes is known: where it is not, nothing may be made of ``shape`` and ``rank``."""
        return not isinstance(self.shape, UnknownRank)

    def consumers(self) -> list[Node]:
        """Nodes that read the value, each once, in order of use."""
        return list(dict.fromkeys(node for node, _ in self.uses))

    @property
    def signature(self) -> str:
        """``f32[64,3,7,7]``, or ``f32[...]`` where the rank is not known."""
        sizes = ",".join(map(format_size, self.shape)) if self.ranked else "..."
        return f"{dtype_name(self.dtype)}[{sizes}]"

    def __repr__(self) -> str:
        return f"%{self.name}: {self.signature}"


def add_use(value: Value, node: Node, slot: int) -> None:
    """Note that a node reads a value; only the builder and the editing functions do."""
    value.uses[node, slot] = None
    if isinstance(value, Parameter):
        value.was_read = True


class Parameter(Value):
    """A tensor the graph owns: a trained parameter, a buffer or a constant; tied ones have several names.

    One that nothing has ever read since the graph was made is kept, as torch keeps it in the state_dict; one that
    ``was_read`` and has lost all its readers is dead. One that is not ``stored`` takes no room in the file that the
    graph was loaded from, which computes it.
    """

    __slots__ = ("weight", "kind", "aliases", "trainable", "persistent", "was_read", "stored")

    def __init__(
        self,
        *,
        name: str,
        weight: Weight | torch.Tensor,
        kind: Kind = "parameter",
        aliases: Sequence[str] = (),
        trainable: bool | None = None,
        persistent: bool = True,
    ):
        weight = dense(weight) if isinstance(weight, torch.Tensor) else weight
        super().__init__(name=name, shape=weight.shape, dtype=weight.dtype)
        self.weight: Weight = weight
        self.kind: Kind = kind
        self.aliases = tuple(aliases)
        self.trainable = kind == "parameter" if trainable is None else trainable
        self.persistent = persistent
        self.was_read = False
        self.stored = True

    @property
    def tensor(self) -> torch.Tensor:
        """The data, read now; never write into it: it may be the user's own tensor or a file."""
        return self.weight.load()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


Operand: TypeAlias = Value | Number | sympy.Expr | None


class Node:
    """One operator call."""

    __slots__ = (
        "op", "inputs", "attributes", "outputs", "scope", "source", "regions", "origin", "metadata", "__weakref__"
    )  # fmt: skip

    def __init__(
        self,
        *,
        op: str,
        inputs: Sequence[Operand],
        attributes: Mapping[str, Any],
        scope: Sequence[tuple[str, str]] = (),
        source: str = "",
        regions: Sequence[Graph] = (),
        origin: Any = None,
    ):
        self.op = op
        self.inputs: tuple[Operand, ...] = tuple(inputs)
        self.attributes: dict[str, Any] = dict(attributes)
        self.outputs: tuple[Value, ...] = ()
        self.scope = tuple(scope)  # module path and class name from the root down: (("", "ResNet"), ("layer1", ...))
        self.source = source  # "file.py:12 in forward", where the user called it
        self.regions = tuple(regions)
        self.origin = origin  # what the frontend needs to find its own node again
        self.metadata: dict[str, str] = {}

    @property
    def operator(self) -> Operator:
        return get_operator(self.op)

    @property
    def output(self) -> Value:
        if len(self.outputs) != 1:
            raise GraphError(f"{self.label} has {len(self.outputs)} results, not one")
        return self.outputs[0]

    @property
    def name(self) -> str:
        return self.outputs[0].name if self.outputs else self.op

    @property
    def label(self) -> str:
        """What messages call this node: its name, its operator, and the module path where it has one."""
        path = self.scope[-1][0] if self.scope else ""
        return f"{self.name} = {self.op}" + (f" in {path}" if path else "")

    def operands(self) -> Iterator[tuple[int, Value]]:
        for slot, operand in enumerate(self.inputs):
            if isinstance(operand, Value):
                yield slot, operand

    def __repr__(self) -> str:
        from regauge.ir.printing.text import format_node

        return format_node(self)


@dataclass(frozen=True)
class State:
    """A tensor carried from one run to the next: read as ``before``, written as ``after`` (caches, statistics).

    It is written into the buffer or argument that ``before`` is, or ``returned``: then ``after`` is an output that the
    caller hands in as the input ``before`` of the next run (:mod:`regauge.ir.states`).
    """

    name: str
    before: Value
    after: Value
    returned: bool = False


@dataclass(frozen=True)
class Edit:
    """One line of a graph's history."""

    by: str
    what: str
    sizes: tuple[str, int, int] | None = None  # of a Dim that was cut: its name, indices before and after
    kept: tuple[int, ...] | None = None  # of a Dim that was cut: which of the indices before are there after
    majors: tuple[str, ...] = ()  # Dims in each index of which other indices were kept: ``kept`` holds these in turn


@dataclass(eq=False)
class Graph:
    """A program over tensors. Create one with :func:`regauge.capture`, :func:`regauge.load` or a Builder."""

    name: str = "graph"
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Operand] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    states: list[State] = field(default_factory=list)
    history: list[Edit] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    symbols: dict[sympy.Symbol, tuple[int, int | None]] = field(default_factory=dict)  # dynamic sizes and their ranges
    report: Any = None  # what the passes that made this graph did; see regauge.passes.report
    version: int = 0
    _nodes: dict[Node, None] = field(default_factory=dict)
    _sorted: tuple[int, list[Node]] | None = None
    _schedule: tuple[tuple[Any, ...], list[Any]] | None = None  # see regauge.ir.running.schedule
    _analysis: tuple[int, Analysis] | None = None
    _runs: tuple[tuple[int, int], list[tuple[list[Any], list[Any]]]] | None = None  # see ir/running/sample_inputs.py

    @property
    def nodes(self) -> list[Node]:
        """Nodes in a stable topological order; raises GraphError on a cycle."""
        if self._sorted is None or self._sorted[0] != self.version:
            self._sorted = (self.version, _sorted_nodes(list(self._nodes)))
        return self._sorted[1]

    @property
    def axes(self) -> Analysis:
        """The axis analysis of the graph as it is now; computed once per version."""
        from regauge.ir.dims.axes import analyse

        if self._analysis is None or self._analysis[0] != self.version:
            self._analysis = (self.version, analyse(self))
        return self._analysis[1]

    def groups(self) -> list[Any]:
        """Dependency groups: every Dim that occurs in a parameter, with its members: :mod:`regauge.ir.dims.groups`."""
        from regauge.ir.dims.groups import dependency_groups

        return dependency_groups(self)

    def dims(self, value: Value | str) -> list[list[Dim]]:
        """The Dims of each axis of a value, given as it is or by name: what :func:`regauge.resize` takes.

        An axis that is a product or a concatenation has several, from the left; one of size 1 has none.
        """
        from regauge.ir.dims.extents import leaves

        found = self.find(value) if isinstance(value, str) else value
        if found not in self.axes.of:
            raise GraphError(
                f"{found} is no value of graph {self.name!r}: a copy has values of its own, find them by name"
            )
        return [leaves(extent) for extent in self.axes.axes(found)]

    def run(self, inputs: Any, *, hook: Hook | None = None) -> list[Any]:
        """Evaluate the graph node by node in torch; returns its outputs, in order.

        ``inputs`` are tensors in order or by name, or one tensor. ``hook(node, results)`` is called after every node
        with the tuple of its results, and may return others in their place.
        """
        from regauge.ir.running.interpret import run

        return run(self, (inputs,) if isinstance(inputs, torch.Tensor) else inputs, hook=hook)

    def explain(self, what: str) -> str:
        """Describe a Dim, a parameter axis or a value, with the reasons; see :mod:`regauge.ir.printing.explain`."""
        from regauge.ir.printing.explain import explain

        return explain(self, what)

    def find(self, name: str) -> Value:
        """The input, parameter (under any of its names) or node result called ``name``; raises GraphError."""
        if name in self.parameters:
            return self.parameters[name]
        for value in self.values():
            if value.name == name or (isinstance(value, Parameter) and name in value.aliases):
                return value
        from difflib import get_close_matches

        known = [value.name for value in self.values()] + [a for p in self.parameters.values() for a in p.aliases]
        close = get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; print the graph to see its names"
        raise GraphError(f"nothing in graph {self.name!r} is called {name!r}{hint}")

    def values(self) -> Iterator[Value]:
        yield from self.inputs
        yield from self.parameters.values()
        for node in self._nodes:
            yield from node.outputs

    def walk(self) -> Iterator[tuple[Graph, Node]]:
        """Every node with the graph or region that owns it, outer nodes before those of their regions."""
        for node in self.nodes:
            yield self, node
            for region in node.regions:
                yield from region.walk()

    def nested(self) -> Iterator[Graph]:
        """The graph itself and every region inside it."""
        yield self
        for node in self._nodes:
            for region in node.regions:
                yield from region.nested()

    def all_parameters(self) -> Iterator[Parameter]:
        """Parameters of the graph and of every region inside it."""
        yield from self.parameters.values()
        for node in self._nodes:
            for region in node.regions:
                yield from region.all_parameters()

    def __len__(self) -> int:
        return len(self._nodes)

    def __str__(self) -> str:
        from regauge.ir.printing.text import format_graph

        return format_graph(self)

    def __repr__(self) -> str:
        return f"<Graph {self.name}: {len(self._nodes)} nodes, {len(self.parameters)} parameters>"

    def copy(self) -> Graph:
        """An independent graph that shares the weights; edits of one never show in the other."""
        from regauge.ir.graph_copy import copy_graph

        return copy_graph(self)

    def to_torch(
        self,
        *,
        device: torch.device | str | None = None,
        integers: bool = True,
        kernels: Literal["triton", "onednn"] | None = None,
        tuned: str | os.PathLike[str] | None = None,
    ) -> torch.nn.Module:
        """An ``nn.Module`` that computes this graph, on ``device`` or where the weights are.

        Quantized layers multiply ``integers``; without that they are float layers behind codes and their way back. With
        ``kernels="triton"`` what gains from it is one kernel on a GPU (:mod:`regauge.backends.torch_module.kernels`),
        cut into programs as a ``tuned`` table of ``regauge autotune`` says; with ``"onednn"`` layers and the
        activations behind them are, on a CPU (:mod:`regauge.backends.torch_module.onednn`). See
        :func:`regauge.backends.to_torch.to_torch`. Raises EmitError where a node has no torch form.
        """
        emit = edge("regauge.backends.to_torch").to_torch
        module: torch.nn.Module = emit(self, device=device, integers=integers, kernels=kernels, tuned=tuned)
        return module

    def to_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        external_data: bool | str | None = None,
        sparse_weights: bool = False,
        verify: bool = True,
        overwrite: bool = True,
        inputs: Sequence[Any] | Mapping[str, Any] | None = None,
        check: Callable[[Path], None] | None = None,
        functions: bool = False,
    ) -> Path:
        """Write the graph as an ONNX model and return its path.

        ``external_data`` says if weights go beside the model, ``sparse_weights`` if those with many zeros are stored as
        such where the file becomes smaller by that, ``verify`` if the file is run and compared with the
        graph, on ``inputs`` or on made-up ones, ``overwrite`` if a file that exists may be replaced; a ``check`` of
        one's own sees the file before it appears; with ``functions`` fused nodes are calls of local functions. See
        :func:`regauge.backends.to_onnx.to_onnx`. Raises EmitError when something cannot be expressed or written.
        """
        written: Path = edge("regauge.backends.to_onnx").to_onnx(
            self,
            path,
            external_data=external_data,
            sparse_weights=sparse_weights,
            verify=verify,
            overwrite=overwrite,
            inputs=inputs,
            check=check,
            functions=functions,
        )
        return written

    def apply_to(
        self,
        model: torch.nn.Module,
        *,
        inplace: bool = True,
        inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
        tries: int = 250,
    ) -> torch.nn.Module:
        """Put the graph's shrunk weights and sizes into the user's own module, or with ``inplace=False`` into a copy.

        ``inputs`` are for the numeric check; at most ``tries`` settings of integer attributes are tried. See
        :func:`regauge.backends.apply_to.apply_to`. Raises EmitError, with the model as it was, where that fails.
        """
        module: torch.nn.Module = edge("regauge.backends.apply_to").apply_to(
            self, model, inplace=inplace, inputs=inputs, tries=tries
        )
        return module

    def write(self, folder: str | os.PathLike[str], *, kernels: Literal["triton", "onednn"] | None = None) -> Path:
        """Write readable torch source, ``model.py``, and ``model.safetensors`` into a folder; returns the folder.

        For ``kernels`` see :meth:`to_torch`. See :func:`regauge.backends.to_torch.write`. Raises EmitError where the
        graph has no torch form.
        """
        written: Path = edge("regauge.backends.to_torch").write(self, folder, kernels=kernels)
        return written


def edge(module: str) -> Any:
    """A module above, imported on use: ``ir`` knows such names for ``graph.to_torch()`` and the like only."""
    import importlib

    return importlib.import_module(module)


def _sorted_nodes(nodes: list[Node]) -> list[Node]:
    """Depth-first from each node in insertion order: a new node lands just before its first consumer."""
    done: set[Node] = set()
    open_nodes: set[Node] = set()
    order: list[Node] = []
    for root in nodes:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, expanded = stack.pop()
            if node in done:
                continue
            if expanded:
                open_nodes.discard(node)
                done.add(node)
                order.append(node)
                continue
            if node in open_nodes:
                raise GraphError(f"{node.label} depends on its own result: the graph has a cycle")
            open_nodes.add(node)
            stack.append((node, True))
            for operand in reversed(node.inputs):
                if isinstance(operand, Value) and operand.producer is not None and operand.producer not in done:
                    stack.append((operand.producer, False))
    return order
