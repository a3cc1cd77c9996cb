"""What a graph costs: parameters, weight bytes, MACs and activation memory.

The sizes of all axes are extents, so each figure is a polynomial in the sizes of Dims: :attr:`CostModel.macs` and its
neighbours are sympy expressions, and the same terms are evaluated with plain integers, for given sizes or step by step
(:class:`Running`), where a pass must meet a budget. Dynamic sizes (batch, sequence) count as the least they may be,
usually 1: MACs are those of one example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import sympy
import torch

from regauge.ir.dtypes import Dtype
from regauge.ir.extents import Concat, Dim, Extent, Product, leaves, resolve
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Cost
from regauge.ir.sizes import Size, product, simplify, total

Metric: TypeAlias = Literal["parameters", "macs", "bytes"]
SizeOf: TypeAlias = Callable[[Dim], Size]


class Figures(NamedTuple):
    """What a graph costs: trained parameters, multiply-accumulates of one run, bytes of everything it stores."""

    parameters: int
    macs: int
    bytes: int


class _Shaped(NamedTuple):
    """Stands for an operand or result where a cost function asks for its shape."""

    shape: tuple[Size, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)


class _NodeView(NamedTuple):
    """Stands for a node whose axes have other sizes than its values say."""

    inputs: Sequence[Any]
    outputs: Sequence[_Shaped]
    attributes: Mapping[str, Any]
    op: str


def item_size(dtype: Dtype) -> float:
    """Bytes of one element; types that torch does not have are told by the number in their name (``int4``: 0.5)."""
    if isinstance(dtype, torch.dtype):
        return dtype.itemsize
    digits = "".join(c for c in dtype.partition("e")[0] if c.isdigit())
    return int(digits) / 8 if digits else 0.0


def smallest_sizes(graph: Graph) -> Callable[[Size], int]:
    """A function that gives each size as an int, with every symbol at the least value it may have."""
    known: dict[Any, int] = {}

    def bound(size: Size) -> int:
        if isinstance(size, int):
            return size
        if size not in known:
            least = {s: max(1, graph.symbols.get(s, (1, None))[0]) for s in size.free_symbols}
            known[size] = max(1, int(sympy.sympify(size).subs(least)))
        return known[size]

    return bound


def figures(graph: Graph) -> Figures:
    """The figures of a graph as it is, from the shapes of its values."""
    bound = smallest_sizes(graph)
    parameters, size, macs = 0, 0.0, 0
    for parameter in graph.all_parameters():
        elements = int(product(parameter.weight.shape))
        parameters += elements if parameter.kind == "parameter" else 0
        size += elements * item_size(parameter.dtype)
    for _, node in graph.walk():
        if node.operator.macs is not None:
            macs += int(node.operator.macs(Cost(_bound_view(node, bound))))
    return Figures(parameters, macs, int(size))


def local_figures(nodes: Iterable[Node], graph: Graph) -> Figures:
    """The figures of some nodes of a graph: MACs, and elements and bytes of all weights that they read, constants too.

    For decisions whether a rewrite pays: what it replaces against what it builds.
    """
    bound = smallest_sizes(graph)
    taken = list(nodes)
    read = dict.fromkeys(value for node in taken for _, value in node.operands() if isinstance(value, Parameter))
    elements = {parameter: int(product(parameter.weight.shape)) for parameter in read}
    macs = sum(int(node.operator.macs(Cost(_bound_view(node, bound)))) for node in taken if node.operator.macs)
    return Figures(sum(elements.values()), macs, int(sum(n * item_size(p.dtype) for p, n in elements.items())))


def _bound_view(node: Node, bound: Callable[[Size], int]) -> _NodeView:
    def shaped(operand: Any) -> Any:
        return _Shaped(tuple(bound(s) for s in operand.shape)) if isinstance(operand, Value) else operand

    return _NodeView(
        [shaped(operand) for operand in node.inputs],
        [shaped(value) for value in node.outputs],
        node.attributes,
        node.op,
    )


def _size(extent: Extent, size_of: SizeOf) -> Size:
    """The size of a resolved extent, its Dims sized by ``size_of``."""
    if isinstance(extent, Dim):
        return size_of(extent)
    if isinstance(extent, Product):
        return product(_size(f, size_of) for f in extent.factors)
    return total(_size(s, size_of) for s in extent.segments)


def _sizes(derived: Any, size_of: SizeOf) -> Any:
    if isinstance(derived, Dim | Product | Concat):
        return _size(resolve(derived), size_of)
    if isinstance(derived, tuple | list):
        return tuple(_sizes(part, size_of) for part in derived)
    return derived


class _ParameterTerm:
    """Elements of one parameter."""

    def __init__(self, parameter: Parameter, axes: list[Extent]) -> None:
        self.axes = axes
        self.dims = frozenset(dim for extent in axes for dim in leaves(extent))
        self.weight = {
            "parameters": 1.0 if parameter.kind == "parameter" else 0.0,
            "macs": 0.0,
            "bytes": item_size(parameter.dtype),
        }

    def amount(self, metric: Metric, size_of: SizeOf) -> Any:
        factor = self.weight[metric]
        if not factor:
            return 0
        return product(_size(extent, size_of) for extent in self.axes) * (int(factor) if factor >= 1 else factor)


class _NodeTerm:
    """MACs of one node, by its operator's cost function."""

    def __init__(self, node: Node, graph: CostModel) -> None:
        self.node = node
        self.inputs = [graph.axes(operand) if isinstance(operand, Value) else operand for operand in node.inputs]
        self.outputs = [graph.axes(value) for value in node.outputs]
        self.derived = graph.analysis.calls[node].derived
        shapes = [axes for axes in (*self.inputs, *self.outputs) if isinstance(axes, list)]
        self.dims = frozenset(dim for axes in shapes for extent in axes for dim in leaves(extent))

    def amount(self, metric: Metric, size_of: SizeOf) -> Any:
        cost = self.node.operator.macs
        if metric != "macs" or cost is None:
            return 0
        return cost(Cost(self._view(size_of)))

    def _view(self, size_of: SizeOf) -> _NodeView:
        def shaped(axes: Any) -> Any:
            return _Shaped(tuple(_size(extent, size_of) for extent in axes)) if isinstance(axes, list) else axes

        attributes = dict(self.node.attributes)
        for name, extents in self.derived.items():
            attributes[name] = _sizes(extents, size_of)
        return _NodeView([shaped(a) for a in self.inputs], [shaped(a) for a in self.outputs], attributes, self.node.op)


