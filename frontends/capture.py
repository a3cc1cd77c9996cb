"""``capture``: a torch model as a Graph.

    graph = capture(model, (images,), dynamic={"x": {0: "batch"}})

The model is exported in eval mode without gradients (non-strict first, strict next, fx tracing last), imported with
whole operators, and checked by numbers against itself. Nothing of the user's model is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from regauge.frontends import numeric_check as check
from regauge.frontends.aliasing import NeedsDecomposition
from regauge.frontends.aten_call import Refusal
from regauge.frontends.dynamic import Requests, export_spec, read_requests, warn_of_guards, widen_examples
from regauge.frontends.from_export import Imported, from_export
from regauge.frontends.module_options import note_options, traceable_statistics
from regauge.frontends.outputs import plain_outputs
from regauge.frontends.pytrees import Leaf, argument_names, distinct, flatten_call, flatten_outputs, tensors_of
from regauge.frontends.tracing import bind_arguments, explain_run, export_module, in_mode
from regauge.ir.errors import CaptureError, RegaugeWarning, first_line
from regauge.ir.graph import Graph
from regauge.ir.recurrent_shapes import stated_shapes

MAX_REPAIRS = 8  # operators whose records may turn out wrong in one model before capture gives up


@dataclass
class Traced:
    """An exported program with everything needed to import it, run it and rebuild its calls."""

    program: ExportedProgram
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: list[str]
    leaves: list[Leaf]
    in_spec: Any
    requests: Requests
    training: bool = False
    module: torch.nn.Module | None = None
    plain: bool = False  # results that torch.export does not take are left out or changed to dicts


def capture(
    obj: Any,
    example_inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = None,
    verify: bool = True,
    train: bool = False,
) -> Graph:
    """The graph of an ``nn.Module``, ``fx.GraphModule`` or ``ExportedProgram``.

    ``example_inputs`` is a tensor, a tuple of positional arguments, or a mapping of keyword arguments. ``dynamic``
    names axes that vary: ``{"input_ids": {0: "batch", 1: ("seq", 1, 2048)}}``. With ``verify`` the graph's results are
    compared with the model's. ``train=True`` keeps the modes the sub-modules are in; the default captures eval mode.

    Raises CaptureError naming the source line that cannot be captured; warns (RegaugeWarning) of operators kept opaque,
    of axis rules that do not fit, and of axes that the model fixed.
    """
    traced = trace_program(obj, example_inputs, kwargs, dynamic=dynamic, train=train)
    imported = _import_checked(traced) if verify else import_traced(traced)
    graph = imported.graph
    graph.metadata["torch"] = _metadata(traced)
    warn_of_guards(traced.program)
    if traced.module is not None:
        _report_lost(note_options(graph, traced.module, training=traced.training))
    _report_opaque(graph, imported.trail.refusals)
    _report_rules(graph)
    return graph


# -- tracing -----------------------------------------------------------------------------------------------------------


def trace_program(
    obj: Any, example_inputs: Any, kwargs: Mapping[str, Any] | None, *, dynamic: Any = None, train: bool = False
) -> Traced:
    """Export ``obj``, or take the program it is; raises CaptureError."""
    args, keywords = distinct(_call_of(example_inputs, kwargs))
    if isinstance(obj, ExportedProgram):
        return _given_program(obj, args, keywords, dynamic, example_inputs is None and kwargs is None)
    module = _module_of(obj)
    names = argument_names(module.forward, len(args))
    leaves, in_spec = flatten_call(names, args, keywords)
    requests = read_requests(dynamic, leaves, names)
    args, keywords, leaves = widen_examples(args, keywords, leaves, requests)
    bound, heads = bind_arguments(module, args, keywords)
    with in_mode(module, train), traceable_statistics(module):
        program, changes = export_module(module, args, keywords, export_spec(bound, heads, requests))
    if changes:
        _warn(f"the graph's results are not quite the model's: {'; '.join(changes)}")
    return Traced(
        program,
        type(module).__name__,
        tuple(args),
        dict(keywords),
        names,
        leaves,
        in_spec,
        requests,
        training=train and any(m.training for m in module.modules()),
        module=module,
        plain=bool(changes),
    )


def _call_of(example_inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    keywords = dict(kwargs or {})
    if example_inputs is None:
        return (), keywords
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), keywords
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **keywords}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), keywords
    raise CaptureError(
        f"example inputs must be a tensor, a tuple of arguments or a mapping of keyword arguments, "
        f"got {type(example_inputs).__name__}"
    )


def _module_of(obj: Any) -> torch.nn.Module:
    obj = getattr(obj, "_orig_mod", obj)  # what torch.compile wraps
    if isinstance(obj, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise CaptureError("a TorchScript module cannot be captured: capture the nn.Module it was made from")
    if not isinstance(obj, torch.nn.Module):
        kind = f"the class {obj.__name__}" if isinstance(obj, type) else f"a {type(obj).__name__}"
        raise CaptureError(
            f"capture takes an nn.Module, an fx.GraphModule or an ExportedProgram, not {kind}; "
            f"ONNX models are read by regauge.load"
        )
    scripted = next((n for n, m in obj.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise CaptureError(f"sub-module {scripted!r} is TorchScript: put the nn.Module it was made from in its place")
    return obj


def _given_program(
    program: ExportedProgram, args: tuple[Any, ...], keywords: dict[str, Any], dynamic: Any, absent: bool
) -> Traced:
    if absent:
        if program.example_inputs is None:
            raise CaptureError("the ExportedProgram carries no example inputs: pass them")
        args, keywords = tuple(program.example_inputs[0]), dict(program.example_inputs[1] or {})
    signature = program.module_call_graph[0].signature
    found = list(getattr(signature, "forward_arg_names", None) or [])
    names = (found + [f"arg{i}" for i in range(len(found), len(args))])[: len(args)]
    leaves, in_spec = flatten_call(names, args, keywords)
    requests = read_requests(dynamic, leaves, names)
    stack: Any = next((n.meta["nn_module_stack"] for n in program.graph.nodes if n.meta.get("nn_module_stack")), {})
    root = next((str(owner).rpartition(".")[2] for path, owner in stack.values() if path == ""), "Program")
    return Traced(program, root, args, keywords, names, leaves, in_spec, requests)


# -- importing and checking --------------------------------------------------------------------------------------------


def import_traced(traced: Traced, avoid: Mapping[str, str] | None = None, *, fold: bool = True) -> Imported:
    """Import the program; one that writes in ways we do not follow is functionalised by torch first."""
    device = _device(traced)
    with nullcontext() if device.type == "cpu" else device, stated_shapes():
        try:
            return from_export(traced.program, traced.leaves, traced.requests, name=traced.name, avoid=avoid, fold=fold)
        except NeedsDecomposition as reason:
            _decompose(traced, str(reason))
            return from_export(traced.program, traced.leaves, traced.requests, name=traced.name, avoid=avoid, fold=fold)


def _decompose(traced: Traced, reason: str) -> None:
    try:
        traced.program = traced.program.run_decompositions({})
    except Exception as error:
        line = first_line(error)
        raise CaptureError(f"{traced.name} cannot be captured: {reason}, and torch cannot undo that: {line}") from error


def _device(traced: Traced) -> torch.device:
    devices = [tensor.device for tensor in traced.program.state_dict.values()]
    return devices[0] if devices else torch.device("cpu")


def _import_checked(traced: Traced) -> Imported:
    """Import and compare; a record that computes something else than torch is put aside and its calls kept opaque."""
    imported = import_traced(traced)
    if any(t.is_meta for t in traced.program.state_dict.values()):
        _warn("the numeric check is skipped, since the model's weights are on the meta device")
        return imported
    inputs = tensors_of(traced.leaves)
    flat = [leaf.value for leaf in traced.leaves]
    expected = _reference(traced, imported.graph, flat)
    drawn = check.random_operators(imported.graph)
    if drawn and check.worst(_reference(traced, imported.graph, flat, seed=1), expected)[0] > 0:
        _warn(f"the numeric check is skipped, since {', '.join(drawn)} draws random numbers")
        return imported
    avoid: dict[str, str] = {}
    while True:
        found, message = _compare(imported.graph, inputs, expected)
        if found <= 1:
            return imported
        plain = import_traced(traced, avoid, fold=False)
        wrong = check.first_wrong_call(traced.program, plain.graph, plain.trail, flat, inputs)
        if wrong is None or len(avoid) >= MAX_REPAIRS or check.call_path(wrong[0]) in avoid:
            raise CaptureError(
                f"the captured graph of {traced.name} does not compute what the model computes: {message}"
            )
        avoid[check.call_path(wrong[0])] = "its record computes something else than torch does here"
        imported = import_traced(traced, avoid)


def _reference(traced: Traced, graph: Graph, flat: list[Any], seed: int = 0) -> list[Any]:
    """The model's own results; a given program is run on copies of its state."""
    if traced.module is None:
        return check.run_program(traced.program, flat, seed=seed)
    with in_mode(traced.module, traced.training):
        protect = traced.training or bool(graph.states)
        try:
            result = check.run_module(traced.module, traced.args, traced.kwargs, protect=protect, seed=seed)
        except Exception as error:  # tracing is laxer in places: it lets tensors of different types be multiplied
            raise CaptureError(explain_run(traced.name, error)) from error
    return flatten_outputs(plain_outputs(result) if traced.plain else result)


