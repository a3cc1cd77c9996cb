"""``nn.Linear`` as ONNX exporters spell it, put together again: ``add(matmul(x, permute(weight)), bias)``."""

from __future__ import annotations

import re

from regauge.backends.torch_module.frames import scope_of
from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.sizes.expressions import Size
from regauge.ir.storage.weights import DenseWeight, LazyWeight, Weight, dense


def fuse_linear(graph: Graph) -> None:
    """Replace products with a weight, and the sum with a bias behind them, by ``linear`` nodes, in place.

    A weight that is stored the other way round is turned, but only where nothing but such products reads it and
    its name is no path: a path is the name of a tensor of a module of the user's, who may load it by that name.
    """
    build = Builder(graph)
    turned: dict[Parameter, Parameter] = {}
    for node in graph.nodes:
        if node.op != "matmul" or not scope_of(node):
            continue
        weight = _weight(graph, build, node, turned)
        if weight is not None:
            _fuse(graph, build, node, weight)
    for old in turned:
        if not old.uses:
            del graph.parameters[old.name]


def _weight(graph: Graph, build: Builder, node: Node, turned: dict[Parameter, Parameter]) -> Value | None:
    """The weight, outputs first, of a product that is a linear layer; None where it is none."""
    operand = node.inputs[1]
    x = node.inputs[0]
    if not isinstance(operand, Value) or operand.rank != 2 or not isinstance(x, Value) or isinstance(x, Parameter):
        return None
    source = operand.producer
    if source is not None and source.op == "permute" and tuple(source.attributes["dims"]) == (1, 0):
        stored = source.inputs[0]
        return stored if isinstance(stored, Parameter) else None
    if not isinstance(operand, Parameter) or operand.kind != "parameter" or "." in re.sub(r"^.*::", "", operand.name):
        return None
    if operand in turned:
        return turned[operand]
    alone = all(slot == 1 and user.op == "matmul" and scope_of(user) for user, slot in operand.uses)
    if not alone or any(output is operand for output in graph.outputs):
        return None
    name = build.unique(operand.name)
    turned[operand] = build.parameter(name, _turned(operand.weight), trainable=operand.trainable)
    return turned[operand]


def _turned(weight: Weight) -> Weight:
    if isinstance(weight, DenseWeight):
        return dense(weight.tensor.t().contiguous())
    return LazyWeight(weight.shape[::-1], weight.dtype, lambda: weight.load().t().contiguous())


def _fuse(graph: Graph, build: Builder, product: Node, weight: Value) -> None:
    operands = [product.inputs[0], weight]
    last = product
    found = following_bias(graph, product, weight.shape[0])
    if found is not None:
        last, bias = found
        operands.append(bias)
    with build.at(product):
        result = build("linear", *operands, results=[(last.output.shape, last.output.dtype)])
    result.name = last.output.name
    replace_uses(graph, last.output, result)
    source = product.inputs[1]
    remove_node(graph, last)
    if last is not product:
        remove_node(graph, product)
    if isinstance(source, Value) and source.producer is not None and not source.uses:
        if all(output is not source for output in graph.outputs):
            remove_node(graph, source.producer)


def following_bias(graph: Graph, product: Node, outputs: Size) -> tuple[Node, Parameter] | None:
    """The sum that follows a product in the same module, and the bias it adds."""
    value = product.output
    users = value.consumers()
    if len(users) != 1 or users[0].op != "add" or users[0].scope != product.scope:
        return None
    if any(output is value for output in graph.outputs) or any(s.after is value for s in graph.states):
        return None
    total = users[0]
    others = [operand for operand in total.inputs[:2] if operand is not value]
    bias = others[0] if len(others) == 1 else None
    plain = len(total.inputs) == 2 and all(v in (1, None) for v in total.attributes.values())
    if isinstance(bias, Parameter) and bias.shape == (outputs,) and plain:
        return total, bias
    return None
