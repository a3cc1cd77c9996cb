"""Costs of a graph: parameters, weight bytes and MACs.

The sizes of all axes are extents, so each figure is a polynomial in the sizes of Dims: :attr:`CostModel.macs` and its
neighbours are sympy expressions, and the same terms are evaluated with plain integers, for given sizes or step by step
(:class:`Running`), where a pass must meet a budget. Dynamic sizes (batch, sequence) count as the least they may be,
usually 1: MACs are those of one example. Activation memory is in :mod:`regauge.ir.memory.activations`, time in
:mod:`regauge.ir.roofline`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import sympy
import torch

from regauge.ir.dims.extents import Concat, Dim, Extent, Product, leaves, resolve
from regauge.ir.dtypes import Dtype
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Cost
from regauge.ir.sizes.expressions import Size, product, simplify, total

Metric: TypeAlias = Literal["parameters", "macs", "bytes"]
SizeOf: TypeAlias = Callable[[Dim], Size]

FUSED = "fused"  # the operator whose region is computed as one, see regauge.ir.fusion.fused


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


def stored_size(parameter: Parameter) -> float:
    """Bytes of one element as it is stored: what is only expanded from codes of few bits is packed."""
    if parameter.dtype not in (torch.int8, torch.uint8):
        return item_size(parameter.dtype)
    bits = {node.attributes.get("bits") if node.operator.expands else None for node, _ in parameter.uses}
    return (bits.pop() or 8) / 8 if len(bits) == 1 else 1.0


def computed_inside(node: Node) -> list[Node]:
    """The nodes that a fused node computes as one: only its operands and results are moved and kept."""
    return [inner for region in node.regions for inner in region.nodes] if node.op == FUSED else []


class Meter(Protocol):
    """One figure of a graph while sizes of its Dims change; it never falls when a size grows."""

    @property
    def original(self) -> float:
        """The figure with the sizes that the graph has."""

    @property
    def total(self) -> float:
        """The figure with the sizes that were set last."""

    def set_sizes(self, sizes: Mapping[Dim, int]) -> float:
        """Give Dims new sizes, all others keep theirs; returns the new total."""

    def with_size(self, dim: Dim, size: int) -> float:
        """The total if one Dim had another size."""


def smallest_sizes(graph: Graph, at: Mapping[Any, int] | None = None) -> Callable[[Size], int]:
    """A function that gives each size as an int; symbols have the values ``at`` gives, or the least they may have."""
    known: dict[Any, int] = {}
    fixed = at or {}

    def bound(size: Size) -> int:
        if isinstance(size, int):
            return size
        if size not in known:
            least = {s: fixed.get(s) or max(1, graph.symbols.get(s, (1, None))[0]) for s in size.free_symbols}
            found = sympy.sympify(size).subs(least)
            known[size] = max(1, int(found)) if found.is_finite else 1  # t // (t // 2) divides by nothing where t is 1
        return known[size]

    return bound


def figures(graph: Graph) -> Figures:
    """The figures of a graph as it is, from the shapes of its values."""
    bound = smallest_sizes(graph)
    parameters, size = 0, 0.0
    for parameter in graph.all_parameters():
        elements = int(product(parameter.weight.shape))
        parameters += elements if parameter.kind == "parameter" else 0
        size += elements * stored_size(parameter)
    macs = sum(node_macs(node, bound) for _, node in graph.walk())
    return Figures(parameters, macs, int(size))


def local_figures(nodes: Iterable[Node], graph: Graph, at: Mapping[Any, int] | None = None) -> Figures:
    """The figures of some nodes of a graph: MACs, and elements and bytes of all weights that they read, constants too.

    For decisions whether a rewrite pays: what it replaces against what it builds.
    """
    bound = smallest_sizes(graph, at)
    taken = list(nodes)
    read = dict.fromkeys(value for node in taken for _, value in node.operands() if isinstance(value, Parameter))
    elements = {parameter: int(product(parameter.weight.shape)) for parameter in read}
    macs = sum(node_macs(node, bound) for node in taken)
    return Figures(sum(elements.values()), macs, int(sum(n * stored_size(p) for p, n in elements.items())))


def node_macs(node: Node, bound: Callable[[Size], int]) -> int:
    """MACs of one node, where ``bound`` gives each size as an int."""
    if node.operator.macs is None:
        return 0

    def shaped(operand: Any) -> Any:
        return _Shaped(tuple(bound(s) for s in operand.shape)) if isinstance(operand, Value) else operand

    operands, results = [shaped(operand) for operand in node.inputs], [shaped(value) for value in node.outputs]
    return int(node.operator.macs(Cost(_NodeView(operands, results, node.attributes, node.op))))


def sized(extent: Extent, size_of: SizeOf) -> Size:
    """The size of a resolved extent, its Dims sized by ``size_of``."""
    if isinstance(extent, Dim):
        return size_of(extent)
    if isinstance(extent, Product):
        return product(sized(f, size_of) for f in extent.factors)
    return total(sized(s, size_of) for s in extent.segments)


def _sizes(derived: Any, size_of: SizeOf) -> Any:
    if isinstance(derived, Dim | Product | Concat):
        return sized(resolve(derived), size_of)
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
            "bytes": stored_size(parameter),
        }

    def amount(self, metric: Metric, size_of: SizeOf) -> Any:
        factor = self.weight[metric]
        if not factor:
            return 0
        return product(sized(extent, size_of) for extent in self.axes) * (int(factor) if factor >= 1 else factor)


class NodeTerm:
    """MACs of one node, by its operator's cost function."""

    def __init__(self, node: Node, graph: CostModel) -> None:
        self.node = node
        self.inputs = [graph.axes(operand) if isinstance(operand, Value) else operand for operand in node.inputs]
        self.outputs = [graph.axes(value) for value in node.outputs]
        self.derived = graph.analysis.calls[node].derived
        shapes = [axes for axes in (*self.inputs, *self.outputs) if isinstance(axes, list)]
        self.dims = frozenset(dim for axes in shapes for extent in axes for dim in leaves(extent))

    def amount(self, metric: Metric, size_of: SizeOf) -> Any:
        return self.macs(lambda extent: sized(extent, size_of), size_of) if metric == "macs" else 0

    def macs(self, axis_size: Callable[[Extent], Size], size_of: SizeOf) -> Any:
        """The MACs where axes have the sizes that ``axis_size`` gives, and attributes those of ``size_of``."""
        cost = self.node.operator.macs
        return 0 if cost is None else cost(Cost(self._view(axis_size, size_of)))

    def _view(self, axis_size: Callable[[Extent], Size], size_of: SizeOf) -> _NodeView:
        def shaped(axes: Any) -> Any:
            return _Shaped(tuple(axis_size(extent) for extent in axes)) if isinstance(axes, list) else axes

        attributes = dict(self.node.attributes)
        for name, extents in self.derived.items():
            attributes[name] = _sizes(extents, size_of)
        return _NodeView([shaped(a) for a in self.inputs], [shaped(a) for a in self.outputs], attributes, self.node.op)


