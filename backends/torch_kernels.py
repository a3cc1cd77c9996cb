"""Kernels as operators of torch: modules whose fused nodes are operators, which run anywhere.

    module = graph.to_torch(kernels="triton")

On a GPU an operator launches the Triton kernel of its region; elsewhere, where shapes are inferred, and where gradients
are asked for, it is the region in torch: the function that stands below ``@kernel`` in the source of the module.
Operators are named by what they compute and registered once in a process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch

from regauge.backends.to_torch import to_torch
from regauge.backends.triton_kernel import Kernel, triton_kernel
from regauge.ir.errors import FusionError
from regauge.ir.fusion.fused import Rounding, body_of, canonical, fused_copy, fused_nodes, traced
from regauge.ir.graph import Graph, Value
from regauge.ir.ops.torch_opaque import tensor_schema
from regauge.ir.parse import parse_graph

NAMESPACE = "regauge_kernels"
Body: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class KernelOperator:
    """An operator of torch that computes a region: its name in ``torch.ops.regauge_kernels``, the region in torch, and
    the kernel. Arguments are tensors for ``reads``, results a tensor for each of ``writes``."""

    name: str
    kernel: Kernel
    body: Body
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]

    def launch(self, *tensors: torch.Tensor) -> Any:
        """What the kernel gives for the arguments of the operator."""
        found = self.kernel.launch(dict(zip(self.reads, tensors, strict=True)))
        results = tuple(found[value] for value in self.writes)
        return results if len(results) > 1 else results[0]


@dataclass(frozen=True)
class WithKernels:
    """A graph with fused nodes, their operators, and why some have none."""

    graph: Graph
    operators: tuple[KernelOperator, ...]
    left: tuple[str, ...]


def with_kernels(graph: Graph, *, rounding: Rounding = "fused") -> WithKernels:
    """The operators of the fused nodes of a graph; where it has none, of all regions that gain on a GPU."""
    result = fused_copy(graph, rounding=rounding)
    made: list[KernelOperator] = []
    left: list[str] = []
    for node in fused_nodes(result):
        body = canonical(body_of(node))
        try:
            made.append(kernel_operator(body, node.attributes["rounding"], to_torch(body)))
        except FusionError as error:
            left.append(str(error))
    return WithKernels(result, tuple(made), tuple(left))


def kernel_of(body: Graph, rounding: Rounding) -> Kernel:
    """The kernel of a region that stands as a graph of its own; raises FusionError where there can be none."""
    return triton_kernel(traced(body), body.name, rounding=rounding)


def kernel_operator(body: Graph, rounding: Rounding, in_torch: Body) -> KernelOperator:
    """The operator of a region that ``in_torch`` computes; raises FusionError where it can have none."""
    kernel = kernel_of(body, rounding)
    reads = tuple(body.inputs)
    writes = tuple(output for output in body.outputs if isinstance(output, Value))
    texts = [kernel.source(form, contiguous=flat).text for form in kernel.forms for flat in (True, False)]
    types = [value.signature for value in (*reads, *writes)]
    digest = hashlib.sha256("\n".join([*texts, *types]).encode()).hexdigest()[:10]
    made = KernelOperator(f"{body.name}_{digest}", kernel, in_torch, reads, writes)
    _register(made)
    return made


def kernel(region: str, rounding: Rounding = "fused") -> Callable[[Body], Any]:
    """Makes a function the body of an operator of torch, whose kernel is that of the region with this text."""

    def decorate(in_torch: Body) -> Any:
        name = kernel_operator(parse_graph(region), rounding, in_torch).name
        return getattr(torch.ops.regauge_kernels, name).default

    return decorate


@cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


_REGISTERED: set[str] = set()


def _register(made: KernelOperator) -> None:
    """Tell torch of an operator, unless it knows it: operators of one name compute the same."""
    if made.name in _REGISTERED:
        return
    _REGISTERED.add(made.name)
    library = _library()
    library.define(f"{made.name}{tensor_schema(len(made.reads), len(made.writes))}")  # type: ignore[no-untyped-call]
    full_name = f"{NAMESPACE}::{made.name}"
    fresh = _without_views(made.body)
    library.impl(made.name, fresh, "CPU")  # type: ignore[no-untyped-call]
    library.impl(made.name, made.launch, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(full_name, fresh, lib=library)
    torch.library.register_autograd(full_name, _gradients(made.body), setup_context=_keep, lib=library)


def _without_views(body: Body) -> Body:
    """The body with results in memory of their own without gaps, as the kernel gives them."""

    def call(*tensors: torch.Tensor) -> Any:
        found = body(*tensors)
        if isinstance(found, torch.Tensor):
            return found.contiguous()
        return tuple(result.contiguous() for result in found)

    return call


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(body: Body) -> Callable[..., Any]:
    """The backward pass: the body once more, and the gradients of that."""

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        wanted = [place for place, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            tensors = [tensor.detach() for tensor in ctx.saved_tensors]
            for place in wanted:
                tensors[place].requires_grad_()
            found = body(*tensors)
            pairs = zip([found] if isinstance(found, torch.Tensor) else found, gradients, strict=True)
            given = [(result, gradient) for result, gradient in pairs if gradient is not None and result.requires_grad]
            inputs = [tensors[place] for place in wanted]
            results, last = [result for result, _ in given], [gradient for _, gradient in given]
            values = torch.autograd.grad(results, inputs, last, allow_unused=True)
        everything: list[torch.Tensor | None] = [None] * len(tensors)
        for place, value in zip(wanted, values, strict=True):
            everything[place] = value
        return tuple(everything)

    return backward
