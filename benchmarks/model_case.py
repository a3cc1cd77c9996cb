"""One model with example inputs, other weights for it, and the libraries such models come from."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@dataclass
class Case:
    """One model with example inputs; ``outputs`` picks the tensors that are compared."""

    name: str
    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    heads: list[nn.Module]
    outputs: Callable[[Any], Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return () if isinstance(self.inputs, dict) else tuple(self.inputs)

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.inputs) if isinstance(self.inputs, dict) else {}

    def call(self, model: nn.Module) -> list[Tensor]:
        """The compared outputs of a module with this model's interface."""
        with torch.no_grad():
            result = self.outputs(model(*self.args, **self.kwargs))
        return list(result) if isinstance(result, tuple | list) else [result]

    def drawn(self, seed: int, order: Sequence[str] = ()) -> Any:
        """Other inputs of the same kind: normal numbers, or integers of the same range; masks stay as they are.

        Mappings have the names of ``order`` alone, in that order, where it is given.
        """
        generator = torch.Generator().manual_seed(seed)

        def other(name: str, x: Any) -> Any:
            if not isinstance(x, Tensor) or "mask" in name or x.dtype == torch.bool:
                return x
            if x.is_floating_point():
                return torch.randn(x.shape, generator=generator, dtype=x.dtype)
            return torch.randint(int(x.min()), int(x.max()) + 1, x.shape, generator=generator, dtype=x.dtype)

        if isinstance(self.inputs, dict):
            return {name: other(name, self.inputs[name]) for name in order or self.inputs}
        return tuple(other("", x) for x in self.inputs)

    def double(self) -> Case:
        """The same case in float64."""

        def convert(value: Any) -> Any:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        inputs: Any
        if isinstance(self.inputs, dict):
            inputs = {key: convert(value) for key, value in self.inputs.items()}
        else:
            inputs = tuple(convert(value) for value in self.inputs)
        return Case(self.name, self.model.double(), inputs, self.heads, self.outputs)


def add_tools() -> bool:
    """Make what lies in ``shared/tools`` importable; False where there is none."""
    tools = SHARED / "tools"
    if tools.is_dir() and str(tools) not in sys.path:
        sys.path.insert(0, str(tools))
    return tools.is_dir()


def import_torchvision() -> None:
    """Import torchvision, also beside a torch that its compiled operators do not fit."""
    if add_tools():
        importlib.import_module("torchvision_on_cpu")
    importlib.import_module("torchvision")


def float64_reference(model: nn.Module) -> nn.Module:
    """A copy of a float64 model that runs: torch has no grouped product in float64, so experts run one by one."""
    reference = copy.deepcopy(model)
    config: Any = getattr(reference, "config", None)
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "eager"
    return reference


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Redraw all weights so that every path matters; default initialisations hide faults.

    Matrices get a gain of 1.3 (attention logits of order 1), embeddings 1; vectors and statistics are disturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            noise = normal(parameter)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
                parameter.add_(0.1 * noise)
            elif parameter.dim() == 3 and parameter.shape[0] == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * 1.3 / (parameter.numel() / parameter.shape[0]) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * normal(buffer))
            if name.endswith("running_var"):
                buffer.mul_(1 + 0.3 * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
