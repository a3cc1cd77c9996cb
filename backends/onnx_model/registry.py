"""Keeps the tables of operators that torch's ONNX exporter builds from one export to the next.

Every ``torch.onnx.export`` reads the source of some thousand translations anew to list them, and asks for all operators
that are composed of others once for each namespace: 0.5 s of the 0.75 s that a small graph takes. Both stay the same
until another operator or translation is registered, so they are kept under the number of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from unittest import mock

import torch

_KEPT: dict[tuple[str, Hashable], tuple[Hashable, Any]] = {}  # by what it is: what was registered then, and the result


@contextlib.contextmanager
def kept_registry() -> Iterator[None]:
    """Exports within do not list again what was listed before; a torch that has neither place works as it does."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            stack.enter_context(
                mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_listed_once(ONNXRegistry)))
            )
        with contextlib.suppress(ImportError, AttributeError):
            import torch._export.utils as composed

            name = "_materialize_cpp_cia_ops"
            stack.enter_context(mock.patch.object(composed, name, _called_once(name, getattr(composed, name))))
        yield


def _listed_once(registry: Any) -> Callable[..., Any]:
    """``ONNXRegistry.from_torchlib``, which gives a copy of the registry that it made before: exports add to theirs."""
    make = registry.from_torchlib

    def from_torchlib(*args: Any, **options: Any) -> Any:
        whole = _kept(("registry", (args, tuple(options.items()))), lambda: make(*args, **options))
        copy = registry()
        vars(copy).update(vars(whole), functions={name: list(found) for name, found in whole.functions.items()})
        return copy

    return from_torchlib


def _called_once(name: str, function: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: _kept((name, ()), function)


def _kept(what: tuple[str, Hashable], make: Callable[[], Any]) -> Any:
    registered, result = _KEPT.get(what, (None, None))
    if registered != _registered():
        result = make()
        _KEPT[what] = _registered(), result
    return result


def _registered() -> Hashable:
    """How many operators torch knows, and how many translations onnxscript."""
    from onnxscript.function_libs.torch_lib.registration import default_registry

    translated = sum(len(each.overloads) + len(each.complex) for _, each in default_registry.items())
    return len(torch._C._dispatch_get_all_op_names()), translated
