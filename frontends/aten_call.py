"""One call of a torch operator: to the record that stands for it, through its adapter, or kept verbatim as opaque."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from regauge.frontends.traced_sizes import TracedBuilder
from regauge.ir.edit import Expected, remove_node
from regauge.ir.errors import OperatorError, RegaugeError, first_line
from regauge.ir.graph import Value
from regauge.ir.operator import Operator, find_aten
from regauge.ir.ops.torch_opaque import literal_text, region_slot, slot, written_arguments
from regauge.ir.sizes.expressions import same

# Where a tensor lives is not part of a graph: it runs where its weights are.
PLACEMENT = ("device", "layout", "pin_memory", "memory_format")

Truth = Expected
"""Shape and dtype of every result as torch traced it; None for a result that is no tensor."""

Emitted = list[Value | None]


@dataclass(frozen=True)
class Refusal:
    """Why a call was kept opaque."""

    operator: str
    source: str
    reason: str


@dataclass(frozen=True)
class RegionAt:
    """Stands for a region of the node being made, inside its arguments."""

    index: int


def target_name(target: Any) -> str:
    """``add.Tensor`` for aten, ``namespace::name`` for a custom operator: the key of the registry."""
    namespace, _, name = target._schema.name.partition("::")
    overload = target._schema.overload_name
    if namespace == "aten":
        return f"{name}.{overload}" if overload else str(name)
    return f"{namespace}::{name}"


def target_path(target: Any) -> str:
    """``aten.add.Tensor``: the path of an operator under ``torch.ops``."""
    namespace, _, name = target._schema.name.partition("::")
    return f"{namespace}.{name}.{target._schema.overload_name or 'default'}"


def emit_call(build: TracedBuilder, target: Any, args: Sequence[Any], kwargs: dict[str, Any], truth: Truth) -> Emitted:
    """Nodes for one call by its record; raises RegaugeError where there is none or its results are not torch's.

    On refusal nothing is left behind in the graph.
    """
    name = target_name(target)
    found = find_aten(name)
    if found is None:
        raise OperatorError("it has no operator record")
    record, adapter = found
    mark = len(build.added)
    build.expected = truth
    try:
        if adapter is None:
            return _direct(build, record, target, args, kwargs, truth)
        options = {key: value for key, value in kwargs.items() if key not in PLACEMENT}
        results = _as_list(adapter(build, *args, **options), len(truth))
        _check(results, truth)
        return results
    except Exception as error:  # whatever goes wrong in an adapter, an opaque call is right
        roll_back(build, mark)
        if isinstance(error, RegaugeError):
            raise
        line = first_line(error)
        raise OperatorError(f"its adapter failed: {line}") from error
    finally:
        build.expected = ()


def roll_back(build: TracedBuilder, mark: int) -> None:
    """Remove the nodes added since ``mark``, last first."""
    for node in reversed(build.added[mark:]):
        remove_node(build.graph, node)
    del build.added[mark:]


def _as_list(result: Any, count: int) -> Emitted:
    results = list(result) if isinstance(result, tuple | list) else [result]
    if len(results) < count:
        results += [None] * (count - len(results))
    return results[:count]


def _check(results: Emitted, truth: Truth) -> None:
    for position, (value, expected) in enumerate(zip(results, truth, strict=True)):
        if value is None or expected is None:
            continue
        if not isinstance(value, Value):
            raise OperatorError(f"its adapter gave {value!r} where a tensor is expected")
        shape, dtype = expected
        agree = len(shape) == value.rank and all(same(a, b) for a, b in zip(shape, value.shape, strict=True))
        if not agree or dtype != value.dtype:
            stated = f"{dtype} of shape {shape}"
            raise OperatorError(f"result {position} of its record is {value.signature}, but torch gives {stated}")


def _direct(
    build: TracedBuilder, record: Operator, target: Any, args: Sequence[Any], kwargs: dict[str, Any], truth: Truth
) -> Emitted:
    """Tensors (and numbers no attribute claims) to operand slots in order, the rest to attributes by name."""
    operands: list[Any] = []
    attributes: dict[str, Any] = {}
    variadic = bool(record.slots) and record.slots[-1].startswith("*")
    for position, argument in enumerate(target._schema.arguments):
        given = position < len(args) or argument.name in kwargs
        default = argument.default_value if argument.has_default_value() else None
        value = args[position] if position < len(args) else kwargs.get(argument.name, default)
        if argument.name in record.attributes:
            attributes[argument.name] = value
        elif "Tensor" in str(argument.type):
            operands.extend(value if isinstance(value, list | tuple) else [value])
        elif not argument.kwarg_only and (variadic or len(operands) < len(record.slots)) and _is_number(value):
            operands.append(value)
        elif given and argument.name not in PLACEMENT and value != default:
            raise OperatorError(f"its record {record.name} has no place for {argument.name}={value!r}")
    if any(expected is None for expected in truth):
        raise OperatorError("it has results that are no tensors")
    missing = [n for n, d in record.attributes.items() if n not in attributes and d is inspect.Parameter.empty]
    if missing:
        raise OperatorError(f"its record {record.name} needs {missing[0]!r}, which torch does not give")
    results = build(record.name, *operands, results=[t for t in truth if t is not None], **attributes)
    return _as_list(results, len(truth))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | complex | sympy.Basic)


def emit_opaque(
    build: TracedBuilder, target: Any, args: Sequence[Any], kwargs: dict[str, Any], truth: Truth
) -> Emitted:
    """The call kept verbatim as one ``torch_call``; tensors it writes into follow its results, as new values.

    Raises OperatorError where no result is a tensor.
    """
    tensors: list[Value] = []
    arguments = encode(args, tensors)
    keep = {k: v for k, v in kwargs.items() if k not in PLACEMENT or (k == "memory_format" and v is not None)}
    options = tuple((name, encode(value, tensors)) for name, value in keep.items())
    stated = [t for t in truth if t is not None]
    schema = target._schema
    for place in written_arguments(target):
        value = args[place] if place < len(args) else kwargs.get(schema.arguments[place].name)
        if isinstance(value, Value):
            stated.append((value.shape, value.dtype))
    if not stated:
        raise OperatorError(f"{target_path(target)} gives no tensor")
    results = build(
        "torch_call",
        *tensors,
        name=schema.name.partition("::")[2].strip("_"),
        results=stated,
        target=target_path(target),
        arguments=arguments,
        options=options,
    )
    found = iter(results if isinstance(results, tuple) else (results,))
    return [next(found) if expected is not None else None for expected in truth] + list(found)


def encode(value: Any, tensors: list[Value]) -> Any:
    """Arguments as plain nested tuples: values become slots and are collected in ``tensors``."""
    if isinstance(value, Value):
        if value not in tensors:
            tensors.append(value)
        return slot(tensors.index(value))
    if isinstance(value, RegionAt):
        return region_slot(value.index)
    if isinstance(value, list | tuple | torch.Size):
        return tuple(encode(part, tensors) for part in value)
    return literal_text(value) if isinstance(value, str) else value
