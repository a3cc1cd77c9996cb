"""Which values of a graph become integers: what layers read, and what kernels on integers hand on to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.cost import local_figures
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.ops.windows import per_axis
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.name_patterns import matches
from regauge.passes.quantization.ranges import Ends
from regauge.passes.quantization.targets import Target

_LAYERS = ("linear", "matmul", "conv")
_OPSET_OF_BLOCKS = 21
_FEW, _TINY = 16, 8192  # vectors, and entries, of a table that is left as it is
_DEPTH_OF_SOFTMAX = 30.0
_SLOW_DEPTHWISE = "depthwise convolutions are slower with integers"
_SMALL_SHARE = 0.02  # of the multiplications of all layers
_MOVES = ("reshape", "permute", "squeeze", "unsqueeze", "slice", "max_pool")  # entries stay what they are


@dataclass
class Placement:
    """Layers to compute with integers, and the values that are quantized for it.

    ``chained`` values are given by kernels on integers, or moved by others: all who read them read integers. Of the
    value on the right they have the scale. ``fed`` ones come from elsewhere; of those who read them only layers do,
    and ``addends``, the operands of sums that are quantized. Each set of ``alike`` values has one scale.
    """

    layers: list[Layer]
    chained: dict[Value, Value] = field(default_factory=dict)
    fed: list[Value] = field(default_factory=list)
    addends: list[tuple[Node, int]] = field(default_factory=list)
    alike: list[set[Value]] = field(default_factory=list)

    @property
    def measured(self) -> list[Value]:
        """The values whose ranges are needed."""
        return list(dict.fromkeys([*self.chained.values(), *self.fed]))

    def aligned(self, ends: Mapping[Value, Ends]) -> dict[Value, Ends]:
        """Ranges of which those of alike values are the widest among them."""
        result = dict(ends)
        for values in self.alike:
            lows, highs = zip(*(ends[value] for value in values), strict=True)
            result |= dict.fromkeys(values, (min(lows), max(highs)))
        return result


def misfit(layer: Layer) -> str | None:
    """Why a layer does not multiply integers; None where it may."""
    if layer.node.op not in _LAYERS:
        return f"{layer.node.op} has no quantized form yet"
    if layer.weight.dtype != torch.float32:
        return "its weight is not in single precision"
    if layer.blocks > 1 and layer.node.op == "matmul":
        return "it is a batch of matrices"
    return None


def misfit_of_products(layer: Layer, target: Target, *, dynamic: bool = False, floats: bool = False) -> str | None:
    """Why a layer does not multiply integers, or ``floats`` of 8 bits, for a target; None where it does.

    ``dynamic`` says that its input is rounded by ranges that are found when it runs.
    """
    if dynamic and layer.node.op == "conv":
        return "convolutions by ranges found at every run are slower than in float: activations=static"
    reason = misfit(layer)
    if reason:
        return reason
    if target.windows and layer.node.op == "conv":
        gaps = any(step != 1 for step in per_axis(layer.node.attributes["dilation"], layer.weight.rank - 2))
        if floats:
            return f"{target.name} has no convolution of floats of 8 bits"
        if layer.weight.rank != 4 or layer.blocks > 1 or gaps:
            return f"{target.name} has no such convolution of integers"
    multiple, of = (target.multiple_of_floats, "floats of 8 bits") if floats else (target.multiple, "integers")
    if layer.columns % multiple or layer.outputs % multiple:
        return f"its sizes are no multiples of {multiple}: {target.name} has no product of {of} for them"
    return None


def misfit_of_blocks(layer: Layer, target: Target, group: int | None) -> str | None:
    """Why the weight of a layer alone is not stored in integers for a target; None where it is.

    ``group`` is how many of its columns are to share a scale, None all of a row. A runtime that makes floats of what
    no kernel reads, when it loads the file, takes any.
    """
    reason = misfit(layer)
    if reason or target.folds:
        return reason
    if is_depthwise(layer) and not target.depthwise:
        return _SLOW_DEPTHWISE
    if not target.blocks_alone:
        return None
    if layer.node.op == "conv":
        return f"{target.name} would convert the weight of a convolution at every run: target=reference stores it"
    if group is None or layer.columns % group:
        return f"its inputs are no multiple of {group}: {target.name} reads weights alone in blocks"
    return None


def reads_blocks(graph: Graph, layer: Layer, target: Target, group: int, bits: int) -> bool:
    """Whether a target has a kernel for weights alone of a layer, ``group`` of whose columns share a scale.

    Codes of 8 bits have another form where the file's opset is too old for blocks; those of fewer have none.
    """
    fits = layer.node.op != "conv" and layer.blocks == 1 and layer.columns % group == 0
    return target.blocks_alone and fits and (bits < 8 or _opset(graph) >= _OPSET_OF_BLOCKS)


def _opset(graph: Graph) -> int:
    """That of the ONNX file that a graph was read from; other graphs are written with a new one."""
    model = graph.metadata.get("onnx")
    return _OPSET_OF_BLOCKS if model is None else int(model.opset_imports.get("", 1))


def is_depthwise(layer: Layer) -> bool:
    """Whether each input channel has a filter of its own."""
    return layer.blocks > 1 and layer.columns == layer.taps


@dataclass(frozen=True)
class Table:
    """A table of vectors [entries, width], the lookups in it, and linear layers whose weight it is as well."""

    parameter: Parameter
    lookups: list[Node]
    layers: list[Layer]

    def saved(self, bits: int) -> int:
        """Bytes that it loses in so few bits, with a scale for each vector."""
        data = self.parameter.tensor.detach()
        return int(data.nbytes - data.numel() * bits / 8 - 4 * len(data))


def find_tables(graph: Graph, include: Sequence[str], exclude: Sequence[str]) -> list[Table]:
    """The tables that only lookups and linear layers read."""
    found = []
    for table in graph.all_parameters():
        lookups = [node for node, slot in table.uses if node.op == "embedding" and slot == 0]
        linear = [node for node, slot in table.uses if node.op == "linear" and slot == 1]
        others = len(table.uses) - len(lookups) - len(linear)
        if not lookups or others or table in graph.outputs or table.kind != "parameter":
            continue
        chosen = (not include or matches(table.names, include)) and not matches(table.names, exclude)
        own = {*graph.nodes}
        if chosen and table.dtype == torch.float32 and own.issuperset([*lookups, *linear]):
            found.append(Table(table, lookups, [_tied(node, table) for node in linear]))
    return found


def _tied(node: Node, table: Parameter) -> Layer:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return Layer(node, table, bias if isinstance(bias, Parameter) else None)


def misfit_of_table(table: Table, target: Target, *, activations: bool, dynamic: bool = False) -> str | None:
    """Why a table is left as it is: it is tiny, or the weight of layers that cannot read its integers; None otherwise.

    ``dynamic`` as in :func:`misfit_of_products`.
    """
    vectors, width = (int(size) for size in table.parameter.shape)
    if not table.layers and vectors <= _FEW and vectors * width <= _TINY:
        return "a table of few vectors: the error of each is in most of the outputs, and they take few bytes"
    if not table.layers or not activations and not target.blocks_alone:
        return None
    if not activations:
        return f"it is a table and the weight of a layer, of which {target.name} reads blocks of inputs alone"
    if target.flat and dynamic:
        return f"it is a table and the weight of a layer, which {target.name} reads in integers if activations=static"
    if target.flat and not all(_rows_are_known(layer.node.inputs[0]) for layer in table.layers):
        return f"it is a table and the weight of a layer, which {target.name} reads in integers if sizes are known"
    return None


def _rows_are_known(x: object) -> bool:
    return isinstance(x, Value) and (x.rank == 2 or all(isinstance(size, int) for size in x.shape[:-1]))


def left_in_float(graph: Graph, layers: Sequence[Layer], target: Target) -> dict[Node, str]:
    """The convolutions, with reasons, that are not worth integers for a target.

    A small one whose result nothing reads as integers: its kernel gives integers, which would round it for readers in
    float, and little time is gained. A depthwise one, unless it stands between kernels on integers.
    """
    nodes = {layer.node for layer in layers}
    chained, held = _chains(graph, nodes) if target.chains else {}, _held(graph)
    whole = max(local_figures(nodes, graph).macs, 1)
    found = {}
    for layer in layers:
        node = layer.node
        ends = node.op == "conv" and not _goes_on(tail(node.output, held), nodes, chained, held)
        small = local_figures([node], graph).macs < _SMALL_SHARE * whole
        if is_depthwise(layer) and not target.depthwise and (ends or node.inputs[0] not in chained):
            found[node] = _SLOW_DEPTHWISE
        elif ends and small and target.chains:
            found[node] = "a small convolution whose result is read in float"
    return found


def place(graph: Graph, layers: Sequence[Layer], target: Target) -> Placement:
    """Where integers begin and end."""
    placement = Placement(list(layers))
    nodes = {layer.node for layer in layers}
    if target.chains:
        placement.chained = _chains(graph, nodes)
    for layer in layers:
        x = layer.node.inputs[0]
        assert isinstance(x, Value)
        if x not in placement.chained and x not in placement.fed:
            placement.fed.append(x)
    if target.addends:
        placement.addends = _addends(graph, nodes)
        added = [node.inputs[slot] for node, slot in placement.addends]
        placement.fed += [value for value in dict.fromkeys(added) if value not in placement.fed]  # type: ignore[misc]
    if target.aligned:
        placement.alike = _alike(placement.measured)
    return placement


def _addends(graph: Graph, layers: set[Node]) -> list[tuple[Node, int]]:
    """The operands of sums that are added to the result of a convolution, which no one else reads: of two such results
    to that of the later one."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    found = []
    for node in graph.nodes:
        operands = [value for _, value in node.operands() if not isinstance(value, Parameter)]
        if node.op != "add" or len(operands) < 2 or operands[0].shape != operands[1].shape:
            continue
        makers = [value.producer if len(value.uses) == 1 and value.producer in layers else None for value in operands]
        places = [order[maker] if maker is not None and maker.op == "conv" else -1 for maker in makers]
        if max(places) >= 0:
            found.append((node, int(places[0] > places[1])))
    return found


