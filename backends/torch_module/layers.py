"""Standard layers: where a node is exactly what ``nn.Conv2d``, ``nn.Linear`` ... compute with the tensors at a path."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from regauge.backends.torch_module import onednn as torch_onednn
from regauge.backends.torch_module import quantized as torch_quantized
from regauge.backends.torch_module.arguments import tidy_calls
from regauge.backends.torch_module.frames import inside
from regauge.backends.torch_module.places import Places
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.training_notes import LAYER

_REPEATED = ("kernel_size", "stride", "padding", "dilation", "output_padding")  # one number serves all axes
SLOT_NAMES = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def frame_layer(node: Node, path: str, places: Places) -> str | None:
    """The layer that the module at ``path``, which runs this one node only, is; None where no standard layer fits."""
    known = node.metadata.get(LAYER)
    if (known is None and node.operator.layer is None) or node.regions:
        return None
    flowing = flowing_operands(node, path, places)
    if not flowing or not all(operand is None or isinstance(operand, Value) for operand in flowing):
        return None
    text = known or (node.operator.layer(node) if node.operator.layer is not None else None)
    return _tidy(text) if text is not None and _fits(text, node, path, places) else None


@cache
def _tidy(text: str) -> str:
    """``nn.Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1))`` as ``nn.Conv2d(64, 64, kernel_size=3)``."""
    call = ast.parse(text, mode="eval").body
    for keyword in call.keywords if isinstance(call, ast.Call) else ():
        match keyword.value:
            case ast.Tuple(elts=[ast.Constant(value=int(first)), *_] as parts) if keyword.arg in _REPEATED:
                if all(isinstance(part, ast.Constant) and part.value == first for part in parts):
                    keyword.value = ast.Constant(first)
    return ast.unparse(tidy_calls(call))


def owned_layer(node: Node, path: str, places: Places) -> tuple[str, str] | None:
    """Path and text of a layer below ``path`` that a node is, found by where its weight lives."""
    for position, operand in enumerate(node.inputs):
        if isinstance(operand, Parameter) and _slot(node, position) == "weight":
            owner = places.owner(operand, path)
            if owner is None or not inside(owner, path) or owner in places.called:
                return None
            text = frame_layer(node, owner, places)
            return None if text is None else (owner, text)
    return None


def flowing_operands(node: Node, path: str, places: Places) -> list[Operand]:
    """What the layer at ``path`` is called with: every operand that is not a tensor of its own."""
    flowing = [
        operand
        for operand in node.inputs
        if not (isinstance(operand, Parameter) and places.name_under(operand, path) is not None)
    ]
    while flowing and flowing[-1] is None:
        flowing.pop()
    return flowing


def _slot(node: Node, position: int) -> str:
    slots = node.operator.slots
    return slots[min(position, len(slots) - 1)]


def _fits(text: str, node: Node, path: str, places: Places) -> bool:
    """The layer has exactly the names, kinds and shapes that live at the path, and the node reads them from there."""
    expected = layer_tensors(text)
    if expected is None:
        return False
    for position, operand in enumerate(node.inputs):
        slot = _slot(node, position)
        if isinstance(operand, Value) and slot in SLOT_NAMES:  # a computed weight or bias is no layer's
            wanted = f"{path}.{SLOT_NAMES[slot]}" if path else SLOT_NAMES[slot]
            if not isinstance(operand, Parameter) or places.name_under(operand, path) != wanted:
                return False
    present = {name: (tuple(p.shape), places.is_trained(p)) for name, p in places.below(path).items()}
    return present == expected


@cache
def layer_tensors(text: str) -> Mapping[str, tuple[tuple[int, ...], bool]] | None:
    """Names of a layer's tensors with their shapes and whether they are parameters; None if it does not build."""
    try:
        with torch.device("meta"):
            layer = eval(text, {**vars(torch_quantized), **vars(torch_onednn), "nn": nn, "torch": torch, "math": math})
    except (TypeError, ValueError, AttributeError, NameError, SyntaxError, RuntimeError):
        return None
    found: dict[str, Any] = {name: (tuple(t.shape), True) for name, t in layer.named_parameters()}
    found.update({name: (tuple(t.shape), False) for name, t in layer.named_buffers()})
    return found
