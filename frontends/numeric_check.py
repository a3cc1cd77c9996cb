"""Does the captured graph compute what the model computes? Run both on the examples; find where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from regauge.frontends.aten_call import target_path
from regauge.frontends.fx_importer import Trail
from regauge.ir.graph import Graph, Node
from regauge.ir.running.interpret import Interpreter

# Relative to the largest magnitude of the reference: room for another order of summation, none for another function.
_TOLERANCE = {
    torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 2e-4, torch.complex64: 2e-4,
    torch.float16: 2e-2, torch.bfloat16: 8e-2,
}  # fmt: skip


def difference(actual: Any, expected: Any) -> float:
    """The largest difference, as a multiple of what is tolerated: above 1 the two are not the same."""
    if not isinstance(expected, torch.Tensor):
        return 0.0 if isinstance(actual, torch.Tensor) or actual == expected or actual is expected else float("inf")
    actual = torch.as_tensor(actual, device=expected.device)
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    tolerance = _TOLERANCE.get(expected.dtype, 8e-2)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = actual.detach().to(wide), expected.detach().to(wide)
    special = ~torch.isfinite(b)
    if not torch.equal(torch.isnan(a), torch.isnan(b)) or not torch.equal(
        a[special].nan_to_num(), b[special].nan_to_num()
    ):
        return float("inf")
    a, b = a[~special], b[~special]
    if b.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / (tolerance * max(1e-3, float(b.abs().max()))))


def worst(actual: Sequence[Any], expected: Sequence[Any]) -> tuple[float, int]:
    """The largest difference of two lists of results and its position; lists of different lengths differ infinitely."""
    if len(actual) != len(expected):
        return float("inf"), min(len(actual), len(expected))
    found = [difference(a, b) for a, b in zip(actual, expected, strict=True)]
    place = max(range(len(found)), key=found.__getitem__, default=0)
    return (found[place] if found else 0.0), place


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """A fixed seed inside, the caller's generator state outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def run_graph(graph: Graph, inputs: Sequence[torch.Tensor], hook: Any = None) -> list[Any]:
    with seeded():
        return Interpreter(graph, hook=hook).run([x.clone() for x in inputs])


def run_module(module: torch.nn.Module, args: Any, kwargs: Any, *, protect: bool, seed: int = 0) -> Any:
    """The model's own result. With ``protect`` its buffers are copies, so that a run changes nothing of the user's."""
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with seeded(seed), torch.no_grad():
        if not protect:
            return module(*args, **kwargs)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, buffers, args, kwargs)


def run_program(
    program: ExportedProgram,
    inputs: Sequence[Any],
    see: Callable[[fx.Node, Any], None] | None = None,
    *,
    seed: int = 0,
) -> list[Any]:
    """An exported program run node by node on copies of its buffers; ``see`` is shown every result."""
    given = iter(inputs)
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            value = next(given)
        elif spec.target in program.state_dict:
            value = program.state_dict[spec.target]
        else:
            value = program.constants[str(spec.target)]
        arguments.append(value.detach().clone() if isinstance(value, torch.Tensor) else value)
    with seeded(seed), torch.no_grad():
        results = _Watched(program.graph_module, see).run(*arguments)
    outputs = list(results) if isinstance(results, tuple | list) else [results]
    return outputs[len(outputs) - len(program.graph_signature.user_outputs) :]


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, see: Callable[[fx.Node, Any], None] | None) -> None:
        super().__init__(module)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.see is not None:
            self.see(n, result)
        return result


def first_wrong_call(
    program: ExportedProgram, graph: Graph, trail: Trail, flat: Sequence[Any], inputs: Sequence[torch.Tensor]
) -> tuple[fx.Node, float] | None:
    """The first traced call whose record computes something else than torch does, with the difference; else None.

    ``graph`` must have been imported without folding, so that every traced result is still in it.
    """
    wanted = {node: value for node, value in trail.pairs}
    truth: dict[fx.Node, torch.Tensor] = {}

    def see(node: fx.Node, result: Any) -> None:
        if node in wanted and isinstance(result, torch.Tensor):
            truth[node] = result.clone()

    run_program(program, flat, see)
    ours: dict[Any, torch.Tensor] = {}

    def hook(node: Node, results: tuple[Any, ...]) -> None:
        ours.update(zip(node.outputs, results, strict=True))

    try:
        run_graph(graph, inputs, hook)
    except Exception:  # what failed to run has no result and is found below as the first missing one
        pass
    for node, value in trail.pairs:
        if node in truth and value.producer is not None and hasattr(node.target, "_schema"):
            found = difference(ours[value], truth[node]) if value in ours else float("inf")
            if found > 1:
                return node, found
    return None


def call_path(node: fx.Node) -> str:
    return target_path(node.target)


def random_operators(graph: Graph) -> list[str]:
    """Operators of a graph that draw random numbers when it runs."""
    found: dict[str, None] = {}
    for _, node in graph.walk():
        if _is_random(node):
            found[node.attributes.get("target", node.op)] = None
    return list(found)


def _is_random(node: Node) -> bool:
    if node.op == "dropout":
        return bool(node.attributes.get("training")) and node.attributes.get("p", 0) not in (0, 0.0)
    if node.op == "torch_call":
        from regauge.ir.ops.torch_opaque import find_target

        return torch.Tag.nondeterministic_seeded in getattr(find_target(node.attributes["target"]), "tags", ())
    return node.operator.random