def _alike(values: Sequence[Value]) -> list[set[Value]]:
    """The sets of values, of more than one, of which each holds entries of another: moved, or joined with others."""
    sets: list[tuple[set[Value], set[Value]]] = []  # of the values, and all that they are made of by moves and joins
    for value in values:
        own, made_of = {value}, _made_of(value)
        for other in [pair for pair in sets if pair[1] & made_of]:
            own, made_of = own | other[0], made_of | other[1]
            sets.remove(other)
        sets.append((own, made_of))
    return [own for own, _ in sets if len(own) > 1]


def _made_of(value: Value) -> set[Value]:
    found, pending = set[Value](), [value]
    while pending:
        one = pending.pop()
        found.add(one)
        if one.producer is not None and one.producer.op in (*_MOVES, "concat"):
            pending += [operand for _, operand in one.producer.operands() if operand not in found]
    return found


def readers_in(value: Value, layers: Sequence[Layer]) -> tuple[list[Layer], list[Layer]]:
    """The layers that read a value, of a single block, and the depthwise convolutions beside them.

    None at all where some are convolutions and others are not: their channels lie on different axes.
    """
    own = [layer for layer in layers if layer.node.inputs[0] is value and layer.blocks == 1]
    kinds = {layer.node.op == "conv" for layer in own}
    if len(kinds) > 1:
        return [], []
    if kinds == {False}:
        return own, []
    others = [layer_of(node, blocks=True) for node in value.consumers() if all(node is not one.node for one in own)]
    deep = [layer for layer in others if layer is not None and is_depthwise(layer) and layer.outputs == 1]
    return own, [layer for layer in deep if layer.node.inputs[0] is value and layer.weight.shape[1] == 1]


