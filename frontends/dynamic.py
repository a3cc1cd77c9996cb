"""Dynamic axes as users name them, as torch.export wants them, and what became of them.

    dynamic = {"input_ids": {0: "batch", 1: ("seq", 1, 2048)}, "cache.0": {0: "batch"}}

Keys are names (or positions) of forward's arguments, paths into nested ones, or the names of keyword arguments.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from regauge.frontends.provenance import is_users
from regauge.frontends.pytrees import Leaf, step_name
from regauge.ir.errors import CaptureError, RegaugeWarning
from regauge.ir.sizes.expressions import symbol

Range = tuple[int, int | None]


@dataclass(frozen=True)
class Request:
    """One axis that is to vary."""

    name: str
    range: Range = (1, None)


Requests = dict[str, dict[int, Request]]
"""Requests by leaf name and axis."""


def read_requests(dynamic: Any, leaves: Sequence[Leaf], arguments: Sequence[str]) -> Requests:
    """The axes a user wants dynamic; raises CaptureError for a name, axis or range that does not fit the inputs."""
    requests: Requests = {}
    if dynamic is None:
        return requests
    if not isinstance(dynamic, Mapping):
        dynamic = dict(enumerate(dynamic))
    tensors = {leaf.name: leaf.value for leaf in leaves if leaf.is_tensor}
    for key, spec in dynamic.items():
        if isinstance(key, int) and not -len(arguments) <= key < len(arguments):
            raise CaptureError(f"dynamic has position {key}, but the call has {len(arguments)} positional arguments")
        _collect(arguments[key] if isinstance(key, int) else str(key), spec, tensors, requests)
    return requests


def _collect(path: str, spec: Any, tensors: Mapping[str, torch.Tensor], requests: Requests) -> None:
    if spec is None:
        return
    if path in tensors:
        found = _axes(path, spec, tensors[path])
        if found:
            requests[path] = found
        return
    if not any(name.startswith(path + ".") for name in tensors):
        raise CaptureError(f"dynamic names {path!r}, which is no tensor input: the inputs are {', '.join(tensors)}")
    if not isinstance(spec, Mapping | list | tuple):
        raise CaptureError(f"dynamic[{path!r}] must say which of {path}.* vary, got {spec!r}")
    for key, inner in spec.items() if isinstance(spec, Mapping) else enumerate(spec):
        _collect(f"{path}.{key}", inner, tensors, requests)


def _axes(path: str, spec: Any, tensor: torch.Tensor) -> dict[int, Request]:
    if not isinstance(spec, Mapping | list | tuple):
        raise CaptureError(f"dynamic[{path!r}] must map axes to names, such as {{0: 'batch'}}, got {spec!r}")
    found = {}
    for axis, wanted in spec.items() if isinstance(spec, Mapping) else enumerate(spec):
        if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
            raise CaptureError(
                f"dynamic[{path!r}] names axis {axis!r}, but the input has the shape {tuple(tensor.shape)}"
            )
        request = _request(path, axis % tensor.dim(), wanted, tensor.shape[axis])
        if request is not None:
            found[axis % tensor.dim()] = request
    return found


def _request(path: str, axis: int, wanted: Any, size: int) -> Request | None:
    """What one axis was asked to be: a name, (name, min, max), a torch.export.Dim, or a number for a fixed size."""
    where = f"dynamic[{path!r}][{axis}]"
    if wanted is None:
        return None
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if wanted != size:
            raise CaptureError(f"{where} fixes the size {wanted}, but the example input has {size}")
        return None
    if isinstance(wanted, str):
        request = Request(wanted)
    elif isinstance(wanted, tuple) and wanted and isinstance(wanted[0], str):
        _, low, high = (*wanted, None, None)[:3]
        request = Request(wanted[0], (1 if low is None else low, high))
    elif hasattr(wanted, "__name__"):
        high = getattr(wanted, "max", None)
        request = Request(wanted.__name__, (int(getattr(wanted, "min", 1)), high if isinstance(high, int) else None))
    elif type(wanted).__name__ == "_DimHint":
        if "STATIC" in str(getattr(wanted, "type", wanted)):
            return None
        request = Request(f"{path}_{axis}".replace(".", "_"), (getattr(wanted, "min", None) or 1, wanted.max))
    else:
        raise CaptureError(f"{where} is {wanted!r}: expected a name, (name, min, max), a torch.export.Dim or a number")
    low, high = request.range
    if not isinstance(low, int) or (high is not None and (not isinstance(high, int) or high < low)):
        raise CaptureError(f"{where} has the range {request.range}: expected integers min <= max")
    if not request.name.isidentifier():
        raise CaptureError(f"{where} is named {request.name!r}: use a name such as 'batch'")
    if size > 1 and not (low <= size and (high is None or size <= high)):
        raise CaptureError(
            f"{where} is to stay in {low}..{high if high is not None else ''}, but the example has {size}"
        )
    return request


def widen_examples(args: Any, kwargs: Any, leaves: Sequence[Leaf], requests: Requests) -> tuple[Any, Any, list[Leaf]]:
    """Examples of size 1 on a dynamic axis are doubled, since torch takes 0 and 1 for constants."""
    widened = []
    for leaf in leaves:
        value = leaf.value
        for axis in requests.get(leaf.name, {}):
            if value.shape[axis] == 1:
                value = torch.cat([value, value], axis)
        widened.append(replace(leaf, value=value))
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if all(new.value is old for new, old in zip(widened, flat, strict=True)):
        return args, kwargs, list(leaves)
    args, kwargs = pytree.tree_unflatten([leaf.value for leaf in widened], spec)
    return args, kwargs, widened


def export_spec(bound: Mapping[str, Any], heads: Mapping[str, str], requests: Requests) -> dict[str, Any] | None:
    """torch.export's ``dynamic_shapes`` for the bound arguments; None when nothing varies.

    ``heads`` gives the leaf-name prefix of each bound argument.
    """
    if not requests:
        return None
    return {name: _tree(value, heads.get(name, name), requests) for name, value in bound.items()}


def _tree(value: Any, path: str, requests: Requests) -> Any:
    if isinstance(value, torch.Tensor):
        axes = requests.get(path)
        return {axis: _hint(request) for axis, request in axes.items()} if axes else None
    if isinstance(value, Mapping) and type(value) in pytree.BUILTIN_TYPES:
        return {key: _tree(part, f"{path}.{key}", requests) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_tree(part, f"{path}.{i}", requests) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if type(value) in pytree.SUPPORTED_NODES:
        found, _ = pytree.tree_flatten_with_path(value)
        return [_tree(part, ".".join([path, *map(step_name, steps)]), requests) for steps, part in found]
    return None


def _hint(request: Request) -> Any:
    low, high = request.range
    return Dim.AUTO(min=low, max=high)


def name_symbols(
    inputs: Sequence[tuple[Leaf, fx.Node]], requests: Requests
) -> tuple[dict[sympy.Symbol, sympy.Symbol], dict[sympy.Symbol, Range]]:
    """Our symbol for each of the program's, and the ranges of ours; warns of axes that the model fixed."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    ranges: dict[sympy.Symbol, Range] = {}
    for leaf, node in inputs:
        for axis, request in requests.get(leaf.name, {}).items():
            size = node.meta["val"].shape[axis]
            if isinstance(size, int) or not size.node.expr.free_symbols:
                _warn_fixed(leaf, axis, request, int(size), node)
                continue
            ours = symbol(request.name)
            for inner in size.node.expr.free_symbols:
                bare = inner == size.node.expr
                names.setdefault(inner, ours if bare else symbol(f"{request.name}_part"))
                ranges.setdefault(names[inner], request.range if bare else (1, None))
    for _, node in inputs:
        _keep_own_symbols(node, names, ranges)
    return names, ranges


