"""The arguments and the result of the emitted forward, in the form the captured module had them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from regauge.backends.torch_module.source import is_plain_name
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph

Leaves = Iterator[tuple[str | None, Any]]


@dataclass
class Signature:
    """``parameters`` as written in ``def forward``; ``prologue`` unpacks nested ones; ``names`` per graph input."""

    parameters: list[str] = field(default_factory=list)
    prologue: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def signature(graph: Graph) -> Signature:
    """The call form of a graph: that of the captured module, else its inputs by name."""
    spec = graph.metadata.get("torch", {}).get("in_spec")
    result = Signature()
    if spec is None:
        result.names = _unique([value.name for value in graph.inputs])
        result.parameters = list(result.names)
        return result
    positional, named = _children(spec)
    leaves = iter(_leaf_names(graph, spec.num_leaves))
    plain: list[str] = []
    optional: list[str] = []
    for position, child in enumerate(_children(positional)):
        _parameter(child, None if _is_leaf(child) else f"inputs_{position}", leaves, result, plain, optional)
    keys = list(named.context) if not _is_leaf(named) else []
    for key, child in zip(keys, _children(named), strict=True):
        _parameter(child, key, leaves, result, plain, optional)
    result.parameters = [*plain, *optional]
    return result


def _leaf_names(graph: Graph, count: int) -> list[tuple[str | None, Any]]:
    """A name per leaf of the arguments, or None and the value of a leaf that is no tensor but was fixed at capture."""
    torch_born = graph.metadata["torch"]
    leaves = torch_born.get("leaves") or [(name, None) for name in torch_born["input_names"]]
    tensors = set(torch_born["input_names"])
    if count != len(leaves) or len(tensors) != len(graph.inputs):
        raise EmitError(
            f"the captured module takes {len(tensors)} tensors but the graph has {len(graph.inputs)} inputs: "
            "restore graph.inputs, or drop graph.metadata['torch'] to get a module of the graph's own inputs"
        )
    names = _unique([name for name, _ in leaves])
    return [(name if leaf in tensors else None, value) for name, (leaf, value) in zip(names, leaves, strict=True)]


def _parameter(
    spec: Any, key: str | None, leaves: Leaves, result: Signature, plain: list[str], optional: list[str]
) -> None:
    """Add one argument; those after an argument with a default need one too."""
    if not _is_leaf(spec):
        assert key is not None
        plain.append(key) if not optional else optional.append(f"{key}=None")
        _unpack(spec, key, leaves, result)
        return
    leaf, value = next(leaves)
    if leaf is None:
        optional.append(f"{key or f'unused_{len(optional)}'}={value!r}")
        return
    name = key or leaf
    result.names.append(name)
    plain.append(name) if not optional else optional.append(f"{name}=None")


def _unpack(spec: Any, text: str, leaves: Leaves, result: Signature) -> None:
    """Lines that read the tensors out of a nested argument."""
    if _is_leaf(spec):
        leaf, _ = next(leaves)
        if leaf is not None:
            result.names.append(leaf)
            result.prologue.append(f"{leaf} = {text}")
        return
    for key, child in zip(_keys(spec), _children(spec), strict=True):
        _unpack(child, f"{text}{key}", leaves, result)


def _keys(spec: Any) -> list[str]:
    """How each child of a container is read: ``[0]``, ``["image"]``, ``.field``."""
    kind, count = spec.type, len(_children(spec))
    if kind in (tuple, list) or (isinstance(kind, type) and issubclass(kind, tuple)):
        return [f"[{i}]" for i in range(count)]
    if isinstance(kind, type) and issubclass(kind, dict):
        return [f"[{key!r}]" for key in _dict_keys(spec)]
    names = _dict_keys(spec)
    if len(names) == count and all(isinstance(name, str) for name in names):
        return [f".{name}" for name in names]
    raise EmitError(f"an argument of type {kind} cannot be taken apart in source: capture a module that takes tensors")


def _dict_keys(spec: Any) -> list[Any]:
    context = spec.context
    if isinstance(context, list | tuple) and len(context) == 2 and isinstance(context[1], list | tuple):
        context = context[1]  # defaultdict keeps (factory, keys)
    return list(context) if isinstance(context, list | tuple) else []


def result_expression(graph: Graph, texts: Sequence[str], imports: set[str]) -> str:
    """What forward returns: the captured module's structure around the graph's outputs."""
    spec = graph.metadata.get("torch", {}).get("out_spec")
    if spec is None:
        return ", ".join(texts)
    if spec.num_leaves != len(texts):
        raise EmitError(f"the captured module returns {spec.num_leaves} values but the graph has {len(texts)} outputs")
    text = _build(spec, iter(texts), imports)
    return text[1:-1] if spec.type is tuple and len(texts) > 1 and text.startswith("(") else text


def _build(spec: Any, texts: Iterator[str], imports: set[str]) -> str:
    if _is_leaf(spec):
        return next(texts)
    parts = [_build(child, texts, imports) for child in _children(spec)]
    kind = spec.type
    if kind is tuple:
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if kind is list:
        return f"[{', '.join(parts)}]"
    if kind is dict:
        return _display(_dict_keys(spec), parts)
    cls = spec.context if isinstance(spec.context, type) else kind  # a named tuple is known by its context
    if "<locals>" in cls.__qualname__:
        raise EmitError(f"the result type {cls.__name__} is defined inside a function: define it at module level")
    if hasattr(cls, "n_sequence_fields"):  # a struct sequence, as ``x.max(1)`` gives: its name may hide a builtin
        imports.add(f"import {cls.__module__.partition('.')[0]}")
        return f"{cls.__module__}.{cls.__qualname__}(({', '.join(parts)}))"
    imports.add(f"from {cls.__module__} import {cls.__qualname__.partition('.')[0]}")
    if issubclass(cls, tuple):
        return f"{cls.__qualname__}({', '.join(parts)})"
    keys = _dict_keys(spec)
    if cls is OrderedDict:
        return f"OrderedDict({_display(keys, parts)})"
    if len(keys) == len(parts) and all(isinstance(key, str) and is_plain_name(key) for key in keys):
        return f"{cls.__qualname__}({', '.join(f'{key}={part}' for key, part in zip(keys, parts, strict=True))})"
    raise EmitError(f"a result of type {cls.__qualname__} cannot be built in source: return tensors, tuples or dicts")


def _display(keys: Sequence[Any], parts: Sequence[str]) -> str:
    """``{"mask": x, 0: y}``"""
    return "{" + ", ".join(f"{key!r}: {part}" for key, part in zip(keys, parts, strict=True)) + "}"


def _is_leaf(spec: Any) -> bool:
    return bool(spec.is_leaf())


def _children(spec: Any) -> list[Any]:
    return list(spec.children())


def _unique(names: Sequence[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        base = re.sub(r"\W", "_", name) or "x"
        base = f"x_{base}" if base[0].isdigit() else base
        candidate, count = base, 0
        while candidate in result:
            count += 1
            candidate = f"{base}_{count}"
        result.append(candidate)
    return result
