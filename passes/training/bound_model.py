"""A user's module and the graph captured from it: the same tensors under the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from regauge.ir.edit import record
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.ir.storage.weights import dense


class BoundModel:
    """The tensors of a module by the parameters of its graph, looked up anew at each use: a module may move.

    Raises PassError where a trained parameter of the graph is not in the module, or has another shape there.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.graph = graph
        self._homes: dict[Parameter, tuple[nn.Module, str]] = {}
        for parameter in graph.all_parameters():
            home = self._home(parameter)
            if home is not None:
                self._homes[parameter] = home

    def _home(self, parameter: Parameter) -> tuple[nn.Module, str] | None:
        for name in parameter.names:
            path, _, leaf = name.rpartition(".")
            try:
                owner = self.model.get_submodule(path)
            except AttributeError:
                continue
            tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
            if tensor is None:
                continue
            if tuple(tensor.shape) != tuple(parameter.shape):
                raise PassError(
                    f"{name} is {list(tensor.shape)} in the model and {parameter.signature} in the graph: "
                    "capture the graph from this model"
                )
            return owner, leaf
        if parameter.kind == "parameter":
            raise PassError(f"the model has no parameter {parameter.name}: capture the graph from this model")
        return None

    def __contains__(self, parameter: Parameter) -> bool:
        return parameter in self._homes

    def tensor(self, parameter: Parameter) -> torch.Tensor:
        """The module's tensor for a parameter of the graph."""
        owner, leaf = self._homes[parameter]
        found = owner._parameters.get(leaf)
        tensor = found if found is not None else owner._buffers[leaf]
        assert tensor is not None
        return tensor

    def trained(self) -> Iterator[Parameter]:
        """The parameters of the graph that the module trains: real ones, kept as parameters."""
        for parameter, (owner, leaf) in self._homes.items():
            held = owner._parameters.get(leaf)
            if parameter.kind == "parameter" and held is not None and held.is_floating_point():
                yield parameter

    def places(self, parameter: Parameter) -> list[tuple[nn.Module, str]]:
        """Every module and name that holds the parameter: several where it is tied."""
        tensor = self.tensor(parameter)
        return [
            (module, leaf)
            for module in self.model.modules()
            for leaf, own in module._parameters.items()
            if own is tensor
        ]

    def trained_graph(self, by: str) -> Graph:
        """A copy of the graph that holds the module's tensors as they are now."""
        result = self.graph.copy()
        twins = {parameter.name: parameter for parameter in result.all_parameters()}
        for parameter in self._homes:
            twin = twins[parameter.name]
            old = twin.weight.load()
            data = self.tensor(parameter).detach().to(old.device, old.dtype)
            twin.weight = dense(data.clone())
        record(result, by, "weights of the trained model")
        result.version += 1
        return result


class ForwardWeights:
    """While the module runs, other tensors stand in the place of some of its parameters.

    The parameters are back when the call returns or raises, so that optimizers, state_dicts and their keys never see
    the others; gradients flow through what ``make`` computes. Activation checkpoints inside the module, which run
    parts of it again later, would find the parameters: do not use them together.
    """

    def __init__(self, bound: BoundModel, make: Callable[[], Mapping[Parameter, torch.Tensor]]) -> None:
        self._bound, self._make = bound, make
        self._held: list[tuple[nn.Module, str, Any]] = []
        self._hooks = [
            bound.model.register_forward_pre_hook(lambda module, args: self._swap(module)),
            bound.model.register_forward_hook(lambda module, args, result: self._restore(), always_call=True),
        ]

    def _swap(self, module: nn.Module) -> None:
        if module is not self._bound.model:  # hooks are copied with a module, and would change the one they came from
            raise PassError(
                "this is a copy of a model that a sparsifier works on: copy it before the sparsifier is made, or load "
                "its state_dict into such a copy"
            )
        self._restore()
        for parameter, tensor in self._make().items():
            for owner, leaf in self._bound.places(parameter):
                self._held.append((owner, leaf, owner._parameters[leaf]))
                owner._parameters[leaf] = tensor  # type: ignore[assignment]

    def _restore(self) -> None:
        for module, leaf, tensor in reversed(self._held):
            module._parameters[leaf] = tensor
        self._held.clear()

    def remove(self) -> None:
        """Take the hooks off; the module is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._restore()
