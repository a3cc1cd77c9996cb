"""The law of names: an ATen operator that a record stands for without an adapter computes what the record does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from regauge.ir.laws.cases import Case
from regauge.ir.operator import Operator

_ADVICE = "give the name an adapter, or leave it out of aten"
_NOT_HERE = object()


def check_aten_names(case: Case) -> None:
    """Raises LawError where ATen computes something else on the sample; overloads that cannot take it are left out."""
    record = case.node.operator
    for name, adapter in record.aten.items():
        for overload in _overloads(name) if adapter is None else ():
            arguments = _arguments(record, overload, case)
            if arguments is None:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                try:
                    raw = overload(*arguments[0], **arguments[1])
                except Exception:  # an overload for other types of operands
                    continue
            results = list(raw) if isinstance(raw, tuple | list) else [raw]
            case.expect_same(results[: len(case.results)], case.results, f"aten {overload}", _ADVICE)


def _overloads(name: str) -> Iterator[Any]:
    """The overloads that a name of a record means, in the version of torch that is here."""
    namespace, colons, rest = name.partition("::")
    stem, _, only = rest.partition(".") if colons else name.partition(".")
    packet = getattr(getattr(torch.ops, namespace if colons else "aten"), stem, None)
    if packet is not None:
        yield from (getattr(packet, o) for o in packet.overloads() if not only or o == only)


def _arguments(record: Operator, overload: Any, case: Case) -> tuple[list[Any], dict[str, Any]] | None:
    """The sample as arguments of an overload, filled as capture reads them; None where it has no place for it."""
    operands, attributes = list(case.operands), dict(case.node.attributes)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in overload._schema.arguments:
        kind = str(argument.type)
        default = argument.default_value if argument.has_default_value() else _NOT_HERE
        if argument.is_out:
            return None
        if argument.name in record.attributes:
            value = attributes.pop(argument.name, default)
        elif "List[" in kind and "Tensor" in kind:
            value, operands = operands, []
        elif "Tensor" in kind or (operands and not argument.kwarg_only and not isinstance(operands[0], torch.Tensor)):
            value = operands.pop(0) if operands else default
        else:
            value = default
        if value is _NOT_HERE:
            return None
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    left = [n for n, value in attributes.items() if value != _default(record, n)]
    return None if left or any(operand is not None for operand in operands) else (args, kwargs)


def _default(record: Operator, attribute: str) -> Any:
    default = record.attributes[attribute]
    return _NOT_HERE if default is inspect.Parameter.empty else default
