"""``torch_call``: a torch operator without a record, kept verbatim and run by torch; nothing it touches may be cut.

    %conv = torch_call(%x, %w, target="aten.special_i0.default", arguments=("%0", ("%1", 2)), options=(("eps", 1e-5),))

``target`` is the path of the operator under ``torch.ops``; ``arguments`` are its positional arguments and ``options``
its keyword arguments, as nested tuples of plain values in which ``"%i"`` stands for operand i and ``"&i"`` for region i
(a string that really starts with one of these signs is written with the sign twice).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.errors import OperatorError
from regauge.ir.operator import operator

OPERAND, REGION = "%", "&"


def tensor_schema(reads: int, writes: int) -> str:
    """The schema of an operator that takes and gives so many tensors, without its name."""
    arguments = ", ".join(f"Tensor x{place}" for place in range(reads))
    results = "Tensor" if writes == 1 else f"({', '.join(['Tensor'] * writes)})"
    return f"({arguments}) -> {results}"


def slot(index: int) -> str:
    """The marker of operand ``index`` inside ``arguments``."""
    return f"{OPERAND}{index}"


def region_slot(index: int) -> str:
    """The marker of region ``index`` inside ``arguments``."""
    return f"{REGION}{index}"


def literal_text(text: str) -> str:
    """A string argument, with a leading sign doubled so that it is not taken for a marker."""
    return text[0] + text if text[:1] in (OPERAND, REGION) else text


def replace_slots(value: Any, replace: Callable[[str, int], Any]) -> Any:
    """``value`` with every marker replaced by ``replace(sign, index)``; nested tuples keep their form."""
    if isinstance(value, tuple):
        return tuple(replace_slots(part, replace) for part in value)
    if isinstance(value, str) and value[:1] in (OPERAND, REGION):
        return value[1:] if value[1:2] == value[0] else replace(value[0], int(value[1:]))
    return value


def find_target(target: str) -> Any:
    """The torch operator at a path such as ``aten.add.Tensor``; raises OperatorError where it is not registered."""
    found: Any = torch.ops
    for part in target.split("."):
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError) as error:
            message = f"torch has no operator {target!r}: import the library that registers it before running the graph"
            raise OperatorError(message) from error
    return found


def written_arguments(target: Any) -> list[int]:
    """Positions in the schema of the tensors an operator writes into; empty for higher-order operators."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    return [i for i, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write]


def _flat(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _flat(part)


def plain_numbers(schema: Any) -> set[int | str]:
    """Positions and names of the arguments that take numbers or sizes and no tensors."""
    if schema is None:
        return set()
    places = [(at, argument.name) for at, argument in enumerate(schema.arguments) if "Tensor" not in str(argument.type)]
    return {key for place in places for key in place}


def _number(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_number(part) for part in value)
    return value.item() if isinstance(value, torch.Tensor) else value


def _as_torch_calls_it(region: Callable[..., Any]) -> Callable[..., Any]:
    """A region gives a list of results; torch's higher-order operators expect one result bare."""

    def call(*arguments: Any) -> Any:
        results = tuple(region(*arguments))
        return results[0] if len(results) == 1 else results

    return call


def _rule(call: Call) -> list[Axes]:
    return call.opaque(f"{call['target']} has no axis rule and is kept as it is")


@operator(rule=_rule)
def torch_call(
    *tensors: Any,
    target: str,
    arguments: tuple[Any, ...],
    options: tuple[tuple[str, Any], ...] = (),
    regions: Sequence[Callable[..., Any]] = (),
) -> tuple[torch.Tensor, ...]:
    """The tensor results of the call, in order; tensors the operator writes into are copied first and come last."""
    function = find_target(target)

    def fill(sign: str, index: int) -> Any:
        return tensors[index] if sign == OPERAND else _as_torch_calls_it(regions[index])

    positional = list(replace_slots(arguments, fill))
    named = {name: replace_slots(value, fill) for name, value in options}
    schema = getattr(function, "_schema", None)
    numbers = plain_numbers(schema)  # where the schema wants numbers or sizes, one-element tensors become numbers
    positional = [_number(value) if place in numbers else value for place, value in enumerate(positional)]
    named = {name: _number(value) if name in numbers else value for name, value in named.items()}
    copies = []
    for place in written_arguments(function):
        name = schema.arguments[place].name  # type: ignore[union-attr]
        holder: Any = positional if place < len(positional) else named
        key: Any = place if place < len(positional) else name
        if isinstance(holder[key] if holder is positional else holder.get(key), torch.Tensor):
            holder[key] = holder[key].clone()
            copies.append(holder[key])
    result = function(*positional, **named)
    if isinstance(result, bool | int | float | complex):
        result = torch.as_tensor(result)
    return (*_flat(result), *copies)