def _compare(graph: Graph, inputs: list[torch.Tensor], expected: list[Any]) -> tuple[float, str]:
    try:
        actual = check.run_graph(graph, inputs)
    except Exception as error:
        return float("inf"), str(error)
    found, place = check.worst(actual, expected)
    return found, f"result {place} differs by {found:.3g} times what rounding explains"


# -- what goes with the graph ------------------------------------------------------------------------------------------


def _metadata(traced: Traced) -> dict[str, Any]:
    """What an emitted module needs to take and give the same nested arguments and results."""
    return {
        "in_spec": traced.in_spec,
        "out_spec": traced.program.call_spec.out_spec,
        "input_names": [leaf.name for leaf in traced.leaves if leaf.is_tensor],
        "leaves": tuple((leaf.name, None if leaf.is_tensor else leaf.value) for leaf in traced.leaves),
        "argument_names": tuple(traced.arguments),
        "kwargs": tuple(traced.kwargs),
        "root_class": traced.name,
        "state_names": tuple(traced.program.state_dict),
        "training": traced.training,
    }


def _report_opaque(graph: Graph, refusals: Sequence[Refusal]) -> None:
    """One warning for all operators that stayed opaque."""
    left: dict[str, list[str]] = {}
    for _, node in graph.walk():
        if node.op == "torch_call":
            left.setdefault(node.attributes["target"], []).append(node.source)
    if not left:
        return
    reasons = {refusal.operator: refusal.reason for refusal in reversed(refusals)}
    parts = []
    for target, sources in left.items():
        place = f" first at {sources[0]}" if sources[0] else ""
        parts.append(f"{target} ({len(sources)}x{place}: {reasons.get(target, 'no record')})")
    _warn(f"operators kept as they are, whose axes cannot be cut: {'; '.join(parts)}")


def _report_lost(modules: Sequence[str]) -> None:
    """One warning for all modules whose emitted form would train otherwise."""
    if modules:
        _warn(
            f"dropout that evaluation leaves no trace of, so that it is not captured: {', '.join(modules)}; "
            f"to train what is emitted, use capture(train=True)"
        )


def _report_rules(graph: Graph) -> None:
    """One warning for all nodes whose axis rule does not fit them; the analysis is kept for whoever asks next."""
    problems = graph.axes.problems
    if problems:
        _warn(
            f"nodes whose axis rule does not fit, so that nothing they touch can be cut: {'; '.join(problems)} "
            f"(regauge.check_operator checks a rule)"
        )


def _warn(message: str) -> None:
    warnings.warn(message, RegaugeWarning, stacklevel=4)
