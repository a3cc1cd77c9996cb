"""Graphs that were captured from torch: the emitted module goes through torch's ONNX exporter, names and axes kept."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir
import sympy
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from regauge.backends.onnx_model.attribute_names import readable_attributes
from regauge.backends.onnx_model.bits import FOUR_BITS_SINCE, pack_initializers
from regauge.backends.onnx_model.registry import kept_registry
from regauge.ir.dtypes import OVERFLOWING
from regauge.ir.errors import EmitError, RegaugeError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.node_order import IN_ORDER
from regauge.ir.onnx_places import CLASSES, PATHS
from regauge.ir.ops.spell_normalisation import RMS_NORM_OPSET
from regauge.ir.recurrent_shapes import stated_shapes
from regauge.ir.running.sample_inputs import fitting_inputs

Bodies: TypeAlias = Mapping[str, tuple[Graph, str]]
_PREFIX = "module."  # what the wrapper adds to every name
_FOLDED_BIAS = ".weight_bias"


def exported_model(graph: Graph, bodies: Bodies | None = None) -> onnx_ir.Model:
    """The graph as an ONNX model, by way of ``to_torch`` and ``torch.onnx.export``; raises EmitError when it fails.

    Fused nodes without their regions are calls of functions, of which ``bodies`` holds the regions by name.
    """
    from regauge.backends.onnx_model.calls import as_operators, write_spelled
    from regauge.backends.to_torch import to_torch

    _check_recurrent(graph)
    operators = as_operators(graph, bodies or {})
    graph = operators.graph
    module = to_torch(graph, integers=False)
    described = graph.metadata.get("torch") or {}
    module.train(bool(described.get("training", False)))
    inputs = fitting_inputs(graph, least=2)  # torch.export takes a size of 1 for a constant
    flat = _FlatModule(module, described.get("in_spec"), len(inputs))
    axes = tuple(_dynamic_axes(value) for value in graph.inputs)
    least = RMS_NORM_OPSET if len(operators.translations) > len(operators.spelled) else 0  # of functions
    program = _export(flat, tuple(inputs), axes, graph, operators.translations, least)
    model: onnx_ir.Model = program.model
    write_spelled(model, operators.spelled)
    _restore_names(model, graph)
    pack_initializers(model, graph)
    return model


def _check_recurrent(graph: Graph) -> None:
    """Refuse LSTMs whose states are projected: the exporter writes them as if they were not, with wrong shapes."""
    for _, node in graph.walk():
        if not str(node.attributes.get("target", "")).startswith("aten.lstm.") or len(node.inputs) < 3:
            continue
        state, cell = node.inputs[1:3]
        if isinstance(state, Value) and isinstance(cell, Value) and state.shape[-1:] != cell.shape[-1:]:
            raise EmitError(
                f"{node.label} projects its states (proj_size), which ONNX's LSTM does not: emit a torch module, or "
                "write the layer as a loop of cells"
            )


class _FlatModule(torch.nn.Module):
    """The emitted module with one positional argument per tensor and a flat tuple of results."""

    def __init__(self, module: torch.nn.Module, in_spec: Any, count: int) -> None:
        super().__init__()
        self.module = module
        self.in_spec = in_spec if in_spec is not None and in_spec.num_leaves == count else None

    def forward(self, *tensors: Any) -> Any:
        if self.in_spec is None:
            result = self.module(*tensors)
        else:
            args, kwargs = pytree.tree_unflatten(list(tensors), self.in_spec)
            result = self.module(*args, **kwargs)
        return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))


def _dynamic_axes(value: Value) -> dict[int, Any]:
    """What the exporter is told of each dynamic axis: its name, or to find out by itself for an expression of names."""
    axes: dict[int, Any] = {}
    for axis, size in enumerate(value.shape):
        if isinstance(size, sympy.Symbol):
            axes[axis] = str(size)
        elif isinstance(size, sympy.Basic):
            axes[axis] = torch.export.Dim.AUTO
    return axes


def _export(
    module: torch.nn.Module,
    inputs: tuple[Any, ...],
    axes: tuple[dict[int, Any], ...],
    graph: Graph,
    translations: Mapping[Any, Any],
    least_opset: int,
) -> Any:
    names = [value.name for value in graph.inputs]
    options: dict[str, Any] = {"input_names": names, "output_names": _output_names(graph)}
    if any(axes):
        options["dynamic_shapes"] = (axes,)
    if any(node.attributes.get("block_size") or node.attributes.get("bits") for _, node in graph.walk()):
        options["opset_version"] = FOUR_BITS_SINCE  # the first with scales of blocks, and with less than bytes
    if translations:
        options["custom_translation_table"] = translations
    if least_opset:
        options["opset_version"] = max(least_opset, options.get("opset_version", 0))
    small, in_order = stored_small(graph), IN_ORDER in graph.metadata
    try:
        # The exporter takes attention apart as the plain kernel computes it. Traced with another one, whose results lie
        # otherwise in memory, reshapes behind it became views that do not fit: of biased attention on a dynamic batch.
        with _quiet(), kept_registry(), stated_shapes(), readable_attributes(), sdpa_kernel(SDPBackend.MATH):
            whole = not small and not in_order
            program: Any = torch.onnx.export(module, inputs, dynamo=True, verbose=False, optimize=whole, **options)
            if not whole:
                _optimise(program.model, small, merges=not in_order)
            _let_overflow(program.model)
            return program
    except RegaugeError:
        raise
    except Exception as error:  # the exporter raises one type per stage
        raise EmitError(f"torch's ONNX exporter refused the emitted module: {_reason(error)}") from error


def stored_small(graph: Graph) -> set[str]:
    """Names of the parameters of which nothing may be computed beforehand, as that would be stored beside them.

    They are made larger where they are read, or are matrices that are not read in one way alone: transposed by several
    layers, by one and as they are by an embedding, or mixed anew by several nodes.
    """
    widened = {
        value for _, node in graph.walk() for value in node.inputs if isinstance(value, Parameter) and _widens(node)
    }
    several = {p for p in graph.all_parameters() if p.kind == "parameter" and len(_readings(p)) > 1}
    return {name for parameter in widened | several for name in parameter.names}  # the exporter takes any of them


def _readings(parameter: Parameter) -> set[Hashable]:
    """The ways in which a matrix is read, each of which the exporter stores by itself."""
    found = set[Hashable]()
    for node, slot in parameter.uses if parameter.rank > 1 else ():
        if all(not isinstance(value, Value) or isinstance(value, Parameter) for value in node.inputs):
            found.add(node)
        else:
            found.add(node if node.op == "linear" and slot == 1 else "as it is")
    return found


def _widens(node: Node) -> bool:
    """Whether a node gives more bytes than it reads, on purpose; DequantizeLinear onnxscript knows by itself."""
    if node.op == "dequantize":
        return bool(node.attributes["at_load"])
    if node.op != "cast":
        return node.operator.expands
    kinds = [value.dtype for value in (node.inputs[0], node.output) if isinstance(value, Value)]
    sizes = [kind.itemsize for kind in kinds if isinstance(kind, torch.dtype)]
    return len(sizes) == 2 and sizes[0] < sizes[1]


def _optimise(model: onnx_ir.Model, small: set[str], *, merges: bool) -> None:
    """What the exporter does at the end, but for constants that are stored small.

    It ``merges`` equal nodes as well, unless some are computed twice on purpose.
    """
    import onnxscript.optimizer

    def should_fold(node: onnx_ir.Node) -> bool | None:
        named = any(value is not None and (value.name or "").removeprefix(_PREFIX) in small for value in node.inputs)
        return False if named else None

    if merges:
        onnxscript.optimizer.optimize_ir(model, should_fold=should_fold)
        return
    from onnx_ir.passes.common import DeduplicateInitializersPass, LiftConstantsToInitializersPass

    onnxscript.optimizer.inline(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    onnxscript.optimizer.remove_unused_nodes(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    DeduplicateInitializersPass()(model)


def _let_overflow(model: onnx_ir.Model) -> None:
    """What is too large for a float of 8 bits overflows as in torch; the exporter leaves casts to saturate."""
    codes = {int(onnx_ir.tensor_adapters.from_torch_dtype(dtype)) for dtype in OVERFLOWING}
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() in codes:
            node.attributes["saturate"] = onnx_ir.AttrInt64("saturate", 0)


def _output_names(graph: Graph) -> list[str]:
    """Names of the results: the key or field under which the module returns one, else the name of the value; one that
    would name two of them, or an input, is numbered."""
    keys = _output_keys(graph)
    taken = {value.name for value in graph.inputs}
    names = []
    for place, output in enumerate(graph.outputs):
        if not isinstance(output, Value):  # a number, a text, nothing: no result of a file
            continue
        name = keys[place] or output.name
        names.append(f"{name}_{place}" if name in taken else name)
        taken.add(names[-1])
    return names


def _output_keys(graph: Graph) -> list[str]:
    """The key of each result in the dictionary or dataclass that the module returns; empty where it has none."""
    out_spec = (graph.metadata.get("torch") or {}).get("out_spec")
    count = len(graph.outputs)
    if out_spec is None or out_spec.num_leaves != count:
        return [""] * count
    tree = pytree.tree_unflatten(list(range(count)), out_spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    return [str(getattr(path[-1], "key", getattr(path[-1], "name", ""))) if path else "" for path in paths]


def _restore_names(model: onnx_ir.Model, graph: Graph) -> None:
    """Everything is called as in the module itself, without the wrapper around it.

    Initializers get their state_dict keys again, nodes the paths of their modules. The exporter calls the bias of a
    convolution that took a batch norm in ``conv.weight_bias``: it becomes ``conv.bias``.
    """
    names = model.graph.initializers
    for value in list(names.values()):
        name = (value.name or "").removeprefix(_PREFIX)
        if name.endswith(_FOLDED_BIAS) and _PREFIX + name.removesuffix("_bias") not in names:
            owner = name.removesuffix(_FOLDED_BIAS)
            folded = name.removesuffix("_bias") in names and not {owner + ".bias", _PREFIX + owner + ".bias"} & {*names}
            name = owner + ".bias" if folded else name
        if name not in names:
            value.name = name
    _make_unique(model.graph)
    for node in model.graph.all_nodes():
        _strip_wrapper(node)
    model.graph.name = graph.name


def _make_unique(graph: onnx_ir.Graph) -> None:
    """The exporter gives outputs the names it was told, whether or not it has called something else so."""
    firm = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    made = [value for node in graph.all_nodes() for value in node.outputs if not value.is_graph_output()]
    taken = firm | {value.name for value in made}
    for value in made:
        name, number = value.name, 0
        while value.name in firm:
            number += 1
            value.name = f"{name}_{number}" if f"{name}_{number}" not in taken else value.name
        taken.add(value.name)


def _strip_wrapper(node: onnx_ir.Node) -> None:
    """Drop the wrapper from what the exporter notes on a node of the modules around it."""
    noted = [node.metadata_props.get(key) for key in (PATHS, CLASSES)]
    if None in noted:
        return
    paths, classes = (ast.literal_eval(text or "[]") for text in noted)
    if len(paths) > 2 and paths[1] == _PREFIX.rstrip("."):  # the wrapper, the root, ..., the operator
        stripped = ["", *(path.removeprefix(_PREFIX) for path in paths[2:])]
        node.metadata_props[PATHS] = str(stripped)
        node.metadata_props[CLASSES] = str(classes[1:])
        node.metadata_props["namespace"] = "/".join(map(": ".join, zip(stripped, classes[1:], strict=True)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and logs through several libraries; errors reach us as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        sink = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The innermost cause says what is wrong; the outer ones only which stage it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines: Sequence[str] = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
