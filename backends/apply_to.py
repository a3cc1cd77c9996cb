"""In-place surgery: a graph's shrunk tensors and sizes put into the user's own module.

    graph.apply_to(model)     # model.layer1[0].conv1 is now nn.Conv2d(64, 32, ...), and model(x) computes the graph

Tensors are replaced by name, the sizes that standard layers keep are set, and integer attributes of the user's modules
(``num_heads``, ``head_dim`` ...) are searched. The result is accepted only if it computes what the graph computes;
otherwise the module is put back exactly as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from regauge.backends.applying.check import Check
from regauge.backends.applying.layers import set_layer_sizes
from regauge.backends.applying.refusal import failing_module, refusal
from regauge.backends.applying.search import cut_dims, search
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Parameter


def apply_to(
    graph: Graph,
    model: nn.Module,
    *,
    inplace: bool = True,
    inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    tries: int = 250,
) -> nn.Module:
    """Give ``model`` (or, with ``inplace=False``, a copy of it) the graph's tensors and sizes.

    ``inputs`` are the graph inputs used for the numeric check; made up from the graph's shapes where not given. At most
    ``tries`` settings of integer attributes are tried. Replaced parameters are new objects: make optimizers anew.
    Raises EmitError, with the model as it was, where the model cannot be made to compute the graph.
    """
    model = model if inplace else copy.deepcopy(model)
    check = Check(graph, inputs)
    before = Snapshot(model)
    try:
        changed = replace_tensors(graph, model)
        set_layer_sizes(graph, model, changed)
        failure = check.failure(model)
        if failure is not None and search(model, changed, check, tries, cut_dims(graph)):
            failure = None
    except BaseException:
        before.restore()
        raise
    if failure is not None:
        failed = failing_module(model, lambda: check.call(model))
        before.restore()
        raise EmitError(refusal(graph, model, changed, failure, failed))
    before.restore_modes()
    return model


def replace_tensors(graph: Graph, model: nn.Module) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Put the graph's tensors into the model by name; tied names get one tensor. Returns those with a new shape."""
    changed: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for parameter in graph.parameters.values():
        if parameter.kind == "constant":
            continue
        made: torch.Tensor | None = None
        for name in parameter.names:
            owner, leaf, old = _find(model, name)
            if made is None:
                made = _made(parameter, old)
            if old.shape != made.shape:
                changed[name] = (tuple(old.shape), tuple(made.shape))
            if made is not old:
                setattr(owner, leaf, made)
    return changed


def _find(model: nn.Module, name: str) -> tuple[nn.Module, str, torch.Tensor]:
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        found = getattr(owner, leaf)
    except AttributeError:
        found = None
    if found is None:
        raise EmitError(
            f"the model has no tensor {name!r}: apply_to() takes the model the graph was captured from, and cannot "
            f"follow passes that rewrite nodes, as simplify does; use to_torch()"
        )
    return owner, leaf, found


def _made(parameter: Parameter, old: torch.Tensor) -> torch.Tensor:
    """The tensor for the model: the one it has where nothing changed, else a copy of the graph's."""
    data = parameter.tensor
    if data.shape == old.shape and (data.data_ptr() == old.data_ptr() or torch.equal(data.to(old.device), old)):
        return old
    data = data.detach().to(device=old.device, dtype=old.dtype, copy=True)
    return nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data


class Snapshot:
    """Everything about a model that the surgery may touch; restoring it gives back the very same objects."""

    def __init__(self, model: nn.Module) -> None:
        self.saved = [
            (module, dict(module.__dict__), dict(module._parameters), dict(module._buffers))
            for module in model.modules()
        ]
        self.lists = [(value, list(value)) for _, state, _, _ in self.saved for value in _lists(state)]

    def restore(self) -> None:
        for module, state, parameters, buffers in self.saved:
            module.__dict__.clear()
            module.__dict__.update(state)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        for kept, tensors in self.lists:
            kept[:] = tensors

    def restore_modes(self) -> None:
        for module, state, _, _ in self.saved:
            module.training = state["training"]


def _lists(state: Mapping[str, Any]) -> list[list[Any]]:
    """Lists of tensors that a module keeps beside its parameters, as recurrent layers do."""
    return [value for name, value in state.items() if name == "_flat_weights" and isinstance(value, list)]
