"""Higher-order operators: wrappers are inlined, control flow becomes nodes with regions, the rest is kept opaque."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from regauge.frontends.aliasing import NeedsDecomposition
from regauge.frontends.aten_call import Refusal, RegionAt, encode
from regauge.frontends.fx_importer import Importer
from regauge.ir.errors import CaptureError
from regauge.ir.graph import Graph, Value

_WRAPPERS = {"wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint",
             "wrap_activation_checkpoint", "invoke_subgraph", "hints_wrapper", "strict_mode",
             "run_const_graph", "wrap_generic"}  # fmt: skip


def import_higher_order(importer: Importer, node: fx.Node) -> None:
    """Import one call of a higher-order operator; raises CaptureError for one that gives no tensor."""
    name = node.target._name  # type: ignore[union-attr]
    args = [importer.argument(a) for a in node.args]
    if name in _WRAPPERS:
        if name == "wrap_with_autocast" and args[2]:
            raise NeedsDecomposition("casts of an autocast region are not written down in the program")
        importer.bind(node, _inline(importer, args))
    elif name == "cond":
        importer.bind(node, _cond(importer, node, *args))
    elif name == "while_loop":
        importer.bind(node, _while(importer, node, *args))
    elif name == "scan":
        importer.bind(node, _scan(importer, node, *args))
    else:
        importer.bind(node, _opaque(importer, node, name, args))


def _inline(importer: Importer, args: Sequence[Any]) -> list[Any]:
    """The body of a wrapper as part of the graph around it."""
    place = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
    operands = [a for a in args[place + 1 :] if not isinstance(a, str)]
    inner = Importer(importer.build, args[place], importer.trail, importer.avoid)
    inputs = [n for n in args[place].graph.nodes if n.op == "placeholder"]
    for node, operand in zip(inputs, operands, strict=True):
        inner.bind(node, operand)
    scope, source = importer.build.scope, importer.build.source
    results = inner.run()
    importer.build.scope, importer.build.source = scope, source
    if any(inner.aliases.version.get(node) for node in inputs):
        raise NeedsDecomposition("a wrapped part of the program writes into what it was given")
    return results


def _region(importer: Importer, module: fx.GraphModule, name: str) -> Graph:
    """A sub-program as a region: its tensor placeholders become the region's inputs, in order."""
    region = Graph(name=name)
    build = importer.build.region(region)
    build.scope, build.source = importer.build.scope, importer.build.source
    inner = Importer(build, module, importer.trail, importer.avoid)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        val = node.meta.get("val")
        if hasattr(val, "dtype"):
            inner.bind(node, build.input(node.name, build.sizes.shape(val), val.dtype))
        else:
            inner.bind(node, inner.argument(val))
    region.outputs = inner.run()
    if any(inner.aliases.version.get(node) for node in inputs):
        raise NeedsDecomposition(f"the region {name} writes into its inputs")
    return region


def _results(importer: Importer, node: fx.Node) -> list[Any]:
    truth = importer.truth(node.meta["val"])
    if any(t is None for t in truth):
        raise CaptureError(
            f"{node.name} at {importer.build.source} gives something that is no tensor: return tensors only"
        )
    return list(truth)


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def _cond(
    importer: Importer, node: fx.Node, predicate: Any, then: Any, other: Any, operands: Sequence[Any]
) -> list[Any]:
    regions = (_region(importer, then, "then"), _region(importer, other, "else"))
    given = [operand for operand in operands if isinstance(operand, Value)]
    return _listed(importer.build("cond", predicate, *given, regions=regions, results=_results(importer, node)))


def _while(
    importer: Importer, node: fx.Node, condition: Any, body: Any, carried: Sequence[Any], captured: Sequence[Any] = ()
) -> list[Any]:
    regions = (_region(importer, condition, "condition"), _region(importer, body, "body"))
    given = [operand for operand in (*carried, *captured) if isinstance(operand, Value)]
    if not all(isinstance(operand, Value) for operand in carried):
        raise CaptureError(f"{node.name} at {importer.build.source} carries numbers: carry tensors (torch.tensor(0))")
    results = _results(importer, node)
    return _listed(importer.build("while_loop", *given, carried=len(carried), regions=regions, results=results))


def _scan(
    importer: Importer,
    node: fx.Node,
    body: Any,
    initial: Sequence[Any],
    scanned: Sequence[Any],
    captured: Sequence[Any] = (),
) -> list[Any]:
    """torch scans along axis 0 and stacks along axis 0; reversed scans are flipped outside by torch itself."""
    regions = (_region(importer, body, "body"),)
    results = _results(importer, node)
    given = [operand for operand in (*initial, *scanned, *captured) if isinstance(operand, Value)]
    attributes: dict[str, Any] = {
        "carried": len(initial),
        "input_axes": (0,) * len(scanned),
        "output_axes": (0,) * (len(results) - len(initial)),
    }
    return _listed(importer.build("scan", *given, regions=regions, results=results, **attributes))


def _opaque(importer: Importer, node: fx.Node, name: str, args: Sequence[Any]) -> list[Any] | Value:
    """A higher-order operator without a record: one torch_call that holds its sub-programs as regions."""
    regions: list[Graph] = []

    def as_regions(value: Any) -> Any:
        if isinstance(value, fx.GraphModule):
            regions.append(_region(importer, value, f"{name}_{len(regions)}"))
            return RegionAt(len(regions) - 1)
        return [as_regions(part) for part in value] if isinstance(value, list | tuple) else value

    tensors: list[Value] = []
    arguments = encode([as_regions(a) for a in args], tensors)
    named = {key: as_regions(importer.argument(value)) for key, value in node.kwargs.items()}
    options = tuple((key, encode(value, tensors)) for key, value in named.items())
    stated = [t for t in importer.truth(node.meta["val"]) if t is not None]
    importer.trail.refusals.append(Refusal(f"higher_order.{name}", importer.build.source, "it has no operator record"))
    target = f"higher_order.{name}"
    call = importer.build("torch_call", *tensors, name=name, results=stated, regions=regions, target=target,
                          arguments=arguments, options=options)  # fmt: skip
    found = iter(_listed(call))
    val = node.meta["val"]
    if isinstance(val, list | tuple):
        return [next(found) if t is not None else None for t in importer.truth(val)]
    return next(found)  # type: ignore[no-any-return]