_IS_A_NUMBER = re.compile(r"^[^%]* == -?[0-9.]+$|^-?[0-9.]+ == [^%]*$")


def warn_of_guards(program: Any) -> None:
    """Warn of dynamic sizes that tracing took for those of the example, as ``int(0.5 * length)`` does in torch.

    Such a program holds for sizes of one result alone, and nothing in its graph says so. That sizes are equal or
    divisible is no such thing: where they are not, the sum or the reshape that wants it fails.
    """
    guards = [text for text in getattr(program, "_guards_code", None) or () if _IS_A_NUMBER.search(text)]
    if guards:
        plain = re.sub(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", r"\1.shape[\2]", guards[0]).replace(
            "torch.sym_float", "float"
        )
        more = f" (and {len(guards) - 1} more)" if len(guards) > 1 else ""
        warnings.warn(
            f"the graph is right only where {plain}{more}, as for the example: the model makes Python numbers of "
            "dynamic sizes; compute them with integers, as in length // 2",
            RegaugeWarning,
            stacklevel=4,
        )


def _keep_own_symbols(
    node: fx.Node, names: dict[sympy.Symbol, sympy.Symbol], ranges: dict[sympy.Symbol, Range]
) -> None:
    """Symbols of a ready-made ExportedProgram that nobody named keep torch's names."""
    for size in getattr(node.meta.get("val"), "shape", ()):
        for inner in () if isinstance(size, int) else size.node.expr.free_symbols:
            ranges.setdefault(names.setdefault(inner, symbol(str(inner))), (1, None))


def _warn_fixed(leaf: Leaf, axis: int, request: Request, size: int, node: fx.Node) -> None:
    place = _where_fixed(node, leaf, axis)
    where = f" by {place}" if place else " by an operator that cannot vary there"
    warnings.warn(
        f"axis {axis} of input {leaf.name!r} was to be {request.name!r}, but it is fixed at {size}{where}: "
        f"the graph only takes {size} there",
        RegaugeWarning,
        stacklevel=2,
    )


def _where_fixed(node: fx.Node, leaf: Leaf, axis: int) -> str:
    """The source line whose condition made torch fix an axis, where torch recorded it."""
    environment: Any = getattr(getattr(node.meta["val"], "fake_mode", None), "shape_env", None)
    head = leaf.name.partition(".")[0]
    for inner, places in getattr(environment, "var_to_sources", {}).items():
        names = [str(source.name() if callable(source.name) else source.name) for source in places]
        if not any(f"'{head}'" in name and name.endswith(f"[{axis}]") for name in names):
            continue
        place = environment.replacements_slocs.get(inner)
        frame: Any = getattr(place, "maybe_user_loc", None) or getattr(place, "framework_loc", None)
        if hasattr(frame, "filename") and not is_users(frame.filename):
            return f"torch ({frame.name})"
        if hasattr(frame, "filename"):
            return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        if frame:
            return str(frame)
    return ""
