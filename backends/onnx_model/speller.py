"""The argument of an operator's ``spell``: the means to write one node of a graph as ONNX operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any, TypeAlias, overload

import numpy as np
import onnx_ir
import sympy
import torch

from regauge.backends.onnx_model.bits import packed, stored_type
from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.size_nodes import SizeSource, build_vector
from regauge.backends.onnx_model.write import ChangedTensor
from regauge.ir.dtypes import OVERFLOWING, dtype_name
from regauge.ir.errors import EmitError
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.sizes.expressions import Size

FLOAT8_SINCE = 19  # opset
OLDEST = 7  # before this opset binary operators broadcast by attributes
Content: TypeAlias = torch.Tensor | np.ndarray | Sequence[Any] | bool | int | float
Find: TypeAlias = Callable[[Value], onnx_ir.Value]


class OnnxSpeller:
    """Writes one node into an ONNX graph: ``onnx.Relu(x)`` adds a node and gives its result, a tuple where it has more.

    Inputs are ONNX values, None for an absent one, or Python numbers, which become constants of ``dtype``: the type of
    the node's result where that is a floating-point one that ONNX computes in (of more than 8 bits), else of its first
    tensor. Attributes are plain Python values; those that are None are left out. Names of what is added come from the
    node's. Raises EmitError for an operator or an attribute that ``opset`` does not have.
    """

    def __init__(
        self, node: Node, carrier: Carrier, graph: onnx_ir.Graph, find: Find, sources: SizeSource, reason: str
    ) -> None:
        self.node = node
        self.carrier = carrier
        self.graph = graph
        self.opset: int = carrier.opset
        self.added: list[onnx_ir.Node] = []
        self.superseded: list[onnx_ir.Value] = []  # carried values that may have lost their last reader
        self._find = find
        self._sources = sources
        self._reason = reason

    # -- operands ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The type of numbers that stand beside the node's tensors."""
        result = self.node.outputs[0].dtype
        if isinstance(result, torch.dtype) and result.is_floating_point and result.itemsize > 1:
            return result
        first = next((value.dtype for _, value in self.node.operands()), result)
        if not isinstance(first, torch.dtype):
            raise self.refusal(f"it computes with the type {first}")
        return first

    @property
    def common_type(self) -> torch.dtype:
        """The type in which torch computes the node: that of its operands together, a floating one where it divides."""
        kinds: list[Any] = []
        for operand in self.node.inputs:
            if isinstance(operand, Value):
                if not isinstance(operand.dtype, torch.dtype):
                    raise self.refusal(f"it computes with the type {operand.dtype}")
                kinds.append(torch.empty((1,) * operand.rank, dtype=operand.dtype, device="meta"))
            elif operand is not None and not isinstance(operand, sympy.Basic):
                kinds.append(operand)
        joined = self.dtype
        if kinds:
            found = reduce(lambda a, b: torch.empty((1,), dtype=torch.result_type(a, b), device="meta"), kinds)
            joined = found.dtype if isinstance(found, torch.Tensor) else joined
        result = self.node.outputs[0].dtype
        return result if isinstance(result, torch.dtype) and result.is_floating_point else joined

    def given(self, slot: int) -> bool:
        return slot < len(self.node.inputs) and self.node.inputs[slot] is not None

    def operand(self, slot: int, dtype: torch.dtype | None = None) -> onnx_ir.Value | None:
        """An operand as an ONNX value, None where it is absent; with ``dtype`` it is cast to that type."""
        operand: Operand = self.node.inputs[slot] if self.given(slot) else None
        if operand is None:
            return None
        if isinstance(operand, Value):
            found = self._find(operand)
            return found if dtype is None or operand.dtype == dtype else self.cast(found, dtype)
        if isinstance(operand, sympy.Basic):
            size = self("Squeeze", self.sizes([operand])) if self.opset >= 13 else None
            if size is None:
                raise self.refusal(f"it reads the dynamic size {operand}")
            return self.cast(size, dtype or torch.int64)
        return self.constant(torch.tensor(operand), dtype or self.dtype)

    def operands(self, count: int, dtype: torch.dtype | None = None) -> list[onnx_ir.Value | None]:
        """Operands 0 to ``count - 1``, None where one is absent."""
        return [self.operand(slot, dtype) for slot in range(count)]

    def all_operands(self, dtype: torch.dtype | None = None) -> list[onnx_ir.Value | None]:
        return self.operands(len(self.node.inputs), dtype)

    def turned(self, slot: int) -> onnx_ir.Value:
        """A matrix with its axes exchanged; a parameter that nothing else reads is stored the other way round."""
        operand = self.node.inputs[slot]
        if not isinstance(operand, Parameter) or len(operand.uses) > 1 or not isinstance(operand.dtype, torch.dtype):
            return self("Transpose", self.operand(slot), perm=(1, 0))
        carried = self.carrier.copy_of(operand.origin)
        if carried is not None and carried.is_graph_input():
            return self("Transpose", carried, perm=(1, 0))
        weight, before = operand.weight, None if carried is None else carried.const_value
        turned = ChangedTensor(
            lambda: onnx_ir.tensor_adapters.TorchTensor(weight.load().t().contiguous()),
            dtype=onnx_ir.tensor_adapters.from_torch_dtype(operand.dtype),
            shape=onnx_ir.Shape(operand.shape[::-1]),
            source=before if isinstance(before, onnx_ir.ExternalTensor) else None,
        )
        made = self.carrier.add_initializer(operand.name if carried is None else f"{operand.name}_turned", turned)
        turned.name = made.name
        self.superseded += [] if carried is None else [carried]
        return made

    def few_bits(self, slot: int, bits: int) -> onnx_ir.Value | None:
        """A parameter of 8-bit integers, stored with as few bits as the opset has; None where it is absent."""
        operand = self.node.inputs[slot] if self.given(slot) else None
        if operand is None:
            return None
        kind = stored_type(operand, bits, self.opset) if isinstance(operand, Parameter) else None
        if not isinstance(operand, Parameter) or kind is None:
            raise self.refusal(f"it reads numbers of {bits} bits, which opset {self.opset} has for constants at most")
        carried = self.carrier.copy_of(operand.origin)
        self.superseded += [] if carried is None else [carried]
        tensor = packed(operand, kind)
        made = self.carrier.add_initializer(operand.name, tensor)
        tensor.name = made.name
        return made

    # -- nodes and constants -----------------------------------------------------------------------------------------

    def __getattr__(self, op_type: str) -> Any:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **options: self(op_type, *inputs, **options)

    @overload
    def __call__(self, op_type: str, *inputs: Any, outputs: int, domain: str = "", **attributes: Any) -> Any: ...

    @overload
    def __call__(self, op_type: str, *inputs: Any, **attributes: Any) -> onnx_ir.Value: ...

    def __call__(self, op_type: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add one ONNX node, of the standard operators or another ``domain``: its result, or a tuple of them where
        there are several ``outputs``."""
        given = {name: value for name, value in attributes.items() if value is not None}
        if not domain:
            self._check(op_type, len(inputs), given)
        values = [
            item if item is None or isinstance(item, onnx_ir.Value) else self.constant(item, self.dtype)
            for item in inputs
        ]
        while values and values[-1] is None:
            values.pop()
        made = [self._attribute(name, value) for name, value in given.items()]
        name = self.carrier.unique(f"{self.node.name}_{op_type.lower()}")
        node = onnx_ir.Node(domain, op_type, values, made, name=name, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else self.carrier.unique(f"{name}_{index}")
        self.graph.append(node)
        self.added.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, content: Content, dtype: torch.dtype | None = None) -> onnx_ir.Value:
        """An initializer with this content: a tensor, or numbers (64-bit integers unless ``dtype`` says otherwise)."""
        tensor = content if isinstance(content, torch.Tensor) else torch.tensor(np.asarray(content))
        if dtype is not None:
            tensor = tensor.to(dtype)
        return self.carrier.add_initializer(
            f"{self.node.name}_constant", onnx_ir.tensor_adapters.TorchTensor(tensor.contiguous())
        )

    def cast(self, value: onnx_ir.Value, dtype: torch.dtype) -> onnx_ir.Value:
        if dtype.itemsize == 1 and dtype.is_floating_point and self.opset < FLOAT8_SINCE:
            raise self.refusal(f"{dtype_name(dtype)} needs opset {FLOAT8_SINCE}, and the model has {self.opset}")
        code = int(onnx_ir.tensor_adapters.from_torch_dtype(dtype))
        overflows = {"saturate": 0} if dtype in OVERFLOWING else {}  # as in torch
        return self("Cast", value, to=code, **overflows)

    def sizes(self, sizes: Sequence[Size]) -> onnx_ir.Value:
        """A vector of sizes; dynamic ones are computed from the node's operands and the inputs of the model."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(np.array([int(size) for size in sizes], dtype=np.int64))
        readable = [self._find(value) for _, value in self.node.operands()]
        anchor = onnx_ir.Node("", "Identity", readable, name=self.node.name)  # the sizes are computed in front of it
        self.graph.append(anchor)
        try:
            return build_vector(self.carrier, anchor, sizes, self.node.name, self._sources, np.dtype(np.int64))
        finally:
            self.graph.remove(anchor, safe=True)

    def target(self, shape: Sequence[Size], before: Sequence[Size]) -> onnx_ir.Value:
        """The target of a Reshape from ``before`` to ``shape``, with 0 and -1 where those say a dynamic size."""
        if 0 in shape:
            raise self.refusal("an axis of size 0 cannot be told from one that is copied")
        result: list[Size] = [
            0 if not isinstance(size, int) and axis < len(before) and before[axis] == size else size
            for axis, size in enumerate(shape)
        ]
        open_axes = [axis for axis, size in enumerate(result) if not isinstance(size, int)]
        if len(open_axes) == 1:
            result[open_axes[0]] = -1
        return self.sizes(result if len(open_axes) <= 1 else shape)

    def on_axes(
        self, op_type: str, x: Any, axes: Sequence[int] | None, *, since: int, **attributes: Any
    ) -> onnx_ir.Value:
        """An operator over axes, which are an attribute before opset ``since`` and an input from then on."""
        inputs = [x]
        if axes is not None and self.opset < since:
            attributes["axes"] = [int(axis) for axis in axes]
        elif axes is not None:
            inputs.append(self.constant(np.array(axes, dtype=np.int64)))
        result: onnx_ir.Value = self(op_type, *inputs, **attributes)
        return result

    def unsqueeze(self, x: Any, *axes: int) -> Any:
        return self.on_axes("Unsqueeze", x, axes, since=13) if axes else x

    def squeeze(self, x: Any, *axes: int) -> Any:
        return self.on_axes("Squeeze", x, axes, since=13) if axes else x

    # -- refusals ----------------------------------------------------------------------------------------------------

    def refusal(self, reason: str) -> EmitError:
        """The error that says why the node cannot be written; raise it."""
        return EmitError(f"{self.node.label}, {self._reason}, cannot be written to ONNX: {reason}")

    def _check(self, op_type: str, inputs: int, attributes: dict[str, Any]) -> None:
        if self.opset < OLDEST:
            raise self.refusal(f"opset {self.opset} is older than {OLDEST}")
        signature = _signature(op_type, self.opset)
        if signature is None:
            raise self.refusal(f"opset {self.opset} has no {op_type}")
        most_inputs, known = signature
        if inputs > most_inputs:
            raise self.refusal(f"{op_type} has attributes in place of inputs in opset {self.opset}")
        unknown = [name for name in attributes if name not in known]
        if unknown:
            raise self.refusal(f"{op_type} has no attribute {unknown[0]} in opset {self.opset}")

    def _attribute(self, name: str, value: Any) -> onnx_ir.Attr:
        plain = self._plain(name, value)
        kind = None  # said for numbers, since onnx_ir looks for all sorts of things in a list before it looks for them
        if isinstance(plain, list) and plain:
            kinds = {int: onnx_ir.AttributeType.INTS, float: onnx_ir.AttributeType.FLOATS}
            kind = kinds.get(type(plain[0])) if len({type(part) for part in plain}) == 1 else None
        return onnx_ir.convenience.convert_attribute(name, plain, kind)

    def _plain(self, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._plain(name, part) for part in value]
        if isinstance(value, sympy.Basic):
            raise self.refusal(f"its {name} is the dynamic size {value}")
        return int(value) if isinstance(value, bool) else value


@cache
def _signature(op_type: str, opset: int) -> tuple[int, frozenset[str]] | None:
    """How many inputs a standard operator takes at most, and its attributes: a schema copies them all at each look."""
    import onnx.defs

    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    return schema.max_input, frozenset(schema.attributes)


def spell(onnx: OnnxSpeller) -> tuple[onnx_ir.Value, ...]:
    """Write the node by its record; gives one ONNX value per result. Raises EmitError where there is no spelling."""
    node, operator = onnx.node, onnx.node.operator
    if node.regions:
        raise onnx.refusal("it has nested graphs")
    if operator.spell is not None:
        found = operator.spell(onnx, node)
    elif operator.direct_forms:
        found = _spell_direct(onnx, operator.direct_forms)
    else:
        raise onnx.refusal(f"{node.op} has no spelling there yet, leave that pass out")
    values = found if isinstance(found, tuple) else (found,)
    if len(values) != len(node.outputs):
        raise onnx.refusal(f"its spelling gives {len(values)} of {len(node.outputs)} results")
    return values


def _spell_direct(onnx: OnnxSpeller, forms: Sequence[str]) -> Any:
    """The same operator: operands in order, of one type, and the attributes that are not at their defaults."""
    node = onnx.node
    dynamic = {name: value for name, value in node.attributes.items() if value != node.operator.attributes[name]}
    attributes = {name: value for name, value in dynamic.items() if value is not None}
    inputs = onnx.all_operands(onnx.common_type)
    return onnx(forms[0], *inputs, outputs=len(node.outputs), **attributes)
