"""Kernels as operators of torch: a graph whose regions are calls, which run anywhere.

    module = graph.to_torch(kernels="triton")

On a GPU an operator launches the Triton kernel of its region; elsewhere, where shapes are inferred, and where gradients
are asked for, it is the region in torch. Operators are named by what they compute and registered once in a process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch

from regauge.backends.to_torch import to_torch
from regauge.backends.triton_kernel import Kernel, triton_kernel
from regauge.backends.triton_source import Rounding
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.errors import RegaugeError
from regauge.ir.fusion.plan import moves_nothing, plan_fusion
from regauge.ir.fusion.region import Region
from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_nodes
from regauge.ir.ops.torch_opaque import slot

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
    """A copy of a graph whose regions are calls of operators, these operators, and why other regions have none."""

    graph: Graph
    operators: tuple[KernelOperator, ...]
    left: tuple[str, ...]


def with_kernels(graph: Graph, *, rounding: Rounding = "fused") -> WithKernels:
    """Make calls of all regions that gain on a GPU, but for products, which are left to the library of the runtime.

    Regions of one node stay as they are, as torch has a kernel for these; attention does not, of which torch's kernels
    take only some masks and types. Where each node is rounded, attention is left in its parts.
    """
    result = graph.copy()
    plan = plan_fusion(result, contractions=False, attention=rounding == "fused")
    made: list[KernelOperator] = []
    left: list[str] = []
    for region in plan.regions:
        if region.kind == "attention" or sum(not moves_nothing(node) for node in region.nodes) > 1:
            try:
                made.append(kernel_operator(result, region, rounding))
            except RegaugeError as error:
                left.append(str(error))
    build = Builder(result, by="kernels")
    replaced: dict[Value, Value] = {}
    for one in made:
        _call(build, one, replaced)
    return WithKernels(result, tuple(made), tuple(left))


def _call(build: Builder, made: KernelOperator, replaced: dict[Value, Value]) -> None:
    """Put a call of an operator in the place of its region; ``replaced`` holds the results of such calls."""
    nodes = made.kernel.region.nodes
    results = [(value.shape, value.dtype) for value in made.writes]
    arguments = tuple(slot(place) for place in range(len(made.reads)))
    tensors = [replaced.get(value, value) for value in made.reads]
    with build.at(nodes[-1]):
        target = f"{NAMESPACE}.{made.name}.default"
        found = build("torch_call", *tensors, results=results, target=target, arguments=arguments)
    pairs = dict(zip(made.writes, [found] if isinstance(found, Value) else found, strict=True))
    replaced.update(pairs)
    for old, new in pairs.items():
        replace_uses(build.graph, old, new)
    for node in reversed(nodes):
        remove_node(build.graph, node)
    for old, new in pairs.items():
        new.name = old.name


def kernel_operator(graph: Graph, region: Region, rounding: Rounding) -> KernelOperator:
    """The operator of a region of a graph; raises FusionError or EmitError where it can have none."""
    stem = "_".join(dict.fromkeys(node.op for node in region.nodes if not moves_nothing(node)))[:40]
    kernel = triton_kernel(region, stem, rounding=rounding)
    reads = tuple(dict.fromkeys(load.value.value for load in region.loads))
    writes = tuple(region.outputs)
    body = to_torch(_alone(graph, region, reads, writes))
    texts = [kernel.source(form, contiguous=flat).text for form in kernel.forms for flat in (True, False)]
    types = [value.signature for value in (*reads, *writes)]
    digest = hashlib.sha256("\n".join([*texts, *types]).encode()).hexdigest()[:10]
    made = KernelOperator(f"{stem}_{digest}", kernel, body, reads, writes)
    _register(made)
    return made


def _alone(graph: Graph, region: Region, reads: Sequence[Value], writes: Sequence[Value]) -> Graph:
    """The nodes of a region as a graph of their own, weights among its inputs."""
    result = Graph("body", symbols=dict(graph.symbols))
    build = Builder(result)
    known: dict[Value, Value] = {value: build.input(value.name, value.shape, value.dtype) for value in reads}
    copy_nodes(region.nodes, result, known)
    result.outputs = [known[value] for value in writes]
    return result


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
    arguments = ", ".join(f"Tensor x{place}" for place in range(len(made.reads)))
    results = "Tensor" if len(made.writes) == 1 else f"({', '.join(['Tensor'] * len(made.writes))})"
    library.define(f"{made.name}({arguments}) -> {results}")  # type: ignore[no-untyped-call]
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
