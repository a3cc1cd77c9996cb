"""Rows of tensors of three and more axes as the rows of a matrix, in files for runtimes that multiply matrices.

    y = add(linear(x, w, b), z)      y' = add(linear(x', w, b), z')      x', z' = x, z reshaped to (rows, features)

A linear map of a matrix is one Gemm in ONNX; of anything else it is a MatMul and an Add, which onnxruntime turns into a
Gemm between two Reshapes. Operators that treat every row by itself (norms and reductions over the last axis, pointwise
ones, splits along the last axis) do not need the other axes either, so that a residual stream stays a matrix from one
attention to the next. Which operators work on matrices is a minimum cut: a reshape costs a node wherever a value is
read in both forms, a linear map with a bias saves one, and reshapes that are there already take a value from either
form to any other for nothing. So there are never more nodes than before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from regauge.ir.axis_rules.rules import is_pointwise
from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder, remove_node, replace_uses, set_input
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.minimum_cut import Network
from regauge.ir.sizes.expressions import Size, product, same
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.layout import REDUCTIONS, REGROUPING, dynamic_sizes, regrouped
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.linear_map import W, X, bias_of
from regauge.passes.simplify.pieces import axis_of

NORMS = ("layer_norm", "rms_norm")
ALONG = ("split", "concat", "softmax", "log_softmax")  # along an axis, which is the last one here
A_NODE, A_KERNEL, A_CHANGE = 1 << 20, 1 << 10, 1  # prices: a node; a slower kernel; any change at all
MATRIX, TALL = "matrix", "tall"  # the two sides of the cut


def flatten_rows(graph: Graph, limits: Limits) -> int:
    """Let what treats rows alike work on matrices, in a graph that was loaded from ONNX; returns how many nodes do."""
    if "onnx" not in graph.metadata:
        return 0
    owners = list(scopes(graph))
    held = set().union(*(held_values(owner) for owner, _ in owners))
    return sum(_Flattening(owner, build, held).run() for owner, build in owners)


# -- what can work on matrices -----------------------------------------------------------------------------------------


def flat_shape(value: Value) -> tuple[Size, ...]:
    """The shape of a value whose leading axes are merged."""
    return product(value.shape[:-1]), value.shape[-1]


def row_slots(node: Node) -> tuple[int, ...] | None:
    """The operands whose rows are those of the results; None of a node that cannot work on rows as a matrix."""
    first = node.outputs[0] if node.outputs else None
    if first is None or first.rank < 3 or is_fixed(node) or is_part(node) or dynamic_sizes(first.shape[:-1]) > 1:
        return None
    values = dict(node.operands())
    if _is_product(node) or node.op in NORMS and len(node.attributes["normalized_shape"]) == 1:
        slots: tuple[int, ...] = (X,)
    elif is_pointwise(node):
        slots = tuple(slot for slot, value in values.items() if value.rank > 1)
    elif _is_along_the_last(node):
        slots = tuple(values)
    else:
        return None
    rows = [*(values[slot] for slot in slots), *node.outputs]
    return slots if all(_has_rows_of(value, first) for value in rows) else None


def _has_rows_of(value: Value, other: Value) -> bool:
    if isinstance(value, Parameter) and not (len(value.uses) == 1 and value.stored and is_real(value.dtype)):
        return False  # it would be there twice
    return value.rank == other.rank and all(map(same, value.shape[:-1], other.shape[:-1]))


def _is_along_the_last(node: Node) -> bool:
    rank = node.outputs[0].rank
    if node.op in ALONG:
        return axis_of(node) == rank - 1
    dims = node.attributes["dims"] if node.op in REDUCTIONS and node.attributes["keepdim"] else None
    return dims is not None and [dim % rank for dim in dims] == [rank - 1]


def _on_matrix(node: Node) -> dict[str, Any]:
    """The attributes of a node where its results have two axes."""
    changed: dict[str, Any] = {"dim": 1} if node.op in ALONG else {"dims": (1,)} if node.op in REDUCTIONS else {}
    return {**node.attributes, **changed}


def _is_product(node: Node) -> bool:
    """Whether a node multiplies rows with a matrix."""
    weight = node.inputs[W] if node.op == "matmul" else None
    return node.op == "linear" or isinstance(weight, Value) and weight.rank == 2


def _saves(node: Node) -> bool:
    """Whether a node makes one ONNX node less where it works on a matrix: a bias, or a sum with a product."""
    if node.op == "linear":
        return bias_of(node) is not None and is_real(node.output.dtype)
    return node.op == "add" and any(_takes_in(value, node) for _, value in node.operands())


def _takes_in(value: Value, total: Node) -> bool:
    """Whether a value is a product without a bias that nothing but this sum reads, so that a Gemm gives the sum."""
    maker, plain = value.producer, value.shape == total.output.shape and is_real(value.dtype)
    alone = plain and len(value.uses) == 1 and maker is not None and _is_product(maker)
    return alone and maker is not None and bias_of(maker) is None


# -- one graph ---------------------------------------------------------------------------------------------------------


class _Flattening:
    """Chooses what of a graph works on matrices, and writes that anew."""

    def __init__(self, graph: Graph, build: Builder, held: set[Value]) -> None:
        self.graph, self.build, self.held = graph, build, held
        elsewhere = held - held_values(graph)
        found = {node: row_slots(node) for node in graph.nodes}
        self.slots = {n: slots for n, slots in found.items() if slots and elsewhere.isdisjoint(n.outputs)}
        self.moved: set[Node] = set()
        self.matrices: dict[Value, Value] = {}
        self.heirs: list[tuple[Value, Value]] = []
        build.by = "rows"

    def run(self) -> int:
        if not any(_saves(node) or self.has_needless(node) for node in self.slots):
            return 0
        before = list(self.graph.nodes)
        chosen = self.chosen()
        moved = [node for node in before if node in chosen and node in self.slots]
        self.moved = set(moved)
        for node in moved:
            self.write(node)
        for node in moved:
            self.hand_over(node)
        self.clear([node for node in before if node in self.moved or node.op in REGROUPING])
        return len(moved)

    # -- the choice --------------------------------------------------------------------------------------------------

    def chosen(self) -> set[Node]:
        """The nodes on the side of matrices of a minimum cut, and reshapes that may as well give a matrix."""
        network = Network()
        cost = network.add  # a price if the one is on the side of matrices and the other is not
        for node in self.slots:
            cost(node, TALL, A_CHANGE)
            if _saves(node):
                cost(MATRIX, node, A_NODE + A_KERNEL)
            elif node.op in NORMS:
                cost(MATRIX, node, A_KERNEL)
        for value in dict.fromkeys(value for node in self.slots for value in self.rows(node)):
            maker = self.maker(value)
            cost((value, MATRIX), maker, A_NODE)
            cost(maker, (value, TALL), A_NODE)
            for reader in self.readers(value):
                cost(reader, (value, MATRIX))
                cost((value, TALL), reader)
            if isinstance(maker, Node) and (needless := self.needless(value, maker)):
                cost(MATRIX, maker, A_NODE * needless)
        return {node for node in network.source_side(MATRIX, TALL) if isinstance(node, Node)}

    def rows(self, node: Node) -> Iterator[Value]:
        """The values whose rows a node reads or gives, weights aside."""
        read = (node.inputs[slot] for slot in self.slots[node])
        yield from (value for value in read if isinstance(value, Value) and not isinstance(value, Parameter))
        yield from node.outputs

    def maker(self, value: Value) -> Node | str:
        """What decides in which form a value comes: its node, or a reshape that could give either; else it is tall."""
        node = value.producer
        return node if node is not None and (node in self.slots or _is_free(node)) else TALL

    def readers(self, value: Value) -> Iterator[Node | str]:
        """What needs a value in one form: nodes that could read it as a matrix, and all else that is no reshape."""
        for node, slot in value.uses:
            if node in self.slots and slot in self.slots[node]:
                yield node
            elif not self.takes_any(node):
                yield TALL
        if value in self.held:
            yield TALL

    def takes_any(self, node: Node) -> bool:
        """Whether a node is a reshape that can be made from either form of its operand."""
        return _is_free(node) and node.output not in self.held and dynamic_sizes(node.output.shape) <= 1

    def has_needless(self, node: Node) -> bool:
        makers = ((value, self.maker(value)) for value in self.rows(node))
        return any(isinstance(maker, Node) and self.needless(value, maker) for value, maker in makers)

    def needless(self, value: Value, maker: Node) -> int:
        """How many reshapes lead from a matrix to a value, and from there to a matrix."""
        behind = sum(self.takes_any(node) and _is_flat(node.output, value) for node in value.consumers())
        source = maker.inputs[0] if maker not in self.slots else None
        return behind + (isinstance(source, Value) and _is_flat(source, value))

    # -- the rewriting -----------------------------------------------------------------------------------------------

    def write(self, node: Node) -> None:
        """Build a node on matrices."""
        operands = [self.matrix(x, node) if slot in self.slots[node] else x for slot, x in enumerate(node.inputs)]
        with self.build.at(node):
            made = self.build(node.op, *operands, name=f"{node.name}_rows", **_on_matrix(node))
        results = made if isinstance(made, tuple) else (made,)
        results[0].producer.metadata["regauge.replaces"] = node.metadata.get("regauge.replaces") or node.name
        self.matrices.update(zip(node.outputs, results, strict=True))

    def matrix(self, value: Any, reader: Node) -> Value:
        """An operand as a matrix of rows."""
        if isinstance(value, Parameter):
            rows = [int(size) for size in flat_shape(value)]
            return self.build.folded(value, lambda tensor: tensor.reshape(rows), shape=rows)
        if value not in self.matrices:
            maker = self.maker(value)
            source = maker.inputs[0] if isinstance(maker, Node) and maker not in self.slots else value
            assert isinstance(source, Value)
            self.matrices[value] = self.reshaped(self.matrices.get(source, source), flat_shape(value), reader)
        return self.matrices[value]

    def reshaped(self, value: Value, shape: Sequence[Size], near: Node) -> Value:
        """A value in another shape, by a node that stands for none of the file."""
        with self.build.at(near):
            self.build.origin = None
            return regrouped(self.build, value, shape)

    def hand_over(self, node: Node) -> None:
        """Let all that still reads a node in its old form read what is made of the matrix."""
        for value in node.outputs:
            for user in [user for user in value.consumers() if self.takes_any(user)]:
                with self.build.at(user):
                    self.replace(user.output, regrouped(self.build, self.matrices[value], user.output.shape))
            if value in self.held or any(user not in self.moved for user, _ in value.uses):
                self.replace(value, self.reshaped(self.matrices[value], value.shape, node))

    def replace(self, old: Value, new: Value) -> None:
        for user, slot in list(old.uses):
            if user not in self.moved:
                set_input(user, slot, new, self.graph)
        if old in self.held:
            replace_uses(self.graph, old, new)
        if new.producer is not None and new.producer.op in REGROUPING:
            self.heirs.append((old, new))

    def clear(self, old: Sequence[Node]) -> None:
        """Remove what nobody reads any more; what took its place takes its name."""
        gone: set[Node] = set()
        for node in reversed(old):
            if not any(value.uses or value in self.held for value in node.outputs):
                remove_node(self.graph, node)
                gone.add(node)
        names = {value: value.name for node in gone for value in node.outputs}
        self.build.release(names.values())
        for before, after in self.heirs:
            if before in names and after.name not in names.values():
                after.name = self.build.unique(names[before])
        settle_successors(self.graph, self.build)


def _is_free(node: Node) -> bool:
    """Whether a node is a reshape that may be another one."""
    return node.op in REGROUPING and not is_fixed(node) and not is_part(node)


def _is_flat(value: Value, tall: Value) -> bool:
    """Whether a value has the shape of another one as a matrix."""
    return value.rank == 2 and all(map(same, value.shape, flat_shape(tall)))
