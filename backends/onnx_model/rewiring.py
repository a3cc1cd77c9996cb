"""Nodes that passes added, removed or connected differently, in the carried ONNX model.

A node that a pass added is spelled in ONNX by its record. An ONNX node of which only part is left, or one that a change
reaches into, is *dissolved*: what is left of it is spelled anew, node by node, and the ONNX node goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir
import torch

from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.changes import Changes, Rewired, same_shape
from regauge.backends.onnx_model.contents import Contents, gives_sizes, is_content
from regauge.backends.onnx_model.gemm import join_gemms
from regauge.backends.onnx_model.inlining import nested_graphs
from regauge.backends.onnx_model.order import in_given_order
from regauge.backends.onnx_model.patch import FOLDED_SIZES
from regauge.backends.onnx_model.size_nodes import SizeSource
from regauge.backends.onnx_model.speller import OnnxSpeller, spell
from regauge.backends.onnx_model.write import graphs_in, with_nested
from regauge.ir.axis_rules.rules import broadcast_rule
from regauge.ir.errors import EmitError
from regauge.ir.folding.purity import OPAQUE
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.node_order import IN_ORDER
from regauge.ir.onnx_places import says_places, scope_notes
from regauge.ir.operator import find_onnx

_SEQUENCES = {"SplitToSequence"}  # read as pieces of known number, which a Split gives without a sequence


def rewire(
    graph: Graph, imported: Graph, changes: Changes, carrier: Carrier, sources: SizeSource, contents: Contents
) -> None:
    """Add, connect and remove ONNX nodes; raises EmitError for what cannot be spelled in ONNX."""
    fold = graph.metadata.get("onnx_fold")
    in_order = IN_ORDER in graph.metadata
    if not (fold or in_order or changes.added or changes.removed or changes.rewired or changes.restated):
        return
    writer = _Rewiring(graph, imported, changes, carrier, sources, contents)
    writer.spell_all(writer.dissolved())
    writer.connect_all()
    writer.remove_all()
    writer.tidy()
    if in_order:
        in_given_order(carrier.model.graph, [writer.carried(v) for node in graph.nodes for v in node.outputs])
    carrier.model.graph.sort()


_PROVENANCE = ("regauge.added_by", "regauge.replaces")


class _Rewiring:
    def __init__(
        self,
        graph: Graph,
        imported: Graph,
        changes: Changes,
        carrier: Carrier,
        sources: SizeSource,
        contents: Contents,
    ) -> None:
        self.graph = graph
        self.changes = changes
        self.carrier = carrier
        self.sources = sources
        self.contents = contents
        self.added = set(changes.added)
        self.folded = graph.metadata.get("onnx_folded", {})
        self.owners = {node: owner for owner, node in graph.walk()}
        self.kept: dict[onnx_ir.Node, list[Node]] = {}
        for node in self.owners:
            if node not in self.added and isinstance(node.origin, onnx_ir.Node):
                self.kept.setdefault(node.origin, []).append(node)
        self.imported_nodes: dict[onnx_ir.Node, list[Node]] = {}
        for _, node in imported.walk():
            self.imported_nodes.setdefault(node.origin, []).append(node)
        self.rewired_by: dict[Any, list[Rewired]] = {}
        for edge in changes.rewired:
            self.rewired_by.setdefault(edge.node.origin if edge.node is not None else None, []).append(edge)
        self.graphs: dict[Graph, onnx_ir.Graph] = {graph: carrier.model.graph, imported: carrier.model.graph}
        self.branch_outputs = _branch_outputs(graph, carrier)
        self.parents = _parents(carrier.model.graph)
        self.tells_places = says_places(carrier.model.graph.all_nodes())
        for root in (graph, imported):
            self._place_regions(root)
        self.created: dict[Value, onnx_ir.Value] = {}
        self.superseded: dict[onnx_ir.Value | None, onnx_ir.Value] = {}  # carried values, and what was spelled instead
        self.spelled: set[Node] = set()
        self.left_over: list[onnx_ir.Value | None] = []
        self.new_nodes: dict[onnx_ir.Node | None, Node] = {}  # with the node that each was spelled for
        self.connected: set[tuple[onnx_ir.Node, onnx_ir.Value | None]] = set()

    # -- places ------------------------------------------------------------------------------------------------------

    def _place_regions(self, root: Graph) -> None:
        """Which nested ONNX graph each region is."""
        for _, node in root.walk():
            target = self.carrier.nodes.get(node.origin) if node.regions else None
            nested = [] if target is None else nested_graphs(target)
            for index, region in enumerate(node.regions):
                if len(nested) == len(node.regions):
                    self.graphs[region] = nested[index]

    def carried(self, value: Value) -> onnx_ir.Value | None:
        """The ONNX value that stands for a value, new or carried; None for one inside an ONNX node."""
        value = self._outer(value)
        same = self.changes.same.get(value, value)
        found = self.created.get(value) or self.carrier.copy_of(value.origin or same.origin)
        while found in self.superseded:
            found = self.superseded[found]
        return found

    def _outer(self, value: Value) -> Value:
        while value in self.changes.captured:
            value = self.changes.captured[value]
        return value

    def _visible(self, value: onnx_ir.Value, place: onnx_ir.Graph) -> bool:
        scope: onnx_ir.Graph | None = place
        while scope is not None:
            if value.graph is scope:
                return True
            scope = self.parents.get(scope)
        return False

    def _reachable(self, value: onnx_ir.Value, place: onnx_ir.Graph) -> onnx_ir.Value:
        """A value as it is called outside the branches that were assumed to be taken when the model was read."""
        while not self._visible(value, place) and value in self.branch_outputs:
            value = self.branch_outputs[value]
        return value

    # -- what is dissolved -------------------------------------------------------------------------------------------

    def dissolved(self) -> list[onnx_ir.Node]:
        """ONNX nodes that a change reaches into; those of which a part is dead may stay as they are."""
        found: dict[onnx_ir.Node, None] = {}
        for node in self.changes.restated:
            if node.origin in self.kept:
                found[node.origin] = None
        for edge in self.changes.rewired:
            if edge.node is None or edge.node.origin not in self.kept:
                continue
            if self._slots(edge) is None or self._is_relative(edge):
                found[edge.node.origin] = None
        if self.graph.metadata.get("onnx_fold"):
            found.update(dict.fromkeys(origin for origin in self.kept if self._is_read_sequence(origin)))
        pending = [*self.added, *(node for origin in found for node in self.kept[origin])]
        pending_values = [v for n in pending for _, v in n.operands()]
        pending_values += [e.after for e in self.changes.rewired if isinstance(e.after, Value)]
        while pending_values:
            value = pending_values.pop()
            producer = value.producer
            if producer is None or producer in self.added or self.carried(value) is not None:
                continue
            if producer.origin in self.kept and producer.origin not in found:
                found[producer.origin] = None
                pending_values += [v for n in self.kept[producer.origin] for _, v in n.operands()]
        return list(found)

    def _is_read_sequence(self, origin: onnx_ir.Node) -> bool:
        """Whether a node that gives a sequence was read as the pieces it holds, not kept as it is."""
        return origin.op_type in _SEQUENCES and not any(node.op in OPAQUE for node in self.kept[origin])

    def _slots(self, edge: Rewired) -> list[tuple[onnx_ir.Node, int]] | None:
        """The inputs of the ONNX node that an operand slot is; None where they are told apart by spelling it anew."""
        assert edge.node is not None
        target = self.carrier.nodes.get(edge.node.origin)
        before = self.carried(edge.before) if isinstance(edge.before, Value) else None
        if target is None or before is None or edge.after is None:
            return None
        reading = [target, *(inner for nested in nested_graphs(target) for inner in nested.all_nodes())]
        slots = [(node, index) for node in reading for index, value in enumerate(node.inputs) if value is before]
        readers = [
            (node, slot)
            for node in self.imported_nodes.get(edge.node.origin, ())
            for slot, operand in node.operands()
            if not node.regions and self.carried(operand) is before
        ]
        moved = {
            (self.changes.old_of[other.node], other.slot)
            for other in self.rewired_by[edge.node.origin]
            if other.node is not None and other.after is edge.after
        }
        return slots if slots and all(reader in moved for reader in readers) else None

    def _is_relative(self, edge: Rewired) -> bool:
        """Whether what the ONNX node says may mean something else of the new operand, which has another shape: bounds
        and indices count from its end, a 0 in a target is its size, an axis of -1 its last."""
        node, before, after = edge.node, edge.before, edge.after
        if node is None or not isinstance(before, Value) or not isinstance(after, Value) or same_shape(before, after):
            return False
        if node.op in OPAQUE or node.regions or node.operator.rule is broadcast_rule:
            return False
        origin = node.origin
        if node.op == FOLDED_SIZES.get(origin.op_type) and edge.slot == 0:
            read = self.folded.get(origin.inputs[1]) if len(origin.inputs) > 1 else None  # and kept, if it drifted
            target = read.known if read else self.contents.of(origin.inputs[1]) if len(origin.inputs) > 1 else None
            return not gives_sizes(origin.op_type, target, after.shape, list(node.outputs[0].shape))
        form = find_onnx(origin.domain, origin.op_type)
        return before.rank != after.rank or (form is not None and form[1].write is not None)

    # -- changes -----------------------------------------------------------------------------------------------------

    def spell_all(self, dissolved: Sequence[onnx_ir.Node]) -> None:
        """Spell what passes added and what dissolved nodes leave, in the order in which they run."""
        left = {node for origin in dissolved for node in self.kept[origin]}
        for node in list(self.owners):
            if node in self.added or node in left:
                self._spell(node)
        unplaced = self.added - self.spelled
        if unplaced:
            raise EmitError(f"{next(iter(unplaced)).label} is no part of the graph: it cannot be written to ONNX")

    def _spell(self, node: Node) -> None:
        reason = f"added by {_who(node)}" if node in self.added else "part of an ONNX node that a pass changed"
        owner = self.owners[node]
        place = self.graphs.get(owner)
        if place is None:
            raise EmitError(f"{node.label}, {reason}, is in a nested graph of a function: it cannot be written to ONNX")
        onnx = OnnxSpeller(
            node, self.carrier, place, lambda value: self.operand(node, value, place), self.sources, reason
        )
        results = spell(onnx)
        self.new_nodes.update(dict.fromkeys(onnx.added, node))
        self.spelled.add(node)
        for value, made in zip(node.outputs, results, strict=True):
            same = self.changes.same.get(value, value)  # a new node that took the place of one keeps its readers
            before = self.carrier.copy_of(value.origin or same.origin) or self._named_before(owner, value)
            self.created[value] = made
            self._declare(made, value, onnx.added)
            if before is not None:
                self._replace(before, made, owner)
        self.left_over += onnx.superseded
        if onnx.added:
            onnx.added[-1].name = onnx.added[-1].outputs[0].name
        if (self.carrier.model.ir_version or 0) >= 10:
            for made_node in onnx.added:
                made_node.metadata_props.update(scope_notes(node) if self.tells_places else {})
                made_node.metadata_props.update({k: node.metadata[k] for k in _PROVENANCE if k in node.metadata})

    def _declare(self, made: onnx_ir.Value, value: Value, added: Sequence[onnx_ir.Node]) -> None:
        self.sources.shapes.setdefault(made, value.shape)
        if made.producer() not in added:
            return  # an operand that is passed on
        made.name = self.carrier.unique(value.name)
        if isinstance(value.dtype, torch.dtype):
            made.type = onnx_ir.TensorType(onnx_ir.tensor_adapters.from_torch_dtype(value.dtype))
            made.shape = onnx_ir.Shape([size if isinstance(size, int) else None for size in value.shape])

    def _named_before(self, owner: Graph, value: Value) -> onnx_ir.Value | None:
        """The carried value whose name, and so whose readers, a new value took over."""
        for removed in self.changes.removed:
            for old in removed.outputs:
                if old.name == value.name and value.origin is None:
                    return self.carrier.copy_of(old.origin)
        return None

    def operand(self, node: Node, value: Value, place: onnx_ir.Graph) -> onnx_ir.Value:
        """The ONNX value for an operand of a node that is spelled."""
        found = self.created.get(value)
        if found is None and self._still_holds(value):
            found = self.carried(value)
        hidden = found is None or not self._visible(found, place)
        if hidden and isinstance(value, Parameter):
            found = self.created[value] = self.carrier.add_initializer(value.name, _tensor_of(value))
            self.sources.shapes[found] = value.shape
        if found is None:
            raise EmitError(f"{node.label} reads {value.name}, which is inside an ONNX node: that cannot be written")
        found = self._reachable(found, place)
        if not self._visible(found, place):
            raise EmitError(
                f"{node.label} reads {value.name}, computed in another nested graph: that cannot be written"
            )
        return found

    def _still_holds(self, value: Value) -> bool:
        """Whether the carried value has the content that a constant has: it may follow from sizes that were cut."""
        if not isinstance(value, Parameter) or value.origin not in self.folded:
            return True
        present = self.contents.of(value.origin)
        return present is not None and present.static and is_content(present.array, value.tensor)

    def connect_all(self) -> None:
        for edge in self.changes.rewired:
            if edge.node is None:
                self._connect_output(edge)
            elif edge.node not in self.spelled:
                self._connect(edge)

    def _connect(self, edge: Rewired) -> None:
        assert edge.node is not None
        node = edge.node
        target = self.carrier.nodes.get(node.origin)
        before = self.carried(edge.before) if isinstance(edge.before, Value) else None
        if target is None or (target, before) in self.connected:
            return  # with another edge of the same ONNX node
        slots = self._slots(edge)
        if slots is None or target.graph is None:
            raise EmitError(
                f"{node.label}: operand {edge.slot} was replaced inside an ONNX node: that cannot be written"
            )
        self.connected.add((target, before))
        if isinstance(edge.after, Value):
            after = self.operand(node, edge.after, target.graph)
        else:
            kind = edge.before.dtype if isinstance(edge.before, Value) else None
            dtype = kind if isinstance(kind, torch.dtype) else None
            after = self.carrier.add_initializer(
                f"{node.name}_number", onnx_ir.tensor(torch.tensor(edge.after, dtype=dtype))
            )
        for reader, index in slots:
            reader.replace_input_with(index, after)
        self.left_over.append(before)  # not yet: what only it reads may be read by another edge

    def _connect_output(self, edge: Rewired) -> None:
        place = self.graphs.get(edge.graph)
        if place is None or not isinstance(edge.after, Value):
            raise EmitError(
                f"output {edge.slot} of {edge.graph.name} is {edge.after} now: it cannot be written to ONNX"
            )
        if edge.after.producer in self.spelled and self.carrier.copy_of(edge.after.origin) is not None:
            return  # replaced with all other readers
        declared = place.outputs[edge.slot]
        source = self.operand(_reader(edge), edge.after, place)
        if source is not declared:
            self._give_output(place, edge.slot, source, rename=edge.after.name == declared.name)

    def _give_output(self, place: onnx_ir.Graph, slot: int, source: onnx_ir.Value, *, rename: bool = False) -> None:
        """The output keeps its declaration: what is new, or took its name in the graph, takes it over; of anything
        else an Identity makes a copy."""
        declared = place.outputs[slot]
        self.carrier.give_output(place, slot, source, rename=rename or source.producer() in self.new_nodes)
        self.left_over.append(declared)  # not yet: what it was computed from may be read by an edge that comes later

    def _replace(self, before: onnx_ir.Value, made: onnx_ir.Value, owner: Graph) -> None:
        """Let whatever reads a carried value read what was spelled in its place."""
        if before is made:
            return
        self.superseded[before] = made
        for usage in list(before.uses()):
            if usage.node is not made.producer():
                usage.node.replace_input_with(usage.idx, made)
        place = self.graphs[owner]
        for slot, output in enumerate(place.outputs):
            if output is before:
                self._give_output(place, slot, made)
        if made.producer() in self.new_nodes and not made.is_graph_output():
            self.carrier.take_name(made, before)
        self.left_over.append(before)

    def remove_all(self) -> None:
        """Drop the ONNX nodes of which nothing is left."""
        for node in self.changes.removed:
            if isinstance(node.origin, onnx_ir.Node):
                self.carrier.drop_unused([self.carrier.copy_of(output) for output in node.origin.outputs])
        self.carrier.drop_unused(self.left_over)
        for node in self.spelled - self.added:
            self.carrier.drop_unused([self.carrier.copy_of(output) for output in node.origin.outputs])

    def tidy(self) -> None:
        """What was spelled anew is as few nodes as before, under the name and with the notes of what it stands for."""
        made = {new: node.origin for new, node in self.new_nodes.items() if isinstance(node.origin, onnx_ir.Node)}
        join_gemms(list(filter(None, made)), self.new_nodes, self.carrier, self.sources.shape_of)
        heirs = {origin: new for new, origin in made.items() if new is not None and new.op_type == origin.op_type}
        for origin, heir in heirs.items():
            before = self.carrier.nodes.get(origin)
            if heir.graph is not None and before is not None and before.graph is None:
                _inherit(heir, before)


def _inherit(heir: onnx_ir.Node, before: onnx_ir.Node) -> None:
    """What people wrote on a node that is spelled anew: its name, its description, its own metadata."""
    heir.name = before.name or heir.name
    heir.doc_string = before.doc_string
    heir.metadata_props.update(before.metadata_props)


def _reader(edge: Rewired) -> Node:
    """What messages call an output that reads something else."""
    assert isinstance(edge.after, Value)
    node = Node(op="output", inputs=[edge.after], attributes={})
    node.outputs = (Value(name=f"output {edge.slot}", shape=(), dtype=edge.after.dtype),)
    return node


def _parents(graph: onnx_ir.Graph) -> dict[onnx_ir.Graph, onnx_ir.Graph]:
    """The graph around each nested graph."""
    found: dict[onnx_ir.Graph, onnx_ir.Graph] = {}
    for owner in with_nested(graph):
        for node in owner:
            found.update(dict.fromkeys(graphs_in(node), owner))
    return found


def _branch_outputs(graph: Graph, carrier: Carrier) -> dict[onnx_ir.Value, onnx_ir.Value]:
    """Outputs of branches whose nodes were read in place of their If, with the output of the If that they are."""
    found: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for origin, branch in graph.metadata.get("onnx_branches", {}).items():
        node = carrier.nodes.get(origin)
        if node is not None:
            found.update(zip(nested_graphs(node)[branch].outputs, node.outputs, strict=True))
    return found


def _tensor_of(parameter: Parameter) -> onnx_ir.TensorProtocol:
    return onnx_ir.tensor_adapters.TorchTensor(parameter.tensor.contiguous())


def _who(node: Node) -> str:
    return node.metadata.get("regauge.added_by") or "a pass"


def carried_nodes(graph: Graph, changes: Changes) -> Iterable[tuple[Graph, Node]]:
    """Nodes of a graph that stand for a carried ONNX node, with their owner; not those built in place of one."""
    added = set(changes.added)
    for owner, node in graph.walk():
        if node not in added and isinstance(node.origin, onnx_ir.Node):
            yield owner, node
