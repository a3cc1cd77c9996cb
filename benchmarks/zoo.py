"""The models that benchmarks run on: the 66 of the coverage list, and any other of timm, torchvision and transformers.

Needs ``shared/tools`` beside the repository, and timm, torchvision and transformers (the ``peers`` extra).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
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


def _models() -> Any:
    tools = SHARED / "tools"
    if not tools.is_dir():
        raise SystemExit("the model list lies in shared/tools beside the repository, which is absent here")
    if str(tools) not in sys.path:
        sys.path.insert(0, str(tools))
    import coverage_models

    return coverage_models


def names() -> list[str]:
    return list(_models().ALL)


def build(name: str, *, seed: int = 0) -> Case:
    """A model of the coverage list, ``timm:<name>:<size>``, ``timm:<name>:<size>@tv`` style or ``hf:<family>``."""
    torch.manual_seed(seed)
    model, inputs, heads, outputs = _models().build(name)
    return Case(name, model.eval(), inputs, heads, outputs)


def float64_reference(model: nn.Module) -> nn.Module:
    """A copy of a float64 model that runs: torch has no grouped product in float64, so experts run one by one."""
    reference = copy.deepcopy(model)
    config = getattr(reference, "config", None)
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "eager"
    return reference


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Redraw all weights so that every path matters; default initialisations hide faults."""
    _models().randomize(model, seed)
