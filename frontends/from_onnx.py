"""Loading ONNX models: each node is read onto the operator it stands for; the onnx_ir model itself is carried along.

    model.onnx ── onnx_ir.Model (carried, never changed) ── Graph: nodes and values point back with ``origin``

Whatever cannot be read becomes an ``onnx_call``: kept as it is, run by onnxruntime, a barrier to passes.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx
import onnx_ir

from regauge.frontends.onnx_model.call import OnnxCall
from regauge.frontends.onnx_model.file import in_order, lists_every_weight, open_model
from regauge.frontends.onnx_model.functions import expand_function
from regauge.frontends.onnx_model.hierarchy import place_by_weights, recorded_scope
from regauge.frontends.onnx_model.kernels import read_region
from regauge.frontends.onnx_model.opaque import emit_opaque
from regauge.frontends.onnx_model.opset import in_opset, prove_equal
from regauge.frontends.onnx_model.regions import read_cond, read_loop, read_scan
from regauge.frontends.onnx_model.scope import Entry, Scope, tensor_entry
from regauge.frontends.onnx_model.sequences import SEQUENCE_OPERATORS, read_sequence
from regauge.frontends.onnx_model.weights import data_type_of, dtype_of, weight_of
from regauge.ir.collection import without_collection
from regauge.ir.dtypes import Dtype
from regauge.ir.edit import Builder, remove_node
from regauge.ir.errors import LoadError, OperatorError, RegaugeError, RegaugeWarning
from regauge.ir.folding.limits import BYTES_BEFORE, noted_bytes
from regauge.ir.folding.onnx_operators import Question, fold
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Operator, find_onnx
from regauge.ir.sizes.expressions import Size, count, parse_size, symbol
from regauge.ir.sizes.onnx_contents import Unknown, as_type, constant_tensor, content, of_shape
from regauge.ir.states import PROPERTY, take_states

OVERRIDABLE = "overridable initializer: pass freeze=True to treat it as a weight"
_CONTROL = {"If": read_cond, "Loop": read_loop, "Scan": read_scan}


def load(source: Any, *, freeze: bool = False, opset: int | None = None) -> Graph:
    """Load an ONNX model from a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model``; the source is not changed.

    Weights stay in the file until they are read. Initializers that are also graph inputs can be overridden by whoever
    runs the model: they stay inputs, pinned, unless ``freeze`` is given. In files of old exporters, which listed every
    weight as an input (IR version below 4, or below 7 with nine in ten initializers listed), they are weights.
    With ``opset`` the model is converted to that newer opset, by onnx, and held to what it was by running both.
    ``graph.metadata`` holds the carried model under "onnx", the graph as it was read under "onnx_imported", the file
    with its size and time under "onnx_source", contents that were folded under "onnx_folded", branches of an If taken
    at import under "onnx_branches" and notes on what was changed under "onnx_notes".
    Raises LoadError, in one line, when the file is broken or cannot be converted.
    """
    with without_collection():
        given, label, notes = open_model(source)
        freeze = freeze or lists_every_weight(given)
        model = given if opset is None else in_opset(given, opset, label)
        importer = _Importer(model, label, freeze=freeze)
        graph = importer.run()
    if model is not given:
        graph.metadata["onnx_converted"] = True
        prove_equal(lambda: _Importer(given, label, freeze=freeze).run(), graph, label)
    graph.metadata["onnx_notes"] = (*notes, *importer.notes)
    before = noted_bytes(model.metadata_props)
    if before is not None:
        graph.metadata[BYTES_BEFORE] = before
    take_states(graph, model.metadata_props.get(PROPERTY))
    if isinstance(source, str | os.PathLike) and model is given:
        state = os.stat(source)
        graph.metadata["onnx_source"] = (os.path.abspath(source), state.st_size, state.st_mtime_ns)
    graph.metadata["onnx_imported"] = graph.copy()
    importer.warn()
    return graph


def _mark_statistics(graph: Graph) -> None:
    """Running means and variances, and weights of classes in losses, are buffers, as in torch: nobody trained them, and
    they count as no parameters; torch has no gradients of them."""
    for _, node in graph.walk():
        for slot in _UNTRAINED.get(node.op, ()):
            value = node.inputs[slot] if slot < len(node.inputs) else None
            if isinstance(value, Parameter) and all(_reads_alike(node, *use) for use in value.uses):
                value.kind, value.trainable = "buffer", False


_UNTRAINED = {"batch_norm": (3, 4), "cross_entropy": (2,)}


def _reads_alike(node: Node, user: Node, slot: int) -> bool:
    """Whether another node reads what is not trained for the same: the mean of losses looks weights of classes up."""
    looked_up = node.op == "cross_entropy" and user.op == "index_select" and slot == 0
    return looked_up or (user.op == node.op and slot in _UNTRAINED[node.op])


def _mark_quantized(graph: Graph) -> None:
    """Integers that stand for a trained weight, and their scales, are parts of it, which are trained no more."""
    for _, node in graph.walk():
        if node.op == "dequantize" and isinstance(node.inputs[0], Parameter) and node.inputs[0].rank:
            for value in node.inputs[:2]:
                if isinstance(value, Parameter):
                    value.kind, value.trainable = "parameter", False


def _drop_unread(graph: Graph) -> None:
    """Constants that readers took for numbers or sizes stay in the carried file alone: to change them means nothing.

    So do weights that ONNX nodes read and do not use, as a Gemm of beta 0 its third operand: nothing here would say
    that they have to fit."""
    folded = graph.metadata["onnx_folded"]
    for owner in [graph, *(region for _, node in graph.walk() for region in node.regions)]:
        read = {output for output in owner.outputs if isinstance(output, Parameter)}
        for name, parameter in list(owner.parameters.items()):
            ignored = isinstance(parameter.origin, onnx_ir.Value) and bool(parameter.origin.uses())
            if (ignored or parameter.kind == "constant") and not parameter.uses and parameter not in read:
                del owner.parameters[name]
    left = {parameter.name for parameter in graph.all_parameters()}
    for value, record in folded.items():
        if record.parameter is not None and record.parameter not in left:
            folded[value] = replace(record, parameter=None)


class _Importer:
    """One import: walks the nodes of the main graph, and through the scopes those of nested graphs and functions."""

    def __init__(self, model: onnx_ir.Model, label: str, *, freeze: bool) -> None:
        self.model = model
        self.freeze = freeze
        self.label = label
        self.by_torch = model.producer_name == "pytorch"
        self.graph = Graph(name=model.graph.name or "graph")
        self.scope = Scope(Builder(self.graph), dict(model.opset_imports))
        self.scope.emit = self._emit
        self.scope.keep = self._keep
        self.opaque: list[tuple[str, str]] = []  # (operator, which node and why)
        self.branches: dict[onnx_ir.Node, int] = {}
        self.aliases: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self.notes: list[str] = []

    def run(self) -> Graph:
        self.graph.metadata["onnx"] = self.model
        self.scope.reserve_names(self.model.graph)
        self._inputs()
        self._note_frozen()
        self.initializers(self.scope, self.model.graph)
        self.nodes(self.scope, self.model.graph)
        self.graph.outputs = [self.scope.operand(value) for value in self.model.graph.outputs]
        self.graph.metadata["onnx_folded"] = self.scope.folded
        self.graph.metadata["onnx_branches"] = self.branches
        self.graph.metadata["onnx_aliases"] = self.aliases
        _drop_unread(self.graph)
        _mark_statistics(self.graph)
        _mark_quantized(self.graph)
        place_by_weights(self.graph)
        return self.graph

    # -- inputs and initializers -------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        defaults, reasons = {}, {}
        for onnx_value in self.model.graph.inputs:
            if onnx_value.is_initializer() and self.freeze:
                continue
            shape, dtype = self._input_type(onnx_value)
            value = self.scope.build.input(onnx_value.name or "input", shape, dtype)
            self.scope.name(value, onnx_value, "input")
            value.origin = onnx_value
            self.scope.entries[onnx_value] = Entry(onnx_value, self.scope, value=value)
            if onnx_value.const_value is not None:
                defaults[value.name] = weight_of(onnx_value.const_value)
                reasons[value.name] = OVERRIDABLE
        if defaults:
            self.graph.metadata["input_defaults"] = defaults
            self.graph.metadata["input_reasons"] = reasons

    def _note_frozen(self) -> None:
        if self.freeze and not lists_every_weight(self.model):
            names = [value.name or "" for value in self.model.graph.inputs if value.is_initializer()]
            if names:
                self.notes.append(f"initializers that callers could override are frozen: {', '.join(names)}")

    def _input_type(self, value: onnx_ir.Value) -> tuple[tuple[Size, ...], Dtype]:
        if isinstance(value.type, onnx_ir.SequenceType | onnx_ir.OptionalType):
            return (), "sequence" if isinstance(value.type, onnx_ir.SequenceType) else "optional"
        if value.shape is None:
            raise LoadError(
                f"{self.label}: the input {value.name!r} has no rank; give it a shape and save the model again"
            )
        sizes = tuple(_input_size(d, f"{value.name}_{axis}") for axis, d in enumerate(value.shape))
        for size in sizes:
            if not isinstance(size, int):
                self.graph.symbols.update({s: (1, None) for s in size.free_symbols})
        return sizes, dtype_of(value.dtype)

    def initializers(self, scope: Scope, graph: onnx_ir.Graph) -> None:
        for value in graph.initializers.values():
            if value not in scope.entries and value.const_value is not None:
                scope.entries[value] = tensor_entry(value, scope, value.const_value)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def nodes(self, scope: Scope, graph: onnx_ir.Graph | onnx_ir.Function) -> None:
        """Read the nodes of a graph, each after what it reads."""
        for node in in_order(graph, self.label):
            self.node(scope, node)

    def node(self, scope: Scope, node: onnx_ir.Node) -> None:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            self._constant(scope, node)
        elif not self._fold(scope, node):
            self._emit(scope, node)

    def _constant(self, scope: Scope, node: onnx_ir.Node) -> None:
        output = node.outputs[0]
        tensor = constant_tensor(output)
        if tensor is None:
            call = OnnxCall(node, scope)
            name = call.attribute_names[0] if call.attribute_names else ""
            if name == "sparse_value" or not name:
                self._keep(scope, node, "a sparse constant is kept as it is")
                return
            raw = call._attributes[name]
            tensor = raw.value if name == "value" else onnx_ir.tensor(raw.value)
        scope.entries[output] = tensor_entry(output, scope, tensor)

    def _fold(self, scope: Scope, node: onnx_ir.Node) -> bool:
        """Whether the contents of a node's outputs are known without running it; they are noted, no node is made."""
        if node.domain not in ("", "ai.onnx") or not node.outputs:
            return False
        call = OnnxCall(node, scope)
        entries = [call.entry(i) for i in range(len(node.inputs))]
        try:
            if node.op_type in ("Shape", "Size") and entries[0] is not None:
                found = [_shape_content(call, entries[0])]
            elif node.op_type == "CastLike" and entries[0] is not None and entries[1] is not None:
                found = [as_type(entries[0].content, data_type_of(entries[1].dtype))]
            elif entries and all(e is None or e.content is not None for e in entries) and any(entries):
                known = [None if e is None else e.content for e in entries]
                found = fold(Question(node.op_type, call.opset, known, call.attribute, len(node.outputs)))
            else:
                return False
        except Unknown:
            return False
        for output, known_content in zip(node.outputs, found, strict=False):
            entry = Entry(output, scope, content=known_content, producer=node)
            scope.entries[output] = entry
            scope.note(entry, None)
        return True

    def _emit(self, scope: Scope, node: onnx_ir.Node) -> None:
        """Make nodes of our own for an ONNX node."""
        build = scope.build
        before = (build.origin, build.scope)
        build.origin, build.scope = node, recorded_scope(node, by_torch=self.by_torch)
        start = len(build.added)
        try:
            self._read(scope, node)
            _fix_constants(build.added[start:], node)
        except LoadError as error:
            if "external data" in str(error):
                raise
            self._give_up(scope, node, start, error)
        except Exception as error:
            self._give_up(scope, node, start, error)
        finally:
            build.origin, build.scope = before

    def _give_up(self, scope: Scope, node: onnx_ir.Node, start: int, error: Exception) -> None:
        for added in reversed(scope.build.added[start:]):
            if added.origin is node and not any(value.uses for value in added.outputs):
                scope.build.release(value.name for value in added.outputs)
                remove_node(scope.build.graph, added)
        del scope.build.added[start:]
        kind = "" if isinstance(error, RegaugeError) else f"{type(error).__name__}: "
        self._keep(scope, node, kind + (str(error).strip() or "no reason given").splitlines()[0])

    def _read(self, scope: Scope, node: onnx_ir.Node) -> None:
        _check_ranks(scope, node)
        domain = "" if node.domain == "ai.onnx" else node.domain
        function = self.model.functions.get(node.op_identifier())
        if domain == "" and node.op_type in _CONTROL:
            _CONTROL[node.op_type](self, scope, node)
        elif domain == "" and node.op_type in SEQUENCE_OPERATORS:
            read_sequence(scope, node)
        elif function is not None and not read_region(self, scope, node, function):
            expand_function(self, scope, node, function)
        elif function is None:
            found = find_onnx(domain, node.op_type)
            if found is None:
                raise OperatorError("there is no record for it")
            operator, form = found
            call = OnnxCall(node, scope)
            results = form.read(scope.build, call) if form.read is not None else _direct(scope.build, call, operator)
            _check_all_read(call)
            self.bind(scope, node, results if isinstance(results, tuple | list) else (results,))

    def bind(self, scope: Scope, node: onnx_ir.Node, results: Sequence[Value | None]) -> None:
        """Let the node's outputs stand for the results of the reader, under the ONNX names."""
        if any(value.name and value.uses() for value in node.outputs[len(results) :]):
            raise OperatorError(f"its reader gives {len(results)} of {len(node.outputs)} results")
        for onnx_value, value in zip(node.outputs, results, strict=False):
            if not onnx_value.name:
                continue
            if value is None:
                if onnx_value.uses() or onnx_value.is_graph_output():
                    raise OperatorError(f"its reader does not give the result {onnx_value.name!r}")
                continue
            if value.origin is None and value.producer is not None and value.producer.origin is node:
                scope.name(value, onnx_value)
                value.origin = onnx_value
            elif isinstance(value.origin, onnx_ir.Value) and value.origin is not onnx_value:
                self.aliases[onnx_value] = value.origin
            existing = scope.entries.get(onnx_value)
            if existing is None:
                scope.entries[onnx_value] = Entry(onnx_value, scope, value=value)
            else:
                existing.value = value

    def _keep(self, scope: Scope, node: onnx_ir.Node, reason: str) -> None:
        self.opaque.append((node.op_type, f"{node.name or node.outputs[0].name}: {reason}"))
        results = emit_opaque(self.model, scope, node, reason)
        named = iter(results)
        self.bind(scope, node, [next(named) if value.name else None for value in node.outputs])
        for value in results:
            for size in value.shape:
                if not isinstance(size, int):
                    self.graph.symbols.update({s: (1, None) for s in size.free_symbols if s not in self.graph.symbols})

    def assume(self, node: onnx_ir.Node) -> None:
        """Note that a branch is taken although its condition depends on a dynamic size."""
        name = node.name or node.outputs[0].name
        self.notes.append(
            f"If {name!r}: the first branch is taken to be the one that runs, for the other differs in form"
        )

    def warn(self) -> None:
        """One warning for all nodes that are kept as they are."""
        if self.opaque:
            counts = Counter(op_type for op_type, _ in self.opaque)
            kinds = ", ".join(f"{op_type} ({number})" for op_type, number in sorted(counts.items()))
            first = self.opaque[0][1]
            warnings.warn(
                f"{self.label}: kept as they are, and nothing they touch can be cut: {kinds}; the first is {first}",
                RegaugeWarning,
                stacklevel=3,
            )


