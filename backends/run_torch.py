"""Running a graph as the torch module it becomes, on a device."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from regauge.backends.compare import output_names
from regauge.backends.to_torch import to_torch
from regauge.ir.errors import RegaugeError, first_line
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import Interpreter


def flat_module(
    graph: Graph, *, device: torch.device | str | None = None, kernels: Literal["triton"] | None = None
) -> nn.Module:
    """The module of a graph, in use, with the graph's inputs in order as arguments, whatever structure they had."""
    flat = graph.copy()
    flat.metadata = {**graph.metadata, "torch": {**graph.metadata.get("torch", {}), "in_spec": None}}
    return to_torch(flat, device=device, kernels=kernels).eval()


def run_in_torch(
    graph: Graph, inputs: Any, *, device: str = "cpu", kernels: Literal["triton"] | None = None
) -> dict[str, torch.Tensor]:
    """What the module of a graph gives on a device for inputs in order or by name: its tensors by name, on the CPU.

    Raises RegaugeError where the device is not there, the graph has no torch form, or the module fails.
    """
    place = found_device(device)
    environment, _ = Interpreter(graph, device=place).bound(inputs)
    module = flat_module(graph, device=place, kernels=kernels)
    try:
        with torch.no_grad():
            results = pytree.tree_leaves(module(*environment.values()))
    except RegaugeError:
        raise
    except Exception as error:
        raise RegaugeError(f"the module of graph {graph.name!r} failed on {place}: {first_line(error)}") from error
    tensors = [result.cpu() for result in results if isinstance(result, torch.Tensor)]
    return dict(zip(output_names(graph), tensors, strict=False))


def found_device(name: str) -> torch.device:
    """A device that is there; raises RegaugeError for any other."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RegaugeError(f"there is no device {name!r}: give cpu or cuda") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RegaugeError(f"torch sees {count} CUDA devices here, not {name!r}: give --device cpu")
    return device
