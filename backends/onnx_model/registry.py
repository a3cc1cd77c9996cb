"""Keeps the tables of operators that torch's ONNX exporter builds from one export to the next.

Every ``torch.onnx.export`` reads the source of some thousand translations anew to list them, and asks several times for
all operators that are composed of others, each time once for each namespace: 0.5 s of the 0.75 s that a small graph
takes. Both stay the same until another operator or translation is registered, so they are kept under what is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from unittest import mock

import torch

_COMPOSED = "_collect_all_valid_cia_ops"
_KEPT: dict[tuple[str, Hashable], tuple[Hashable, Any]] = {}  # by what it is: the state then, and the result


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
            from torch.export import decomp_utils, exported_program

            for module in (decomp_utils, exported_program):
                listed = _composed_once(getattr(module, _COMPOSED))
                stack.enter_context(mock.patch.object(module, _COMPOSED, listed))
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


def _composed_once(find: Callable[[], set[Any]]) -> Callable[[], set[Any]]:
    """``find``, which lists the operators that are composed of others, asked again only where one may have come."""

    def composed() -> set[Any]:
        spaces = [getattr(torch.ops, name) for name in torch.ops._dir]
        asked_for = tuple(len(getattr(space, "_dir", ())) for space in spaces)  # others are not listed
        kernels = len(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
        return set(_kept((_COMPOSED, ()), find, (asked_for, kernels)))

    return composed


def _kept(what: tuple[str, Hashable], make: Callable[[], Any], state: Hashable = ()) -> Any:
    """What ``make`` gave when the same was registered, in the same ``state``."""
    known, result = _KEPT.get(what, (None, None))
    if known != (_registered(), state):
        result = make()
        _KEPT[what] = (_registered(), state), result
    return result


def _registered() -> Hashable:
    """How many operators torch knows, and how many translations onnxscript."""
    from onnxscript.function_libs.torch_lib.registration import default_registry

    translated = sum(len(each.overloads) + len(each.complex) for _, each in default_registry.items())
    return len(torch._C._dispatch_get_all_op_names()), translated