def _check_ranks(scope: Scope, node: onnx_ir.Node) -> None:
    """Refuse to read a node with an operand of unknown rank: every record goes by the axes of its operands."""
    for operand in node.inputs:
        if operand is not None and not scope.find(operand).ranked:
            raise OperatorError(f"the rank of its operand {operand.name} is not known before the model runs")


def _fix_constants(added: Sequence[Node], node: onnx_ir.Node) -> None:
    """Tables that a reader made up are in no file, so they cannot be cut there; what is uniform needs no cutting."""
    for made in added:
        for _, value in made.operands():
            if isinstance(value, Parameter) and value.origin is None and value.rank and not _uniform(value):
                made.metadata["fixed_constants"] = f"{node.op_type} counts its entries by position"


def _uniform(parameter: Parameter) -> bool:
    tensor = parameter.tensor
    return bool(tensor.numel() and (tensor == tensor.reshape(-1)[0]).all())


def _input_size(dimension: Any, default: str) -> Size:
    """The size of an input's axis; a name that is no arithmetic (``?``) gets a symbol of its own."""
    if isinstance(dimension, int):
        return dimension
    try:
        return parse_size(dimension.value) if dimension.value else symbol(default)
    except RegaugeError:
        return symbol(default)


def _shape_content(call: OnnxCall, entry: Entry) -> Any:
    shape = entry.shape
    if not entry.ranked or entry.dtype in ("unknown", "sequence", "optional"):
        raise Unknown
    if call.op_type == "Size":
        return content(count(shape), onnx_ir.DataType.INT64)
    return of_shape(shape[call.attribute("start", 0) : call.attribute("end", len(shape))])


