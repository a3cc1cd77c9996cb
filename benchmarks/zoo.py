"""The models that benchmarks run on: the 66 of the coverage list, the wide list, and any other model of timm.

Needs timm, torchvision and transformers; all but the wide list also needs ``shared/tools`` beside the repository.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks import wide_models
from benchmarks.model_case import Case, add_tools


def _models() -> Any:
    if not add_tools():
        raise SystemExit("the model list lies in shared/tools beside the repository, which is absent here")
    return importlib.import_module("coverage_models")


def names() -> list[str]:
    return list(_models().ALL)


def build(name: str, *, seed: int = 0) -> Case:
    """A model of the wide or the coverage list: ``timm:<name>:<size>``, ``hf:<family>``, ``transformers:<class>``."""
    if name in wide_models.NAMES:
        return wide_models.build(name, seed=seed)
    torch.manual_seed(seed)
    model, inputs, heads, outputs = _models().build(name)
    return Case(name, model.eval(), inputs, heads, outputs)
