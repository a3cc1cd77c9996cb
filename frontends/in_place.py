"""The functional form of an operator that writes: ``relu_`` is ``relu``, ``div(..., out=x)`` is ``div``, ``copy_`` is a
cast and an expand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from regauge.frontends.traced_sizes import TracedBuilder
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import same

Form = tuple[Any, list[Any], dict[str, Any]]


def functional_form(target: Any, args: list[Any], kwargs: dict[str, Any]) -> Form | None:
    """Operator, arguments and options that compute what ``target`` writes; None where torch has no such operator."""
    aten = torch.ops.aten
    if "out" in kwargs:
        return _without_out(target, args, kwargs)
    namespace, _, name = target._schema.name.partition("::")
    if name == "zero_":
        return aten.full_like.default, [args[0], 0], {}
    if name == "fill_":
        return aten.full_like.default, [args[0], args[1]], {}
    packet = getattr(getattr(torch.ops, namespace), _functional_name(name), None) if name.endswith("_") else None
    overload = target._schema.overload_name or "default"
    if packet is None or overload not in packet.overloads():
        return None
    return getattr(packet, overload), args, kwargs


def _without_out(target: Any, args: list[Any], kwargs: dict[str, Any]) -> Form | None:
    """``div(a, b)`` for ``div(a, b, out=c)``, where both give the same type."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Value)]
    if len({value.dtype for value in given}) > 1:
        return None
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments if not argument.is_out]
    for name in target.overloadpacket.overloads():
        overload = getattr(target.overloadpacket, name)
        if [(argument.name, str(argument.type)) for argument in overload._schema.arguments] == wanted:
            return overload, args, {key: value for key, value in kwargs.items() if key != "out"}
    return None


def _functional_name(name: str) -> str:
    """``relu`` for ``relu_``, ``__and__`` for ``__iand__``."""
    if name.startswith("__i") and name.endswith("__"):
        return "__" + name[3:]
    return name[:-1]


def copied(build: TracedBuilder, target: Any, args: list[Any], written: Sequence[fx.Node]) -> Value | None:
    """What a tensor holds after another was copied into it: the other, in its type and shape; None for other calls."""
    name = target._schema.name.partition("::")[2]
    if name not in ("copy_", "fill_") or not isinstance(args[1], Value):
        return None
    source, base = args[1], args[0]
    if source.dtype != base.dtype:
        source = build.cast(source, dtype=base.dtype)
    shape = build.sizes.shape(written[0].meta["val"])
    if len(shape) == source.rank and all(same(a, b) for a, b in zip(shape, source.shape, strict=True)):
        return source
    return build.expand(source, shape=shape)  # type: ignore[no-any-return]