def depth_of(graph: Graph, value: Value, placement: Placement) -> float | None:
    """How far below its greatest entry a value matters: where all that reads it is a softmax, exp(-30) is nothing.

    A mask adds numbers such as -1e9, between which and 0 a grid would have one step for everything else.
    """
    moved = [other for other, source in placement.chained.items() if source is value] or [value]
    readers = [node for other in moved for node in other.consumers() if node.op not in _MOVES]
    inside = readers and _held(graph).isdisjoint(moved)
    return _DEPTH_OF_SOFTMAX if inside and all(node.op == "softmax" for node in readers) else None


def tail(value: Value, held: set[Value]) -> Value:
    """The result of the clamp at zero that alone reads a value: kernels on integers clamp by rounding."""
    readers = value.consumers()
    if len(readers) == 1 and value not in held:
        node = readers[0]
        if node.op == "relu" or node.op == "hardtanh" and node.attributes["min_val"] == 0:
            return node.output
    return value


def _chains(graph: Graph, layers: set[Node]) -> dict[Value, Value]:
    held = _held(graph)
    chained: dict[Value, Value] = {}
    for node in graph.nodes:
        if node.op == "conv" and node in layers or _joins(node, chained) or _averages(graph, node, chained):
            end = tail(node.output, held)
            chained[end] = end
        elif node.op in _MOVES and node.inputs[0] in chained and len(node.outputs) == 1:
            chained[node.output] = chained[node.inputs[0]]
    for value in reversed(list(chained)):
        assert value.producer is not None
        firm = chained[value] is value and _kernel(value) in layers
        if not firm and not _goes_on(value, layers, chained, held):
            del chained[value]  # nothing goes on with integers from here
    return chained


def _held(graph: Graph) -> set[Value]:
    """What is read from outside the graph."""
    held = {output for output in graph.outputs if isinstance(output, Value)}
    return held | {value for state in graph.states for value in (state.before, state.after)}


def _goes_on(value: Value, layers: set[Node], chained: dict[Value, Value], held: set[Value]) -> bool:
    """Whether a reader of a value takes integers."""
    return any(node in layers or _given(node, held) in chained for node in value.consumers())


def _joins(node: Node, chained: dict[Value, Value]) -> bool:
    """Whether a node joins integers, or adds those of one shape."""
    operands = [value for _, value in node.operands()]
    if len(operands) < 2 or not all(value in chained for value in operands):
        return False
    return node.op == "concat" or node.op == "add" and len({value.shape for value in operands}) == 1


def _averages(graph: Graph, node: Node, chained: dict[Value, Value]) -> bool:
    """Whether a node gives the mean of all places of integers, in a file: torch's exporter writes it as a reduction,
    which has no kernel on them."""
    if "onnx" not in graph.metadata:
        return False
    whole = node.op == "adaptive_avg_pool" and all(size == 1 for size in node.attributes["output_size"])
    return whole and node.inputs[0] in chained


def _kernel(value: Value) -> Node | None:
    """The node whose kernel gives a value, a clamp behind it aside."""
    node = value.producer
    if node is not None and node.op in ("relu", "hardtanh") and isinstance(node.inputs[0], Value):
        return node.inputs[0].producer
    return node


def _given(node: Node, held: set[Value]) -> Value | None:
    """What a kernel gives, a clamp behind it included."""
    return tail(node.outputs[0], held) if len(node.outputs) == 1 else None
