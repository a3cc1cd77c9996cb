"""The values of one ONNX scope (main graph, nested graph, function call) and what is known of them while it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
import sympy

from regauge.frontends.onnx_model.weights import FEW_BITS, codes_of, dtype_of, is_float, torch_from_array, weight_of
from regauge.ir.dtypes import Dtype
from regauge.ir.edit import Builder
from regauge.ir.errors import LoadError
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size, UnknownRank, symbols_in
from regauge.ir.sizes.onnx_contents import LIMIT, Content
from regauge.ir.storage.weights import Weight

_SHARING_NAMES = ("cond", "loop", "scan")  # a fused node has a region with names of its own
VECTOR_LIMIT = 64  # a vector of dynamic sizes is stacked from scalars; exporters never need more than a rank's worth


@dataclass(eq=False)
class Entry:
    """One ONNX value: its counterpart in our graph, made on demand, and what is known of its content."""

    onnx: onnx_ir.Value
    scope: Scope
    value: Value | None = None
    content: Content | None = None
    tensor: onnx_ir.TensorProtocol | None = None  # an initializer, or the value of a Constant node
    producer: onnx_ir.Node | None = None  # the node that was folded into ``content`` or ``sequence``
    sequence: list[Value] | None = None  # the pieces of a sequence of known length
    outer: Entry | None = None  # the same value in the scope around a nested graph

    @property
    def shape(self) -> tuple[Size, ...]:
        if self.value is not None:
            return self.value.shape
        if self.content is not None:
            return self.content.array.shape
        if self.tensor is not None:
            return tuple(self.tensor.shape.numpy())
        if self.sequence is not None:
            return ()
        assert self.outer is not None
        return self.outer.shape

    @property
    def ranked(self) -> bool:
        return not isinstance(self.shape, UnknownRank)

    @property
    def dtype(self) -> Dtype:
        if self.value is not None:
            return self.value.dtype
        if self.content is not None:
            return dtype_of(self.content.data_type)
        if self.tensor is not None:
            return dtype_of(self.tensor.dtype)
        if self.sequence is not None:
            return "sequence"
        assert self.outer is not None
        return self.outer.dtype


def tensor_entry(onnx: onnx_ir.Value, scope: Scope, tensor: onnx_ir.TensorProtocol) -> Entry:
    """An entry for constant data; integers and scalars of moderate size are known contents as well."""
    known = None
    small = tensor.size <= LIMIT and tensor.dtype != onnx_ir.DataType.STRING
    if small and (len(tensor.shape) == 0 or not is_float(tensor.dtype)) and tensor.dtype.bitwidth >= 8:
        known = Content(np.array(tensor.numpy()), tensor.dtype)
    return Entry(onnx, scope, content=known, tensor=tensor)


class Scope:
    """Names in sight while the nodes of one ONNX graph are read into the graph of one Builder.

    A nested graph has its own Builder: what it reads from around it becomes an input of its region, listed in
    ``captures``. A function call has the caller's Builder and its own entries.
    """

    def __init__(
        self,
        build: Builder,
        opsets: dict[str, int],
        *,
        parent: Scope | None = None,
        attributes: dict[str, onnx_ir.Attr] | None = None,
        fixed: str = "",
    ) -> None:
        self.build = build
        self.opsets = opsets
        self.parent = parent
        self.attributes = attributes or {}
        self.fixed = fixed  # why nothing that is written in the nodes may change: they are the body of a function
        self.entries: dict[onnx_ir.Value, Entry] = {}
        self.captures: dict[Value, Value] = {}
        self.folded: dict[onnx_ir.Value, Any] = {} if parent is None else parent.folded
        self._named: dict[str, onnx_ir.Value] = {} if parent is None else parent._named
        self.keep: Callable[[Scope, onnx_ir.Node, str], None] | None = None if parent is None else parent.keep
        self.emit: Callable[[Scope, onnx_ir.Node], None] | None = None if parent is None else parent.emit

    def reserve_names(self, graph: onnx_ir.Graph) -> None:
        """Keep every name for the value of the file that has it, an outer one before those nested, so that no name
        that is made up while reading takes it. Bodies of functions are read once per call: theirs are not kept."""
        for owner in (graph, *graph.subgraphs()):
            for value in (*owner.inputs, *owner.initializers.values(), *(v for node in owner for v in node.outputs)):
                if value.name:
                    self._named.setdefault(value.name, value)
        self.build.reserve(self._named)

    def name(self, value: Value, onnx: onnx_ir.Value, default: str = "v") -> None:
        """Call a value as the file calls it, in place of the name that it was given when it was made."""
        self.build.release([value.name])
        value.name = self.build.unique(onnx.name or default, reserved=self._is_named(onnx))

    def release_names(self) -> None:
        """Give back the names in a region that is read again, or not kept."""
        pending = [self.build.graph]
        for graph in pending:
            self.build.release(value.name for value in graph.values())
            pending += [region for node in graph.nodes if node.op in _SHARING_NAMES for region in node.regions]

    def _is_named(self, onnx: onnx_ir.Value) -> bool:
        """Whether the name of an ONNX value is kept for it: two branches may use one name."""
        return onnx.name is not None and self._named.get(onnx.name) is onnx

    def find(self, onnx: onnx_ir.Value) -> Entry:
        """The entry of a value defined here or in a scope around; raises LoadError where there is none."""
        entry = self.entries.get(onnx)
        if entry is not None:
            return entry
        if self.parent is None:
            raise LoadError(
                f"the value {onnx.name!r} is read before anything defines it: check the model with onnx.checker"
            )
        found = self.parent.find(onnx)
        if self.parent.build is self.build:
            return found
        entry = Entry(onnx, self, content=found.content, tensor=found.tensor, outer=found)
        self.entries[onnx] = entry
        return entry

    def operand(self, onnx: onnx_ir.Value) -> Value:
        """The value in our graph that stands for an ONNX value, made now if it was only known by content."""
        return self.value_of(self.find(onnx))

    def value_of(self, entry: Entry) -> Value:
        if entry.scope is not self and entry.scope.build is not self.build:
            return self.operand(entry.onnx)
        if entry.value is None:
            made = entry.scope._make(entry)
            entry.value = made
            if entry.value.origin is None:
                entry.value.origin = entry.onnx
                if made.producer is not None:
                    entry.scope.name(made, entry.onnx)
        return entry.value

    def codes(self, onnx: onnx_ir.Value) -> tuple[Value, int | None]:
        """An operand, and the bits of a constant of integers of fewer than a byte, which is held in bytes then."""
        entry = self.find(onnx)
        few = None if entry.tensor is None else FEW_BITS.get(entry.tensor.dtype)
        if few is None or entry.tensor is None:
            return self.operand(onnx), None
        if entry.value is None:
            entry.value = self._parameter(entry, codes_of(entry.tensor), is_weight=False)
            entry.value.origin = entry.onnx
        return entry.value, few[1]

    def sequence(self, entry: Entry) -> list[Value] | None:
        """The pieces of a sequence of known length, as values that nodes of this scope may read."""
        if entry.sequence is None and entry.outer is not None and self.parent is not None:
            outside = self.parent.sequence(entry.outer)
            entry.sequence = None if outside is None else [self._captured(value) for value in outside]
        return entry.sequence

    def _make(self, entry: Entry) -> Value:
        if entry.sequence is not None and entry.producer is not None and self.keep is not None:
            self.keep(self, entry.producer, "its sequence is read as a whole")
            return self.entries[entry.onnx].value  # type: ignore[return-value]
        is_weight = entry.tensor is not None and is_float(entry.tensor.dtype) and len(entry.tensor.shape) > 0
        if entry.outer is not None and (is_weight or entry.tensor is None and not _static(entry.content)):
            return self._capture(entry)
        if entry.tensor is not None:
            return self._parameter(entry, weight_of(entry.tensor), is_weight=is_weight)
        assert entry.content is not None
        if entry.content.static:
            return self._constant(entry)
        return self._dynamic(entry)

    def _capture(self, entry: Entry) -> Value:
        assert entry.outer is not None and self.parent is not None
        return self._captured(self.parent.value_of(entry.outer))

    def _captured(self, outside: Value) -> Value:
        if outside in self.captures:
            return self.captures[outside]
        inner = self.build.input(outside.name, outside.shape, outside.dtype)
        self.captures[outside] = inner
        return inner

    def _parameter(self, entry: Entry, weight: Weight, *, is_weight: bool) -> Value:
        kind: Any = "parameter" if is_weight and not self.fixed else "constant"
        return self.build.parameter(self._parameter_name(entry, "constant"), weight, kind)

    def _parameter_name(self, entry: Entry, default: str) -> str:
        """The name as it is in the file, where it is free: names of weights lead into files of weights."""
        name, reserved = entry.onnx.name or default, self._is_named(entry.onnx)
        free = name not in self.build.graph.parameters and self.build.free(name, reserved=reserved)
        return name if free else self.build.unique(name, reserved=reserved)

    def _constant(self, entry: Entry) -> Value:
        """A constant for content that was folded: it is frozen as of now."""
        assert entry.content is not None
        tensor = torch_from_array(np.array(entry.content.array), dtype_of(entry.content.data_type))
        name = self.build.unique(entry.onnx.name or "folded", reserved=self._is_named(entry.onnx))
        made = self.build.parameter(name, tensor, kind="constant", persistent=False)
        made.stored = entry.producer is None
        self.note(entry, made.name)
        return made

    def _dynamic(self, entry: Entry) -> Value:
        """Content with dynamic sizes in it: the folded node is emitted after all, or the sizes are stacked."""
        assert entry.content is not None
        array = entry.content.array
        told = all(_is_size(element) and self._is_told(element) for element in array.reshape(-1))
        if array.size > VECTOR_LIMIT or not told:
            if self.emit is None or entry.producer is None:
                raise LoadError(f"{entry.onnx.name!r} depends on dynamic sizes and cannot be built from them")
            self.emit(self, entry.producer)
            assert entry.value is not None
            return entry.value
        dtype = dtype_of(entry.content.data_type)
        scalars = [self.build.full(shape=(), value=element, dtype=dtype) for element in array.reshape(-1).tolist()]
        if array.ndim == 0:
            return scalars[0]  # type: ignore[no-any-return]
        made = self.build.stack(*scalars, dim=0)
        return made if array.ndim == 1 else self.build.reshape(made, shape=array.shape)  # type: ignore[no-any-return]

    def _is_told(self, size: Any) -> bool:
        """Whether the inputs tell a size: one that a kept node makes is known only to who reads that node's result."""
        return isinstance(size, int) or size.free_symbols <= self._told()

    def _told(self) -> set[sympy.Symbol]:
        own = symbols_in([value.shape for value in self.build.graph.inputs])
        return own if self.parent is None else own | self.parent._told()

    def note(self, entry: Entry, parameter: str | None) -> None:
        """Tell whoever emits the graph that this value was folded, and which parameter stands for it."""
        assert entry.content is not None
        self.folded[entry.onnx] = Folded(entry.content, parameter)


@dataclass(frozen=True)
class Folded:
    """The record in ``graph.metadata["onnx_folded"]`` of an ONNX value whose content was known at import.

    ``parameter`` names the constant of the graph that stands for it where the content is used as data: emission must
    freeze such a value. Where it is None the content only gave sizes, which are derived anew.
    """

    known: Content
    parameter: str | None

    @property
    def content(self) -> Any:
        """A torch tensor, or where dynamic sizes occur the tuple of sizes."""
        if self.known.static:
            return torch_from_array(np.array(self.known.array), dtype_of(self.known.data_type))
        return self.known.sizes()


def _static(known: Content | None) -> bool:
    return known is not None and known.static


def _is_size(element: Any) -> bool:
    return isinstance(element, int) or isinstance(element, sympy.Expr) and bool(element.is_integer)