class Term(Protocol):
    """One part of a sum; ``dims`` are those on which it depends."""

    dims: frozenset[Dim]


_Term: TypeAlias = _ParameterTerm | NodeTerm


T = TypeVar("T", bound=Term)


class CostModel:
    """The cost of a graph as a function of the sizes of its Dims; create one with :func:`cost`."""

    def __init__(self, graph: Graph, at: Mapping[Any, int] | None = None) -> None:
        self.graph = graph
        self.analysis = graph.axes
        self.bound = smallest_sizes(graph, at)
        self._normal: dict[Value, list[Extent]] = {}
        self.terms: list[_Term] = [_ParameterTerm(p, self.axes(p)) for p in graph.all_parameters()]
        self.terms += [NodeTerm(node, self) for _, node in graph.walk() if node.operator.macs is not None]

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
        return self.bound(dim.size)

    def figures(self, sizes: Mapping[Dim, int] | None = None) -> Figures:
        """The figures when the given Dims have the given sizes and all others keep theirs."""
        given = sizes or {}

        def size_of(dim: Dim) -> int:
            found = given.get(dim)
            return self.number(dim) if found is None else found

        metrics: tuple[Metric, ...] = ("parameters", "macs", "bytes")
        return Figures(*[int(sum(term.amount(metric, size_of) for term in self.terms)) for metric in metrics])

    def running(self, metric: Metric) -> Running[_Term]:
        def amount(term: _Term, size_of: SizeOf) -> float:
            return float(term.amount(metric, size_of))

        return Running(self.terms, amount, self.number)


class Running(Generic[T]):
    """A sum while sizes of Dims change: a change costs as much time as there are terms that hold the Dim."""

    def __init__(self, terms: Sequence[T], amount: Callable[[T, SizeOf], float], number: Callable[[Dim], int]) -> None:
        self._sizes: dict[Dim, int] = {}
        self._number, self._amount, self._terms = number, amount, terms
        self._values = [amount(term, self._size_of) for term in terms]
        self._holding: dict[Dim, list[int]] = {}
        for index, term in enumerate(terms):
            if self._values[index]:
                for dim in term.dims:
                    self._holding.setdefault(dim, []).append(index)
        self.original = self.total = sum(self._values)

    def _size_of(self, dim: Dim) -> int:
        found = self._sizes.get(dim)
        return self._number(dim) if found is None else found

    def set_sizes(self, sizes: Mapping[Dim, int]) -> float:
        """Give Dims new sizes; returns the new total."""
        changed = [dim for dim, size in sizes.items() if self._size_of(dim) != size]
        self._sizes.update(sizes)
        for index in dict.fromkeys(i for dim in changed for i in self._holding.get(dim, ())):
            self._values[index] = self._amount(self._terms[index], self._size_of)
        self.total = sum(self._values)  # and not by its change: rounding errors would add up
        return self.total

    def with_size(self, dim: Dim, size: int) -> float:
        """The total if one Dim had another size."""
        before = self._size_of(dim)
        self._sizes[dim] = size
        change = sum(self._amount(self._terms[i], self._size_of) - self._values[i] for i in self._holding.get(dim, ()))
        self._sizes[dim] = before
        return self.total + change


def cost(graph: Graph, at: Mapping[Any, int] | None = None) -> CostModel:
    """The cost of a graph: ``cost(graph).macs`` is an expression, ``cost(graph).figures({dim: 16})`` are numbers.

    In numbers dynamic sizes have the values that ``at`` gives, by symbol, or the least they may have.
    """
    return CostModel(graph, at)
