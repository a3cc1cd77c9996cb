"""Kernels as operators of torch: modules whose fused nodes are operators, which run anywhere.

    module = graph.to_torch(kernels="triton")

On a GPU an operator launches the Triton kernel of its region; elsewhere, and where shapes are inferred, it is the
region in torch: the function that stands below ``@kernel`` in the source of the module. Gradients that a kernel can
compute (:mod:`regauge.ir.fusion.gradients`) are operators, too, made when they are first asked for; all others are
those of the region in torch. Operators are named by what they compute and registered once in a process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

import torch

from regauge.backends.to_torch import to_torch
from regauge.backends.triton_kernels.configs import Table
from regauge.backends.triton_kernels.gradient_kernel import GradientKernel
from regauge.backends.triton_kernels.kernel import Kernel, triton_kernel
from regauge.backends.triton_kernels.weights import for_kernels
from regauge.ir.cost import smallest_sizes
from regauge.ir.dims.extents import Dim
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.attention_gradients import core_of
from regauge.ir.fusion.fuse import fuse, traced
from regauge.ir.fusion.fused import Rounding, body_of, canonical, fused_nodes
from regauge.ir.fusion.gradients import Entries, Gradient, Gradients, gradients_of
from regauge.ir.fusion.products import few_bit_sides
from regauge.ir.fusion.prologues import MOST_ROWS
from regauge.ir.fusion.region import below_results
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.ops.torch_opaque import tensor_schema
from regauge.ir.printing.parse import parse_graph

NAMESPACE = "regauge_kernels"
Body: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class KernelOperator:
    """An operator of torch that computes a region: its name in ``torch.ops.regauge_kernels``, the region as a graph and
    in torch, and the kernel. Arguments are tensors for ``reads``, results a tensor for each of ``writes``."""

    name: str
    kernel: Kernel
    graph: Graph
    body: Body
    tuned: Table | None
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]

    @cached_property
    def rows(self) -> frozenset[Dim]:
        """The loops in which a weight of few bits is read again; none where the kernel multiplies none."""
        region = self.kernel.region
        for contraction, (left, right) in zip(region.contractions, few_bit_sides(region), strict=True):
            if left != right:
                first, second = below_results(contraction.args[0]).args
                return contraction.axes - (first if left else second).axes
        return frozenset()

    @cached_property
    def gradients(self) -> Gradients:
        """The gradients that kernels compute, and why others are left to torch: under no name where that is all."""
        try:
            return gradients_of(self.graph)
        except FusionError as error:
            return Gradients(left={"": str(error)})

    @cached_property
    def backward(self) -> list[tuple[Gradient, KernelOperator]]:
        """The operators of the gradients that kernels compute."""
        return [(one, _gradient_operator(one, self.tuned)) for one in self.gradients.kernels]

    @cached_property
    def in_stages(self) -> Body:
        """The region in torch, of which torch finds gradients: attention within it is an operator of its own, whose
        gradients kernels compute."""
        region = self.kernel.region
        nodes = core_of(region) if region.attention is not None and not self.gradients.kernels else []
        if not nodes or len(nodes) == len(region.nodes):
            return self.body
        graph = copy_graph(self.graph)
        place = {node: number for number, node in enumerate(self.graph.nodes)}
        own = list(graph.nodes)
        try:
            fuse(Builder(graph), trace([own[place[node]] for node in nodes], graph.outputs), "fused")  # type: ignore[arg-type]
        except FusionError:
            return self.body
        return to_torch(graph, kernels="triton")

    @property
    def overload(self) -> Any:
        """What torch calls."""
        return getattr(torch.ops.regauge_kernels, self.name).default

    def launch(self, *tensors: torch.Tensor) -> Any:
        """What the kernel gives for the arguments of the operator; of many rows what the library gives, and of other
        types than the region has (a module that was converted, or runs under autocast) what torch gives."""
        given = dict(zip(self.reads, tensors, strict=True))
        if any(tensor.dtype != value.dtype for value, tensor in given.items()):
            return without_views(self.body)(*tensors)
        if self.rows and math.prod(self.kernel.prepared(given).sizes[dim] for dim in self.rows) > MOST_ROWS:
            return without_views(self.body)(*tensors)
        found = self.kernel.launch(given)
        results = tuple(found[value] for value in self.writes)
        return results if len(results) > 1 else results[0]


@dataclass(frozen=True)
class WithKernels:
    """A graph with fused nodes, their operators, and why some have none."""

    graph: Graph
    operators: tuple[KernelOperator, ...]
    left: tuple[str, ...]

    def sized(self, at: Mapping[object, int] | None = None) -> list[tuple[KernelOperator, dict[Dim, int]]]:
        """Each operator once, with the sizes of its loops; dynamic ones are as ``at`` gives them, or the least."""
        bound = smallest_sizes(self.graph, at)
        once = {operator.name: operator for operator in self.operators}.values()
        return [(one, {dim: bound(dim.size) for dim in one.kernel.region.sized}) for one in once]


def with_kernels(graph: Graph, *, rounding: Rounding = "fused", tuned: Table | None = None) -> WithKernels:
    """The operators of the fused nodes of a graph; where it has none, of all regions that gain on a GPU, with products
    of weights of few bits among these.

    ``tuned`` is a table of configurations that is asked before the shipped one.
    """
    result = for_kernels(graph, rounding=rounding)
    made: list[KernelOperator] = []
    left: list[str] = []
    for node in fused_nodes(result):
        body = canonical(body_of(node))
        try:
            made.append(kernel_operator(body, node.attributes["rounding"], to_torch(body), tuned))
        except FusionError as error:
            left.append(str(error))
    return WithKernels(result, tuple(made), tuple(left))


def kernel_of(body: Graph, rounding: Rounding, tuned: Table | None = None) -> Kernel:
    """The kernel of a region that stands as a graph of its own; raises FusionError where there can be none."""
    return triton_kernel(traced(body), body.name, rounding=rounding, tuned=tuned)


def kernel_operator(body: Graph, rounding: Rounding, in_torch: Body, tuned: Table | None = None) -> KernelOperator:
    """The operator of a region that ``in_torch`` computes; raises FusionError where it can have none."""
    return _operator(kernel_of(body, rounding, tuned), body, in_torch, tuned)


def _gradient_operator(gradient: Gradient, tuned: Table | None) -> KernelOperator:
    graph = canonical(gradient.graph)
    if gradient.attention is None:
        return kernel_operator(graph, "fused", to_torch(graph), tuned)
    region = gradient.attention.region
    kernel = GradientKernel(region, graph.name, "fused", tuned, gradient=gradient.attention, graph=graph)
    return _operator(kernel, graph, to_torch(graph), tuned)


def _operator(kernel: Kernel, body: Graph, in_torch: Body, tuned: Table | None) -> KernelOperator:
    reads = tuple(body.inputs)
    writes = tuple(output for output in body.outputs if isinstance(output, Value))
    texts = [kernel.source(form, contiguous=flat).text for form in kernel.forms for flat in (True, False)]
    types = [value.signature for value in (*reads, *writes)]
    configs = [] if tuned is None else [repr(tuned.entries)]
    digest = hashlib.sha256("\n".join([*texts, *types, *configs]).encode()).hexdigest()[:10]
    made = KernelOperator(f"{body.name}_{digest}", kernel, body, in_torch, tuned, reads, writes)
    _register(made)
    return made


def kernel(region: str, rounding: Rounding = "fused", tuned: str | None = None) -> Callable[[Body], Any]:
    """Makes a function the body of an operator of torch, whose kernel is that of the region with this text.

    ``tuned`` is the path of a table of configurations that is asked before the shipped one.
    """

    def decorate(in_torch: Body) -> Any:
        table = None if tuned is None else Table.read(tuned)
        return kernel_operator(parse_graph(region), rounding, in_torch, table).overload

    return decorate


@cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


_REGISTERED: dict[str, KernelOperator] = {}


def registered() -> tuple[KernelOperator, ...]:
    """All operators that torch was told of in this process, those of gradients, too."""
    return tuple(_REGISTERED.values())


def _register(made: KernelOperator) -> None:
    """Tell torch of an operator, unless it knows it: operators of one name compute the same."""
    if made.name in _REGISTERED:
        return
    _REGISTERED[made.name] = made
    library = _library()
    library.define(f"{made.name}{tensor_schema(len(made.reads), len(made.writes))}")  # type: ignore[no-untyped-call]
    full_name = f"{NAMESPACE}::{made.name}"
    fresh = without_views(made.body)
    library.impl(made.name, fresh, "CPU")  # type: ignore[no-untyped-call]
    library.impl(made.name, made.launch, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(full_name, fresh, lib=library)
    torch.library.register_autograd(full_name, _backward(made), setup_context=_keep, lib=library)


def without_views(body: Body) -> Body:
    """The body with results in memory of their own without gaps, as the kernel gives them."""

    def call(*tensors: torch.Tensor) -> Any:
        found = body(*tensors)
        if isinstance(found, torch.Tensor):
            return found.contiguous()
        return tuple(result.contiguous() for result in found)

    return call


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
    """What is kept for the backward pass: what is read, of which all else is computed again."""
    ctx.save_for_backward(*inputs)


def _backward(made: KernelOperator) -> Callable[..., Any]:
    """The backward pass: operators of the gradients, where there are such, and for the rest the body in torch."""

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = {place for place, needed in enumerate(ctx.needs_input_grad) if needed}
        found: dict[int, torch.Tensor | None] = {}
        whole = [gradient for gradient in gradients if gradient is not None]
        if len(whole) == len(gradients):
            found = _by_kernels(made, tensors, whole, wanted)
        rest = sorted(wanted - found.keys())
        if rest:
            found.update(zip(rest, _of_body(made.in_stages, tensors, gradients, rest), strict=True))
        return tuple(found.get(place) for place in range(len(tensors)))

    return backward


def _by_kernels(
    made: KernelOperator,
    tensors: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    wanted: set[int],
) -> dict[int, torch.Tensor | None]:
    """The gradients that are given on, and those that operators compute, by the number of the argument."""
    found: dict[int, torch.Tensor | None] = {}

    def give(one: int | Entries, gradient: torch.Tensor) -> None:
        place = one.table if isinstance(one, Entries) else one
        if place in wanted and isinstance(one, Entries):
            gradient = _in_table(gradient, tensors[one.numbers], tensors[place])
        if place in wanted:
            known = found.get(place)
            found[place] = gradient if known is None else known + gradient

    for one, result in made.gradients.passed.items():
        give(one, gradients[result])
    for kernel, operator in made.backward:
        places: list[list[int | Entries]] = [[*o, *e] for o, e in zip(kernel.of, kernel.entries, strict=True)]
        if wanted.isdisjoint(one.table if isinstance(one, Entries) else one for ones in places for one in ones):
            continue
        given = [*(tensors[i] for i in kernel.reads), *(gradients[i] for i in kernel.given)]
        results = operator.overload(*given)
        for ones, gradient in zip(places, [results] if len(places) == 1 else results, strict=True):
            for one in ones:
                give(one, gradient)
    return found


def _in_table(gradient: torch.Tensor, numbers: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The gradient of a table of that of what was looked up in it: sorted by number and added up, each time alike."""
    rows, entries = gradient.reshape(numbers.numel(), -1), table.shape[0]
    there = (numbers >= 0) & (numbers < entries)
    numbers = torch.where(there, numbers, entries).reshape(-1)  # one of no entry read zeros: it is skipped
    found: torch.Tensor = torch.ops.aten.embedding_dense_backward(rows, numbers, entries, entries, False)
    return found.reshape(table.shape)


def _of_body(
    body: Body, tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None], wanted: Sequence[int]
) -> Sequence[torch.Tensor | None]:
    """The body once more, and the gradients of that; these have gradients of their own where they are asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [tensor.view_as(tensor) if again else tensor.detach() for tensor in tensors]
        for place in wanted:
            tensors[place].requires_grad_()
        found = body(*tensors)
        pairs = zip([found] if isinstance(found, torch.Tensor) else found, gradients, strict=True)
        given = [(result, gradient) for result, gradient in pairs if gradient is not None and result.requires_grad]
        inputs = [tensors[place] for place in wanted]
        results, last = [result for result, _ in given], [gradient for _, gradient in given]
        return torch.autograd.grad(results, inputs, last, allow_unused=True, create_graph=again)