def _direct(build: Builder, call: OnnxCall, operator: Operator) -> Any:
    """The mapping ``None``: inputs are the operands, attributes those of the same name."""
    attributes = {}
    for name in call.attribute_names:
        value = call.attribute(name)
        if name in operator.attributes:
            attributes[name] = value
        elif value != _schema_default(call, name):
            raise OperatorError(f"its attribute {name}={value!r} is not supported")
    inputs = call.inputs
    while inputs and inputs[-1] is None:
        inputs.pop()
    return build(operator.name, *inputs, **attributes)


def _check_all_read(call: OnnxCall) -> None:
    """Raise OperatorError where a node says what its reader did not ask for, as readers do of operators that are given
    new attributes or operands in a later opset: what it computes would be something else."""
    for name in call.unread_attributes:
        value = call.attribute(name)
        if name not in _WITHOUT_EFFECT and value != _schema_default(call, name):
            raise OperatorError(f"its attribute {name}={value!r} is not supported")
    for index in call.unread_inputs:
        raise OperatorError(f"its input {index} ({call.operand(index).name}) is not supported")


_WITHOUT_EFFECT = ("seed", "consumed_inputs")  # what is drawn is the runtime's; before opset 6, buffers to reuse


def _schema_default(call: OnnxCall, name: str) -> Any:
    try:
        schema = onnx.defs.get_schema(call.op_type, call.opset, call.domain)
    except onnx.defs.SchemaError:
        return None
    attribute = schema.attributes.get(name)
    if attribute is None or not attribute.default_value.name:
        return None
    found = onnx.helper.get_attribute_value(attribute.default_value)
    return found.decode() if isinstance(found, bytes) else found