_Term: TypeAlias = _ParameterTerm | _NodeTerm


class CostModel:
    """The cost of a graph as a function of the sizes of its Dims; create one with :func:`cost`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.analysis = graph.axes
        self._bound = smallest_sizes(graph)
        self._normal: dict[Value, list[Extent]] = {}
        self.terms: list[_Term] = [_ParameterTerm(p, self.axes(p)) for p in graph.all_parameters()]
        self.terms += [_NodeTerm(node, self) for _, node in graph.walk() if node.operator.macs is not None]

    def axes(self, value: Value) -> list[Extent]:
        if value not in self._normal:
            self._normal[value] = self.analysis.axes(value)
        return self._normal[value]

    # -- expressions -------------------------------------------------------------------------------------------------

    @cached_property
    def symbols(self) -> dict[Dim, sympy.Symbol]:
        """The symbol that stands for each Dim of a parameter in the expressions, named like the Dim."""
        dims = [dim for p in self.graph.all_parameters() for e in self.axes(p) for dim in leaves(e)]
        return {dim: sympy.Symbol(dim.name, integer=True, positive=True) for dim in dims if isinstance(dim.size, int)}

    def _expression(self, metric: Metric) -> Size:
        def size_of(dim: Dim) -> Size:
            return self.symbols.get(dim, dim.size)

        return simplify(sympy.Add(*[sympy.sympify(term.amount(metric, size_of)) for term in self.terms]))

    @cached_property
    def parameters(self) -> Size:
        """Trained parameters, in symbols of Dims; tied ones count once."""
        return self._expression("parameters")

    @cached_property
    def macs(self) -> Size:
        """Multiply-accumulates of one run, in symbols of Dims and of dynamic sizes."""
        return self._expression("macs")

    @cached_property
    def bytes(self) -> Size:
        """Bytes of all parameters, buffers and constants, in symbols of Dims."""
        return self._expression("bytes")

    # -- numbers -----------------------------------------------------------------------------------------------------

    def number(self, dim: Dim) -> int:
        return self._bound(dim.size)

    def figures(self, sizes: Mapping[Dim, int] | None = None) -> Figures:
        """The figures when the given Dims have the given sizes and all others keep theirs."""
        given = sizes or {}

        def size_of(dim: Dim) -> int:
            found = given.get(dim)
            return self.number(dim) if found is None else found

        metrics: tuple[Metric, ...] = ("parameters", "macs", "bytes")
        return Figures(*[int(sum(term.amount(metric, size_of) for term in self.terms)) for metric in metrics])

    def running(self, metric: Metric) -> Running:
        return Running(self, metric)


class Running:
    """One figure while sizes of Dims change: a change costs as much time as there are terms that hold the Dim."""

    def __init__(self, model: CostModel, metric: Metric) -> None:
        self.metric: Metric = metric
        self._sizes: dict[Dim, int] = {}
        self._model = model
        self._terms = model.terms
        self._values = [float(term.amount(metric, self._size_of)) for term in self._terms]
        self._holding: dict[Dim, list[int]] = {}
        for index, term in enumerate(self._terms):
            if self._values[index]:
                for dim in term.dims:
                    self._holding.setdefault(dim, []).append(index)
        self.original = self.total = sum(self._values)

    def _size_of(self, dim: Dim) -> int:
        found = self._sizes.get(dim)
        return self._model.number(dim) if found is None else found

    def set_sizes(self, sizes: Mapping[Dim, int]) -> float:
        """Give Dims new sizes; returns the new total."""
        changed = [dim for dim, size in sizes.items() if self._size_of(dim) != size]
        self._sizes.update(sizes)
        for index in dict.fromkeys(i for dim in changed for i in self._holding.get(dim, ())):
            value = float(self._terms[index].amount(self.metric, self._size_of))
            self.total += value - self._values[index]
            self._values[index] = value
        return self.total

    def with_size(self, dim: Dim, size: int) -> float:
        """The total if one Dim had another size."""
        before = self._size_of(dim)
        self._sizes[dim] = size
        change = sum(
            float(self._terms[i].amount(self.metric, self._size_of)) - self._values[i]
            for i in self._holding.get(dim, ())
        )
        self._sizes[dim] = before
        return self.total + change


def cost(graph: Graph) -> CostModel:
    """The cost of a graph: ``cost(graph).macs`` is an expression, ``cost(graph).figures({dim: 16})`` are numbers."""
    return CostModel(graph)


def activation_bytes(graph: Graph) -> tuple[int, int]:
    """Bytes of all intermediate values together, and at the moment when most of them are alive (in graph order)."""
    bound = smallest_sizes(graph)
    sizes = {value: _value_bytes(value, bound) for value in _activations(graph)}
    last: dict[Value, int] = {}
    for step, node in enumerate(graph.nodes):
        for _, value in node.operands():
            last[value] = step
    kept = {output for output in graph.outputs if isinstance(output, Value)}
    alive = peak = sum(sizes[value] for value in graph.inputs)
    for step, node in enumerate(graph.nodes):
        alive += sum(sizes[value] for value in node.outputs)
        peak = max(peak, alive)
        gone = [value for value in {v for _, v in node.operands()} | set(node.outputs) if last.get(value, step) == step]
        alive -= sum(sizes.get(value, 0) for value in gone if value not in kept)
    return sum(sizes.values()), peak


def _activations(graph: Graph) -> Iterator[Value]:
    yield from graph.inputs
    for node in graph.nodes:
        yield from node.outputs


def _value_bytes(value: Value, bound: Callable[[Size], int]) -> int:
    elements = 1
    for size in value.shape:
        elements *= bound(size)
    return int(elements * item_size(value.dtype))
